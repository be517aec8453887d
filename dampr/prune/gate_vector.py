"""The vector of all gates of a model: its gates one after the other, each once, because tied layers share theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from dampr.gates import Gate
from dampr.gates.selected import whole
from dampr.nn import GatedLayer

Layer = TypeVar("Layer", bound=GatedLayer)


class GateVector(Generic[Layer]):
    """The positions of each layer's gates in the vector of all gates of a model.

    Attributes:
        gated: name -> gated layer.
        size: the number of all gates.
        holders: for each gate object in :attr:`gates`, the name of the first layer that has it.
    """

    def __init__(self, gated: Mapping[str, Layer]) -> None:
        self.gated = dict(gated)
        self.size = 0
        self._starts: dict[str, int] = {}
        self._counts = {name: layer.gate.num_gates for name, layer in self.gated.items()}
        first: dict[Gate, str] = {}
        for name, layer in self.gated.items():
            self._starts[name] = self._starts.get(first.setdefault(layer.gate, name), self.size)
            self.size = max(self.size, self._starts[name] + layer.gate.num_gates)
        self.holders = list(first.values())

    @property
    def gates(self) -> list[Gate]:
        """Every gate object of the layers, once, in the order of the vector; whole even if units have left the
        layers.
        """
        return [whole(self.gated[name].gate) for name in self.holders]

    def start(self, name: str) -> int:
        """The position of the first gate of layer ``name``."""
        return self._starts[name]

    def count(self, name: str) -> int:
        """The number of gates that layer ``name`` had when this object was made."""
        return self._counts[name]

    def rows(self, name: str) -> list[range]:
        """The gates of layer ``name`` in the vector of all gates."""
        return [range(self.start(name), self.start(name) + self.count(name))]

    def least(self, start: int) -> int:
        """The fewest gates that may be open of the width whose first gate is ``start``."""
        return 1

    def widths(self) -> list[list[range]]:
        """The result of :meth:`rows` for each entry of :attr:`gates`."""
        return [self.rows(name) for name in self.holders]
