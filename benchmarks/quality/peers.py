"""Torch-Pruning's pruners, made to cut to the same multiply-accumulates as dampr: unit by unit, and with dampr's lower
limit for each layer.
"""

from __future__ import annotations

import copy
import functools
import math
import time
import warnings
from typing import Any

import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from dampr.prune.measure import count_macs

from .methods import PEER_SETTINGS, Cut, Setup
from .widths import TOLERANCE, macs

FLOOR = 0.25
"""Of each layer at least this share times the square root of the target stays."""
FINENESS = (100, 157, 223)
"""Numbers of small steps to try until one ends within the tolerance; which layers give the last units depends on it."""
PENALTIES = {"tp_slim": (1e-4, 1e-3, 1e-4), "tp_groupnorm": (5e-4, 5e-4, 1e-4)}  # a strength for each setting

PRUNERS: dict[str, Any] = {
    "tp_random": tp.pruner.BasePruner,
    "tp_taylor": tp.pruner.BasePruner,
    "tp_slim": tp.pruner.BNScalePruner,
    "tp_groupnorm": tp.pruner.GroupNormPruner,
}
IMPORTANCE: dict[str, Any] = {
    "tp_random": tp.importance.RandomImportance,
    "tp_taylor": tp.importance.GroupTaylorImportance,
    "tp_slim": tp.importance.BNScaleImportance,
    "tp_groupnorm": functools.partial(tp.importance.GroupMagnitudeImportance, p=2),
}


class TorchPruning(Cut):
    """One pruner of Torch-Pruning 1.6.1. A pruner with a regulariser trains with it up to the last cut."""

    def __init__(self, setup: Setup, kind: str) -> None:
        self.kind, self.number = kind, PEER_SETTINGS.index(setup.setting)
        super().__init__(setup, 5 if setup.setting == "global in five cuts" else 1)
        self.dense_macs = macs(setup.task, setup.task.widths)
        share = FLOOR * setup.share**0.5
        self.least = {name: max(1, math.ceil(share * width)) for name, width in _widths(self.model).items()}
        self.regularizer = self._pruner(self.model, 1) if kind in PENALTIES else None

    def regularize(self) -> None:
        if self.regularizer is not None:
            self.regularizer.regularize(self.model)

    def cut(self, share: float) -> nn.Module:
        """The model nearest below the target out of a few attempts. Attempts that are thrown away do not count as
        training time.
        """
        if self.kind == "tp_taylor":
            self._gather_gradients()
        goal, found = share * self.dense_macs, []
        for fineness in FINENESS:
            started = time.process_time()
            found.append(self._attempt(goal, fineness))
            if found[-1][0] >= (1 - TOLERANCE) * goal:
                break
            if fineness != FINENESS[-1]:
                self.excluded += time.process_time() - started
        model = max(found, key=lambda attempt: attempt[0])[1]
        last = share == self.setup.share
        self.regularizer = self._pruner(model, 1) if self.kind in PENALTIES and not last else None
        return model

    def _gather_gradients(self) -> None:
        """Sum the gradients of a few batches, which the Taylor scores need."""
        self.model.zero_grad()
        for x, y in self.some_batches():
            F.cross_entropy(self.model(x), y).backward()

    def _attempt(self, goal: float, fineness: int) -> tuple[int, nn.Module]:
        """(cost, model) of a copy that is pruned until its cost is at most ``goal``, and barely below it if
        possible.
        """
        model, left = _copy(self.model), count_macs(self.model, self.setup.task.example())
        barred: set[str] = set()
        cheaper: list[tuple[int, nn.Module]] = []
        before = None
        while before != (left, len(barred)):
            before = left, len(barred)
            model, left = self._descend(model, left, goal, fineness, barred, cheaper)
            if left <= goal:
                return left, model
        if not cheaper:
            raise RuntimeError(
                f"{self.kind}, {self.setup.setting}: {left} multiply-accumulates are left, expected {goal:.0f}"
            )
        return max(cheaper, key=lambda attempt: attempt[0])

    def _descend(
        self,
        model: nn.Module,
        left: int,
        goal: float,
        fineness: int,
        barred: set[str],
        cheaper: list[tuple[int, nn.Module]],
    ) -> tuple[nn.Module, int]:
        """Prune group by group, in small steps, down to the goal. A group whose removal would go too far below the goal
        is undone and added to ``barred``, and the model before it is returned.

        A group at its lower limit is left alone. (Torch-Pruning's own option for this, max_pruning_ratio, ends global
        pruning too early: groups at their limit are taken out of the ranking, but not out of the number that has to
        stay.)
        """
        pruner, names = self._pruner(model, fineness), {module: name for name, module in model.named_modules()}
        for _ in range(fineness):
            for group in pruner.step(interactive=True):
                name = names[group[0].dep.target.module]
                if name in barred or _widths(model)[name] - len(group[0].idxs) < self.least[name]:
                    continue
                saved = _copy(model) if left < 3 * goal else model
                group.prune()
                now = count_macs(model, self.setup.task.example())
                if now < (1 - TOLERANCE) * goal and saved is not model:
                    barred.add(name)
                    cheaper.append((now, model))
                    return saved, left
                left = now
                if left <= goal:
                    return model, left
        return model, left

    def _pruner(self, model: nn.Module, steps: int) -> Any:
        """A new pruner for ``model`` that would remove everything in ``steps`` steps."""
        options: dict[str, Any] = {"reg": PENALTIES[self.kind][self.number]} if self.kind in PENALTIES else {}
        # Each head keeps equally many channels.
        heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PRUNERS[self.kind](
                model,
                self.setup.task.example(2),
                importance=IMPORTANCE[self.kind](),
                global_pruning=self.setup.setting != "layer by layer",
                pruning_ratio=1.0,
                iterative_steps=steps,
                ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear)][-1:],
                in_channel_groups=dict(heads),
                out_channel_groups=dict(heads),
                **options,
            )


def _widths(model: nn.Module) -> dict[str, int]:
    """The output width of each convolution and linear layer, by name."""
    return {
        name: layer.weight.shape[0] for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    }


def _copy(model: nn.Module) -> nn.Module:
    """A copy of the model with its gradients, which a deep copy leaves out."""
    copied = copy.deepcopy(model)
    for mine, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    return copied
