"""The list of what an untrusted config may contain: fields, types and their arguments, and the kind of each value."""

import difflib
import keyword
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from mmengine.registry import Registry

from .arguments import SECTIONS

SCOPES = ("mmdet", "mmengine", "mmcv")
"""Registries that a type may come from."""

MAX_DEPTH = 40  # of dicts and lists in each other
MAX_ITEMS = 2000  # of a list, each of which may become an anchor or a layer; LVIS has 1,203 classes
MAX_LENGTH = 100_000  # characters of a text
UNTRUSTED = "is not taken from a config that might be somebody else's"

Arguments = dict[str, str]
"""Kinds of values by the names of arguments."""


def _read(text: str) -> tuple[dict[str, dict[str, Arguments]], dict[str, Arguments]]:
    """Return the arguments of types by section, and the fields of dicts without a type."""
    sections: dict[str, dict[str, Arguments]] = {}
    for block in re.split(r"^\[", text.strip(), flags=re.MULTILINE)[1:]:
        section, _, entries = block.partition("]\n")
        types = sections[section] = {}
        for entry in re.finditer(r"^(\w[\w\s]*?):((?:.*\n?(?!\w[\w\s]*?:))*)", entries, re.MULTILINE):
            arguments = dict(each.split("=", 1) for each in entry[2].split())
            types.update(dict.fromkeys(entry[1].split(), arguments))
    return sections, sections.pop("fields")


PARTS, DICTS = _read(SECTIONS)
TYPES = {name for types in PARTS.values() for name in types}
FIELDS = DICTS["config"]
"""Fields of a config: those of MMEngine's Runner that are allowed, and those that mmdet's configs add."""

NOT_TAKEN = (  # what mmengine's Runner reads besides
    *("compile", "runner_type", "model_wrapper_cfg", "strategy", "activation_checkpointing", "efficient_conv_bn_eval"),
    *("proposal_file", "file_client_args", "constructor", "cfg"),
)


class Refused(ValueError):
    """An error about a value that is not allowed: the value, and what to do."""


def registered() -> set[str]:
    """Return the names of everything that a config can have built."""
    import mmdet.registry
    import mmengine.registry

    registries = (each for module in (mmengine.registry, mmdet.registry) for each in vars(module).values())
    return {name for each in registries if isinstance(each, Registry) for name in each.module_dict}


# --- texts ------------------------------------------------------------------------------------------------------------

KEY = re.compile(rf"(?!({'|'.join(keyword.kwlist)})$)[A-Za-z_][\w.\-]{{0,200}}")  # that Python writes and reads
KNOWN_WEIGHTS = re.compile(  # names whose addresses libraries keep, and the servers of MMDetection and torchvision
    r"(torchvision://\w+|open-mmlab://[\w/]+"
    r"|https://(download\.openmmlab\.com|mmassets\.onedl\.ai|download\.pytorch\.org)/[\w\-./]+\.pth)"
)
PRIORITIES = ("HIGHEST", "VERY_HIGH", "HIGH", "ABOVE_NORMAL", "NORMAL", "BELOW_NORMAL", "LOW", "VERY_LOW", "LOWEST")


def _line(value: Any) -> str:
    if not isinstance(value, str):
        raise Refused(f"is {_short(value)}, not a text")
    if not value.isprintable() or "{{" in value:
        raise Refused(f"{_short(value)} is not a plain line of text")
    return value


def _matching(pattern: str, what: str) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if not re.fullmatch(pattern, _line(value)):
            raise Refused(f"{_short(value)} is not {what}")

    return check


def _data(value: Any, instead: str = "give --data FOLDER") -> None:
    """Let a file or folder through that is read: below the working folder, or by its whole path."""
    text = _line(value)
    if re.search(r"[^\W\d][\w+.\-]+:[/\\]|://|^[/\\]{2}", text):
        raise Refused(f"{_short(value)} is an address; {instead}, or write the path of a file on this machine")
    if text.startswith("~") or ".." in re.split(r"[/\\]", text):
        raise Refused(f"{_short(value)} leads out of the folder; {instead}, or write its whole path")


def _json(value: Any) -> None:
    _data(value)
    if value and not value.endswith(".json"):
        raise Refused(f"{_short(value)} is not a JSON file")


def _folder(value: Any) -> None:
    _data(value, instead="give --output FOLDER")
    if value.startswith(("/", "\\")) or value[1:2] == ":":
        raise Refused(f"{_short(value)} is not below the working folder; give --output FOLDER")


def _weights(value: Any) -> None:
    if not KNOWN_WEIGHTS.fullmatch(_line(value)) or ".." in value:
        _data(value, instead="give --pretrained FILE")


def _off(value: Any) -> None:
    """Refuse what would wait for a window to be closed, or read files that nothing has checked."""
    if value not in (False, 0):
        raise Refused(f"is {_short(value)}; leave it out")


