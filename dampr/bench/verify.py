"""Every op on every backend that is present, against the float64 reference: values, every gradient, noise, and which gates are 0 or 1.

``python -m dampr.bench.verify`` needs torch and numpy, and triton where there is a GPU; ``dampr verify`` prints the same as a table.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dampr import functional, ops, philox, reference
from dampr.bench import records
from dampr.spec import GateSpec, hard_concrete
from dampr.testing import HARD_SHAPES, Comparison, compare, layouts

GRADIENTS = ("x", "weight", "bias", "input_gate", "output_gate")
_DTYPES = {
    ("cpp", "cpu"): (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    ("reference", "cpu"): (torch.float32,),
    ("triton", "cuda"): (torch.float32, torch.bfloat16, torch.float16),
    ("triton", "cpu"): (torch.float32,),  # through the interpreter, whose bf16 dot is not to be trusted
    ("reference", "cuda"): (torch.float32, torch.bfloat16),
}


@dataclass
class Row:
    """One line of the table: an op on a backend in a dtype, over all its cases."""

    op: str
    backend: str
    device: str
    dtype: str
    cases: int = 0
    worst: Comparison | None = None
    worst_case: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.failures

    def add(self, case: str, result: Comparison) -> None:
        self.cases += 1
        if not result.ok:
            self.failures.append(f"{case}: {result}")
        if self.worst is None or result.share > self.worst.share:
            self.worst, self.worst_case = result, case

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def targets() -> list[tuple[str, str, torch.dtype]]:
    """(backend, device, dtype) of everything that can run here."""
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for backend in ("reference", "cpp", "triton"):
            for dtype in _DTYPES.get((backend, device), ()):
                if ops.backends.why_not(backend, torch.device(device), dtype) is None:
                    found.append((backend, device, dtype))
    return found


def run(only_op: str | None = None) -> list[Row]:
    """Verify everything that can run here; a row per op, backend, device and dtype."""
    rows = []
    for backend, device, dtype in targets():
        name = str(dtype).removeprefix("torch.")
        if only_op in (None, "noise") and dtype == torch.float32:
            rows.append(_verify_noise(Row("noise", backend, device, name)))
        if only_op in (None, "sample_gates") and dtype in (torch.float32, torch.float64):
            rows.append(_verify_gates(Row("sample_gates", backend, device, name), dtype))
        if only_op in (None, "gated_linear"):
            rows.append(_verify_linear(Row("gated_linear", backend, device, name), dtype))
    return rows


def _exact(name: str, out: Tensor, expected: Tensor) -> Comparison:
    """A comparison that only equality passes."""
    same = out.shape == expected.shape and bool((out.cpu() == expected.cpu()).all())
    return Comparison(name, 0.0 if same else float("inf"), 0.0, 0.0, 0.0)


def _specs() -> list[tuple[str, GateSpec]]:
    rules = [(rule, hard_concrete(rule)) for rule in ("sample", "paper", "median", "binary")]
    return [*rules, ("sample, beta 0.5, gamma -0.2, zeta 1.3", hard_concrete("sample", 0.5, -0.2, 1.3))]


def _verify_noise(row: Row) -> Row:
    """Drawn gates are 0 and 1 exactly where the reference says, for random seeds and row starts that are no multiple of four."""
    generator = torch.Generator().manual_seed(0)
    for rows, n in ((None, 4096), (3, 1001), (257, 64), (5, 7), (1, 1), (0, 5)):
        seed = torch.randint(0, 2**63 - 1, (1,), generator=generator)
        log_alpha = torch.randn(n, generator=generator) * 3
        truth = reference.gate_values(log_alpha, hard_concrete(), seed, rows)
        with ops.backend(row.backend):
            z = functional.sample_gates(log_alpha.to(row.device), seed=seed.to(row.device), rows=rows)
        row.add(f"rows={rows}, n={n}: zeros", _exact("zeros", z == 0, truth == 0))
        row.add(f"rows={rows}, n={n}: ones", _exact("ones", z == 1, truth == 1))
    with ops.backend("reference"):
        u = philox.uniform(torch.tensor([2**62 + 12345]), 64, 2**34 + 3)
    row.add("uniforms stay inside [2^-24, 1 - 2^-24]", _exact("range", (u >= 2**-24) & (u <= 1 - 2**-24), torch.ones(64, dtype=torch.bool)))
    return row


def _verify_gates(row: Row, dtype: torch.dtype) -> Row:
    generator = torch.Generator().manual_seed(1)
    for (label, spec), (rows, n) in itertools.product(_specs(), ((None, 1), (None, 1003), (0, 5), (7, 13), (130, 64))):
        seed = torch.randint(0, 2**63 - 1, (1,), generator=generator)
        log_alpha = (torch.randn(n, generator=generator) * 3).to(dtype)
        shape = (n,) if rows is None else (rows, n)
        dz = torch.randn(shape, generator=generator).to(dtype)

        args = (log_alpha, seed, dz, rows, spec)
        out, truth, baseline = (
            gates_once(row.backend, dtype, row.device, *args),
            gates_once(None, torch.float64, "cpu", *args),
            gates_once(None, dtype, "cpu", *args),
        )
        case = f"{label}, rows={rows}, n={n}"
        for name, o, t, b in zip(("z", "dlog_alpha"), out, truth, baseline, strict=True):
            row.add(f"{case}: {name}", compare(name, o, t, b))
    return row


def gates_once(
    backend: str | None, dtype: torch.dtype, device: str, log_alpha: Tensor, seed: Tensor, dz: Tensor, rows: int | None, spec: GateSpec
) -> tuple[Tensor, Tensor]:
    """Gate values and the gradient of log_alpha from one backend; None: from autograd on the reference, without any op of ours."""
    leaf = log_alpha.to(device, dtype).detach().requires_grad_()
    with _running(backend):
        if backend is None:
            z = reference.gate_values(leaf, spec, seed.to(device), rows)
        else:
            z = functional.sample_gates(leaf, seed=seed.to(device), rows=rows, spec=spec)
        if z.requires_grad:  # a binary gate has no derivative
            z.backward(dz.to(device, dtype))
    return z, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _running(backend: str | None) -> AbstractContextManager[None]:
    return nullcontext() if backend is None else ops.backend(backend)


def linear_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Hard shapes with every placement of gates, then layouts of x, weight and the gradient on one shape."""
    placements = (("none", False, False), ("input", True, False), ("output", False, True), ("both", True, True))
    for shape, (gates, on_in, on_out), per_sample in itertools.product(HARD_SHAPES, placements, (False, True)):
        if gates == "none" and per_sample:
            continue
        base = {
            "shape": shape,
            "on_in": on_in,
            "on_out": on_out,
            "per_sample": per_sample,
            "bias": shape[2] != 3,
            "layout": "contiguous",
            "dy": "random",
        }
        yield f"{shape}, gates on {gates}{', per sample' if per_sample else ''}", base
    for layout, dy, per_sample in itertools.product(("transposed", "sliced", "offset"), ("random", "expanded"), (False, True)):
        base = {"shape": (37, 24, 20), "on_in": True, "on_out": True, "per_sample": per_sample, "bias": True, "layout": layout, "dy": dy}
        yield f"(37, 24, 20), both gates, {layout} x and weight, {dy} gradient{', per sample' if per_sample else ''}", base


