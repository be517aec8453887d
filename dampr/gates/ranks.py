"""Several processes of torch.distributed that train one model.

The functions here give all ranks one seed, say which part of the batch a rank holds, and raise where a
DistributedDataParallel was made before the model changed.
"""

from __future__ import annotations

import sys
import weakref
import zlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

PATIENCE = timedelta(seconds=120)  # for rank 0 to publish the seed
_KEY = "dampr/seed"
_agreed: tuple[Any, int] | None = None  # (store of the process group, seed that is in it)
_changes = ""  # one letter for each change of a model; dynamo guards on the string and then traces again
_resized: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose parameters have changed size
_checked: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Any], bool | None]] = weakref.WeakKeyDictionary()


def several() -> bool:
    """Whether this process is one of several in torch.distributed."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


several._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a process group is not traced


def part_of(ranks: Sequence[int] | None) -> int:
    """The index, from 0, of the part of the batch that this process holds.

    It is 0 in a single process, the rank of the process if ``ranks`` is None, and else the position of that rank in
    ``ranks``.

    Raises: RuntimeError if ``ranks`` does not contain the rank of this process.
    """
    if not several():
        return 0
    rank = distributed.get_rank()
    if ranks is None:
        return rank
    if rank not in ranks:
        raise RuntimeError(
            f"rank {rank} draws gates per sample, which dampr.gate_generator gave to ranks {list(ranks)}; call it on "
            "each rank"
        )
    return ranks.index(rank)


part_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def agreed_seed() -> int:
    """A seed that is the same on all ranks: the seed that rank 0 had given to ``torch.manual_seed`` when it first
    called this function.

    Rank 0 publishes the seed once in the store of the process group, so no rank has to wait for a collective. A
    store may outlive its process group; the seed then holds for the next process group too.

    Raises: RuntimeError if rank 0 has not published the seed within two minutes.
    """
    global _agreed
    store = distributed.distributed_c10d._get_default_store()
    if _agreed is None or _agreed[0] is not store:
        if distributed.get_rank() == 0:
            store.compare_set(_KEY, "", str(torch.initial_seed() % 2**63))  # other ranks may have read what is there
        try:
            store.wait([_KEY], PATIENCE)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {distributed.get_rank()} has waited {PATIENCE.seconds} s for rank 0 to publish the seed of the "
                "gates; "
                "expected every rank to convert its model, or dampr.gate_generator(model, seed=...) with the same "
                "seed on each"
            ) from error
        _agreed = store, int(store.get(_KEY))
    return _agreed[1]


def seed_of(gates: Sequence[Any]) -> int:
    """A seed for ``gates``, the same on all ranks: :func:`agreed_seed` mixed with the types and sizes of the gates.

    Two different models in one process therefore do not draw the same noise.
    """
    return agreed_seed() ^ zlib.crc32(repr([(type(gate).__name__, gate.num_gates) for gate in gates]).encode())


def over_ranks(t: Tensor) -> Tensor:
    """The mean of ``t`` over all processes of torch.distributed; ``t`` itself in a single process.

    Data parallelism takes the same mean of gradients.
    """
    if not several():
        return t
    total = t.contiguous().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def check_alike(model: nn.Module, device: Any) -> None:
    """Raise ValueError on every rank unless the models of all ranks have the same names and shapes of parameters.

    Means over ranks need this.
    """
    if several():
        own = zlib.crc32(repr([(name, tuple(t.shape)) for name, t in model.state_dict().items()]).encode())
        least, most = (torch.tensor(sign * own, device=device) for sign in (1, -1))
        distributed.all_reduce(least, distributed.ReduceOp.MIN)
        distributed.all_reduce(most, distributed.ReduceOp.MIN)
        if int(least) != -int(most):
            raise ValueError(
                f"model on rank {distributed.get_rank()}: its parameters have other names or sizes than those of other "
                "ranks, expected the same model on all; stages of a pipeline are pruned with dampr.penalty, one by one"
            )


def make_alike(gates: Sequence[Any], group: Any = None) -> None:
    """Copy the values and the next seeds of ``gates`` from the first rank of ``group`` to its other ranks.

    ``group``: a process group; None means all ranks. Gates that start at random differ between ranks whose random
    states differ, and wrappers do not send the gates that sharding leaves out or that a budget owns. Gates on the meta
    device have no values, so they are skipped.
    """
    if not several() or distributed.get_world_size(group) == 1:
        return
    found = [t for gate in gates for t in (*gate.state_dict().values(), *_counters(gate))]
    sent = [None if t.is_meta else t.detach().cpu() for t in found]
    if sent:
        first = 0 if group is None else distributed.get_global_rank(group, 0)
        distributed.broadcast_object_list(sent, src=first, group=group)
    with torch.no_grad():
        for t, value in zip(found, sent, strict=True):
            if value is not None and not t.is_meta:
                t.copy_(value)


def _counters(gate: Any) -> list[Tensor]:
    """The buffer ``next_seed`` of a gate in a list; an empty list if the gate has no seed stream.

    A state dict may leave this buffer out. An owned gate takes its noise from the gate in ``family``, whose buffer is
    meant then.
    """
    family = getattr(gate, "family", gate)
    return [] if family._stream is None else [family.next_seed]


def groups_in(model: nn.Module) -> dict[int, Any]:
    """A memo for ``copy.deepcopy`` that makes a copy share the process groups that the modules of ``model`` hold."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return {}
    held = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value for value in held if isinstance(value, distributed.ProcessGroup)}


