"""Where data may lie: addresses, names of datasets, shards and what their lists say."""

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from shvit.errors import InputError
from shvit.train.data.datasets import open_dataset, open_named
from shvit.train.data.eval_dataset import open_eval_dataset
from shvit.train.data.eval_loader import eval_loader
from shvit.train.data.locations import expand_braces
from shvit.train.data.shards import Shards
from shvit.train.data.streams import open_stream
from shvit.train.evaluate import evaluate
from shvit.train.loop import train
from shvit.train.recipe import Augment, Data
from shvit.train.step.loader import TrainLoader
from shvit.train.step.setup import check_recipe

from .conftest import png

pytestmark = pytest.mark.usefixtures("no_programs")


def jpeg(color: tuple[int, int, int] = (200, 0, 0), size: tuple[int, int] = (20, 20)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "JPEG")
    return stream.getvalue()


def write_shard(path: Path, count: int, content: bytes | None = None) -> None:
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            for name, data in ((f"s{i}.jpg", content or jpeg()), (f"s{i}.cls", b"%d" % (i % 2))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def write_info(folder: Path, names: list[str], lengths: list[int]) -> None:
    split = {"name": "validation", "filenames": names, "shard_lengths": lengths, "num_samples": sum(lengths)}
    (folder / "_info.json").write_text(json.dumps({"splits": {"validation": split, "train": split}}))


@pytest.fixture
def shards(tmp_path):
    """Two shards of four images."""
    root = tmp_path / "shards"
    root.mkdir()
    for number in range(2):
        write_shard(root / f"v-{number}.tar", 4)
    write_info(root, ["v-0.tar", "v-1.tar"], [4, 4])
    return root


def wds(root: Path, **fields: object) -> Data:
    return Data(name="wds/", root=root, num_classes=2, workers=0, **fields)  # type: ignore[arg-type]


# --- locations --------------------------------------------------------------------------------------------------------

ADDRESSES = (
    "pipe:touch PWNED",
    "pipe:touch PWNED; true ",
    "PIPE:touch PWNED",
    "http://localhost/x",
    "https:/localhost/x",
    "s3://bucket/x",
    "gs:/bucket/x",
    "file:/etc",
    "hf://datasets/x/y",
    "ais://bucket",
    "zip::pipe:touch PWNED",
    "ssh://host/x",
)


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("name", ["", "wds/", "hfds/x", "tfds/x", "torch/cifar10"])
def test_location_with_a_scheme_is_refused(address, name):
    data = Data(root=Path(address), name=name)
    read = (lambda: open_dataset(data.root, "train")) if not name else lambda: open_named(data, "train")
    if name in ("wds/", "tfds/x"):
        read = lambda: open_stream(data, "train")  # noqa: E731
    with pytest.raises(InputError, match="is an address or a command, and only a path is opened"):
        read()
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("address", ADDRESSES)
def test_location_to_evaluate_on_is_a_path(address):
    for text in (f"wds/{address}", address):
        with pytest.raises(InputError):
            open_eval_dataset(text)


def test_folder_with_a_colon_in_its_name_is_a_path(folders):
    folders.rename("2024:summer")
    assert len(open_dataset(Path("2024:summer"), "train")) > 30


@pytest.mark.parametrize(
    "name",
    [
        "hfds/https://example.org/x", "hfds/../x", "hfds//etc", "hfds/a/../b", "hfds/a/b/c", "hfds/script.py",
        "hfds/a/b.PY", "hfds/pipe:x", "hfds/", "hfids/s3://x/y", "hfds/a..b", "tfds/huggingface:x", "tfds/../x",
        "tfds/https://x", "torch/../x", "torch/a/b", "torch/", "wds/x", "pipe:x", "csv/x", "hfds/a b", "hfds/a\nb",
    ],
)  # fmt: skip
def test_dataset_that_is_no_name_is_refused(name):
    with pytest.raises(InputError, match=r"data\.name"):
        open_named(Data(name=name), "train")
    with pytest.raises(InputError, match=r"data\.name"):
        open_stream(Data(name=name), "train")


@pytest.mark.parametrize("split", ["../../etc", "https://x", "train;x", "x" * 300])
def test_split_of_a_name_is_a_word(split):
    with pytest.raises(InputError, match="is not the name of a split"):
        open_named(Data(name="hfds/x", train_split=split), "train")


@pytest.mark.parametrize("model", ["hf-hub:timm/x", "local-dir:x", "shvit_s1:x", "shvit_s1.local-dir:/x", "hf_hub:x"])
def test_model_and_teacher_are_names(model, recipe, monkeypatch):
    for wrong in (
        replace(recipe, model=model), replace(recipe, distill=replace(recipe.distill, teacher=model)),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"unknown (model|teacher)"):
            check_recipe(wrong, None)


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["pipe:touch PWNED", "/etc/passwd", "../x.tar", "a/../../x.tar", "https://x/y.tar", "v-0.tar::pipe:x", "C:x.tar",
     "..\\x.tar", "file:v-0.tar", "", "a\0.tar"],
)  # fmt: skip
def test_shard_is_a_file_below_its_folder(name, shards):
    write_info(shards, ["v-0.tar", name], [4, 4])
    with pytest.raises(InputError, match="name shards relative to it"):
        open_stream(wds(shards), "val")


