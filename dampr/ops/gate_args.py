"""The gates of one call, as ops and backends hand them on.

Schemas list the same things one by one, because they know no tuples.
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
    """What gates beside this tensor are computed in."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


class GateArgs(NamedTuple):
    """A vector of gates: parameters (n,) of the family in ``spec``, a seed if that draws,
    and whether each row has a draw of its own.
    """

    log_alpha: Tensor
    seed: Tensor | None
    spec: GateSpec
    per_sample: bool = False

    @classmethod
    def of(cls, log_alpha: Tensor, seed: Tensor | None, spec: Sequence[Any], per_sample: bool = False) -> GateArgs:
        """Gates from what a schema lists; per sample only if they are drawn at all."""
        spec = unpack(spec)
        return cls(log_alpha, seed, spec, per_sample and spec.rule == SAMPLE)

    def on_rows(self) -> GatePair:
        """The gates of the rows of a matrix, which has none on its columns; one draw."""
        return GatePair(None, self.log_alpha, None, self.seed, self.spec)

    def on_columns(self) -> GatePair:
        """The gates of the columns of a matrix, which has none on its rows; one draw."""
        return GatePair(self.log_alpha, None, self.seed, None, self.spec)

    def rows(self, count: int) -> int | None:
        """How many draws ``count`` rows need, or None for one that they share."""
        return count if self.per_sample else None


class GatePair(NamedTuple):
    """The gates of a layer's inputs and outputs, whose parameters are None where there are none; flat,
    so that a call makes one tuple.
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
        """Gates from what a schema lists; per sample only if they are drawn at all."""
        spec = unpack(spec)
        return cls(in_la, out_la, in_seed, out_seed, spec, per_sample and spec.rule == SAMPLE)

    @property
    def input(self) -> GateArgs | None:
        return (
            None
            if self.input_log_alpha is None
            else GateArgs(self.input_log_alpha, self.input_seed, self.spec, self.per_sample)
        )

    @property
    def output(self) -> GateArgs | None:
        return (
            None
            if self.output_log_alpha is None
            else GateArgs(self.output_log_alpha, self.output_seed, self.spec, self.per_sample)
        )


def unpack(spec: Sequence[Any]) -> GateSpec:
    """A GateSpec from the float list that travels through a schema."""
    return spec if isinstance(spec, GateSpec) else GateSpec(int(spec[0]), int(spec[1]), *spec[2:])
