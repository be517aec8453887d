"""The commands, as a user runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dampr
from dampr.bench import linear, timing
from dampr.cli import commands as cli
from dampr.cli import demo
from dampr.testing import Comparison, verify
from tests.limits import HANG

runner = CliRunner()
ROOT = Path(__file__).parent.parent


@pytest.fixture
def refusal(monkeypatch, capsys):
    """What the command prints on stderr where it ends with code 2."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dampr", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr().err
        assert end.value.code == 2, printed
        return printed

    return run


def test_demo_trains_compacts_and_writes_what_it_prints(tmp_path, monkeypatch):
    result = runner.invoke(cli.app, ["demo", "--epochs", "3", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "demo.json").read_text())
    dense, compacted = written["models"]
    assert (dense["name"], compacted["name"]) == ("dense", "compacted")
    assert dense["macs"] == 64 * 300 + 300 * 100 + 100 * 10
    assert dense["params"] == 64 * 300 + 300 + 300 * 100 + 100 + 1000 + 10
    assert 0.11 * dense["macs"] < compacted["macs"] <= 0.12 * dense["macs"]
    assert compacted["accuracy"] > 0.5
    assert written["max_abs_difference"] <= 1e-5
    assert len(written["history"]) == 3
    assert written["environment"]["torch"] == torch.__version__
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    for word in ("dense", "masked", "compacted", "MACs", "accuracy"):
        assert word in result.output
    monkeypatch.chdir(tmp_path)
    (command,) = [line for line in result.output.splitlines() if line.startswith("  dampr report ")]
    again = runner.invoke(cli.app, command.split()[1:])
    assert again.exit_code == 0, again.output
    assert [row["step"] for row in dampr.History(tmp_path / "out" / "history.jsonl").rows()] == [23, 46, 69]
    assert f"{compacted['accuracy']:.4g}" in again.output, "the last row is of the model that is reported"
    assert "<h2>training</h2>" in (tmp_path / "report.html").read_text()


def test_demo_prunes_without_losing_the_digits():
    """The recipe as published in the README, at full length."""
    result = demo.run("digits")
    dense, compacted = result.models
    assert compacted.macs <= 0.12 * dense.macs
    assert compacted.accuracy >= dense.accuracy - 0.015
    assert result.max_abs_difference <= 1e-5
    assert compacted.file_bytes < dense.file_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--data", "cifar"], "data='cifar': expected one of"),
        (["demo", "--data", "mnist"], "with model='mlp'; model='cnn' has it"),
        (["bench", "--rounds", "0"], "rounds=0: expected"),
        (["demo", "--data", "fashion-mnist"], "root=None: expected the folder"),
        (
            ["demo", "--data", "fashion-mnist", "--root", "/nonexistent"],
            "root='/nonexistent': expected train-images-idx3-ubyte",
        ),
        (["demo", "--epochs", "0"], "epochs=0: expected at least 2"),
        (["demo", "--epochs", "1"], "epochs=1: expected at least 2, because a plan takes 40 steps and an epoch has 23"),
    ],
)
def test_bad_arguments_end_with_one_line_and_code_2(refusal, arguments, message):
    assert message in refusal(*arguments).replace("\n", " ")


