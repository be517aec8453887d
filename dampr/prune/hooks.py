"""Hooks that users put on modules: which of them change what a model computes, and how they stay with a layer that is
replaced.

Most hooks only observe. Those are silent while a model is traced and tried, which runs it on inputs of our own. Hooks
that change what a model computes are part of it: they are traced, and cut models keep them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_ALL = [name for name in vars(nn.Module()) if "_hook" in name]
_OF_CALLS = [name for name in _ALL if "state_dict" not in name and isinstance(getattr(nn.Module(), name), dict)]
_FORWARD = ("_forward_pre_hooks", "_forward_hooks")
_SILENT: ContextVar[frozenset[int]] = ContextVar("_SILENT", default=frozenset())  # ids of emptied dicts of hooks


@contextmanager
def removing(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """A block after which the given hooks are removed."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def share(old: nn.Module, new: nn.Module, *, of_states: bool = True) -> None:
    """Give ``new``, which takes the place of ``old``, all hooks that were registered on ``old``.

    Handles of these hooks remove them from both.

    Args:
        old, new: the modules.
        of_states: also the hooks of state dicts.
    """
    for attribute in _ALL:
        if of_states or "state_dict" not in attribute:
            setattr(new, attribute, getattr(old, attribute))


def copy(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the users' hooks of ``old``, and each part of ``new`` those of the part of the same name.

    Handles of these hooks remove them from ``old`` alone.
    """
    parts = dict(new.named_modules())
    for name, former in old.named_modules():
        part = parts.get(name)
        if part is None or part is former:
            continue
        for attribute in _OF_CALLS:
            held, own = getattr(former, attribute), getattr(part, attribute)
            if held and held is not own:
                own.update((key, hook) for key, hook in held.items() if not computes(hook))
        if part._is_full_backward_hook is None:
            part._is_full_backward_hook = former._is_full_backward_hook


def share_by_name(model: nn.Module, small: nn.Module) -> None:
    """Give the layers and parameters of ``small``, which takes the place of ``model``, the hooks that those of the same
    names in ``model`` have.

    Hooks of torch and of this package that compute weights or norms are already as ``small`` needs them, and so are
    those of state dicts.
    """
    layers, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, layer in small.named_modules():
        former = layers.get(name)
        if not name or former is None:
            continue
        if not any(computes(hook) for kind in _FORWARD for hook in getattr(former, kind).values()):
            share(former, layer, of_states=False)
    for name, p in small.named_parameters():
        for attribute in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(parameters.get(name), attribute, None):
                setattr(p, attribute, getattr(parameters[name], attribute))


def computes(hook: Any) -> bool:
    """Whether a hook is one of ``torch.nn.utils`` or of this package, which compute weights and norms."""
    return _module_of(hook).startswith(("torch.nn.utils.", "dampr."))


def sees_outputs(module: nn.Module) -> bool:
    """Whether a forward or a backward hook sees the outputs of ``module``, also if it is silent now."""
    kinds = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds) or id(module._forward_hooks) in _SILENT.get()


def _module_of(hook: Any) -> str:
    """The name of the module that defines a hook."""
    where: str = getattr(hook, "__module__", None) or type(hook).__module__
    return where


def of_users(model: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    """(hooks of a module, key) of each forward hook that is not of torch and not of this package."""
    for module in model.modules():
        for attribute in _FORWARD:
            held = getattr(module, attribute)
            for key, hook in held.items():
                if not _module_of(hook).startswith(("torch.", "dampr.")):
                    yield held, key


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """A block without the users' forward hooks."""
    found = list(of_users(model))
    token = _SILENT.set(_SILENT.get() | {id(held) for held, _ in found})
    try:
        with _taken_out(found):
            yield
    finally:
        _SILENT.reset(token)


@contextmanager
def without_own(module: nn.Module) -> Iterator[None]:
    """A block in which a module itself has no forward hooks of this package."""
    held = [getattr(module, attribute) for attribute in _FORWARD]
    with _taken_out([(own, key) for own in held for key, hook in own.items() if _module_of(hook).startswith("dampr.")]):
        yield


@contextmanager
def _taken_out(found: list[tuple[dict[int, Any], int]]) -> Iterator[None]:
    """A block without the given hooks, pairs of a dict and a key in it; afterwards all are called in the old order."""
    before = {id(held): (held, dict(held)) for held, _ in found}
    taken = {(id(held), key) for held, key in found}
    try:
        for held, key in found:
            del held[key]
        yield
    finally:
        for held, former in before.values():
            now = dict(held)
            held.clear()
            held.update((key, hook) for key, hook in former.items() if key in now or (id(held), key) in taken)
            held.update(now)