@pytest.mark.parametrize(
    "pattern",
    [
        "pipe:touch PWNED; #.tar|8", "v-{0..999999999}.tar|8", "{1..99999}{1..99999}.tar|8", "v-0.tar::pipe:x|8",
        "../v-{0..1}.tar|8", "/etc/{a,b}.tar|8", "${HOME}.tar|8", "{a{b,c}}.tar|8", "v-{0..1.tar|8", "v-{1..0}.tar|8",
        "v-{0..1}.tar|x", "v-{0..1}.tar|" + "9" * 5000, "nowhere", "{1..2}" * 60 + ".tar|8",
    ],
)  # fmt: skip
def test_pattern_of_shards_is_bounded_and_below_its_folder(pattern, shards):
    with pytest.raises(InputError):
        open_stream(wds(shards, val_split=pattern), "val")
    assert not Path("PWNED").exists()


def test_pattern_of_shards_expands_as_webdataset_has_it(shards):
    assert expand_braces("v-{0..1}.tar") == ["v-0.tar", "v-1.tar"]
    assert expand_braces("v-{098..101}.tar") == ["v-098.tar", "v-099.tar", "v-100.tar", "v-101.tar"]
    assert expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert len(list(open_stream(wds(shards, val_split="v-{0..1}.tar|8"), "val"))) == 8


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000, '{"splits": []}', '{"splits": {"validation": 3}}', "{", '{"splits": {"validation": {}}}',
        '{"splits": {"validation": {"num_samples": "8", "filenames": ["v-0.tar"]}}}',
        '{"splits": {"validation": {"num_samples": -8, "filenames": ["v-0.tar"]}}}',
        '{"splits": {"validation": {"num_samples": 8, "filenames": "v-0.tar"}}}',
        '{"splits": {"validation": {"num_samples": 8, "filenames": ["v-0.tar"], "shard_lengths": [1, 2]}}}',
        '{"splits": {"validation": {"num_samples": 1e999, "filenames": []}}}',
    ],
)  # fmt: skip
def test_list_of_shards_is_checked(content, shards):
    (shards / "_info.json").write_text(content)
    with pytest.raises(InputError):
        open_stream(wds(shards), "val")


def accuracy(root: Path, **options: object):
    loader = eval_loader(open_eval_dataset(root), lambda image: torch.zeros(1), 4, report=lambda _: None, **options)
    return loader, evaluate(lambda images: torch.zeros(len(images), 2), loader, 2)


def spoil(shards: Path, how: str) -> None:
    path = shards / "v-1.tar"
    content = path.read_bytes()
    path.unlink()
    if how == "torn":
        path.write_bytes(content[:2500])
    elif how == "cut between two samples":
        path.write_bytes(content[:5120])
    elif how == "noise":
        path.write_bytes(b"\xff" * 4096)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a FIFO":
        os.mkfifo(path)
    elif how == "a folder":
        path.mkdir()


