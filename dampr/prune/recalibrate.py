"""Takes the statistics of batch norms anew after layers in front of them have changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dampr.gates.ranks import over_ranks

from . import inputs, noise
from .modules import of_kind
from .wrapped import sees_through


@sees_through
@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Set the running statistics of every BatchNorm in ``model`` to the mean over ``batches``. Returns the number of
    batches.

    Everything else is in evaluation mode, so that dropout does not change what the norms see. Without a batch, or
    without such norms, nothing changes.

    Args:
        model: any model.
        batches: inputs of the model: tensors, tuples of positional or dicts of keyword arguments, or pairs of the two.
    """
    norms = [m for m in of_kind(model, nn.modules.batchnorm._BatchNorm) if m.running_mean is not None]
    if not norms:
        return 0
    momenta, count = [norm.momentum for norm in norms], 0
    with inputs.evaluating(model), noise.kept(model), inputs.unsynced(model):
        try:
            for batch in batches:
                if not count:
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.momentum = None  # the plain mean over all batches
                        norm.train()
                _call(model, batch)
                count += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return count


@torch.no_grad()
def share_statistics(model: nn.Module) -> None:
    """Let every rank have the mean of the running statistics that the ranks took on batches of their own."""
    for norm in of_kind(model, nn.modules.batchnorm._BatchNorm):
        for t in (norm.running_mean, norm.running_var):
            if t is not None:
                t.copy_(over_ranks(t))


def _call(model: nn.Module, batch: Any) -> None:
    """Call the model with a batch; a pair of a tuple and a dict holds positional and keyword arguments."""
    pair = isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict)
    if pair:
        model(*batch[0], **batch[1])
    else:
        inputs.call(model, batch)
