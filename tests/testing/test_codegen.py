"""The machine code of every Triton kernel x tile x architecture, compiled without a GPU.

Helpers: dampr/testing/codegen.py.
"""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from dampr.testing import codegen  # noqa: E402

BUDGETS = Path(__file__).parents[1] / "data" / "codegen_budgets.json"
ALLOWED_GROWTH = 1.10
ON_WEIGHTS = ("gate_weights_fwd", "gate_weights_bwd", "small_m-small-16", "small_m-small-64")

if not isinstance(codegen.gates.reduce_kernel, triton.JITFunction):
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process", allow_module_level=True)


def all_cases() -> list:
    """Every kernel for Hopper, and every other one for another architecture that has it, in turn; the rest takes
    minutes.
    """
    cases = {arch: codegen.cases(arch) for arch in codegen.ARCHITECTURES}
    names = list(dict.fromkeys(case.name for of_one in cases.values() for case in of_one))
    found = []
    for arch in cases:
        for case in cases[arch]:
            others = [
                other for other in cases if other != 90 and any(case.name == of_other.name for of_other in cases[other])
            ]
            turn, odd = divmod(names.index(case.name), 2)
            first = arch == 90 or (not odd and arch == others[turn % len(others)])
            found.append(pytest.param(arch, case, id=f"sm_{arch}/{case.name}", marks=[] if first else pytest.mark.long))
    return found


@pytest.mark.parametrize(("arch", "case"), all_cases())
def test_machine_code_keeps_its_promises(arch: int, case: codegen.Case) -> None:
    report = codegen.inspect(case, arch)
    recorded = codegen.read_budgets(BUDGETS)

    if recorded:  # how registers are given out is a matter of the compiler, and tiles were chosen for this one
        assert report.stack == 0, report
        assert report.spills == 0, report
    assert report.f64 == 0, report
    assert report.shared <= codegen.SHARED_LIMIT_KB[arch] * 1024, report
    assert report.tf32 == (case.constants.get("PRECISION") == "tf32"), (
        f"an IEEE dot was lowered to TF32, or the reverse: {report}"
    )
    if case.gemm and case.aligned:
        assert report.copies_in_loop > 0, f"no asynchronous copies in the K loop: {report}"
        if arch == 90 and (case.dtype == "bf16" or report.tf32):
            assert report.wgmma > 0, report
            gated = case.constants.get("z_in_ptr", "") is not None
            assert report.register_a == gated, f"the gated A tile goes through shared memory: {report}"

    if not recorded:
        pytest.skip(
            f"no budgets recorded for triton {triton.__version__} (python -m benchmarks.codegen --write); "
            f"{report.spills} instructions spill registers"
        )
    budget = recorded[f"sm_{arch}/{case.name}"]
    assert report.hot_loop <= ALLOWED_GROWTH * budget, (
        f"{report.hot_loop} instructions in the hot loop, {budget} recorded; if the growth is wanted: python -m "
        "benchmarks.codegen --write"
    )


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in codegen.cases(0)])
def test_every_kernel_compiles_for_amd(case: codegen.Case) -> None:
    codegen.compile_amd(case)


@pytest.mark.parametrize("rule", ["paper", "median", "binary"])
@pytest.mark.parametrize(
    "name",
    [
        "fold_fwd",
        "fold_bwd",
        "fold_gate_bwd",
        "sample_fwd-grouped",
        "sample_bwd-grouped",
        "live_blocks-32",
        "live-large",
        *ON_WEIGHTS,
    ],
)
def test_rules_without_noise_compile(name: str, rule: str) -> None:
    from dampr.spec import hard_concrete

    case = next(case for case in codegen.cases(90) if case.name == name)
    constants = {**case.constants, "GATE": hard_concrete(rule)}
    constants.update({arg: None for arg in case.kernel.arg_names if "seed" in arg})
    report = codegen.inspect(case._replace(constants=constants), 90)
    assert report.spills == report.stack == report.f64 == 0, report


@pytest.mark.parametrize("name", ["fwd-large", "small_m-small-64"])
def test_a_beta_other_than_two_thirds_compiles_without_f64(name: str) -> None:
    from dampr.spec import hard_concrete

    case = next(case for case in codegen.cases(90) if case.name == name)
    report = codegen.inspect(case._replace(constants={**case.constants, "GATE": hard_concrete(beta=0.5)}), 90)
    assert report.spills == report.stack == report.f64 == 0, report


@pytest.mark.parametrize("arch", codegen.ARCHITECTURES)
@pytest.mark.parametrize(
    "name",
    ["sample_fwd-grouped", "sample_fwd-odd", "fold_fwd", "gate_rows_bwd-grouped", "gate_weights_fwd", "live_blocks-32"],
)
def test_no_fused_multiply_add_decides_a_gate(name: str, arch: int) -> None:
    case = next(case for case in codegen.cases(arch) if case.name == name)
    ptx = codegen.compile_case(case, codegen.GPUTarget("cuda", arch, 32)).asm["ptx"]
    assert "fma." not in ptx
    assert "mul.rn.f32" in ptx
    assert "mul.rn.ftz" not in ptx


class _NoDevice:
    """Stands in for Triton's CUDA driver where only compilation is wanted."""

    def get_current_device(self) -> int:
        return 999  # compiled kernels are cached by device: not the place of a real one

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> codegen.GPUTarget:
        return codegen.GPUTarget("cuda", 90, 32)


