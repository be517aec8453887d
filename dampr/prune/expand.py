"""expand: a compacted model gets its old sizes back, with zeros where channels were cut.

Also here: the state of an optimizer is cut as its model is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dampr.nn import StackedRNN
from dampr.nn.pruned.transformer import PrunedLayer

from . import heads, inputs, transposed
from .inputs import Model
from .layers.recurrent import without_factors
from .layers.registry import kind_of
from .manifest import check
from .modules import by_name, gates_of
from .places import Places, places_in
from .unit_compact import places_of, restore_sizes
from .units.proof import follow_all
from .wrapped import sees_through

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
# Tensors that are filled with ones, because zeros would give NaN: a variance, and the direction of a weight under
# weight_norm whose length is filled with 0.
FILLED_WITH_ONE = ("running_var", "weight_v", "original1")
_LENGTHS = {"weight_v": "weight_g", "original1": "original0"}
MOST_GROWTH, SMALL = 10_000, 2**24  # how many times larger a tensor may become, unless it stays small


@sees_through
def expand(model: Model) -> Model:
    """A compacted model with the widths that it had before: cut channels come back with weights of 0.

    What it computes stays the same, because nothing reads the channels that come back (weights that read them are 0
    too); its parameters have the shapes of the dense original, for surgery, for comparison, or to load them there.
    Biases that compaction added to make up for constants stay; branches and sublayers that were removed do not come
    back, and gates that became plain factors stay factors.

    Args:
        model: what :func:`dampr.compact` or :func:`dampr.load` returned, with its ``dampr_manifest``; or a model with
            gates that a :class:`dampr.Shrinker` has taken units out of. It is not changed.

    Returns: a new model in the same training mode, without a manifest.

    Raises: ValueError where the manifest is missing or does not fit the model, or where channels were cut in front of a
    LayerNorm or another layer that counts them: a wider one would count those that come back, zeros or not, so no plain
    model of the old widths computes the same.

    >>> import dampr
    >>> x = torch.randn(8, 4)
    >>> gated = dampr.convert(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), example_inputs=x)
    >>> gated[0].gate.log_alpha.data[:3] = -9
    >>> expand(dampr.compact(gated, example_inputs=x))
    Sequential(
      (0): Linear(in_features=4, out_features=6, bias=True)
      (1): ReLU()
      (2): Linear(in_features=6, out_features=2, bias=True)
    )
    """
    if hasattr(model, "dampr_layout"):
        return cast(Model, _with_removed_units(model))
    manifest = getattr(model, "dampr_manifest", None)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("layers"), dict):
        raise ValueError(f"model={type(model).__name__}: expected the dampr_manifest that dampr.compact leaves")
    check(manifest)
    large: Any = inputs.copied(model)
    del large.dampr_manifest
    if "tensors" in manifest:
        return cast(Model, _widened(large, manifest))
    for name in manifest["layers"]:
        if isinstance(layer := _layer(large, name), nn.LayerNorm):
            raise _counts(name, layer)
    conv1d = transposed.to_linear(large)
    attentions = {attention.name: attention for attention in heads.find(large)}
    for name, entry in manifest["layers"].items():
        if name in attentions:
            if "heads" not in entry:
                raise ValueError(f"manifest: layers: {name!r}: {list(entry)}, expected heads of an attention")
            continue  # its layers have entries of their own
        layer = _layer(large, name)
        kind = kind_of(layer)
        for attribute, left in kind.tensors(layer, entry).items():
            parent, _, own = attribute.rpartition(".")
            holder = layer.get_submodule(parent)
            small = getattr(holder, own, layer)
            if small is not None:
                if not isinstance(small, Tensor):
                    found = type(layer).__name__
                    raise ValueError(f"manifest: layers: {name!r} names a {found}, expected a layer with a {own}")
                _check_fits(f"{name}.{attribute}", small, left)
                grown = _grow(small.detach(), left, [float(attribute == "running_var")] * len(left))
                if isinstance(small, nn.Parameter):
                    setattr(holder, own, nn.Parameter(grown, requires_grad=small.requires_grad))
                else:
                    setattr(holder, own, grown)
        factors = large.get_submodule(name)
        if factors is not layer and "units" in entry:
            _grow_factors(factors, entry["units"])
        restored = kind.restored(layer, entry)
        if restored is not layer:
            inputs.replace(large, {layer: restored})
    for name, attention in attentions.items():
        if name in manifest["layers"]:
            attention.resize(
                len(manifest["layers"][name]["heads"]["kept"]), manifest["layers"][name]["heads"]["before"]
            )
    for layer in large.modules():
        if isinstance(layer, PrunedLayer) and layer.is_whole():
            dense: Any = (
                nn.TransformerEncoderLayer
                if isinstance(layer, nn.TransformerEncoderLayer)
                else nn.TransformerDecoderLayer
            )
            layer.__class__ = dense
    transposed.back(large, conv1d)
    return large


def _with_removed_units(model: nn.Module) -> nn.Module:
    """A copy of a gated model in which the closed units that a :class:`dampr.Shrinker` took out are back, as zeros."""
    from .layout import WHOLE, moved

    large: Any = inputs.copied(model)
    moved(large, large.dampr_layout, WHOLE)
    del large.dampr_layout
    whole: nn.Module = large
    return whole


def _widened(large: nn.Module, manifest: dict[str, Any]) -> nn.Module:
    """What :func:`expand` does for a model whose manifest lists tensors and not layers.

    Changes ``large`` in place and returns it. Raises: ValueError as :func:`expand` does.
    """
    for name in manifest.get("counting", []):
        raise _counts(name, _layer(large, name))
    grown: dict[int, Tensor] = {}
    checked = []
    for name in manifest["tensors"]:
        owner, _, own = name.rpartition(".")
        try:
            small = getattr(large.get_submodule(owner), own)
        except AttributeError:
            small = None
        if not isinstance(small, Tensor):
            raise ValueError(f"model={type(large).__name__}: its manifest names a tensor {name!r} that is not there")
        left = [places_in(entry) for entry in places_of(manifest, name)]
        _check_fits(name, small, left)
        checked.append((name, small, left))
    for name, small, left in checked:
        owner, _, own = name.rpartition(".")
        if id(small) not in grown:
            length = places_of(manifest, ".".join(filter(None, (owner, _LENGTHS[own])))) if own in _LENGTHS else left
            wide = _grow(small.detach(), left, [float(own in FILLED_WITH_ONE and one is not None) for one in length])
            grown[id(small)] = (
                nn.Parameter(wide, requires_grad=small.requires_grad) if isinstance(small, nn.Parameter) else wide
            )
        setattr(large.get_submodule(owner), own, grown[id(small)])
    follow_all(large, {large.get_submodule(name.rpartition(".")[0]) for name, _, _ in checked})
    restore_sizes(large, manifest)
    return large


def _counts(name: str, layer: nn.Module) -> ValueError:
    """The error for a layer whose statistics would count what comes back."""
    return ValueError(
        f"{name}: channels that this {type(layer).__name__} counts were cut, and a wider one would count those that "
        "come back; expected a model in which no statistic is computed over a width that was cut"
    )


def _layer(model: nn.Module, name: str) -> Any:
    """The layer ``name``; if a :class:`ScaledRNN` has this name, the layer inside of it.

    Raises: ValueError if there is none.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"model={type(model).__name__}: its manifest names a layer {name!r} that is not there"
        ) from None
    return without_factors(layer)