def test_a_refusal_in_a_process_of_its_own_shows_no_traceback():
    command = [sys.executable, "-m", "dampr", "report", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 2, done.stderr
    assert "target='nothing': expected a file of dampr.save, or module:function" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_python_m_dampr_says_which_parts_are_there(monkeypatch):
    done = subprocess.run([sys.executable, "-m", "dampr"], capture_output=True, text=True, timeout=HANG, check=True)
    for name in ("dampr", "reference", "cpp", "triton", "torch", "cuda"):
        assert any(line.startswith(name) for line in done.stdout.splitlines()), done.stdout


@pytest.mark.parametrize("bad", [False, True])
def test_verify_prints_a_table_and_its_exit_code_tells(monkeypatch, tmp_path, bad):
    row = verify.Row("gated_linear", "cpp", "cpu", "float32")
    row.add("(5, 7, 3), gates on both: y", Comparison("y", 3.0 if bad else 0.5, 1.0, 0.0, 1.0))
    monkeypatch.setattr(verify, "run", lambda *a: [row])
    result = runner.invoke(cli.app, ["verify", "--json", str(tmp_path / "v.json")])
    assert result.exit_code == int(bad)
    assert ("FAILED" in result.output) == bad
    assert json.loads((tmp_path / "v.json").read_text())["rows"][0]["ok"] is not bad


def _points():
    case = ("per batch, output gates", (2, 3, 4), "float32", "cpu")
    return [
        linear.Point(*case, "dense", 1.234e-3, 1.1e-3, 1.3e-3, None),
        linear.Point(*case, "dampr", 2.5e-3, 2.4e-3, 2.6e-3, None),
        linear.Point(
            *case, "compiled unfused", float("nan"), float("nan"), float("nan"), None, error="RuntimeError: no compiler"
        ),
    ]


@pytest.mark.parametrize("verified", [True, False])
def test_bench_refuses_ratios_when_verification_fails(monkeypatch, verified):
    row = verify.Row("gated_linear", "cpp", "cpu", "float32")
    row.add("case", Comparison("y", 0.5 if verified else 2.0, 1.0, 0.0, 1.0))
    monkeypatch.setattr(verify, "run", lambda *a: [row])
    monkeypatch.setattr(linear, "run", lambda *a, **k: _points())
    result = runner.invoke(cli.app, ["bench"])
    assert result.exit_code == int(not verified)
    assert ("2.03" in result.output) == verified
    assert ("withheld" in result.output) != verified
    text = linear.table(_points(), verified)
    assert text[3][5] == "RuntimeError: no compiler", "a competitor that did not run is reported"


def test_bench_times_every_provider_on_real_layers():
    granularities = ("output", "input", "weight", (4, 4))
    cases = [linear.Case((8, 16, 12), where) for where in granularities] + [linear.Case((8, 16, 12), "input", True)]
    points = linear.run(cases, compiled=False, rounds=2)
    assert {p.provider for p in points} == {"dense", "dampr", "eager unfused", "captum"}
    assert {p.case for p in points} == {str(case) for case in cases}
    assert all(p.median > 0 and p.low <= p.median <= p.high for p in points)
    assert {p.route for p in points if p.provider == "dampr"} <= {"small", "fold", "activations", "passes", "reference"}
    only_pass = linear.run([linear.Case((0, 16, 12), "weight", weight_pass=True)], compiled=False, rounds=2)
    assert [p.provider for p in only_pass] == ["copy", "dampr", "eager unfused"]


def test_interleaved_timing_tells_slow_from_fast():
    import time

    times = timing.interleaved({"slow": lambda: time.sleep(0.004), "fast": lambda: None}, rounds=5, min_seconds=0.001)
    assert times["slow"].median > 0.004
    assert times["fast"].median < times["slow"].median
    assert len(times["slow"].samples) == 5


def test_ratios_are_those_of_rounds():
    """A machine that is ten times slower in some rounds changes neither the ratio nor its interval."""
    slowness = [1.0, 10.0, 1.0, 1.0, 10.0, 3.0, 1.0, 1.0, 1.0]
    noise = [1.00, 1.02, 0.98, 1.01, 0.99, 1.03, 0.97, 1.00, 1.04]
    other = timing._summarise(slowness)
    middle, low, high = timing._summarise([1.5 * a * b for a, b in zip(slowness, noise, strict=True)]).relative_to(
        other
    )
    assert (middle, low, high) == pytest.approx((1.5, 1.5 * 0.98, 1.5 * 1.03))
    assert timing._summarise([2.0]).relative_to(timing._summarise([1.0])) == (2.0, 2.0, 2.0)


def test_bare_forms_need_no_command_line_packages(tmp_path):
    """As on a machine with only torch, triton and numpy: nothing else that dampr can use is importable."""
    blocked = ["typer", "rich", "safetensors", "torch_pruning", "sklearn", "matplotlib", "captum", "pybind11"]
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from dampr.bench import linear
from dampr.testing import verify
assert verify.main(["--json", r"{tmp_path}/v.json"]) == 0
linear.QUICK["cpu"] = [linear.Case((4, 8, 8), "output"), linear.Case((4, 8, 8), "weight")]
assert linear.main(["--no-compile", "--rounds", "2", "--json", r"{tmp_path}/b.json"]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "b.json").read_text())["verified"] is True
    assert "gated_linear" in done.stdout


def documented():
    """Of each place in the JSON of a command, the keys that docs/commands.md lists;
    what is in brackets explains them.
    """
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    return {place: set(re.findall(r"`(\w+)`", re.sub(r"\([^()]*\)", "", keys))) for place, keys in rows}


