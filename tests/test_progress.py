"""Bars where stderr is a terminal, and not a sign of them elsewhere."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import dampr
from dampr import _progress
from dampr.bench import linear
from dampr.testing import verify
from tests.limits import HANG

ROOT = Path(__file__).parent.parent
CONTROL = {chr(i) for i in range(32)} - {"\n"}


@pytest.fixture
def screen(monkeypatch):
    """What a terminal is sent, with bars that appear at once."""
    sent = io.StringIO()
    monkeypatch.setattr(_progress, "terminal", lambda: Console(file=sent, force_terminal=True, width=100))
    monkeypatch.setattr(_progress, "DELAY", 0)
    monkeypatch.setattr(_progress, "_EACH", 1e9)  # only the first and the last picture
    yield sent
    assert _progress._screen is None, "a bar is left on the screen"


def test_a_bar_counts_and_is_gone_at_the_end(screen):
    assert list(_progress.track("abc", "letters")) == ["a", "b", "c"]
    for part in ("letters", "0/3", "3/3"):
        assert part in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K\x1b[?25h\r"), "the line is erased and the cursor back"


def test_work_inside_of_work_is_a_line_of_the_same_picture(screen):
    with _progress.bar("outer", 2) as advance:
        for _ in _progress.track(range(2), "inner"):
            pass
        advance("half way")
        assert [task.description for task in _progress._screen.tasks] == ["outer"]
    assert "inner" in screen.getvalue()
    assert "half way" not in screen.getvalue(), "the next picture is not due"


def test_a_bar_goes_when_its_work_fails_or_is_left(screen):
    with pytest.raises(ZeroDivisionError), _progress.bar("work", 2):
        raise ZeroDivisionError
    for _ in _progress.track(range(3), "search"):
        break


def test_quick_work_shows_nothing(screen, monkeypatch):
    monkeypatch.setattr(_progress, "DELAY", 1e9)
    assert sum(_progress.track(range(3), "work")) == 3
    assert screen.getvalue() == ""


def test_long_work_has_a_bar(screen, monkeypatch):
    x = torch.randn(4, 12)
    model = dampr.convert(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), example_inputs=x)
    model[0].gate.log_alpha.data[:3] = -9
    small = dampr.compact(model, example_inputs=x)
    dampr.verify_model(model, x)
    monkeypatch.setattr(dampr.prune.latency, "seconds_of", lambda call, device: 1.0)
    monkeypatch.setattr(dampr.prune.times, "seconds_of", lambda call, device: 1.0)
    dampr.prune.Latency(model, x)
    dampr.prune.layer_times(model, small, x)
    verify.run("noise")
    linear.run([linear.Case((4, 8, 8), "output")], compiled=False, rounds=2)
    for what in ("closing gates", "timing layers", "verify", "bench"):
        assert what in screen.getvalue()


@pytest.mark.parametrize("settings", [{"RANK": "1"}, {"TERM": "dumb"}], ids=str)
def test_other_processes_and_dumb_terminals_show_nothing(monkeypatch, settings):
    monkeypatch.setattr(sys, "stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(_progress.terminal(), Console)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert _progress.terminal() is None


DEMO = [sys.executable, "-m", "dampr", "demo", "--epochs", "2"]


def test_a_demo_that_is_piped_is_quiet(tmp_path):
    environment = os.environ | {"FORCE_COLOR": "1"}  # set where CI runs: it asks for colours, not for bars
    done = subprocess.run(
        [*DEMO, "--out", tmp_path], capture_output=True, text=True, timeout=HANG, cwd=ROOT, env=environment, check=True
    )
    assert done.stderr == ""
    environment.pop("FORCE_COLOR")
    done = subprocess.run(
        [*DEMO, "--out", tmp_path], capture_output=True, text=True, timeout=HANG, cwd=ROOT, env=environment, check=True
    )
    assert done.stderr == ""
    assert not CONTROL & set(done.stdout)


def test_a_demo_in_a_terminal_draws_on_stderr_and_prints_on_stdout(tmp_path):
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [*DEMO, "--out", tmp_path], stdout=subprocess.PIPE, stderr=theirs, text=True, cwd=ROOT, env=environment
    ) as run:
        os.close(theirs)
        sent = bytearray()
        try:
            while part := os.read(ours, 4096):
                sent += part
        except OSError:  # how Linux says that the other end is closed
            pass
        printed = run.stdout.read()
    os.close(ours)
    assert run.returncode == 0
    for part in (b"dense", b"pruned", b"2/2", b"loss", b"\x1b["):
        assert part in sent
    assert not CONTROL & set(printed)
    assert "compacted" in printed
