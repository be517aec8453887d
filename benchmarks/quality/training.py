"""The one training loop: all methods train in it, with the same optimizer, schedule and batches."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

from .tasks import Task

Batches = Iterator[tuple[Tensor, Tensor]]


class Method:
    """What a way to prune does in the training loop. The base class does nothing: the network trains to the end as it
    was built.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.excluded = 0.0  # CPU seconds that are no part of the training, such as attempts that were thrown away

    def penalty(self) -> Tensor | float:
        """A term that is added to the loss."""
        return 0.0

    def regularize(self) -> None:
        """Called between backward and the optimizer's step; may change gradients."""

    def step(self, done: int, optimizer: optim.Optimizer) -> optim.Optimizer:
        """Called after the optimizer's step number ``done``; may replace the model. Returns the optimizer to go on
        with.
        """
        return optimizer

    def finish(self) -> nn.Module:
        """The plain network that is tested."""
        return self.model


def make_optimizer(task: Task, model: nn.Module) -> optim.Optimizer:
    """Adam, or AdamW if the task has weight decay."""
    if task.weight_decay:
        return optim.AdamW(model.parameters(), lr=task.lr, weight_decay=task.weight_decay)
    return optim.Adam(model.parameters(), lr=task.lr)


def learning_rate(task: Task, done: int, steps: int) -> float:
    """The learning rate after ``done`` steps: half a cosine from the task's rate to zero over the whole run, for all
    methods, which is multiplied by a line from 0 to 1 in the steps of the warm-up.
    """
    rising = min(1.0, (done + 1) / (task.lr_warmup + 1))
    return task.lr * rising * 0.5 * (1 + math.cos(math.pi * done / steps))


def train(method: Method, task: Task, batches: Batches, steps: int) -> tuple[nn.Module, float]:
    """(the finished network, the CPU seconds that training took)."""
    started = time.process_time()
    optimizer = make_optimizer(task, method.model)
    for done in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(task, done, steps)
        x, y = next(batches)
        loss = F.cross_entropy(method.model(x), y) + method.penalty()
        optimizer.zero_grad()
        loss.backward()
        method.regularize()
        optimizer.step()
        optimizer = method.step(done + 1, optimizer)
    model = method.finish()
    return model, time.process_time() - started - method.excluded


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of x that the model, in evaluation mode, classifies as y."""
    model.eval()
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    return right / len(y)
