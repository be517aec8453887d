"""The processes of torch.distributed that train one model: one seed for all of them, each one's part of the batch,
stale wrappers.
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
_agreed: tuple[Any, int] | None = None  # the store of the process group, and the seed that is in it
_changes = ""  # as many letters as models have changed; dynamo compares strings, so that it traces a check again
_resized: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # whose parameters have had other sizes
_checked: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Any], bool | None]] = weakref.WeakKeyDictionary()


def several() -> bool:
    """Whether this process is one of several in torch.distributed."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


several._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a process group is not traced


def part_of(ranks: Sequence[int] | None) -> int:
    """Which part of the batch this process has: its place among ``ranks``, or its rank where these are None; 0 in a
    single process.

    Raises RuntimeError where it is not among them.
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
    """A seed that all ranks have: what rank 0 gave to ``torch.manual_seed`` before it was first asked for.

    A store may outlive a process group, and then its seed holds for the next one too. It goes through the store of the
    process group, once: no rank waits for another one to call a collective. Raises RuntimeError where rank 0 has not
    asked for it within two minutes.
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
    """:func:`agreed_seed`, mixed with what ``gates`` a model has, so that two models of a process do not draw alike."""
    return agreed_seed() ^ zlib.crc32(repr([(type(gate).__name__, gate.num_gates) for gate in gates]).encode())


def over_ranks(t: Tensor) -> Tensor:
    """The mean of ``t`` over all processes of torch.distributed, as data parallelism takes it of gradients;
    ``t`` where there is one.
    """
    if not several():
        return t
    total = t.contiguous().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def check_alike(model: nn.Module, device: Any) -> None:
    """Raise ValueError on every rank unless all have parameters of the same names and sizes,
    as means over ranks need.
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
    """Give ``gates`` on every rank what they are on the first rank of ``group`` (None: of all): values and next seeds.

    Ranks whose random states differ make other values of gates that start at random. Wrappers send no gates that are
    left out of sharding, nor those that a budget owns. Gates on the meta device have nothing to send.
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
    """The next seed of a gate, which may be in no state dict; of an owned one, that of the family behind it."""
    family = getattr(gate, "family", gate)
    return [] if family._stream is None else [family.next_seed]


def groups_in(model: nn.Module) -> dict[int, Any]:
    """What ``copy.deepcopy`` is to know of the process groups that modules hold: a copy has the same ones."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return {}
    held = (value for module in model.modules() for value in vars(module).values())
    return {id(value): value for value in held if isinstance(value, distributed.ProcessGroup)}


def unwrapped(model: Any) -> Any:
    """The module that DistributedDataParallel, DataParallel or torch.compile were given; anything else as it is."""
    while (inner := inside(model)) is not None:
        model = getattr(model, inner)
    return model


def inside(model: Any) -> str | None:
    """The attribute in which a wrapper keeps its module; None of a module that is no wrapper."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return "module"
    return "_orig_mod" if isinstance(model, nn.Module) and "_orig_mod" in model._modules else None


# What cannot be seen through: its room, the class that its modules have, what to have in its place.
FORMER = "torch.distributed.fsdp", "FullyShardedDataParallel", "torch.distributed.fsdp.fully_shard"
REPLICATED = "torch.distributed._composable.replicate", "DDP", "torch.nn.parallel.DistributedDataParallel"


def check_seen(model: nn.Module, *wrappers: tuple[str, str, str]) -> None:
    """Raise TypeError where one of these (:data:`FORMER`, :data:`REPLICATED`) is around a module of ``model``."""
    for room, kind, instead in wrappers:
        modules = model.named_modules() if room in sys.modules else ()
        found = next((name for name, m in modules if isinstance(m, getattr(sys.modules[room], kind))), None)
        if found is not None:
            where = f"model.{found}" if found else "model"
            raise TypeError(f"{where} is wrapped in {room}.{kind}: expected {instead}, or the bare module")


