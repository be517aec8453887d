"""Compile the Triton kernels ahead of time, for GPUs that need not be there, and count what is in the machine code.

``cases()`` lists every kernel with every tile that is used, for every architecture; ``inspect(case)`` compiles one and
counts registers, spills and instructions. tests/testing/test_codegen.py checks the counts against limits, and ``python
-m benchmarks.codegen`` prints them. This module imports no torch.
"""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dampr.kernels import (
    configs,
    dependency_generator,
    gated_conv2d,
    gated_linear,
    gated_linear_live,
    gates,
    norm_gate,
    weight_gated_linear,
)
from dampr.spec import hard_concrete

ARCHITECTURES = (80, 90, 100, 120)
SHARED_LIMIT_KB = {80: 163, 90: 227, 100: 227, 120: 99}
GEMM_KERNELS = {
    "fwd": gated_linear.gated_linear_fwd_kernel,
    "dx": gated_linear.gated_linear_bwd_dx_kernel,
    "dw": gated_linear.gated_linear_bwd_dw_kernel,
}
# The blocks of each GEMM kernel in the order rows, cols, depth of its output tile.
GEMM_BLOCKS = {
    "fwd": ("BLOCK_M", "BLOCK_N", "BLOCK_K"),
    "dx": ("BLOCK_M", "BLOCK_K", "BLOCK_N"),
    "dw": ("BLOCK_N", "BLOCK_K", "BLOCK_M"),
}
# name -> (R, C, how many blocks lie side by side): common sizes, no powers of two, and a block as large as the matrix
GATE_BLOCKS = {
    "4x4": (4, 4, 1024),
    "3x5": (3, 5, 820),
    "16x1": (16, 1, 4096),
    "1x8": (1, 8, 512),
    "64x64": (64, 64, 64),
    "whole": (4096, 4096, 1),
}
# arguments that are float32 whatever the dtype of the case, like log_alphas and workspaces
_VECTORS = ("gain_ptr", "mean_ptr", "var_ptr", "sums_ptr", "spread_ptr", "part_mean_ptr", "part_spread_ptr")
_REAL = ("stays", "mean_share", "var_share")  # floating-point numbers
_EXACT = ("z_ptr", "z_in_ptr", "z_out_ptr", "dz_ptr", "dy_sum_ptr", *_VECTORS)
_INTEGER = ("live_ptr", "count_ptr")
_ODD = (
    "slabs",
    "P",
    "H",
    "W",
    "OH",
    "OW",
    "groups",
    "outer",
    "parts",
    "pieces",
    "count",
    "layers",
    "total",
)  # sizes that need not be multiples of 16, even in an aligned case
_HIP = GPUTarget("hip", "gfx942", 64)
_SPEC = hard_concrete()
_MATRIX = r"\b(HGMMA|HMMA|UTCHMMA|FFMA2?)\b"
_COPY = r"\b(LDGSTS|UBLKCP|UTMALDG)"
_F64 = r"\b(D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w*64H|[FI]2[FI]\S*F64)\b"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", re.M)


