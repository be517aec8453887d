"""The GEMM over live blocks of input features: equal to the bit to the same kernel over all of them."""

from __future__ import annotations

import pytest
import torch

from dampr.kernels import configs
from dampr.ops import GatePair
from dampr.ops import backend_triton as backend
from dampr.ops.backend_triton import gated_linear as launchers
from dampr.reference import gate_values
from dampr.spec import RULES, hard_concrete

SPEC = hard_concrete()
SEEDS = torch.tensor([5]), torch.tensor([2**62 + 1])
FAR = 60.0  # a log-alpha so far out that every draw is 0, or 1


def log_alpha(n: int, dead: str, depth: int) -> torch.Tensor:
    """Gates of which all, none, every other block of ``depth`` or every one but a single gate is closed."""
    values = 2 * torch.randn(n)
    if dead == "all":
        values[:] = -FAR
    elif dead == "none":
        values[::depth] = FAR
    elif dead == "blocks":
        values[torch.arange(n) // depth % 2 == 0] = -FAR
    elif dead == "all but one":
        values[:] = -FAR
        values[n // 2] = FAR
    return values


def tile(M: int, N: int, K: int) -> configs.Tile:
    return configs.live_tile(M, N, K, "fp32", 0)


def live_and_full(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gates: GatePair
) -> tuple[torch.Tensor, torch.Tensor]:
    """y over the live blocks, and over a list of all of them without an output tile that leaves early."""
    (M, K), N = x.shape, weight.shape[0]
    z, live, count = launchers._live_blocks(x, gates, K, tile(M, N, K).depth)
    everything = torch.arange(live.numel(), dtype=torch.int32)
    assert torch.equal(live[: int(count)].sort().values, live[: int(count)])
    everything = launchers.Live(z, everything, torch.tensor([live.numel()], dtype=torch.int32))
    full = launchers._live_gemm(x, weight, bias, gates._replace(output_log_alpha=None), everything, tile(M, N, K))
    if gates.output is not None:
        z_out = backend.sample_gates_fwd(gates.output, None)
        full = torch.where(z_out == 0, 0.0, full * z_out)
    return backend.gated_linear_live_fwd(x, weight, bias, gates), full


@pytest.mark.parametrize("outputs", ["none", "blocks", "all"])
@pytest.mark.parametrize("inputs", ["none", "blocks", "all but one", "all"])
@pytest.mark.parametrize("shape", [(5, 7, 3), (33, 65, 130), (40, 144, 224)], ids=str)
def test_skipping_changes_no_bit(shape: tuple[int, int, int], inputs: str, outputs: str) -> None:
    M, N, K = shape
    depth, cols = tile(M, N, K).depth, tile(M, N, K).cols
    gates = GatePair.of(log_alpha(K, inputs, depth), log_alpha(N, outputs, cols), *SEEDS, SPEC)
    y, full = live_and_full(torch.randn(M, K), torch.randn(N, K), torch.randn(N), gates)
    assert torch.equal(y.view(torch.int32), full.view(torch.int32))


@pytest.mark.parametrize("K", [1, 31, 32, 33, 1024, 1100])
@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("depth", [16, 32])
def test_the_list_names_every_block_with_an_open_gate_in_order(K: int, rule: str, depth: int) -> None:
    spec = hard_concrete(rule)
    gates = GatePair.of(torch.randn(K) - 4, None, SEEDS[0] if rule == "sample" else None, None, spec)
    z, live, count = launchers._live_blocks(torch.empty(0), gates, K, depth)
    truth = gate_values(gates.input.log_alpha, spec, gates.input.seed)
    assert torch.equal(z == 0, truth == 0)
    torch.testing.assert_close(z, truth, atol=1e-6, rtol=1e-6)
    blocks = [i for i in range(-(K // -depth)) if bool((truth[i * depth : (i + 1) * depth] != 0).any())]
    assert live[: int(count)].tolist() == blocks


def test_without_gates_every_block_is_live() -> None:
    x, weight = torch.randn(9, 50), torch.randn(20, 50)
    y = backend.gated_linear_live_fwd(x, weight, None, GatePair(None, None, None, None, SPEC))
    torch.testing.assert_close(y, x @ weight.t(), atol=1e-5, rtol=1e-5)


def test_what_is_dead_is_not_read() -> None:
    """NaN in dead features of x and W, and in W's dead rows, does not reach y."""
    M, N, K = 20, 128, 128
    depth, cols = tile(M, N, K).depth, tile(M, N, K).cols
    gates = GatePair.of(log_alpha(K, "blocks", depth), log_alpha(N, "blocks", cols), *SEEDS, SPEC)
    x, weight = torch.randn(M, K), torch.randn(N, K)
    expected = backend.gated_linear_live_fwd(x, weight, None, gates)
    x[:, gates.input.log_alpha == -FAR] = float("nan")
    weight[:, gates.input.log_alpha == -FAR] = float("nan")
    weight[gates.output.log_alpha == -FAR] = float("nan")
    assert torch.equal(backend.gated_linear_live_fwd(x, weight, None, gates), expected)


def test_a_gate_that_is_not_a_number_stays_visible() -> None:
    gates = GatePair.of(torch.full((64,), -FAR), None, SEEDS[0], None, SPEC)
    gates.input.log_alpha[40] = float("nan")
    assert backend.gated_linear_live_fwd(torch.randn(3, 64), torch.randn(5, 64), None, gates).isnan().all()
