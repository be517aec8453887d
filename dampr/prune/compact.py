"""compact: a gated model becomes a smaller plain one, and proves on the example inputs that it computes the same."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from dampr._version import __version__
from dampr.nn import GatedLayer

from . import graph, inputs


class CompactionError(RuntimeError):
    """The compacted model does not compute what the gated one computes; nothing was changed."""


def compact(model: nn.Module, *, example_inputs: Any, atol: float = 1e-5, rtol: float = 1e-5) -> nn.Module:
    """A smaller plain model without gates that computes what ``model`` computes in evaluation mode.

    Gate values are folded into the weights, closed units are cut out with everything that depends on them (torch-pruning slices), and what
    a closed unit still contributes as a constant (the half of a sigmoid, the shift of a BatchNorm) moves into the bias of the layer that
    reads it. Then both models run on the example inputs.

    Args:
        model: a model with gated layers; it is not changed.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, with at least two different rows if constants are
            to be told apart.
        atol, rtol: how far outputs may differ: |masked - compacted| <= atol + rtol |masked|.

    Returns: a new model of plain ``torch.nn`` layers, in the training mode of ``model``. Its attribute ``dampr_manifest`` (plain data)
    lists the kept indices of each layer, and why a closed unit could not be cut.

    Raises: CompactionError naming the first layer that differs; TypeError or ValueError that names the argument.
    """
    inputs.check(example_inputs)
    names = [name for name, module in model.named_modules() if isinstance(module, GatedLayer)]
    if not names:
        raise ValueError(f"model={type(model).__name__}: expected gated layers in it (dampr.convert puts them there)")
    if names == [""]:
        raise ValueError("model is a gated layer itself: nothing around it could be cut; use its to_dense()")
    small = copy.deepcopy(model)
    closed: dict[bool, dict[nn.Module, set[int]]] = {True: {}, False: {}}  # writes -> layer -> closed channels
    for name in names:
        gated = small.get_submodule(name)
        assert isinstance(gated, GatedLayer)
        dense = gated.to_dense()
        parent, _, child = name.rpartition(".")
        setattr(small.get_submodule(parent), child, dense)
        closed[gated.granularity == "output"][dense] = set((~gated.gate.is_open()).nonzero().flatten().tolist())
    kept, notes = _cut(small, closed, example_inputs)
    difference = _prove(model, small, kept, example_inputs, atol, rtol)
    small.dampr_manifest = _manifest(model, small, kept, notes, difference)  # type: ignore[assignment]
    return small


Kept = dict[tuple[nn.Module, bool], Tensor]  # (layer, writes) -> kept channels, by their indices in the original layer


def _cut(small: nn.Module, closed: dict[bool, dict[nn.Module, set[int]]], example_inputs: Any) -> tuple[Kept, dict[str, str]]:
    kept: Kept = {}
    notes: dict[str, str] = {}
    names = {module: name for name, module in small.named_modules()}
    dependencies = graph.build(small, example_inputs)
    for writes, layers in closed.items():
        for layer, indices in layers.items():
            if not indices:
                continue
            if (layer, writes) in kept:
                continue  # an earlier root of the same width has cut it already
            width = _width(layer, writes)
            if layer not in dependencies.module2node:
                notes[names[layer]] = f"{len(indices)} closed units stay: the layer is not reached from example_inputs"
                continue
            found = graph.group(dependencies, layer, writes, range(width))
            members, reason = graph.members(dependencies, found)
            dead = set() if reason else _removable(members, closed)
            if len(dead) == width:
                dead.discard(min(dead))  # a layer keeps one unit; its folded gate is zero
            if len(dead & indices) < len(indices):
                notes[names[layer]] = (
                    f"{len(indices - dead)} closed units stay: {reason or 'other layers of the same width still use them'}"
                )
            if not dead:
                continue
            group = graph.group(dependencies, layer, writes, sorted(dead))
            cut, _ = graph.members(dependencies, group)
            _fold_constants(small, [(m.module, m.channels) for m in cut if not m.writes], names, example_inputs)
            for member in cut:
                before = _width(member.module, member.writes)
                remaining = kept.get((member.module, member.writes), torch.arange(before))
                mask = torch.ones(before, dtype=torch.bool)
                mask[member.channels] = False
                kept[member.module, member.writes] = remaining[mask]
            frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
            group.prune(record_history=False)
            for name, p in small.named_parameters():
                p.requires_grad_(name not in frozen)
    return kept, notes


def _width(layer: nn.Module, writes: bool) -> int:
    """How many channels a layer writes or reads, from its weight of shape (written, read, ...)."""
    return int(cast(Tensor, layer.weight).shape[0 if writes else 1])


def _removable(members: list[graph.Member], closed: dict[bool, dict[nn.Module, set[int]]]) -> set[int]:
    """Channels of a width that nobody writes (all producers closed) or nobody reads (all consumers closed)."""
    unwritten = {r for m in members for r in m.root}
    unread = set(unwritten)
    for member in members:
        shut = closed[member.writes].get(member.module, set())
        alive = {r for i, r in zip(member.channels, member.root, strict=True) if i not in shut}
        if member.writes:
            unwritten -= alive
        else:
            unread -= alive
    return unwritten | unread


def _fold_constants(small: nn.Module, readers: list[tuple[nn.Module, list[int]]], names: dict[nn.Module, str], example_inputs: Any) -> None:
    """Move what the channels about to be cut contribute to their readers into the readers' biases; it has to be the same for every row."""
    seen: dict[nn.Module, Tensor] = {}
    hooks = [layer.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0].detach())) for layer, _ in readers]
    with inputs.evaluating(small):
        inputs.run(small, example_inputs)
    for hook in hooks:
        hook.remove()
    for layer, index in readers:
        if not isinstance(layer, nn.Linear):
            continue  # the proof decides
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        rows = seen[layer][..., index].reshape(-1, len(index)).to(wide) @ layer.weight.detach()[:, index].t().to(wide)
        if not rows.numel() or not rows.any():
            continue
        constant = rows[0]
        if not torch.allclose(rows, constant.expand_as(rows), rtol=1e-5, atol=1e-6):
            raise CompactionError(f"{names[layer]}: closed units reach it with values that differ between rows, so they cannot be cut")
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0]), requires_grad=layer.weight.requires_grad)
        with torch.no_grad():
            layer.bias.add_(constant.to(layer.bias.dtype))


