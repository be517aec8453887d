"""Random numbers of models that are run to be looked at: the same in every run, and the caller's stay as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

SEED = 0


@contextmanager
def kept(model: nn.Module) -> Iterator[list[torch.Generator]]:
    """Whatever is drawn in this block, afterwards all generators are as they were: those of torch, Python and numpy,
    and those that modules of ``model`` keep, which it gives.
    """
    own = _generators(model)
    states, python, numpy = [generator.get_state() for generator in own], random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(_devices(model)):
            yield own
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for generator, state in zip(own, states, strict=True):
            generator.set_state(state)


@contextmanager
def same(model: nn.Module) -> Iterator[None]:
    """:func:`kept`, and what a model draws is the same in every such block, whatever was drawn in between."""
    with kept(model) as own:
        random.seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002
        devices = [torch.cuda.default_generators[device] for device in _devices(model)]
        for generator in (torch.random.default_generator, *devices, *own):
            generator.manual_seed(SEED)
        yield


def _generators(model: nn.Module) -> list[torch.Generator]:
    """Those that modules keep."""
    values = (value for module in model.modules() for value in vars(module).values())
    return [value for value in values if isinstance(value, torch.Generator)]


def _devices(model: nn.Module) -> list[int]:
    """The GPUs that hold parameters of a model."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
