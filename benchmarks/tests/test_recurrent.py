"""The competitors of recurrent layers compute what the gated one computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import recurrent


@pytest.mark.parametrize("kind", recurrent.GATED)
def test_competitors_are_the_same_layer_written_otherwise(kind: type[nn.RNNBase]) -> None:
    dense, x = kind(6, 6), torch.randn(5, 3, 6)
    gated = recurrent.GATED[kind](6, 6)
    gated.load_state_dict(dense.state_dict(), strict=False)
    others = [made(dense) for made in (recurrent.Unfused, recurrent.Cells)]
    with torch.no_grad():
        log_alpha = gated.gate.log_alpha.normal_()
        log_alpha[2] = -20
        for other in others:
            other.log_alpha.copy_(log_alpha)
    z = gated.eval().gate()
    for other in others:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recurrent, "unfused_gate", lambda log_alpha: z)
            torch.testing.assert_close(other(x)[0], gated(x)[0])
    assert z[2] == 0
    assert bool((gated(x)[0] != 0).any())


def test_every_competitor_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recurrent.CASES, "cpu", [recurrent.Recurrent(nn.LSTM, 4, 2, 8)])
    points = recurrent.run("cpu", compiled=False, rounds=2)
    assert [p.provider for p in points] == ["dense", "dampr", "eager unfused", "eager cells"]
    assert all(p.median > 0 and p.shape == (4, 2, 8, 8) for p in points)
