"""Results in C++ depend neither on threads nor on instruction sets; the generator of Dep-L0 on each of these."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dampr import reference
from tests.limits import HANG

from .calls import (
    _C,
    BLOCKS,
    CODES,
    DTYPES,
    RULE,
    SPECS,
    assert_as_good,
    block_count,
    fold_blocks_bwd,
    fold_blocks_fwd,
    fold_bwd,
    fold_fwd,
    gate_dtype,
    gate_rows_bwd,
    gate_rows_fwd,
    gate_weights_bwd,
    gate_weights_fwd,
    gates_bwd,
    gates_fwd,
    pairs,
    poisoned,
    ptr,
    random_gates,
    uniform,
    words,
)


def every_result(threads: int) -> dict[str, torch.Tensor]:
    """One result of each function and kind of gate, from fixed inputs."""
    generator = torch.Generator().manual_seed(7)
    rows, n = 70, 2503
    x, g = torch.randn(rows, n, generator=generator), torch.randn(rows, n, generator=generator)
    log_alpha, seed = 2.5 * torch.randn(n, generator=generator), torch.tensor([0x0123456789ABCDEF])
    z_out, z_in = torch.rand(rows, generator=generator), torch.rand(n, generator=generator)
    results = {"words": words(seed, 70_001, 3, threads), "uniform": uniform(seed, 70_001, 3, threads)}
    for name, rule in SPECS.items():
        results[f"{name} z"] = gates_fwd(rule, log_alpha, seed, rows, threads)
        results[f"{name} z one row"] = gates_fwd(rule, x.flatten(), seed, 1, threads)
        results[f"{name} z float64"] = gates_fwd(rule, log_alpha.double(), seed, rows, threads)
        results[f"{name} dlog_alpha"] = gates_bwd(rule, log_alpha, seed, g, threads)
        for dtype in DTYPES:
            args = x.to(dtype), g.to(dtype), log_alpha.to(gate_dtype(dtype)), seed, threads
            results |= {f"{name} {dtype} backward {i}": t for i, t in enumerate(gate_rows_bwd(rule, *args))}
            results[f"{name} {dtype} forward"] = gate_rows_fwd(rule, args[0], *args[2:])
        for first, second in pairs():
            every, values = x.to(gate_dtype(first)), (z_out[:, None] - x).to(first)
            results[f"{name} {first} {second} weights"] = gate_weights_fwd(rule, values, every, seed, second, threads)
            made = gate_weights_bwd(rule, g.to(first), values.to(second), every, seed, threads)
            results |= {f"{name} {first} {second} weights backward {i}": t for i, t in enumerate(made)}
    for dtype in DTYPES:
        args = x.to(dtype), z_out.to(gate_dtype(dtype)), z_in.to(gate_dtype(dtype))
        results[f"fold {dtype}"] = fold_fwd(*args, dtype, threads)
        results |= {f"fold {dtype} backward {i}": t for i, t in enumerate(fold_bwd(g.to(dtype), *args, threads))}
    for block in BLOCKS:
        for first, second in pairs():
            z = random_gates(block_count(x.shape, block), first, generator)
            results[f"{block} {first} {second}"] = fold_blocks_fwd(x.to(first), block, z, second, threads)
            made = fold_blocks_bwd(g.to(first), x.to(second), block, z, threads)
            results |= {f"{block} {first} {second} backward {i}": t for i, t in enumerate(made)}
    for dtype in DTYPES:
        for inner in (1, 7):
            results |= norm_results(
                dtype, x[:, : 2503 // 7 * 7].to(dtype), g[:, : 2503 // 7 * 7].to(dtype), inner, threads
            )
    return results


def norm_results(
    dtype: torch.dtype, x: torch.Tensor, g: torch.Tensor, inner: int, threads: int
) -> dict[str, torch.Tensor]:
    """Statistics, y with ReLU and every gradient of a norm of 70 rows, 35 samples of two,
    whose columns are channels times ``inner``.
    """
    n, wide = x.shape[1] // inner, gate_dtype(dtype)
    x, g, generator = x.contiguous(), g.contiguous(), torch.Generator().manual_seed(8)
    log_alpha, gain, bias = torch.randn(3, n, generator=generator).to(wide)
    seed, updates, running = torch.tensor([3]), torch.tensor(4), torch.ones(2, n, dtype=wide)
    mean, var, dgain, dbias, dlog_alpha = poisoned(5, n, dtype=wide)
    y, dx = poisoned(*x.shape, dtype=dtype), poisoned(*x.shape, dtype=dtype)
    gates = (35, 2, n, inner, ptr(log_alpha), ptr(seed), True)
    moved = (ptr(running[0]), ptr(running[1]), ptr(updates), 0.25)
    vectors = (ptr(gain), ptr(bias), True, ptr(mean), ptr(var))
    how = (1e-5, True)
    outputs = map(ptr, (dx, dgain, dbias, dlog_alpha))
    _C.norm_gate_fwd(RULE, CODES[dtype], ptr(x), *gates, *vectors, *moved, *how, ptr(y), threads)
    _C.norm_gate_bwd(RULE, CODES[dtype], ptr(g), ptr(x), *gates, *vectors, *how, *outputs, threads)
    assert int(updates) == 5
    unbiased = var * (x.numel() // n / (x.numel() // n - 1))
    torch.testing.assert_close(running, torch.stack([mean, unbiased]) * 0.25 + 0.75)
    names = ("mean", "var", "y", "dx", "dgain", "dbias", "dlog_alpha")
    return {
        f"norm {dtype} {inner} {name}": t
        for name, t in zip(names, (mean, var, y, dx, dgain, dbias, dlog_alpha), strict=True)
    }


@pytest.mark.parametrize("isa", _C.build_info()["isas"])
def test_the_generator_matches_float64_with_every_instruction_set(isa: str) -> None:
    assert "generators: ok" in said_with_isa(isa)


def check_generators() -> None:
    """Holds 16 draws of each network together to twice PyTorch's error:
    on two numbers alone it is exact by luck now and then.
    """
    torch.manual_seed(0)
    for widths, dtype in itertools.product(
        [(1, 1), (5, 7, 3), (16, 20, 33, 4), (100, 67, 129)], [torch.float32, torch.float64]
    ):
        draws = [generator_results(widths, dtype) for _ in range(16)]
        for name in draws[0]:
            got, plain, truth = (torch.cat(pieces) for pieces in zip(*(draw[name] for draw in draws), strict=True))
            assert_as_good(f"{name} {widths} {dtype}", got, plain, truth)


def generator_results(
    widths: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Values and gradients of a random generator by the extension, by PyTorch in the same dtype,
    and by PyTorch in float64.
    """
    tensors = []
    for before, after in itertools.pairwise(widths):
        tensors += [torch.randn(after, before, dtype=dtype) / (2 * before**0.5), torch.randn(after, dtype=dtype)]
    upstream, truths = torch.randn(sum(widths[1:]), dtype=dtype), []
    for exact in (dtype, torch.float64):
        leaves = [t.to(exact, copy=True).requires_grad_() for t in tensors]
        values = torch.cat(reference.dependency_generator(leaves, 4.0))
        grads = torch.autograd.grad(values, leaves, upstream.to(exact))
        truths.append((values.detach(), torch.cat([g.reshape(-1) for g in grads])))
    values, grads = poisoned(upstream.numel(), dtype=dtype), [poisoned(*t.shape, dtype=dtype) for t in tensors]
    addresses = [ptr(t) for t in tensors]
    _C.generator_fwd(CODES[dtype], addresses, widths, 4.0, ptr(values))
    _C.generator_bwd(CODES[dtype], addresses, widths, 4.0, ptr(values), ptr(upstream), [ptr(g) for g in grads])
    mine = (values.clone(), torch.cat([g.view(-1) for g in grads]))
    unknown = torch.full_like(tensors[1], float("nan"))
    _C.generator_fwd(CODES[dtype], [ptr(tensors[0]), ptr(unknown)], widths[:2], 4.0, ptr(values))
    assert values[: widths[1]].isnan().all()
    return dict(zip(("values", "grads"), zip(mine, *truths, strict=True), strict=True))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    alone = every_result(1)
    for threads in (2, 3, 7):
        for (name, one), many in zip(alone.items(), every_result(threads).values(), strict=True):
            assert torch.equal(one, many), f"{name} on {threads} threads"


