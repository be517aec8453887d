"""Thresholds for leaving closed gates out of matrix products on the CPU.

A product leaves out the rows and columns of closed gates if the share of closed gates is at least a threshold. The
default thresholds gain on every processor that was measured; ``dampr tune`` measures this one. It writes a file into
the user's cache folder, one for each processor, with an entry for each number of threads. The file is read once, when
the first layer is called that is large enough.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dampr._writing import whole_or_nothing


class Skip(NamedTuple):
    """The thresholds for one number of threads.

    Attributes:
        inputs: if at least this share of a layer's input gates is closed, the closed ones are left out of the product.
        outputs: the same for the output gates.
        source: where the two numbers come from, in words.
    """

    inputs: float
    outputs: float
    source: str


DEFAULT = Skip(0.5, 0.375, "by default; dampr tune measures this machine")
NEVER = 2.0  # a share that is never reached: closed gates are never left out


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def path() -> Path:
    """The file with the thresholds of this processor, in ``$DAMPR_CACHE`` or in ``dampr`` in the user's cache folder.

    It need not exist.
    """
    cache = os.environ.get("DAMPR_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dampr"
    return Path(cache) / f"thresholds-{re.sub(r'[^a-z0-9]+', '-', processor().lower()).strip('-')}.json"


def skip() -> Skip:
    """The thresholds for the present number of threads."""
    return _of(torch.get_num_threads(), os.environ.get("DAMPR_CACHE"), os.environ.get("XDG_CACHE_HOME"))


@functools.cache
def _of(threads: int, *_: str | None) -> Skip:
    """The thresholds for this number of threads. The environment variables are arguments because the file's place
    depends on them: the result is cached for each, as finding the file takes as long as a small layer.
    """
    file = path()
    try:
        entry = json.loads(file.read_text())["threads"][str(threads)]
        inputs, outputs = float(entry["inputs"]), float(entry["outputs"])
        if not (0 < inputs <= NEVER and 0 < outputs <= NEVER):
            raise ValueError(f"{inputs}, {outputs}")
    except (FileNotFoundError, KeyError):
        return DEFAULT
    except (OSError, ValueError, TypeError) as error:
        return DEFAULT._replace(source=f"by default, because {file} cannot be read ({type(error).__name__})")
    return Skip(inputs, outputs, f"as dampr tune found on {entry.get('date', 'this machine')}")


def described(found: Skip | None = None) -> str:
    """The thresholds as text."""
    found = skip() if found is None else found
    sides = [_from(found.inputs, "inputs"), _from(found.outputs, "outputs")]
    return f"{sides[0]}, {sides[1]}, {found.source}"


def _from(share: float, side: str) -> str:
    """One threshold as text."""
    return f"from {share:.0%} of the {side}' gates on" if share <= 1 else f"never for {side}"


def write(inputs: float, outputs: float, **more: Any) -> Path:
    """Write thresholds for the present number of threads into the file, and keep those for other numbers of threads.

    Args:
        inputs: the smallest share of closed input gates at which leaving them out pays; ``NEVER`` if it never does.
        outputs: the same for output gates.
        more: what else to note in the entry, such as the date.

    Returns: the path of the file.
    """
    file = path()
    try:
        known = json.loads(file.read_text())
        threads = dict(known["threads"])
    except (OSError, ValueError, KeyError, TypeError):
        threads = {}
    threads[str(torch.get_num_threads())] = {"inputs": inputs, "outputs": outputs, **more}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing(file) as partial:
        Path(partial).write_text(json.dumps({"processor": processor(), "threads": threads}, indent=1) + "\n")
    _of.cache_clear()
    return file