class Case(NamedTuple):
    """One kernel with one set of constants.

    Attributes:
        name: a name for it.
        kernel: the Triton function.
        constants: its constexpr arguments; a pointer that is None is missing.
        dtype: the dtype of its tensors.
        aligned: whether sizes and strides are multiples of 16.
        num_warps, num_stages: options of Triton.
        gemm: whether it multiplies matrices.
        parameter_dtype: the dtype of weight and bias if it is another one, as under autocast.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    dtype: str
    aligned: bool
    num_warps: int = 4
    num_stages: int = 3
    gemm: bool = False
    parameter_dtype: str = ""


class Report(NamedTuple):
    """Counts read from the machine code.

    Attributes:
        registers, stack, shared: registers of a thread, bytes of its stack, bytes of shared memory.
        spills: instructions that move registers to or from memory.
        f64: instructions in float64.
        hot_loop: instructions in the innermost loop that multiplies matrices, else in the longest loop, else in the
            kernel.
        wgmma: instructions of Hopper's warpgroup MMA.
        register_a: whether an MMA reads its A operand from registers.
        tf32: whether products are in TF32.
        copies_in_loop: asynchronous copies in the hot loop.
    """

    registers: int
    stack: int
    shared: int
    spills: int
    f64: int
    hot_loop: int
    wgmma: int
    register_a: bool
    tf32: bool
    copies_in_loop: int


def cases(capability: int) -> list[Case]:
    """Every kernel with every tile that it can be launched with on a machine of this capability (0: AMD)."""
    return [
        *_gemm_cases(capability),
        *_live_cases(capability),
        *_conv_cases(capability),
        *_weight_gemm_cases(capability),
        *_pass_cases(),
        *_weight_pass_cases(),
        *_norm_cases(),
        *_generator_cases(),
    ]


def _kinds(capability: int) -> list[str]:
    """The kinds of tile that a machine uses."""
    sizes = (4096,) * 3, (64,) * 3, (99,) * 3
    return sorted({configs.gemm_kind(*size, dtype, capability) for size in sizes for dtype in ("bf16", "fp32")})


def _gemm_cases(capability: int) -> list[Case]:
    """The GEMMs with gates inside, for every kind of tile."""
    found = []
    for kind in _kinds(capability):
        tile, aligned, dtype = configs.GEMM_TILES[kind], kind != "odd", "fp32" if kind.startswith("fp32") else "bf16"
        flags = {
            "GROUP": tile.group,
            "EVEN": aligned,
            "IN_GROUPED": aligned,
            "OUT_GROUPED": aligned,
            "PRECISION": "ieee",
            "GATE": _SPEC,
        }
        for op in GEMM_KERNELS:
            blocks = dict(zip(GEMM_BLOCKS[op], (tile.rows, tile.cols, tile.depth), strict=True))
            found.append(
                Case(
                    f"{op}-{kind}",
                    GEMM_KERNELS[op],
                    {**blocks, **flags},
                    dtype,
                    aligned,
                    tile.num_warps,
                    tile.num_stages,
                    True,
                )
            )
    return found


def _live_cases(capability: int) -> list[Case]:
    """The GEMM that skips closed blocks, and the kernel that lists the live blocks, for each block size."""
    found = {}
    for size, dtype in ((4096, "bf16"), (64, "bf16"), (99, "bf16"), (64, "fp32")):
        tile, aligned = configs.live_tile(size, size, size, dtype, capability), size % 16 == 0
        blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile[:3], strict=True))
        constants = {**blocks, "GROUP": tile.group, "EVEN": aligned, "PRECISION": "ieee", "GATE": _SPEC}
        name = f"live-{configs.gemm_kind(size, size, size, dtype, capability)}"
        launch = tile.num_warps, tile.num_stages, True
        found[name] = Case(name, gated_linear_live.gated_linear_live_fwd_kernel, constants, dtype, aligned, *launch)
        listing = {"BLOCKS": configs.LIVE_BLOCKS, "BLOCK_K": tile.depth, "GATE": _SPEC}
        name = f"live_blocks-{tile.depth}"
        found[name] = Case(name, gated_linear_live.live_blocks_kernel, listing, dtype, True)
    return list(found.values())


def _conv_cases(capability: int) -> list[Case]:
    """The cases of a 3 x 3 gated convolution, and of the kernel that lists its live blocks.

    For each tile that is chosen for some problem, they have gates per image on inputs and outputs, and on outputs
    alone. One case has one draw per batch and groups.
    """
    found = {}
    taps = {"R": 3, "S": 3, "SH": 1, "SW": 1, "PH": 1, "PW": 1, "DH": 1, "DW": 1}
    variants: dict[str, dict[str, Any]] = {
        "": {"IN_PER_SLAB": True, "OUT_PER_SLAB": True, "groups": 1},
        "-out": {
            "IN_PER_SLAB": False,
            "OUT_PER_SLAB": True,
            "groups": 1,
            "z_in_ptr": None,
            "live_ptr": None,
            "count_ptr": None,
        },
        "-groups": {"IN_PER_SLAB": False, "OUT_PER_SLAB": False, "slabs": 1},
    }
    rounded = ("bf16", "tf32") if capability >= 80 else ("bf16",)
    problems = [(rows, N, dtype) for rows in (64, 4096) for N in (64, 128, 256) for dtype in rounded]
    for rows, N, dtype in (*problems, (4096, 99, "bf16"), (4096, 64, "fp32")):
        for variant, gates_of in variants.items():
            if variant == "-groups" and (rows, N, dtype) != (4096, 128, "bf16"):
                continue
            tile, aligned = configs.conv_tile(128, rows, N, N, variant != "-out", dtype, capability), N % 16 == 0
            blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_C"), tile[:3], strict=True))
            sizes = {"GROUP": tile.group, "EVEN": aligned, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
            kind = ("" if aligned else "odd-") + ("" if dtype == "bf16" else f"{dtype}-")
            name = f"conv-{kind}{tile.rows}x{tile.cols}{variant}"
            launch = "fp32" if dtype == "tf32" else dtype, aligned, tile.num_warps, tile.num_stages, True
            found[name] = Case(
                name, gated_conv2d.gated_conv2d_fwd_kernel, {**taps, **gates_of, **blocks, **sizes}, *launch
            )
            listing, name = {"BLOCKS": configs.LIVE_BLOCKS, "BLOCK_C": tile.depth}, f"list_live-{tile.depth}"
            found[name] = Case(name, gated_conv2d.list_live_kernel, listing, "bf16", True)
    return list(found.values())


def _weight_gemm_cases(capability: int) -> list[Case]:
    """The GEMM that draws the gates of its weights: for at most 16 rows of x, for more, and with float32 weights as
    under autocast.
    """
    found = {}
    for size, dtype, parameter_dtype in ((64, "bf16", ""), (64, "bf16", "fp32"), (64, "fp32", ""), (99, "bf16", "")):
        for M in (16, 64):
            tile, aligned = configs.small_m_tile(M, size, size, dtype, capability), size % 16 == 0
            blocks = dict(zip(("BLOCK_N", "BLOCK_M", "BLOCK_K"), tile[:3], strict=True))
            constants = {
                **blocks,
                "GROUP": tile.group,
                "EVEN": aligned,
                "GROUPED": aligned,
                "PRECISION": "ieee",
                "GATE": _SPEC,
            }
            kind, ending = configs.gemm_kind(M, size, size, dtype, capability), "-autocast" if parameter_dtype else ""
            name = f"small_m-{kind}-{tile.cols}{ending}"
            launch = tile.num_warps, tile.num_stages, True, parameter_dtype
            found[name] = Case(
                name, weight_gated_linear.weight_gated_linear_fwd_kernel, constants, dtype, aligned, *launch
            )
    return list(found.values())


def _weight_pass_cases() -> list[Case]:
    """The passes over a weight with gates on weights or blocks."""
    weights = {"BLOCK": configs.WEIGHT_BLOCK, "GATE": _SPEC}
    found = [
        Case(
            "gate_weights_fwd",
            weight_gated_linear.gate_weights_kernel,
            {**weights, "w_ptr": None, "dlog_alpha_ptr": None},
            "bf16",
            True,
        ),
        Case("gate_weights_bwd", weight_gated_linear.gate_weights_kernel, weights, "bf16", True),
        Case("gate_weights_bwd-odd", weight_gated_linear.gate_weights_kernel, weights, "bf16", False),
    ]
    for name, (R, C, across) in GATE_BLOCKS.items():
        blocks = dict(zip(("BLOCK_R", "BLOCK_G", "BLOCK_C"), configs.block_tile(R, C, across), strict=True))
        constants = {"R": R, "C": C, **blocks}
        found += [
            Case(
                f"blocks_fwd-{name}",
                weight_gated_linear.gate_blocks_kernel,
                {**constants, "w_ptr": None, "partial_ptr": None},
                "bf16",
                True,
            ),
            Case(f"blocks_bwd-{name}", weight_gated_linear.gate_blocks_kernel, constants, "bf16", True),
        ]
    return found


def _pass_cases() -> list[Case]:
    """The passes that fold gates into weights, sum workspaces, draw gates, and multiply activations."""
    folds = [{"BLOCK_N": n, "BLOCK_K": k, "GATE": _SPEC} for n, k in (configs.FOLD_FWD_TILE, configs.FOLD_BWD_TILE)]
    reduce = dict(zip(("BLOCK_S", "BLOCK_N"), configs.REDUCE_TILE, strict=True))
    found = [
        Case("fold_fwd", gated_linear.fold_fwd_kernel, folds[0], "bf16", True),
        Case("fold_bwd", gated_linear.fold_bwd_kernel, folds[1], "bf16", True),
        Case("fold_gate_bwd", gated_linear.fold_gate_bwd_kernel, {**reduce, "GATE": _SPEC}, "bf16", True),
        Case("reduce", gates.reduce_kernel, reduce, "bf16", True),
    ]
    for kind, grouped in (("grouped", True), ("odd", False)):
        for name, kernel, (block_m, block_n) in (
            ("sample_fwd", gates.sample_gates_fwd_kernel, configs.GATE_TILE),
            ("sample_bwd", gates.sample_gates_bwd_kernel, configs.COLUMN_SUM_TILE),
            ("gate_rows_fwd", gated_linear.gate_rows_fwd_kernel, configs.GATE_TILE),
            ("gate_rows_bwd", gated_linear.gate_rows_bwd_kernel, configs.COLUMN_SUM_TILE),
        ):
            constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUPED": grouped, "GATE": _SPEC}
            found.append(Case(f"{name}-{kind}", kernel, constants, "bf16", grouped))
    return found


def _norm_cases() -> list[Case]:
    """The passes of a gated batch norm with ReLU, per sample and in training, for both layouts, and the kernels that
    join their sums.
    """
    join, finish = (
        dict(zip(("BLOCK_S", "BLOCK_N"), tile, strict=True))
        for tile in (configs.NORM_JOIN_TILE, configs.NORM_FINISH_TILE)
    )
    passes: dict[str, dict[str, Any]] = {
        "fwd": {"dy_ptr": None, "sums_ptr": None, "partial_ptr": None},
        "sums": {"sums_ptr": None, "out_ptr": None},
        "dx": {"partial_ptr": None},
    }
    found = [
        Case("norm_join", norm_gate.norm_stats_join_kernel, join, "bf16", True),
        Case("norm_finish", norm_gate.norm_gate_finish_kernel, finish, "bf16", True, parameter_dtype="fp32"),
    ]
    rows, columns = (configs.PLANE_TILE, configs.PLANE_TILE), (configs.COLUMN_MEAN_TILE, configs.COLUMN_SUM_TILE)
    for layout, stats, kernel, tiles in (
        ("columns", norm_gate.norm_stats_columns_kernel, norm_gate.norm_gate_columns_kernel, columns),
        ("rows", norm_gate.norm_stats_rows_kernel, norm_gate.norm_gate_rows_kernel, rows),
    ):
        means, blocks = (dict(zip(("BLOCK_M", "BLOCK_N"), tile, strict=True)) for tile in tiles)
        for kind, aligned in (("", True), ("-odd", False)):
            found.append(Case(f"norm_stats-{layout}{kind}", stats, means, "bf16", aligned))
            for name, absent in passes.items():
                constants = {**blocks, **absent, "EPS": 1e-5, "RELU": True, "PER_OUTER": True}
                found.append(
                    Case(f"norm_{name}-{layout}{kind}", kernel, constants, "bf16", aligned, parameter_dtype="fp32")
                )
    return found


def _generator_cases() -> list[Case]:
    """The generator of Dep-L0, forward and backward."""
    sizes = {"LIMIT": math.log(100.0), **dict(zip(("BLOCK_N", "BLOCK_K"), configs.GENERATOR_TILE, strict=True))}
    kernels = {
        "fwd": dependency_generator.dependency_generator_fwd_kernel,
        "bwd": dependency_generator.dependency_generator_bwd_kernel,
    }
    return [
        Case(f"generator_{name}", kernel, sizes, "fp32", True, configs.GENERATOR_WARPS, 1)
        for name, kernel in kernels.items()
    ]


def _element(name: str, case: Case) -> str:
    """The element type of a pointer argument."""
    if "seed" in name or name in ("table_ptr", "updates_ptr"):
        return "i64"
    if name in _INTEGER:
        return "i32"
    if "log_alpha" in name or "partial" in name or "running" in name or name in _EXACT:
        return "fp32"
    return case.parameter_dtype if case.parameter_dtype and name in ("w_ptr", "bias_ptr") else case.dtype


def compile_case(case: Case, target: GPUTarget) -> Any:
    """The compiled kernel for a target; element types as in :func:`_element`."""
    names, signature, divisible = case.kernel.arg_names, {}, []
    for i, name in enumerate(names):
        if name in case.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{_element(name, case)}"
            divisible.append(i)
        elif name in _REAL:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if case.aligned and name not in _ODD:
                divisible.append(i)
    attrs = {(i,): [["tt.divisibility", 16]] for i in divisible}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def compile_amd(case: Case) -> None:
    """Compile for AMD's gfx942; raises if that fails."""
    compile_case(case, _HIP)


