"""The fuzzer finds what is planted, says how to see it again,
and every kind of fault that it has found stays mended.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dampr
from dampr import functional, gates, spec
from dampr import nn as gated
from tests.limits import HANG

from tests.fuzz.cases import Case, judge  # isort: skip
from tests.fuzz.targets import TARGETS  # isort: skip
from tests.fuzz.values import Draw  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
X, WEIGHT, GATE = torch.randn(3, 4), torch.randn(2, 4), torch.randn(2)


def fuzz(*arguments: str, plant: str = "") -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys, runpy\n{plant}\nsys.argv = ['fuzz', *{arguments!r}]\nrunpy.run_module('tests.fuzz', "
        "run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=HANG
    )


@pytest.mark.skipif(dampr.backend_info()["cpp"].startswith("missing"), reason="needs the extension")
def test_a_planted_fault_is_found_with_the_command_that_shows_it() -> None:
    plant = (
        "import dampr.ops.backend_cpp as module\n"
        "right = module.sample_gates_fwd\n"
        "module.sample_gates_fwd = lambda *arguments: right(*arguments) * 1.01"
    )
    found = fuzz("--child", "--target", "sample_gates", "--cases", "40", "--seed", "0", plant=plant)
    assert "finding sample_gates" in found.stdout
    clean = fuzz("--target", "open_probability", "--cases", "40")
    assert clean.returncode == 0
    assert clean.stdout.strip() == "40 cases of 1 targets, 0 findings"


def test_a_crash_is_a_finding_and_the_next_case_is_run() -> None:
    found = fuzz("--target", "planted_crash", "--cases", "2")
    assert found.returncode == 1
    assert (
        "FINDING planted_crash: the process died: SIGABRT\n    python -m tests.fuzz --target planted_crash --seed 1"
        in found.stdout
    )
    assert "2 cases of 1 targets, 2 findings" in found.stdout


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_cases_of_every_target(name: str) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        assert TARGETS[name](Draw(seed)) is None, f"python -m tests.fuzz --target {name} --seed {seed}"


def test_the_verdict_is_about_names_values_and_arguments() -> None:
    def raises(x: Any, message: str) -> None:
        x.add_(1)
        raise ValueError(message)

    assert judge(Case(lambda x: 1 / 0, (1,), names=("x",))) == "raises ZeroDivisionError: division by zero"
    assert judge(Case(lambda x: X.new_zeros(3), (X,), names=("x",), valid=True, truth=lambda: torch.ones(3)))
    assert "names no argument" in str(judge(Case(lambda x: raises(x, "no"), (X.clone(),), names=("x",))))
    assert "have changed" in str(judge(Case(lambda x: raises(x, "x=1: expected 2"), (X.clone(),), names=("x",))))


# What the fuzzer has found, one of each kind, and what is said of it now.
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "a bias that is shorter was read beyond its end": (
        ValueError,
        r"^bias\.shape=\(1,\): expected \(2,\)",
        lambda: functional.gated_affine(GATE, torch.ones(2), torch.ones(1), seed=1),
    ),
    "a bias on the meta device": (
        ValueError,
        "^bias.device=meta: expected cpu",
        lambda: functional.gated_affine(GATE, torch.ones(2), torch.empty(2, device="meta"), seed=1),
    ),
    "a gain that is no tensor": (TypeError, "^weight=2.0", lambda: functional.gated_affine(GATE, 2.0, None, seed=1)),
    "a spec that is none": (TypeError, "^spec='sample'", lambda: functional.sample_gates(GATE, seed=1, spec="sample")),
    "a switch that is a tensor": (
        TypeError,
        r"^per_sample=tensor\(\[1\., 1\.\]\): expected True or False",
        lambda: functional.gated_linear(X, WEIGHT, output_gate=GATE, seed=1, per_sample=torch.ones(2)),
    ),
    "a switch that is a word": (TypeError, "^per_sample='no'", lambda: gated.GatedLinear(2, 2, per_sample="no")),
    "rows in a tensor of bool": (
        ValueError,
        r"^rows=tensor\(0\.5000\)",
        lambda: functional.sample_gates(GATE, seed=1, rows=torch.tensor(0.5)),
    ),
    "a stride of 0": (
        ValueError,
        "^stride=0: expected an integer of at least 1",
        lambda: functional.gated_conv2d(X.view(1, 3, 2, 2), torch.randn(2, 3, 1, 1), stride=0),
    ),
    "a kernel beyond the image": (
        ValueError,
        r"^x\.shape=\(1, 3, 2, 2\): expected images that the kernel of weight, \(3, 3\), fits into",
        lambda: functional.gated_conv2d(X.view(1, 3, 2, 2), torch.randn(2, 3, 3, 3)),
    ),
    "a kernel of no position": (
        ValueError,
        r"^weight\.shape=\(2, 3, 0, 1\)",
        lambda: functional.gated_conv2d(X.view(1, 3, 2, 2), torch.randn(2, 3, 0, 1)),
    ),
    "same padding with a stride": (
        ValueError,
        "^padding='same' with stride=2",
        lambda: functional.gated_conv1d(X.view(1, 3, 4), torch.randn(2, 3, 1), stride=2, padding="same"),
    ),
    "a sparse tensor": (
        TypeError,
        "^log_alpha.layout=torch.sparse_coo",
        lambda: functional.open_probability(GATE.to_sparse()),
    ),
    "a number that is a list": (
        ValueError,
        r"^lam=\[1\]: expected a finite number",
        lambda: functional.expected_l0(GATE, lam=[1]),
    ),
    "a momentum that is a word": (
        ValueError,
        "^momentum='a'",
        lambda: functional.gated_batch_norm(X, torch.randn(4), training=True, momentum="a", seed=1),
    ),
    "a word in the place of a choice": (
        ValueError,
        "^order=tensor",
        lambda: gates.DiscriminativeMask(3, order=torch.ones(2)),
    ),
    "a constant that is complex": (ValueError, "^beta=1j", lambda: spec.hard_concrete(beta=1j)),
    "a gate that is a layer": (TypeError, r"^gate=Linear\(", lambda: gated.GatedLinear(2, 2, gate=nn.Linear(2, 2))),
    "a function that makes no gate": (
        TypeError,
        "^gate=<built-in function print>",
        lambda: gated.GatedLinear(2, 2, gate=print),
    ),
    "a granularity that is a list": (
        ValueError,
        r"^granularity=\[1\]",
        lambda: gated.GatedLinear(2, 2, granularity=[1]),
    ),
    "an input that is no tensor": (TypeError, "^input=3", lambda: gated.GatedLayerNorm(4)(3)),
    "parts that are a tensor": (
        ValueError,
        "^parts=tensor",
        lambda: gated.GatedTransformerEncoderLayer.from_dense(nn.TransformerEncoderLayer(4, 2, 5), parts=torch.ones(2)),
    ),
    "heads that are a number": (TypeError, "^heads=3", lambda: gated.PrunedMultiheadAttention(8, 4, heads=3)),
    "heads of no layer": (TypeError, "^layer=complex", lambda: gated.GatedHeads.from_dense(1j, heads=2)),
    "penalties of no gates": (TypeError, "^tensors=1.0: expected an iterable", lambda: gates.square_penalty(1.0, 0.1)),
    "a model that is none": (TypeError, "^model=3: expected a torch.nn.Module", lambda: dampr.summary(3)),
    "a learning rate that is a tensor": (
        ValueError,
        "^lr=tensor",
        lambda: dampr.param_groups(nn.Linear(2, 2), lr=torch.ones(2)),
    ),
    "batches that are a number": (
        TypeError,
        "^batches=1: expected an iterable",
        lambda: dampr.prune_once(nn.Linear(2, 2), 1, nn.functional.mse_loss, macs=0.5),
    ),
    "a path that is a tensor": (TypeError, "^path=tensor", lambda: dampr.History(torch.ones(1))),
    "a layer for a number of draws": (
        ValueError,
        r"^rows=Linear\(",
        lambda: gates.DiffPrune(3, stochastic=True)(nn.Linear(2, 2)),
    ),
    "a shape for a number of draws": (ValueError, "^rows=", lambda: gates.Fixed(GATE)(torch.ones(2, 2))),
    "more gates than there are numbers": (ValueError, "^num_gates=", lambda: gates.HardConcrete(2**70)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_it_has_found_is_refused_by_name(kind: str) -> None:
    error, message, call = REFUSED[kind]
    with pytest.raises(error, match=message):
        call()


def test_sizes_of_numpy_and_in_tensors_are_taken_as_torch_takes_them() -> None:
    numpy = pytest.importorskip("numpy")
    for size in (numpy.int64(3), torch.tensor(3)):
        assert gated.GatedLinear(4, size).gate.num_gates == 3
        assert type(gates.HardConcrete(size).num_gates) is int