def _verify_linear(row: Row, dtype: torch.dtype) -> Row:
    generator = torch.Generator().manual_seed(2)
    for case, options in linear_cases():
        seed = torch.randint(0, 2**63 - 1, (1,), generator=generator)
        m, k, n = options["shape"]
        data = {
            "x": torch.randn(m, k, generator=generator),
            "weight": torch.randn(n, k, generator=generator) / max(k, 1) ** 0.5,
            "bias": torch.randn(n, generator=generator) if options["bias"] else None,
            "input_gate": torch.randn(k, generator=generator) if options["on_in"] else None,
            "output_gate": torch.randn(n, generator=generator) if options["on_out"] else None,
        }
        dy = torch.randn(m, n, generator=generator) if options["dy"] == "random" else torch.ones(()).expand(m, n)
        rounded = {name: t if t is None or name.endswith("_gate") else t.to(dtype) for name, t in data.items()}
        dy = dy if options["dy"] == "expanded" else dy.to(dtype)
        args = (rounded, dy, seed, options["per_sample"], options["layout"])
        out = linear_once(row.backend, dtype, row.device, *args)
        truth, baseline = linear_once(None, torch.float64, "cpu", *args), linear_once(None, dtype, "cpu", *args)
        for name, o in out.items():
            row.add(f"{case}: {name}", compare(name, o, truth[name], baseline[name], dtype))
    return row


def linear_once(
    backend: str | None,
    dtype: torch.dtype,
    device: str,
    data: dict[str, Tensor | None],
    dy: Tensor,
    seed: Tensor,
    per_sample: bool,
    layout: str = "contiguous",
) -> dict[str, Tensor]:
    """y and every gradient of one gated linear map, from the same data whatever the dtype; None: autograd on the reference."""
    leaves: dict[str, Tensor] = {}
    for name, t in data.items():
        if t is None:
            continue
        t = t.to(device, dtype if dtype == torch.float64 or not name.endswith("_gate") else torch.float32)
        if name in ("x", "weight"):
            t = dict(layouts(t))[layout]
        leaves[name] = t.detach().requires_grad_()
    seed = seed.to(device)
    with _running(backend):
        if backend is None:
            gates = leaves.get("input_gate"), leaves.get("output_gate")
            second = seed if gates[0] is None else seed ^ philox.SECOND_STREAM
            y = reference.gated_linear(leaves["x"], leaves["weight"], leaves.get("bias"), *gates, seed, second, hard_concrete(), per_sample)
        else:
            y = functional.gated_linear(**leaves, seed=seed, per_sample=per_sample)  # type: ignore[arg-type]
        expanded = dy.stride() == (0, 0)  # converting would make it dense
        y.backward(torch.ones((), dtype=dtype, device=device).expand(dy.shape) if expanded else dy.to(device, dtype))
    result = {"y": y.detach()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"no gradient on {name}"
        result[f"d{name}"] = leaf.grad
    return result


def main(argv: list[str] | None = None) -> int:
    """Print the plain table; 0 when everything passes, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write rows and environment to this file")
    arguments = parser.parse_args(argv)
    rows = run()
    for row in rows:
        worst = "" if row.worst is None else f"worst {row.worst.share:6.1%} of bound: {row.worst_case}"
        print(f"{'ok' if row.ok else 'FAILED':7} {row.op:13} {row.backend:10} {row.device:5} {row.dtype:9} {row.cases:4} cases  {worst}")
        for failure in row.failures[:5]:
            print(f"        {failure}")
    if arguments.json:
        records.write_json(arguments.json, {"environment": records.environment(), "rows": [row.as_dict() for row in rows]})
    return 0 if rows and all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