@functools.cache
def _tools() -> Path:
    """The folder of the disassemblers in the triton wheel."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def inspect(case: Case, capability: int) -> Report:
    """Compile a case for sm_``capability`` and read the counts from the machine code, with the disassemblers of
    triton.
    """
    compiled = compile_case(case, GPUTarget("cuda", capability, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [_tools() / "cuobjdump", "-res-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
        sass = subprocess.run(
            [_tools() / "nvdisasm", "-c", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources is not None, f"cuobjdump printed no register count:\n{usage}"
    loop = hot_loop(sass, case.gemm)
    return Report(
        registers=int(resources[1]),
        stack=int(resources[2]),
        shared=compiled.metadata.shared,
        spills=len(re.findall(r"\b(STL|LDL)\b", sass)),
        f64=len(re.findall(_F64, sass)),
        hot_loop=len(_INSTRUCTION.findall(loop)),
        wgmma=len(re.findall(r"\bHGMMA", sass)),
        # in PTX a register operand is a list in braces, like the accumulator before it; an operand in shared memory is
        # a single descriptor
        register_a=bool(re.search(r"wgmma\.mma_async[^;]*\}\s*,\s*\{", compiled.asm["ptx"])),
        tf32="tf32" in compiled.asm["ptx"],
        copies_in_loop=len(re.findall(_COPY, loop)),
    )


def hot_loop(sass: str, gemm: bool) -> str:
    """The text of the loop that matters: of a GEMM the shortest that multiplies matrices, else the longest.

    A loop is the text from a label to a branch back to it. A wait that the compiler has moved out of line branches back
    too, but without a condition, so loops that end in a conditional branch are preferred. All of the text if there is
    no loop.
    """
    labels = {match[1]: match.start() for match in re.finditer(r"^(\.L_x_\d+):", sass, re.M)}
    branches = re.finditer(r"(@!?P\d+ )?\bBRA(\.U !?UP\d+,)? .*?`\((\.L_x_\d+)\).*", sass)
    loops = [
        (not (m[1] or m[2]), sass[labels[m[3]] : m.end()]) for m in branches if labels.get(m[3], len(sass)) < m.start()
    ]
    if gemm:
        return min((unconditional, len(text), text) for unconditional, text in loops if re.search(_MATRIX, text))[2]
    # a loop of one instruction is the branch to itself at the end of every kernel
    texts = [text for _, text in loops if len(_INSTRUCTION.findall(text)) > 1]
    return max(texts, key=len, default=sass)


def read_budgets(path: Path) -> dict[str, int]:
    """The recorded hot-loop counts for the running version of Triton, such as {"sm_90/fwd-large": 1234}; empty if there
    are none.
    """
    budgets: dict[str, int] = json.loads(path.read_text()).get(triton.__version__, {})
    return budgets
