"""Reading tar files within bounds: what a member says of its size is not taken for granted."""

import tarfile
from typing import Any

MAX_MEMBER = 1 << 30  # bytes; an image of the most pixels that are read, uncompressed, is smaller
MAX_HEADER = 1 << 20  # bytes of a member's long name and extended attributes, which are taken into memory
HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


MAX_NAME = 4096  # characters of a member's name, as of a path on Linux
MAX_LEVELS = 64  # of folders in it


class Member(tarfile.TarInfo):
    """A member whose headers are bounded."""

    def _proc_member(self, archive: Any) -> Any:
        if self.type in HEADERS and not 0 <= self.size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]  # not in the library's types


def check_member(member: tarfile.TarInfo) -> None:
    """Raise tarfile.ReadError for a member whose size no image has."""
    if not 0 <= member.size <= MAX_MEMBER:
        raise tarfile.ReadError(f"{member.name[:80]} says that it has {member.size} bytes")


def check_name(name: str) -> None:
    """Raise tarfile.ReadError for a name that no file has; that of a million folders would fill the memory."""
    if len(name) > MAX_NAME or name.count("/") > MAX_LEVELS:
        raise tarfile.ReadError(f"a name of {len(name)} characters in {name.count('/')} folders")
