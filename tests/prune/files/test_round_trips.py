"""What save wrote, load gives back: by the path alone, or into the dense original."""

import copy

import pytest
import torch
from torch import nn

import dampr
from dampr.prune.measure import count_macs
from tests.prune.files.examples import X, compacted, forge, sequential


class Custom(nn.Module):
    """An architecture that only its own code can build, with a tied weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(20, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.b.bias = self.a.bias

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def test_round_trip_by_the_path_alone(saved):
    small, path = saved
    again = dampr.load(path)
    assert torch.equal(again(X), small(X))
    assert str(again) == str(small)
    assert again.dampr_manifest == small.dampr_manifest
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no partial file stays"


def test_round_trip_into_the_dense_original(saved):
    small, path = saved
    model = sequential()
    assert dampr.load(path, model) is model
    assert torch.equal(model(X), small(X))
    assert model[0].out_features == small[0].out_features == 20
    assert model[1].num_features == 20


def test_custom_model_with_tied_parameters(tmp_path):
    model = Custom()
    small = compacted(model, include=["a"])
    path = tmp_path / "c.safetensors"
    dampr.save(small, path)
    with pytest.raises(dampr.FileError, match="pass the dense original as model="):
        dampr.load(path)
    again = dampr.load(path, Custom())
    assert torch.equal(again(X), small(X))


def test_a_plain_model_that_was_never_gated_round_trips(tmp_path):
    model = sequential().eval()
    dampr.save(model, tmp_path / "plain.safetensors")
    assert torch.equal(dampr.load(tmp_path / "plain.safetensors")(X), model(X))


def test_no_pickle_is_involved(saved, monkeypatch):
    import pickle

    def forbidden(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    small, path = saved
    dampr.save(small, path)
    dampr.load(path)


def test_other_dtypes_stay_what_they_are(tmp_path):
    path = tmp_path / "half.safetensors"
    mixed = nn.Sequential(nn.Linear(20, 6).bfloat16(), nn.BatchNorm1d(6), nn.Linear(6, 2).double()).eval()
    dampr.save(mixed, path)
    again = dampr.load(path)
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in mixed.state_dict().items()}
    wrong = nn.Sequential(nn.Linear(20, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    with pytest.raises(dampr.FileError, match=r"'0.weight' is torch.bfloat16, but torch.float32 in model"):
        dampr.load(path, wrong)
    assert wrong[0].weight.dtype == torch.float32
    assert dampr.load(path, copy.deepcopy(mixed))[2].weight.dtype == torch.float64


@pytest.mark.parametrize("reader", [nn.Linear(12, 3, bias=False), nn.Linear(12, 3)])
def test_a_bias_that_compaction_added_comes_back(tmp_path, reader):
    """The half of a sigmoid that a closed unit leaves behind moves into the bias of the reader."""
    dense = nn.Sequential(nn.Linear(20, 12), nn.Sigmoid(), reader, nn.Linear(3, 2))
    small = compacted(copy.deepcopy(dense), include=["0"])
    assert small[2].bias is not None
    path = tmp_path / "bias.safetensors"
    dampr.save(small, path)
    for again in (dampr.load(path), dampr.load(path, copy.deepcopy(dense))):
        assert torch.equal(again(X), small(X))
        assert str(again) == str(small)
        assert [n for n, _ in again.named_parameters()] == [n for n, _ in small.named_parameters()]
        assert again[2].bias.requires_grad


def test_only_linear_and_conv_layers_gain_a_bias(tmp_path):
    dampr.save(nn.Sequential(nn.LayerNorm(4)), tmp_path / "n.safetensors")
    with pytest.raises(dampr.FileError, match=r"only in the file: \['0.bias'\]"):
        dampr.load(tmp_path / "n.safetensors", nn.Sequential(nn.LayerNorm(4, bias=False)))
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    dampr.save(conv, tmp_path / "c.safetensors")
    again = dampr.load(tmp_path / "c.safetensors", nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)))
    assert torch.equal(again[0].bias, conv[0].bias)


def test_layers_used_twice(tmp_path):
    act, tied = nn.ReLU(), nn.Linear(20, 20)
    dampr.save(nn.Sequential(nn.Linear(20, 20), act, nn.Linear(20, 20), act), tmp_path / "act.safetensors")
    assert len(dampr.load(tmp_path / "act.safetensors")) == 4
    model = nn.Sequential(tied, act, tied)
    dampr.save(model, tmp_path / "tied.safetensors")
    with pytest.raises(dampr.FileError, match="pass the dense original as model="):
        dampr.load(tmp_path / "tied.safetensors")
    original = copy.deepcopy(model)
    again = dampr.load(tmp_path / "tied.safetensors", original)
    assert torch.equal(again(X), model(X))
    assert again[0].weight is again[2].weight


def test_a_pruned_transformer_loads_into_its_dense_original(tmp_path):
    class Model(nn.Module):
        """What only its own code can build."""

        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 3), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.encoder(x).mean(1))

    model, x = Model(), torch.randn(2, 5, 8)
    dampr.convert(model, example_inputs=x, exclude="encoder.layers.2.self_attn")
    for i, layer in enumerate(dampr.prune.gated_layers(model).values()):
        layer.gate.log_alpha.data[i % 3 :: 2] = -5
    small = dampr.compact(model, example_inputs=x).eval()
    assert [type(layer).__name__[:6] for layer in small.encoder.layers] == ["Pruned", "Pruned", "Transf"]
    dampr.save(small, tmp_path / "t.safetensors")
    again = dampr.load(tmp_path / "t.safetensors", Model())
    assert torch.equal(again(x), small(x))
    assert str(again) == str(small)
    assert again.dampr_manifest == small.dampr_manifest
    with pytest.raises(dampr.FileError, match="pass the dense original as model="):
        dampr.load(tmp_path / "t.safetensors")


def test_a_file_without_leftovers_still_loads(saved):
    small, path = saved
    forge(path, lambda m: m.pop("leftovers"))
    assert torch.equal(dampr.load(path)(X), small(X))


def test_gains_that_gates_made_are_loaded_into_the_dense_original(tmp_path):
    """A norm without gain has one after compaction, where gates are not 1; of the dtype of the model."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for how in ({"affine": False}, {"affine": False, "track_running_stats": False}):
        dense = (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **how), nn.ReLU(), nn.Conv2d(8, 2, 1)).double().eval()
        )
        gated = dampr.convert(copy.deepcopy(dense), example_inputs=x)
        assert dampr.Budget(gated, x, macs=0.9).total == count_macs(dense, x)
        (gate,) = {layer.gate for layer in dampr.prune.gated_layers(gated).values()}
        gate.set_levels_(torch.where(torch.arange(8) < 3, -1.0, torch.rand(8)))
        small = dampr.compact(gated, example_inputs=x)
        assert small[0].out_channels < 8
        torch.testing.assert_close(small(x), gated(x), rtol=1e-9, atol=1e-9)
        dampr.save(small, tmp_path / "small.safetensors")
        for loaded in (dampr.load(tmp_path / "small.safetensors", dense), dampr.load(tmp_path / "small.safetensors")):
            torch.testing.assert_close(loaded(x), small(x), rtol=1e-12, atol=1e-12)
            assert loaded[1].affine == (loaded[1].weight is not None) == (how == {"affine": False})
