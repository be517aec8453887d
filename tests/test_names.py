"""The names that type checkers know are those that run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import pytest

from dampr import names, spec
from dampr.gates import FAMILIES, diffprune, discriminative

ROOT = Path(__file__).resolve().parents[1]
CALLS = """
import torch
import dampr
from torch import nn

model = nn.Linear(4, 4)
dampr.convert(model, gate={gate!r})
dampr.nn.GatedLinear(4, 4, gate={gate!r}, granularity={granularity!r})
dampr.Budget(model, torch.ones(1, 4), macs=0.5, steps=10, score={score!r})
dampr.backend({backend!r})
"""


@pytest.mark.parametrize(
    ("known", "run"),
    [
        (names.Family, FAMILIES),
        (names.MaskVariant, spec.VARIANTS),
        (names.RampShape, diffprune.SHAPES),
        (names.WindowShape, discriminative.SHAPES),
    ],
)
def test_tables_have_the_names_of_their_types(known: Any, run: Iterable[str]) -> None:
    assert sorted(get_args(known)) == sorted(run)


@pytest.mark.long
def test_a_type_checker_finds_a_misspelt_name(tmp_path: Path) -> None:
    right = {"gate": "dam", "granularity": "input", "score": "learned", "backend": "cpp"}
    (tmp_path / "right.py").write_text(CALLS.format(**right))
    (tmp_path / "wrong.py").write_text(CALLS.format(**{name: value + "x" for name, value in right.items()}))

    def lines(name: str) -> list[int]:
        """Of the errors in a file."""
        command = [
            sys.executable,
            "-m",
            "mypy",
            "--follow-imports=silent",
            "--cache-dir",
            str(ROOT / ".mypy_cache"),
            name,
        ]
        found = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"MYPYPATH": str(ROOT)}
        )
        return [int(line.split(":")[1]) for line in found.stdout.splitlines() if line.startswith(name)]

    assert lines("right.py") == []
    assert lines("wrong.py") == [7, 8, 8, 9, 10]
