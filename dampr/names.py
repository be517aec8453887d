"""Types for arguments that take one of a few names, so that an editor completes the names and a type checker finds
misspelt ones.

The functions that take such arguments check them at run time too, and say what was expected.
"""

from __future__ import annotations

from typing import Literal

Backend = Literal["auto", "triton", "cpp", "reference"]

Family = Literal["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"]
Preset = Literal["paper", "median", "binary"]  # HardConcrete
Direction = Literal["forward", "backward"]  # DependentHardConcrete
Order = Literal["zero", "one"]  # DiscriminativeMask
WindowShape = Literal["tanh", "linear", "piecewise_linear"]  # DiscriminativeMask
RampShape = Literal["A", "B", "C", "D", "E"]  # DiffPrune
Revival = Literal["noise", "straight_through"]  # DiffPrune
MaskVariant = Literal["hard", "hard_constant", "smooth", "exact_zero", "logistic"]  # DifferentiableMask
SlopeMode = Literal["fixed", "scheduled", "trainable"]  # DifferentiableMask
ThresholdMode = Literal["fixed", "trainable"]  # DifferentiableMask
Regulariser = Literal["l1", "foothill"]  # DifferentiableMask

VectorGranularity = Literal["output", "input"]
Granularity = Literal["output", "input", "weight"]
Activation = Literal["relu"]  # the activation after a gated norm that the norm computes too
Statistics = Literal["all", "open"]  # the features that a norm over gated features takes its statistics from
Widths = Literal["equal", "own"]  # whether the layers and directions of a recurrent layer share one width

Score = Literal["importance", "learned"]
Criterion = Literal["taylor", "magnitude", "random"]
