"""The tasks: each network with its data, and the one optimizer recipe that all methods share.

The steps are such that a run of the dense network takes one to five minutes on one core. The learning rate is the one
out of 1e-3, 2e-3 and 5e-3 with which the dense network validates best (``python -m benchmarks.quality tune``), and so
is, of the transformers, its warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import networks
from .data import Augment, crop_and_flip


@dataclass(frozen=True)
class Task:
    """A network, its data, and how the network is trained at any size."""

    name: str
    title: str
    data: str
    shape: tuple[int, ...]  # of one example
    build: Callable[[Sequence[int]], nn.Module]
    widths: tuple[int, ...]
    shares: tuple[float, ...]  # of the multiply-accumulates that are left
    steps: int
    lr: float
    lr_warmup: int = 0  # the number of first steps in which the learning rate rises
    batch: int = 64
    weight_decay: float = 0.0  # decoupled (AdamW) where it is not zero
    augment: Augment | None = None
    quanta: tuple[int, ...] = ()  # what each width is a multiple of; empty: 1 each
    torch_pruning: bool = True  # whether Torch-Pruning can prune it

    @property
    def multiples(self) -> tuple[int, ...]:
        """The number that each width has to be a multiple of."""
        return self.quanta or (1,) * len(self.widths)

    def example(self, rows: int = 1) -> Tensor:
        """Inputs to trace with and to count on; they are fixed and not part of the data."""
        return torch.randn(rows, *self.shape, generator=torch.Generator().manual_seed(0))


TRANSFORMER = Task(
    "transformer",
    "4-layer transformer on 4 x 4 patches of Fashion-MNIST",
    "fashion",
    (1, 28, 28),
    networks.PatchTransformer,
    (64, 256, 256, 256, 256),
    (0.5,),
    steps=1300,
    lr=2e-3,
    weight_decay=0.01,
    quanta=(networks.PatchTransformer.heads, 1, 1, 1, 1),
)
TASKS = {
    task.name: task
    for task in (
        Task(
            "lenet5",
            "LeNet-5 on MNIST",
            "mnist",
            (1, 28, 28),
            networks.lenet5,
            (20, 50, 500),
            (0.15, 0.05, 0.02),
            steps=5000,
            lr=2e-3,
        ),
        Task(
            "vgg",
            "VGG-like with BatchNorm on CIFAR-10 at 16 x 16 pixels",
            "cifar10",
            (3, 16, 16),
            networks.vgg,
            (32, 32, 64, 64, 128, 128),
            (0.5, 0.25, 0.1),
            steps=2600,
            lr=2e-3,
            augment=crop_and_flip,
        ),
        Task(
            "resnet20",
            "ResNet-20 on CIFAR-10 at 16 x 16 pixels",
            "cifar10",
            (3, 16, 16),
            networks.ResNet,
            (16, 32, 64) + (16,) * 3 + (32,) * 3 + (64,) * 3,
            (0.5, 0.25, 0.1),
            steps=1700,
            lr=2e-3,
            augment=crop_and_flip,
        ),
        Task(
            "gru",
            "two GRUs on the rows of Fashion-MNIST",
            "fashion",
            (1, 28, 28),
            networks.RowGRU,
            (96, 96),
            (0.5, 0.25),
            steps=6000,
            lr=5e-3,
            torch_pruning=False,  # its pruners know nn.LSTM, and no nn.GRU
        ),
        replace(TRANSFORMER, name="transformer_warm", lr_warmup=100),
        replace(
            TRANSFORMER,
            name="transformer_warm_long",
            title="the same transformer, three times the steps",
            steps=3900,
            lr_warmup=300,
        ),
        replace(TRANSFORMER, title="the same transformer, without a warm-up of the learning rate"),
        replace(
            TRANSFORMER,
            name="transformer_long",
            title="the same transformer, without a warm-up, three times the steps",
            steps=3900,
        ),
    )
}
