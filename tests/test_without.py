"""Tests with a module hidden are without it in the processes that they start, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import without


@pytest.mark.parametrize(("hidden", "imported", "found"), [("json", "json.tool", False), ("json", "ast", True)])
def test_a_hidden_module_is_hidden_from_processes(
    hidden: str, imported: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    without.hide(hidden, str(tmp_path))
    ran = subprocess.run([sys.executable, "-c", f"import {imported}"], capture_output=True, text=True, check=False)
    assert (ran.returncode == 0) is found, ran.stderr
    assert found or "(hidden)" in ran.stderr
