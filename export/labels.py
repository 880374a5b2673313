"""Names of the classes."""

from collections import Counter
from pathlib import Path

from shvit.errors import InputError

MOST_BYTES = 10 << 20


def find_labels(path: Path | None, num_classes: int) -> list[str]:
    """The classes' names, by index.

    Args:
        path: a text file with one on each line; where None, ImageNet-1k's for 1000 classes, and none for other numbers.

    Raises:
        InputError: the file is not there, not UTF-8, has another number of lines than the model has classes, or an
            empty or repeated one.
    """
    if path is None:
        return _imagenet() if num_classes == 1000 else []
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: too large for a list of labels; give one on each line")
        labels = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: cannot be read as labels: {reason}") from error
    if len(labels) != num_classes:
        raise InputError(f"{path}: has {len(labels)} lines, and the model {num_classes} classes; give one on each line")
    name, count = Counter(labels).most_common(1)[0]
    if count > 1 or "" in labels:
        raise InputError(f"{path}: {'an empty line' if '' in labels else f'{name!r} stands there twice'}; each class "
                         "needs a name of its own")  # fmt: skip
    return labels


def _imagenet() -> list[str]:
    """ImageNet-1k's, from timm; the few names that two classes share get the class's number."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names = [info.index_to_description(index) for index in range(info.num_classes())]
    counts = Counter(names)
    return [f"{name} ({index})" if counts[name] > 1 else name for index, name in enumerate(names)]
