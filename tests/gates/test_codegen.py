"""The families without noise compile for NVIDIA and AMD, in one kernel of each kind,
without spills or double precision.
"""

import pytest

from dampr import spec

triton = pytest.importorskip("triton")

from dampr.testing import codegen  # noqa: E402

if not isinstance(codegen.gates.reduce_kernel, triton.JITFunction):
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled in this process", allow_module_level=True)

SPECS = {
    "value": spec.value(),
    **{shape: spec.ramp(shape, 5.0) for shape in spec.SHAPES},
    **{variant: spec.mask(variant) for variant in spec.VARIANTS},
}
KERNELS = [
    "sample_fwd-odd",
    "fold_fwd",
    "fold_bwd",
    "gate_weights_fwd",
    "gate_weights_bwd",
    "live_blocks-32",
    "small_m-small-16",
]


def with_gate(name, gate):
    case = next(case for case in codegen.cases(90) if case.name == name)
    constants = {**case.constants, "GATE": gate}
    constants.update({arg: None for arg in case.kernel.arg_names if "seed" in arg})
    return case._replace(constants=constants)


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        *(("sample_bwd-grouped", gate) for gate in SPECS),
        *((name, gate) for name in KERNELS for gate in ("value", "tanh", "exact_zero")),
    ],
)
def test_families_compile(name, gate):
    case = with_gate(name, SPECS[gate])
    report = codegen.inspect(case, 90)
    assert report.spills == report.stack == report.f64 == 0, report
    codegen.compile_amd(case)
