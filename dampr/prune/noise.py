"""Random numbers in trial runs of a model: the same in every run, while the generators of the caller keep their
states.
"""

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
    """A block after which all random generators have their old states: those of torch, Python, numpy and of modules.

    Yields the generators that modules of ``model`` keep in attributes.
    """
    own = _generators(model)
    states = [generator.get_state() for generator in own]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
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
    """As :func:`kept`, with all generators seeded alike, so that a model draws the same numbers in every such block."""
    with kept(model) as own:
        random.seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002
        devices = [torch.cuda.default_generators[device] for device in _devices(model)]
        for generator in (torch.random.default_generator, *devices, *own):
            generator.manual_seed(SEED)
        yield


def _generators(model: nn.Module) -> list[torch.Generator]:
    """The random generators that modules keep in attributes; layers of torch have none."""
    own = (module for module in model.modules() if not type(module).__module__.startswith("torch.nn."))
    # ``isinstance`` is ten times as slow, because this class has a metaclass that overrides it
    return [value for module in own for value in vars(module).values() if issubclass(type(value), torch.Generator)]


def _devices(model: nn.Module) -> list[int]:
    """The GPUs that hold parameters of a model."""
    if not torch.cuda.is_initialized():
        return []
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
