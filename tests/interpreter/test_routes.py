"""Which route serves a call, and forcing one."""

from __future__ import annotations

import pytest
import torch

from dampr.kernels.dispatch import thresholds
from dampr.ops import GateArgs, GatePair
from dampr.ops import backend_triton as backend
from dampr.spec import hard_concrete

BF16, SMALL_M = torch.bfloat16, thresholds().small_m


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        ("fold", (8192, 4096, 4096, BF16, "output", False)),
        ("fold", (16, 4096, 4096, BF16, "input", False)),
        ("one_pass", (64, 128, 128, BF16, "input", True)),
        ("passes", (8192, 4096, 4096, BF16, "output", True)),
        ("small_m", (SMALL_M, 4096, 4096, BF16, "weight", False)),
        ("small_m", (1, 4096, 4096, BF16, (1, 1), False)),
        ("fold", (SMALL_M + 1, 4096, 4096, BF16, "weight", False)),
        ("fold", (16, 4096, 4095, BF16, "weight", False)),
        ("fold", (16, 4096, 4096, torch.float32, "weight", False)),
        ("fold", (16, 4096, 4096, BF16, (4, 4), False)),
    ],
)
def test_the_route_is_a_function_of_the_problem_and_gives_its_reason(expected: str, arguments: tuple) -> None:
    name, reason = backend.route(*arguments)
    assert name == expected
    assert reason


def test_a_forced_route_overrules_the_choice_and_ends_with_its_block() -> None:
    arguments = (8192, 4096, 4096, BF16, "weight", False)
    with backend.forced_route("small_m"):
        assert backend.route(*arguments) == ("small_m", "forced by forced_route")
        with backend.forced_route(None):
            assert backend.route(*arguments)[0] == "fold"
        assert backend.route(*arguments)[0] == "small_m"
    assert backend.route(*arguments)[0] == "fold"


@pytest.mark.parametrize(
    ("name", "granularity", "per_sample"),
    [
        ("small_m", "input", False),
        ("small_m", (4, 4), False),
        ("live", "weight", False),
        ("passes", "output", False),
        ("fold", "output", True),
    ],
)
def test_a_forced_route_that_cannot_serve_says_so(
    name: str, granularity: str | tuple[int, int], per_sample: bool
) -> None:
    with backend.forced_route(name), pytest.raises(ValueError, match=f"route '{name}' cannot serve"):
        backend.route(8, 8, 8, BF16, granularity, per_sample)


def test_launchers_obey_a_forced_route() -> None:
    x, weight, seed, spec = torch.randn(4, 8), torch.randn(6, 8), torch.tensor([1]), hard_concrete()
    with backend.forced_route("small_m"), pytest.raises(ValueError, match="route 'small_m' cannot serve"):
        backend.gated_linear_fwd(x, weight, None, GatePair.of(torch.zeros(8), None, seed, None, spec), False)
    with backend.forced_route("live"), pytest.raises(ValueError, match="route 'live' cannot serve"):
        backend.weight_gated_linear_fwd(x, weight, None, GateArgs(torch.zeros(48), seed, spec), (1, 1))


def test_an_unknown_route_is_refused() -> None:
    with pytest.raises(ValueError, match="name='folded'"), backend.forced_route("folded"):
        pass
