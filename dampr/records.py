"""Records of results: the environment of a run, and writing results as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from dampr import _version, ops
from dampr._writing import whole_or_nothing
from dampr.ops.thresholds import processor


def environment() -> dict[str, Any]:
    """Versions, devices, number of threads and commit of this run, as plain data."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "dampr": _version.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _driver(),
        "backends": ops.backend_info(),
    }


def device_of(environment: dict[str, Any]) -> str:
    """The device of a run in words, from its :func:`environment`."""
    return environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"


def write_json(path: str | os.PathLike[str], payload: Any) -> None:
    """Write one JSON document; makes parent folders, and writes the file completely or not at all."""
    _replace(Path(path), json.dumps(payload, indent=1) + "\n")


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line; makes parent folders, and writes the file completely or not at all."""
    _replace(Path(path), "".join(json.dumps(row) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    """Write the text to the path, completely or not at all; makes parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing(path) as partial:
        Path(partial).write_text(text)


def _run(*command: str) -> str | None:
    """The output of a command; None if it fails or prints nothing."""
    try:
        return (
            subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=20, cwd=Path(__file__).parent
            ).stdout.strip()
            or None
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _commit() -> str | None:
    """The commit of this code, from the environment or from git; None if neither knows it."""
    return os.environ.get("DAMPR_COMMIT") or _run("git", "describe", "--always", "--dirty", "--abbrev=12")


def _driver() -> str | None:
    """The version of the GPU driver; None without a GPU."""
    return (
        _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if torch.cuda.is_available() else None
    )