@functools.cache
def digest() -> str:
    """A line per result: its bits for what is exact (noise, zero and one patterns), in hexadecimal."""
    lines = []
    for name, result in every_result(2).items():
        exact = result if name in ("words", "uniform") else torch.stack([result == 0, result == 1])
        lines.append(f"{name}: {hashlib.sha256(exact.numpy().tobytes()).hexdigest()}")
    return "\n".join(lines)


def run_with_isa(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "DAMPR_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=HANG, check=False
    )


@functools.cache
def run_all_with_isa(isa: str) -> subprocess.CompletedProcess[str]:
    return run_with_isa(isa, "from tests.csrc import test_isas; test_isas.say_all()")


def say_all() -> None:
    """What the tests of instruction sets want to know of one."""
    print(_C.isa())
    print(digest())
    check_generators()
    print("generators: ok")


def said_with_isa(isa: str) -> str:
    """What a process with this instruction set says, and what went wrong there."""
    run = run_all_with_isa(isa)
    if "this processor offers" in run.stderr:
        pytest.skip(f"this processor has no {isa}")
    return run.stdout + run.stderr


@pytest.mark.parametrize("isa", _C.build_info()["isas"])
def test_every_instruction_set_gives_the_same_patterns(isa: str) -> None:
    said = said_with_isa(isa)
    assert said.startswith(f"{isa}\n{digest()}\n"), said


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    run = run_with_isa("mmx", "from dampr import _C; _C.isa()")
    assert run.returncode != 0
    assert "DAMPR_CPU_ISA=mmx" in run.stderr
    assert "baseline" in run.stderr


def test_torch_and_the_extension_share_one_openmp() -> None:
    if not sys.platform.startswith("linux") or not _C.build_info()["openmp"]:
        pytest.skip("no OpenMP, or no /proc to look at")
    code = (
        "import os, torch; from dampr import _C; from tests.csrc import calls\n"
        "torch.set_num_threads(3); a = torch.randn(2000, 2000); (a * a).sum()\n"
        "before = len(os.listdir('/proc/self/task')); calls.uniform(calls.random_seed(), 10**6, 0, 3)\n"
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or 'libiomp' in line}\n"
        "print(len(maps), len(os.listdir('/proc/self/task')) - before)"
    )
    run = run_with_isa("", code)
    assert run.stdout.split() == ["1", "0"], run.stdout + run.stderr