@pytest.mark.parametrize(
    "how", ["missing", "torn", "cut between two samples", "noise", "empty", "a FIFO", "a folder"]
)  # fmt: skip
def test_shard_that_is_not_whole_is_no_accuracy_on_the_others(how, shards):
    assert accuracy(shards)[1].n == 8
    spoil(shards, how)
    with pytest.raises(InputError, match=r"[2-4] of 8 announced images are missing \(.*v-1\.tar"):
        accuracy(shards)
    loader, result = accuracy(shards, max_missing=4)
    assert (result.n + loader.missing, loader.damaged) == (8, 0)


def test_fewer_images_than_announced_are_missing(shards):
    stream = open_stream(wds(shards, val_split="v-{0..1}.tar|10"), "val")
    with pytest.raises(InputError, match="2 of 10 announced images are missing"):
        list(eval_loader(stream, lambda image: torch.zeros(1), 4))


@pytest.mark.parametrize(
    "files",
    [
        {"x.jpg": b"no image", "x.cls": b"0"}, {"x.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n", "x.cls": b"0"},
        {"x.jpg": jpeg()[:300], "x.cls": b"0"}, {"x.jpg": jpeg(), "x.cls": b"zero"}, {"x.jpg": jpeg()},
        {"x.cls": b"0"}, {"x.jpg": jpeg(), "x.cls": b"9" * 5000}, {"x.tif": jpeg(), "x.cls": b"0"},
    ],
)  # fmt: skip
def test_damaged_sample_is_counted_and_the_others_are_read(files, shards):
    with tarfile.open(shards / "v-1.tar", "a") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    write_info(shards, ["v-0.tar", "v-1.tar"], [4, 5])
    loader, result = accuracy(shards)
    assert (result.n, loader.damaged, loader.missing) == (8, 1, 0)
    with pytest.raises(InputError, match="1 damaged images, and 0 are allowed"):
        accuracy(shards, max_corrupt=0)


def test_members_that_are_no_files_or_claim_any_size_are_not_read(shards, monkeypatch):
    monkeypatch.setattr("shvit.train.data.tars.MAX_MEMBER", 10_000)
    with tarfile.open(shards / "v-1.tar", "w") as archive:
        for name, kind in (("l.jpg", tarfile.SYMTYPE), ("f.jpg", tarfile.FIFOTYPE), ("c.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("big.jpg")
        info.size = 20_000
        archive.addfile(info, io.BytesIO(bytes(20_000)))
    with pytest.raises(InputError, match=r"big\.jpg declares 20000 bytes"):
        accuracy(shards)


def test_header_that_claims_any_size_is_not_read(tmp_path):
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 1 << 40
        (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        with pytest.raises(InputError, match="a header of"):
            open_dataset(tmp_path / "x.tar", "train")


def test_training_counts_the_images_of_a_missing_shard(shards, recipe):
    spoil(shards, "missing")
    streamed = replace(recipe, model="shvit_s1", batch_size=4, data=wds(shards))
    loader = TrainLoader(replace(streamed, augment=Augment(repeats=1)), None, one_process(), 1)
    problems = {problem for batch in loader.batches(0, 2) for problem in batch.problems}
    assert [(lost, "v-1.tar: no such file" in text) for text, _, lost in problems] == [(4, True)]
    with pytest.raises(InputError, match=r"4 damaged images, and 3 are allowed.*v-1\.tar: no such file"):
        train(replace(streamed, model="test_resnet", data=wds(shards, max_corrupt=3)), Path("run"))


def one_process():
    from shvit.train.distributed import World

    return World(0, 1, torch.device("cpu"))


def test_shards_come_in_the_order_of_timms_reader(tmp_path):
    pytest.importorskip("webdataset")
    from timm.data.readers.reader_wds import ReaderWds

    for number in range(5):
        with tarfile.open(tmp_path / f"v-{number}.tar", "w") as archive:
            for i in range(7):
                for name, content in ((f"s{i}.png", png(10 * number + i)), (f"s{i}.cls", b"%d" % (10 * number + i))):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    write_info(tmp_path, [f"v-{number}.tar" for number in range(5)], [7] * 5)
    for training in (True, False):
        options = {"is_training": training, "batch_size": 4, "seed": 7}
        theirs = ReaderWds(str(tmp_path), split="train", **options)
        ours = Shards(tmp_path, "train", **options)
        for reader in (theirs, ours):
            reader.set_epoch(3)
        assert [sample.target for sample in ours] == [target for _, target in theirs]
