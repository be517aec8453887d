"""expand: a compacted model with its old sizes, with zeros where channels were cut; and the state of an optimizer, cut
with its model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dampr.nn import PrunedMultiheadAttention, Scale, ScaledRNN, StackedRNN
from dampr.nn.pruned.narrowed_rnn import arguments_of
from dampr.nn.pruned.transformer import PrunedLayer

from . import graph, heads, inputs, transposed
from .inputs import Model
from .manifest import Places, check, places_in
from .modules import by_name, gates_of
from .unit_compact import places_of, restore_sizes
from .units.proof import follow_all
from .wrapped import sees_through

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
_NORMS = nn.modules.batchnorm._NormBase
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
    LayerNorm: a wider one would count those that come back, zeros or not, so no plain model of the old widths computes
    the same.

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
    for name, entry in manifest["layers"].items():
        if isinstance(_layer(large, name), nn.LayerNorm):
            before = entry.get("out", {}).get("before")
            raise ValueError(
                f"{name}: channels in front of this LayerNorm were cut ({before} before), and a wider one would "
                "count those that come back; expected a model whose residual stream has kept its width"
            )
    conv1d = transposed.to_linear(large)
    attentions = {attention.name: attention for attention in heads.find(large)}
    for name, entry in manifest["layers"].items():
        if name in attentions:
            if "heads" not in entry:
                raise ValueError(f"manifest: layers: {name!r}: {list(entry)}, expected heads of an attention")
            continue  # its layers have entries of their own
        layer = _layer(large, name)
        for attribute, left in tensors_of(layer, entry).items():
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
        if isinstance(layer, StackedRNN):
            inputs.replace(large, {layer: _dense_recurrent(layer, entry)})
            continue
        for attribute, size in sizes_in(layer, entry).items():
            setattr(layer, attribute, size)
        if isinstance(layer, nn.RNNBase):
            layer._init_flat_weights()
        if isinstance(layer, PrunedMultiheadAttention):
            inputs.replace(large, {layer: _dense_attention(layer)})
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
    """A copy of a gated model with the closed units back, as zeros, that a :class:`dampr.Shrinker` took out."""
    from .layout import WHOLE, moved

    large: Any = inputs.copied(model)
    moved(large, large.dampr_layout, WHOLE)
    del large.dampr_layout
    whole: nn.Module = large
    return whole


def _widened(large: nn.Module, manifest: dict[str, Any]) -> nn.Module:
    """What :func:`expand` does for a model whose units were cut out of its tensors, whatever layers hold them.

    Changes ``large`` in place and returns it.

    Raises: ValueError as :func:`expand` does.
    """
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


def _dense_attention(grown: PrunedMultiheadAttention) -> nn.MultiheadAttention:
    """An ``nn.MultiheadAttention`` with the parameters of ``grown``, whose parameters have all heads again."""
    how = grown.dropout, grown.bias, grown.add_bias_kv, grown.add_zero_attn, grown.kdim, grown.vdim, grown.batch_first
    whole = nn.MultiheadAttention(grown.embed_dim, grown.num_heads, *how, device="meta")
    for name, p in grown.named_parameters():
        parent, _, own = name.rpartition(".")
        setattr(whole.get_submodule(parent), own, p)
    return whole.train(grown.training)


def _dense_recurrent(grown: StackedRNN, entry: dict[str, Any]) -> nn.RNNBase:
    """One ``nn`` recurrent layer with the parameters of ``grown``, whose parts have equal widths again."""
    first: Any = grown.rows()[0]
    sizes = {**sizes_in(first, entry), "num_layers": len(grown.layers), "bidirectional": grown.bidirectional}
    whole: nn.RNNBase = type(first)(**arguments_of(first) | sizes, device="meta")
    whole.dropout = grown.dropout
    own = dict(grown.named_parameters())
    for name, former in grown.former_names().items():
        setattr(whole, former, own[name])
    whole._init_flat_weights()
    return whole.train(grown.training)


def _layer(model: nn.Module, name: str) -> Any:
    """The layer ``name``, inside of a :class:`ScaledRNN` if there is one. Raises ValueError if it is not there."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"model={type(model).__name__}: its manifest names a layer {name!r} that is not there"
        ) from None
    return layer.rnn if isinstance(layer, ScaledRNN) else layer


