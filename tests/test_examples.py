"""Every example runs from its command line; short here, on the bundled digits,
and leaving the committed results alone.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from examples import notebooks
from tests.long import long_if

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*_*.py"))
SHORT = ["--root", "digits", "--no-write"]
OTHERS = {  # that do not train one image classifier, and how to make them short
    "dam_rank": ["--seeds", "1", "--count", "100"],
    "compare_families": ["--seeds", "1", "--epochs", "14", "--count", "300"],
    "lstm_language_model": ["--epochs", "10", "--count", "6000", "--words", "300"],
    "dam_recommender": ["--epochs", "2"],
    "dam_graph": ["--epochs", "20", "--seeds", "1"],
}
# a plan takes 40 steps at least
PLANNED = ("diffprune_lenet5", "gru_digits", "transformer_digits", "train_ddp", "train_fsdp", "train_tp")


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, *arguments: str) -> dict:
    module = importlib.import_module(f"examples.{script}")
    if script == "dam_rank":
        for recipe in module.RECIPES.values():
            monkeypatch.setitem(recipe, "steps", 10)
    monkeypatch.setattr(sys, "argv", [script, *SHORT, *arguments])
    module.main()
    out = capsys.readouterr().out
    return json.loads(out[out.index("{\n") :])


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s not in OTHERS])
def test_a_training_script_runs(monkeypatch, capsys, script) -> None:
    before = {path: path.read_bytes() for path in (ROOT / "examples" / "results").glob("*")}
    result = run(monkeypatch, capsys, script, "--epochs", "4" if script in PLANNED else "1")
    assert result["data"] == "digits"
    assert "published" in result
    if "macs" in result:
        assert 0 < result["macs"] <= result["macs_dense"]
        assert 0 < result["accuracy"] <= 1
    assert {path: path.read_bytes() for path in (ROOT / "examples" / "results").glob("*")} == before


def test_the_rank_script_runs(monkeypatch, capsys) -> None:
    result = run(monkeypatch, capsys, "dam_rank", *OTHERS["dam_rank"])
    assert [r["kernel"] for r in result["runs"]] == ["linear", "linear", "linear", "mlp", "quadratic"]


def test_the_comparison_has_every_family(monkeypatch, capsys) -> None:
    result = run(monkeypatch, capsys, "compare_families", *OTHERS["compare_families"])
    assert [r["family"] for r in result["runs"]] == ["dense", "hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"]


@pytest.mark.parametrize(
    "script", [long_if("lstm_language_model", "lstm_language_model"), "dam_recommender", "dam_graph"]
)
def test_sizes_quality_and_speed_stand_side_by_side(monkeypatch, capsys, script) -> None:
    result = run(monkeypatch, capsys, script, *OTHERS[script])
    assert len(result["models"]) >= 3
    for row in result["models"]:
        assert min(row["params"], row["macs"], row["ms"], row["quality"]) > 0
    if script == "lstm_language_model":
        assert result["hidden"] == {"dense": 256, "narrow": 128, "pruned": 128}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_committed_result(script) -> None:
    assert json.loads((ROOT / "examples" / "results" / f"{script}.json").read_text())["environment"]["torch"]


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_printed(path: Path) -> None:
    """Numbers depend on the machine; their places do not."""
    shape = re.compile(r"\([\d, ]*\)|-?\d+(\.\d+)?(e-?\d+)?|\s+")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    shown = ["".join(line for output in cell["outputs"] for line in output["text"]) for cell in cells]
    printed = notebooks.run(path)
    assert [len(text.splitlines()) for text in printed] == [len(text.splitlines()) for text in shown]
    assert [shape.sub("#", text) for text in printed] == [shape.sub("#", text) for text in shown]
