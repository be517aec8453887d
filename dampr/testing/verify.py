"""Compare every operator on every available backend with the float64 reference: values, all gradients, noise, and which
gates are 0 or 1.

``python -m dampr.testing.verify`` needs torch and numpy, and triton on a GPU; ``dampr verify`` prints the same as a
table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import torch

from dampr import _checks, _progress, names, ops, records

from . import verify_conv, verify_gates, verify_linear, verify_norm
from .rows import TF32, Row

_DTYPES = {
    ("cpp", "cpu"): (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    ("reference", "cpu"): (torch.float32,),
    ("triton", "cuda"): (torch.float32, torch.bfloat16, torch.float16),
    ("triton", "cpu"): (torch.float32,),  # in Triton's interpreter, whose bfloat16 dot is not reliable
    ("reference", "cuda"): (torch.float32, torch.bfloat16),
}


_PRODUCTS = ("gated_linear", "weight_gated_linear", "gated_conv2d")
PARTS = 6  # the parts of a row if several processes work

Job = tuple[str, names.Backend, str, torch.dtype, bool]  # op, backend, device, dtype, whether products are in TF32


def targets() -> list[tuple[names.Backend, str, torch.dtype]]:
    """(backend, device, dtype) for everything that can run here."""
    found, backends = [], tuple[names.Backend, ...](("reference", "cpp", "triton"))
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for backend in backends:
            for dtype in _DTYPES.get((backend, device), ()):
                if ops.backends.why_not(backend, torch.device(device), dtype) is None:
                    found.append((backend, device, dtype))
    return found


def jobs(only_op: str | None = None, only_backend: names.Backend | None = None) -> list[Job]:
    """Every job that can run here: an operator on a backend and a device in a dtype, and once more in TF32 where Triton
    uses it.

    None for ``only_op`` or ``only_backend`` means all.
    """
    found = [
        (op, *target, False) for target in targets() for op in _OPS if only_op in (None, op) and _applies(op, *target)
    ]
    found += [(op, "triton", "cuda", torch.float32, True) for op in _PRODUCTS if only_op in (None, op) and has_tf32()]
    return [job for job in found if only_backend in (None, job[1])]


def run(only_op: str | None = None) -> list[Row]:
    """Verify everything that can run here; a row per job."""
    return [verify_op(*job) for job in _progress.track(jobs(only_op), "verify", delay=0)]


def run_side_by_side(wanted: list[Job], processes: int, parts: int = PARTS) -> Iterator[Row]:
    """Yield the rows of these jobs, in order, while several processes work on their parts.

    This is for a machine where kernels still have to be compiled. Each process has one thread, because threads of
    several processes that wait for each other on the same cores take many times as long.
    """
    processes = _checks.positive_int("processes", processes)
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        rows = [[pool.submit(verify_op, *job, part=(part, parts)) for part in range(parts)] for job in wanted]
        for first, *others in rows:
            row = first.result()
            for other in others:
                row.join(other.result())
            yield row


def verify_op(
    op: str,
    backend: names.Backend,
    device: str,
    dtype: torch.dtype,
    tf32: bool = False,
    row: type[Row] = Row,
    part: tuple[int, int] = (0, 1),
) -> Row:
    """One row, or ``part`` (i, n) of it: every n-th case from case i on.

    float32 products are in IEEE arithmetic, whatever torch's switches say, or with ``tf32`` in TF32, with its bounds.
    """
    with float32_products(TF32 if tf32 else "ieee"):
        return _OPS[op](row(op, backend, device, TF32 if tf32 else str(dtype).removeprefix("torch."), part=part), dtype)


def has_tf32() -> bool:
    """Whether there is a GPU whose Triton kernels can multiply in TF32."""
    if ("triton", "cuda", torch.float32) not in targets() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """A block in which float32 products and convolutions on CUDA are in "ieee" or "tf32" arithmetic.

    torch's defaults for the two differ.
    """
    cuda, cudnn = cast(Any, torch.backends.cuda), cast(Any, torch.backends.cudnn)
    switches = cuda.matmul, cudnn.conv, cudnn.rnn
    kept = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = precision
        yield
    finally:
        for switch, value in zip(switches, kept, strict=True):
            switch.fp32_precision = value


def _applies(op: str, backend: names.Backend, device: str, dtype: torch.dtype) -> bool:
    """Whether the operator takes the dtype. The noise of the reference is not checked, because it is the definition."""
    if op == "noise":
        return dtype == torch.float32 and backend != "reference"
    return op not in ("sample_gates", "dependency_generator") or dtype in (torch.float32, torch.float64)


def passes(*names: str) -> bool:
    """Whether all available backends pass the verification of these operators."""
    return all(row.ok for name in names for row in run(name))


_OPS: dict[str, Callable[[Row, torch.dtype], Row]] = {
    "noise": verify_gates.verify_noise,
    "sample_gates": verify_gates.verify_values,
    "gated_linear": verify_linear.verify,
    "weight_gated_linear": verify_linear.verify,
    "gated_conv2d": verify_conv.verify,
    "norm_gate": verify_norm.verify,
    "dependency_generator": verify_gates.verify_generator,
}


def main(argv: list[str] | None = None) -> int:
    """Print the plain table; 0 when everything passes, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write rows and environment to this file")
    parser.add_argument("--processes", type=int, default=1, help="how many work at once")
    parser.add_argument("--backend", choices=("reference", "cpp", "triton"), help="only this one")
    arguments = parser.parse_args(argv)
    wanted, rows = jobs(only_backend=arguments.backend), []
    if arguments.processes > 1:
        found: Iterable[Row] = run_side_by_side(wanted, arguments.processes)
    else:
        found = (verify_op(*job) for job in _progress.track(wanted, "verify", delay=0))
    for row in found:
        worst = "" if row.worst is None else f"worst {row.worst.share:6.1%} of bound: {row.worst_case}"
        print(
            f"{'ok' if row.ok else 'FAILED':7} {row.op:20} {row.backend:10} {row.device:5} {row.dtype:9} "
            f"{row.cases:4} cases  {worst}",
            flush=True,
        )
        for failure in row.failures[:5]:
            print(f"        {failure}")
        rows.append(row)
        if arguments.json:  # row by row: a run that is stopped keeps what it has
            records.write_json(
                arguments.json, {"environment": records.environment(), "rows": [row.as_dict() for row in rows]}
            )
    return 0 if rows and all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
