"""Images that are not what they seem: formats by content, decoders that raise anything, bombs and metadata."""

import io
import os
import struct
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import EpsImagePlugin, Image

from shvit.errors import InputError
from shvit.train.data import images
from shvit.train.data.datasets import open_dataset
from shvit.train.data.eval_dataset import open_eval_dataset
from shvit.train.data.eval_loader import eval_loader
from shvit.train.data.images import open_image, to_rgb
from shvit.train.step.loader import Augmented

pytestmark = pytest.mark.usefixtures("no_programs")
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 40\n%%EndComments\nshowpage\n%%EOF\n"


def encoded(kind: str, size: tuple[int, int] = (64, 48), mode: str = "RGB", **options: object) -> bytes:
    stream = io.BytesIO()
    image = Image.effect_noise(size, 80).convert(mode)
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, *chunks: bytes, data: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rest = chunk(b"IDAT", data or zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + rest


def zeros(megabytes: int) -> bytes:
    """Return what `zlib.compress(bytes(megabytes * 1_000_000))` stands for, made from one megabyte: in no time."""
    packer = zlib.compressobj(wbits=-15)
    block = packer.compress(bytes(1_000_000)) + packer.flush(zlib.Z_FULL_FLUSH)
    adler = megabytes * 1_000_000 % 65521 << 16 | 1
    return b"\x78\x9c" + block * megabytes + zlib.compressobj(wbits=-15).flush() + struct.pack(">I", adler)


def dds() -> bytes:
    head = struct.pack("<IIIIIII", 124, 0x1007, 8, 8, 32, 0, 0) + bytes(44)
    return b"DDS " + head + struct.pack("<IIIIIIII", 32, *[0] * 7) + bytes(276)


def exif_bomb() -> bytes:
    """Sixty thousand entries, each of which says that its value is all of the metadata."""
    size = 60_000
    head = b"II*\0" + struct.pack("<IH", 8, 5000)
    entries = b"".join(struct.pack("<HHII", 1000 + i, 7, size, 0) for i in range(5000))
    return b"Exif\0\0" + (head + entries).ljust(size, b"\0")


ODD = {
    "PostScript": POSTSCRIPT,
    "PostScript behind a DOS header": b"\xc5\xd0\xd3\xc6"
    + struct.pack("<II", 32, len(POSTSCRIPT))
    + bytes(20)
    + POSTSCRIPT,
    "DDS": dds(),
    "BLP": b"BLP1" + struct.pack("<iIIIiI", 32769, 0, 8, 8, 0, 0) + bytes(2000),
    "an icon": encoded("ICO"),
    "PDF": encoded("PDF"),
    "TGA": encoded("TGA"),
    "SGI": encoded("SGI"),
    "PCX": encoded("PCX"),
    "a shell script": b"#!/bin/sh\ntouch PWNED\n",
    "HTML": b"<html><script>",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "FITS": b"SIMPLE  =                    T" + bytes(3000),
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(100),
    "MPEG": b"\x00\x00\x01\xba" + bytes(100),
    "nothing": b"",
    "one byte": b"\xff",
    "zeros": bytes(4096),
    "half of an AVIF": encoded("AVIF")[: len(encoded("AVIF")) * 6 // 10],
    "half of a WebP": encoded("WEBP")[:600],
    "half of a GIF": encoded("GIF", mode="P")[:300],
    "half of a JPEG": encoded("JPEG")[:500],
    "half of a CMYK JPEG": encoded("JPEG", mode="CMYK")[:800],
    "half of a JPEG 2000": encoded("JPEG2000")[:500],
    "half of a TIFF": encoded("TIFF", compression="tiff_lzw")[:300],
    "a PNG without pixels": png_of(64, 48, data=zlib.compress(b"")),
    "a PNG of no width": png_of(0, 48),
    "a PNG of 2^31 pixels a side": png_of(2**31 - 1, 2**31 - 1),
    "a PNG of 10,001 × 10,000 pixels": png_of(10_001, 10_000),
    "a line of 60,000 pixels": encoded("PNG", (60_000, 1), "L"),
    "a PNG with a profile of 200 MB": png_of(8, 8, chunk(b"iCCP", b"x\0\0" + zeros(200))),
    "a PNG with a text of 200 MB": png_of(8, 8, chunk(b"zTXt", b"x\0\0" + zeros(200))),
    "a PNG whose chunk is as large as can be": png_of(8, 8)[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT",
    "a GIF whose screen is 65,535 pixels a side": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"\x3b",
    "a BMP of no height": b"BM" + struct.pack("<IHHIIiiHHI", 100, 0, 0, 54, 40, 8, 0, 1, 24, 0) + bytes(60),
    "a BMP of negative width": b"BM" + struct.pack("<IHHIIiiHHI", 100, 0, 0, 54, 40, -8, 8, 1, 24, 0) + bytes(60),
    "a PPM of 10^9 pixels a side": b"P6 1000000000 1000000000 255\n" + bytes(100),
    "a PPM with a number of 5,000 digits": b"P6 " + b"9" * 5000 + b" 1 255\n",
    "a TIFF of 65,535 entries": b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(12 * 65535),
    "a TIFF whose directory is itself": b"II*\0" + struct.pack("<IHI", 8, 0, 8),
    "a BigTIFF of 2^60 entries": b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 2**60) + bytes(1000),
}


@pytest.mark.parametrize("what", ODD)
def test_image_that_is_not_what_its_name_says_is_damaged(what, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(ODD[what])
    with pytest.raises(InputError, match=r"x\.jpg"):
        open_image(path)
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("what", ["PostScript", "an icon", "TGA"])
def test_image_that_another_library_opened_is_taken_by_its_format(what):
    if what == "PostScript":
        image: Image.Image = EpsImagePlugin.EpsImageFile(io.BytesIO(POSTSCRIPT))
    else:
        image = Image.open(io.BytesIO(ODD[what]))
    with pytest.raises(InputError, match="and not one of PNG, JPEG"):
        to_rgb(image, "x")


@pytest.mark.parametrize(
    "error",
    [RuntimeError, NotImplementedError, AttributeError, KeyError, IndexError, ZeroDivisionError, RecursionError,
     MemoryError, OverflowError, AssertionError, struct.error, EOFError, UnicodeDecodeError,
     Image.DecompressionBombError],
)  # fmt: skip
def test_whatever_a_decoder_raises_makes_the_image_damaged(error, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise error("utf-8", b"", 0, 1, "x") if error is UnicodeDecodeError else error("boom\nand more")

    (tmp_path / "x.png").write_bytes(encoded("PNG"))
    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(InputError, match=r"x\.png: not a readable image") as raised:
        open_image(tmp_path / "x.png")
    assert "\n" not in str(raised.value)


def test_metadata_does_not_cost_the_image_nor_memory(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded("JPEG", exif=exif_bomb()))
    assert open_image(tmp_path / "x.jpg").size == (64, 48)


def test_jpeg_of_very_many_scans_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_SCANS", 5)
    (tmp_path / "x.jpg").write_bytes(encoded("JPEG", progressive=True))
    with pytest.raises(InputError, match="more than 5 scans"):
        open_image(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes(encoded("JPEG"))
    assert open_image(tmp_path / "x.jpg").size == (64, 48)


def test_file_of_any_size_is_not_read(tmp_path):
    with (tmp_path / "x.webp").open("wb") as file:
        file.write(encoded("WEBP")[:100])
        file.truncate(2 << 30)  # of which the disk holds nothing
    with pytest.raises(InputError, match=r"2\.1 GB is too large for an image"):
        open_image(tmp_path / "x.webp")


@pytest.mark.parametrize("flip", range(40))
def test_image_with_a_byte_changed_is_read_or_damaged(flip):
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "JPEG2000", "BMP")
    kind = kinds[flip % len(kinds)]
    content = bytearray(encoded(kind, mode="P" if kind == "GIF" else "RGB"))
    for step in range(12):
        content[(7919 * (flip + 1) * (step + 1)) % len(content)] ^= 0xFF
        with suppress(InputError):
            assert open_image(io.BytesIO(bytes(content)), "x").mode == "RGB"


@pytest.fixture
def spoiled(folders):
    """Class folders of 48 images, and three more that are not what they seem."""
    for name in ("half of an AVIF", "DDS", "PostScript"):
        (folders / "a" / f"x {name}.jpg").write_bytes(ODD[name])
    return folders


def test_damaged_images_are_named_skipped_and_counted_in_an_evaluation(spoiled):
    reported: list[str] = []
    loader = eval_loader(open_eval_dataset(spoiled), lambda image: torch.zeros(1), 8, report=reported.append)
    targets = torch.cat([targets for _, targets in loader])
    assert (loader.damaged, int((targets >= 0).sum())) == (3, 48)
    assert all(any(name in line for line in reported) for name in ("AVIF.jpg", "DDS.jpg", "PostScript.jpg"))
    with pytest.raises(InputError, match="3 damaged images, and 2 are allowed"):
        list(eval_loader(open_eval_dataset(spoiled), lambda image: torch.zeros(1), 8, 0, 2, report=reported.append))


def test_damaged_images_are_named_and_replaced_in_training(spoiled):
    dataset = open_dataset(spoiled, "train")
    augmented = Augmented(dataset, lambda place: lambda image: image.size, 0, tries=10)
    read = [augmented[place, place] for place in range(len(dataset))]
    problems = {problem for _, _, each in read for problem, _, _ in each}
    damaged = sum("x " in path.name for path, _ in dataset.samples)
    assert 0 < damaged == len(problems)


def test_damaged_images_in_a_tar_are_named(spoiled, tmp_path):
    with tarfile.open(tmp_path / "d.tar", "w") as archive:
        archive.add(spoiled, "")
    loader = eval_loader(open_eval_dataset(tmp_path / "d.tar"), lambda image: torch.zeros(1), 8, report=lambda _: None)
    assert sum(int((targets >= 0).sum()) for _, targets in loader) == 48
    assert loader.damaged == 3


def test_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(InputError, match="is a FIFO"):
        open_image(tmp_path / "x.jpg")
