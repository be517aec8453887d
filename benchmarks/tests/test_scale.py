"""What docs/scale.md says follows from what was counted."""

from __future__ import annotations

import pytest

from benchmarks import scale

COUNTS = scale._found()["counts"]


def of(how: str, ranks: int, width: int, gates: str) -> dict:
    return next(r for r in COUNTS if (r["how"], r["ranks"], r["width"], r["gates"]) == (how, ranks, width, gates))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("width", scale.WIDTHS)
def test_gates_send_four_bytes_each_under_data_parallelism(ranks, width) -> None:
    for how, more in (("DDP", 0), ("FSDP2", 1)):
        dense, penalty, budget = (of(how, ranks, width, gates) for gates in ("none", "penalty", "budget"))
        assert penalty["bytes"] - dense["bytes"] == 4 * penalty["count"]
        assert budget["bytes"] - dense["bytes"] == 4 * budget["count"]
        assert penalty["messages"] - dense["messages"] == more
        assert budget["messages"] - dense["messages"] == 1


def test_gates_of_a_shard_are_at_most_two_messages_a_vector() -> None:
    dense, penalty, budget = (of("TP", 2, 128, gates) for gates in ("none", "penalty", "budget"))
    assert penalty["messages"] - dense["messages"] <= 2 * penalty["vectors"]
    assert budget["messages"] == penalty["messages"] + 1


def test_one_process_sends_nothing() -> None:
    assert all(r["messages"] == 0 for r in COUNTS if r["ranks"] == 1)


def test_the_configuration_has_seventy_billion_parameters_and_its_gates_stay_below_a_hundredth() -> None:
    model = scale.llama()
    assert 65e9 < model["parameters"] < 75e9
    assert model == scale._found()["model"]
    for ranks in scale.MANY:
        found = scale.simulated(model, ranks)
        assert found["gate_seconds"] < 0.01 * found["seconds"]
