"""YAML as a person reads it: each value by the type of the field that it is for.

PyYAML goes by YAML 1.1 and looks at the value alone: `1e-3` is text to it, `010` is 8, `1:30` is 90, `no` is false and
`2024-01-01` is a date, whatever they were meant for.
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


class Unclear(ValueError):
    """A file that can be parsed, and of which a value can be read in two ways or would not be read."""


def load_typed(text: bytes, kind: type, name: str, below: str = "") -> Any:
    """The content of a YAML file, with values of the fields of the dataclass `kind` read by their types.

    Values that do not fit their type, and fields that `kind` does not have, come as they are found; it is not this
    function that refuses them.

    Args:
        name: what messages call the file.
        below: where the file has a field of that name, what stands below it is for `kind`, in place of the whole;
            fields of `kind` beside it, which would not be read, are refused.

    Raises:
        InputError: as `compose_yaml`.
        yaml.YAMLError: tags that are not safe.
        Unclear: the message says which field.
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
        kinds = get_args(kind) if get_origin(kind) is tuple else ()
        kinds = (*kinds, *(None for _ in node.value[len(kinds) :]))
        return [_read(loader, each, kind, name) for each, kind in zip(node.value, kinds, strict=False)]
    return _read_scalar(node.value, kind, name) if isinstance(node, yaml.ScalarNode) and not node.style else node.value


def _check_beside(node: yaml.MappingNode, kind: type, below: str) -> None:
    """Refuse fields of `kind` beside the one that it stands below; what else has the name of a field may be there."""
    kinds = get_type_hints(kind)
    for key, value in node.value:
        part = kinds.get(key.value)
        if is_dataclass(part):
            names = [inner.value for inner, _ in value.value] if isinstance(value, yaml.MappingNode) else []
            is_field = not get_type_hints(part).keys().isdisjoint(names)
        else:
            is_field = part is not None
        if is_field and key.value != below:
            raise Unclear(f"{key.value} stands beside {below} and would not be read; move it below {below}")


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
            raise Unclear(f"{name} is {text}, which {reason}")
    number = _number(text)
    return int(number) if int in kinds and isinstance(number, float) and number.is_integer() else number


def _number(text: str) -> int | float | str:
    """A number of YAML 1.2 or of Python; the text where it is none, or a number of more digits than any has."""
    if len(text) > MAX_DIGITS:
        return text
    if re.fullmatch(r"[-+]?\.(inf|nan)", text, re.IGNORECASE):
        text = text.replace(".", "")
    with suppress(ValueError):
        return int(text, 0)
    with suppress(ValueError):
        return float(text)
    return text
