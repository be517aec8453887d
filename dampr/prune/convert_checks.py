"""What convert checks before it returns a model: outputs did not change, gates have an effect, closed channels can be
cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dampr.gates import Fixed, Gate
from dampr.nn import GatedLayer
from dampr.nn.called import first_argument
from dampr.nn.conv import GatedConv

from . import hooks, inputs, noise
from .compact import CompactionError, compact
from .cost import Cost
from .cutting import CONSTANTS
from .layers.registry import kind_of
from .measure import count_macs
from .summary import distinct_gates
from .units import Units


class ConversionError(RuntimeError):
    """A model could not be converted; it is as it was."""


class UnprovenError(ConversionError):
    """Gated layers fail a check for this model. Gates on its parameters may still work, so convert tries these next."""


class StuckError(ConversionError):
    """Closed channels of some layers cannot be cut. ``reasons``: name of the layer -> why."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(str(reasons))
        self.reasons = reasons


class _Strangers(TorchFunctionMode):
    """Notes whether an operator gets one of these tensors, which are ``id -> name``."""

    def __init__(self, tensors: Mapping[int, str]) -> None:
        super().__init__()
        self.tensors, self.found = tensors, ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for one in value if isinstance(value, (tuple, list)) else (value,):
                self.found = self.found or self.tensors.get(id(one), "")
        return func(*args, **(kwargs or {}))


def check_copies(model: nn.Module, example_inputs: Any) -> None:
    """Raise ConversionError if a copy of the model computes with parameters of the model itself.

    What is cut would not be what is called then, so nothing could be cut, and every comparison would pass.
    """
    strangers = _Strangers({id(p): name for name, p in model.named_parameters()})

    def run(copy: nn.Module, inputs_of_copy: Any) -> None:
        with strangers:
            inputs.evaluate(copy, inputs_of_copy)

    try:
        inputs.on_shapes(model, example_inputs, run)
    except Exception:
        with suppress(Exception):  # other checks say what is wrong with a model that cannot be copied
            if not strangers.found:
                run(inputs.copied(model, example_inputs), example_inputs)
    if strangers.found:
        raise ConversionError(
            f"a copy of {type(model).__name__} computes with {strangers.found!r} of the model itself, so its layers "
            "cannot be cut: expected layers that are reached through attributes, not through global variables or "
            "through functions and objects that copy.deepcopy shares"
        )


