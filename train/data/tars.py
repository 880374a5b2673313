"""Limits for reading tar files, so that a member's declared sizes cannot exhaust memory."""

import tarfile

MAX_MEMBER = 1 << 30  # bytes; the largest accepted image is smaller, uncompressed
MAX_HEADER = 1 << 20  # bytes of a member's long name and extended attributes, which are read into memory
HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


MAX_NAME = 4096  # characters of a member's name, Linux's limit of a path
MAX_LEVELS = 64  # of folders in it


class Member(tarfile.TarInfo):
    """A member with limited headers."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in HEADERS and not 0 <= self.size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]  # not in the library's types


def check_member(member: tarfile.TarInfo) -> None:
    """Raise tarfile.ReadError for a member larger than any image."""
    if not 0 <= member.size <= MAX_MEMBER:
        raise tarfile.ReadError(f"{member.name[:80]} declares {member.size} bytes")


def check_name(name: str) -> None:
    """Raise tarfile.ReadError for a name too long for a file; one of a million folders would exhaust memory."""
    if len(name) > MAX_NAME or name.count("/") > MAX_LEVELS:
        raise tarfile.ReadError(f"a name of {len(name)} characters in {name.count('/')} folders")
