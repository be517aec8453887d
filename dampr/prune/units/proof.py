"""What a trace does not prove: that a smaller model has the same partition,
and that closed units are zero where they are read.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dampr.nn.computed import at_rest

from .. import inputs, transposed
from . import tracer
from .ledger import Ledger
from .partition import NOTHING_TO_CHOOSE, Units, solve
from .sizes import Size, follow


def cut(model: nn.Module, units: Units, classes: Iterable[int], sizes: Iterable[Size] = ()) -> nn.Module:
    """Delete the indices of these classes from every parameter and buffer of ``model``, in place; returns ``model``.

    Sizes that modules of torch.nn keep beside their parameters follow, and of what other code keeps ``sizes``. With any
    other such number the model does not run, or gives another partition, which :func:`retrace` finds.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    old = dict(named)
    new: dict[int, Tensor] = {}
    for name, dims in units.indices(classes).items():
        left = old[name].detach()
        for dim, gone in dims.items():
            keep = np.delete(np.arange(left.shape[dim]), gone)
            left = left.index_select(dim, torch.from_numpy(keep).to(left.device))
        parameter = isinstance(old[name], nn.Parameter)
        new[id(old[name])] = nn.Parameter(left, requires_grad=old[name].requires_grad) if parameter else left
    follow_all(model, substitute(model, new), units.within)
    follow(model, sizes)
    return model


def follow_all(model: nn.Module, changed: Collection[nn.Module], within: Iterable[str] = ()) -> None:
    """:func:`follow_parameters` of the modules of ``model`` that have ``changed``, and of those whose weights are
    computed.

    ``within``: the weights of convolutions that keep the number of their groups.
    """
    owners = {model.get_submodule(name.rpartition(".")[0]) for name in within}
    with at_rest(model):
        for module in model.modules():
            if module in changed or parametrize.is_parametrized(module):
                follow_parameters(module, module in owners)


def substitute(model: nn.Module, new: Mapping[int, Tensor]) -> set[nn.Module]:
    """Put tensors in the place of parameters and buffers, by the ids of these, under every name.

    Returns the modules that have some.
    """
    changed: set[nn.Module] = set()
    for module in model.modules():
        tables: tuple[dict[str, Any], dict[str, Any]] = module._parameters, module._buffers
        for table in tables:
            found = {name: new[id(t)] for name, t in table.items() if t is not None and id(t) in new}
            table.update(found)
            changed.update([module] if found else [])
    return changed