def found_at(payload, place):
    for key in place.split(".")[1:]:
        payload = payload[key.removesuffix("[]")]
        payload = payload[0] if key.endswith("[]") else payload
    return set(payload)


COMMANDS = sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_writes_the_json_that_is_documented(command, factory, monkeypatch):
    row = verify.Row("gated_linear", "cpp", "cpu", "float32")
    row.add("case", Comparison("y", 0.5, 1.0, 0.0, 1.0))
    monkeypatch.setattr(verify, "run", lambda *a: [row])
    monkeypatch.setattr(linear, "run", lambda *a, **k: _points())
    monkeypatch.setenv("DAMPR_CACHE", str(factory))  # what tune finds is for no other test
    recorded("run.jsonl", 1, accuracy=[0.5])
    arguments = {
        "demo": ["--epochs", "2"],
        "report": ["my_factory:make", "--history", "run.jsonl"],
        "doctor": ["my_factory:dead"],
    }
    result = runner.invoke(cli.app, [command, *arguments.get(command, []), "--json", "new/out.json"])
    assert result.exit_code == (command == "doctor"), result.output
    written = json.loads((factory / "new" / "out.json").read_text())
    places = {place: keys for place, keys in documented().items() if place.split(".")[0] == command}
    assert places
    for place, keys in places.items():
        assert found_at(written, place) == keys, place
    assert set(written["environment"]) == documented()["info.environment"]


def test_help_has_a_line_for_each_command_and_the_readme_too():
    lines = [
        line.strip("│ ") for line in runner.invoke(cli.app, ["--help"], env={"COLUMNS": "100"}).output.splitlines()
    ]
    readme = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        (line,) = [line for line in lines if line.split(" ")[0] == command]
        assert line.endswith("."), "a whole sentence, on one line"
        assert f"| `dampr {command}" in readme


def test_version_prints_it_and_no_more():
    assert runner.invoke(cli.app, ["--version"]).output == f"{dampr.__version__}\n"


def test_version_is_that_of_the_distribution():
    from importlib import metadata

    try:
        installed = metadata.version("dampr-torch")
    except metadata.PackageNotFoundError:
        pytest.skip("a source tree that is not installed")
    assert installed == dampr.__version__


