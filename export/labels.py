"""Names of the classes: of a model, in a file, of the folders that images lie in."""

import codecs
import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from shvit.errors import InputError, some
from shvit.files import read_bytes
from shvit.weights.imagenet import imagenet_ids, imagenet_names, is_imagenet
from shvit.weights.resolve import Log, Weights
from shvit.weights.run_info import is_name, same_name

from .spec import Spec

MAX_BYTES = 10 << 20
MAX_FAULTS = 4  # that are named


def find_labels(path: Path | None, num_classes: int, classes: Sequence[str] = ()) -> list[str]:
    """Return the classes' names, by index.

    Args:
        path: a text file with one on each line, in UTF-8 or in UTF-16 with its mark; where None, `classes`.
        classes: the names that are known of the model.

    Raises:
        InputError: the file is missing, not text, contradicts `classes`, or does not name each class once.
    """
    if path is None:
        return list(classes) if len(classes) == num_classes else []
    labels = _read_lines(path)
    wrong = next((number for number, label in enumerate(labels, 1) if not is_name(label)), None)
    if wrong is not None:
        fault = "is empty" if not labels[wrong - 1] else "holds control characters, or is longer than a name"
        raise InputError(f"{path}: line {wrong} {fault}; write a name of a class on each line, as UTF-8 text")
    if len(labels) != num_classes:
        raise InputError(f"{path}: has {len(labels)} lines, and the model {num_classes} classes; give one on each line")
    name, count = Counter(labels).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: {name!r} stands there twice; each class needs a name of its own")
    if classes and (problem := contradiction(labels, classes)):
        raise InputError(f"{path}: {problem}; leave out --labels, and the model's own names are written")
    return labels


def known_classes(weights: Weights | nn.Module, spec: Spec, log: Log = lambda line: None) -> tuple[str, ...]:
    """Return the names of the classes, where they are known; log it if their number is not the model's."""
    if not isinstance(weights, Weights):
        return ()
    if len(weights.classes) not in (0, spec.num_classes):
        log(f"{weights.name}: names {len(weights.classes)} classes, and the model has {spec.num_classes}; the names "
            "are not used")  # fmt: skip
        return ()
    return weights.classes


def _read_lines(path: Path) -> list[str]:
    """Return the lines without blanks around them, and without empty ones at the end."""
    content = read_bytes(path, MAX_BYTES)
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        text = content.decode("utf-16" if content.startswith(marks) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as labels: not UTF-8 text, nor UTF-16 with its mark") from error
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text.rstrip())]


def contradiction(labels: Sequence[str], classes: Sequence[str]) -> str | None:
    """Return how labels contradict the model's classes, if they do; ImageNet's may have other names than timm's."""
    names, known = [same_name(name) for name in labels], [same_name(name) for name in classes]
    if names == known:
        return None
    imagenet = is_imagenet(tuple(classes))
    for order in (known, list(imagenet_ids())) if imagenet else (known,):
        if sorted(names) == sorted(order):
            return None if names == order else f"has the model's classes in another order: {_first(names, order)}"
    return None if imagenet else _first(names, known)


def _first(labels: Sequence[str], known: Sequence[str]) -> str:
    """Return the first difference of two lists, as a sentence."""
    pairs = enumerate(zip(known, labels, strict=False))
    differences = (f"class {i} of the model is {a!r}, and the labels say {b!r}" for i, (a, b) in pairs if a != b)
    return next(differences, f"{len(labels)} labels for {len(known)} classes")


def label_faults(labels: Sequence[str], expected: Sequence[str]) -> list[str]:
    """Return what is wrong with a file's labels, which must be the model's in order; nothing where either has none."""
    if not labels or not expected or contradiction(labels, expected) is None:
        return []
    if sorted(labels) == sorted(expected):
        index = next(i for i, (a, b) in enumerate(zip(labels, expected, strict=True)) if a != b)
        return [f"labels in another order: class {index} is called {labels[index]!r} and is {expected[index]!r}"]
    others = sorted(set(labels) - set(expected))
    return [f"labels that are not the model's classes: {', '.join(map(repr, others[:MAX_FAULTS]))}"]


def task_faults(declared: Spec, spec: Spec) -> list[str]:
    """Return what an artifact says of its task that is not the model's."""
    if declared.task != spec.task:
        return [f"its task is {declared.task} and the model's {spec.task}"]
    if spec.task != "multi_label":
        return []
    pairs = enumerate(zip(declared.label_thresholds.tolist(), spec.label_thresholds.tolist(), strict=False))
    wrong = [f"label {index} has the threshold {ours:g} and the model's {own:g}" for index, (ours, own) in pairs
             if ours != own]  # fmt: skip
    return wrong[:MAX_FAULTS]


# --- folders of classes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassMatch:
    """The classes of a dataset matched to those of a model."""

    index: tuple[int, ...]  # the model's index of each class of the dataset; -1 for one that the model does not know
    unknown: tuple[str, ...]  # the dataset's classes that the model does not know
    missing: tuple[str, ...]  # the model's classes that the dataset does not have


def match_classes(names: Sequence[str], classes: Sequence[str]) -> ClassMatch:
    """Match a dataset's classes to a model's by name; ImageNet's also by WordNet id and by number.

    A class that the model does not know letter by letter may have its accents written in another way, unless the
    dataset or the model has a second class of that name.
    """
    known = {name: number for number, name in enumerate(classes)}
    if is_imagenet(tuple(classes)):
        for spelling in (imagenet_ids(), imagenet_names(), map(str, range(1000))):
            for number, name in enumerate(spelling):
                known.setdefault(name, number)
    spellings, counts = Counter(map(same_name, names)), Counter(map(same_name, classes))
    alike = {same_name(name): number for number, name in enumerate(classes) if counts[same_name(name)] == 1}

    def index_of(name: str) -> int:
        if name in known:
            return known[name]
        return alike.get(same_name(name), -1) if spellings[same_name(name)] == 1 else -1

    index = tuple(map(index_of, names))
    unknown = tuple(name for name, place in zip(names, index, strict=True) if place < 0)
    return ClassMatch(index, unknown, tuple(name for place, name in enumerate(classes) if place not in set(index)))


def refuse_unknown(match: ClassMatch, classes: Sequence[str], source: object, advice: str) -> None:
    """Raise InputError if the dataset, `source`, has classes that the model does not know."""
    if match.unknown:
        first = match.unknown[0]
        close = [name for name in classes if name.casefold() == first.casefold()]
        close = close or difflib.get_close_matches(first, classes, n=1)
        hint = f" ({first!r} may be {close[0]!r})" if close else ""
        raise InputError(f"{source}: holds {len(match.unknown)} classes that the model does not know: "
                         f"{some(match.unknown)}{hint}; it knows {some(classes)}; rename the folders, or {advice}"
                         )  # fmt: skip
