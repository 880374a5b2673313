"""One decoder: what a viewer shows, against OpenCV, tifffile, littleCMS and files whose look is known."""

import io
import struct
import sys
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from skimage.color import lab2rgb

from shvit.errors import InputError
from shvit.train.data import images
from shvit.train.data.images import open_image, to_rgb

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
SIXTEEN = RNG.integers(0, 65536, (12, 20), dtype=np.uint16)


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    images._reported[:] = bytes(len(images.NOTES))


def pixels(path) -> np.ndarray:
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def opencv(path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]


# --- orientation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_orientation_is_applied(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(COLOR).save(path, exif=exif, **options)
    mirrored = COLOR[:, ::-1]
    upright = {1: COLOR, 2: mirrored, 3: COLOR[::-1, ::-1], 4: COLOR[::-1], 5: COLOR.swapaxes(0, 1),
               6: np.rot90(COLOR, -1), 7: np.rot90(COLOR[::-1], 1), 8: np.rot90(COLOR, 1)}[orientation]  # fmt: skip
    assert np.abs(pixels(path).astype(int) - upright).max() <= (8 if suffix == "jpg" else 0)
    if suffix == "jpg":
        assert np.abs(pixels(path).astype(int) - opencv(path)).max() <= 2


@pytest.mark.parametrize("gray", [COLOR[..., 0], SIXTEEN], ids=["8 bits", "16 bits"])
def test_a_tiff_is_upright_by_its_path_too(gray, tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", gray, compression=None, extratags=[(0x0112, "H", 1, 6, True)])
    expected = np.rot90(gray if gray.dtype == np.uint8 else gray >> 8, -1)
    assert np.array_equal(pixels(tmp_path / "x.tif")[..., 0], expected)
    assert np.array_equal(pixels(io.BytesIO((tmp_path / "x.tif").read_bytes()))[..., 0], expected)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_orientation_of_xmp_alone_is_not_applied(suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if suffix == "tif":
        tifffile.imwrite(path, COLOR, photometric="rgb", extratags=[(700, "B", len(xmp), xmp, True)])
    else:
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        Image.fromarray(COLOR).save(path, **({"pnginfo": info} if suffix == "png" else {"xmp": xmp}))
    assert Image.open(path).getexif()[0x0112] == 6  # Pillow sees it
    assert pixels(path).shape == opencv(path).shape == COLOR.shape


def test_warnings_of_pillow_are_not_shown(tmp_path, recwarn):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x0112, 3, 1, 6)  # a second entry is missing
    Image.fromarray(COLOR).save(tmp_path / "x.jpg", exif=exif)
    pixels(tmp_path / "x.jpg")
    assert not recwarn.list


def test_orientation_is_applied_to_what_another_library_decoded():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(COLOR).save(file, "png", exif=exif)
    decoded = Image.open(file)
    decoded.load()
    assert np.array_equal(to_rgb(decoded, "x"), np.rot90(COLOR, -1))
    assert np.array_equal(to_rgb(decoded.convert("RGB"), "x"), np.rot90(COLOR, -1))
    assert np.array_equal(to_rgb(to_rgb(decoded, "x"), "x"), np.rot90(COLOR, -1))


def test_damaged_exif_does_not_cost_the_image(tmp_path):
    Image.fromarray(COLOR).save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xffnothing")
    assert pixels(tmp_path / "x.jpg").shape == COLOR.shape


# --- 16 bits and more -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "pgm", "tif"])
def test_16_bits_become_8_as_in_opencv(suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    cv2.imwrite(str(path), SIXTEEN)
    assert np.array_equal(pixels(path)[..., 0], SIXTEEN >> 8)
    assert np.array_equal(pixels(path), opencv(path))


@pytest.mark.parametrize("options", [{"byteorder": ">"}, {"byteorder": "<"}, {"photometric": "miniswhite"}], ids=str)
def test_16_bits_in_every_kind_of_tiff_become_8_as_in_opencv(options, tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", SIXTEEN, **options)
    assert np.array_equal(pixels(tmp_path / "x.tif"), opencv(tmp_path / "x.tif"))


def test_16_bits_of_three_channels_become_8_as_in_opencv(tmp_path):
    cv2.imwrite(str(tmp_path / "x.png"), RNG.integers(0, 65536, (12, 20, 3), dtype=np.uint16))
    assert np.array_equal(pixels(tmp_path / "x.png"), opencv(tmp_path / "x.png"))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bits_that_another_library_decoded_become_8(mode):
    array = SIXTEEN.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode])
    assert np.array_equal(
        np.asarray(to_rgb(Image.frombytes(mode, (20, 12), array.tobytes()), "x"))[..., 1], SIXTEEN >> 8
    )


def test_12_bits_are_shown_in_their_range(tmp_path):
    twelve = (SIXTEEN >> 4).astype(int)
    packed = bytearray()
    for first, second in twelve.reshape(-1, 2):
        packed += bytes([first >> 4, (first & 15) << 4 | second >> 8, second & 255])
    tags = ((256, 3, 20), (257, 3, 12), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 12),
            (279, 4, len(packed)))  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", t, kind, 1, v) for t, kind, v in tags)
    content = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory + bytes(4)
    (tmp_path / "x.tif").write_bytes(content)
    assert np.array_equal(pixels(tmp_path / "x.tif")[..., 0], twelve >> 4)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (SIXTEEN.astype(np.float32), "its pixels are floats"),
        (SIXTEEN.astype(np.float64), "a TIFF whose pixels are stored in a way"),
        (
            np.dstack([SIXTEEN] * 3).astype(np.float32),
            "a TIFF whose pixels are stored in a way",
        ),
        (SIXTEEN.astype(np.uint32), "its pixels are 32-bit integers"),
        (SIXTEEN.astype(np.int32) % 200, "its pixels are 32-bit integers"),
        (SIXTEEN.view(np.int16), "values from -.* and 16 bits hold 0 to 65535"),
        (SIXTEEN.astype(np.int8), "values from -.* and 8 bits hold 0 to 255"),
    ],
)
def test_pixels_without_a_white_are_refused_by_name(array, message, tmp_path):
    tifffile.imwrite(tmp_path / "scan.tif", array)
    with pytest.raises(InputError, match=f"scan.tif: .*{message}"):
        open_image(tmp_path / "scan.tif")


