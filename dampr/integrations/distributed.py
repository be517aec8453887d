"""Gates beside sharded parameters: whole on every rank, in full precision, their gradients reduced once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import Parameter

from dampr.gates import Gate, gate_generator
from dampr.gates.draws import drawing_gates, share_generator
from dampr.prune.summary import gated_layers
from dampr.prune.wrapped import check_bare, gathered

__all__ = ["gathered", "replicate_gates"]


def replicate_gates(model: nn.Module, *, group: Any = None) -> set[Parameter]:
    """The parameters of all gates of ``model``, for ``fully_shard(..., ignored_params=)``; their gradients are averaged over the ranks.

    Gates are a few numbers a layer: sharded they would cost a message each, and in bf16 they would not learn. So they stay whole and in
    float32 on each rank. At the end of each backward, their gradients go through one all-reduce together, whatever the number of layers
    (also of a gate that several sharded blocks share, and also while ``set_requires_gradient_sync(False)`` accumulates the others). Every
    rank draws the same gates, from a generator that they agree on if :func:`dampr.gate_generator` has not been called.

    Args:
        model: converted, not yet sharded.
        group: the process group of the ranks that have parts of the batch; None: all ranks.

    Returns: a set of parameters, to be given to each call of ``fully_shard``.

    Raises: TypeError for a model that is wrapped or sharded; ValueError where it has no gates, or where there is no process group.

    >>> from torch.distributed.fsdp import fully_shard
    >>> def shard(model):
    ...     gates = replicate_gates(model)
    ...     for block in model.children():
    ...         fully_shard(block, ignored_params=gates)
    ...     return fully_shard(model, ignored_params=gates)
    """
    check_bare(model, "gates are left out of what is sharded")
    if not gated_layers(model):
        raise ValueError(f"model={type(model).__name__}: expected gated layers in it (dampr.convert puts them there)")
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError("group=None: expected a process group (torch.distributed.init_process_group)")
    if group is not None and any(gate._stream is None for gate in drawing_gates(model)):
        gate_generator(model, None, group=group)
    share_generator(model)
    ordered = [p for module in model.modules() if isinstance(module, Gate) for p in module.parameters()]
    gates = dict.fromkeys(ordered)
    reducer = _Reducer(list(gates), group)
    for p in gates:
        if p in _reduced:
            _reduced.pop(p).remove()
        _reduced[p] = p.register_post_accumulate_grad_hook(reducer)
    return set(gates)


_reduced: weakref.WeakKeyDictionary[torch.Tensor, Any] = weakref.WeakKeyDictionary()


class _Reducer:
    """Called when a parameter has its gradient; averages the gradients of all of them when the backward is through.

    All go each time, in one order, so that ranks on which a gate had no part send zeros for it.
    """

    def __init__(self, gates: list[Parameter], group: Any) -> None:
        self.gates, self.group = gates, group
        self.queued = False

    def __call__(self, p: torch.Tensor) -> None:
        if not self.queued:
            self.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self.reduce)  # type: ignore[attr-defined]

    @torch.no_grad()
    def reduce(self) -> None:
        self.queued = False
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.gates])
        distributed.all_reduce(flat, group=self.group)
        flat /= distributed.get_world_size(self.group)
        for p, mean in zip(self.gates, flat.split([p.numel() for p in self.gates]), strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(mean.view(p.shape))