def wrapper() -> Any:
    """The DistributedDataParallel in whose forward this code runs; None outside of one."""
    return nn.parallel.DistributedDataParallel._active_ddp_module if distributed.is_available() else None


def watch(model: nn.Module, *, resized: bool = False) -> None:
    """``model`` has other parameters from now on: a DistributedDataParallel of before is an error when called.

    ``resized``: they may be the same objects, of other sizes.
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
            # or it would stumble over those that are gone, before it comes to the check
            stale._assign_modules_buffers()
        if _check_wrapper not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(_check_wrapper)


def unwatch(model: nn.Module) -> None:
    """Leave no trace of :func:`watch` in ``model`` and what it is made of."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _check_wrapper]:
            del module._forward_pre_hooks[key]


def _check_wrapper(module: nn.Module, args: Any) -> None:
    """In a wrapper that is new to the module: raise RuntimeError unless it reduces exactly the parameters that the
    model has.
    """
    if torch.compiler.is_compiling():
        _check_while_tracing(_changes)
        return
    found = wrapper()
    if found is None:
        return
    joins = found._join_config.enable
    last, joined = _checked.get(module, (None, None))
    if last is None or last() is not found or joined is None:
        _check_parameters(found)
        if module in _resized:
            _check_sizes(found)
    elif joined == joins:
        return
    _count_alone(found, not joins)
    _checked[module] = weakref.ref(found), joins


def _check_while_tracing(changes: str) -> None:
    """As :func:`_check_wrapper`, where a model is traced, which it is again when ``changes`` is another."""
    found = wrapper()
    if found is not None:
        _check_parameters(found)
        if any(module in _resized for module in found.module.modules()):
            _check_sizes(found)


_check_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_sizes(found: Any) -> None:
    """Raise RuntimeError unless a DistributedDataParallel has room for exactly the gradients of its parameters."""
    room = sum(bucket.buffer().numel() for bucket in found.reducer._get_zeros_like_grad_buckets())
    needed = sum(p.numel() for p in found._module_parameters)
    if room != needed:
        raise RuntimeError(
            f"DistributedDataParallel was made before the model changed: it reduces {room} numbers, and its "
            f"parameters have {needed}; wrap the module again"
        )


def _check_parameters(found: Any) -> None:
    ignored, reduced = found.parameters_to_ignore, {id(p) for p in found._module_parameters}
    there = {id(p): name for name, p in found.module.named_parameters() if p.requires_grad and name not in ignored}
    missing = [name for key, name in there.items() if key not in reduced]
    every = {id(p) for p in found.module.parameters()}
    gone = sum(p.requires_grad and id(p) not in every for p in found._module_parameters)
    if missing or gone:
        raise RuntimeError(
            f"DistributedDataParallel was made before the model changed: it does not reduce {len(missing)} of its "
            "parameters "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}) and waits for {gone} that are gone; "
            "wrap the module again"
        )


def _count_alone(found: Any, alone: bool) -> None:
    """Whether buffers of gates are left out of what DistributedDataParallel broadcasts: every rank counts the same.

    Not so under ``Join``, where a rank that is through stops counting, and gets the counts of the last one in the end.
    Raises RuntimeError there where a budget owns gates, because its step is a message of its own.
    """
    from .base import Gate
    from .owned import OwnedGate, SteppedGate

    for name, module in found.module.named_modules():
        if not isinstance(module, Gate):
            continue
        if not alone and isinstance(module, (OwnedGate, SteppedGate)):
            raise RuntimeError(
                f"{name}: a budget with steps owns its gates, and torch.distributed.algorithms.Join does not wait for "
                "what a budget sends; "
                "expected as many batches on every rank, or a budget without steps"
            )
        own = {f"{name}.{buffer}".lstrip(".") for buffer in module._buffers}
        if alone:
            found.parameters_to_ignore |= own
        else:
            found.parameters_to_ignore -= own
    found._assign_modules_buffers()
