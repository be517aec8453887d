"""The cost of a gated model after compaction, as a function of the gates that are open.

A linear or convolution layer costs a * In * Out + b * Out, where In and Out are the numbers of channels that are left:
bilinear, because cutting a channel makes both the layer that writes it and the layers that read it cheaper. In and Out
are linear in the classes of :class:`Structure`, so the cost of a decision (open or closed for each gate) is exact. The
same function of open probabilities is the expected cost, if gates are independent, and has a gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from . import inputs, new_biases
from .cost_terms import attention_terms, macs_terms, params_terms, unit_terms
from .cost_widths import Affine, Products, Variables
from .measure import count_macs, count_params
from .structure import Structure
from .terms import Term, Width
from .unit_structure import Counts, UnitStructure, has_unit_gates
from .wrapped import check_bare, check_values, unwrapped


class Cost:
    """MACs or parameters of the compacted model, as a function of the vector of all gates.

    The vector holds 1 for open and 0 for closed gates, or open probabilities. A width whose gates are all closed counts
    one channel, because compaction keeps one. The layers in front of a closed residual branch count as if the branch
    still read them, although compaction may cut them too.

    Args:
        model: a model with gates.
        example_inputs: as for :func:`dampr.compact`; MACs are those of one pass over them.
        metric: "macs" or "params".

    Attributes:
        structure: which gates cut which classes of units.
        total: the cost of the model as it is, without its gates.
        metric: as the argument.
        device: the device of the gates.
        terms: the terms of the cost.

    >>> import dampr
    >>> model = nn.Sequential(dampr.nn.GatedLinear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> cost = Cost(model, torch.randn(1, 4), "macs")
    >>> cost.total, int(cost(torch.arange(8) < 4))
    (48, 24)
    """

    total: float

    def __init__(self, model: nn.Module, example_inputs: Any, metric: str) -> None:
        check_bare(unwrapped(model), "its operators are followed")
        check_values(model)
        self.structure: Structure | UnitStructure = structure_of(unwrapped(model), example_inputs)
        self.metric = metric
        self.device = self.structure.gates[0].deterministic().device
        self._variables: Variables | Counts
        if isinstance(self.structure, UnitStructure):
            self._variables = Counts(self.structure, self.device)
        else:
            folds = new_biases.find(unwrapped(model), self.structure, example_inputs) if metric == "params" else {}
            self._variables = Variables(self.structure, self.device, folds)
        self.terms = self._find_terms(self.structure.plain, example_inputs)
        self._read, self._written = (
            Affine([getattr(term, side) for term in self.terms], self._variables.count, self.device)
            for side in ("read", "written")
        )
        depth = max((len(term.more) for term in self.terms), default=0)
        self._more = [
            Affine(
                [term.more[i] if i < len(term.more) else Width(1) for term in self.terms],
                self._variables.count,
                self.device,
            )
            for i in range(depth)
        ]
        branches = [self.structure.branches(term.name) for term in self.terms]
        self._branches = Products(branches, self.device) if any(branches) else None
        self.total = self._measure(self.structure.plain, example_inputs)
        self._fixed = 0.0
        self._fixed = self.total - float(self(torch.ones(self.structure.size)))
        if metric == "params":  # the plain model has a gain in place of gates in a norm without one
            self.total = count_params(unwrapped(model))

    def __call__(self, gates: Tensor) -> Tensor:
        """The cost, a float64 scalar.

        gates: (structure.size,), of any dtype; the cost has a gradient to it if it requires one.
        """
        gates = gates.to(self.device, torch.float64)
        variables = self._variables(gates)
        each = self._each(self._read(variables), self._written(variables))
        for factor in self._more:
            each = each * factor(variables)
        return (each if self._branches is None else each * self._branches(gates)).sum() + self._fixed

    def _find_terms(self, plain: nn.Module, example_inputs: Any) -> list[Term]:
        """The terms of the cost for this kind of gates and this metric."""
        if isinstance(self.structure, UnitStructure):
            assert isinstance(self._variables, Counts)
            return list(unit_terms(self.structure, self._variables, self.metric))
        assert isinstance(self._variables, Variables)
        if self.metric != "macs":
            return list(params_terms(self.structure, self._variables))
        return [
            *macs_terms(plain, self._variables, example_inputs),
            *attention_terms(self.structure, self._variables, example_inputs),
        ]

    def _measure(self, plain: nn.Module, example_inputs: Any) -> float:
        """The cost of the model with all gates open; also stores the coefficients that :meth:`_each` needs."""
        constants = torch.tensor([term[3:5] for term in self.terms], dtype=torch.float64, device=self.device)
        self._bilinear, self._linear = constants.view(-1, 2).unbind(1)
        return count_macs(plain, example_inputs) if self.metric == "macs" else count_params(plain)

    def _each(self, read: Tensor, written: Tensor) -> Tensor:
        """The cost of each term; all tensors are (terms,): the channels left that it reads, and those that it
        writes.
        """
        return (self._bilinear * read + self._linear) * written

    def probabilities(self) -> Tensor:
        """The open probability (or the family's surrogate) of every gate, (structure.size,), with a graph."""
        return torch.cat([gate.open_probability() for gate in self.structure.gates])

    @functools.cached_property
    def prunable(self) -> Tensor:
        """The gates on which the cost depends: bool, (structure.size,), on the host."""
        found = torch.zeros(self.structure.size, dtype=torch.bool)
        found[[*self._variables.gates, *self.whole]] = True
        return found

    @functools.cached_property
    def whole(self) -> set[int]:
        """The gates of whole residual branches. All of them may close; other widths keep one open gate."""
        return {gate for term in self.terms for gate in self.structure.branches(term.name)}

    def decision(self) -> Tensor:
        """The gates that are open in evaluation: bool, (structure.size,)."""
        return torch.cat([gate.is_open() for gate in self.structure.gates])


def structure_of(model: nn.Module, example_inputs: Any) -> Structure | UnitStructure:
    """Find which gates of ``model`` cut which classes of units.

    Returns: a :class:`UnitStructure` if the gates are on parameters, else a :class:`Structure`.

    Raises: what the model raises on the example inputs.
    """
    # The model itself says best what is wrong with inputs; its copies are without gates, and have no values.
    inputs.without_arithmetic(model, example_inputs, inputs.evaluate)
    return UnitStructure(model, example_inputs) if has_unit_gates(model) else Structure(model, example_inputs)
