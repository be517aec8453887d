"""Gates in models with sharded parameters: whole on every rank, in full precision, with their gradients reduced
together.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize
from torch.utils.weak import WeakTensorKeyDictionary

from dampr.gates import Gate, gate_generator, ranks
from dampr.gates.base import GateModule
from dampr.gates.draws import drawing_gates, share_generator
from dampr.nn import (
    GatedActivation,
    GatedEmbedding,
    GatedLayer,
    GatedLayerNorm,
    GatedLinear,
    GatedParameter,
    GatedResidual,
)
from dampr.nn.parameter import off
from dampr.prune.summary import gated_layers
from dampr.prune.wrapped import check_bare, gathered

__all__ = ["gathered", "parallelize_module", "replicate_gates"]

_ON_SHARDS = (GatedLinear, GatedEmbedding, GatedLayerNorm, GatedActivation, GatedResidual, GatedParameter)


def replicate_gates(model: nn.Module, *, group: Any = None) -> set[Parameter]:
    """The parameters of all gates of ``model``, for ``fully_shard(..., ignored_params=)``; their gradients are averaged
    over the ranks.

    Gates are a few numbers per layer. Sharded, they would cost a message each, and in bfloat16 they would not learn.
    So they stay whole and in float32 on every rank. At the end of each backward, one all-reduce averages the
    gradients of all of them, however many layers there are. This includes gates that several sharded blocks share,
    and also happens while ``set_requires_gradient_sync(False)`` accumulates other gradients. Every rank starts with
    the gates of the first rank and draws the same, from a generator on which the ranks agree unless
    :func:`dampr.gate_generator` has been called.

    Args:
        model: converted, not yet sharded.
        group: the process group of the ranks that have parts of the batch; None: all ranks.

    Returns: a set of parameters, to be given to each call of ``fully_shard``.

    Raises: TypeError for a model that is wrapped or sharded; ValueError if it has no gates, or if there is no
    process group.

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
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    ranks.make_alike(gates, group)
    reducer = _Reducer(gates, group)
    for gate in gates:
        gate._reducer = reducer
    reducer.attach()
    return set(reducer.parameters())


