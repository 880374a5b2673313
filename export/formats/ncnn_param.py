"""The graph of an ncnn model as text (F.ncnn.param): layers, one a line, parsed strictly.

Format: ncnn's wiki, "param and model file structure".
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAGIC = "7767517"
MAX_LINES = 20_000  # layers: a SHViT has 235
NAME = re.compile(r"[^\s=]{1,255}")  # ncnn reads names into 256 bytes
EXPRESSION = re.compile(r'"[\w*+,./()-]{1,250}"')  # of a size, by those of the inputs
ARRAY_KEY = -23300  # an array of numbers stands under this minus its key


@dataclass(frozen=True)
class Layer:
    """A line of a .param file."""

    type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: Mapping[int, str] = field(default_factory=dict)

    def int(self, key: int, default: int = 0) -> int:
        """Return a whole number among the options."""
        return int(self.options.get(key, default))

    @property
    def line(self) -> str:
        """The line as ncnn reads it."""
        options = [f"{key}={value}" for key, value in self.options.items()]
        words = [len(self.inputs), len(self.outputs), *self.inputs, *self.outputs, *options]
        return f"{self.type:<24} {self.name:<24} {' '.join(map(str, words))}"


def parse_param(text: str) -> list[Layer]:
    """Return the layers of a .param file's text; raise ValueError where it is not one."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if len(lines) < 3 or lines[0] != [MAGIC] or len(lines[1]) != 2:
        raise ValueError(f"does not begin with {MAGIC} and two counts")
    layers = [_parse_line(words) for words in lines[2:]]
    blobs = [name for layer in layers for name in layer.outputs]
    if [*map(str, (len(layers), len(blobs)))] != lines[1]:
        raise ValueError(f"has {len(layers)} layers and {len(blobs)} blobs, and says {' and '.join(lines[1])}")
    if len(layers) > MAX_LINES:
        raise ValueError(f"has more than {MAX_LINES} layers")
    if repeated := next((name for name, count in Counter(blobs).items() if count > 1), None):
        raise ValueError(f"computes {repeated[:40]} twice")
    known: set[str] = set()
    for layer in layers:
        if missing := next((name for name in layer.inputs if name not in known), None):
            raise ValueError(f"reads {missing[:40]} before it is computed")
        known.update(layer.outputs)
    return layers


def _parse_line(words: Sequence[str]) -> Layer:
    shown = " ".join(words)[:60]
    if len(words) < 4 or not (words[2].isdecimal() and words[3].isdecimal()):
        raise ValueError(f"has a line that describes no layer, {shown!r}")
    count, more = int(words[2]), int(words[3])
    names, options = words[4 : 4 + count + more], words[4 + count + more :]
    if len(names) < count + more or not all(NAME.fullmatch(name) for name in (*words[:2], *names)):
        raise ValueError(f"has a layer without the names that it counts, {shown!r}")
    pairs = dict(_parse_option(word) for word in options)
    return Layer(words[0], words[1], tuple(names[:count]), tuple(names[count:]), pairs)


def _parse_option(word: str) -> tuple[int, str]:
    key, _, value = word.partition("=")
    if EXPRESSION.fullmatch(value):
        return int(key), value
    numbers = value.split(",")
    for number in numbers:
        float(number)
    if int(key) <= ARRAY_KEY and int(numbers[0]) != len(numbers) - 1:
        raise ValueError(f"has an array that is not as long as it says, {word[:40]!r}")
    return int(key), value


def format_param(layers: Sequence[Layer]) -> str:
    """Return the text of a .param file."""
    blobs = sum(len(layer.outputs) for layer in layers)
    return "\n".join([MAGIC, f"{len(layers)} {blobs}", *(layer.line for layer in layers)]) + "\n"
