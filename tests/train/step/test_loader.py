"""Training batches: order, augmentation, streams, and resuming in the middle."""

import io
import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.distributed_sampler import RepeatAugSampler

from shvit.errors import InputError
from shvit.img_size import ImgSize
from shvit.train.data.datasets import Images, open_dataset, open_named
from shvit.train.data.eval_dataset import open_eval_dataset
from shvit.train.data.eval_loader import eval_loader
from shvit.train.data.image_folders import Files
from shvit.train.data.images import open_image
from shvit.train.data.pixels.preprocessing import Preprocessing, resolve_preprocessing
from shvit.train.data.streams import open_stream
from shvit.train.distributed import World
from shvit.train.recipe import Augment, Data, Recipe
from shvit.train.step.augment import DeviceAugment, create_train_transform, posterize
from shvit.train.step.batch import Batch
from shvit.train.step.loader import Augmented, TrainLoader
from shvit.train.step.samplers import MicroBatchSampler, StepSampler
from shvit.train.step.seeds import seed_generators  # fmt: skip

CPU = torch.device("cpu")


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, CPU)


@pytest.fixture
def image_folder(tmp_path):
    """40 images of two classes, no two alike."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(40):
        path = tmp_path / "train" / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
        samples.append((path, index % 2))
    return Images(Files(samples), ["a", "b"])


@pytest.fixture
def recipe():
    return Recipe(img_size=32, epochs=3, batch_size=8, augment=Augment(repeats=1), data=Data(workers=0))


def constants(mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocessing:
    return replace(resolve_preprocessing(Recipe()), mean=mean, std=std)


def drain(loader: TrainLoader, start: int, end: int) -> list[Batch]:
    return list(loader.batches(start, end))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)


# --- order ------------------------------------------------------------------------------------------------------------


def test_every_image_comes_once_an_epoch_in_another_order():
    order = StepSampler(40, 8, repeats=1, seed=0)
    assert order.steps_per_epoch == 5
    epochs = [[index for step in range(5 * e, 5 * e + 5) for _, index in order.batch(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    places = [place for step in range(15) for place, _ in order.batch(step)]
    assert places == list(range(120))


def test_seeds_draw_other_orders_in_every_epoch():
    orders = [StepSampler(40, 40, 1, seed) for seed in (0, 1, 2)]
    drawn = {tuple(index for _, index in order.batch(epoch)) for order in orders for epoch in range(3)}
    assert len(drawn) == 9


def test_copies_of_repeated_augmentation_are_dealt_as_timms_sampler_deals_them():
    order = StepSampler(512, 64, repeats=3, seed=0)
    assert order.steps_per_epoch == 8
    for rank in range(2):
        theirs = RepeatAugSampler(range(512), num_replicas=2, rank=rank, num_repeats=3)
        mine = [index for batch in MicroBatchSampler(order, 0, 8, rank, 2, 1) for _, index in batch]
        assert mine == list(theirs)
    counts = np.bincount([index for step in range(8) for _, index in order.batch(step)])
    assert counts.max() == 3


@pytest.mark.parametrize(("size", "accum_steps"), [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_processes_and_micro_batches_together_have_the_batch(size, accum_steps):
    order = StepSampler(40, 8, repeats=1, seed=5)
    shares = [list(MicroBatchSampler(order, 2, 4, rank, size, accum_steps)) for rank in range(size)]
    for step in range(2):
        keys = [
            key for share in shares for batch in share[step * accum_steps : (step + 1) * accum_steps] for key in batch
        ]
        assert sorted(keys) == sorted(order.batch(2 + step))


def test_batch_larger_than_an_epoch_is_refused():
    with pytest.raises(InputError, match=r"40 training images .* fewer than the batch of 64"):
        StepSampler(40, 64, repeats=1, seed=0)


# --- images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_the_middle_of_an_epoch_gives_the_same_batches(recipe, image_folder, workers):
    whole = drain(TrainLoader(recipe, image_folder, world(), 1), 0, 10)
    other = replace(recipe, data=Data(workers=workers))
    assert_same(drain(TrainLoader(other, image_folder, world(), 1), 3, 10), whole[3:])


def test_processes_augment_as_one_does(recipe, image_folder):
    whole = drain(TrainLoader(recipe, image_folder, world(), 1), 0, 4)
    halves = [drain(TrainLoader(recipe, image_folder, world(rank, 2), 1), 0, 4) for rank in range(2)]
    for step in range(4):
        together = torch.stack([halves[0][step].images, halves[1][step].images], dim=1).flatten(0, 1)
        assert torch.equal(together, whole[step].images)


def test_a_image_looks_different_in_every_epoch(recipe, image_folder):
    batches = drain(TrainLoader(replace(recipe, batch_size=40), image_folder, world(), 1), 0, 2)
    assert not torch.equal(batches[0].images.sort(0).values, batches[1].images.sort(0).values)


def test_progressive_sizes_are_those_of_their_epochs(recipe, image_folder):
    growing = replace(recipe, img_size=96, first_img_size=32)
    assert [batch.images.shape[-1] for batch in drain(TrainLoader(growing, image_folder, world(), 1), 4, 11)] == (
        [32] + 5 * [64] + [96]
    )


def test_images_have_the_height_and_width_of_their_epoch(recipe, image_folder):
    growing = replace(recipe, img_size=(32, 96), first_img_size=32)
    batches = drain(TrainLoader(growing, image_folder, world(), 1), 4, 11)
    assert [batch.images.shape[-2:] for batch in batches] == [(32, 32)] + 5 * [(32, 64)] + [(32, 96)]


def test_damaged_image_is_named_and_its_place_taken(recipe, image_folder):
    path = image_folder.samples[7][0]
    path.write_bytes(path.read_bytes()[:100])
    batches = drain(TrainLoader(replace(recipe, batch_size=40), image_folder, world(), 1), 0, 1)
    assert [str(path) in problem for problem, _, _ in batches[0].problems] == [True]
    assert len(batches[0].targets) == 40
    assert int(batches[0].targets.sum()) == 19  # the next one, of the other class, came twice


def test_endless_damage_does_not_hang(image_folder):
    for path, _ in image_folder.samples:
        path.write_text("no image")
    augmented = Augmented(image_folder, lambda place: lambda image: np.zeros((3, 8, 8), np.uint8), 0, tries=3)
    assert len(augmented[0, 0][2]) == 4


def test_random_augmentation_never_fails_whatever_it_draws():
    """timm's policy asks Pillow for a posterize of 0 bits now and then, which Pillow 13 refuses."""
    transform = create_train_transform(Augment(), resolve_preprocessing(Recipe(img_size=ImgSize(32, 48))))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    random.seed(0)
    for _ in range(1500):
        assert transform(image).shape == (3, 32, 48)


