"""A plan that is killed again and again: ``python -m tests.soak``, or ``make soak`` (``STEPS=2000`` in CI).

One process runs a plan of 10,000 steps from a dense network to a small one, undisturbed. Another does the same, writes
checkpoints, and is killed (SIGKILL) at random moments, also while it writes; the next goes on from the last checkpoint.
Held to: every loss of the second run is that of the first, to the bit; so are the parameters at the end; and memory
does not grow while neither phase nor model change.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import dampr
from tests.limits import HANG

GROWTH = 16 * 2**20  # bytes: what the allocator may keep beside what is needed
EVERY, FEWEST = 40, 12  # steps between checkpoints, and how many checkpoints a short run has


def network() -> nn.Module:
    torch.manual_seed(0)
    first = (
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    )
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(144, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 4))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(4, (16,), generator=generator)
    return torch.randn(16, 1, 8, 8, generator=generator) + y.view(-1, 1, 1, 1) / 2, y


def memory() -> int:
    """Bytes that this process has allocated and touched.

    Pages of files, such as torch's libraries, do not count: the system drops them where memory is short and reads them
    again.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(1024 * int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))


def train(steps: int, folder: Path, checkpoints: bool, doomed: bool) -> None:
    """Run the plan to its end, from the last checkpoint if there is one.

    ``doomed``: the kill is on its way, so wait for it where the steps are over; a slow or busy machine may send it
    late.
    """
    torch.set_num_threads(1)
    example = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    plan = dampr.Plan(model, example, macs=0.4, steps=steps)
    path, every = folder / "checkpoint.pt", min(EVERY, max(1, steps // FEWEST))
    if path.exists():
        state = torch.load(path, weights_only=True)
        plan.load_state_dict(state["plan"], optimizer)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
    with open(folder / "losses.jsonl", "a") as log:
        log.write("\n")  # ends what a kill may have cut off
        for step in range(plan.steps_taken, steps):
            x, y = batch(step)
            loss = F.cross_entropy(model(x), y)
            total = loss + plan.penalty()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            plan.step(optimizer)
            row = {"step": step, "loss": loss.detach().double().item(), "phase": plan.phase}
            log.write(json.dumps(row | ({"memory": memory()} if step % max(1, steps // 100) == 0 else {})) + "\n")
            if checkpoints and (step + 1) % every == 0:
                log.flush()
                state = {"plan": plan.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"random": torch.get_rng_state()}, folder / "partial.pt")
                os.replace(folder / "partial.pt", path)
    if doomed:
        time.sleep(HANG)
        raise SystemExit("soak: no kill came")
    small = plan.finish()
    torch.save(small.state_dict(), folder / "end.pt")


def start(steps: int, folder: Path, *switches: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.soak", "--child", str(folder), "--steps", str(steps), *switches]
    )


def killed(steps: int, folder: Path, kills: int, seed: int) -> int:
    """The second run; returns how often it was killed."""
    draw, done = random.Random(seed), 0
    while done < kills:
        reached = progress(folder)
        # A little after the next share of the steps, so that every phase and some
        # checkpoint that is being written is hit.
        goal = min(steps, reached + draw.randint(1, max(2, 2 * (steps - reached) // (kills - done + 1))))
        process = start(steps, folder, "--checkpoints", "--doomed")
        while process.poll() is None and progress(folder) < goal:
            time.sleep(0.02)
        time.sleep(draw.random() / 20)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"soak: a run ended with {process.returncode} before it was killed")
        done += 1
    if start(steps, folder, "--checkpoints").wait():
        raise SystemExit("soak: the last run failed")
    return done


def progress(folder: Path) -> int:
    """The steps that have been logged, as far as they are on the disk."""
    path = folder / "losses.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 400))
        rows = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b"{") and line.endswith(b"}")]
    return int(json.loads(rows[-1])["step"]) + 1 if rows else 0


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    """The last row of each step: what followed a checkpoint before a kill was run again.

    A row that was cut off by a kill is no row.
    """
    found: dict[int, dict[str, Any]] = {}
    for line in (folder / "losses.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] in found and row["loss"] != found[row["step"]]["loss"]:
            raise SystemExit(
                f"soak: step {row['step']} has loss {row['loss']!r} when it is run again, "
                f"{found[row['step']]['loss']!r} before"
            )
        found[row["step"]] = row
    return found


def growth(whole: dict[int, dict[str, Any]]) -> dict[str, int]:
    """Of each phase, by how many bytes memory grew over its last two thirds, in one process."""
    found = {}
    for phase in dict.fromkeys(row["phase"] for row in whole.values()):
        seen = [row["memory"] for row in whole.values() if row["phase"] == phase and "memory" in row]
        if len(seen) >= 6:
            found[phase] = max(seen[-2:]) - max(seen[: len(seen) // 3 + 1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="A plan that is killed and resumed.")
    parser.add_argument("--steps", type=int, default=10_000, help="of the plan (default: 10000; 2000 in CI)")
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoints", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--doomed", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        train(given.steps, given.child, given.checkpoints, given.doomed)
        return 0
    with tempfile.TemporaryDirectory() as name:
        straight, broken = Path(name, "straight"), Path(name, "broken")
        for folder in (straight, broken):
            folder.mkdir()
        if start(given.steps, straight).wait():
            raise SystemExit("soak: the undisturbed run failed")
        kills = killed(given.steps, broken, given.kills, given.seed)
        whole, pieces = rows(straight), rows(broken)
        wrong = [step for step, row in whole.items() if row["loss"] != pieces.get(step, {}).get("loss")]
        ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (straight, broken)]
        same = all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
        grown = growth(whole)
    phases = list(dict.fromkeys(row["phase"] for row in whole.values()))
    print(
        f"{len(whole)} steps, phases {phases}, {kills} kills; memory grew by "
        f"{ ({k: f'{v / 2**20:.1f} MB' for k, v in grown.items()}) }"
    )
    if wrong:
        print(f"losses differ from step {wrong[0]} on: {whole[wrong[0]]} and {pieces.get(wrong[0])}")
    if not same:
        print("parameters differ at the end")
    failed = bool(wrong) or not same or len(whole) != given.steps or max(grown.values(), default=0) > GROWTH
    print("soak: FAILED" if failed else "soak: every loss and parameter equal to the bit, memory flat")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
