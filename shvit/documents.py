"""JSON and YAML files: the one reader of both, with limits on what a file may ask for, and the one writer of JSON.

A third-party file may be nested ten thousand levels deep, expand to gigabytes by aliases, hold a number of five
thousand digits, or name a key twice, which readers resolve differently. All of that is refused in one line.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import InputError, first_line
from .files import read_bytes
from .img_size import ImgSize

if TYPE_CHECKING:
    import yaml
    from pydantic_core import ErrorDetails

MAX_BYTES = 64 << 20
MAX_DEPTH = 60  # levels of lists and mappings
MAX_DIGITS = 40  # of an integer; 128 bits have 39
MAX_NODES = 200_000  # of a YAML file, as it is written and with its aliases expanded; each takes 3 KB of memory

Model = TypeVar("Model")


# --- JSON -------------------------------------------------------------------------------------------------------------


def load_json(path: str | os.PathLike, limit: int = MAX_BYTES, max_depth: int | None = MAX_DEPTH) -> Any:
    """Return the content of a JSON file.

    Args:
        limit: bytes that the file may have.
        max_depth: as in `parse_json`.

    Raises:
        InputError: as `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, limit), str(path), max_depth)


def parse_json(text: str | bytes, name: str, max_depth: int | None = MAX_DEPTH) -> Any:
    """Return the content of a JSON text; of bytes, the encoding is detected as the standard has it.

    Args:
        name: what messages call it.
        max_depth: levels of nesting; None where measuring it would take too long, and the interpreter's limit holds.

    Raises:
        InputError: not JSON, nested too deeply, a key twice in one object, a number that is not finite or has more than
            `MAX_DIGITS` digits.
    """
    try:
        content = json.loads(
            text,
            object_pairs_hook=without_repetition,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
    except RecursionError:
        raise InputError(f"{name}: not readable as JSON (it is nested too deeply)") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are subclasses
        raise InputError(f"{name}: not readable as JSON ({first_line(error)})") from error
    if max_depth is not None and is_deeper(content, max_depth):
        raise InputError(f"{name}: not readable as JSON (it is nested more than {max_depth} levels deep)")
    return content


def without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object, as an `object_pairs_hook`; raise ValueError for a key twice, which readers differ on."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return content


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a number in JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]}… is too large")
    return value


def _bounded_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text.lstrip('-'))} digits")
    return int(text)


def is_deeper(content: object, depth: int) -> bool:
    """Return whether lists and dicts are nested more than `depth` levels deep; level by level, not by recursion."""
    level = [content]
    for _ in range(depth + 1):
        level = [
            child
            for each in level
            if isinstance(each, list | dict)
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, list | dict)
        ]
        if not level:
            return False
    return True


def to_json(content: object, indent: int | None = None) -> str:
    """Return plain values as JSON that every reader takes: NaN and infinities become null, other letters escapes.

    An image size becomes one number for a square, and [height, width] otherwise.
    """
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: object) -> object:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, ImgSize):
        return content.plain
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


# --- models -----------------------------------------------------------------------------------------------------------


def parse_model(kind: type[Model], content: object, name: str, advice: str = "") -> Model:
    """Return plain values, as `parse_json` gives them, as an instance of a dataclass or a pydantic model.

    Types are strict as in JSON: the text "64" is not a number, and a list is taken for a tuple.

    Args:
        kind: what they should be.
        name: what messages call them.
        advice: what to do, at the end of a message.

    Raises:
        InputError: the first thing that does not fit, with its place.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        ending = f"; {advice}" if advice else ""
        raise InputError(f"{name}: {describe_problem(error.errors()[0])}{ending}") from error


def describe_problem(problem: "ErrorDetails") -> str:
    """Return what pydantic found, as `place is value; what it should be`."""
    place, message = ".".join(map(str, problem["loc"])), str(problem["msg"])
    if problem["type"] == "missing":
        return f"{place} is missing"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown field {place!r}"
    message = message.removeprefix("Value error, ")
    value = repr(problem["input"])
    value = value if len(value) <= 80 else f"{value[:80]}…"
    return f"{place or 'it'} is {value}; {message[:1].lower()}{message[1:]}"


# --- YAML -------------------------------------------------------------------------------------------------------------


def load_yaml(path: str | os.PathLike, limit: int = MAX_BYTES) -> Any:
    """Return the plain values of a YAML file, as PyYAML's safe loader reads them.

    Raises:
        InputError: as `read_bytes` and `compose_yaml`, or a value is not readable, or not finite.
    """
    import yaml

    node = compose_yaml(read_bytes(path, limit), str(path))
    if node is None:
        return None
    loader = yaml.SafeLoader("")
    try:
        content = loader.construct_document(node)
    except Exception as error:  # PyYAML's constructors raise what a value of the wrong form brings about
        raise InputError(f"{path}: not readable as YAML ({_without_lines(error)})") from error
    finally:
        loader.dispose()
    if not all(map(_is_bounded, _leaves(content))):
        raise InputError(f"{path}: holds a number that is not finite, or of more than {MAX_DIGITS} digits")
    return content


def compose_yaml(text: bytes | str, name: str) -> "yaml.Node | None":
    """Return the nodes of a YAML text, whose aliases and nesting are bounded and whose keys are words, each once.

    None where the text is empty; InputError, which calls the text `name`, where it is not YAML or more than that.
    """
    import yaml

    kind = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        for count, event in enumerate(yaml.parse(text, Loader=kind)):  # without recursion, unlike what follows
            if count > MAX_NODES:
                raise ValueError(f"it has more than {MAX_NODES:,} values")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        node = yaml.compose(text, Loader=kind)
        check_expansion(node, _children, MAX_NODES, MAX_DEPTH + 1)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: not readable as YAML ({_without_lines(error)})") from error
    return node


def check_expansion(
    root: Any, children: Callable[[Any], Sequence[Any]], max_size: int, max_depth: float = math.inf
) -> None:
    """Raise ValueError where nested values lead back to themselves, or are too many once written out.

    Something that occurs in several places counts in each; it is visited once, and not by recursion.

    Args:
        root: the outermost; None for nothing.
        children: what is right inside of one.
        max_size: how many there may be, written out.
        max_depth: how deep they may be in each other.
    """
    sizes: dict[int, tuple[int, int]] = {}  # for each with all below it: how many, and how deep
    above: dict[int, Sequence[Any]] = {}  # those that are under way, and what is in them
    stack = [] if root is None else [root]
    while stack:
        each = stack[-1]
        if id(each) in sizes:
            stack.pop()
        elif id(each) not in above:
            inner = above[id(each)] = children(each)
            if any(id(child) in above for child in inner):
                raise ValueError("it holds what leads back to itself")
            stack.extend(child for child in inner if id(child) not in sizes)
        else:
            below = [sizes[id(child)] for child in above.pop(id(each))]
            size, depth = 1 + sum(each for each, _ in below), 1 + max((each for _, each in below), default=0)
            if size > max_size or depth > max_depth:
                raise ValueError("its parts expand without bound")
            sizes[id(each)] = size, depth


def _children(node: "yaml.Node") -> "list[yaml.Node]":
    """Return the nodes right inside of one; raise ValueError for keys that are not words, or repeated."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        return [each for pair in node.value for each in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _check_keys(node: "yaml.MappingNode") -> None:
    import yaml

    keys = [key.value for key, _ in node.value]
    if not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
        raise ValueError("a key is not a word")
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"the key {twice[0][:60]!r} stands twice in one mapping")


def _without_lines(error: BaseException) -> str:
    """Return the message of a YAML error, which has several lines, as one."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _leaves(content: object) -> Iterator[object]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from _leaves(value)
    elif isinstance(content, Sequence) and not isinstance(content, str | bytes):
        for value in content:
            yield from _leaves(value)
    else:
        yield content


def _is_bounded(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < 10**MAX_DIGITS
