"""Weights that are computed from other tensors: by ``torch.nn.utils.parametrize``, ``weight_norm``, ``spectral_norm``
or ``prune``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dampr.gates.ranks import groups_in

_WEIGHTS = (
    "weight",
    "bias",
    "in_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
)
Function = TypeVar("Function", bound=Callable[..., Any])


def computed(layer: nn.Module) -> str | None:
    """The name of a weight of ``layer`` that is computed from other tensors, by a parametrization or a pre-forward
    hook.

    None if there is no such weight. For an attention, its output projection counts as a part. No weight is read,
    because reading one would advance the vectors of a spectral norm.
    """
    if parametrize.is_parametrized(layer):
        return next(iter(layer.parametrizations))  # type: ignore[arg-type, return-value]
    own = vars(layer)
    for name in (*_WEIGHTS, *getattr(layer, "_flat_weights_names", ())):
        if isinstance(own.get(name), Tensor):
            return name
    last = computed(layer.out_proj) if isinstance(layer, nn.MultiheadAttention) else None
    return None if last is None else f"out_proj.{last}"


def check_dense(layer: Any, kind: type[nn.Module]) -> None:
    """Raise TypeError unless the type of ``layer`` is exactly ``kind``, and its weights are parameters."""
    name = computed(layer) if isinstance(layer, kind) else None
    if name is not None:
        raise TypeError(
            f"layer={type(layer).__name__}: its {name} is computed from other tensors (parametrize, weight_norm, "
            "spectral_norm or prune), "
            "expected a plain nn.Parameter; make the gated layer, then wrap it"
        )
    if type(layer) is not kind:
        raise TypeError(f"layer={type(layer).__name__}: expected exactly nn.{kind.__name__}")


def refresh(module: nn.Module) -> None:
    """Compute the weights of ``module`` and its submodules again that hooks compute before each call.

    After a step or a load they would else be out of date until the next call. The vectors of spectral norms do not
    change.
    """
    for layer in module.modules():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                setattr(layer, hook.name, hook.compute_weight(layer, do_power_iteration=False))
            elif isinstance(hook, (WeightNorm, prune.BasePruningMethod)):
                hook(layer, None)  # type: ignore[arg-type]


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """A block in which computed weights are up to date, and reading them does not change the vectors of spectral norms.

    Parametrizations are in evaluation mode within the block, whatever the mode of ``module``.
    """
    asleep = [
        part
        for layer in module.modules()
        if parametrize.is_parametrized(layer)
        for part in _parametrizations(layer).modules()
    ]
    modes = [part.training for part in asleep]
    for part in asleep:
        part.training = False
    try:
        with torch.no_grad():
            refresh(module)
        yield
    finally:
        for part, mode in zip(asleep, modes, strict=True):
            part.training = mode


def settled(method: Function) -> Function:
    """Decorator: run a method of a module, or a function of a model, within :func:`at_rest`."""

    @functools.wraps(method)
    def call(model: Any, *args: Any, **kwargs: Any) -> Any:
        with at_rest(model) if isinstance(model, nn.Module) else nullcontext():
            return method(model, *args, **kwargs)

    return call  # type: ignore[return-value]


def wake(module: nn.Module) -> None:
    """Set each parametrization to the mode (training or evaluation) of its layer.

    A copy that was made within :func:`at_rest` needs this, because its parametrizations are in evaluation mode.
    """
    for layer in module.modules():
        if parametrize.is_parametrized(layer):
            _parametrizations(layer).train(layer.training)


def copied(module: Any) -> Any:
    """A deep copy of ``module``. Tensors with a graph, which torch does not copy, are detached in the copy."""
    kept = [t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(module, {id(t): t.detach().clone() for t in kept} | groups_in(module))


def unwrap(module: nn.Module) -> None:
    """Replace the computed weights of ``module`` and its submodules by plain parameters of the same values, in
    place.
    """
    with at_rest(module):
        for layer in module.modules():
            if parametrize.is_parametrized(layer):
                _remove_parametrizations(layer)
            for hook in list(layer._forward_pre_hooks.values()):
                if isinstance(hook, SpectralNorm):
                    nn.utils.remove_spectral_norm(layer, hook.name)
                elif isinstance(hook, WeightNorm):
                    nn.utils.remove_weight_norm(layer, hook.name)
                elif isinstance(hook, prune.BasePruningMethod):
                    prune.remove(layer, hook._tensor_name)


@torch.no_grad()
def _remove_parametrizations(layer: nn.Module) -> None:
    """Replace the parametrized weights of ``layer`` by plain parameters of the same values, in place.

    torch's own function changes the class of the layer, which copies of the layer share, so it would take the weight
    from the copies too.
    """
    found = _parametrizations(layer)
    values = {
        name: nn.Parameter(getattr(layer, name), any(p.requires_grad for p in own.parameters()))
        for name, own in found.items()
    }
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    for name, value in values.items():
        layer.register_parameter(name, value)


def _parametrizations(layer: nn.Module) -> nn.ModuleDict:
    """``layer.parametrizations``."""
    found: Any = layer.parametrizations
    return found