def _grow_factors(scaled: Any, units: dict[str, Any]) -> None:
    """Give the units of a :class:`ScaledRNN` that come back a factor of 1; ``units``: its part of the manifest."""
    left = [places_in({"before": units["before"], "kept": row}) for row in units["kept"]]
    if len(left) != len(scaled.scale):
        raise ValueError(f"manifest: units: {len(left)} lists of those that are kept, expected {len(scaled.scale)}")
    scaled.scale = torch.stack([_grow(row, [place], [1.0]) for row, place in zip(scaled.scale, left, strict=True)])


def _check_fits(name: str, small: Tensor, places: list[Places]) -> None:
    """Raise ValueError unless the manifest's ``places`` fit the tensor ``small`` and do not make it far too large."""
    for size, place in zip(small.shape, places, strict=False):
        if place is not None and (len(place[1]) != size or not bool(((place[1] >= 0) & (place[1] < place[0])).all())):
            raise ValueError(f"{name}: {size} channels, but its manifest keeps {len(place[1])} of {place[0]}")
    grown = math.prod(size if place is None else place[0] for size, place in zip(small.shape, places, strict=False))
    if grown > max(SMALL, MOST_GROWTH * small.numel()):
        raise ValueError(
            f"{name}: its manifest makes {grown:,} elements of {small.numel():,}, expected at most {MOST_GROWTH} "
            "times as many"
        )


