"""What is written appears whole or not at all, whoever else writes."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import dampr
from tests.prune.files.examples import sequential


def test_two_processes_may_save_to_one_path(tmp_path):
    """Each writes a file of its own first: what is loaded meanwhile is one of the two, whole."""
    script = (
        "import sys, torch, dampr\ntorch.manual_seed(int(sys.argv[1]))\n"
        "net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))\n"
        "for _ in range(60):\n    dampr.save(net, sys.argv[2])\n"
    )
    path = tmp_path / "model.safetensors"
    dampr.save(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), path)
    writers = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, str(seed), str(path)]) for seed in (0, 1)
    ]
    loads = 0
    while any(writer.poll() is None for writer in writers):
        dampr.load(path)  # FileError if damaged
        loads += 1
    assert [writer.wait() for writer in writers] == [0, 0]
    assert loads > 10
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    dampr.save(nn.Linear(4, 2), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        dampr.save(nn.Linear(4, 3), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(FileNotFoundError, match="expected it in a folder that exists"):
        dampr.save(nn.Linear(4, 2), tmp_path / "nowhere" / "model.safetensors")


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (lambda: nn.Linear(4, 2, device="meta"), "'weight' in its state dict is on the meta device"),
        (lambda: nn.LazyLinear(2), "'weight' in its state dict is UninitializedParameter"),
        (lambda: Extra(4, 2), "'_extra_state' in its state dict is dict"),
        (lambda: with_buffer(torch.eye(4).to_sparse()), "'more' in its state dict is torch.sparse_coo"),
    ],
)
def test_what_cannot_be_written_is_named(build, found, tmp_path):
    with pytest.raises(TypeError, match=f"^model: {found}: expected a dense tensor with values"):
        dampr.save(build(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def with_buffer(value):
    model = nn.Linear(4, 4)
    model.register_buffer("more", value)
    return model


def test_views_of_one_memory_are_written_each(tmp_path):
    model = nn.Linear(4, 4)
    model.register_buffer("more", model.weight.detach()[1:])
    dampr.save(model, tmp_path / "model.safetensors")
    twin = with_buffer(torch.zeros(3, 4))
    dampr.load(tmp_path / "model.safetensors", model=twin)
    for name, t in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], t)


def writers(folder):
    """What writes files that others read, each twice in one place: (path, how)."""
    from dampr import records
    from dampr.ops import thresholds

    def plan(folder):
        transformers = pytest.importorskip("transformers")
        from dampr.integrations import huggingface

        (folder / "checkpoint-3").mkdir(exist_ok=True)
        made = dampr.Plan(sequential(), torch.randn(4, 20), macs=0.7, steps=50)
        state = transformers.TrainerState(global_step=3, is_world_process_zero=True)
        huggingface.PlanCallback(made).on_save(type("Arguments", (), {"output_dir": str(folder)}), state, None)

    return {
        "model": ("m", lambda: dampr.save(nn.Linear(4, 2), folder / "m")),
        "json": ("r.json", lambda: records.write_json(folder / "r.json", [1])),
        "rows": ("r.jsonl", lambda: records.write_jsonl(folder / "r.jsonl", [{"a": 1}])),
        "thresholds": (thresholds.path(), lambda: thresholds.write(0.5, 0.4)),
        "plan": ("checkpoint-3/dampr_plan.pt", lambda: plan(folder)),
    }


@pytest.mark.parametrize("name", ["model", "json", "rows", "thresholds", "plan"])
def test_whatever_is_written_appears_whole_and_is_on_the_disk_before(tmp_path, monkeypatch, name):
    monkeypatch.setenv("DAMPR_CACHE", str(tmp_path / "cache"))
    path, write = writers(tmp_path)[name]
    write()
    file, seen, replace = tmp_path / path, [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append((str(a), str(b))), replace(a, b)))
    write()
    assert seen[0] == "fsync"
    partial, target = seen[1]
    assert target == str(file)
    assert partial not in (f"{file}.partial", str(file))
    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        write()
    assert file.read_bytes() == before
    assert not list(file.parent.glob("*.partial")) + list(file.parent.glob(".*.partial"))


def test_a_link_stays_a_link_and_a_folder_is_no_file(tmp_path):
    (tmp_path / "latest").symlink_to(tmp_path / "model")
    dampr.save(nn.Linear(4, 2), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert dampr.load(tmp_path / "model").in_features == 4
    with pytest.raises(IsADirectoryError, match=r"^path=.*: expected a file, it is a folder"):
        dampr.save(nn.Linear(4, 2), tmp_path)
