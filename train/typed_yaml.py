"""YAML read by type: each value by the type of its field.

PyYAML follows YAML 1.1 and considers only the value: `1e-3` is text, `010` is 8, `1:30` is 90, `no` is false and
`2024-01-01` is a date, whatever the field.
"""

import re
from contextlib import suppress
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from shvit.documents import compose_yaml

NULLS = {"", "~", "null", "Null", "NULL"}
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
MAX_DIGITS = 60
AMBIGUOUS = (
    (r"[-+]?0[\d_]+", "is octal to some readers and decimal to others; write it without the 0 in front, or as 0o…"),
    (r"[-+]?\d[\d_]*(:\d+)+(\.\d*)?", "counts in sixties to some readers; write the number itself"),
)


class AmbiguousYAML(ValueError):
    """A value of a YAML file is ambiguous, or would not be read."""


def load_typed(text: bytes, kind: type, name: str, below: str = "") -> Any:
    """Parse a YAML file, reading the values of the fields of the dataclass `kind` by their types.

    Values that do not fit their type, and fields that `kind` does not have, are returned as they are.

    Args:
        name: name of the file in messages.
        below: if the file has a field of that name, `kind` describes the content below it instead of the whole file;
            fields of `kind` beside it would not be read, and are refused.

    Raises:
        InputError: see `compose_yaml`.
        yaml.YAMLError: tags that are not safe.
        AmbiguousYAML: the message says which field.
    """
    node = compose_yaml(text, name)
    loader = yaml.SafeLoader("")
    try:
        if isinstance(node, yaml.MappingNode) and below in [key.value for key, _ in node.value]:
            _check_beside(node, kind, below)
            node = next(value for key, value in node.value if key.value == below)
        return _read(loader, node, kind, "")
    finally:
        loader.dispose()


def _read(loader: yaml.SafeLoader, node: yaml.Node | None, kind: Any, name: str) -> Any:
    if node is None:
        return None
    if node.tag not in loader.yaml_constructors:
        raise yaml.YAMLError(f"unknown tag {node.tag}")
    if isinstance(node, yaml.MappingNode):
        return _read_fields(loader, node, kind if is_dataclass(kind) else None, name)
    if isinstance(node, yaml.SequenceNode):
        kinds = _kinds_of_items(kind, len(node.value))
        return [_read(loader, each, kind, name) for each, kind in zip(node.value, kinds, strict=False)]
    return _read_scalar(node.value, kind, name) if isinstance(node, yaml.ScalarNode) and not node.style else node.value


def _kinds_of_items(kind: Any, count: int) -> tuple[Any, ...]:
    """Return the types of a sequence's items: those of a tuple, which may be optional or of any length."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    kinds = next((get_args(option) for option in options if get_origin(option) is tuple), ())
    if kinds[1:] == (...,):
        return kinds[:1] * count
    return (*kinds, *(None for _ in range(count - len(kinds))))


def _check_beside(node: yaml.MappingNode, kind: type, below: str) -> None:
    """Refuse fields of `kind` beside the field `below`, where they would not be read; others are allowed."""
    kinds = get_type_hints(kind)
    for key, value in node.value:
        part = kinds.get(key.value)
        if is_dataclass(part):
            names = [inner.value for inner, _ in value.value] if isinstance(value, yaml.MappingNode) else []
            is_field = not get_type_hints(part).keys().isdisjoint(names)
        else:
            is_field = part is not None
        if is_field and key.value != below:
            raise AmbiguousYAML(f"{key.value} stands beside {below} and would not be read; move it below {below}")


def _read_fields(loader: yaml.SafeLoader, node: yaml.MappingNode, kind: Any, name: str) -> dict[str, Any]:
    if kind is None:
        return {}
    loader.flatten_mapping(node)  # of `<<: *other`
    kinds, content = get_type_hints(kind), {}
    for key, value in node.value:
        below = kinds.get(key.value)
        content[key.value] = _read(loader, value, below, f"{name}{key.value}{'.' if is_dataclass(below) else ''}")
    return content


def _read_scalar(text: str, kind: Any, name: str) -> Any:
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if text in NULLS or (text == "None" and NoneType in kinds):
        return None
    if bool in kinds and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if not {bool, int, float}.intersection(kinds):
        return text
    for pattern, reason in AMBIGUOUS:
        if re.fullmatch(pattern, text):
            raise AmbiguousYAML(f"{name} is {text}, which {reason}")
    number = _number(text)
    return int(number) if int in kinds and isinstance(number, float) and number.is_integer() else number


def _number(text: str) -> int | float | str:
    """Parse a number of YAML 1.2 or Python; return the text if it is not one, or has too many digits."""
    if len(text) > MAX_DIGITS:
        return text
    if re.fullmatch(r"[-+]?\.(inf|nan)", text, re.IGNORECASE):
        text = text.replace(".", "")
    with suppress(ValueError):
        return int(text, 0)
    with suppress(ValueError):
        return float(text)
    return text
