"""Bad input gets one error that names the argument, its value and what was expected."""

import pickle

import pytest
import torch

import dampr
from dampr import functional, gates
from dampr.spec import hard_concrete

X, W = torch.zeros(2, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: functional.gated_linear([1.0], W), TypeError, r"x=\[1.0\]: expected a torch.Tensor"),
        (lambda: functional.gated_linear(X.long(), W), TypeError, "x.dtype=torch.int64: expected a floating-point"),
        (lambda: functional.gated_linear(X, W[0]), ValueError, r"weight.shape=\(4,\): expected two dimensions"),
        (lambda: functional.gated_linear(torch.zeros(2, 5), W), ValueError, r"x.shape=\(2, 5\): expected \(..., 4\)"),
        (lambda: functional.gated_linear(X, W, torch.zeros(4)), ValueError, r"bias.shape=\(4,\): expected \(3,\)"),
        (
            lambda: functional.gated_linear(X, W.double()),
            TypeError,
            "weight.dtype=torch.float64: expected torch.float32",
        ),
        (lambda: functional.gated_linear(X, W.to("meta")), ValueError, "weight.device=meta: expected cpu"),
        (
            lambda: functional.gated_linear(X, W, input_gate=torch.zeros(3), seed=0),
            ValueError,
            r"input_gate.shape=\(3,\): expected \(4,\)",
        ),
        (
            lambda: functional.gated_linear(X, W, output_gate=torch.zeros(4), seed=0),
            ValueError,
            r"output_gate.shape=\(4,\): expected \(3,\)",
        ),
        (
            lambda: functional.gated_linear(X, W, output_gate=torch.zeros(3).half(), seed=0),
            TypeError,
            "output_gate.dtype=torch.float16",
        ),
        (
            lambda: functional.gated_linear(X, W, output_gate=torch.zeros(3).double(), seed=0),
            TypeError,
            "output_gate.dtype=torch.float64",
        ),
        (
            lambda: functional.gated_linear(X, W, output_gate=torch.zeros(3, device="meta"), seed=0),
            ValueError,
            "output_gate.device=meta",
        ),
        (lambda: functional.gated_linear(X, W, output_gate=torch.zeros(3)), ValueError, "seed=None: expected an int"),
        (
            lambda: functional.gated_linear(X, W, output_gate=torch.zeros(3), seed=-1),
            ValueError,
            r"seed=-1: expected an int in \[0, 2\*\*63\)",
        ),
        (
            lambda: functional.gated_linear(X, W, output_gate=torch.zeros(3), seed=2**63),
            ValueError,
            "seed=9223372036854775808",
        ),
        (
            lambda: functional.gated_linear(X, W, output_gate=torch.zeros(3), seed=torch.zeros(2).long()),
            ValueError,
            r"seed: got torch.int64 of shape \(2,\)",
        ),
        (
            lambda: functional.sample_gates(torch.zeros(2, 2), seed=0),
            ValueError,
            r"log_alpha.shape=\(2, 2\): expected one dimension",
        ),
        (
            lambda: functional.sample_gates(torch.zeros(2), seed=0, rows=-1),
            ValueError,
            "rows=-1: expected an integer of at least 0",
        ),
        (
            lambda: functional.expected_l0(torch.zeros(3), torch.zeros(2)),
            ValueError,
            r"group_size.shape=\(2,\): expected \(3,\)",
        ),
        (
            lambda: functional.expected_l0(torch.zeros(3), lam=torch.zeros(2)),
            ValueError,
            r"lam.shape=\(2,\): expected \(3,\)",
        ),
        (
            lambda: functional.expected_l0(torch.zeros(3), prior_precision=0.1),
            ValueError,
            r"group_sq_norm=None: expected",
        ),
        (lambda: functional.open_probability(torch.zeros(3).long()), TypeError, "log_alpha.dtype=torch.int64"),
        (lambda: hard_concrete("mean"), ValueError, "rule='mean': expected one of"),
        (lambda: hard_concrete(gamma=0.0), ValueError, "gamma=0.0: expected a finite number below 0"),
        (lambda: hard_concrete(zeta=1), ValueError, "zeta=1: expected a finite number above 1"),
        (lambda: hard_concrete(beta=float("nan")), ValueError, "beta=nan: expected a finite number above 0"),
        (lambda: gates.HardConcrete(0), ValueError, "num_gates=0: expected an integer of at least 1"),
        (lambda: gates.HardConcrete(2.5), ValueError, "num_gates=2.5"),
        *[
            (lambda make=make: make(device=2**63), ValueError, r"device=9223372036854775808: expected None or a")
            for make in (
                lambda **how: gates.HardConcrete(2, **how),
                lambda **how: gates.DiscriminativeMask(2, **how),
                lambda **how: gates.DiffPrune(2, **how),
                lambda **how: gates.DifferentiableMask(2, **how),
                lambda **how: gates.DependencyGenerator([2], **how),
                lambda **how: gates.place_gate("dep_l0", 2, per_sample=False, **how),
            )
        ],
        (lambda: gates.HardConcrete(2, device="tpu9"), ValueError, "device='tpu9': expected None or a device"),
        (lambda: gates.HardConcrete(2, device=1.5), TypeError, "device=1.5: expected None or a device"),
        (
            lambda: gates.HardConcrete(2, preset="mode"),
            ValueError,
            r"preset='mode': expected one of \['paper', 'median', 'binary'\]",
        ),
        (
            lambda: dampr.nn.GatedLinear(4, 3, granularity="column"),
            ValueError,
            r"granularity='column': expected 'output', 'input', 'weight', a tuple \(rows, cols\)",
        ),
        (
            lambda: dampr.nn.GatedLinear(4, 3, granularity=(2, 0)),
            ValueError,
            r"granularity=\(2, 0\): expected a tuple of two positive integers",
        ),
        (
            lambda: dampr.nn.GatedLinear(4, 3, granularity="weight", per_sample=True),
            ValueError,
            "per_sample=True with granularity='weight'",
        ),
        (
            lambda: functional.gated_linear(X, W, weight_gate=torch.zeros(11), seed=0),
            ValueError,
            r"weight_gate.shape=\(11,\): expected \(12,\)",
        ),
        (
            lambda: functional.gated_linear(X, W, weight_gate=torch.zeros(12), input_gate=torch.zeros(4), seed=0),
            ValueError,
            "weight_gate: expected no input_gate",
        ),
        (
            lambda: functional.gated_linear(X, W, weight_gate=torch.zeros(12), block=2, seed=0),
            ValueError,
            "block=2: expected a tuple",
        ),
        (
            lambda: functional.gated_linear(X, W, torch.zeros(3).long()),
            TypeError,
            "bias.dtype=torch.int64: expected torch.float32",
        ),
        (
            lambda: functional.gated_linear(X, W, torch.zeros(3, device="meta")),
            ValueError,
            "bias.device=meta: expected cpu",
        ),
        (lambda: dampr.nn.GatedLinear(4, 3, gate="hard"), ValueError, "gate='hard': expected one of"),
        (lambda: dampr.nn.GatedLinear(4, 3, gate=7), TypeError, "gate=7: expected a family's name"),
        (lambda: dampr.nn.GatedLinear(4, 3, gate=gates.HardConcrete(4)), ValueError, "gate.num_gates=4: expected 3"),
        (
            lambda: dampr.nn.GatedLinear.from_dense(torch.nn.Conv2d(1, 1, 1)),
            TypeError,
            "layer=Conv2d: expected exactly nn.Linear",
        ),
        (lambda: gates.PolyakAverage(1.0), ValueError, r"decay=1.0: expected a number in \[0, 1\)"),
        (lambda: dampr.penalty(torch.nn.Linear(2, 2)), ValueError, "expected gated layers"),
        (lambda: dampr.summary(torch.nn.Linear(2, 2)), ValueError, "expected gated layers"),
        (lambda: dampr.param_groups(torch.nn.Linear(2, 2), lr=-1.0), ValueError, "lr=-1.0"),
    ],
)
def test_error_names_argument_value_and_expectation(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("made", [torch.tensor, lambda n: torch.tensor([n]).numpy()[0]], ids=["tensor", "numpy"])
def test_whole_numbers_may_be_numpys_or_in_a_tensor(made, tmp_path):
    x = torch.randn(4, 6)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    plan = dampr.Plan(model, x, macs=0.7, steps=made(50), recalibrate=made(0), round_to=made(2), min_width=made(1))
    twin = pickle.loads(pickle.dumps(plan))
    assert (type(plan.steps), twin.steps) == (int, 50)
    gated = dampr.convert(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)), x)
    dampr.Budget(gated, x, macs=0.7, steps=made(50), warmup=made(0)).finalize(round_to=made(2), min_width=made(1))
    dampr.compact(gated, x, round_to=made(2))
    history = dampr.History(tmp_path / "history.jsonl", plan)
    history.record(step=made(3))
    assert [row["step"] for row in history.rows()] == [3]
    assert type(gates.DependentHardConcrete(gates.DependencyGenerator([made(3)]), made(0)).index) is int
