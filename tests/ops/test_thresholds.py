"""From where on closed gates are left out: safe by default, what was measured once it was asked for,
and told by explain.
"""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import dampr
from dampr.bench import tune
from dampr.cli import commands as cli
from dampr.nn import GatedLinear
from dampr.ops import thresholds

needs_extension = pytest.mark.skipif(dampr.backend_info()["cpp"].startswith("missing"), reason="no extension")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DAMPR_CACHE", str(tmp_path))
    thresholds._of.cache_clear()
    yield tmp_path
    thresholds._of.cache_clear()


def test_without_a_file_the_defaults_hold_and_say_how_to_measure(cache):
    assert thresholds.skip() == thresholds.DEFAULT
    assert (
        "from 50% of the inputs' gates on, from 38% of the outputs' gates on, by default; dampr tune"
        in thresholds.described()
    )
    assert not list(cache.iterdir()), "nothing is written unasked"


def test_what_was_written_holds_for_this_number_of_threads_alone():
    threads = torch.get_num_threads()
    file = thresholds.write(0.25, thresholds.NEVER, date="2026-01-01")
    assert thresholds.skip() == (0.25, thresholds.NEVER, "as dampr tune found on 2026-01-01")
    assert thresholds.described().startswith("from 25% of the inputs' gates on, never for outputs")
    try:
        torch.set_num_threads(threads + 1)
        assert thresholds.skip() == thresholds.DEFAULT
        thresholds.write(0.5, 0.5)
        assert json.loads(file.read_text())["threads"].keys() == {str(threads), str(threads + 1)}
    finally:
        torch.set_num_threads(threads)
    assert thresholds.skip().inputs == 0.25


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"threads": {"N": {"inputs": -1, "outputs": 0.5}}}', '{"threads": {"N": {"inputs": "a"}}}']
)
def test_a_damaged_file_leaves_the_defaults(text):
    thresholds.path().write_text(text.replace("N", str(torch.get_num_threads())))
    found = thresholds.skip()
    assert found[:2] == thresholds.DEFAULT[:2]
    thresholds.write(0.3, 0.3)
    assert thresholds.skip()[:2] == (0.3, 0.3)


@needs_extension
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_call_leaves_out_what_the_threshold_allows_and_no_less(side):
    torch.manual_seed(0)
    layer = GatedLinear(256, 256, granularity=side)
    x = torch.randn(512, 256, requires_grad=True)

    def node(closed):
        layer.gate.log_alpha.data.fill_(9.0)
        layer.gate.log_alpha.data[: round(closed * 256)] = -20.0
        return type(layer(x).grad_fn).__name__

    for least in (0.25, 0.75):
        thresholds.write(least, least)
        assert node(least + 0.1) == "_SkipClosedBackward"
        assert node(least - 0.1) != "_SkipClosedBackward"
    thresholds.write(thresholds.NEVER, thresholds.NEVER)
    assert node(0.95) != "_SkipClosedBackward"


@needs_extension
def test_explain_says_what_holds(capsys):
    thresholds.write(0.2, 0.3, date="2026-01-01")
    dampr.explain(GatedLinear(1024, 1024), torch.randn(64, 1024))
    assert (
        "from 20% of the inputs' gates on, from 30% of the outputs' gates on, as dampr tune found on 2026-01-01"
        in capsys.readouterr().out
    )


def test_the_least_share_pays_at_every_larger_one_too():
    def timings(*ratios):
        return [tune.Timing("inputs", share, ratio) for share, ratio in zip((0.25, 0.5, 0.75), ratios, strict=True)]

    assert tune.least(timings(1.2, 0.9, 0.5), "inputs") == 0.5
    assert tune.least(timings(0.9, 1.1, 0.5), "inputs") == 0.75
    assert tune.least(timings(0.9, 0.9, 1.0), "inputs") == thresholds.NEVER
    assert tune.least(timings(0.9, 0.9, 0.9), "outputs") == thresholds.NEVER


@needs_extension
def test_tuning_measures_both_sides_and_keeps_what_it_finds(cache):
    timings = tune.run((64, 96, 96), (0.25, 0.75), rounds=1)
    assert [t[:2] for t in timings] == [(side, share) for side in ("inputs", "outputs") for share in (0.25, 0.75)]
    assert all(t.ratio > 0 for t in timings)
    found = tune.keep(timings)
    assert found == thresholds.skip()
    assert "as dampr tune found on" in found.source
    assert len(list(cache.iterdir())) == 1


@needs_extension
def test_the_command_prints_and_writes_what_it_found(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "run", lambda: [tune.Timing(side, 0.5, 0.9) for side in ("inputs", "outputs")])
    done = CliRunner().invoke(cli.app, ["tune", "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    assert "from 50% of the inputs' gates on, from 50% of the outputs' gates on" in done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"environment", "timings", "thresholds"}
    assert found["timings"][0].keys() == {"side", "closed", "ratio"}
    assert found["thresholds"]["inputs"] == 0.5
    assert "from 50%" in CliRunner().invoke(cli.app, ["info"]).output
