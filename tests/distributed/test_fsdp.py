"""FSDP2 (fully_shard), on two ranks, and resumed on another number of them."""

from __future__ import annotations

import pytest

from tests.distributed.launch import launch, names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def said(folder):
    return launch("checks_fsdp", 2, folder)


@pytest.mark.parametrize("check", names("checks_fsdp"))
def test_every_rank_says_ok(said, check) -> None:
    assert said[check] == ["ok", "ok"], "\n".join(said[check])


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.long)])
def test_a_checkpoint_is_resumed_on_another_number_of_ranks(said, folder, world) -> None:
    assert said["check_a_checkpoint_is_written"] == ["ok", "ok"]
    resumed = launch("checks_fsdp", world, folder, "check_a_checkpoint_is_resumed")
    assert resumed["check_a_checkpoint_is_resumed"] == ["ok"] * world, "\n".join(
        resumed["check_a_checkpoint_is_resumed"]
    )