def unwrapped(model: Any) -> Any:
    """The module inside DistributedDataParallel, DataParallel or torch.compile; any other object unchanged."""
    while (inner := inside(model)) is not None:
        model = getattr(model, inner)
    return model


def inside(model: Any) -> str | None:
    """The name of the attribute in which a wrapper keeps its module; None if ``model`` is not a wrapper."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return "module"
    return "_orig_mod" if isinstance(model, nn.Module) and "_orig_mod" in model._modules else None


# Wrappers that dampr cannot look into: (module that defines the class, name of the class, what to use instead).
FORMER = "torch.distributed.fsdp", "FullyShardedDataParallel", "torch.distributed.fsdp.fully_shard"
REPLICATED = "torch.distributed._composable.replicate", "DDP", "torch.nn.parallel.DistributedDataParallel"


def check_seen(model: nn.Module, *wrappers: tuple[str, str, str]) -> None:
    """Raise TypeError if one of ``wrappers`` (:data:`FORMER`, :data:`REPLICATED`) is around a module of ``model``."""
    for room, kind, instead in wrappers:
        modules = model.named_modules() if room in sys.modules else ()
        found = next((name for name, m in modules if isinstance(m, getattr(sys.modules[room], kind))), None)
        if found is not None:
            where = f"model.{found}" if found else "model"
            raise TypeError(f"{where} is wrapped in {room}.{kind}: expected {instead}, or the bare module")


def wrapper() -> Any:
    """The DistributedDataParallel whose forward is running now; None outside of one."""
    return nn.parallel.DistributedDataParallel._active_ddp_module if distributed.is_available() else None


def watch(model: nn.Module, *, resized: bool = False) -> None:
    """Note that the parameters of ``model`` have changed; a DistributedDataParallel made before then raises when it is
    called.

    ``resized``: the parameters may be the same objects with other sizes. In a single process nothing happens.
    """
    global _changes
    if several():
        _changes += "."
        if resized:
            _resized.add(model)
        last = _checked.get(model, (None, None))[0]
        stale = None if last is None else last()
        if last is not None and stale is not None:
            _checked[model] = last, None
            # The old wrapper still lists parameters that are gone; it would fail on them before the check runs.
            stale._assign_modules_buffers()
        if _check_wrapper not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(_check_wrapper)


def unwatch(model: nn.Module) -> None:
    """Remove the hooks that :func:`watch` has put on ``model`` and its submodules."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _check_wrapper]:
            del module._forward_pre_hooks[key]