def tensors_of(layer: nn.Module, entry: dict[str, Any]) -> dict[str, list[Places]]:
    """What is left of each dimension of each tensor of ``layer``, by the name of the tensor, from its manifest entry.

    None stands for a dimension that was not cut.
    """
    written, read = (places_in(entry.get(side)) for side in ("out", "in"))
    if isinstance(layer, (nn.RNNBase, StackedRNN)):
        return dict(_of_recurrent(layer, entry.get("units"), read))
    if isinstance(layer, PrunedMultiheadAttention):
        return _of_attention(layer, entry.get("heads"), written, read)
    if "heads" in entry:
        return {}
    if isinstance(layer, nn.Embedding):
        return {"weight": [None, written]}
    if isinstance(layer, Scale):
        return {"scale": [written]}
    if isinstance(layer, (_NORMS, nn.LayerNorm, nn.PReLU)) or _was_depthwise(layer, entry):
        return {name: [written] for name in ("weight", "bias", "running_mean", "running_var") if hasattr(layer, name)}
    return {"weight": [read, written] if graph.is_transposed(layer) else [written, read], "bias": [written]}


def _was_depthwise(layer: nn.Module, entry: dict[str, Any]) -> bool:
    """Whether ``layer`` is a depthwise convolution, or what is left of one that has lost all but one channel."""
    return graph.is_depthwise(layer) or (isinstance(layer, nn.modules.conv._ConvNd) and "groups" in entry)


def _of_attention(
    layer: PrunedMultiheadAttention, heads: dict[str, Any] | None, written: Places, read: Places
) -> dict[str, list[Places]]:
    """As :func:`tensors_of`, for an attention with heads cut.

    heads: the entry of its heads; None if no head was cut. written, read: what is left of its output and input
    channels.

    Raises: ValueError if the entry does not fit the layer.
    """
    one: Places = None
    three: Places = None
    if heads is not None:
        if (heads["before"], len(heads["kept"])) != (layer.num_heads, len(layer.heads)):
            own = f"{len(layer.heads)} of {layer.num_heads}"
            raise ValueError(f"manifest: heads={heads!r:.80}, expected {own}, those of the layer")
        size = layer.num_heads * layer.head_dim
        rows = torch.arange(size).view(int(heads["before"]), -1)[heads["kept"]].flatten()
        one, three = (size, rows), (3 * size, torch.cat([rows + i * size for i in range(3)]))
    return {
        "in_proj_weight": [three, read],
        "in_proj_bias": [three],
        **{f"{name}_proj_weight": [one] for name in "qkv"},
        **{name: [None, None, one] for name in ("bias_k", "bias_v")},
        "out_proj.weight": [written, one],
        "out_proj.bias": [written],
    }


def _of_recurrent(
    layer: nn.RNNBase | StackedRNN, units: dict[str, Any] | None, read: Places
) -> Iterator[tuple[str, list[Places]]]:
    """As :func:`tensors_of`, for a recurrent layer.

    units: the entry of its units; None if no unit was cut. read: what is left of its input features.

    Raises: ValueError if the entry does not fit the layer.
    """
    each = 1 + layer.bidirectional
    if units is not None and len(units["kept"]) != len(_rows(layer)):
        found = f"{len(units['kept'])} lists of those that are kept"
        raise ValueError(f"manifest: units: {found}, expected {len(_rows(layer))}, one for each layer")
    for row, (part, names) in enumerate(_rows(layer)):
        own = below = gates = None
        if units is not None:
            size = units["before"]
            rows = [place[1] for r in units["kept"] if (place := places_in({"before": size, "kept": r})) is not None]
            own = size, rows[row]
            weight = part.get_parameter(names[0].rpartition(".")[2])
            count = weight.shape[0] // part.hidden_size
            if not part.proj_size:
                gates = count * size, torch.cat([rows[row] + i * size for i in range(count)])
            if row >= each:
                first = row // each * each - each
                below = each * size, torch.cat([rows[first + i] + i * size for i in range(each)])
        for name in names:
            if "weight_ih" in name:
                yield name, [gates, read if row < each else below]
            elif "weight_hh" in name:
                yield name, [gates, own]
            elif "weight_hr" in name:
                yield name, [own, None]
            else:
                yield name, [gates]


