"""All gates of a model one after the other, each distinct gate once: tied layers share theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from dampr.gates import Gate
from dampr.gates.selected import whole
from dampr.nn import GatedLayer

Layer = TypeVar("Layer", bound=GatedLayer)


class GateVector(Generic[Layer]):
    """Where the gates of each layer are in the vector of all gates of a model.

    Attributes:
        gated: the gated layers by name.
        size: the number of all gates.
        holders: the name of the first layer that has each of :attr:`gates`.
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
        """Every gate once, as the layers have them now, whole where units have left them.

        The vector of all gates has them in a row.
        """
        return [whole(self.gated[name].gate) for name in self.holders]

    def start(self, name: str) -> int:
        """Where the gates of layer ``name`` begin in the vector of all gates."""
        return self._starts[name]

    def count(self, name: str) -> int:
        """How many gates the layer ``name`` had when this was made."""
        return self._counts[name]

    def rows(self, name: str) -> list[range]:
        """The gates of layer ``name`` in the vector of all gates."""
        return [range(self.start(name), self.start(name) + self.count(name))]

    def widths(self) -> list[list[range]]:
        """The same for each of :attr:`gates`."""
        return [self.rows(name) for name in self.holders]