FACTORY = """
import torch, dampr
from torch import nn


def make():
    torch.manual_seed(0)
    x = torch.randn(4, 12)
    model = dampr.convert(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)), example_inputs=x)
    model[0].gate.log_alpha.data[:15] = -9
    return model, x


def dead():
    model, x = make()
    model[0].gate.log_alpha.data.fill_(-9)
    return model, x


def wrong():
    return 3


def spoilt():
    model, x = make()
    model.register_forward_hook(lambda module, args, out: out + (module[0].weight.shape[0] == 5))
    return model, x
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "my_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_factory", raising=False)
    return tmp_path


def test_report_of_a_model_and_of_its_file(factory):
    arguments = ["report", "my_factory:make", "--json", "a.json", "--png", "a.png", "--html", "a.html"]
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads((factory / "a.json").read_text())
    (layer,) = written["layers"]
    assert (layer["name"], layer["before"], layer["left"], len(layer["values"])) == ("0", 20, 5, 20)
    assert written["params"] == [20 * 13 + 3 * 21, 5 * 13 + 3 * 6]
    assert written["macs"] == [4 * (20 * 12 + 60), 4 * (5 * 12 + 15)]
    assert (factory / "a.png").read_bytes().startswith(b"\x89PNG")
    page = (factory / "a.html").read_text()
    assert "data:image/png;base64," in page
    assert "<td>25%</td>" in page
    sys.path.insert(0, str(factory))
    import my_factory

    model, x = my_factory.make()
    dampr.save(dampr.compact(model, example_inputs=x), "small.safetensors")
    result = runner.invoke(cli.app, ["report", "small.safetensors", "--json", "b.json"])
    assert result.exit_code == 0, result.output
    again = json.loads((factory / "b.json").read_text())
    assert [(r["before"], r["left"]) for r in again["layers"]] == [(20, 5)]
    assert again["params"] == [None, 5 * 13 + 3 * 6]


def recorded(path, steps, **numbers):
    history = dampr.History(path)
    for step in range(1, steps + 1):
        history.record(step=step, **{name: values[step - 1] for name, values in numbers.items()})


def shapes(path):
    with Image.open(path) as image:
        return image.size


def test_report_shows_the_run_that_a_history_holds(factory):
    steps = 30
    falling, rising = [1 - i / 40 for i in range(steps)], [i / 40 for i in range(steps)]
    recorded("run.jsonl", steps, macs_left=falling, train_acc=rising, val_acc=rising, penalty=falling, f1=falling)
    files = ["--json", "a.json", "--png", "a.png", "--html", "a.html"]
    result = runner.invoke(cli.app, ["report", "my_factory:make", "--history", "run.jsonl", *files])
    assert result.exit_code == 0, result.output
    training = json.loads((factory / "a.json").read_text())["training"]
    assert (training["score"], training["penalty"], training["left"]) == ("val_acc", "penalty", "macs_left")
    assert training["run"]["rows"][-1] == {
        "step": 30,
        "macs_left": 0.275,
        "train_acc": 0.725,
        "val_acc": 0.725,
        "penalty": 0.275,
        "f1": 0.275,
    }
    shown = [line.split() for line in result.output.splitlines() if line.strip().endswith("%")]
    assert [row[0] for row in shown[-12:]][::11] == ["1", "30"], "a dozen rows, from the first to the last"
    assert shown[-1] == ["30", "0.725", "0.275", "27.5%"]
    assert "<td>27.5%</td>" in (factory / "a.html").read_text()
    runner.invoke(cli.app, ["report", "my_factory:make", "--png", "b.png"])
    assert shapes("a.png")[1] > shapes("b.png")[1], "another row of charts"
    result = runner.invoke(
        cli.app, ["report", "my_factory:make", "--history", "run.jsonl", "--score", "f1", "--json", "c.json"]
    )
    assert json.loads((factory / "c.json").read_text())["training"]["score"] == "f1"


@pytest.mark.parametrize(
    "numbers",
    [{}, {"loss": [2.0]}, {"accuracy": [0.5]}, {"penalty": [0.5]}, {"penalty": [float("nan")], "accuracy": [0.5]}],
)
def test_a_history_may_lack_any_number(factory, numbers):
    recorded("run.jsonl", 1, **numbers)
    result = runner.invoke(
        cli.app, ["report", "my_factory:make", "--history", "run.jsonl", "--png", "a.png", "--html", "a.html"]
    )
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--history", "absent.jsonl"], "No such file or directory: 'absent.jsonl'"),
        (["--history", "bad.jsonl"], "bad.jsonl: line 2: step=None, expected an integer"),
        (["--history", "good.jsonl", "--score", "f1"], "score='f1': expected one of ['loss']"),
        (["--score", "f1"], "score='f1': expected --history with it"),
    ],
)
def test_report_says_what_is_wrong_with_a_history(factory, refusal, arguments, message):
    recorded("good.jsonl", 1, loss=[1.0])
    (factory / "bad.jsonl").write_text('{"dampr_history": 1}\n{"loss": 1}\n')
    assert message in refusal("report", "my_factory:make", *arguments)


def test_report_without_matplotlib_says_how_to_get_it(factory, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = runner.invoke(cli.app, ["report", "my_factory:make", "--png", "a.png"])
    assert isinstance(result.exception, cli.CLEAR)
    assert str(result.exception) == "png='a.png': matplotlib is not installed (pip install 'dampr-torch[plot]')"
    result = runner.invoke(cli.app, ["report", "my_factory:make", "--html", "new/a.html"])
    assert "<td>25%</td>" in (factory / "new" / "a.html").read_text(), "a page without a chart"


def test_doctor_finds_a_dead_layer_and_exits_with_1(factory):
    assert runner.invoke(cli.app, ["doctor", "my_factory:make"]).output.strip() == "nothing found"
    result = runner.invoke(cli.app, ["doctor", "my_factory:dead", "--json", "d.json"])
    assert result.exit_code == 1
    assert "all 20 gates are closed" in result.output
    (finding,) = json.loads((factory / "d.json").read_text())["findings"]
    assert finding["where"] == "0"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "target='nothing': expected a file of dampr.save, or module:function"),
        ("my_factory:absent", "my_factory has no function 'absent'"),
        ("my_factory:wrong", "made int, expected"),
        ("my_factory:spoilt", "outputs differ by up to"),
    ],
)
def test_report_refuses_what_is_no_target(factory, refusal, target, message):
    assert message in refusal("report", target).replace("\n", " ")