def test_a_tiff_that_pillow_does_not_read_is_not_said_to_be_of_other_pixels(tmp_path):
    tifffile.imwrite(tmp_path / "scan.tif", SIXTEEN, byteorder=">", photometric="miniswhite")
    with pytest.raises(
        InputError, match=r"a TIFF whose pixels are stored in a way that Pillow does not read\); convert"
    ):
        open_image(tmp_path / "scan.tif")


def test_images_that_would_be_nearly_black_are_said_once(tmp_path, capfd):
    for name in ("1.png", "2.png"):
        Image.fromarray(SIXTEEN % 1024).save(tmp_path / name)
        assert pixels(tmp_path / name).max() == 3
    assert capfd.readouterr().err.count("nearly black") == 1


# --- transparency -----------------------------------------------------------------------------------------------------


def test_cut_outs_are_composited_on_white(tmp_path):
    alpha = np.where(np.arange(20) < 10, 0, 255) * np.ones((12, 1))
    alpha[0] = 128
    rgba = np.dstack([COLOR, alpha]).astype(np.uint8)
    on_white = np.rint(rgba[..., :3] * (alpha / 255)[..., None] + 255 * (1 - alpha / 255)[..., None])
    for suffix, options in (("png", {}), ("webp", {"lossless": True, "exact": True}), ("tif", {})):
        Image.fromarray(rgba).save(tmp_path / f"x.{suffix}", **options)
        assert np.abs(pixels(tmp_path / f"x.{suffix}") - on_white).max() <= 1
    assert np.array_equal(pixels(tmp_path / "x.png")[1:, :10], np.full((11, 10, 3), 255))
    assert np.array_equal(pixels(tmp_path / "x.png")[1:, 10:], COLOR[1:, 10:])


@pytest.mark.parametrize("mode", ["LA", "PA", "La", "RGBa"])
def test_every_mode_with_alpha_is_composited(mode):
    assert np.asarray(to_rgb(Image.new(mode, (8, 8), 0), "x")).min() == 255


def test_palettes_and_colors_that_are_transparent(tmp_path, recwarn):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putpixel((0, 0), 0)
    for transparency in (0, b"\0\xff"):
        palette.save(tmp_path / "p.png", transparency=transparency)
        assert pixels(tmp_path / "p.png")[0, 0].tolist() == [255, 255, 255]
        assert pixels(tmp_path / "p.png")[1, 1].tolist() == [200, 0, 0]
    palette.save(tmp_path / "p.gif", transparency=0)
    assert pixels(tmp_path / "p.gif")[0, 0].tolist() == [255, 255, 255]
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    Image.new("L", (4, 4), 7).save(tmp_path / "l.png", transparency=7)
    Image.new("I;16", (4, 4), 700).save(tmp_path / "i.png", transparency=700)
    for name in ("rgb.png", "l.png", "i.png"):
        assert pixels(tmp_path / name).min() == 255, name
    assert not recwarn


