"""Images of any channels: .npy and TIFF files as NumPy and tifffile write them, and hostile ones."""

import io
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from shvit.errors import InputError
from shvit.train.data import images
from shvit.train.data.pixels.arrays import read_array

H, W, C = 9, 12, 5
TYPES = ("uint8", "uint16", "float32")


def noise(kind: str, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (
        rng.normal(0, 40, shape).astype(kind) if kind == "float32" else rng.integers(0, np.iinfo(kind).max, shape, kind)
    )


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **{"photometric": "minisblack", **options})
    return file.getvalue()


def read(content: bytes, in_chans: int = C) -> np.ndarray:
    return read_array(io.BytesIO(content), in_chans, "x")


# --- .npy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*TYPES, ">u2", ">f4"])
def test_channels_of_npy_are_the_axis_as_long_as_they_are(kind):
    first = noise(np.dtype(kind).newbyteorder("=").name, C, H, W).astype(kind)
    for array in (
        first,
        first.transpose(1, 2, 0),
        np.asfortranarray(first),
        np.asfortranarray(first.transpose(1, 2, 0)),
    ):
        found = read(npy(array))
        assert found.dtype == np.dtype(kind).newbyteorder("=")
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, first)


def test_gray_arrays_may_have_two_axes():
    gray = noise("uint16", H, W)
    for array in (gray, gray[None], gray[..., None]):
        np.testing.assert_array_equal(read(npy(array), 1), gray[None])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (noise("uint8", C, H, C), "may both be the channels"),
        (noise("uint8", H, W, 4), r"shape \(9, 12, 4\) for a model of 5 channels: give \(H, W, 5\) or \(5, H, W\)"),
        (noise("uint8", H, W), r"shape \(9, 12\)"),
        (noise("uint8", 1, C, H, W), r"shape \(1, 5, 9, 12\)"),
        (np.zeros((C, H, W)), "holds float64, and pixels are uint8, uint16, float32"),
        (np.zeros((C, H, W), "int16"), "holds int16"),
        (np.zeros((C, H, W), "complex64"), "holds complex64"),
        (np.zeros((C, H, W), bool), "holds bool"),
        (np.zeros((C, H, W), [("a", "u1"), ("b", "f4")]), r"holds \[\('a'"),
        (np.zeros((H, W), "S3"), "holds |S3"),
        (np.zeros((C, 0, W), "uint8"), r"announces the shape \(5, 0, 12\)"),
        (np.zeros((), "uint8"), r"shape \(\)"),
        (np.zeros((C, 1, 600), "uint8"), "500 times as long as wide"),
        (np.full((C, H, W), np.nan, "float32"), "540 of its 540 values are NaN or infinite; fill them"),
        (np.full((C, H, W), -np.inf, "float32"), "are NaN or infinite"),
    ],
)  # fmt: skip
def test_other_arrays_are_refused_in_one_line(array, message):
    with pytest.raises(InputError, match=message) as error:
        read(npy(array))
    assert "\n" not in str(error.value)


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + version + size + text.encode()


def claims(shape: str, kind: str = "'|u1'", version: bytes = b"\x01\x00") -> bytes:
    return header(f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}\n", version) + bytes(540)


class Evil:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('run')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.array([Evil()], object)), "holds object"),
        (claims("(5, 1000000, 1000000)"), "announces the shape"),
        (claims("(-5, -9, 12)"), "announces the shape"),
        (claims("(5, 9, 13)"), "holds 540 bytes of pixels, and its header announces 585"),
        (claims("(5, 9, 11)"), "holds 540 bytes of pixels, and its header announces 495"),
        (claims("(5, 9, 12)", version=b"\x03\x00"), "version 3.0"),
        (claims("(5, 9, 12)", version=b"\x09\x00"), "."),
        (claims("(" + "9," * 5000 + ")"), "not a readable image"),
        (claims("__import__('os')"), "not a readable image"),
        (claims("(5, 9, True)"), "."),
        (header("{'descr'"), "not a readable image"),
        (b"\x93NUMPY", "not a readable image"),
        (npy(noise("uint8", C, H, W))[:-1], "announces 540"),
    ],
)  # fmt: skip
def test_hostile_npy_files_are_refused_before_anything_is_allocated(content, message):
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as error:
            read(content)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)