def test_posterize_is_timms_and_black_for_no_bits():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    assert np.array_equal(posterize(image, 3), np.asarray(image) & 0b11100000)
    assert not np.asarray(posterize(image, 0)).any()
    operations = rand_augment_transform("rand-m9-inc1", {}).ops
    assert any(operation.name.startswith("Posterize") for operation in operations)  # the name that is looked for


# --- on the device ----------------------------------------------------------------------------------------------------


def test_bytes_are_normalized_as_torchvision_does(recipe):
    from torchvision.transforms import Normalize

    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    plain = replace(recipe, augment=Augment(mixup=0, cutmix=0, random_erasing=0))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    found, targets = DeviceAugment(plain, 2, constants(mean, std), world())(
        Batch(images, torch.tensor([0, 1, 0, 1])), 0, 0
    )
    torch.testing.assert_close(found, Normalize(mean, std)(images / 255))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert targets.tolist() == [0, 1, 0, 1]


def test_mixing_and_erasing_follow_from_the_step_alone(recipe):
    batch = Batch(torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 2)
    augment = DeviceAugment(recipe, 2, constants((0, 0, 0), (1, 1, 1)), world())
    first = augment(batch, 5, 0)
    augment(batch, 6, 0)
    again, later = augment(batch, 5, 0), augment(batch, 7, 0)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], later[0])
    assert torch.allclose(first[1].sum(1), torch.ones(8))
    elsewhere = DeviceAugment(recipe, 2, constants((0, 0, 0), (1, 1, 1)), world(1, 2))(batch, 5, 0)
    assert not torch.equal(first[0], elsewhere[0])


def test_seeds_reach_every_generator():
    def draw() -> tuple:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_generators(1, 2)
    first = draw()
    seed_generators(1, 2)
    assert draw() == first
    seed_generators(2, 1)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


# --- tars and streams -------------------------------------------------------------------------------------------------


def test_tar_gives_what_the_folder_gives(image_folder, tmp_path):
    root = tmp_path / "tars"
    root.mkdir()
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            for path, _ in image_folder.samples:
                archive.add(path, arcname=f"{path.parent.name}/{path.name}")
    dataset = open_dataset(root, "train")
    assert dataset.classes == ["a", "b"]
    found = {name.name: target for name, target in dataset.samples}
    assert found == {path.name: target for path, target in image_folder.samples}
    image, target = dataset[3]
    name = dataset.samples[3][0]
    expected = Image.open(tmp_path / "train" / name)
    assert np.array_equal(image, expected)
    assert target == "ab".index(name.parent.name)
    assert not list(root.glob("*.pickle"))


def test_tar_alone_keeps_some_for_validation(image_folder, tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(tmp_path / "train", arcname="")
    training, validation = (open_dataset(tmp_path / "all.tar", split) for split in ("train", "val"))
    assert len(training) + len(validation) == 40
    assert 0 < len(validation) < 12


def test_file_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "x.tar").write_text("no tar")
    with pytest.raises(InputError, match=r"x\.tar: not a readable tar of class folders"):
        open_dataset(tmp_path / "x.tar", "train")


