"""FlatBuffers decoded by the schema that a library brings: tables become dicts. Nothing in the data is trusted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SCALARS = {
    "bool": "?", "byte": "b", "ubyte": "B", "short": "h", "ushort": "H", "int": "i", "int32": "i", "uint": "I",
    "uint32": "I", "long": "q", "int64": "q", "uint64": "Q", "float": "f", "double": "d",
}  # fmt: skip
"""Types of numbers by their names in a schema, as NumPy's characters."""
MAX_VALUES = 1 << 20  # tables, strings and vectors in one buffer: those of a network have some thousand


@dataclass(frozen=True)
class Schema:
    """The declarations of a schema."""

    tables: Mapping[str, Sequence[tuple[str, str]]]  # the fields of each table in order: name and type
    unions: Mapping[str, Sequence[tuple[str, str]]]  # the alternatives of each union: name, and the table's type
    scalars: Mapping[str, str]  # types of numbers, among them enumerations

    @classmethod
    def parse(cls, text: str) -> "Schema":
        """Return the declarations in a schema's text."""
        text = re.sub(r"//.*", "", text)
        bodies = {(kind, head.split(":")[0].strip()): (head, body)
                  for kind, head, body in re.findall(r"\b(table|union|enum)\s+([^{]+)\{([^}]*)\}", text)}  # fmt: skip
        tables = {name: [(field, kind) for field, kind in re.findall(r"(\w+)\s*:\s*(\[?\w+\]?)[^;]*;", body)]
                  for (kind, name), (_, body) in bodies.items() if kind == "table"}  # fmt: skip
        unions = {name: [(each, other or each) for each, other in re.findall(r"(\w+)(?:\s*:\s*(\w+))?\s*(?:,|$)", body)]
                  for (kind, name), (_, body) in bodies.items() if kind == "union"}  # fmt: skip
        enums = {name: SCALARS[head.split(":")[1].strip()]
                 for (kind, name), (head, _) in bodies.items() if kind == "enum"}  # fmt: skip
        return cls(tables, unions, {**SCALARS, **enums})


class Decoder:
    """Decodes one buffer; raises ValueError, struct.error, TypeError or UnicodeDecodeError for a damaged one."""

    def __init__(self, schema: Schema, data: bytes):
        self.schema, self.data, self.left = schema, data, MAX_VALUES

    def decode(self, kind: str) -> dict[str, Any]:
        """Return the root table, which is of this type: fields by name, None where they are absent.

        A field of a union is a pair of the alternative's name and its table. Vectors of numbers are NumPy arrays.
        """
        from flatbuffers.encode import Get
        from flatbuffers.number_types import UOffsetTFlags

        return self._table(kind, int(Get(UOffsetTFlags.packer_type, self.data, 0)))

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"holds more than {MAX_VALUES} values")

    def _table(self, kind: str, place: int) -> dict[str, Any]:
        from flatbuffers.table import Table

        self._count()
        table, fields, slot = Table(self.data, place), dict[str, Any](), 4
        for name, type_ in self.schema.tables[kind]:
            if type_ in self.schema.unions:
                fields[name] = self._union(table, type_, slot)
                slot += 2
            else:
                fields[name] = self._field(table, type_, slot)
            slot += 2
        return fields

    def _union(self, table: Any, type_: str, slot: int) -> tuple[str, dict[str, Any]] | None:
        number, offset = table.Offset(slot), table.Offset(slot + 2)
        if not number or not offset:
            return None
        alternatives = self.schema.unions[type_]
        index = self.data[table.Pos + number]
        if not 1 <= index <= len(alternatives):
            raise ValueError(f"holds a {type_} that is not known")
        name, kind = alternatives[index - 1]
        return name, self._table(kind, table.Indirect(table.Pos + offset))

    def _field(self, table: Any, type_: str, slot: int) -> Any:
        offset = table.Offset(slot)
        if not offset:
            return 0 if type_ in self.schema.scalars else None
        place = table.Pos + offset
        if type_ in self.schema.scalars:
            return self._numbers(type_, place, 1)[0].item()
        if type_ == "string":
            self._count()
            return table.String(place).decode()
        if type_.startswith("["):
            return self._vector(table, type_.strip("[]"), place, offset)
        return self._table(type_, table.Indirect(place))

    def _vector(self, table: Any, type_: str, place: int, offset: int) -> Any:
        start, count = table.Vector(offset), table.VectorLen(offset)
        self._count()
        if type_ in self.schema.scalars:
            return self._numbers(type_, start, count)
        places = self._numbers("uint", start, count)
        return [self._table(type_, start + 4 * number + int(each)) for number, each in enumerate(places)]

    def _numbers(self, type_: str, place: int, count: int) -> np.ndarray:
        if place < 0:
            raise ValueError("points outside of itself")
        dtype = np.dtype(self.schema.scalars[type_]).newbyteorder("<")
        return np.frombuffer(self.data, dtype, count, place)