def check_unchanged(model: nn.Module, gated: dict[str, Any], before: list[torch.Tensor], example_inputs: Any) -> None:
    """Raise ConversionError if the outputs with fresh gates are not those of ``before``.

    Fresh gates are 1, which changes no bit of a product; but a matrix product may take another path through the library
    for an input with other strides, so a few units in the last place are allowed.
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
    """Whether a closed channel may be a constant other than 0 after this module."""
    if isinstance(module, GatedLayer):
        return isinstance(module, GatedConv)
    return kind_of(module).batch_statistics


def constants_left(trained: nn.Module, units: Units, vectors: list[list[int]], example_inputs: Any) -> str:
    """What layers of a gated model read from closed units: zeros, or something else.

    The model runs once with half of each gate vector closed and once with all gates closed.

    Args:
        trained: a copy with values such as training leaves.
        units: the partition of the model without gates.
        vectors: for each gated layer, the class of each of its gates.
        example_inputs: the inputs.

    Returns: "none" if only zeros; "some" if constants (after a norm without gates, or the half of a sigmoid), which a
    bias can make up for; "stuck" if something varies, or is read with a border of zeros, so that no bias makes up for
    it.
    """
    every, first = ({one for vector in vectors for one in vector[: len(vector) // parts]} for parts in (1, 2))
    half = _read_where_closed(with_gates_at(trained), units, first, example_inputs)  # beside units that are open
    if "stuck" in half:
        return "stuck"
    return "some" if half or _read_where_closed(with_gates_at(trained, 1.0), units, every, example_inputs) else "none"


def _read_where_closed(trial: Any, units: Units, classes: set[int], example_inputs: Any) -> set[str]:
    """What the readers of closed classes read in one run: a set of "some" and "stuck", as in :func:`constants_left`.

    {"some"} if the model does not run with these gates closed.
    """
    found: set[str] = set()

    def look(weight: torch.Tensor, channels: list[int], along: int) -> Any:
        """A forward pre-hook that looks at the ``channels`` which a layer with ``weight`` reads along dimension
        ``along``.
        """

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            """Note whether the layer reads anything but zeros from these channels, and whether that is the same
            everywhere.
            """
            x = getattr(first_argument(args, kwargs), "data", None)
            if not isinstance(x, torch.Tensor) or x.dim() < -along or max(channels) >= x.shape[along]:
                return
            read = x.movedim(along, -1)[..., channels].reshape(-1, len(channels))
            if bool(read.any()):
                # channels whose weights are all 0 have no effect
                read = read[:, weight.detach()[:, channels].transpose(0, 1).flatten(1).any(1)]
            largest = float(read.abs().max()) if read.numel() else 0.0
            if largest:
                same = len(read) > 1 and torch.allclose(read, read[:1].expand_as(read), rtol=1e-3, atol=1e-3 * largest)
                found.add("some" if same and not kind_of(module).pads(module) else "stuck")

        return hook

    handles = []
    for name, module in trial.named_modules():
        for own in ("weight", "weight_ih_l0"):
            full = f"{name}.{own}".lstrip(".")
            if full in units.alias and units.is_column(full, 1):
                weight = getattr(module, own)
                channels = [i for i, one in enumerate(units.classes(full, 1)) if one in classes]
                along = -max(weight.dim() - 1, 1)
                if channels:
                    hook = look(weight, channels, along)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with hooks.removing(handles):
        try:
            inputs.evaluate(trial, example_inputs)
        except RuntimeError:  # some models raise if all values are 0; no budget closes all units at once
            found.add("some")
    return found


def check_half(trained: nn.Module, example_inputs: Any) -> None:
    """Raise UnprovenError unless half of the gates can be closed and cut, with the same outputs and the predicted cost.

    This fails for some models with gates in convolutions, or norms without gates: a closed channel may become a
    constant there (0.5 after a sigmoid, the bias after a norm), and the next convolution cannot make up for it by its
    bias at a border that is padded with zeros.

    Args:
        trained: a copy with values such as training leaves.
        example_inputs: the inputs.
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
    """A copy that shares the parameters, in which the share ``closed`` of each gate vector is set to 0, or only of the
    gate ``only``, if given.
    """
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
    """Raise StuckError if closed channels of layers would stay, because they are constants that no bias makes up for.

    ``trained``: a copy with values such as training leaves.
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
    """name -> why, for layers whose closed channels compaction can neither cut nor leave; of a shared vector the first
    layer.
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
    """Raise UnprovenError if the model reads the weight of a gated layer without calling the layer.

    The gates would then have no effect. Subclasses of ``nn.TransformerEncoderLayer`` do this on torch's fused path.

    Args:
        model: the model, with gates.
        gated: name -> gated layer.
        example_inputs: the inputs.
        called: the layers that were called in a run without torch's fused paths.
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
    """A block that yields the set of names of the layers which are called in it."""
    called: set[str] = set()
    for name, layer in gated.items():  # hooks would switch fused paths off, so ``forward`` is replaced
        layer.forward = recording(name, layer.forward, called)
    try:
        yield called
    finally:
        for layer in gated.values():
            del layer.forward


def recording(name: str, forward: Callable[..., Any], called: set[str]) -> Callable[..., Any]:
    """``forward``, which also enters ``name`` in ``called``."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        """Enter the name and call ``forward``."""
        called.add(name)
        return forward(*args, **kwargs)

    return wrapper
