"""The frames of a video, decoded by PyAV."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from shvit.environment import advise
from shvit.errors import InputError, first_line
from shvit.files import check_file
from shvit.train.data.images import MAX_PIXELS, to_rgb

if TYPE_CHECKING:
    from av.container import InputContainer

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".3gp"}
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts"
"""FFmpeg's names of the formats that are opened; its others include lists that name further files and addresses."""


class Frame(NamedTuple):
    """The result of reading a frame."""

    image: Image.Image | None
    """The frame in RGB, upright; None if it could not be read, and then it is the last one."""
    number: int
    """Place in the video, counted from 0."""
    seconds: float
    """Time of the frame."""
    problem: str = ""


@dataclass(frozen=True)
class Video:
    """Every n-th frame of a video file."""

    path: Path
    every: int
    expected: int
    """Number of these frames by what the file says of itself; 0 if it does not say it."""

    def __len__(self) -> int:
        return self.expected

    def identity(self) -> Iterator[str]:
        """Yield what identifies the frames: the file's name, size and date, and which frames are taken."""
        status = self.path.stat()
        yield from (str(self.path), str(status.st_size), str(status.st_mtime_ns), str(self.every))

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """Yield the frames from the `start`-th of those that are taken; where the video is damaged, it ends."""
        number = -1
        try:
            with _container(self.path) as container:
                for number, frame in enumerate(container.decode(video=0)):
                    if number % self.every == 0 and number // self.every >= start:
                        yield self._read(frame, number)
        except InputError as error:
            place = -(-(number + 1) // self.every)
            if place >= start:
                yield Frame(None, place * self.every, 0.0, str(error))

    def _read(self, frame: Any, number: int) -> Frame:
        name = f"{self.path}, frame {number}"
        image = to_rgb(frame.to_image(), name)
        if frame.rotation:
            image = image.rotate(frame.rotation, expand=True)
        return Frame(image, number, round(float(frame.time or 0), 6))


def open_video(path: Path, every: int) -> Video:
    """Return the frames of a video file; raise InputError where it cannot be opened, or has no frames to show."""
    check_file(path)
    with _container(path) as container:
        stream = container.streams.video[0]
        rate, duration = stream.average_rate, container.duration  # the latter in microseconds
        frames = stream.frames or (int(duration / 1e6 * float(rate)) if rate and duration else 0)
    return Video(path, every, -(-max(frames, 0) // every))


@contextmanager
def _container(path: Path) -> Iterator["InputContainer"]:
    """Open a video; FFmpeg's errors in the block become InputErrors with the file's name."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: is a video; {advise('av')}") from error
    try:
        with path.open("rb") as file, av.open(file, options={"format_whitelist": DEMUXERS}) as container:
            if not container.streams.video:
                raise InputError(f"{path}: holds no video; give one with frames")
            stream = container.streams.video[0]
            size = stream.codec_context.width * stream.codec_context.height
            if not 0 < size <= MAX_PIXELS:
                raise InputError(f"{path}: its frames have {size:,} pixels, and 1 to {MAX_PIXELS:,} are allowed")
            stream.thread_type = "AUTO"
            yield container
    except InputError:
        raise
    except Exception as error:  # FFmpeg's errors have types of their own, and a damaged file raises many
        raise InputError(f"{path}: not a readable video ({first_line(error)}); replace or remove it") from error