def parallelize_module(
    model: nn.Module, device_mesh: Any = None, parallelize_plan: Any = None, **how: Any
) -> nn.Module:
    """``torch.distributed.tensor.parallel.parallelize_module`` for a model with gates, which stay whole on every rank.

    It supports ``ColwiseParallel``, ``RowwiseParallel`` and ``SequenceParallel`` for gated linear layers (also the last
    projection of an attention with gates on its heads), embeddings and LayerNorms, and for layers with gates on their
    parameters. All ranks draw the same gates, and each uses the part that belongs to its shard; with one draw per batch
    this is multiplied into the weight, so the forward sends no more than a dense layer does. Every rank starts with the
    gates of the first rank of the mesh, and the gradient of a gate is whole on each. Together with data parallelism,
    call :func:`replicate_gates` with the group of that before. :func:`gathered` and :func:`dampr.compact` make a whole
    model again.

    Args:
        model: converted, not yet sharded.
        device_mesh, parallelize_plan, how: as torch's function takes them.

    Returns: ``model``.

    Raises: TypeError for a gated layer of another kind in the plan, or for a model that is wrapped; what torch's
    function raises.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import parallelize_module as shard

    check_bare(model, "gates are left out of what is sharded", sharded=True)
    layers = gated_layers(model)
    patterns = list(parallelize_plan) if isinstance(parallelize_plan, dict) else [""]
    for name, layer in layers.items():
        if isinstance(layer, _ON_SHARDS):
            continue
        parts: Any = layer
        held = [inner for inner, part in parts.named_modules() if not isinstance(part, GateModule)]
        own = [".".join(filter(None, (name, inner))) for inner in held]
        if any(fnmatchcase(one, pattern) for one in own for pattern in patterns):
            raise TypeError(
                f"{name}: {type(layer).__name__} does not compute on shards; expected it left out of the plan"
            )
    share_generator(model)
    with _aside(model, list(layers.values())), off(model):
        shard(model, device_mesh, parallelize_plan, **how)
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    for mesh in dict.fromkeys(p.device_mesh for p in model.parameters() if isinstance(p, DTensor)):
        ranks.make_alike(gates, mesh.get_group())
    return model


@contextmanager
def _aside(model: nn.Module, layers: list[GatedLayer]) -> Iterator[None]:
    """A block in which gates, their indices and parametrizations are taken out of the model, so that torch does not
    shard them.
    """
    taken: list[tuple[nn.Module, str, str, Any]] = []
    kinds: list[tuple[nn.Module, type, Any]] = []
    for module in list(model.modules()):
        if parametrize.is_parametrized(module) and all(isinstance(p, GatedParameter) for p in _gates_on(module)):
            parts: Any = module._modules.pop("parametrizations")
            kinds.append((module, type(module), parts))
            module.__class__ = type(module).__bases__[0]
            for name, part in parts.named_children():
                module.register_parameter(name, part._parameters.pop("original"))
    for layer in layers:
        layer.sharded = True
        owner: Any = layer
        for kind, name in (("_modules", "gate"), ("_buffers", "index")):
            if getattr(owner, kind).get(name) is not None:
                taken.append((owner, kind, name, getattr(owner, kind).pop(name)))
    try:
        yield
    finally:
        for owner, kind, name, value in taken:
            getattr(owner, kind)[name] = value
        for module, former, parts in kinds:
            for name, part in parts.named_children():
                part.register_parameter("original", module._parameters.pop(name))
            module.__class__ = former
            module._modules["parametrizations"] = parts


def _gates_on(module: nn.Module) -> list[nn.Module]:
    """The modules that compute the parameters of a parametrized module."""
    parts: Any = module.parametrizations
    return [step for part in parts.values() for step in part]


_hooks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> (its reducer, the handle of the hook on it)


class _Reducer:
    """A hook on the gates' parameters that averages all their gradients over the ranks at the end of a backward.

    All gradients are sent each time, in the same order; a rank on which a gate had no part sends zeros for it.
    """

    def __init__(self, gates: list[Gate], group: Any) -> None:
        self.gates, self.group = gates, group
        self.queued: set[int] = set()  # numbers of the backwards at whose end a reduction is queued
        self.materialized = False  # whether gates have come from the meta device since they were made alike

    def parameters(self) -> list[Parameter]:
        """The parameters of all gates, each once."""
        return list(dict.fromkeys(p for gate in self.gates for p in gate.parameters()))

    def attach(self) -> None:
        """Register the hook on the parameters that have none yet: ``to_empty`` and ``load_state_dict(assign=True)``
        make new ones.
        """
        for p in self.parameters():
            owner, former = _hooks.get(p, (None, None))
            if owner is not None and owner() is self:
                continue
            if former is not None:
                former.remove()
            learns = p.requires_grad  # a gate may be frozen only for now
            hook = p.requires_grad_().register_post_accumulate_grad_hook(self)
            p.requires_grad_(learns)
            _hooks[p] = weakref.ref(self), hook

    def __call__(self, p: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task not in self.queued:
            self.queued.add(task)
            engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            engine.queue_callback(partial(self.reduce, task))

    @torch.no_grad()
    def reduce(self, task: int) -> None:
        """Average the gradients of all gates over the ranks; ``task`` is the number of the backward."""
        self.queued.discard(task)
        if self.materialized:
            ranks.make_alike(self.gates, self.group)
            self.materialized = False
        gates = [p for p in self.parameters() if p.requires_grad]
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in gates])
        distributed.all_reduce(flat, group=self.group)
        flat /= distributed.get_world_size(self.group)
        for p, mean in zip(gates, flat.split([p.numel() for p in gates]), strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(mean.view(p.shape))
