"""What a point of the benchmark says about memory, and how a table shows it."""

import pytest
import torch

import dampr
from dampr.bench import linear
from dampr.bench.competitors import UnfusedLinear

M, K, N = 32, 16, 24
FLOAT, SEED = 4, 8


def _kept(layer):
    return linear.TrainingStep(layer, torch.randn(M, K), torch.randn(M, N)).kept_bytes()


def test_a_dense_layer_keeps_nothing_beyond_its_parameters_and_input():
    assert _kept(torch.nn.Linear(K, N)) == 0


@pytest.mark.parametrize("granularity", ["input", "weight", (4, 4)])
def test_a_gated_layer_keeps_a_seed(cpu_backend, granularity):
    assert _kept(dampr.nn.GatedLinear(K, N, granularity=granularity)) == SEED


def test_an_output_gate_per_sample_keeps_the_activation_before_it(cpu_backend):
    assert _kept(dampr.nn.GatedLinear(K, N, granularity="output", per_sample=True)) == SEED + M * N * FLOAT


def test_unfused_gates_keep_what_they_multiply_and_compiling_them_keeps_less():
    layer = UnfusedLinear(K, N, granularity="input", per_sample=True)
    activation = M * K * FLOAT
    assert _kept(layer) == 4 * activation
    torch._dynamo.reset()
    compiled = _kept(torch.compile(layer, dynamic=False, backend="aot_eager"))
    assert activation <= compiled <= 4 * activation


def test_memory_that_two_saved_tensors_share_counts_once():
    class Twice(torch.nn.Module):
        def forward(self, x):
            y = x * 2  # saved as it is, by sin, and as a view, by cos
            return y.sin() + y.view(N, M).cos().view(M, N)

    assert linear.TrainingStep(Twice(), torch.randn(M, N), torch.randn(M, N)).kept_bytes() == M * N * FLOAT


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, ""), (0, "0 B"), (8, "8 B"), (999_600, "1 MB"), (65_536, "65.5 KB"), (4_194_304, "4.19 MB")],
)
def test_sizes_have_three_digits(size, text):
    assert linear.size_text(size) == text


def test_a_table_has_the_columns_of_memory_that_were_measured():
    case = ("per batch, output gates", (2, 3, 4), "float32", "cpu")
    dense = linear.Point(*case, "dense", 1.0, 1.0, 1.0, None, kept_bytes=0)
    failed = linear.Point(*case, "captum", 1.0, 1.0, 1.0, None, error="ImportError: captum")
    header, *rows = linear.table([dense, failed], True)
    assert header[-1] == "kept for backward"
    assert [row[-1] for row in rows] == ["0 B", ""]
    on_gpu = linear.Point(*case, "dense", 1.0, 1.0, 1.0, 2_000_000, kept_bytes=0)
    assert [row[-2:] for row in linear.table([on_gpu], True)] == [("kept for backward", "peak"), ("0 B", "2 MB")]
    assert "kept for backward" not in linear.table([linear.Point(*case, "dense", 1.0, 1.0, 1.0, None)], True)[0]


def test_lines_are_aligned():
    assert list(linear.aligned([("a", "bb"), ("ccc", "d")])) == ["a    bb", "ccc  d"]
