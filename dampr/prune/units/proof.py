"""Checks of what a trace cannot prove.

A trace does not prove that a smaller model has the same partition into classes, nor that closed units are 0 where they
are read. The functions here cut or mask a copy of the model and run it.

A class is an integer that stands for units (indices of dimensions of tensors) which can be cut only together, and a
cluster is a list of classes that share dimensions of tensors. To cut a class is to delete its indices from all
parameters and buffers; to mask it is to set the weights and biases that write it to 0, so that all shapes stay.
"""

from __future__ import annotations

import itertools
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

from .. import inputs
from ..layers.registry import kind_of
from . import tracer
from .ledger import Ledger
from .partition import NOTHING_TO_CHOOSE, Units, solve
from .sizes import Size, follow

_ATTEMPTS = 8  # choices of half of the classes that are looked at


def cut(model: nn.Module, units: Units, classes: Iterable[int], sizes: Iterable[Size] = ()) -> nn.Module:
    """Delete the indices of ``classes`` from every parameter and buffer of ``model``.

    The sizes that ``torch.nn`` modules keep in attributes are set to the new shapes, and so are ``sizes``, numbers that
    other code keeps. If code keeps another such number, the model fails to run or gets another partition, which
    :func:`retrace` finds.

    Args:
        model: the whole model; changed in place.
        units: its partition.
        classes: the classes to cut.
        sizes: the attributes that change too.

    Returns: ``model``.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    old = dict(named)
    new: dict[int, Tensor] = {}
    for name, dims in units.indices(classes).items():
        remaining = old[name].detach()
        for dim, gone in dims.items():
            keep = np.delete(np.arange(remaining.shape[dim]), gone)
            remaining = remaining.index_select(dim, torch.from_numpy(keep).to(remaining.device))
        parameter = isinstance(old[name], nn.Parameter)
        new[id(old[name])] = nn.Parameter(remaining, requires_grad=old[name].requires_grad) if parameter else remaining
    follow_all(model, substitute(model, new), units.within)
    follow(model, sizes, units.indices(classes))
    return model


def follow_all(model: nn.Module, changed: Collection[nn.Module], within: Iterable[str] = ()) -> None:
    """Set the size attributes of modules whose parameters changed, and of all parametrized modules of ``model``, to the
    shapes of their parameters.

    Args:
        model: the model; changed in place.
        changed: the modules whose parameters or buffers changed.
        within: names of the weights of grouped convolutions that keep their number of groups.
    """
    owners = {model.get_submodule(name.rpartition(".")[0]) for name in within}
    with at_rest(model):
        for module in model.modules():
            if module in changed or parametrize.is_parametrized(module):
                kind_of(module).follow(module, module in owners)


def substitute(model: nn.Module, new: Mapping[int, Tensor]) -> set[nn.Module]:
    """Replace parameters and buffers of ``model``, under every name that they have.

    Args:
        model: the model; changed in place.
        new: id of the old tensor -> new tensor.

    Returns: the modules that changed.
    """
    changed: set[nn.Module] = set()
    for module in model.modules():
        tables: tuple[dict[str, Any], dict[str, Any]] = module._parameters, module._buffers
        for table in tables:
            replaced = {name: new[id(t)] for name, t in table.items() if t is not None and id(t) in new}
            table.update(replaced)
            changed.update([module] if replaced else [])
    return changed


def half(units: Units, clusters: Sequence[Sequence[int]], seed: int = 0) -> list[int]:
    """Choose a random half of the classes of each cluster, and leave at least one class in every dimension.

    The number chosen differs between the clusters and with ``seed``: some lose half, others fewer. So a number that
    code keeps for several clusters together does not fit all of them by accident. Of a dimension that code takes in
    parts, each part loses some, and parts of different sizes stay different.

    Args:
        units: the partition.
        clusters: the clusters, each a sequence of classes.
        seed: another seed chooses other classes, and other numbers of them; the same seed chooses the same.

    Returns: the chosen classes.
    """
    chosen: list[int] = []
    for attempt in range(_ATTEMPTS):
        chosen = _half(units, clusters, seed, attempt)
        if not units.pieces or not _made_alike(units, set(chosen)):
            break
    return chosen


def _half(units: Units, clusters: Sequence[Sequence[int]], seed: int, attempt: int) -> list[int]:
    """Choose classes as :func:`half` does, without a look at the sizes of the parts that are left.

    Args:
        units: the partition.
        clusters: the clusters, each a sequence of classes.
        seed: as in :func:`half`.
        attempt: another number changes how many classes of each part are chosen.
    """
    generator = random.Random(seed)
    remaining = {
        (name, dim): len(set(units.classes(name, dim))) for name, dims in units.origin.items() for dim, _, _ in dims
    }
    chosen = []
    for number, cluster in enumerate(clusters):
        for at, part in enumerate(_parts(units, cluster)):
            most = len(part) // 2
            count = most - (number + seed + at * (1 + attempt)) % (most // 2 + 1)
            for class_id in generator.sample(part, count):
                places = {(member.name, member.dim) for member in units.members[class_id]}
                if all(remaining[place] > 1 for place in places):
                    chosen.append(class_id)
                    for place in places:
                        remaining[place] -= 1
    return chosen


def _parts(units: Units, cluster: Sequence[int]) -> list[list[int]]:
    """Return the classes of a cluster, one list for each part of a dimension that code takes; one list if code takes
    none.
    """
    parts: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for class_id in cluster:
        parts[units.pieces_of.get(class_id, ())].append(class_id)
    return list(parts.values())


def _made_alike(units: Units, chosen: set[int]) -> bool:
    """Return whether two parts that one module takes have the same size, or one twice that of the other, without the
    classes in ``chosen``, but not with them.
    """
    sizes: dict[str, set[tuple[int, int]]] = defaultdict(set)  # module -> (size, size without the chosen classes)
    for module, _, piece in units.pieces:
        classes = units.label[piece].tolist()
        sizes[module].add((len(classes), sum(class_id not in chosen for class_id in classes)))
    return any(
        first[1] * times == second[1] and first[0] * times != second[0]
        for pairs in sizes.values()
        for first, second in itertools.permutations(pairs, 2)
        for times in (1, 2)
    )


@dataclass(frozen=True)
class Differs:
    """How a cut model differs from the whole model.

    Attributes:
        text: the difference, in words.
        runs: whether the cut model runs.
    """

    text: str
    runs: bool


def retrace(
    model: nn.Module,
    units: Units,
    example_inputs: Any,
    clusters: Sequence[Sequence[int]],
    more_inputs: Iterable[Any] = (),
) -> dict[int, Differs]:
    """Find the classes that cannot be cut although the trace calls them free.

    In a copy of ``model``, half of each cluster is cut and the copy is traced in the same modes. Its classes must be
    those that are left, and its operators must get the same numbers. (This finds a literal that is half a width,
    ``roll``, ``view(B, N, 4, -1)``, and ``h.shape[1]`` as a factor.) If the copy differs, the clusters are split in two
    and tried again.

    Args:
        model: the whole model; not changed.
        units: its partition.
        example_inputs, more_inputs: the inputs of the trace.
        clusters: the clusters of classes to try.

    Returns: class -> how a model without it differs.

    Raises: what copying the model raises.
    """
    if not clusters:
        return {}
    differences: dict[int, Differs] = {}
    todo, samples = [list(clusters)], [example_inputs, *more_inputs]
    while todo:
        subset = todo.pop()
        fault = differs(model, units, samples, half(units, subset))
        if fault is not None and len(subset) == 1:
            differences |= dict.fromkeys(subset[0], fault)
        elif fault is not None:
            todo += [subset[: len(subset) // 2], subset[len(subset) // 2 :]]
    return differences


def differs(
    model: nn.Module, units: Units, samples: list[Any], classes: list[int], sizes: Iterable[Size] = ()
) -> Differs | None:
    """Find how a copy of ``model`` without ``classes`` differs from ``model``.

    Args:
        model: the whole model; not changed.
        units: its partition.
        samples: the inputs to trace.
        classes: the classes to cut.
        sizes: numbers that code keeps, as for :func:`cut`.

    Returns: the difference; None if there is none.
    """
    small = cut(inputs.twin(model), units, classes, sizes)
    try:
        again = _traced(small, units, samples)
    except Exception as error:
        return Differs(
            "without half of its channels the model does not run, so something beside its layers has that width "
            f"({error})",
            False,
        )
    difference = _other_way(units, again, set(classes))
    if difference is None:
        return None
    # Where values decide which way a model takes, the whole one may take another way than one with closed units.
    try:
        masked = _traced(mask(inputs.copied(model), units, classes), units, samples)
    except Exception:  # some models raise if some of their values are 0
        return difference
    if (masked.numbers, masked.reached) == (units.numbers, units.reached):
        return difference
    gone = {
        masked.classes(m.name, m.dim)[i] for class_id in classes for m in units.members[class_id] for i in m.indices
    }
    return _other_way(masked, again, gone)


def _traced(model: nn.Module, units: Units, samples: list[Any]) -> Units:
    """Trace a model in the modes in which ``units`` was traced, and return its partition.

    Args:
        model: the model, a cut or masked copy.
        units: the partition of the whole model.
        samples: the inputs, one entry for each run.

    Raises: what the model raises.
    """
    ledger = Ledger.of(model, units.within, units.piece_numbers)
    for mode in units.modes:
        for sample in samples:
            tracer.run_as_fits(ledger, model, sample, training=mode)
    return solve(ledger, units.modes)


def _other_way(units: Units, again: Units, gone: set[int]) -> Differs | None:
    """Find how what a cut model computes differs from what the whole model does: in numbers of the code, in the
    parameters that it reads, or in its partition.

    Args:
        units: the partition of the whole model.
        again: the partition of the cut model.
        gone: the classes that were cut.

    Returns: the first difference; None if there is none.
    """
    if units.numbers != again.numbers:
        pairs = zip(units.numbers, again.numbers, strict=False)
        a, b = next(((a, b) for a, b in pairs if a != b), (("more", "operators"), ("or", "fewer")))
        return Differs(
            f"a number that the code computes follows its width ({a[0]} with {a[1]}, without half of its channels "
            f"{b[1]})",
            True,
        )
    other = next((name for name, modes in units.reached.items() if again.reached.get(name) != modes), None)
    if other is not None:
        return Differs(
            f"without half of its channels the model takes another way, on which it does not read {other!r}", True
        )
    return _regrouped(units, again, gone)


def _regrouped(units: Units, again: Units, gone: set[int]) -> Differs | None:
    """Find how the partition of the cut model differs from that of the whole model.

    It differs if it joins classes that were apart, splits a class, or fixes a class that was free.

    Args:
        units: the partition of the whole model.
        again: the partition of the cut model.
        gone: the classes that were cut.

    Returns: the first difference; None if there is none.
    """
    single, free = _alone(units, gone), set(units.free)
    forward: dict[int, int] = {}
    back: dict[int, int] = {}
    for name, dims in units.origin.items():
        for dim, _, _ in dims:
            remaining = [class_id for class_id in units.classes(name, dim) if class_id not in gone]
            new = again.classes(name, dim)
            if len(new) != len(remaining) and len(remaining) > 1:
                return Differs(
                    f"of dimension {dim} of {name!r} {len(new)} units are left, expected {len(remaining)}", True
                )
            for class_id, new_class in zip(remaining, new, strict=False):
                if class_id in single or class_id not in free:
                    continue
                reason = again.fixed.get(new_class)
                if (
                    forward.setdefault(class_id, new_class) != new_class
                    or back.setdefault(new_class, class_id) != class_id
                ):
                    return Differs(f"without half of its channels others of {name!r} go together", True)
                if reason is not None and reason.kind not in NOTHING_TO_CHOOSE:
                    return Differs(f"without half of its channels {reason}", True)
    return None


def _alone(units: Units, gone: set[int]) -> set[int]:
    """Return the classes that are the only ones left in some dimension after ``gone`` is cut.

    A dimension of size 1 has no unit in a trace, so the trace of the cut model says less about these classes.
    """
    single: set[int] = set()
    for name, dims in units.origin.items():
        for dim, _, _ in dims:
            remaining = set(units.classes(name, dim)) - gone
            single |= remaining if len(remaining) == 1 else set()
    return single


def probe(masked: nn.Module, units: Units, classes: Iterable[int], example_inputs: Any) -> dict[int, str]:
    """Run a masked model and find the closed classes that are not 0 where a weight or a sum reads them.

    Args:
        masked: a model with the parameter shapes of the model of ``units``, in which ``classes`` are masked; it runs
            once on real tensors in evaluation mode.
        units: the partition.
        classes: the closed classes.
        example_inputs: the inputs.

    Returns: class -> "constant" or "varies". The bias of the reader can absorb a constant unless zero padding comes
    between; a gate on a class that varies is useless.
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
    behaviour: dict[int, str] = {}
    for unit, (low, high) in alive.items():
        class_id = int(units.label[unit])
        behaviour[class_id] = "constant" if low == high and behaviour.get(class_id) != "varies" else "varies"
    return behaviour


