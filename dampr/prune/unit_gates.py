"""Gates on the weights that read a unit: how :func:`dampr.convert` prunes what no gated layer can,
whatever modules a model is made of.
"""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dampr.gates import Gate
from dampr.nn import open_statistics
from dampr.nn.parameter import GatedParameter, is_on, put_on, take_off

from . import filters, inputs, second_opinion
from .filters import Filter
from .modules import by_name
from .open_norms import OpenNorm, close, in_one_vector
from .units import Units
from .units.groups import Group, groups, readable
from .units.proof import cut, differs, half, substitute
from .units.sizes import Size, followers

UNSAID = "include or exclude leaves it out, or it is alone in its width"
_SCALES = (10.0, 100.0)  # of the example inputs on which masked and cut models are compared too


@dataclass
class Placement:
    """What :func:`place` found.

    Attributes:
        groups: vectors of gates to be.
        sizes: the numbers beside parameters that follow when these are cut.
        read: those of them without which the cut model does not compute the same.
        refused: class -> why it gets no gate though the trace calls it free.
        norms: those that are to count open units only.
    """

    groups: list[Group]
    sizes: list[Size] = field(default_factory=list)
    read: set[Size] = field(default_factory=set)
    refused: dict[int, str] = field(default_factory=dict)
    norms: dict[str, OpenNorm] = field(default_factory=dict)

    def classes(self) -> list[int]:
        """All classes with a gate."""
        return [one for group in self.groups for one in group.classes]


@dataclass(frozen=True)
class _Subject:
    """A plain model, its units, inputs to try it on, and the norms that are to count open units only."""

    model: nn.Module
    units: Units
    example_inputs: Any
    norms: Mapping[str, OpenNorm]


_Good = list[tuple[list[list[int]], list[Size]]]  # families that may go together, and the numbers that follow


