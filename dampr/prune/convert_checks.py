"""What convert makes sure of, before it gives a model back: the same outputs, gates that count,
and closed channels that can go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dampr.gates import Fixed, Gate
from dampr.nn import GatedLayer
from dampr.nn.conv import GatedConv

from . import inputs, noise
from .compact import CompactionError, compact
from .cost import Cost
from .cutting import CONSTANTS
from .graph import pads_with_zeros
from .measure import count_macs
from .summary import distinct_gates
from .units import Units


class ConversionError(RuntimeError):
    """A model could not be converted; it is as it was."""


class UnprovenError(ConversionError):
    """Gated layers do not do for a model, which gates on its parameters may."""


class StuckError(ConversionError):
    """Closed channels of some layers cannot go: ``reasons``, by the names of these."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(str(reasons))
        self.reasons = reasons


def check_unchanged(model: nn.Module, gated: dict[str, Any], before: list[torch.Tensor], example_inputs: Any) -> None:
    """A fresh gate of one leaves a product as it is, to the bit;
    a GEMM may still take another path for an input that is not contiguous.
    """
    with inputs.unfused():
        after = inputs.evaluate(model, example_inputs)
    exact = all(bool((layer.gate.deterministic() == 1).all()) for layer in gated.values())
    eps = max((torch.finfo(t.dtype).eps for t in before if t.is_floating_point()), default=0.0)
    tolerance = (16 if exact else 1024) * eps
    if inputs.differ(before, after, rtol=tolerance, atol=tolerance * inputs.size(before)):
        raise ConversionError(
            "evaluation outputs changed on example_inputs: the model looks at its layers' types, or draws in "
            "evaluation mode"
        )


def may_leave_constants(module: nn.Module) -> bool:
    """Whether a closed channel may be a constant other than 0 behind this module."""
    norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, GatedLayer)
    return norm or isinstance(module, GatedConv)