def test_a_transparent_gray_of_four_bits(tmp_path):
    """Level 5 of 15, written by hand: Pillow scales the pixels to 8 bits, and not the level."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0)
    rows = zlib.compress(b"\0\x53")  # levels 5 and 3
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", b"\0\5"), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert pixels(tmp_path / "x.png")[0].tolist() == [[255, 255, 255], [51, 51, 51]]


# --- other colors, other formats --------------------------------------------------------------------------------------


def test_one_bit_is_black_and_white(tmp_path):
    image = Image.fromarray(SIXTEEN > 30000)
    for suffix in ("png", "tif", "pbm", "bmp"):
        image.save(tmp_path / f"x.{suffix}")
        assert np.array_equal(pixels(tmp_path / f"x.{suffix}")[..., 0], 255 * (SIXTEEN > 30000)), suffix


def test_inks_are_turned_to_light(tmp_path):
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red.save(tmp_path / "x.tif")
    red.save(tmp_path / "x.jpg", quality=100)  # inverted, as Adobe writes them
    for name in ("x.tif", "x.jpg"):
        assert np.abs(pixels(tmp_path / name).astype(int) - (255, 0, 0)).max() <= 2, name


def test_lab_is_what_scikit_image_makes_of_it(tmp_path):
    levels = np.array([[[60, 40, 20], [50, -20, -10]]], float)  # L in percent, a, b; within sRGB
    stored = np.rint(levels * (2.55, 1, 1)).astype(int).astype(np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", stored, photometric="cielab")
    assert np.abs(pixels(tmp_path / "x.tif") - 255 * lab2rgb(levels)).max() < 12


def test_hsv_and_ycbcr_are_converted():
    for mode in ("HSV", "YCbCr"):
        converted = np.asarray(to_rgb(Image.fromarray(COLOR).convert(mode), "x")).astype(int)
        assert np.abs(converted - COLOR).mean() < 4


def test_first_frame_and_first_page_are_read_and_said_once(tmp_path, capfd):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 0, 255))]
    for suffix in ("gif", "webp", "png", "tif"):
        for number in (1, 2):
            options = {"lossless": True} if suffix == "webp" else {}
            frames[0].save(tmp_path / f"{number}.{suffix}", save_all=True, append_images=frames[1:], **options)
            assert pixels(tmp_path / f"{number}.{suffix}")[0, 0].tolist() == [255, 0, 0]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    assert "1.gif: an animation; only the first frame of such files is read" in said[0]
    assert "1.tif: several pages" in said[1]


def test_avif_is_read(tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 40)).save(tmp_path / "x.avif")
    assert np.abs(pixels(tmp_path / "x.avif").astype(int) - (200, 30, 40)).max() <= 4


@pytest.fixture
def heic(tmp_path):
    from pillow_heif import from_pillow

    path = tmp_path / "IMG_0001.HEIC"
    exif = Image.Exif()
    exif[0x0112] = 6
    from_pillow(Image.new("RGB", (32, 16), (200, 30, 40))).save(path, exif=exif.tobytes())
    return path


def test_heic_is_read_upright(heic):
    assert pixels(heic).shape == (32, 16, 3)
    assert np.abs(pixels(heic).astype(int) - (200, 30, 40)).max() <= 4
    assert open_image(io.BytesIO(heic.read_bytes()), "in a tar").size == (16, 32)


def test_heic_without_its_package_is_refused_by_name(heic, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    Image.init()
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    images._formats.cache_clear()
    with pytest.raises(InputError, match=r"IMG_0001\.HEIC: a HEIC image, .*pip install 'shvit\[heic\]'"):
        open_image(heic)
    monkeypatch.undo()
    images._formats.cache_clear()


def test_formats_that_run_programs_are_not_opened(tmp_path, monkeypatch):
    def run(*_args, **_options):
        pytest.fail("a program was run")

    monkeypatch.setattr("subprocess.check_call", run)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.jpg")
    with pytest.raises(InputError, match=r"x\.jpg: not a readable image \(not one of PNG, JPEG"):
        open_image(tmp_path / "x.jpg")
    with pytest.raises(OSError, match="Ghostscript"), Image.open(tmp_path / "x.jpg") as image:
        image.load()  # as timm's readers of shards do
