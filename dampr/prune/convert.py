"""convert: gated layers in the place of dense ones, in the same model object, or no change at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from dampr.gates import Gate
from dampr.nn import GatedLinear
from dampr.nn.base import Granularity

from . import graph, inputs

Filter = Sequence[str | type] | str | type | None
_REPLACEMENT: dict[type, Any] = {nn.Linear: GatedLinear}
_HOOKS = [name for name in vars(nn.Module()) if "_hook" in name]


class ConversionError(RuntimeError):
    """A model could not be converted; it is as it was."""


def convert(
    model: nn.Module,
    *,
    gate: str | type[Gate] = "hard_concrete",
    granularity: Granularity = "output",
    per_sample: bool = False,
    include: Filter = None,
    exclude: Filter = None,
    example_inputs: Any = None,
) -> nn.Module:
    """Replace dense layers of ``model`` by gated ones, in place, keeping their parameters (and any optimizer that holds them) valid.

    Args:
        model: any module; layers whose type is exactly ``nn.Linear`` are replaced. (A bare ``nn.Linear`` cannot change in place: use
            what is returned.)
        gate, granularity, per_sample: as in :class:`dampr.nn.GatedLinear`; each layer gets a gate of its own.
        include, exclude: name globs ("encoder.*") and types; None includes everything and excludes nothing.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With them, output gates leave out layers whose
            outputs nothing in the model consumes (the classifier), and before the function returns it is proven that evaluation outputs
            are unchanged (to rounding) and that no gated layer's weight is read without calling the layer.

    Returns: ``model``.

    Raises: ConversionError when nothing matches, outputs changed or a layer is bypassed; ValueError or TypeError that names the argument;
    what the model itself raises on the example inputs. Whatever is raised, the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r:.80}: expected a torch.nn.Module")
    if isinstance(gate, Gate):
        raise TypeError(
            f"gate={type(gate).__name__} instance: expected a family's name or a class, because each layer gets a gate of its own"
        )
    before = None
    if example_inputs is not None:
        inputs.check(example_inputs)
        with _same_noise(model):
            before = inputs.evaluate(model, example_inputs)
    chosen = _choose(model, include, exclude)
    if granularity == "output" and example_inputs is not None:
        for name in graph.unconsumed_outputs(model, chosen, example_inputs):
            del chosen[name]
    if not chosen:
        raise ConversionError(f"include={include!r}, exclude={exclude!r}: no layer of {type(model).__name__} is left to convert")
    gated = {name: _gated(name, layer, gate=gate, granularity=granularity, per_sample=per_sample) for name, layer in chosen.items()}
    if "" in gated:
        return gated[""]
    inputs.replace(model, {chosen[name]: gated[name] for name in chosen})
    if before is None:
        return model
    try:
        _check_unchanged(model, gated, before, example_inputs)
        _check_called(model, gated, before, example_inputs)
    except BaseException:
        inputs.replace(model, {gated[name]: chosen[name] for name in chosen})
        raise
    return model


def _choose(model: nn.Module, include: Filter, exclude: Filter) -> dict[str, nn.Module]:
    """Layers to replace by their first name; a layer that has several names is excluded by any of them."""
    names: dict[nn.Module, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if type(layer) in _REPLACEMENT:
            names.setdefault(layer, []).append(name)
    return {
        aliases[0]: layer
        for layer, aliases in names.items()
        if any(_hits(name, layer, include, "include", default=True) for name in aliases)
        and not any(_hits(name, layer, exclude, "exclude", default=False) for name in aliases)
    }


def _gated(name: str, layer: nn.Module, **arguments: Any) -> nn.Module:
    if not isinstance(layer.weight, nn.Parameter):
        raise ConversionError(f"layer {name!r}: its weight is computed from other tensors (weight_norm?), expected a plain nn.Parameter")
    gated: nn.Module = _REPLACEMENT[type(layer)].from_dense(layer, **arguments)
    for attribute in _HOOKS:
        setattr(gated, attribute, getattr(layer, attribute))
    return gated


def _check_unchanged(model: nn.Module, gated: dict[str, Any], before: list[torch.Tensor], example_inputs: Any) -> None:
    """A fresh gate of one leaves a product as it is, to the bit; a GEMM may still take another path for an input that is not contiguous."""
    with _same_noise(model):
        after = inputs.evaluate(model, example_inputs)
    exact = all(bool((layer.gate.deterministic() == 1).all()) for layer in gated.values())
    eps = max((torch.finfo(t.dtype).eps for t in before if t.is_floating_point()), default=0.0)
    tolerance = (16 if exact else 1024) * eps
    if inputs.differ(before, after, rtol=tolerance, atol=tolerance * max((float(t.abs().max()) for t in before if t.numel()), default=0.0)):
        raise ConversionError(
            "evaluation outputs changed on example_inputs: the model looks at its layers' types, or draws in evaluation mode"
        )


def _check_called(model: nn.Module, gated: dict[str, Any], before: list[torch.Tensor], example_inputs: Any) -> None:
    """A layer whose weight is read but whose call is bypassed (nn.TransformerEncoderLayer has such a path) would ignore its gates."""
    called: set[str] = set()
    for name, layer in gated.items():  # not with hooks, which switch such fast paths off
        layer.forward = _recording(name, layer.forward, called)
    try:
        with _same_noise(model):
            inputs.evaluate(model, example_inputs)
    finally:
        for layer in gated.values():
            del layer.forward
    for name in gated.keys() - called:
        weight = gated[name].weight
        own = weight.detach().clone()
        try:
            with torch.no_grad():
                weight.zero_()
            with _same_noise(model):
                read = inputs.differ(before, inputs.evaluate(model, example_inputs), rtol=0, atol=0)
        finally:
            with torch.no_grad():
                weight.copy_(own)
        if read:
            raise ConversionError(f"layer {name!r}: the model reads its weight without calling it, so gates would do nothing; exclude it")


def _recording(name: str, forward: Callable[..., Any], called: set[str]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        called.add(name)
        return forward(*args, **kwargs)

    return wrapper


def _hits(name: str, layer: nn.Module, wanted: Filter, argument: str, default: bool) -> bool:
    if wanted is None:
        return default
    rules = list(wanted) if isinstance(wanted, (list, tuple, set)) else [wanted]
    for rule in rules:
        if not isinstance(rule, (str, type)):
            raise TypeError(f"{argument}={rule!r}: expected name globs and types")
    return any(fnmatchcase(name, rule) if isinstance(rule, str) else type(layer) is rule for rule in rules)


def _same_noise(model: nn.Module) -> AbstractContextManager[None]:
    """Whatever a model draws in evaluation mode, it draws the same in every such block, and the caller's random state is untouched."""
    return torch.random.fork_rng(sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}))
