"""``python -m benchmarks.kernels [--json FILE]``: measures with the profiler how long each Triton kernel runs on this
GPU, and prints it beside what was predicted.

Every route is forced at a size that fills the device. A kernel's time is the sum over its launches in a forward and a
backward; before each such step the caches are overwritten. ``benchmarks/predictions.py`` predicts the same numbers from
counts of the emulator.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import predictions
from dampr import functional, records
from dampr.ops.routes import forced_route

HALF = torch.bfloat16
DEVICE = "cuda"
FLUSHED = 2**26  # floats that are overwritten before each step: more than any cache holds
Step = Callable[[], Tensor]


class Job(NamedTuple):
    """What is profiled: the tensors' shape, the number of elements that the kernels pass over, and a function that
    makes the step.
    """

    shape: tuple[int, ...]
    elements: int
    make: Callable[[], Step]


def _linear(shape: tuple[int, int, int], gates: str | tuple[int, int], per_sample: bool, route: str, over: str) -> Job:
    """A job of a gated linear layer of ``shape`` (M, K, N). Its kernels pass over the "weight", over "x" or over the
    "products", as ``over`` says.
    """
    m, k, n = shape

    def make() -> Step:
        x, weight, seed = _leaf(m, k), _leaf(n, k, scale=k**-0.5), _seed()
        logits: dict[str, Any] = {}
        if gates in ("input", "both"):
            logits["input_gate"] = _leaf(k, dtype=torch.float32)
        if gates in ("output", "both"):
            logits["output_gate"] = _leaf(n, dtype=torch.float32)
        if not logits:
            block = (1, 1) if isinstance(gates, str) else gates
            logits = {"weight_gate": _leaf(-(n // -block[0]) * -(k // -block[1]), dtype=torch.float32), "block": block}

        def step() -> Tensor:
            with forced_route(route):
                y = functional.gated_linear(x, weight, None, **logits, seed=seed, per_sample=per_sample)
                y.backward(torch.ones_like(y))
            return y

        return step

    return Job(shape, {"weight": n * k, "x": m * k, "products": m * n * k}[over], make)


def _norm(shape: tuple[int, int, int, int], memory_format: torch.memory_format) -> Job:
    """A job of a gated batch norm on x of ``shape`` (B, C, H, W)."""

    def make() -> Step:
        x = _leaf(*shape).detach().contiguous(memory_format=memory_format).requires_grad_()
        gate, weight, bias = (_leaf(shape[1], dtype=torch.float32) for _ in range(3))
        how: dict[str, Any] = {"training": True, "activation": "relu", "seed": _seed()}
        running = torch.zeros(shape[1], device=DEVICE), torch.ones(shape[1], device=DEVICE)

        def step() -> Tensor:
            y = functional.gated_batch_norm(x, gate, weight, bias, *running, **how)
            y.backward(torch.ones_like(y))
            return y

        return step

    return Job(shape, prod(shape), make)


def _conv(shape: tuple[int, int, int, int], filters: int, route: str) -> Job:
    """A job of a gated 3 x 3 convolution on x of ``shape`` (B, C, H, W)."""
    batch, channels, height, width = shape

    def make() -> Step:
        x = _leaf(*shape).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        weight, seed = _leaf(filters, channels, 3, 3, scale=(9 * channels) ** -0.5), _seed()
        gates = {"input_gate": _leaf(channels, dtype=torch.float32), "output_gate": _leaf(filters, dtype=torch.float32)}

        def step() -> Tensor:
            with forced_route(route):
                y = functional.gated_conv2d(x, weight, None, **gates, seed=seed, padding=1)
                y.backward(torch.ones_like(y))
            return y

        return step

    return Job((*shape, filters), batch * height * width * channels * filters * 9, make)


def _seed() -> Tensor:
    """The seed of all draws, as the ops take it: int64 (1,) on the device."""
    return torch.full((1,), 7, dtype=torch.int64, device=DEVICE)


def _leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype = HALF) -> Tensor:
    """A leaf tensor of normal random numbers that requires a gradient."""
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype).requires_grad_()


# The names are those of the counts in tests/emulator/counts.py, which were taken at smaller sizes.
JOBS = {
    "fold": _linear((8192, 4096, 4096), "both", False, "fold", "weight"),
    "passes": _linear((8192, 4096, 4096), "input", True, "passes", "x"),
    "weights": _linear((8192, 4096, 4096), "weight", False, "fold", "weight"),
    "blocks of 4 x 4": _linear((8192, 4096, 4096), (4, 4), False, "fold", "weight"),
    "one_pass, small": _linear((1024, 4096, 4096), "both", True, "one_pass", "products"),
    "one_pass, odd": _linear((1023, 4095, 4095), "both", True, "one_pass", "products"),
    "live, small": _linear((8192, 4096, 4096), "both", False, "live", "products"),
    "small_m": _linear((16, 4096, 4096), "weight", False, "small_m", "products"),
    "norm, channels last": _norm((256, 256, 56, 56), torch.channels_last),
    "norm, contiguous": _norm((256, 256, 56, 56), torch.contiguous_format),
    "convolution, live": _conv((64, 256, 56, 56), 256, "live"),
}


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each kernel of a job, dampr's and libraries': the seconds it takes in a step, as median and quartiles
    over the rounds.
    """
    torch.manual_seed(0)
    job, flush = JOBS[name], torch.empty(FLUSHED, device="cuda")
    step = job.make()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    launches: dict[str, int] = {}
    for turn in range(rounds):
        flush.zero_()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            step()
            torch.cuda.synchronize()
        mine: dict[str, float] = {}
        for event in profiled.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                mine[event.name] = mine.get(event.name, 0.0) + event.time_range.elapsed_us() * 1e-6
                launches[event.name] = launches.get(event.name, 0) + (turn == 0)
        for kernel, seconds in mine.items():
            times.setdefault(kernel, []).append(seconds)
    rows = []
    for kernel, samples in times.items():
        low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
        found = {
            "job": name,
            "shape": job.shape,
            "elements": job.elements,
            "kernel": short(kernel),
            "launches": launches[kernel],
        }
        each = predictions.seconds(name, short(kernel))
        predicted = None if each is None else each * job.elements
        rows.append({**found, "median": median, "low": low, "high": high, "predicted": predicted})
    return rows


def short(kernel: str) -> str:
    """The name of a kernel in the emulator's counts, or for a library's kernel the first 80 letters of its name."""
    return kernel.removesuffix("_kernel") if re.fullmatch(r"[a-z0-9_]+_kernel", kernel) else kernel[:80]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write rows and environment to this file")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("job", nargs="*", default=list(JOBS), help=f"some of: {', '.join(JOBS)}")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.job) - set(JOBS):
        parser.error(f"job={sorted(unknown)}: expected some of {list(JOBS)}")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: expected a machine with one")
    rows: list[dict[str, Any]] = []
    failed = 0
    for name in arguments.job:
        try:
            found = measure(name, arguments.rounds)
        except Exception as error:  # the other kernels are worth measuring
            print(f"{name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
            failed = 1
            continue
        for row in found:
            times = f"{1e6 * row['median']:9.1f} us  {1e12 * row['median'] / row['elements']:8.3f} ps an element"
            print(f"{name:20} {row['kernel']:60} {row['launches']:3} x  {times}", flush=True)
        rows += found
        if arguments.json:
            records.write_json(arguments.json, {"environment": records.environment(), "kernels": rows})
    return failed


if __name__ == "__main__":
    sys.exit(main())
