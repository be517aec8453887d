"""The gates of one call, in the form in which operators and backends pass them on.

Operator schemas list the fields one by one, because they have no tuples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dampr.spec import SAMPLE, GateSpec

# GatePair as schemas list it
PAIR = "Tensor? input_log_alpha, Tensor? output_log_alpha, Tensor? input_seed, Tensor? output_seed"


def gate_dtype(like: Tensor) -> torch.dtype:
    """The dtype in which gates of a layer with tensor ``like`` are computed: float64 for float64, else float32."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


class GateArgs(NamedTuple):
    """A vector of n gates.

    Attributes:
        log_alpha: the parameters of the family in ``spec``, (n,).
        seed: int64 (1,); None if nothing is drawn.
        spec: how values follow from parameters.
        per_sample: whether each row has a draw of its own.
    """

    log_alpha: Tensor
    seed: Tensor | None
    spec: GateSpec
    per_sample: bool = False

    @classmethod
    def of(cls, log_alpha: Tensor, seed: Tensor | None, spec: Sequence[Any], per_sample: bool = False) -> GateArgs:
        """Gates from the fields that a schema lists; ``per_sample`` is ignored if nothing is drawn."""
        spec = unpack(spec)
        return cls(log_alpha, seed, spec, per_sample and spec.rule == SAMPLE)

    def on_rows(self) -> GatePair:
        """These gates on the rows of a matrix without gates on its columns, with one draw."""
        return GatePair(None, self.log_alpha, None, self.seed, self.spec)

    def on_columns(self) -> GatePair:
        """These gates on the columns of a matrix without gates on its rows, with one draw."""
        return GatePair(self.log_alpha, None, self.seed, None, self.spec)

    def rows(self, count: int) -> int | None:
        """The number of draws for ``count`` rows; None for one draw that all rows share."""
        return count if self.per_sample else None


class GatePair(NamedTuple):
    """The gates of a layer's inputs and outputs.

    A log_alpha is None if there are no such gates. The tuple is flat, so that a call makes one tuple and not two.
    """

    input_log_alpha: Tensor | None
    output_log_alpha: Tensor | None
    input_seed: Tensor | None
    output_seed: Tensor | None
    spec: GateSpec
    per_sample: bool = False

    @classmethod
    def of(
        cls,
        in_la: Tensor | None,
        out_la: Tensor | None,
        in_seed: Tensor | None,
        out_seed: Tensor | None,
        spec: Sequence[Any],
        per_sample: bool = False,
    ) -> GatePair:
        """Gates from the fields that a schema lists; ``per_sample`` is ignored if nothing is drawn."""
        spec = unpack(spec)
        return cls(in_la, out_la, in_seed, out_seed, spec, per_sample and spec.rule == SAMPLE)

    @property
    def input(self) -> GateArgs | None:
        """The gates of the inputs; None if there are none."""
        return (
            None
            if self.input_log_alpha is None
            else GateArgs(self.input_log_alpha, self.input_seed, self.spec, self.per_sample)
        )

    @property
    def output(self) -> GateArgs | None:
        """The gates of the outputs; None if there are none."""
        return (
            None
            if self.output_log_alpha is None
            else GateArgs(self.output_log_alpha, self.output_seed, self.spec, self.per_sample)
        )


def unpack(spec: Sequence[Any]) -> GateSpec:
    """A GateSpec from the list of floats that a schema passes."""
    return spec if isinstance(spec, GateSpec) else GateSpec(int(spec[0]), int(spec[1]), *spec[2:])