def added(model: nn.Module, units: Units, classes: Iterable[int], example_inputs: Any) -> set[int]:
    """Find the classes that a mask cannot remove: they are not 0 where activations are added or multiplied.

    The weights and biases that write half of ``classes`` are set to 0, and the masked model runs once. A masked class
    that is still not 0 at a sum or product of activations cannot be cut, because there is no weight to cut and no bias
    to absorb a constant.

    Args:
        model: the whole model; not changed.
        units: its partition.
        classes: the classes to test.
        example_inputs: the inputs.

    Returns: the classes found.

    Raises: what the model raises.
    """
    chosen = set(classes)
    clusters = [[class_id for class_id in cluster if class_id in chosen] for cluster in units.clusters]
    closed = half(units, [cluster for cluster in clusters if cluster])
    masked = mask(inputs.copied(inputs.as_trained(model, example_inputs)), units, closed)
    added_units: set[int] = set()
    ledger = Ledger.of(masked, units.within)
    tracer.run(
        ledger,
        masked,
        example_inputs,
        training=False,
        fake=False,
        closed=torch.from_numpy(units.among(closed)),
        added=added_units,
    )
    return {int(units.label[unit]) for unit in added_units}


def mask(model: nn.Module, units: Units, classes: Iterable[int]) -> nn.Module:
    """Set the weights and biases that write ``classes`` to 0. Where nothing writes a class, set the weights that read
    it to 0.

    Args:
        model: the model; changed in place.
        units: its partition.
        classes: the classes to close.

    Returns: ``model``.
    """
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    chosen: dict[tuple[str, int], list[int]] = defaultdict(list)
    for class_id in classes:
        members = [
            (m.name, m.dim, i, units.first_unit(m.name, m.dim) + int(i))
            for m in units.members[class_id]
            for i in m.indices
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
    "half",
    "mask",
    "probe",
    "retrace",
    "substitute",
]