def _names(value: Any) -> None:
    if isinstance(value, str):
        raise Refused(f"is the text {_short(value)}; write a tuple, with a comma: ({_short(value)},)")
    if not isinstance(value, list | tuple):
        raise Refused(f"is {_short(value)}; write the names of classes")
    for each in value:
        if isinstance(each, str) and (not each.isprintable() or "{{" in each or len(each) > 500):
            raise Refused(f"{_short(each)} is not a plain line of text")
        if not isinstance(each, str | int | float):
            raise Refused(f"has {_short(each)}; write the names of classes")


def _choice(value: Any, choices: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise Refused(f"is {_short(value)}; choose from {', '.join(choices)}")


# --- numbers ----------------------------------------------------------------------------------------------------------


def _number(largest: float, smallest: float | None = None) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if isinstance(value, str | bytes) or not isinstance(value, int | float):
            raise Refused(f"is {_short(value)}, not a number")
        low = -largest if smallest is None else smallest
        if not (math.isfinite(value) and low <= value <= largest):
            raise Refused(f"is {_short(value)}; choose {low:g} to {largest:g}")

    return check


CHECKS: dict[str, Callable[[Any], object]] = {
    "num": _number(1e12),
    "size": _number(16384, -1),
    "ratio": _number(64),
    "few": _number(256, -1),
    "word": _matching(r"[\w.\- ]{0,200}", "a name of letters and digits"),
    "line": _line,
    "off": _off,
    "metric": _matching(r"(\w[\w.\-]*/)?\w[\w.\-]{0,100}", "a metric's name, such as coco/bbox_mAP"),
    "template": _matching(r"[\w\-]{0,100}\{(:0?[1-9]?d)?\}[\w\-]{0,100}\.pth", "a file name like 'epoch_{}.pth'"),
    "data": _data,
    "json": _json,
    "folder": _folder,
    "weights": _weights,
    "names": _names,
}


# --- a config ---------------------------------------------------------------------------------------------------------


def check_config(content: dict[str, Any], given: Iterable[str] = ()) -> None:
    """Raise for what mmengine and mmdet would import, evaluate, unpickle, fetch or write to, if a config said so.

    Fields that nothing here knows are the config's own variables; they may hold any plain values.

    Args:
        given: fields (`a.b.0.c`) that were given on the command line, which are the user's own word.

    Raises:
        Refused: the first value that is not taken.
    """
    checker = _Checker(set(given))
    for field, value in content.items():
        if field in FIELDS:
            checker.check(value, FIELDS[field], field, MAX_DEPTH)
        elif field in NOT_TAKEN:
            checker.refuse_unless_given(field, value)
        else:
            checker.name(field, "the config")
            checker.plain(value, field, MAX_DEPTH)


class _Checker:
    """A comparison of values with their kinds, which lets values from the command line through."""

    def __init__(self, given: set[str]):
        self.given = given

    def is_given(self, place: str) -> bool:
        """Return whether a value, or one that it is in, is from the command line."""
        parts = place.replace("[", ".").replace("]", "").split(".")
        return any(".".join(parts[: end + 1]) in self.given for end in range(len(parts)))

    def refuse_unless_given(self, place: str, value: Any) -> None:
        if value is not None and not self.is_given(place):
            raise Refused(f"{place} {UNTRUSTED}")

    def check(self, value: Any, kind: str, place: str, depth: int) -> None:
        """Compare a value with its kind, or each of several with it."""
        if value is None or (self.given and self.is_given(place)):
            return
        if depth < 0:
            raise Refused(f"{place}: lists and dicts in each other are more than {MAX_DEPTH} deep")
        if isinstance(value, dict) and not kind.startswith(("@", ".", "{")):
            self.mapping(value, kind, place, depth)
            return
        if isinstance(value, list | tuple) and kind != "names":
            if len(value) > MAX_ITEMS:
                raise Refused(f"{place} has {len(value):,} items; a list has at most {MAX_ITEMS:,}")
            for index, each in enumerate(value):
                self.check(each, kind, f"{place}[{index}]", depth - 1)
            return
        options = kind.split(",")
        chosen = self.option(options, value)
        if chosen.startswith("@"):
            self.part(value, PARTS[chosen[1:]], place, depth)
        elif chosen.startswith("."):
            self.fields(value, self.arguments(chosen[1:]), place, depth)
        elif chosen.startswith("{"):
            self.mapping(value, chosen[1:-1], place, depth)
        else:
            try:
                self.leaf(value, chosen)
            except Refused as error:
                raise Refused(f"{place} {error}") from None

    @staticmethod
    def leaf(value: Any, kind: str) -> None:
        """Compare a text or number with its kind."""
        if "|" in kind:
            _choice(value, [each for each in kind.split("|") if each])
        elif kind == "priority" and isinstance(value, str):
            _choice(value, PRIORITIES)
        else:
            CHECKS["num" if kind == "priority" else kind](value)

    @staticmethod
    def option(options: list[str], value: Any) -> str:
        """Return the kind, among several, that a value seems to have."""
        if isinstance(value, dict):
            dicts = [each for each in options if each[0] in "@.{"]
            typed = [each for each in dicts if each[0] == "@"]
            others = [each for each in dicts if each[0] != "@"]
            return next(iter((typed or others) if "type" in value else (others or typed)), options[0])
        if isinstance(value, str):
            return next((each for each in options if each[0] not in "@.{" and each not in ("num", "size")), options[0])
        return options[0]

    @staticmethod
    def arguments(name: str) -> Arguments:
        """Return the fields of a dict without a type, which may be those of a type that is the default."""
        return DICTS[name] if name in DICTS else next(types[name] for types in PARTS.values() if name in types)

    def part(self, value: Any, types: dict[str, Arguments], place: str, depth: int) -> None:
        """Compare a dict with a type with the types that may be built there."""
        if not isinstance(value, dict):
            raise Refused(f"{place} is {_short(value)}, not a dict with a type")
        if "type" not in value:
            raise Refused(f"{place} has no type; choose from {', '.join(types)}")
        named = value["type"]
        name = check_type(named, place, types) if not self.is_given(f"{place}.type") else str(named).rpartition(".")[2]
        if name in types:
            self.fields({key: each for key, each in value.items() if key != "type"}, types[name], place, depth)

    def fields(self, value: Any, arguments: Arguments, place: str, depth: int) -> None:
        if not isinstance(value, dict):
            raise Refused(f"{place} is {_short(value)}, not a dict")
        for key, each in value.items():
            inner = f"{place}.{key}"
            if key == "_scope_":
                if each not in SCOPES:
                    raise Refused(f"{inner} {_short(each)} is not one of {', '.join(SCOPES)}")
            elif key == "_delete_":
                CHECKS["num"](each)
            elif isinstance(key, str) and key in arguments:
                self.check(each, arguments[key], inner, depth - 1)
            elif each is not None or not isinstance(key, str) or not KEY.fullmatch(key):
                self.refuse_argument(key, arguments, inner, each)

    def refuse_argument(self, key: Any, arguments: Arguments, place: str, value: Any) -> None:
        if self.is_given(place):
            return
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise Refused(f"{place.rpartition('.')[0]} has {_short(key)}, which is not a name")
        close = difflib.get_close_matches(key, arguments, n=1, cutoff=0.85)
        raise Refused(f"{place} {UNTRUSTED}{f' (did you mean {close[0]}?)' if close else ''}")

    def mapping(self, value: Any, kind: str, place: str, depth: int) -> None:
        if not isinstance(value, dict):
            raise Refused(f"{place} is {_short(value)}, not a dict")
        for key, each in value.items():
            self.name(key, place)
            if key == "_scope_":
                _choice(each, SCOPES)
            else:
                self.check(each, kind, f"{place}.{key}", depth - 1)

    def name(self, key: Any, place: str) -> None:
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise Refused(f"{place} has {_short(key)}, which is not a name")

    def plain(self, value: Any, place: str, depth: int) -> None:
        """Check a config's own variable, which nothing reads but the run folder's config."""
        if depth < 0:
            raise Refused(f"{place}: lists and dicts in each other are more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            for key, each in value.items():
                if not isinstance(key, int | float):
                    self.name(key, place)
                self.plain(each, f"{place}.{key}", depth - 1)
        elif isinstance(value, list | tuple):
            for index, each in enumerate(value):
                self.plain(each, f"{place}[{index}]", depth - 1)
        elif isinstance(value, str):
            if len(value) > MAX_LENGTH or "{{" in value:
                raise Refused(f"{place} is not a plain text")
        elif not isinstance(value, int | float | range) and value is not None and not self.is_given(place):
            raise Refused(f"{place} is {_short(value)}; write numbers, texts, lists and dicts")


def check_type(value: Any, where: str, types: Iterable[str] = TYPES) -> str:
    """Return a type's name without its scope; raise Refused if it is none of the types that may be built there."""
    if not isinstance(value, str):
        raise Refused(f"type {_short(value)} of {where} is not a text")
    scope, _, name = value.rpartition(".")
    if name in types and scope in ("", *SCOPES):
        return name
    if name in TYPES and scope in ("", *SCOPES):
        raise Refused(f"type {_short(value)} of {where} cannot be there; choose from {', '.join(types)}")
    if name in registered() and scope in ("", *SCOPES):
        raise Refused(f"type {_short(value)} of {where} is not among those that a config gets unasked")
    close = difflib.get_close_matches(name, types, n=1)
    raise Refused(f"unknown type {_short(value)} of {where}{f'; did you mean {close[0]!r}?' if close else ''}")


def _short(value: Any, limit: int = 80) -> str:
    """Return a value as text, cut to `limit`; of containers no more than their type."""
    text = repr(value[:limit]) if isinstance(value, str | bytes) else repr(value) if isinstance(value, float) else ""
    if isinstance(value, int):
        text = repr(value) if abs(value) < 1 << 256 else "a number of more digits than any config needs"
    text = text or f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"
