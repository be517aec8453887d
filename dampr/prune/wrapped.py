"""Models inside the wrappers of torch.distributed and torch.compile: unwrapped, gathered into a whole copy, or
refused.
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

_MARKS = "_is_fsdp_managed_module", "_fsdp_use_orig_params"  # attributes that fully_shard sets on modules
Function = TypeVar("Function", bound=Callable[..., Any])


def check_bare(model: Any, what: str, name: str = "model", *, sharded: bool = False) -> None:
    """Check that a model is not wrapped and, unless ``sharded`` is True, not sharded, in whole or in part.

    Args:
        model: the model.
        what: why it must be so, for the message ("because ...").
        name: the name of the argument, for the message.
        sharded: whether sharded parameters are allowed.

    Raises: TypeError if it is wrapped or sharded.
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
    """The name of the wrapper of a model, for a message."""
    return "torch.compile" if "_orig_mod" in model._modules else type(model).__name__


def sees_through(function: Function) -> Function:
    """Decorate ``function`` so that its arguments ``model`` and ``small`` may be wrapped or sharded.

    It then gets the bare module with whole parameters instead. Sharded parameters are gathered on every rank, so every
    rank has to call it.

    Raises: ValueError, in a call, for an ``optimizer`` together with a sharded model.
    """
    signature = inspect.signature(function)
    names = [name for name in ("model", "small") if name in signature.parameters]

    @functools.wraps(function)
    def bare(*args: Any, **kwargs: Any) -> Any:
        """``function`` with unwrapped, whole modules."""
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # raises Python's own error about the arguments
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
    """Whether ``fully_shard`` was applied to this module."""
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
    """Check that all gates belong to gated layers, and that none is sharded.

    Raises: ValueError for a gate elsewhere, which would neither be counted nor cut; TypeError for a sharded one.
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
    """Whether any module or parameter of ``model`` is sharded, by ``fully_shard`` or by tensor parallelism."""
    return any(is_fsdp(module) for module in model.modules()) or any(
        is_sharded(t) for t in (*model.parameters(), *model.buffers())
    )


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """A block in which modules have nothing of torch.distributed: neither its classes nor its hooks nor its attributes.

    Afterwards all of it is back.
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
    """Whether a hook or an attribute's value belongs to torch.distributed."""
    if isinstance(value, functools.partial):
        return _is_of_torch(value.func)
    where = getattr(value, "__module__", None) or getattr(type(value), "__module__", "")
    return str(where).startswith("torch.distributed") and not isinstance(value, (Tensor, nn.Module, Enum))
