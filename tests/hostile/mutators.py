"""Small seedable mutations of valid files, of their bytes, their text and their structure."""

import copy
import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

Mutator = Callable[[bytes, random.Random, Sequence[bytes]], bytes]

NUMBERS = (0, 1, -1, 2**7, 2**15 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 10**9, 10**30)
WORDS = ("NaN", "Infinity", "-1", "1e999", "1e-400", "0.5", "9" * 5000, "null", "true", "[]", "{}", '"64"', '""',
         '"../../etc/passwd"', '"\\ud800"', '"\\u001b[2J"', '"' + "x" * 5000 + '"', "[" * 500 + "]" * 500)  # fmt: skip
VALUES = (None, True, "", "64", "../../etc/passwd", "\x1b[2J", "\ud800", "pipe:true", "x" * 3000, float("nan"),
          float("inf"), -0.0, 1e300, [], {}, [[]], {"": ""}, *NUMBERS)  # fmt: skip
LINES = (
    "import os", "__import__('os').system('true')", "_base_ = '/etc/passwd'", "_base_ = ['x.py'] * 9", "a = lambda: 1",
    "a = [x for x in ()]", "a = f'{1}'", "custom_imports = dict(imports=['antigravity'])", "a = 2 ** 99999",
    "def f(): ...", "data_root = '{{$HOME:/}}'", "a = dict(type='os.system')", "load_from = 'http://127.0.0.1/x'",
    "a: !!python/name:os", "b: &b [*b]", "c: &c [1, 1]\nd: &d [*c, *c, *c]\ne: [*d, *d, *d]", "model: pipe:true",
    "\x00", "\ufeff",
)  # fmt: skip


def mutate_bytes(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """Flip, cut, repeat, insert and splice bytes, and write extreme numbers over them."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        start = chance.randrange(len(content) + 1)
        end = min(len(content), start + chance.choice((1, 2, 4, 8, 64, 4096)))
        how = chance.randrange(7)
        if how == 0 and content:
            content[start % len(content)] ^= 1 << chance.randrange(8)
        elif how == 1:
            del content[start:end]
        elif how == 2:
            content[start:start] = content[start:end] * chance.choice((1, 1, 2, 100))
        elif how == 3:
            content[start:end] = chance.randbytes(end - start)
        elif how == 4:
            other = chance.choice(others)
            content[start:] = other[chance.randrange(len(other) + 1) :]
        elif how == 5:
            size = chance.choice((1, 2, 4, 8))
            number = chance.choice(NUMBERS) % 256**size
            content[start : start + size] = number.to_bytes(size, chance.choice(("little", "big")))
        elif chance.random() < 0.1:
            del content[start:]
    return bytes(content)


def mutate_text(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """Replace, repeat and drop tokens and lines, and add lines that would run or expand something."""
    text = data.decode("utf-8", "replace")
    for _ in range(chance.choice((1, 1, 2, 4))):
        lines, tokens = text.splitlines(), list(re.finditer(r"-?[\d.]+|\"[^\"\n]*\"|'[^'\n]*'|\w+", text))
        how = chance.randrange(6)
        if how < 3 and tokens:
            token, other = chance.choice(tokens), chance.choice(tokens)
            word = (chance.choice(WORDS), other[0], "")[how]
            text = text[: token.start()] + word + text[token.end() :]
        elif lines:
            line = chance.randrange(len(lines))
            added = (chance.choice(LINES), lines[line], chance.choice(lines))[how % 3]
            text = "\n".join([*lines[:line], added, *lines[line + (how == 5) :]])
    return text.encode("utf-8", "surrogatepass")


def mutate_json(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """Replace, drop, rename, repeat and move values of a JSON document; other bytes are mutated as such."""
    try:
        root = [json.loads(data)]
    except ValueError:
        return mutate_bytes(data, chance, others)
    for _ in range(chance.choice((1, 1, 2, 4))):
        places = list(_places(root))
        holder, key = chance.choice(places)
        how = chance.randrange(6)
        if how == 0 and holder is not root:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[chance.choice(("", "model", "type", "\x1b", "x" * 300, f"{key} "))] = holder.pop(key)
        elif how == 2:
            other, place = chance.choice(places)
            holder[key] = json.loads(json.dumps(other[place]))
        elif how == 3 and isinstance(holder[key], list):
            holder[key] = holder[key] * chance.choice((2, 50))
        else:
            holder[key] = copy.deepcopy(chance.choice(VALUES))
    text = json.dumps(root[0])
    if chance.random() < 0.1:  # a key twice
        text = re.sub(r'("\w+": )([^,{}\[\]]+)', r"\1\2, \1\2", text, count=1)
    return text.encode()


def _places(node: Any) -> Any:
    keys = node if isinstance(node, dict) else range(len(node))
    for key in list(keys):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


def mutate_safetensors(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """Mutate the header as JSON, its length kept right; the bytes of other files."""
    size = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or chance.random() < 0.3:
        return mutate_bytes(data, chance, others)
    header = mutate_json(data[8 : 8 + size], chance, others)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def mutate_onnx(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """Mutate metadata as JSON, and names, shapes, operators and weights as fields; or the bytes."""
    import onnx

    if chance.random() < 0.3:
        return mutate_bytes(data, chance, others)
    model = onnx.load_from_string(data)
    for _ in range(chance.choice((1, 2, 3))):
        graph, how = model.graph, chance.randrange(7)
        node, weight = chance.choice(graph.node), chance.choice(graph.initializer)
        value = chance.choice((*graph.input, *graph.output))
        entry = chance.choice(model.metadata_props)
        if how == 0:
            entry.value = mutate_json(entry.value.encode(), chance, others).decode("utf-8", "replace")
        elif how == 1:
            node.op_type = chance.choice(("Relu", "Loop", "Reshape", "Softmax", "MatMul", "NoSuch", ""))
        elif how == 2:
            weight.dims[:] = [min(abs(chance.choice(NUMBERS)), 2**62) for _ in range(chance.randrange(4))]
        elif how == 3:
            value.name = chance.choice(("", "image ", node.output[0], "\x1b[2J"))
        elif how == 4 and value.type.tensor_type.shape.dim:
            side = chance.choice(value.type.tensor_type.shape.dim)
            side.dim_value = min(chance.choice(NUMBERS), 2**62)
        elif how == 5:
            value.type.tensor_type.elem_type = chance.randrange(25)
        else:
            weight.raw_data = mutate_bytes(weight.raw_data, chance, others)
    return model.SerializeToString()


def mutate_image(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """Mutate bytes; of a PNG, mostly with the checksums put right again."""
    changed = mutate_bytes(data, chance, others)
    if not changed.startswith(b"\x89PNG\r\n\x1a\n") or chance.random() < 0.3:
        return changed
    parts, at = [changed[:8]], 8
    while at + 12 <= len(changed):
        (size,) = struct.unpack(">I", changed[at : at + 4])
        chunk = changed[at + 4 : at + 8 + size]
        parts.append(changed[at : at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk)))
        at += 12 + size
    return b"".join(parts)
