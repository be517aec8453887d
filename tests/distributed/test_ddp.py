"""DistributedDataParallel, on two ranks."""

from __future__ import annotations

import pytest

from tests.distributed.launch import launch, names


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return launch("checks_ddp", 2, tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("check", names("checks_ddp"))
def test_every_rank_says_ok(said, check) -> None:
    assert said[check] == ["ok", "ok"], "\n".join(said[check])
