"""Documents keep their word: code runs, tables come from results files, named files and commands exist."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dampr.bench import linear
from dampr.cli import demo, report
from tests.distributed.launch import run_script
from tests.limits import HANG

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def python_of(document):
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def ran(code, folder):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=folder, timeout=HANG
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PRINTED = re.compile(
    r"460 steps from scratch: dense for (\d+), ramp to 230, fine-tuned for 230\n0: \d+ of 300\n2: \d+ of 100\n"
    r"macs: [\d,]+ of 1,606,400 \((\d+\.\d\d)%\), target [\d,]+\n"
    r"largest difference of outputs, masked and compacted: \S+\n"
    r"accuracy (\d+\.\d)%\n"
)


def test_the_readme_code_runs_as_printed(tmp_path):
    (code,) = python_of("README.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 21
    printed = PRINTED.fullmatch(ran(code, tmp_path))
    assert printed
    assert 9.5 < float(printed[2]) <= 10
    assert float(printed[3]) > 94
    shown = PRINTED.search(README)
    assert shown, "the README shows another kind of output"
    assert shown[1] == printed[1]
    assert (tmp_path / "small.safetensors").exists()


def test_the_readme_code_holds_for_a_target_that_it_used_to_collapse_at(tmp_path):
    """At 6 % of the MACs the gates were once cut unasked behind the training, to 72.9 % of the digits."""
    (code,) = python_of("README.md")
    printed = PRINTED.fullmatch(ran(code.replace("macs=0.1,", "macs=0.06,"), tmp_path))
    assert float(printed[2]) <= 6
    assert float(printed[3]) > 92


def test_the_code_of_the_training_page_runs(tmp_path):
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("tensorboard")
    assert "of 1,606,400 (2" in ran("\n".join(python_of("docs/training.md")), tmp_path)


def test_the_code_of_the_choosing_page_prints_what_it_shows(tmp_path):
    """Numbers of accuracy and widths aside, which depend on the machine."""
    shape = re.compile(r"\d+(\.\d+)?%:?|\[.*?\]")
    lines = ran("\n".join(python_of("docs/choosing.md")), tmp_path).splitlines()
    page = (ROOT / "docs" / "choosing.md").read_text()
    shown = [line for block in re.findall(r"\n\n```\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert lines[0] == shown[0]
    assert [shape.sub("#", line) for line in lines] == [shape.sub("#", line) for line in shown]
    found, written = ([float(re.search(r"([\d.]+)%(,|$)", line)[1]) for line in text[1:]] for text in (lines, shown))
    assert found == pytest.approx(written, abs=15)


BEFORE = """
import torch, dampr
from torch import nn
x, y = torch.randn(64, 20), torch.randint(5, (64,))
model, batches, epochs, loader = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5)), [(x, y)], 10, range(20)
"""


@pytest.mark.parametrize("name", ["Plan", "Budget", "prune_once"])
def test_the_code_of_the_budgets_page_runs(name, tmp_path):
    (code,) = [block for block in python_of("docs/budgets.md") if f"dampr.{name}(" in block]
    ran(BEFORE + code, tmp_path)


def test_the_code_of_the_page_on_many_processes_runs_on_two(tmp_path):
    """Each rank proves its own result; masked and compacted models are compared in dampr.compact."""
    blocks = python_of("docs/distributed.md")
    assert len(blocks) == 3
    (tmp_path / "page.py").write_text(
        "\n".join(blocks) + "\nprint('through', flush=True)\ndistributed.destroy_process_group()\n"
    )
    assert run_script("page.py", ranks=2, cwd=tmp_path).count("through") == 2


@pytest.mark.parametrize("name", ["cpu/demo-digits", "cpu/demo-fashion-mnist"])
def test_tables_are_those_of_the_results_files(name):
    data = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    table = report.markdown(report.DEMO_COLUMNS, report.demo_rows(demo.Report.from_dict(data)))
    assert table in README, "run python -m benchmarks.tables"


@pytest.mark.parametrize("stage", ["pass", "vectors", "weights"])
def test_the_performance_page_shows_what_the_results_files_hold(stage):
    head, *points = map(
        json.loads, (ROOT / "benchmarks" / "results" / "cpu" / f"linear-{stage}.jsonl").read_text().splitlines()
    )
    assert head["verified"]
    columns, *rows = linear.table([linear.Point(**{**p, "shape": tuple(p["shape"])}) for p in points], True)
    assert report.markdown(columns, rows) in (ROOT / "docs" / "performance.md").read_text(), (
        "run python -m benchmarks.tables"
    )
    assert {"dampr", "eager unfused", "compiled unfused"} <= {p["provider"] for p in points}


def test_published_results_meet_what_the_demo_promises():
    data = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "demo-fashion-mnist.json").read_text())
    dense, *_, compacted = data["models"]
    assert compacted["macs"] <= 0.3 * dense["macs"]
    assert compacted["accuracy"] >= dense["accuracy"] - 0.015
    assert data["max_abs_difference"] <= 1e-5


@pytest.mark.parametrize(
    "document", sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / document).read_text()):
        assert ((ROOT / document).parent / target).exists(), target


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert "Learned gates that prune" in (tmp_path / "index.html").read_text()
    assert "GatedLinear" in (tmp_path / "api" / "nn" / "index.html").read_text()