# --- TIFF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"planarconfig": "contig"},
        {"planarconfig": "contig", "byteorder": ">"},
        {"planarconfig": "contig", "bigtiff": True},
        {"planarconfig": "contig", "compression": "lzw"},
        {"planarconfig": "contig", "compression": "zlib", "predictor": True},
        {"planarconfig": "contig", "compression": "zstd", "tile": (16, 16)},
        {"planarconfig": "contig", "compression": "packbits", "rowsperstrip": 2},
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "compression": "lzw"},
    ],
    ids=str,
)
def test_samples_of_a_page_are_channels(kind, options):
    first = noise(kind, C, H, W)
    stored = first if options["planarconfig"] == "separate" else first.transpose(1, 2, 0)
    found = read(tiff(stored, **options))
    assert found.dtype == kind
    np.testing.assert_array_equal(found, first)


def test_pages_of_one_sample_are_channels_and_overviews_are_not():
    bands = noise("uint16", C, H, W)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for band in bands:
            writer.write(band, photometric="minisblack", contiguous=False)
            writer.write(band[::2, ::2], photometric="minisblack", contiguous=False, subfiletype=1)
    np.testing.assert_array_equal(read(file.getvalue()), bands)


def test_gray_tiff_and_png_keep_16_bits_and_white_at_zero_is_turned_round():
    gray = noise("uint16", H, W)
    png = io.BytesIO()
    Image.fromarray(gray).save(png, "PNG")
    for content in (tiff(gray), tiff(gray, compression="zlib"), png.getvalue()):
        np.testing.assert_array_equal(read(content, 1), gray[None])
    np.testing.assert_array_equal(read(tiff(gray, photometric="miniswhite"), 1), 65535 - gray[None])
    bands = noise("uint8", C, H, W)
    inverted = tiff(bands, photometric="miniswhite", planarconfig="separate")
    np.testing.assert_array_equal(read(inverted), 255 - bands)


NODATA = [(42113, "s", 0, "-9999", True)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiff(noise("uint8", H, W, 4), planarconfig="contig"), "has 4 channels, and the model takes 5"),
        (tiff(noise("uint8", 4, H, W)), "has 4 pages of one channel, and the model takes 5"),
        (tiff(noise("uint8", 60, H, W)), "has more than 5 pages of one channel"),
        (tiff(np.zeros((H, W, C)), planarconfig="contig"), "holds float64"),
        (tiff(np.zeros((H, W, C), "int16"), planarconfig="contig"), "holds int16"),
        (tiff(np.full((H, W, C), np.nan, "f4"), planarconfig="contig"), "540 of its 540 values are NaN"),
        (tiff(np.full((H, W, C), -9999, "f4"), planarconfig="contig", extratags=NODATA), "540 values are -9999, which"),
        (tiff(noise("uint8", H, W, C), planarconfig="contig", extratags=[(274, "H", 1, 6, True)]), "orientation 6"),
        (tiff(noise("uint8", H, W, 4), photometric="separated"), "."),
        (b"II*\0", "not a readable image"),
        (b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 60, "not a readable image|has no image|."),
    ],
)  # fmt: skip
def test_other_tiff_files_are_refused_in_one_line(content, message):
    with pytest.raises(InputError, match=message) as error:
        read(content)
    assert "\n" not in str(error.value)


def test_inks_are_no_channels():
    with pytest.raises(InputError, match="kind 5"):
        read(tiff(noise("uint8", H, W, 4), photometric="separated"), 4)