def follow_parameters(module: Any, keeps_groups: bool = False) -> None:
    """Set the sizes that a module of torch.nn keeps to those of its parameters."""
    weight = getattr(module, "weight", None)
    if weight is None:
        weight = getattr(module, "running_mean", None)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        read, recurrent = [p for name, p in module.named_parameters() if "weight" in name][:2]
        module.input_size = read.shape[1]
        if getattr(module, "proj_size", 0):
            module.hidden_size, module.proj_size = read.shape[0] // 4, recurrent.shape[1]
        else:
            module.hidden_size = recurrent.shape[1]
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        into, out = (0, 1) if module.transposed else (1, 0)
        if module.groups > 1 and not keeps_groups:
            module.groups = (
                weight.shape[0] * module.groups // (module.in_channels if module.transposed else module.out_channels)
            )
        sizes = {into: "in_channels", out: "out_channels"}
        for dim, name in sizes.items():
            setattr(module, name, weight.shape[dim] * (module.groups if dim == 1 else 1))
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif transposed.is_conv1d(module):
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = weight.shape[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = max(1, weight.shape[0] * module.num_groups // module.num_channels)  # one group has them all
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]


def half(units: Units, families: Sequence[Sequence[int]], seed: int = 0) -> list[int]:
    """A random half of the classes of each family, but of every dimension at least one class stays.

    Of several families one loses half, the next one less, another one with another ``seed``: what code keeps for
    several of them in one number is found so.
    """
    generator = random.Random(seed)
    left = {
        (name, dim): len(set(units.classes(name, dim))) for name, dims in units.origin.items() for dim, _, _ in dims
    }
    chosen = []
    for number, family in enumerate(families):
        most = len(family) // 2
        count = most - (number + seed) % (most // 2 + 1)
        for one in generator.sample(list(family), count):
            places = {(member.name, member.dim) for member in units.members[one]}
            if all(left[place] > 1 for place in places):
                chosen.append(one)
                for place in places:
                    left[place] -= 1
    return chosen


@dataclass(frozen=True)
class Differs:
    """What a cut model does that the whole one does not. ``runs``: whether it runs at all."""

    text: str
    runs: bool


def retrace(
    model: nn.Module,
    units: Units,
    example_inputs: Any,
    families: Sequence[Sequence[int]],
    more_inputs: Iterable[Any] = (),
) -> dict[int, Differs]:
    """Of the classes of these families, those that cannot be cut though the trace calls them free, and what is wrong.

    Half of each family is cut in a copy of ``model``, which is traced in the same modes: its units have to be the
    classes that are left, and its operators must have been given the same numbers. (A literal half, ``roll``, ``view(B,
    N, 4, -1)`` and ``h.shape[1]`` used as a factor are found so.) Where it is not so, halves of the families are tried.
    ``example_inputs``, ``more_inputs``: those of the trace.

    Raises what copying the model raises.
    """
    if not families:
        return {}
    found: dict[int, Differs] = {}
    todo, samples = [list(families)], [example_inputs, *more_inputs]
    while todo:
        some = todo.pop()
        fault = differs(model, units, samples, half(units, some))
        if fault is not None and len(some) == 1:
            found |= dict.fromkeys(some[0], fault)
        elif fault is not None:
            todo += [some[: len(some) // 2], some[len(some) // 2 :]]
    return found


def differs(
    model: nn.Module, units: Units, samples: list[Any], classes: list[int], sizes: Iterable[Size] = ()
) -> Differs | None:
    """What a copy of ``model`` without these classes does that the whole does not, by a trace of it;
    None where nothing differs.
    """
    small = cut(inputs.twin(model), units, classes, sizes)
    ledger = Ledger.of(small, units.within)
    try:
        for mode in units.modes:
            for sample in samples:
                tracer.run_as_fits(ledger, small, sample, training=mode)
    except Exception as error:
        return Differs(
            "without half of its channels the model does not run, so something beside its layers has that width "
            f"({error})",
            False,
        )
    if units.numbers != ledger.numbers:
        pairs = zip(units.numbers, ledger.numbers, strict=False)
        a, b = next(((a, b) for a, b in pairs if a != b), (("more", "operators"), ("or", "fewer")))
        return Differs(
            f"a number that the code computes follows its width ({a[0]} with {a[1]}, without half of its channels "
            f"{b[1]})",
            True,
        )
    other = next((name for name, modes in units.reached.items() if ledger.reached.get(name) != modes), None)
    if other is not None:
        return Differs(
            f"without half of its channels the model takes another way, on which it does not read {other!r}", True
        )
    return _regrouped(units, solve(ledger, units.modes), set(classes))


def _regrouped(units: Units, again: Units, gone: set[int]) -> Differs | None:
    """Whether the cut model unites units that the whole one keeps apart, parts some of one class,
    or fixes some that were free.
    """
    alone, free = _alone(units, gone), set(units.free)
    forward: dict[int, int] = {}
    back: dict[int, int] = {}
    for name, dims in units.origin.items():
        for dim, _, _ in dims:
            left = [one for one in units.classes(name, dim) if one not in gone]
            new = again.classes(name, dim)
            if len(new) != len(left) and len(left) > 1:
                return Differs(f"of dimension {dim} of {name!r} {len(new)} units are left, expected {len(left)}", True)
            for one, other in zip(left, new, strict=False):
                if one in alone or one not in free:
                    continue
                reason = again.fixed.get(other)
                if forward.setdefault(one, other) != other or back.setdefault(other, one) != one:
                    return Differs(f"without half of its channels others of {name!r} go together", True)
                if reason is not None and reason.kind not in NOTHING_TO_CHOOSE:
                    return Differs(f"without half of its channels {reason}", True)
    return None


def _alone(units: Units, gone: set[int]) -> set[int]:
    """Classes that are all that is left of a dimension, of which another trace has less evidence."""
    found: set[int] = set()
    for name, dims in units.origin.items():
        for dim, _, _ in dims:
            left = set(units.classes(name, dim)) - gone
            found |= left if len(left) == 1 else set()
    return found


def probe(masked: nn.Module, units: Units, classes: Iterable[int], example_inputs: Any) -> dict[int, str]:
    """Of classes that are closed in ``masked``, those that are not 0 where a weight or a sum reads them: "constant" or
    "varies".

    ``masked`` has the parameters' shapes of the model that ``units`` is of, and is run once on real tensors in
    evaluation mode. A constant can be taken in by the reader's bias, where no zero padding stands between; what varies
    makes the class useless to gate there.
    """
    ledger = Ledger.of(masked, units.within)
    alive: dict[int, tuple[float, float]] = {}
    tracer.run(
        ledger,
        masked,
        example_inputs,
        training=False,
        fake=False,
        closed=torch.from_numpy(units.among(classes)),
        alive=alive,
    )
    found: dict[int, str] = {}
    for unit, (low, high) in alive.items():
        one = int(units.label[unit])
        found[one] = "constant" if low == high and found.get(one) != "varies" else "varies"
    return found


def added(model: nn.Module, units: Units, classes: Iterable[int], example_inputs: Any) -> set[int]:
    """Of these classes those that, closed where they are written, are not 0 where activations are added up or
    multiplied with each other.

    No weight stands there that could leave them out, and no bias that could take them in. Raises what the model raises.
    """
    chosen = set(classes)
    families = [[one for one in family if one in chosen] for family in units.families]
    closed = half(units, [family for family in families if family])
    masked = mask(inputs.copied(inputs.as_trained(model, example_inputs)), units, closed)
    found: set[int] = set()
    ledger = Ledger.of(masked, units.within)
    tracer.run(
        ledger,
        masked,
        example_inputs,
        training=False,
        fake=False,
        closed=torch.from_numpy(units.among(closed)),
        added=found,
    )
    return {int(units.label[unit]) for unit in found}


def mask(model: nn.Module, units: Units, classes: Iterable[int]) -> nn.Module:
    """Set to 0, in place, what writes these classes (what reads them, where nothing writes them); returns ``model``."""
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    chosen: dict[tuple[str, int], list[int]] = defaultdict(list)
    for one in classes:
        members = [
            (m.name, m.dim, i, units.first_unit(m.name, m.dim) + int(i)) for m in units.members[one] for i in m.indices
        ]
        silent = all(units.read[unit] and not units.written[unit] for *_, unit in members)
        for name, dim, index, unit in members:
            if silent or units.written[unit] or not units.read[unit]:
                chosen[name, dim].append(int(index))
    with torch.no_grad():
        for (name, dim), indices in chosen.items():
            if not name.endswith("running_var"):
                tensors[name].index_fill_(dim, torch.tensor(indices, device=tensors[name].device), 0.0)
    return model


__all__ = [
    "Differs",
    "added",
    "cut",
    "differs",
    "follow_all",
    "follow_parameters",
    "half",
    "mask",
    "probe",
    "retrace",
    "substitute",
]