def constants_left(trained: nn.Module, units: Units, vectors: list[list[int]], example_inputs: Any) -> str:
    """What layers of a gated model read where units are closed, by a run with all gates 0 and one with half of each
    vector.

    Args:
        trained: a copy with values such as training leaves.
        units: of the model without gates.
        vectors: of each gated layer the class of each of its gates.

    Returns: "none": only zeros. "some": constants, as behind a norm without gates, or the half of a sigmoid; a bias may
    make up for them. "stuck": what no bias makes up for, because it varies, or is read with a border of zeros.
    """
    every, first = ({one for vector in vectors for one in vector[: len(vector) // parts]} for parts in (1, 2))
    half = _read_where_closed(with_gates_at(trained), units, first, example_inputs)  # beside units that are open
    if "stuck" in half:
        return "stuck"
    return "some" if half or _read_where_closed(with_gates_at(trained, 1.0), units, every, example_inputs) else "none"


def _read_where_closed(trial: Any, units: Units, classes: set[int], example_inputs: Any) -> set[str]:
    """The same of each reader of closed classes that reads something; {"some"} where a model does not run so."""
    found: set[str] = set()

    def look(weight: torch.Tensor, channels: list[int], along: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            x = args[0].data if args else None
            if not isinstance(x, torch.Tensor) or x.dim() < -along or max(channels) >= x.shape[along]:
                return
            read = x.movedim(along, -1)[..., channels].reshape(-1, len(channels))
            if bool(read.any()):
                # what is times 0 does not count
                read = read[:, weight.detach()[:, channels].transpose(0, 1).flatten(1).any(1)]
            largest = float(read.abs().max()) if read.numel() else 0.0
            if largest:
                same = len(read) > 1 and torch.allclose(read, read[:1].expand_as(read), rtol=1e-3, atol=1e-3 * largest)
                found.add("some" if same and not pads_with_zeros(module) else "stuck")

        return hook

    hooks = []
    for name, module in trial.named_modules():
        for own in ("weight", "weight_ih_l0"):
            full = f"{name}.{own}".lstrip(".")
            if full in units.alias and units.is_column(full, 1):
                weight = getattr(module, own)
                channels = [i for i, one in enumerate(units.classes(full, 1)) if one in classes]
                along = -max(weight.dim() - 1, 1)
                hooks += [module.register_forward_pre_hook(look(weight, channels, along))] if channels else []
    with inputs.removing(hooks):
        try:
            inputs.evaluate(trial, example_inputs)
        except RuntimeError:  # of a model that needs some of its values, which no budget closes all at once
            found.add("some")
    return found


def check_half(trained: nn.Module, example_inputs: Any) -> None:
    """Close half of the gates of a copy with values such as training leaves: what is left has to compute the same and
    to cost what was foretold.

    Models can fail it that have gates in convolutions, or norms without gates: what is constant behind a closed channel
    (the half of a sigmoid, the shift of a norm) no bias makes up for at a padded border. Raises UnprovenError.
    """
    trial = with_gates_at(trained)
    with noise.kept(trained):
        try:
            cost = Cost(trial, example_inputs, "macs")
            small = compact(trial, example_inputs=example_inputs)
        except Exception as error:
            raise UnprovenError(f"half of its gates cannot be cut ({error})") from error
        if round(float(cost(cost.decision()))) != count_macs(small, example_inputs):
            raise UnprovenError("with half of its gates closed the model does not cost what was foretold")


def with_gates_at(model: nn.Module, closed: float = 0.5, only: Gate | None = None) -> nn.Module:
    """A copy, with the same parameters, that has this share of the gates of each vector closed, or of one of them."""
    trial = inputs.twin(model)
    fixed: dict[nn.Module, nn.Module] = {}
    for own, gate in zip(model.modules(), trial.modules(), strict=True):
        if isinstance(gate, Gate) and only in (None, own):
            values = gate.deterministic().detach().clone()
            values[: int(len(values) * closed)] = 0
            fixed[gate] = Fixed(values)
    inputs.replace(trial, fixed)
    return trial


def check_none_stuck(trained: nn.Module, example_inputs: Any) -> None:
    """Raise StuckError where closed channels of layers, in a copy with values such as training leaves, are constants
    that no bias makes up for, so that they would stay.
    """
    with noise.kept(trained):
        try:
            manifest: Any = compact(with_gates_at(trained), example_inputs=example_inputs).dampr_manifest
        except CompactionError:
            uncut = _uncut(trained, example_inputs)
            if uncut:
                raise StuckError(uncut) from None
            return
    notes = {name: note for name, note in manifest["closed_but_kept"].items() if CONSTANTS in note}
    if notes:
        why = {name: note.partition("stay: ")[2].partition(";")[0] for name, note in notes.items()}
        raise StuckError({name: f"its closed channels would stay: {reason}" for name, reason in why.items()})


def _uncut(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """Of layers with gates, the first of each vector, those whose closed channels compaction can neither cut nor
    leave, and why.
    """
    found = {}
    for name, gate in distinct_gates(model).items():
        try:
            compact(with_gates_at(model, only=gate), example_inputs=example_inputs)
        except CompactionError as error:
            found[name] = f"its closed channels could not be cut: {error}"
    return found


_MAY_BYPASS = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)  # on torch's fused paths


def check_called(model: nn.Module, gated: dict[str, Any], example_inputs: Any, called: set[str]) -> None:
    """A layer whose weight is read but whose call is bypassed (subclasses of nn.TransformerEncoderLayer do so) would
    ignore its gates. ``called``: without torch's fused paths.
    """
    if called.issuperset(gated) and not any(isinstance(module, _MAY_BYPASS) for module in model.modules()):
        return
    with recorded(gated) as called:
        before = inputs.evaluate(model, example_inputs)
    for name in gated.keys() - called:
        layer = gated[name]
        weight = next((p for n, p in layer.named_parameters() if "weight" in n), None)
        if weight is None:
            continue
        own = weight.detach().clone()
        try:
            with torch.no_grad():
                weight.zero_()
            read = inputs.differ(before, inputs.evaluate(model, example_inputs), rtol=0, atol=0)
        finally:
            with torch.no_grad():
                weight.copy_(own)
        if read:
            raise UnprovenError(
                f"layer {name!r}: the model reads its weight without calling it, so gates would do nothing; exclude it"
            )


@contextmanager
def recorded(gated: dict[str, Any]) -> Iterator[set[str]]:
    """The names of those of these layers that are called in the block."""
    called: set[str] = set()
    for name, layer in gated.items():  # not with hooks, which switch fused paths off
        layer.forward = recording(name, layer.forward, called)
    try:
        yield called
    finally:
        for layer in gated.values():
            del layer.forward


def recording(name: str, forward: Callable[..., Any], called: set[str]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        called.add(name)
        return forward(*args, **kwargs)

    return wrapper
