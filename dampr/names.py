"""The names that arguments take, as types: an editor completes them and a type checker finds a misspelt one.

What runs checks them too, and says what was expected.
"""

from __future__ import annotations

from typing import Literal

Backend = Literal["auto", "triton", "cpp", "reference"]

Family = Literal["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"]
Preset = Literal["paper", "median", "binary"]  # of HardConcrete
Direction = Literal["forward", "backward"]  # of DependentHardConcrete
Order = Literal["zero", "one"]  # of DiscriminativeMask
WindowShape = Literal["tanh", "linear", "piecewise_linear"]  # the same
RampShape = Literal["A", "B", "C", "D", "E"]  # of DiffPrune
Revival = Literal["noise", "straight_through"]  # the same
MaskVariant = Literal["hard", "hard_constant", "smooth", "exact_zero", "logistic"]  # of DifferentiableMask
SlopeMode = Literal["fixed", "scheduled", "trainable"]  # the same
ThresholdMode = Literal["fixed", "trainable"]  # the same
Regulariser = Literal["l1", "foothill"]  # the same

VectorGranularity = Literal["output", "input"]
Granularity = Literal["output", "input", "weight"]
Activation = Literal["relu"]  # behind a norm
Statistics = Literal["all", "open"]  # of a norm over gated features
Widths = Literal["equal", "own"]  # of the layers and directions of a recurrent layer

Score = Literal["importance", "learned"]
Criterion = Literal["taylor", "magnitude", "random"]