@pytest.fixture
def shards(image_folder, tmp_path):
    """The images in four WebDataset shards with their _info.json."""
    root = tmp_path / "shards"
    root.mkdir()
    splits = {}
    for split in ("train", "validation"):
        names = []
        for shard in range(4):
            names.append(f"{split}-{shard}.tar")
            with tarfile.open(root / names[-1], "w") as archive:
                for path, target in image_folder.samples[10 * shard : 10 * shard + 10]:
                    for name, content in (
                        (f"{path.stem}.png", path.read_bytes()),
                        (f"{path.stem}.cls", b"%d" % target),
                    ):
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
        splits[split] = {"name": split, "filenames": names, "shard_lengths": [10] * 4, "num_samples": 40}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


@pytest.fixture
def streamed(recipe, shards):
    return replace(recipe, data=Data(root=shards, name="wds/", num_classes=2, workers=0))


def test_stream_resumes_in_the_middle_of_an_epoch(streamed):
    whole = drain(TrainLoader(streamed, None, world(), 1), 0, 8)
    assert_same(drain(TrainLoader(streamed, None, world(), 1), 3, 8), whole[3:])
    assert not torch.equal(whole[0].images, whole[5].images)  # the second epoch has another order


def test_stream_reads_every_image_over_an_epoch(streamed):
    plain = replace(
        streamed, augment=Augment(repeats=1, auto_augment=None, color_jitter=0, hflip=0, scale=(1, 1), ratio=(1, 1))
    )
    batches = drain(TrainLoader(plain, None, world(), 1), 0, 5)
    images = torch.cat([batch.images for batch in batches])
    assert len({image.numpy().tobytes() for image in images}) == 40
    assert int(torch.cat([batch.targets for batch in batches]).sum()) == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_evaluated_each_image_once(shards, image_folder, workers):
    loader = eval_loader(open_eval_dataset(str(shards)), create_transform((3, 32, 32)), 7, workers)
    targets = torch.cat([targets for _, targets in loader])
    assert (len(targets), int(targets.sum())) == (40, 20)
    with pytest.raises(InputError, match="wds/: cannot be opened"):
        open_eval_dataset(str(shards), split="nowhere")


def test_hugging_face_dataset_is_read_as_the_folder_is(image_folder, tmp_path, monkeypatch):
    """A local one: images in folders, as `datasets` reads them itself."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    data = Data(name="hfds/train", root=tmp_path / "cache", train_split="train")
    dataset = open_named(data, "train")
    assert dataset.classes == ["a", "b"]
    assert len(dataset) == 40
    image, target = dataset[0]
    assert any(target == t and np.array_equal(image, Image.open(path)) for path, t in image_folder.samples)


@pytest.fixture
def unusual(tmp_path):
    """A folder of class folders with an image to turn, a cut-out and a scan of 16 bits, and what they look like."""
    rng = np.random.default_rng(0)
    root = tmp_path / "unusual"
    for name in "ab":
        (root / name).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(root / "a" / "0.png", exif=exif)
    Image.fromarray(rng.integers(0, 255, (30, 40, 4), dtype=np.uint8)).save(root / "a" / "1.png")
    Image.fromarray(rng.integers(0, 65536, (30, 40), dtype=np.uint16)).save(root / "b" / "2.png")
    return root, [np.asarray(open_image(path)) for path in sorted(root.rglob("*.png"))]


@pytest.mark.parametrize("source", ["shards", "tar", "hfds", "torchvision"])
def test_every_source_shows_images_as_a_file_is_shown(source, unusual, tmp_path, monkeypatch):
    root, expected = unusual
    if source == "shards":
        with tarfile.open(tmp_path / "validation-0.tar", "w") as archive:
            for path in sorted(root.rglob("*.png")):
                archive.add(path, path.name)
                info = tarfile.TarInfo(f"{path.stem}.cls")
                info.size = 1
                archive.addfile(info, io.BytesIO(b"0"))
        data = Data(name="wds/", root=tmp_path, val_split="validation-0.tar|3", num_classes=1)
        found = [image for image, _ in open_stream(data, "val")]
        loaded = [image for images, _ in eval_loader(open_stream(data, "val"), np.asarray, 1) for image in images]
        assert all(np.array_equal(a, b) for a, b in zip(loaded, expected, strict=True))
    elif source == "tar":
        with tarfile.open(tmp_path / "all.tar", "w") as archive:
            archive.add(root, "")
        found = [image for image, _ in open_eval_dataset(tmp_path / "all.tar")]
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        if source == "hfds":
            monkeypatch.chdir(root.parent)
            data = Data(name=f"hfds/{root.name}", root=tmp_path / "cache", val_split="train", num_classes=1)
        else:
            data = Data(name="torch/image_folder", root=root)
        dataset = open_named(data, "val")
        found = [dataset[index][0] for index in range(len(dataset))]
    assert len(found) == 3
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_dataset_with_a_name_that_is_not_there_is_one_line():
    with pytest.raises(InputError, match=r"^torch/cifar10: cannot be opened"):
        open_named(Data(name="torch/cifar10", root=Path("nowhere")), "train")


def test_stream_refuses_repeated_augmentation(streamed):
    with pytest.raises(InputError, match=r"give --augment\.repeats 1"):
        TrainLoader(replace(streamed, augment=Augment()), None, world(), 1)