def _check_wrapper(module: nn.Module, args: Any) -> None:
    """Forward pre-hook: raise RuntimeError unless the DistributedDataParallel around ``module`` reduces exactly the
    parameters that the model has.

    The check runs again only if the wrapper is new or :func:`watch` was called since.
    """
    if torch.compiler.is_compiling():
        _check_while_tracing(_changes)
        return
    ddp = wrapper()
    if ddp is None:
        return
    joins = ddp._join_config.enable
    last, joined = _checked.get(module, (None, None))
    if last is None or last() is not ddp or joined is None:
        _check_parameters(ddp)
        if module in _resized:
            _check_sizes(ddp)
    elif joined == joins:
        return
    _exclude_gate_buffers(ddp, not joins)
    _checked[module] = weakref.ref(ddp), joins


def _check_while_tracing(changes: str) -> None:
    """The check of :func:`_check_wrapper` while torch.compile traces the model: it runs at each trace, and nothing is
    stored.

    ``changes``: the string :data:`_changes`. It is an argument so that Dynamo guards on it and traces the model again
    after a change.
    """
    ddp = wrapper()
    if ddp is not None:
        _check_parameters(ddp)
        if any(module in _resized for module in ddp.module.modules()):
            _check_sizes(ddp)


_check_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_sizes(ddp: Any) -> None:
    """Raise RuntimeError unless the gradient buckets of a DistributedDataParallel have as many elements as its
    parameters.
    """
    room = sum(bucket.buffer().numel() for bucket in ddp.reducer._get_zeros_like_grad_buckets())
    needed = sum(p.numel() for p in ddp._module_parameters)
    if room != needed:
        raise RuntimeError(
            f"DistributedDataParallel was made before the model changed: it reduces {room} numbers, and its "
            f"parameters have {needed}; wrap the module again"
        )


def _check_parameters(ddp: Any) -> None:
    """Raise RuntimeError unless a DistributedDataParallel reduces exactly the parameters of its module that need a
    gradient.
    """
    ignored, reduced = ddp.parameters_to_ignore, {id(p) for p in ddp._module_parameters}
    there = {id(p): name for name, p in ddp.module.named_parameters() if p.requires_grad and name not in ignored}
    missing = [name for key, name in there.items() if key not in reduced]
    every = {id(p) for p in ddp.module.parameters()}
    gone = sum(p.requires_grad and id(p) not in every for p in ddp._module_parameters)
    if missing or gone:
        raise RuntimeError(
            f"DistributedDataParallel was made before the model changed: it does not reduce {len(missing)} of its "
            "parameters "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}) and waits for {gone} that are gone; "
            "wrap the module again"
        )


def _exclude_gate_buffers(ddp: Any, exclude: bool) -> None:
    """Exclude (``exclude``) or include the buffers of gates in what DistributedDataParallel broadcasts.

    They are excluded in general, because every rank counts its draws alike. They are included under ``Join``: a rank
    that has run out of batches stops counting and takes the counts of the last rank at the end.

    Raises: RuntimeError under ``Join`` if a budget owns gates, because each step of a budget sends a message of its
    own.
    """
    from .base import Gate
    from .owned import OwnedGate, SteppedGate

    for name, module in ddp.module.named_modules():
        if not isinstance(module, Gate):
            continue
        if not exclude and isinstance(module, (OwnedGate, SteppedGate)):
            raise RuntimeError(
                f"{name}: a budget with steps owns its gates, and torch.distributed.algorithms.Join does not wait for "
                "what a budget sends; "
                "expected as many batches on every rank, or a budget without steps"
            )
        own = {f"{name}.{buffer}".lstrip(".") for buffer in module._buffers}
        if exclude:
            ddp.parameters_to_ignore |= own
        else:
            ddp.parameters_to_ignore -= own
    ddp._assign_modules_buffers()
