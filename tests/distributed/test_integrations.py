"""accelerate, Trainer and Lightning, on two ranks."""

from __future__ import annotations

import pytest

from tests.distributed.launch import launch, names

pytest.importorskip("accelerate")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return launch("checks_integrations", 2, tmp_path_factory.mktemp("integrations"))


@pytest.mark.parametrize("check", names("checks_integrations"))
def test_every_rank_says_ok(said, check) -> None:
    assert said[check] == ["ok", "ok"], "\n".join(said[check])