def _rows(layer: nn.RNNBase | StackedRNN) -> list[tuple[nn.RNNBase, list[str]]]:
    """For each layer and direction, the ``nn`` module that holds it and the names of its weights in ``layer``."""
    if isinstance(layer, nn.RNNBase):
        return [(layer, names) for names in layer._all_weights]
    names = list(layer.former_names())
    count = len(names) // len(layer.rows())
    return [(part, names[row * count : (row + 1) * count]) for row, part in enumerate(layer.rows())]


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


def sizes_in(layer: Any, entry: dict[str, Any]) -> dict[str, int]:
    """The size attributes of ``layer`` and the values that they had before the cut, from its manifest entry."""
    written, read = (entry[side]["before"] if side in entry else None for side in ("out", "in"))
    if "heads" in entry:
        return {}
    if isinstance(layer, nn.RNNBase):
        units = entry["units"]["before"] if "units" in entry else None
        found = {"input_size": read, "proj_size" if layer.proj_size else "hidden_size": units}
    elif isinstance(layer, nn.Linear):
        found = {"out_features": written, "in_features": read}
    elif _was_depthwise(layer, entry):
        found = dict.fromkeys(("out_channels", "in_channels", "groups"), written)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        found = {"out_channels": written, "in_channels": read}
    elif isinstance(layer, nn.Embedding):
        found = {"embedding_dim": written}
    elif isinstance(layer, nn.PReLU):
        found = {"num_parameters": written}
    else:
        found = {} if isinstance(layer, Scale) else {"num_features": written}
    return {name: size for name, size in found.items() if size is not None}


def optimizers_of(given: Optimizers) -> list[torch.optim.Optimizer]:
    """One optimizer or several as a list. Raises TypeError for anything else."""
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


def check_trains(optimizer: torch.optim.Optimizer, model: nn.Module, name: str = "model") -> None:
    """Raise ValueError if ``optimizer`` has no parameter of ``model``."""
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"optimizer: it holds no parameter of {name}; expected the one that trains it")


def kept_dims(state: Sequence[int], shape: Sequence[int]) -> list[int | None] | None:
    """For each dimension of a state tensor the dimension of the parameter to which it corresponds; None for a size of
    1.

    Returns None if the shapes do not tell. Factored second moments (Adafactor) lack one dimension, or have size 1 in
    its place.
    """
    if len(state) == len(shape) and all(s in (1, n) for s, n in zip(state, shape, strict=True)):
        return [d if s == n else None for d, (s, n) in enumerate(zip(state, shape, strict=True))]
    if len(shape) > 1 and len(state) == len(shape) - 1:
        for gone in (len(shape) - 1, len(shape) - 2):
            if list(state) == [n for d, n in enumerate(shape) if d != gone]:
                return [d for d in range(len(shape)) if d != gone]
    return None


def _cut_state(value: Any, shape: Sequence[int], places: list[Places]) -> Any:
    """A state value of a parameter of ``shape``, cut as the parameter is."""
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return value
    dims = kept_dims(value.shape, shape)
    return (
        value if dims is None else shrink(value, [None if d is None or d >= len(places) else places[d] for d in dims])
    )


def carry_over(optimizer: torch.optim.Optimizer, model: nn.Module, small: Any) -> None:
    """Make ``optimizer``, which trained ``model``, train ``small``: the same groups of parameters, with the state cut
    likewise.

    Parameters that are gone leave their group; an empty group stays, because schedulers count groups. Parameters of
    other models stay in their group. A bias that compaction has added joins the group of its layer's weight, without
    state.

    Raises: ValueError, before anything changes, if the state cannot be cut.
    """
    check_state(optimizer)
    places: dict[str, list[Places]] = {}
    for name, entry in {} if "tensors" in small.dampr_manifest else small.dampr_manifest["layers"].items():
        for attribute, each in tensors_of(_layer(small, name), entry).items():
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
