"""Runs the checks of a module on the ranks of a process group, and says of each what happened."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.limits import HANG

ROOT = Path(__file__).parents[2]
# Ranks of one machine find each other without its name, which may be unknown or slow to look up,
# and without its network.
LOCAL = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


def python_path() -> str:
    """PYTHONPATH of the ranks: the repository, then that of this process, which ``tests.without`` sets."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def launch(module: str, world: int, folder: Path, *arguments: str) -> dict[str, list[str]]:
    """Of each check of ``tests.distributed.<module>`` what each rank says: "ok" or a traceback.

    ``folder`` is for what checks write.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = LOCAL | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = python_path()
    command = [sys.executable, "-m", "tests.distributed.launch", module, str(folder), *arguments]
    runs = []
    for rank in range(world):
        with (folder / f"log{rank}.txt").open("w") as log:
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            runs.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
    try:
        for run in runs:
            run.wait(timeout=HANG)
    finally:
        for run in runs:
            run.kill()
    said: dict[str, list[str]] = {}
    for rank in range(world):
        path = folder / f"rank{rank}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        for name in names(module):
            said.setdefault(name, []).append(
                found.get(name) or (folder / f"log{rank}.txt").read_text()[-4000:] or "did not run"
            )
    return said


def run_script(*script: str | Path, ranks: int, cwd: Path) -> str:
    """What a script prints that ``torchrun`` starts, or Python alone where there is one rank;
    an error where it fails or hangs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    how = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--local-addr",
        "127.0.0.1",
        "--master-port",
        port,
    ]
    command = [sys.executable, "-W", "ignore", *(how if ranks > 1 else []), *map(str, script)]
    environment = os.environ | LOCAL | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment)
    try:
        printed, errors = run.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        run.terminate()  # and torchrun ends the ranks
        printed, errors = run.communicate()
    assert run.returncode == 0, f"ended with {run.returncode}:\n{printed[-3000:]}\n{errors[-3000:]}"
    return printed


def names(module: str) -> list[str]:
    """The checks of a module, in order: its functions whose names begin with ``check_``."""
    return [name for name in vars(importlib.import_module(f"tests.distributed.{module}")) if name.startswith("check_")]


def main(module: str, folder: str, *arguments: str) -> None:
    import torch
    from torch import distributed

    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", timeout=timedelta(seconds=HANG))
    rank = distributed.get_rank()
    checks: Any = importlib.import_module(f"tests.distributed.{module}")
    said: dict[str, str] = {}
    for name in arguments or names(module):
        torch.manual_seed(100 + rank)  # ranks whose random states differ, unless a check says otherwise
        try:
            getattr(checks, name)(Path(folder))
            said[name] = "ok"
        except BaseException:
            said[name] = f"rank {rank}\n{traceback.format_exc()}"
        Path(folder, f"rank{rank}.json").write_text(json.dumps(said))
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