def compile_only(host: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Compile for sm_90 what ``host.launch`` would launch, by Triton's own launcher,
    into the list that this returns.
    """
    compiled: list[Any] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **sizes: Any) -> None:
        compiled.append(kernel.warmup(*args, grid=grid, enable_fp_fusion=False, **sizes))

    monkeypatch.setattr(triton.runtime.driver, "_active", _NoDevice())
    monkeypatch.setattr(host, "launch", launch)
    monkeypatch.setattr(host, "capability", lambda device: 90)
    return compiled


@pytest.mark.parametrize("route", ["fold", "live", "one_pass", "passes", "small_m"])
@pytest.mark.parametrize("shape", [(256, 128, 256), (1, 1, 1)], ids=str)
def test_what_the_launchers_pass_compiles(
    shape: tuple[int, int, int], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own launcher specialises on divisible sizes and turns an integer argument of 1 into a constant."""
    import torch

    from dampr.ops import GateArgs, GatePair
    from dampr.ops import backend_triton as backend

    compiled = compile_only(backend.host, monkeypatch)
    (M, N, K), spec, seed = shape, codegen.hard_concrete(), torch.tensor([3])
    x, dy, pre = (torch.zeros(M, n, dtype=torch.bfloat16) for n in (K, N, N))
    weight, bias = torch.zeros(N, K), torch.zeros(N)
    per_sample = route in ("one_pass", "passes")
    gates = GatePair.of(torch.zeros(K), torch.zeros(N), seed, seed, spec, per_sample)
    with backend.forced_route(route):
        if route != "small_m":
            backend.gated_linear_fwd(x, weight, bias, gates, per_sample)
            backend.gated_linear_bwd(dy, x, weight, bias, gates, pre, [True] * 5)
        for block in ((1, 1), (16, 16)) if route == "fold" else ((1, 1),) if route == "small_m" else ():
            gate = GateArgs(torch.zeros(-(N // -block[0]) * -(K // -block[1])), seed, spec)
            backend.weight_gated_linear_fwd(x, weight, bias, gate, block)
            backend.weight_gated_linear_bwd(dy, x, weight, bias, gate, block, [True] * 4)
    backend.sample_gates_bwd(dy.float(), GateArgs(torch.zeros(N), seed, spec), M)
    assert len(compiled) >= 4
    assert not any("f64" in kernel.asm["ptx"] for kernel in compiled)


@pytest.mark.parametrize("gates", ["none", "batch", "image"])
@pytest.mark.parametrize("problem", [(2, 64, 14, 128, 3), (1, 1, 1, 1, 1)], ids=str)
def test_what_the_convolution_passes_compiles(
    problem: tuple[int, ...], gates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from dampr.ops.backend_triton import gated_conv2d as launchers
    from dampr.ops.gated_conv2d import Window

    compiled = compile_only(launchers.host, monkeypatch)
    B, C, size, N, taps = problem
    z_in, z_out = {
        "none": (None, None),
        "batch": (torch.ones(C), torch.ones(N)),
        "image": (torch.ones(B, C), torch.ones(B, N)),
    }[gates]
    x = torch.zeros(B, C, size, size, dtype=torch.bfloat16)
    weight = torch.zeros(N, C, taps, taps)
    pad = (taps // 2, taps // 2)
    launchers.gated_conv2d_one_pass(x, weight, torch.zeros(N), z_in, z_out, Window((1, 1), pad, (1, 1), 1))
    assert len(compiled) == (1 if gates == "none" else 2)
    assert not any("f64" in kernel.asm["ptx"] for kernel in compiled)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 14, 14), (2, 1), (1, 1, 1, 2), (32, 48)], ids=str)
def test_what_the_gated_norm_passes_compiles(
    shape: tuple[int, ...], per_sample: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from dampr.ops import GateArgs
    from dampr.ops.backend_triton import norm_gate as launchers
    from dampr.ops.norm_gate import Norm

    compiled = compile_only(launchers.host, monkeypatch)
    gain, bias, log_alpha, mean, var = torch.ones(5, shape[1])
    gate = GateArgs(log_alpha, torch.tensor([3]), codegen.hard_concrete(), per_sample)
    for layout in (torch.contiguous_format, torch.channels_last) if len(shape) == 4 else (torch.contiguous_format,):
        x = torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=layout)
        given = (None, None) if training else (mean, var)
        launchers.norm_gate_fwd(x, Norm(gain, None, 1e-5, True), gate, *given)
        launchers.norm_gate_bwd(x, x, Norm(None, bias, 1e-5, False), gate, mean, var, training, [True] * 4)
    assert len(compiled) >= (8 if training else 6)
    assert not any("f64" in kernel.asm["ptx"] for kernel in compiled)


@pytest.mark.parametrize("widths", [(1, 1), (16, 16, 64)], ids=str)
def test_what_the_generator_passes_compiles(widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's values are read behind a barrier, and not by way of a cache that does not see them."""
    import torch

    from dampr.ops import backend_triton as backend

    compiled = compile_only(backend.host, monkeypatch)
    tensors = [
        t for before, after in itertools.pairwise(widths) for t in (torch.zeros(after, before), torch.zeros(after))
    ]
    values = backend.dependency_generator_fwd(tensors, 4.6)
    backend.dependency_generator_bwd(tensors, values, values, 4.6)
    for kernel in compiled:
        assert "bar.sync" in kernel.asm["ptx"]
        assert "ld.global.nc" not in kernel.asm["ptx"]
        assert "f64" not in kernel.asm["ptx"]


def test_kernels_import_no_torch() -> None:
    for path in (Path(codegen.__file__), *Path(codegen.gates.__file__).parent.glob("*.py")):
        imports = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {
            name
            for node in imports
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert not {name for name in names if name.split(".")[0] == "torch"}, path
