"""The soak test finds what it looks for, in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import HANG

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_short_run_that_is_killed_ends_as_one_that_is_not() -> None:
    command = [sys.executable, "-m", "tests.soak", "--steps", "120", "--kills", "2"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=HANG)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "120 steps, phases ['dense', 'ramp', 'fine-tuning'], 2 kills" in found.stdout
