"""Image sizes: height and width in pixels."""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import InputError

if TYPE_CHECKING:
    from pydantic_core import CoreSchema
    from tyro.constructors import ConstructorRegistry

MAX_IMG_SIZE = 4096  # pixels; a larger one is a slip of the finger
SIZE = re.compile(r"([1-9][0-9]{0,3})(?:[xX×]([1-9][0-9]{0,3}))?")
ADVICE = f"give 1 to {MAX_IMG_SIZE} px as one number, such as 224, or as HEIGHTxWIDTH, such as 224x640"


class ImgSize(NamedTuple):
    """The height and width of images in pixels, in timm's order. As text it is 224 for a square, else 224x640."""

    height: int
    width: int

    def __str__(self) -> str:
        return str(self.height) if self.is_square else f"{self.height}x{self.width}"

    @property
    def is_square(self) -> bool:
        return self.height == self.width

    @property
    def plain(self) -> int | list[int]:
        """The size in JSON, which is also timm's `img_size`: one number for a square, else [height, width]."""
        return self.height if self.is_square else [self.height, self.width]

    @classmethod
    def of(cls, size: object, option: str = "") -> "ImgSize":
        """Return a size that is given as a number, as text (224 or 224x640) or as a pair (height, width).

        Args:
            option: what a message calls it.

        Raises:
            InputError: it is none of these, or a side is not 1 to `MAX_IMG_SIZE` pixels.
        """
        if (found := cls._read(size)) is None:
            raise InputError(f"{option} {str(size)[:40]} is not an image size; {ADVICE}".lstrip())
        return found

    @classmethod
    def _read(cls, size: object) -> "ImgSize | None":
        pair = isinstance(size, list | tuple) and len(size) == 2
        match = SIZE.fullmatch("x".join(map(str, size)) if pair else str(size))  # type: ignore[call-overload]
        if match is None:
            return None
        height, width = int(match[1]), int(match[2] or match[1])
        return cls(height, width) if max(height, width) <= MAX_IMG_SIZE else None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> "CoreSchema":
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(cls._validate)

    @classmethod
    def _validate(cls, size: object) -> "ImgSize":
        if (found := cls._read(size)) is None:
            raise ValueError(ADVICE)  # pydantic says what it got
        return found


ImgSizeLike = int | tuple[int, int]
"""What functions take for an image size: one number for a square, or (height, width)."""


def command_line_types() -> "ConstructorRegistry":
    """Return how tyro reads options that are a size, a size or None, or several sizes: a word for each size."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    metavar = "INT|HxW"
    one: PrimitiveConstructorSpec[ImgSize] = PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: ImgSize.of(words[0]),
        is_instance=lambda value: isinstance(value, ImgSize),
        str_from_instance=lambda size: [str(size)],
    )
    one_or_none: PrimitiveConstructorSpec[ImgSize | None] = PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{None}}|{metavar}",
        instance_from_str=lambda words: None if words[0] == "None" else ImgSize.of(words[0]),
        is_instance=lambda value: value is None or isinstance(value, ImgSize),
        str_from_instance=lambda size: [str(size)],
    )
    several: PrimitiveConstructorSpec[tuple[ImgSize, ...]] = PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{metavar} [{metavar} ...]]",
        instance_from_str=lambda words: tuple(map(ImgSize.of, words)),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda sizes: [*map(str, sizes)],
    )
    specs: dict[Any, PrimitiveConstructorSpec] = {
        ImgSize: one,
        ImgSize | None: one_or_none,
        tuple[ImgSize, ...]: several,
    }
    registry = ConstructorRegistry()
    registry.primitive_rule(lambda info: specs.get(info.type))
    return registry