def test_integers_that_are_declared_missing_are_reported_once(capfd, monkeypatch):
    monkeypatch.setattr(images, "_reported", bytearray(len(images.NOTES)))
    content = tiff(np.zeros((H, W, C), "uint16"), planarconfig="contig", extratags=[(42113, "s", 0, "0", True)])
    assert [read(content).max() for _ in range(3)] == [0, 0, 0]
    assert capfd.readouterr().err.count("declares as missing") == 1


BOMB = zlib.compress(bytes(300_000_000), 9)
"""Zeros, of which a decoder that is told how much it may write writes no more."""


def directory(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """A TIFF of one directory: entries of tag, type, count and value."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + struct.pack("<I", following)


def claimed(
    width: int, height: int, compression: int = 1, data: bytes = bytes(100), strips: int | None = None
) -> bytes:
    """A TIFF of two channels that announces a size, whatever data there are."""
    begin = 8 + 2 + 12 * 9 + 4
    where = (273, 4, strips, 0) if strips else (273, 4, 1, begin)
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 2, 8 << 16 | 8), (259, 3, 1, compression),
               (262, 3, 1, 1), where, (277, 3, 1, 2), (278, 4, 1, height), (279, 4, 1, len(data))]  # fmt: skip
    return directory(*entries) + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (claimed(100_000, 100_000), "100000×100000 pixels"),
        (claimed(9000, 9000), "parts of it are missing"),
        (claimed(1000, 1000, compression=8, data=BOMB), "not a readable image"),
        (claimed(64, 64, strips=2**31), "not a readable image|missing"),
        (claimed(64, 64), "parts of it are missing"),
        (claimed(64, 64, compression=7), r"not read here \(7\); save it with none, LZW"),
        (claimed(64, 64, data=b""), "missing"),
        (directory((256, 4, 1, 8), following=8), "."),
    ],
)  # fmt: skip
def test_hostile_tiff_files_take_no_memory(content, message):
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as error:
            read_array(io.BytesIO(content), 2, "x")
        assert "\n" not in str(error.value)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_compressed_tiff_without_its_decoders_is_refused_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(InputError, match=r"x: is compressed; .*pip install 'shvit\[tiff\]', or save it uncompressed"):
        read(tiff(noise("uint8", H, W, C), planarconfig="contig", compression="zlib"))


# --- images that Pillow opens -----------------------------------------------------------------------------------------


def pillow(array: np.ndarray, mode: str, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array, mode).save(file, kind, **options)
    return file.getvalue()


def test_alpha_is_a_channel_as_it_is_stored():
    for chans, mode in ((2, "LA"), (4, "RGBA")):
        array = noise("uint8", H, W, chans)
        np.testing.assert_array_equal(read(pillow(array, mode), chans), array.transpose(2, 0, 1))
        np.testing.assert_array_equal(read(tiff(array, planarconfig="contig"), chans), array.transpose(2, 0, 1))


def test_an_rgb_image_is_gray_for_a_model_of_one_channel():
    array = noise("uint8", H, W, 3)
    expected = np.asarray(Image.fromarray(array).convert("L"))
    np.testing.assert_array_equal(read(pillow(array, "RGB"), 1), expected[None])
    np.testing.assert_array_equal(read(pillow(array, "RGB", "TIFF"), 1), expected[None])


def test_images_of_other_channels_are_refused():
    rgb = pillow(noise("uint8", H, W, 3), "RGB")
    for chans, message in ((4, r"has 3 channels \(RGB\), and the model takes 4; give RGBA images, TIFF or .npy"),
                           (5, "the model takes 5; give TIFF or .npy"), (2, "give LA images")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            read(rgb, chans)
    with pytest.raises(InputError, match="not a readable image"):
        read(b"no image", 5)


def test_sixteen_bits_with_alpha_are_not_silently_eight():
    rows = b"".join(b"\0" + noise("uint16", W, 4).astype(">u2").tobytes() for _ in range(H))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", W, H, 16, 6, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    with pytest.raises(InputError, match="16 bits for each channel, of which Pillow keeps 8"):
        read(b"\x89PNG\r\n\x1a\n" + b"".join(packed), 4)