def place(
    model: nn.Module, units: Units, example_inputs: Any, norms: Mapping[str, OpenNorm] | None = None
) -> Placement:
    """The vectors of gates that a plain model may have, each tried in a copy: half of it closed, cut and compared.

    ``norms``: that count open units only, of ``units`` that know it (:meth:`.Units.with_open_statistics`).
    """
    subject = _Subject(
        model if _is_meta(model) else inputs.as_trained(model, example_inputs), units, example_inputs, norms or {}
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owned = [name for name in parameters if _owner(model, name) is not None]
    refused = units.in_training_alone()
    found = groups(units, [one for one in readable(units, owned) if one not in refused])
    families = _families(units, [one for group in found for one in group.classes])
    kind = functools.partial(_kind, units)
    good: _Good = []
    todo = [families] if families else []
    read: set[Size] = set()

    def passes(some: list[list[int]]) -> bool:
        reason, follow, needed = _try(subject, some, quick=len(some) < len(families))
        if reason is None:
            good.append((some, follow))
            read.update(follow if needed else ())
        elif len(some) == 1:
            refused.update(dict.fromkeys(some[0], reason))
        return reason is None

    while todo:
        some = todo.pop()
        if passes(some) or len(some) == 1:
            continue
        if len({kind(family) for family in some}) > 1:
            todo += [list(alike) for _, alike in itertools.groupby(sorted(some, key=kind), key=kind)]
            continue
        first, *others, last = some
        if not passes([first]) | passes([last]):  # what is alike fails alike
            refused |= dict.fromkeys((one for family in others for one in family), refused[last[0]])
        elif others:
            middle = len(others) // 2
            todo += [half for half in (others[:middle], others[middle:]) if half]
    tried = len(good) == 1 and len(good[0][0]) == len(families)
    kept, sizes = _together(subject, good, refused, tried)
    vectors = [group for group in found if kept.issuperset(group.classes)]
    usable = in_one_vector(subject.norms, (group.classes for group in vectors))
    bad = {one for name, norm in subject.norms.items() if name not in usable for one in norm.classes if one in kept}
    refused |= dict.fromkeys(bad, "one norm counts it together with units of other widths")
    vectors = [group for group in vectors if bad.isdisjoint(group.classes)]
    return Placement(vectors, sizes, read, refused, in_one_vector(usable, (group.classes for group in vectors)))


def _together(subject: _Subject, good: _Good, refused: dict[int, str], tried: bool) -> tuple[set[int], list[Size]]:
    """Of sets of families that computed the same one by one, the classes of those that do together, and whose trace is
    that of the model without them; and the sizes that follow. Adds to ``refused``.

    All at once in most cases, else one after the other, the largest first. ``tried``: all were compared at once before.
    """

    def fault(families: list[list[int]], sizes: list[Size]) -> str:
        classes = half(subject.units, families)
        reason = "" if tried else _Masked(subject, classes).differs(sizes)
        found = None if reason else differs(subject.model, subject.units, [subject.example_inputs], classes, sizes)
        return reason if found is None else found.text

    kept: list[list[int]] = [family for families, _ in good for family in families]
    sizes = list(dict.fromkeys(size for _, follow in good for size in follow))
    if not kept or not fault(kept, sizes):
        return {one for family in kept for one in family}, sizes
    kept, sizes = [], []
    todo = [([family], follow) for families, follow in good for family in families] if len(good) == 1 else good
    for families, follow in sorted(todo, key=lambda one: -sum(map(len, one[0]))):
        more = list(dict.fromkeys([*sizes, *follow]))
        reason = fault([*kept, *families], more)
        if reason:
            refused |= dict.fromkeys((one for family in families for one in family), reason)
        else:
            kept, sizes = [*kept, *families], more
    return {one for family in kept for one in family}, sizes


def _kind(units: Units, family: list[int]) -> str:
    """What a family is in, the same for each of a row of blocks: names of parameters without numbers."""
    names = {m.name for one in family[:1] for m in units.members[one]}
    return " ".join(sorted({re.sub(r"\d+", "", name) for name in names}))


def only(model: nn.Module, units: Units, placement: Placement, include: Filter, exclude: Filter) -> Placement:
    """Of a placement the vectors of which all layers that write them are included and not excluded."""
    wanted = set(_wanted(model, units, placement.classes(), include, exclude))
    for name, norm in placement.norms.items():
        if not filters.wanted(_above(model, name), include, exclude):
            wanted.difference_update(norm.classes)
    vectors = [group for group in placement.groups if wanted.issuperset(group.classes)]
    norms = in_one_vector(placement.norms, (group.classes for group in vectors))
    return replace(placement, groups=vectors, norms=norms)


def _owner(model: nn.Module, name: str) -> nn.Module | None:
    """The module that has a parameter, where it can be parametrized: recurrent layers keep lists of theirs."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return None if isinstance(owner, (nn.RNNBase, nn.ParameterList, nn.ParameterDict)) else owner


def _families(units: Units, classes: Iterable[int]) -> list[list[int]]:
    kept = set(classes)
    found = [[one for one in family if one in kept] for family in units.families]
    return [family for family in found if family]


def _try(subject: _Subject, families: list[list[int]], quick: bool) -> tuple[str | None, list[Size], bool]:
    """Why half of these families cannot be cut; where it can, the numbers that follow,
    and whether the model needs that.

    ``quick``: on the example inputs alone, for what is compared again with all others.
    """
    units = subject.units
    classes = half(units, families)
    if not classes:
        return "every dimension keeps one channel at least", [], False
    sizes = followers(subject.model, units, [one for family in families for one in family])
    kinds = [sizes, []] if sizes else [[]]
    if len({_kind(units, family) for family in families}) == 1 and sizes:
        kinds[1:1] = [
            [size for size in sizes if "head" in size.attribute],
            [size for size in sizes if "head" not in size.attribute],
        ]
        # one of which may be of another width that has the same size
        attributes = dict.fromkeys(size.attribute for size in sizes)
        kinds += [[size for size in sizes if size.attribute != own] for own in attributes]
    masked, reason = _Masked(subject, classes, scales=() if quick else _SCALES), ""
    for number, chosen in enumerate(kinds):
        if chosen in kinds[:number]:
            continue
        reason = masked.differs(chosen)
        if not reason:
            needed = bool(chosen) and bool(masked.differs([]))
            return None, _needed(masked, chosen), needed
    return reason, [], False


def _needed(masked: _Masked, sizes: list[Size]) -> list[Size]:
    """Of numbers that may follow those without which the model computes something else, those that count heads by their
    names, and those of layers of torch.nn.

    A number of other code that only happens to be as large as a width, such as a stride, must not follow it.
    """
    known = {
        size.module
        for size in sizes
        if type(masked.model.get_submodule(size.module)).__module__.startswith("torch.nn.")
    }
    doubtful = [size for size in sizes if size.module not in known and not re.search("heads$|n_?head$", size.attribute)]
    for attribute in dict.fromkeys(size.attribute for size in doubtful):
        others = [size for size in sizes if size.attribute != attribute or size.module in known]
        if not masked.differs(others):
            sizes = others
    return sizes


class _Masked:
    """A copy of a model in which nothing reads some classes, to be compared with copies that have lost them,
    also on larger inputs.
    """

    def __init__(self, subject: _Subject, classes: list[int], scales: tuple[float, ...] = _SCALES) -> None:
        self._subject, self.model, self._units, self._classes = subject, subject.model, subject.units, classes
        self._samples = [subject.example_inputs]
        if any(t.is_floating_point() for t in inputs.tensors(subject.example_inputs)):
            given = (inputs.perturbed(subject.example_inputs), subject.example_inputs)
            self._samples += [_scaled(sample, scale) for sample, scale in zip(given, scales, strict=False)]
        self._expected: list[list[Tensor]] = []

    @functools.cached_property
    def _masked(self) -> nn.Module:
        masked = inputs.twin(self.model)
        mask_columns(masked, self._units, self._classes)
        close(masked, self._subject.norms, self._classes)
        return masked

    def _outputs(self, number: int) -> list[Tensor]:
        if number == len(self._expected):
            with inputs.same_noise(self._masked):
                self._expected.append(inputs.evaluate(self._masked, self._samples[number]))
        return self._expected[number]

    def differs(self, sizes: list[Size]) -> str:
        """What a copy without the classes does that the masked one does not, with these numbers following;
        "" for nothing.
        """
        if _is_meta(self.model):
            return ""
        small = cut(inputs.twin(self.model), self._units, self._classes, sizes)
        with inputs.unfused(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a norm without gain whose width is not that of its input
            for number, sample in enumerate(self._samples):
                try:
                    with inputs.same_noise(small):
                        found = inputs.evaluate(small, sample)
                except Exception as error:
                    return (
                        "without half of its channels the model does not run, so something beside its layers has "
                        f"that width ({error})"
                    )
                expected = self._outputs(number)
                tolerance = 30 * inputs.TOLERANCE[_precision(expected)]
                if inputs.differ(expected, found, tolerance, tolerance * inputs.size(expected)):
                    return (
                        "without half of its channels the model computes something else, so these are mixed or "
                        "rearranged on the way"
                    )
        return ""


def _is_meta(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def _precision(outputs: list[Tensor]) -> torch.dtype:
    return max(
        (t.dtype for t in outputs if t.dtype in inputs.TOLERANCE),
        key=lambda kind: inputs.TOLERANCE[kind],
        default=torch.float32,
    )


def _scaled(example_inputs: Any, scale: float) -> Any:
    def grow(leaf: Any) -> Any:
        return leaf * scale if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return torch.utils._pytree.tree_map(grow, example_inputs)


def mask_columns(model: nn.Module, units: Units, classes: Iterable[int]) -> None:
    """Set to 0 the columns of weights that read these classes; ``model`` gets parameters of its own there."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read = np.zeros(len(units.label), bool)
    read[units.columns] = True
    closed: dict[str, list[tuple[int, Any]]] = {}
    for name, dims in units.indices(classes).items():
        for dim, indices in dims.items() if name in parameters else ():
            own = np.array(indices)
            here = own[read[units.first_unit(name, dim) + own]]
            if len(here):
                closed.setdefault(name, []).append((dim, here))
    new: dict[int, Tensor] = {}
    for name, places in closed.items():
        values = parameters[name].detach().clone()
        for dim, here in places:
            values.index_fill_(dim, torch.from_numpy(here).to(values.device), 0.0)
        new[id(parameters[name])] = nn.Parameter(values, requires_grad=parameters[name].requires_grad)
    substitute(model, new)


def _above(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """A module and those that it is a part of, by name, but for the model itself."""
    parts = name.split(".") if name else []
    above = [".".join(parts[:count]) for count in range(len(parts), 0, -1)] or [""]
    return [(one, model.get_submodule(one)) for one in above]


def _wanted(model: nn.Module, units: Units, classes: list[int], include: Filter, exclude: Filter) -> list[int]:
    """The classes of which a layer that writes them (or reads them,
    where none does) is included and none is excluded.
    """
    if include is None and exclude is None:
        return classes
    written = np.zeros(len(units.label), bool)
    written[units.written] = True

    @functools.cache
    def judged(name: str) -> tuple[bool, bool]:
        """Whether the module of a parameter is included, and not excluded."""
        modules = _above(model, name.rpartition(".")[0])
        return filters.wanted(modules, include, None), filters.wanted(modules, None, exclude)

    found = []
    for one in classes:
        members = [m for m in units.members[one] if written[units.first_unit(m.name, m.dim) + m.indices].any()]
        matrices = [m for m in members if len(units.origin[m.name]) > 1] or members or units.members[one]
        verdicts = [judged(m.name) for m in matrices]
        if any(included for included, _ in verdicts) and all(allowed for _, allowed in verdicts):
            found.append(one)
    return found


@contextmanager
def put_in(
    model: nn.Module, units: Units, placement: Placement, make: Callable[[int], Gate]
) -> Iterator[dict[str, GatedParameter]]:
    """Register the gates of a placement; ``make`` gives a vector of so many.
    Gives them by the names that they have in the model.

    Whatever is raised here or in the block, the model is as it was.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[int, list[str]] = {}
    for name, p in parameters.items():
        tied.setdefault(id(p), []).append(name)
    values = {p: p.data for p in parameters.values()}
    done: dict[tuple[nn.Module, str], None] = {}
    counting: list[nn.Module] = []
    try:
        for group in placement.groups:
            gate = make(len(group.classes))
            saved = _weights_per_class(units, group, parameters)
            for (name, dim), columns in group.columns.items():
                for alias in tied[id(parameters[name])]:
                    path, _, own = alias.rpartition(".")
                    index, device = torch.from_numpy(columns), parameters[name].device
                    gates = GatedParameter(gate, dim, index, weights_per_gate=saved, device=device)
                    # of several parameters that share gates the first says what they save
                    saved = torch.zeros_like(saved)
                    module = model.get_submodule(path)
                    done[module, own] = None
                    put_on(module, own, gates.train(module.training))
            number = {one: at for at, one in enumerate(group.classes)}
            for name, norm in placement.norms.items():
                index = torch.tensor(
                    [number.get(one, -1) for one in norm.classes], device=next(model.parameters()).device
                )
                if int(index.max()) >= 0:
                    module = model.get_submodule(name)
                    open_statistics.put_on(module, norm.statistics(gate, index))
                    counting.append(module)
        yield by_name(model, GatedParameter)
    except BaseException:
        for norm_module in counting:
            open_statistics.take_off(norm_module)
        for module, own in done:
            if is_on(module, own):
                take_off(module, own, folded=False)
        for p, value in values.items():
            p.data = value
        raise


def left_out(model: nn.Module, units: Units, placement: Placement) -> dict[str, str]:
    """Why what a layer writes has no gates, for every layer with a matrix of weights of its own."""
    gated = set(placement.classes())
    found: dict[str, str] = {}
    for name, dims in units.origin.items():
        if len(dims) < 2:
            continue
        path = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        absent = second_opinion.unreached(name.rpartition(".")[0], model.get_submodule(name.rpartition(".")[0]), units)
        written = [units.classes(name, dim) for dim, first, size in dims if _is_written(units, first, size)]
        if absent is not None:
            found[path] = absent
        elif written and all(gated.isdisjoint(classes) for classes in written):
            reasons = [placement.refused.get(one) or units.reason(one) for one in written[0]]
            known = next((reason for reason in reasons if reason is not None), None)
            found[path] = str(known or _unreadable(model, units, written[0]) or UNSAID)
    return found


def _unreadable(model: nn.Module, units: Units, classes: list[int]) -> str | None:
    """What reads free classes so that no gate on a parameter could close them."""
    summed, columns = set(units.label[units.summed].tolist()), np.zeros(len(units.label), bool)
    columns[units.columns] = True
    if not summed.isdisjoint(classes):
        return "a sum reads it that no weight is in"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, dim, indices in (m for one in classes for m in units.members[one]):
        if columns[units.first_unit(name, dim) + indices].any() and (
            name not in parameters or _owner(model, name) is None
        ):
            return f"{name!r} reads it, which can have no gates"
    return None


def _is_written(units: Units, first: int, size: int) -> bool:
    return bool(np.isin(np.arange(first, first + size), units.written).any())


def _weights_per_class(units: Units, group: Group, parameters: dict[str, nn.Parameter]) -> Tensor:
    """How many parameters go with each class."""

    def own(one: int) -> float:
        members = [(m, parameters[m.name]) for m in units.members[one] if m.name in parameters]
        return float(sum(len(m.indices) * p.numel() / p.shape[m.dim] for m, p in members))

    return torch.tensor([own(one) for one in group.classes])
