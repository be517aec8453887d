"""Models inside of what torch.distributed and torch.compile make of them: seen through, put together again,
or refused.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, TypeVar, cast

from torch import Tensor, distributed, nn

from dampr.gates import Gate
from dampr.gates.ranks import FORMER, REPLICATED, check_seen, groups_in, inside, unwrapped
from dampr.nn import GatedLayer

from .modules import of_kind

_MARKS = "_is_fsdp_managed_module", "_fsdp_use_orig_params"  # attributes that fully_shard leaves
Function = TypeVar("Function", bound=Callable[..., Any])


def check_bare(model: Any, what: str, name: str = "model", *, sharded: bool = False) -> None:
    """Raise TypeError where ``model`` is wrapped or, unless it may be, ``sharded``, or has a wrapped module in it.

    ``what`` says why.
    """
    inner = inside(model)
    if inner is not None:
        raise TypeError(
            f"{name}: what {_called(model)} returned, expected the module itself ({name}.{inner}), because {what}; "
            "wrap it after that"
        )
    if not isinstance(model, nn.Module):
        return
    check_seen(model, FORMER, REPLICATED)
    for path, module in model.named_modules():
        if inside(module) is not None and isinstance(module, nn.parallel.DistributedDataParallel):
            raise TypeError(
                f"{name}.{path} is wrapped in {_called(module)}: expected it bare, because {what}; wrap it after that"
            )
    first = next((key for key, p in model.named_parameters() if is_sharded(p)), None)
    if not sharded and is_any_sharded(model):
        raise TypeError(
            f"{name} is sharded ({first or type(model).__name__}): expected it whole, because {what}; shard it after "
            "that"
        )


def _called(model: nn.Module) -> str:
    return "torch.compile" if "_orig_mod" in model._modules else type(model).__name__


def sees_through(function: Function) -> Function:
    """``function`` with the bare, whole module in the place of an argument ``model`` (and ``small``) that is wrapped or
    sharded.

    Sharded parameters are gathered on every rank, so every rank has to call it.
    """
    signature = inspect.signature(function)
    names = [name for name in ("model", "small") if name in signature.parameters]

    @functools.wraps(function)
    def bare(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which says what is wrong
        for name in names:
            model = given.arguments.get(name)
            if isinstance(model, nn.Module):
                whole = given.arguments[name] = gathered(model)
                if whole is not unwrapped(model) and given.arguments.get("optimizer") is not None:
                    raise ValueError(
                        "optimizer: it holds parts of sharded parameters, expected None with a sharded model"
                    )
        return function(*given.args, **given.kwargs)

    return cast(Function, bare)


def is_sharded(t: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return "torch.distributed.tensor" in sys.modules and isinstance(t, sys.modules["torch.distributed.tensor"].DTensor)


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has been here."""
    return "torch.distributed.fsdp" in sys.modules and isinstance(
        module, sys.modules["torch.distributed.fsdp"].FSDPModule
    )


def gathered(model: nn.Module, *, rank: int | None = None) -> Any:
    """The module inside of wrappers; where ``fully_shard`` or ``parallelize_module`` have sharded it, a plain copy with
    whole parameters.

    Args:
        model: wrapped, sharded or neither; a sharded one is not changed.
        rank: the only rank that keeps the copy; None: every rank does. Sharded parameters are gathered one by one, on
            every rank.

    Returns: a module; None on the other ranks where ``rank`` is given.

    Raises: TypeError for ``FullyShardedDataParallel``, the predecessor of ``fully_shard``, for ``replicate``, and for
    gates that are sharded.
    """
    model = unwrapped(model)
    check_seen(model, FORMER, REPLICATED)
    kept = rank is None or not distributed.is_initialized() or distributed.get_rank() == rank
    if not is_any_sharded(model):
        return model if kept else None
    check_gates_whole(model)
    for module in model.modules():
        if is_fsdp(module):
            cast(Any, module).reshard()
    memo: dict[int, Any] = groups_in(model)
    for t in (*model.parameters(), *model.buffers()):
        if is_sharded(t):
            whole = cast(Any, t).full_tensor().detach().clone()
            if kept:
                memo[id(t)] = (
                    nn.Parameter(whole, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else whole
                )
    if not kept:
        return None
    with _bare(model):
        plain = copy.deepcopy(model, memo)
    for module in plain.modules():
        module.__dict__.pop("sharded", None)
    return plain


def check_gates(model: nn.Module) -> None:
    """Raise ValueError where gates belong to no gated layer, which would neither be counted nor cut,
    and TypeError for sharded ones.
    """
    check_seen(model, FORMER)
    owned = {inner for module in of_kind(model, GatedLayer) for inner in module.gate.modules()}
    for name, module in model.named_modules():
        if isinstance(module, Gate) and module not in owned:
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise ValueError(
                f"{name}: gates in {owner}, which is no gated layer and does not use them; expected a layer of "
                "dampr.nn there"
            )
    check_gates_whole(model)


def check_values(model: nn.Module) -> None:
    """Raise ValueError where ``model`` has tensors on the meta device, which have no values."""
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_meta:
            raise ValueError(f"model: {name} is on the meta device, expected a model with values")


def check_gates_whole(model: nn.Module) -> None:
    """Raise TypeError where parameters of gates are sharded."""
    for name, module in model.named_modules():
        if isinstance(module, Gate) and any(is_sharded(p) for p in module.parameters()):
            raise TypeError(
                f"{name}: its parameters are sharded, expected gates whole on every rank; shard with "
                "fully_shard(..., ignored_params=dampr.integrations.distributed.replicate_gates(model))"
            )


def is_any_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` or tensor parallelism has been anywhere in ``model``."""
    return any(is_fsdp(module) for module in model.modules()) or any(
        is_sharded(t) for t in (*model.parameters(), *model.buffers())
    )


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """Every module without what torch.distributed has hung on it: its class, its hooks, its state;
    given back behind the block.
    """
    taken: list[tuple[nn.Module, type, dict[str, Any]]] = []
    try:
        for module in model.modules():
            taken.append((module, type(module), dict(module.__dict__)))
            if is_fsdp(module):
                module.__class__ = type(module).__bases__[1]
            for name, value in list(module.__dict__.items()):
                if "hook" in name and isinstance(value, dict):
                    module.__dict__[name] = type(value)(
                        (key, hook) for key, hook in value.items() if not _is_of_torch(hook)
                    )
                elif (
                    name in _MARKS
                    or _is_of_torch(value)
                    or (isinstance(value, dict) and any(map(_is_of_torch, value.values())))
                ):
                    del module.__dict__[name]
        yield
    finally:
        for module, kind, attributes in taken:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _is_of_torch(value: Any) -> bool:
    """Whether a hook, or the state of a module, is one of torch.distributed's own."""
    if isinstance(value, functools.partial):
        return _is_of_torch(value.func)
    where = getattr(value, "__module__", None) or getattr(type(value), "__module__", "")
    return str(where).startswith("torch.distributed") and not isinstance(value, (Tensor, nn.Module, Enum))
