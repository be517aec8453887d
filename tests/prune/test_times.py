"""layer_times: the right pairs of layers, and the reason where nothing was gained.

What anything takes is a clock's that counts.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dampr
from dampr.nn import GatedLSTM, GatedMultiheadAttention
from dampr.prune import layer_times, times
from dampr.prune.measure import count_call
from tests import models
from tests.prune.test_models import close_at_random


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(times, "seconds_of", lambda call, device: float(count_call(call)))


@pytest.mark.parametrize("name", models.ALL)
def test_the_sum_over_layers_is_the_model(counted, name):
    model, x = models.ALL[name]()
    dampr.convert(model, example_inputs=x)
    close_at_random(model)
    small = dampr.compact(model, example_inputs=x)
    rows = layer_times(model, small, x)
    for side, net in enumerate((model, small)):
        total, found = count_call(net.eval(), x), sum(row.seconds[side] for row in rows)
        assert found < total if name == "vit" else found == total  # the products of attention are in no layer
    assert all(row.seconds[1] <= row.seconds[0] for row in rows)
    assert {row.note == "" for row in rows} >= {True}


def test_a_layer_that_gained_nothing_says_why(counted):
    model = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3), nn.ReLU(), nn.Linear(3, 3)
    )
    dampr.convert(model, exclude=["4", "6"])
    model[0].gate.log_alpha.data[:4] = -9
    model[2].gate.log_alpha.data[:5] = -9
    x = torch.randn(4, 6)
    rows = {row.name: row for row in layer_times(model, dampr.compact(model, example_inputs=x), x)}
    assert rows["0"].note == "4 closed channels stay: LayerNorm '1' computes statistics over its channels"
    assert rows["2"].params == (90, 45)
    assert (rows["2"].note, rows["4"].note) == ("", "")
    assert rows["6"].note == "nothing that it reads or writes was cut"
    assert rows["2"].as_dict()["seconds"] == (4 * 80.0, 4 * 40.0)


def test_smaller_and_not_faster_is_said(monkeypatch):
    monkeypatch.setattr(times, "seconds_of", lambda call, device: 1.0)
    model, x = models.mlp()
    dampr.convert(model, example_inputs=x)
    close_at_random(model)
    assert all(
        "not in its arithmetic" in row.note for row in layer_times(model, dampr.compact(model, example_inputs=x), x)
    )


def test_recurrent_layers_and_attention():
    """Timed for real: only that each has a pair of times."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.mid, self.attention = (
                GatedLSTM(5, 8, batch_first=True),
                nn.Linear(8, 8),
                GatedMultiheadAttention(8, 4, batch_first=True),
            )

        def forward(self, x):
            y = self.mid(self.rnn(x)[0])
            return self.attention(y, y, y, need_weights=False)[0]

    model, x = Net(), torch.randn(2, 6, 5)
    model.rnn.gate.log_alpha.data[:3] = -9
    model.attention.gate.log_alpha.data[:1] = -9
    small = dampr.compact(model, example_inputs=x)
    rows = layer_times(model, small, x)
    assert [row.name for row in rows] == ["rnn", "mid", "attention"]
    assert all(min(row.seconds) > 0 and row.params[1] < row.params[0] for row in rows)
    with pytest.raises(ValueError, match="expected the dampr_manifest"):
        layer_times(model, nn.Linear(2, 2), x)