def _prove(model: nn.Module, small: nn.Module, kept: Kept, example_inputs: Any, atol: float, rtol: float) -> float:
    masked, masked_layers = _outputs(model, example_inputs)
    compacted, layers = _outputs(small, example_inputs)
    shapes = [tuple(t.shape) for t in masked], [tuple(t.shape) for t in compacted]
    if shapes[0] != shapes[1]:
        raise CompactionError(f"output shapes changed from {shapes[0]} to {shapes[1]}")
    gaps = [float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(masked, compacted, strict=True)]
    if all(torch.allclose(b, a, rtol=rtol, atol=atol) for a, b in zip(masked, compacted, strict=True)):
        return max(gaps, default=0.0)
    modules = dict(small.named_modules())
    for name, after in layers.items():
        before = masked_layers.get(name)
        indices = kept.get((modules[name], True))
        if before is not None and indices is not None:
            before = before[..., indices] if isinstance(modules[name], nn.Linear) else before[:, indices]
        if before is not None and (before.shape != after.shape or not torch.allclose(after, before, rtol=rtol, atol=atol)):
            raise CompactionError(
                f"layer {name!r} is the first whose output differs; the model's outputs differ by up to {max(gaps):.3g} "
                f"(atol={atol:g}, rtol={rtol:g})"
            )
    raise CompactionError(f"the model's outputs differ by up to {max(gaps):.3g} (atol={atol:g}, rtol={rtol:g}), no single layer's do")


def _outputs(model: nn.Module, example_inputs: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The model's output tensors, and those of each weighted layer in the order of first calls; in evaluation mode."""
    layers: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if hasattr(module, "weight"):
            hooks.append(
                module.register_forward_hook(
                    lambda m, a, out, name=name: layers.setdefault(name, out.detach()) if isinstance(out, Tensor) else None
                )
            )
    try:
        with inputs.evaluating(model):
            return inputs.tensors(inputs.run(model, example_inputs)), layers
    finally:
        for hook in hooks:
            hook.remove()


def _manifest(model: nn.Module, small: nn.Module, kept: Kept, notes: dict[str, str], difference: float) -> dict[str, Any]:
    names = {module: name for name, module in small.named_modules()}
    layers: dict[str, dict[str, Any]] = {}
    for (module, writes), indices in kept.items():
        before = _width(model.get_submodule(names[module]), writes)
        layers.setdefault(names[module], {})["out" if writes else "in"] = {"before": before, "kept": indices.tolist()}
    return {"dampr": __version__, "torch": torch.__version__, "layers": layers, "closed_but_kept": notes, "max_abs_difference": difference}
