"""The ways to prune that are compared, by name, and why one is not available for a task."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn, optim
from torch.nn import functional as F

import dampr

from .tasks import Task
from .training import Batches, Method, make_optimizer
from .widths import cut_by_l1, narrow_widths

CUT_AT = 0.4
"""The share of the steps before the last cut of methods that cut at once; all of them are trained on afterwards."""
SCORING_BATCHES = 10


class Setup(NamedTuple):
    """Everything that a method is told about its run."""

    task: Task
    share: float
    steps: int
    batches: Batches
    setting: str


class Cut(Method):
    """Train the dense network, cut it, and go on with a new optimizer.

    With several cuts, these are evenly spaced from half of the time of the last cut up to it, with goals that are
    evenly spaced in the logarithm of the cost.
    """

    def __init__(self, setup: Setup, cuts: int = 1) -> None:
        super().__init__(setup.task.build(setup.task.widths))
        self.setup = setup
        last = CUT_AT * setup.steps
        self.goals = {round(last * (1 + n / cuts) / 2): setup.share ** (n / cuts) for n in range(1, cuts + 1)}

    def step(self, done: int, optimizer: optim.Optimizer) -> optim.Optimizer:
        if done not in self.goals:
            return optimizer
        self.model = self.cut(self.goals[done]).train()
        return make_optimizer(self.setup.task, self.model)

    def cut(self, share: float) -> nn.Module:
        """The model that is left at this share of the dense network's cost."""
        raise NotImplementedError

    def some_batches(self) -> list[tuple[Tensor, Tensor]]:
        """The next training batches, on which scores are computed."""
        return list(itertools.islice(self.setup.batches, SCORING_BATCHES))


class L1(Cut):
    """Cuts the filters and units of least L1 norm, down to the widths of the narrow network (Li et al. 2017, one
    shot).
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.widths = narrow_widths(setup.task, setup.share)

    def cut(self, share: float) -> nn.Module:
        return cut_by_l1(self.model, self.setup.task, self.widths)


class PruneOnce(Cut):
    """dampr's one-shot pruning by first-order Taylor importance on the exact cost."""

    def cut(self, share: float) -> nn.Module:
        small: nn.Module = _dampr("prune_once")(self.model, self.some_batches(), F.cross_entropy, macs=share, rounds=1)
        return small


class Planned(Method):
    """dampr's Plan with its defaults: warm-up, ramp, compaction and fine-tuning in one run with one optimizer."""

    def __init__(self, setup: Setup, **options: Any) -> None:
        super().__init__(setup.task.build(setup.task.widths))
        self.plan = _dampr("Plan")(self.model, setup.task.example(8), macs=setup.share, steps=setup.steps, **options)
        self.model = self.plan.model

    def penalty(self) -> Tensor | float:
        penalty: Tensor | float = self.plan.penalty()
        return penalty

    def step(self, done: int, optimizer: optim.Optimizer) -> optim.Optimizer:
        self.plan.step(optimizer)
        self.model = self.plan.model
        return optimizer

    def finish(self) -> nn.Module:
        small: nn.Module = self.plan.finish()
        return small


def _dense(setup: Setup) -> Method:
    return Method(setup.task.build(setup.task.widths))


def _narrow(setup: Setup) -> Method:
    return Method(setup.task.build(narrow_widths(setup.task, setup.share)))


def _family(gate: str) -> Callable[[Setup], Method]:
    """A plan with learned gates of a family."""
    return lambda setup: Planned(setup, gate=gate, score="learned")


def _peer(kind: str) -> Callable[[Setup], Method]:
    """A pruner of Torch-Pruning, imported only when it is used."""

    def build(setup: Setup) -> Method:
        from . import peers

        return peers.TorchPruning(setup, kind)

    return build


FAMILIES = ("hard_concrete", "dep_l0", "dam", "diffprune", "diffmask")
PEERS = ("tp_random", "tp_taylor", "tp_slim", "tp_groupnorm")
PEER_SETTINGS = ("global", "global in five cuts", "layer by layer")
DEFAULT = "default"
METHODS: dict[str, Callable[[Setup], Method]] = {
    "dense": _dense,
    "narrow": _narrow,
    "l1": L1,
    **{name: _peer(name) for name in PEERS},
    "prune_once": PruneOnce,
    "plan": Planned,
    **{f"plan_{family}": _family(family) for family in FAMILIES},
}
TITLES = {
    "dense": "dense, not pruned",
    "narrow": "narrow from scratch",
    "l1": "L1 norm, one shot",
    "tp_random": "Torch-Pruning, random",
    "tp_taylor": "Torch-Pruning, Taylor",
    "tp_slim": "Torch-Pruning, BatchNorm scales",
    "tp_groupnorm": "Torch-Pruning, GroupNorm",
    "prune_once": "dampr.prune_once",
    "plan": "dampr.Plan",
    **{f"plan_{family}": f'dampr.Plan, gate="{family}", learned' for family in FAMILIES},
}


def settings(method: str) -> tuple[str, ...]:
    """The settings that a method is run with; of several, validation chooses one."""
    return PEER_SETTINGS if method in PEERS else (DEFAULT,)


def why_not(method: str, task: Task) -> str | None:
    """Why a method cannot run on a task, or None if it can."""
    if method in PEERS and not task.torch_pruning:
        return "Torch-Pruning 1.6.1 does not prune this network"
    if method == "tp_slim" and not any(isinstance(m, nn.BatchNorm2d) for m in task.build(task.widths).modules()):
        return "the network has no BatchNorm"
    needed = "Plan" if method.startswith("plan") else "prune_once"
    if method in ("prune_once", "plan", *(f"plan_{family}" for family in FAMILIES)) and _find(needed) is None:
        return f"this dampr has no {needed}"
    return None


def _find(name: str) -> Any:
    """The function of this name in dampr, or None: older versions that are compared may lack it."""
    return getattr(dampr, name, None) or getattr(dampr.prune, name, None)


def _dampr(name: str) -> Any:
    """The function of this name in dampr. Raises AttributeError if there is none."""
    found = _find(name)
    if found is None:
        raise AttributeError(f"dampr.{name}: expected a dampr that has it")
    return found
