"""Images of five channels, in class folders, whose classes differ in the last channel alone."""

from pathlib import Path

import numpy as np
import tifffile
from safetensors import safe_open

from shvit.weights.run_info import RUN_KEY

CHANS = 5
CLASSES = ("dry", "moist", "wet")


def draw_bands(root: Path, kind: str = "uint16", suffix: str = ".tif", counts: tuple[int, int] = (16, 6)) -> Path:
    """Write train/ and valid/, with so many images of each class; uint16 values of 12 bits."""
    rng = np.random.default_rng(0)
    for split, count in zip(("train", "valid"), counts, strict=True):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                bands = rng.integers(0, 1500, (CHANS, 40, 44))
                bands[-1] += 1000 * label
                array = (bands / 4095).astype(kind) if kind == "float32" else bands.astype(kind)
                write(folder / f"{index}{suffix}", array)
    return root


def write(path: Path, array: np.ndarray) -> None:
    if path.suffix == ".npy":
        np.save(path, array.transpose(1, 2, 0))
    else:
        tifffile.imwrite(path, array, photometric="minisblack", planarconfig="separate", compression="zlib")


def run_info(path: Path) -> str:
    """What a run says of itself in its weights."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()[RUN_KEY]
