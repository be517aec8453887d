"""Tensor parallelism, on two ranks and on four."""

from __future__ import annotations

import pytest

from tests.distributed.launch import launch, names


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def said(request, tmp_path_factory):
    return launch("checks_tensor_parallel", request.param, tmp_path_factory.mktemp("tensor_parallel")), request.param


@pytest.mark.parametrize("check", names("checks_tensor_parallel"))
def test_every_rank_says_ok(said, check) -> None:
    found, world = said
    assert found[check] == ["ok"] * world, "\n".join(found[check])
