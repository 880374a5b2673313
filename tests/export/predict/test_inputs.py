"""Which images inputs name, in which order, and the frames of videos."""

import io
import json
import os
import re
import shlex
import shutil
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from shvit.cli import run
from shvit.errors import InputError
from shvit.export.predict.inputs import Inputs, find_inputs
from shvit.export.predict.loading import BEGINNING, Place, load_batches
from shvit.export.predict.videos import Video
from shvit.export.spec import Spec
from tests.conftest import ROOT

from .conftest import draw

SPEC = Spec("tiny_vit", 2, 3, 3, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)


def names(inputs: Inputs, start: Place = BEGINNING) -> list[str]:
    return [item.name for batch in load_batches(inputs, start, SPEC, 3) for item in batch.items]


def find(*inputs: object, every: int = 1, stdin: bytes = b"") -> Inputs:
    return find_inputs([*map(str, inputs)], every, lambda line: None, io.BytesIO(stdin))


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(("d/2.png", "d/sub/1.png", "d/.hidden.png", "e 1.png", "e 2.png", "new\nline.png")):
        draw(Path(name), index)
    return tmp_path


def write_shard(path: Path, *names: str) -> Path:
    """With classes and metadata, as WebDataset has them."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            content = io.BytesIO()
            Image.new("RGB", (8, 8)).save(content, "PNG")
            for suffix, data in (("cls", b"1"), ("json", b"{}"), ("png", content.getvalue())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def test_files_folders_and_patterns(tree):
    assert names(find("e 2.png", "d", "e 1.png")) == ["e 2.png", "d/2.png", "d/sub/1.png", "e 1.png"]
    assert names(find("e*.png")) == ["e 1.png", "e 2.png"]
    assert names(find("**/*.png")) == ["d/2.png", "d/sub/1.png", "e 1.png", "e 2.png", "new\nline.png"]


@pytest.mark.parametrize("separator", ["\n", "\0"])
def test_a_list_on_stdin(tree, separator):
    listed = ["e 1.png", "d", "gone.png", *(["new\nline.png"] if separator == "\0" else [])]
    found = find("-", stdin=separator.join([*listed, ""]).encode())
    expected = ["e 1.png", "d/2.png", "d/sub/1.png", "gone.png", *listed[3:]]
    assert names(found) == expected
    problems = [item.problem for batch in load_batches(found, BEGINNING, SPEC, 8) for item in batch.items]
    assert [bool(problem) for problem in problems] == [name == "gone.png" for name in expected]


def test_shards(tree):
    write_shard(Path("shards/b-1.tar"), "c", "d")
    write_shard(Path("shards/b-0.tar"), "a")
    Path("shards/_info.json").write_text("{}")
    expected = ["shards/b-0.tar/a.png", "shards/b-1.tar/c.png", "shards/b-1.tar/d.png"]
    for given in ("shards", "shards/b-{0..1}.tar", "shards/*.tar"):
        assert names(find(given)) == expected, given
    with pytest.raises(InputError, match=r"stands for shards/b-2\.tar, which is not there"):
        find("shards/b-{0..2}.tar")


def test_what_is_left_is_what_comes_after_a_place(tree):
    write_video(Path("v.mkv"), frames(7))
    found = find("e 1.png", "v.mkv", "d", every=2)
    everything = names(found)
    assert everything == ["e 1.png", *["v.mkv"] * 4, "d/2.png", "d/sub/1.png"]
    for place, left in ((Place(0, 1), 6), (Place(1, 3), 3), (Place(1, 4), 2), (Place(2, 1), 1), (Place(2, 2), 0)):
        assert names(found, place) == everything[len(everything) - left :], place


def test_other_images_have_another_hash(tree):
    write_shard(Path("s.tar"), "a")
    digests = [find("d").digest(), find("e 1.png").digest(), find("e 1.png", "d").digest(), find("s.tar").digest()]
    write_shard(Path("s.tar"), "a", "b")
    digests.append(find("s.tar").digest())
    assert len({*digests}) == 5
    assert find("d").digest() == digests[0]


# --- videos -----------------------------------------------------------------------------------------------------------


def frames(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 256, 3) * 0.8 + rng.integers(0, 50, (48, 64, 3))).astype(np.uint8) for _ in range(count)]


def write_video(path: Path, images: list[np.ndarray]) -> Path:
    """Without loss, ten frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for pixels in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_frames_are_predicted_as_images_of_them_are(weights, tmp_path):
    images = frames(7)
    video = write_video(tmp_path / "v.mkv", images)
    for number in (0, 3, 6):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(images[number]).save(tmp_path / "images" / f"{number}.png")
    for name, words in (("v", [video, "--every", 3]), ("i", [tmp_path / "images"])):
        options = ["--checkpoint", weights, "--output", tmp_path / f"{name}.jsonl"]
        run([str(word) for word in ["predict", *words, *options]])
    found, expected = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] for name in ("v", "i"))
    assert [(each["path"], each["frame"], each["seconds"]) for each in found] == [
        (str(video), 0, 0.0), (str(video), 3, 0.3), (str(video), 6, 0.6)
    ]  # fmt: skip
    assert [each["probabilities"] for each in found] == [each["probabilities"] for each in expected]


def test_the_commands_of_the_page_run(weights, mine, tmp_path, monkeypatch):
    """In a folder that has what they name; the weights that would be downloaded are others."""
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(("photo.png", "photos/a.jpg", "more/b/c.jpg")):
        draw(Path(name), index)
    Path("photo.png").rename("photo.jpg")
    write_video(Path("clip.mkv"), frames(2)).rename("clip.mp4")
    for number in range(100):
        write_shard(Path(f"shards/train-{number:04}.tar"), "a")
    Path("runs/mine").mkdir(parents=True)
    for path in ("best.safetensors", "runs/mine/best_ema.safetensors"):
        shutil.copy(weights, path)
    shutil.copy(mine, "s1.onnx")
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "how-to" / "predict.md").read_text(), re.DOTALL)
    for line in block.splitlines():
        words = shlex.split(line.replace("shvit_s4.in1k", "best.safetensors"), comments=True)[1:]
        with_weights = {"--checkpoint", "--artifact"} & {*words}
        result = run([*words, *(() if with_weights else ("--checkpoint", "best.safetensors"))])
        assert result["images"] - result["damaged"] > 0
        assert all(Path(words[words.index(each) + 1]).is_file() for each in ("--output", "--draw") if each in words)


def test_a_video_that_ends_in_the_middle_is_damaged_there(tmp_path):
    whole = write_video(tmp_path / "v.mkv", frames(9)).read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) // 2] + os.urandom(200))
    read = [*Video(cut, 1, 0).frames()]
    assert 1 < len(read) < 9
    good = [frame for frame in read if not frame.problem]
    for frame, expected in zip(good, frames(9), strict=False):
        assert np.array_equal(np.asarray(frame.image), expected)


def test_lists_of_other_files_are_not_videos(tmp_path, monkeypatch):
    """FFmpeg opens what they name."""
    monkeypatch.chdir(tmp_path)
    write_video(Path("secret.mkv"), frames(2))
    path = Path("list.mp4")
    path.write_text("ffconcat version 1.0\nfile secret.mkv\n")
    with path.open("rb") as file, av.open(file) as opened:
        assert len([*opened.decode(video=0)]) == 2
    with pytest.raises(InputError, match="not a readable video"):
        find(path)
