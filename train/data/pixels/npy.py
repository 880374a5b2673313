"""Arrays of NumPy's .npy files, whose header is checked before anything is allocated; pickled objects are not read."""

import math
import os
from typing import BinaryIO

import numpy as np

from shvit.errors import InputError

from ..images import MAX_BYTES

MAGIC = np.lib.format.MAGIC_PREFIX
DTYPES = ("uint8", "uint16", "float32")


def check_dtype(dtype: np.dtype, name: str) -> None:
    """Raise InputError for values of another type than a model's pixels may have, in either byte order."""
    if dtype.newbyteorder("=") not in tuple(map(np.dtype, DTYPES)):
        raise InputError(f"{name}: holds {str(dtype)[:80]}, and pixels are {', '.join(DTYPES)}; convert it, such as by "
                         "array.astype('float32')")  # fmt: skip


def read_npy(file: BinaryIO, name: str) -> np.ndarray:
    """Read an array of one of the `DTYPES`.

    Args:
        name: name in messages.

    Raises:
        InputError: it has other values, or other bytes than its header announces, or more than are read here.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise InputError(f"{name}: an .npy file of version {version[0]}.{version[1]}, which only arrays of structures "
                         "need; save an array of numbers")  # fmt: skip
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    check_dtype(dtype, name)
    expected, begin = math.prod(shape) * dtype.itemsize, file.tell()
    if min(shape, default=1) < 1 or expected > MAX_BYTES:
        raise InputError(f"{name}: announces the shape {str(shape)[:80]} of {dtype}, and images have 1 to "
                         f"{MAX_BYTES:,} bytes; remove or replace it")  # fmt: skip
    if (found := file.seek(0, os.SEEK_END) - begin) != expected:
        raise InputError(f"{name}: holds {found:,} bytes of pixels, and its header announces {expected:,}; replace it")
    file.seek(0)
    return np.load(file, allow_pickle=False)
