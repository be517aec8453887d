"""convert: gated layers in the place of dense ones, in the same model object, or no change at all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from dampr.gates import Gate
from dampr.nn import GatedLayer, GatedLinear

from . import graph, inputs

Filter = Sequence[str | type] | str | type | None
_REPLACEMENT: dict[type, Any] = {nn.Linear: GatedLinear}
_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name]


class ConversionError(RuntimeError):
    """A model could not be converted; it is as it was."""


def convert(
    model: nn.Module,
    *,
    gate: str | type[Gate] = "hard_concrete",
    granularity: str = "output",
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
            outputs nothing in the model consumes (the classifier), and evaluation outputs are proven unchanged, to the bit, before the
            function returns.

    Returns: ``model``.

    Raises: ConversionError when nothing matches, or the outputs changed, or the model could not be run; ValueError or TypeError that names
    the argument. Whatever is raised, the model is as it was.
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
            before = _evaluate(model, example_inputs)
    chosen = {
        name: layer for name, layer in model.named_modules() if type(layer) in _REPLACEMENT and _matches(name, layer, include, exclude)
    }
    if granularity == "output" and example_inputs is not None:
        for name in graph.unconsumed_outputs(model, chosen, example_inputs):
            del chosen[name]
    if not chosen:
        raise ConversionError(f"include={include!r}, exclude={exclude!r}: no layer of {type(model).__name__} is left to convert")
    gated = {name: _gated(layer, gate=gate, granularity=granularity, per_sample=per_sample) for name, layer in chosen.items()}
    if "" in gated:
        return gated[""]  # type: ignore[return-value]
    _replace(model, gated)
    if before is None:
        return model
    try:
        with _same_noise(model):
            after = _evaluate(model, example_inputs)
    except BaseException:
        _replace(model, chosen)
        raise
    if not _same(before, after, exact=all(bool((g.gate.deterministic() == 1).all()) for g in gated.values())):
        _replace(model, chosen)
        raise ConversionError(
            "evaluation outputs changed on example_inputs; the model bypasses a layer's call or is not deterministic in evaluation mode"
        )
    return model


def _evaluate(model: nn.Module, example_inputs: Any) -> list[torch.Tensor]:
    with inputs.evaluating(model):
        return inputs.tensors(inputs.run(model, example_inputs))


def _gated(layer: nn.Module, **arguments: Any) -> GatedLayer:
    gated: GatedLayer = _REPLACEMENT[type(layer)].from_dense(layer, **arguments)
    for name in _HOOKS:
        setattr(gated, name, getattr(layer, name))
    return gated


def _replace(model: nn.Module, layers: dict[str, Any]) -> None:
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def _same(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], exact: bool) -> bool:
    if len(before) != len(after):
        return False
    if exact:
        return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(before, after, strict=True))


def _matches(name: str, layer: nn.Module, include: Filter, exclude: Filter) -> bool:
    return _hits(name, layer, include, "include", default=True) and not _hits(name, layer, exclude, "exclude", default=False)


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
