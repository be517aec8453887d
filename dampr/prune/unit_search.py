"""Finds where gates on the weights that read a unit can be, by trials on copies of a model.

In the code below a class is an integer that stands for units which can be cut only together (``class_id`` for a single
one), and a cluster is a list of classes that share dimensions of tensors (:mod:`.units`). ``sizes`` are attributes of
modules, such as ``num_heads``, which have to change with the width of a parameter (:class:`.units.sizes.Size`).

:func:`place` tries all clusters at once, then smaller sets of them, and returns what can be cut (:class:`Placement`).
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import inputs
from .layers.registry import kind_of
from .open_norms import OpenNorm, in_one_vector
from .unit_trials import Subject, Trial, is_meta
from .units import Units, unseen
from .units.groups import Group, groups, readable
from .units.proof import differs, half
from .units.sizes import Size, followers

_FEW = 6  # with at most this many attributes, pairs of them are tried too


@dataclass
class Placement:
    """The places where :func:`place` found that gates can be put.

    Attributes:
        groups: groups of classes that get a gate vector each.
        sizes: the attributes that change when these classes are cut.
        read: those of them without which the cut model does not compute the same.
        refused: class -> why it gets no gate although the trace calls it free.
        norms: name -> a norm that has to count only open units.
        finite: whether the outputs of the model are finite, also with weights such as training leaves.
    """

    groups: list[Group]
    sizes: list[Size] = field(default_factory=list)
    read: set[Size] = field(default_factory=set)
    refused: dict[int, str] = field(default_factory=dict)
    norms: dict[str, OpenNorm] = field(default_factory=dict)
    finite: bool = False

    def classes(self) -> list[int]:
        """Return all classes that get a gate."""
        return [class_id for group in self.groups for class_id in group.classes]


def place(
    model: nn.Module, units: Units, example_inputs: Any, norms: Mapping[str, OpenNorm] | None = None
) -> Placement:
    """Find the gate vectors that a plain model can have. Each is tried in a copy: half of it is closed, cut and
    compared.

    Args:
        model: the model; not changed.
        units: its partition into classes.
        example_inputs: the inputs for the comparison.
        norms: norms that count only open units, if ``units`` knows them (:meth:`.Units.with_open_statistics`).

    Returns: the vectors, and why other classes get no gate.
    """
    trained, finite = (model, False) if is_meta(model) else inputs.trained(model, example_inputs)
    subject = Subject(trained, units, example_inputs, norms or {})
    # classes that have gates unless a trial fails: not protected, and read by parameters alone
    parameters = dict(model.named_parameters(remove_duplicate=False))
    protected = unseen.protected(units, dict(model.named_parameters())) | _staying(model, units)
    candidates = groups(units, [class_id for class_id in readable(units, parameters) if class_id not in protected])
    clusters = _clusters(units, [class_id for group in candidates for class_id in group.classes])
    try:
        search = _Search(subject, clusters)
        kept, sizes = search.together()
    except _DeceivedError:
        search = _Search(subject, clusters, by_values=True)
        kept, sizes = search.together()
    # a vector stays if all of its classes can be cut, and a norm if all of its classes are in one vector
    refused = protected | search.refused
    vectors = [group for group in candidates if kept.issuperset(group.classes)]
    usable = in_one_vector(subject.norms, (group.classes for group in vectors))
    bad = {
        class_id
        for name, norm in subject.norms.items()
        if name not in usable
        for class_id in norm.classes
        if class_id in kept
    }
    refused |= dict.fromkeys(bad, "one norm counts it together with units of other widths")
    vectors = [group for group in vectors if bad.isdisjoint(group.classes)]
    norms = in_one_vector(usable, (group.classes for group in vectors))
    return Placement(vectors, sizes, search.read, refused, norms, finite)


def _staying(model: nn.Module, units: Units) -> dict[int, str]:
    """Return class -> why it must not be cut, for widths of which the code of a layer needs every index
    (``Kind.staying``).
    """
    return {
        class_id: reason
        for path, layer in model.named_modules()
        for (name, dim), reason in kind_of(layer).staying(layer).items()
        if (origin := units.alias.get(f"{path}.{name}".lstrip("."))) is not None
        for class_id in units.classes(origin, dim)
    }


def _clusters(units: Units, classes: Iterable[int]) -> list[list[int]]:
    """Return the clusters of ``units``, restricted to ``classes``; empty ones are left out."""
    kept = set(classes)
    restricted = [[class_id for class_id in cluster if class_id in kept] for cluster in units.clusters]
    return [cluster for cluster in restricted if cluster]


class _DeceivedError(Exception):
    """Raised if a cut model runs, as a check of shapes predicted, but does not compute the same."""


class _Search:
    """Find the clusters of classes that can be cut, and the attributes that change with them.

    All clusters are tried at once; if that fails, those of one kind (of repeated blocks), then halves of these. A
    smaller set only has to run, as shapes show; with ``by_values`` it also has to compute the same.

    Args:
        subject: the model and its inputs.
        clusters: the clusters to try.
        by_values: whether every trial compares values.

    Attributes:
        read: the attributes without which a cut model does not compute the same.
        refused: class -> why it cannot be cut.
    """

    def __init__(self, subject: Subject, clusters: list[list[int]], by_values: bool = False) -> None:
        self._subject, self._clusters, self._by_values = subject, clusters, by_values
        self.read: set[Size] = set()
        self.refused: dict[int, str] = {}
        # (clusters that can be cut together, the attributes that change with them)
        self._good: list[tuple[list[list[int]], list[Size]]] = []
        self._assumed = False  # whether some clusters were only checked by shapes
        self._try_all()

    def _try_all(self) -> None:
        """Try all clusters at once, and smaller and smaller sets of them where that fails."""
        kind = functools.partial(_kind, self._subject.units)
        todo = [self._clusters] if self._clusters else []
        while todo:
            subset = todo.pop()
            if self._passes(subset) or len(subset) == 1:
                continue
            if len({kind(cluster) for cluster in subset}) > 1:
                todo += [list(alike) for _, alike in itertools.groupby(sorted(subset, key=kind), key=kind)]
                continue
            first, *others, last = subset
            # if the first and the last cluster of a kind fail, the others fail for the same reason
            if not self._passes([first]) | self._passes([last]):
                self.refused |= dict.fromkeys(
                    (class_id for cluster in others for class_id in cluster), self.refused[last[0]]
                )
            elif others:
                middle = len(others) // 2
                todo += [half for half in (others[:middle], others[middle:]) if half]

    def _passes(self, subset: list[list[int]]) -> bool:
        """Try to cut half of each cluster in ``subset``, and record the result; returns whether it works."""
        reason, changes, needed = self._try(subset)
        if reason is None:
            self._good.append((subset, changes))
            pieces = self._subject.units.piece_numbers
            self.read.update(size for size in changes if needed or (size.module, size.attribute) in pieces)
        elif len(subset) == 1:
            self.refused.update(dict.fromkeys(subset[0], reason))
        return reason is None

    def _try(self, clusters: list[list[int]]) -> tuple[str | None, list[Size], bool]:
        """Try to cut half of each of ``clusters``.

        Returns: (why it cannot be cut, or None; the attributes that change; whether the model needs this change).
        """
        subject, units = self._subject, self._subject.units
        classes = half(units, clusters)
        if not classes:
            return "every dimension keeps one channel at least", [], False
        all_at_once = len(clusters) == len(self._clusters)
        trial, choices = Trial(subject, classes, quick=not all_at_once), _choices(subject, clusters)
        for chosen in choices:
            if not trial.fits(chosen) or not self._fits_otherwise(clusters, chosen):
                continue
            assumed = not all_at_once and not self._by_values and subject.shapes is not None
            if assumed or not trial.differs(chosen):
                self._assumed |= assumed
                return (
                    None,
                    _needed(trial, chosen),
                    bool(chosen) and not (trial.same([], first=True) and trial.same([])),
                )
            self._by_values = True  # shapes do not show what is wrong here
        if len(clusters) > 1:
            return "not all of them can", [], False
        reason = trial.differs(choices[-1])
        if not reason:  # the cut model does compute the same
            subject.doubt_shapes()
            return self._try(clusters)
        return reason, [], False

    def _fits_otherwise(self, clusters: list[list[int]], sizes: list[Size]) -> bool:
        """Return whether the model also runs with other numbers of units cut.

        Widths that must be cut together can fit by chance in one try.

        Args:
            clusters: the clusters; for a single one the answer is True without a run.
            sizes: the attributes that change.
        """
        classes = half(self._subject.units, clusters, seed=1) if len(clusters) > 1 else []
        return not classes or Trial(self._subject, classes, quick=True).fits(sizes)

    def together(self) -> tuple[set[int], list[Size]]:
        """Find the classes of the clusters that can be cut together, and the attributes that change with them.

        The clusters were tried one by one before. Now all are cut at once; if the model differs, they are added one
        after the other, the largest first, and those that do not fit are added to ``refused``.

        Returns: (the classes, the attributes).
        """
        good = self._good
        tried = len(good) == 1 and len(good[0][0]) == len(self._clusters)  # all were compared at once before
        kept: list[list[int]] = [cluster for clusters, _ in good for cluster in clusters]
        sizes = list(dict.fromkeys(size for _, changes in good for size in changes))
        if not kept or not self._fault(kept, sizes, tried, self._assumed):
            return {class_id for cluster in kept for class_id in cluster}, sizes
        kept, sizes = [], []
        todo = [([cluster], changes) for clusters, changes in good for cluster in clusters] if len(good) == 1 else good
        for clusters, changes in sorted(todo, key=lambda entry: -sum(map(len, entry[0]))):
            more = list(dict.fromkeys([*sizes, *changes]))
            reason = self._fault([*kept, *clusters], more, tried)
            if reason:
                self.refused |= dict.fromkeys((class_id for cluster in clusters for class_id in cluster), reason)
            else:
                kept, sizes = [*kept, *clusters], more
        return {class_id for cluster in kept for class_id in cluster}, sizes

    def _fault(self, clusters: list[list[int]], sizes: list[Size], tried: bool, assumed: bool = False) -> str:
        """Return what goes wrong if half of each of these clusters is cut; "" if nothing does.

        Args:
            clusters: the clusters.
            sizes: the attributes that change.
            tried: whether values were compared before, so that this is not done again; the partition is compared in any
                case.
            assumed: whether some clusters were only checked by shapes before.

        Raises: _DeceivedError if it was ``assumed`` that nothing goes wrong, and values differ.
        """
        subject, classes = self._subject, half(self._subject.units, clusters)
        reason = "" if tried else Trial(subject, classes).differs(sizes)
        if reason and assumed:
            raise _DeceivedError(reason)
        difference = None if reason else differs(subject.model, subject.units, [subject.example_inputs], classes, sizes)
        return reason if difference is None else difference.text


def _choices(subject: Subject, clusters: list[list[int]]) -> list[list[Size]]:
    """Return the sets of attributes that may change with these clusters, in the order in which they are tried.

    Args:
        subject: the model and its inputs.
        clusters: the clusters that lose half of their classes.
    """
    sizes = followers(subject.model, subject.units, [class_id for cluster in clusters for class_id in cluster])
    sure = [size for size in sizes if _is_sure(subject.model, size)]
    asked = {*sure, *subject.used(size for size in sizes if size not in sure)}
    sizes = [size for size in sizes if size in asked]
    choices = [sizes, []] if sizes else [[]]
    if sizes and len({_kind(subject.units, cluster) for cluster in clusters}) == 1:
        choices[1:1] = [
            [size for size in sizes if "head" in size.attribute],
            [size for size in sizes if "head" not in size.attribute],
            # layers of one type one after the other, with one width: what one writes the next reads
            [size for size in sizes if subject.units.is_row(size.parameter, size.dim)],
            [size for size in sizes if not subject.units.is_row(size.parameter, size.dim)],
        ]
        # one or two of the attributes may belong to other widths of the same size
        attributes = list(dict.fromkeys(size.attribute for size in sizes))
        without: list[set[str]] = [{attribute} for attribute in attributes]
        if len(attributes) <= _FEW:
            without += map(set, itertools.combinations(attributes, 2))
        # where whole heads go, their own width stays
        heads = [
            size for size in sizes if not re.search("head.*(dim|size|width)|(dim|size|width).*head", size.attribute)
        ]
        kept = [sizes, heads] if len(heads) < len(sizes) else [sizes]
        choices += [
            [size for size in some_sizes if size.attribute not in left_out]
            for some_sizes in kept
            for left_out in [set(), *without]
        ]
    return [chosen for number, chosen in enumerate(choices) if chosen not in choices[:number]]


def _kind(units: Units, cluster: list[int]) -> str:
    """Return the names of the parameters of a cluster without numbers, the same for each of a row of repeated
    blocks.
    """
    names = {m.name for class_id in cluster[:1] for m in units.members[class_id]}
    return " ".join(sorted({re.sub(r"\d+", "", name) for name in names}))


def _needed(trial: Trial, sizes: list[Size]) -> list[Size]:
    """Return those of the attributes in ``sizes`` that must change.

    These are the attributes without which the model computes something else, those by which code takes a part of a
    width, those that count heads by their names, and those of ``torch.nn`` layers. Another attribute that only happens
    to have the size of a width, such as a stride, must not change with it.

    Args:
        trial: the comparison of a masked and a cut copy.
        sizes: attributes with which both compute the same.
    """
    pieces = trial.pieces()
    doubtful = [
        size for size in sizes if not _is_sure(trial.model, size) and (size.module, size.attribute) not in pieces
    ]
    for first in (True, False):  # on one sample first; on all samples if that leaves doubt
        kept = sizes
        for attribute in dict.fromkeys(size.attribute for size in doubtful):
            others = [size for size in kept if size.attribute != attribute or size not in doubtful]
            if trial.same(others, first):
                kept = others
        if kept == sizes or trial.same(kept):
            break
    return kept


def _is_sure(model: nn.Module, size: Size) -> bool:
    """Return whether an attribute surely belongs to a width: it counts heads by its name, or is that of a ``torch.nn``
    layer.
    """
    in_torch = type(model.get_submodule(size.module)).__module__.startswith("torch.nn.")
    return in_torch or bool(re.search("heads$|n_?head$", size.attribute))
