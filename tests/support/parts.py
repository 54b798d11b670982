"""Parts for tests: rows of every kind of bits, and files altered on purpose."""

import struct
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featstore.files.part import write_part

DTYPES = (torch.float16, torch.float32, torch.bfloat16)

SHAPES = ((), (5,), (3, 2, 2))

FACTS: dict[str, Any] = {"spec": {"mean": [0.485, 0.1], "cut": "layer4"}, "failed": [], "who": "Zoë", "seed": None}


def random_bits(num_rows: int, shape: tuple[int, ...] = (5,), dtype: torch.dtype = torch.float16) -> Tensor:
    """Features with every kind of value: subnormals, both zeros, infinities, NaNs."""
    num_bytes = num_rows * int(np.prod(shape)) * dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(num_rows, *shape)


def some_digests(num_rows: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (num_rows, 32), np.uint8)


def some_decoders(num_rows: int) -> NDArray[np.uint8]:
    return np.arange(num_rows).astype(np.uint8)


def write(path: Path, features: Tensor | list[Tensor]) -> None:
    num_rows = len(features) if isinstance(features, Tensor) else sum(map(len, features))
    write_part(path, features=features, digests=some_digests(num_rows), decoders=some_decoders(num_rows), facts=FACTS)


def bits(features: Tensor) -> bytes:
    return features.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def extent(path: Path, name: str) -> range:
    with h5py.File(path) as file:
        start = file[name].id.get_offset()
        return range(start, start + file[name].id.get_storage_size())


def flip_bit(path: Path, byte: int) -> None:
    """Change one bit of the file; a second call changes it back."""
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 1 << byte % 8]))


def reseal(path: Path, start: int, data: bytes) -> None:
    """Put `data` into the user block and correct its two checksums as docs/format.md defines them."""
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    offset, num_bytes = struct.unpack_from("<QQ", content, 56)
    content[72:80] = bytes(8)
    content[76:80] = struct.pack("<I", zlib.crc32(content[:4096]))
    content[72:76] = struct.pack("<I", zlib.crc32(content[:offset] + content[offset + num_bytes :]))
    path.write_bytes(content)
