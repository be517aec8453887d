"""Wrong arguments of dampr._C are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .calls import (
    _C,
    RULE,
    ptr,
)


def norm_fwd(a: int, **how: Any) -> None:
    """A norm of one channel and two values, all its tensors at one address."""
    tensors = (
        "x",
        "log_alpha",
        "seed_ptr",
        "gain",
        "bias",
        "mean",
        "var",
        "running_mean",
        "running_var",
        "updates",
        "out",
    )
    sizes = {"outer": 1, "middle": 2, "n": 1, "inner": 1, "per_outer": True, "momentum": 0.5}
    _C.norm_gate_fwd(
        RULE,
        0,
        **(dict.fromkeys(tensors, a) | sizes | {"training": True, "eps": 0.0, "relu": True, "threads": 1} | how),
    )


def norm_bwd(a: int, **how: Any) -> None:
    tensors = ("g", "x", "log_alpha", "seed_ptr", "gain", "bias", "mean", "var", "dx", "dgain", "dbias", "dlog_alpha")
    sizes = {"outer": 1, "middle": 2, "n": 1, "inner": 1, "per_outer": True}
    _C.norm_gate_bwd(
        RULE,
        0,
        **(dict.fromkeys(tensors, a) | sizes | {"training": True, "eps": 0.0, "relu": True, "threads": 1} | how),
    )


WRONG = {
    r"dtype=4: expected": lambda a: _C.gate_rows_fwd(RULE, 4, a, 1, 1, a, a, a, 1),
    r"dtype=2: expected 0 \(float32\) or 1": lambda a: _C.gates_fwd(RULE, 2, a, a, 1, 1, a, 1),
    r"rows=-1: expected": lambda a: _C.gates_fwd(RULE, 0, a, a, -1, 1, a, 1),
    r"start=-1: expected an index of 0 or more": lambda a: _C.gates_fwd(RULE, 0, a, a, 1, 1, a, 1, -1),
    r"start=9223372036854775807: expected": lambda a: _C.gates_bwd(RULE, 0, a, a, 1, 1, a, a, 1, 2**63 - 1),
    r"n=-3: expected": lambda a: _C.gates_bwd(RULE, 0, a, a, 1, -3, a, a, 1),
    r"n_out=-1: expected": lambda a: _C.fold_gates_fwd(RULE, 0, 0, a, 0, -1, 1, a, a, a, a, a, 0, 1),
    r"n_in=-2: expected": lambda a: _C.fold_gates_bwd(RULE, 0, 0, a, 0, a, 0, 1, -2, a, a, a, a, a, 0, a, a, 0, 1),
    r"rows=9223372036854775807: expected": lambda a: _C.gate_rows_fwd(RULE, 0, a, 2**63 - 1, 2, a, a, a, 1),
    r"threads=0: expected": lambda a: _C.gate_rows_bwd(RULE, 0, a, a, 1, 1, a, a, a, a, a, 0),
    r"spec\.family=9: expected": lambda a: _C.gates_fwd(RULE._replace(family=9), 0, a, a, 1, 1, a, 1),
    r"spec\.rule=4: expected": lambda a: _C.gates_fwd(RULE._replace(rule=4), 0, a, a, 1, 1, a, 1),
    r"spec\.beta=0": lambda a: _C.gates_fwd(RULE._replace(beta=0.0), 0, a, a, 1, 1, a, 1),
    r"spec=.*9 fields": lambda a: _C.gates_fwd(tuple(RULE)[:8], 0, a, a, 1, 1, a, 1),
    r"seed_ptr=0: expected": lambda a: _C.gates_fwd(RULE, 0, a, 0, 1, 1, a, 1),
    r"x=0: expected": lambda a: _C.gate_rows_fwd(RULE, 0, 0, 1, 1, a, a, a, 1),
    r"log_alpha=0: expected": lambda a: _C.gate_rows_fwd(RULE, 0, a, 1, 1, 0, a, a, 1),
    r"out_dtype=0: expected float64": lambda a: _C.fold_gates_fwd(RULE, 1, 0, a, 0, 1, 1, a, a, a, a, a, 0, 1),
    r"w_dtype=7: expected": lambda a: _C.gate_weights_fwd(RULE, 7, 0, a, 1, a, a, a, 1),
    r"out_dtype=2: expected float64": lambda a: _C.gate_weights_fwd(RULE, 1, 2, a, 1, a, a, a, 1),
    r"w_dtype=1: expected float64": lambda a: _C.gate_weights_bwd(RULE, 0, 1, a, a, 1, a, a, a, a, 1),
    r"count=-2: expected a size": lambda a: _C.gate_weights_fwd(RULE, 0, 0, a, -2, a, a, a, 1),
    r"count=9223372036854775807: expected": lambda a: _C.gate_weights_bwd(RULE, 0, 0, a, a, 2**63 - 1, a, a, a, a, 1),
    r"w=0: expected": lambda a: _C.gate_weights_bwd(RULE, 0, 0, a, 0, 1, a, a, a, a, 1),
    r"g=0: expected": lambda a: _C.gate_weights_bwd(RULE, 0, 0, 0, a, 1, a, a, a, a, 1),
    r"out=0: expected": lambda a: _C.gate_weights_fwd(RULE, 0, 0, a, 1, a, a, 0, 1),
    r"block_rows=0: expected": lambda a: _C.fold_blocks_fwd(RULE, 0, 0, a, 1, 1, 0, 1, a, a, a, 1),
    r"block_cols=-1: expected": lambda a: _C.fold_blocks_bwd(RULE, 0, 0, a, a, 1, 1, 1, -1, a, a, a, a, a, 1),
    r"n_out=-1: expected a size": lambda a: _C.fold_blocks_bwd(RULE, 0, 0, a, a, -1, 1, 1, 1, a, a, a, a, a, 1),
    r"g_dtype=5: expected": lambda a: _C.fold_blocks_bwd(RULE, 5, 0, a, a, 1, 1, 1, 1, a, a, a, a, a, 1),
    r"m=-1: expected": lambda a: _C.small_fwd(RULE, 0, -1, 1, 1, a, a, a, a, a, a, a, True, a, a),
    r"dtype=3: expected 0 \(float32\) or 1": lambda a: _C.small_fwd(RULE, 3, 1, 1, 1, a, a, a, a, a, a, a, True, a, a),
    r"y=0: expected": lambda a: _C.small_fwd(RULE, 0, 1, 1, 1, a, a, a, a, a, a, a, True, 0, a),
    r"dy=0: expected": lambda a: _C.small_bwd(RULE, 0, 1, 1, 1, 0, a, a, a, a, a, a, a, True, a, a, a, a, a, a),
    r"w=0: expected an address, as there are 4": lambda a: _C.small_bwd(
        RULE, 0, 1, 2, 2, a, a, 0, a, a, a, a, a, True, a, a, a, a, a, a
    ),
    r"b=\d+: expected 0, as rows have no gates": lambda a: _C.fold_gates_fwd(
        RULE, 0, 0, a, a, 1, 1, 0, a, 0, a, a, a, 1
    ),
    r"log_alpha=0: expected an address, as there are 2": lambda a: _C.fold_blocks_fwd(
        RULE, 0, 0, a, 2, 1, 1, 1, 0, a, a, 1
    ),
    r"block_cols=0: expected": lambda a: _C.fold_blocks_bwd(RULE, 0, 0, a, a, 1, 1, 1, 0, a, a, a, a, a, 1),
    r"b_out=0: expected": lambda a: _C.fold_gates_fwd(RULE, 0, 0, a, a, 1, 1, a, 0, a, 0, a, 0, 1),
    r"w=0: expected an address, as there are 6": lambda a: _C.fold_gates_bwd(
        RULE, 0, 0, a, 0, 0, 0, 2, 3, a, 0, a, 0, a, 0, 0, 0, 0, 1
    ),
    r"middle=-1: expected": lambda a: norm_fwd(a, middle=-1),
    r"var=0: expected an address, as there are 1": lambda a: norm_fwd(a, var=0),
    r"eps=-1.*: expected a number": lambda a: norm_fwd(a, eps=-1.0),
    r"eps=nan": lambda a: norm_fwd(a, eps=float("nan")),
    r"momentum=1\.5.*: expected a number in": lambda a: norm_fwd(a, momentum=1.5),
    r"running_var=\d+: expected 0": lambda a: norm_fwd(a, middle=1),
    r"log_alpha=0: expected an address, as there are 1": lambda a: norm_fwd(a, log_alpha=0),
    r"mean=0: expected": lambda a: norm_bwd(a, mean=0),
    r"g=0: expected an address, as there are 2": lambda a: norm_bwd(a, g=0),
    r"seed_ptr=0: expected the": lambda a: norm_bwd(a, seed_ptr=0),
    r"widths=1 sizes: expected two": lambda a: _C.generator_fwd(0, [], [4], 1.0, a),
    r"widths=0: expected": lambda a: _C.generator_fwd(0, [a, a], [4, 0], 1.0, a),
    r"parameters=1 addresses: expected": lambda a: _C.generator_fwd(0, [a], [4, 2], 1.0, a),
    r"parameters=0: expected an address": lambda a: _C.generator_bwd(0, [a, 0], [4, 2], 1.0, a, a, [a, a]),
    r"limit=0.*: expected": lambda a: _C.generator_bwd(0, [a, a], [4, 2], 0.0, a, a, [a, a]),
    r"grads=0: expected": lambda a: _C.generator_bwd(0, [a, a], [4, 2], 1.0, a, a, [a, 0]),
    r"grads=1 addresses: expected": lambda a: _C.generator_bwd(0, [a, a], [4, 2], 1.0, a, a, [a]),
    r"dtype=2: expected 0": lambda a: _C.generator_fwd(2, [a, a], [4, 2], 1.0, a),
    r"start=-4: expected": lambda a: _C.philox_words(a, -4, 1, a, 1),
    r"count=-1: expected": lambda a: _C.philox_uniform(a, 0, -1, a, 1),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    tensor = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        WRONG[message](ptr(tensor))
