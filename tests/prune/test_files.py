"""save and load: whole, readable without pickle, and refused when anything is off."""

import json
import struct

import pytest
import torch
from torch import nn

import dampr

X = torch.randn(9, 20, generator=torch.Generator().manual_seed(3))


class Custom(nn.Module):
    """An architecture that only its own code can build, with a tied weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(20, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.b.bias = self.a.bias

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def sequential():
    norm = nn.BatchNorm1d(30)
    return nn.Sequential(nn.Linear(20, 30), norm, nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(30, 4, bias=False), nn.Softmax(dim=1))


def compacted(model, **convert):
    torch.manual_seed(1)
    dampr.convert(model, example_inputs=X, **convert)
    with torch.no_grad():
        for layer in dampr.prune.gated_layers(model).values():
            layer.gate.log_alpha[::3] = -5
    return dampr.compact(model, example_inputs=X).eval()


@pytest.fixture
def saved(tmp_path):
    small = compacted(sequential())
    dampr.save(small, tmp_path / "small.safetensors")
    return small, tmp_path / "small.safetensors"


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


def test_gated_models_are_refused(tmp_path):
    model = dampr.convert(sequential(), example_inputs=X)
    with pytest.raises(TypeError, match="layer '0' still has gates"):
        dampr.save(model, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def _rewrite(path, change):
    """Rewrite the JSON header of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def _manifest(change):
    def apply(header):
        manifest = json.loads(header["__metadata__"]["dampr"])
        change(manifest)
        header["__metadata__"]["dampr"] = json.dumps(manifest)

    return apply


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "not a whole safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:5]), "not a whole safetensors file"),
        (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
        (lambda p: p.write_text("hello, this is text and not tensors at all"), "not a whole safetensors file"),
        (_flip, "do not match the recorded SHA-256"),
        (lambda p: _rewrite(p, lambda h: h.pop("__metadata__")), "no dampr manifest"),
        (lambda p: _rewrite(p, lambda h: h["__metadata__"].update(dampr="{")), "no dampr manifest"),
        (lambda p: _rewrite(p, _manifest(lambda m: m.update(format=99))), "format 99, expected 1"),
        (
            lambda p: _rewrite(p, _manifest(lambda m: m["architecture"]["children"]["0"].update(type="Module"))),
            "architecture: torch.nn.Module",
        ),
        (
            lambda p: _rewrite(p, _manifest(lambda m: m["architecture"]["children"]["0"].update(type="os.system"))),
            "architecture names 'os.system'",
        ),
        (lambda p: _rewrite(p, _manifest(lambda m: m["architecture"]["children"].pop("0"))), "does not fit model; only in the file"),
    ],
)
def test_damaged_files_are_refused(saved, damage, message):
    _, path = saved
    damage(path)
    with pytest.raises(dampr.FileError, match=message):
        dampr.load(path)


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(saved):
    _, path = saved
    for other, message in (
        (nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 4, bias=False)), "cannot come from"),
        (nn.Sequential(nn.Linear(20, 30)), "only in the file"),
    ):
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(dampr.FileError, match=message):
            dampr.load(path, other)
        assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
        assert other.training


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path='.*none.safetensors'"):
        dampr.load(tmp_path / "none.safetensors")


def test_no_pickle_is_involved(saved, monkeypatch):
    import pickle

    def forbidden(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    small, path = saved
    dampr.save(small, path)
    dampr.load(path)