def _grow(small: Tensor, places: list[Places], fills: Sequence[float]) -> Tensor:
    """``small`` with its cut indices back; the new elements along dimension d have the value ``fills[d]``."""
    for dim, place in enumerate(places):
        if place is not None:
            size, kept = place
            shape = [*small.shape[:dim], size, *small.shape[dim + 1 :]]
            small = small.new_full(shape, fills[dim]).index_copy(dim, kept.to(small.device), small)
    return small


def shrink(large: Tensor, places: list[Places]) -> Tensor:
    """``large`` without its cut indices: the inverse of :func:`_grow`."""
    for dim, place in enumerate(places):
        if place is not None:
            large = large.index_select(dim, place[1].to(large.device))
    return large


def optimizers_of(given: Optimizers) -> list[torch.optim.Optimizer]:
    """The argument ``optimizer`` (None, one or several) as a list. Raises TypeError for anything else."""
    found: list[Any] = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    for one in found:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(f"optimizer={one!r:.80}: expected a torch.optim.Optimizer, or a sequence of them")
    return found


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if the state of ``optimizer`` cannot be cut together with its parameters.

    State can be cut if each tensor in it has one element, has the shape of its parameter, or has that shape with one or
    two dimensions summed out or of size 1. State on other ranks, or in an optimizer within, cannot be cut.
    """
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise ValueError(
            "optimizer: ZeroRedundancyOptimizer keeps its state on several ranks, where it cannot be cut; expected "
            "None, and a new one after compaction"
        )
    inner = [one for one in vars(optimizer).values() if isinstance(one, torch.optim.Optimizer)]
    if any(one.state is not optimizer.state for one in inner):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} has {type(inner[0]).__name__} in it, whose own state "
            "would not be cut; expected None, and a new one after compaction"
        )
    for key, value in optimizer.state.items():
        if not isinstance(key, Tensor) and any(
            isinstance(t, Tensor) and t.numel() > 1 for t in pytree.tree_leaves(value)
        ):
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} keeps {key!r} for all parameters together, which cannot be cut "
                "with them; make a new optimizer after compaction"
            )
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    continue
                held = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.numel() > 1]
                if held and (not isinstance(value, Tensor) or kept_dims(value.shape, p.shape) is None):
                    shapes = [tuple(t.shape) for t in held]
                    raise ValueError(
                        f"optimizer: {type(optimizer).__name__} keeps {key!r} of shape {shapes[0]} for a parameter of "
                        "shape "
                        f"{tuple(p.shape)}, which cannot be cut with it; make a new optimizer after compaction"
                    )


class PassedChecks:
    """Runs a check of an optimizer again only if the optimizer has changed.

    It counts as changed if it is another object or has another number of parameters or of entries of state. A check
    walks over all parameters, and the callers call it at every step of a training.
    """

    def __init__(self) -> None:
        # its numbers of parameters and of entries of state when it passed
        self._passed: WeakKeyDictionary[torch.optim.Optimizer, tuple[int, int]] = WeakKeyDictionary()

    def __reduce__(self) -> Any:
        return PassedChecks, ()  # what has passed is of this process

    def run(self, optimizer: torch.optim.Optimizer, check: Callable[[torch.optim.Optimizer], None]) -> None:
        """Call ``check``, unless it has returned for this optimizer as it is now."""
        now = sum(len(group["params"]) for group in optimizer.param_groups), len(optimizer.state)
        if self._passed.get(optimizer) != now:
            check(optimizer)
            self._passed[optimizer] = now

    def forget(self) -> None:
        """Forget what has passed, so that every check runs again."""
        self._passed.clear()


def check_trains(optimizer: torch.optim.Optimizer, model: nn.Module, name: str = "model") -> None:
    """Raise ValueError if ``optimizer`` holds no parameter of ``model``; ``name`` is what the message calls the
    model.
    """
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"optimizer: it holds no parameter of {name}; expected the one that trains it")


def kept_dims(state: Sequence[int], shape: Sequence[int]) -> list[int | None] | None:
    """Which dimension of a parameter each dimension of a tensor of its optimizer state corresponds to.

    Factored second moments (Adafactor) lack one dimension of the parameter, or have size 1 there.

    Args:
        state, shape: the shapes of the state tensor and of the parameter.

    Returns: a list with an entry for each dimension of the state, None for one of size 1; None if the shapes do not
    tell.
    """
    if len(state) == len(shape) and all(s in (1, n) for s, n in zip(state, shape, strict=True)):
        return [d if s == n else None for d, (s, n) in enumerate(zip(state, shape, strict=True))]
    if len(shape) > 1 and len(state) == len(shape) - 1:
        for gone in (len(shape) - 1, len(shape) - 2):
            if list(state) == [n for d, n in enumerate(shape) if d != gone]:
                return [d for d in range(len(shape)) if d != gone]
    return None


def _cut_state(value: Any, shape: Sequence[int], places: list[Places]) -> Any:
    """A value from the state of a parameter that had ``shape``, cut as the parameter was, by ``places``."""
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return value
    dims = kept_dims(value.shape, shape)
    return (
        value if dims is None else shrink(value, [None if d is None or d >= len(places) else places[d] for d in dims])
    )


def carry_over(optimizer: torch.optim.Optimizer, model: nn.Module, small: Any) -> None:
    """Make ``optimizer``, which trained ``model``, train ``small``: the groups stay, and the state is cut.

    Parameters that are gone leave their group. An empty group stays, because schedulers count groups. Parameters of
    other models stay in their group. A bias that compaction has added joins the group of its layer's weight, without
    state.

    Args:
        model: the model with gates; not changed.
        small: the compacted model, with its manifest.

    Raises: ValueError, before anything changes, if the state cannot be cut.
    """
    check_state(optimizer)
    places: dict[str, list[Places]] = {}
    for name, entry in {} if "tensors" in small.dampr_manifest else small.dampr_manifest["layers"].items():
        layer = _layer(small, name)
        for attribute, each in kind_of(layer).tensors(layer, entry).items():
            places[f"{name}.{attribute}"] = each
    for name in small.dampr_manifest.get("tensors", {}):
        places[name] = [places_in(entry) for entry in places_of(small.dampr_manifest, name)]
    for name, entry in small.dampr_manifest.get("parameters", {}).items():
        places[name] = [*[None] * entry["dim"], places_in(entry)]
    old = dict(model.named_parameters(remove_duplicate=False))
    new = dict(small.named_parameters(remove_duplicate=False))
    former = {name: name for name in new} | _renamed(small)
    target = {id(old[former[name]]): name for name in reversed(new) if former[name] in old}
    own = {id(p) for p in (*old.values(), *(p for gate in gates_of(model) for p in gate.former))}
    state: dict[Any, Any] = {key: values for key, values in optimizer.state.items() if id(key) not in own}
    groups: list[list[Tensor]] = []
    for group in optimizer.param_groups:
        others = [p for p in group["params"] if id(p) not in own]
        names = [target[id(p)] for p in group["params"] if id(p) in target]
        for name in names:
            state[new[name]] = {
                key: _cut_state(value, old[former[name]].shape, places.get(name, []))
                for key, value in optimizer.state.get(old[former[name]], {}).items()
            }
        added = [bias for name in names if (bias := name.removesuffix("weight") + "bias") in new and bias not in old]
        groups.append([*(new[name] for name in (*names, *added)), *others])
    for group, params in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = params
    optimizer.state.clear()
    optimizer.state.update({p: values for p, values in state.items() if values})


def _renamed(small: nn.Module) -> dict[str, str]:
    """For each parameter in a :class:`StackedRNN` its name in the recurrent layer that the StackedRNN replaced."""
    stacked = [(f"{prefix}." if prefix else "", m) for prefix, m in by_name(small, StackedRNN).items()]
    return {prefix + name: prefix + before for prefix, m in stacked for name, before in m.former_names().items()}
