"""Calls everything public with random, hostile and senseless arguments, for a time.

    python -m tests.fuzz --minutes 5                    # the form of CI; --minutes 60 by hand
    python -m tests.fuzz --target gated_linear --seed 7  # one case again: what the report of a finding says

What is run follows from ``--seed``: case number i has the seed ``seed + i`` and takes its target in turn. Cases run in
a process of their own, so that a crash or a hang is a finding too. The exit status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import collections
import select
import signal
import subprocess
import sys
import time
import traceback

HANG_S = 240
SAME = 3  # findings of one kind that are shown in full


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Fuzz dampr's public functions and constructors."
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: an hour)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--target", help="this one alone, and without --minutes or --cases a single case of it")
    parser.add_argument("--cases", type=int, help="this many cases, however long they take")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    alone = given.target is not None and given.cases is None and "--minutes" not in " ".join(sys.argv)
    cases = 1 if alone else given.cases
    if given.child:
        return child(given.seed, cases, given.target)
    return parent(given.seed, cases, given.target, None if cases else 60 * given.minutes)


def child(seed: int, cases: int | None, target: str | None) -> int:
    """Runs cases until it is killed, or ``cases`` of them; a line for each beginning and each finding."""
    import torch

    from .targets import PLANTED, TARGETS
    from .values import Draw

    torch.set_num_threads(1)
    names = [target] if target else list(TARGETS)
    number = 0
    while cases is None or number < cases:
        name, own = names[(seed + number) % len(names)], seed + number
        print(f"case {name} {own}", flush=True)
        torch.manual_seed(own)
        try:
            complaint = (TARGETS | PLANTED)[name](Draw(own))
        except Exception:  # a case that cannot be made is a fault of the fuzzer, and is to be seen
            complaint = "the fuzzer itself failed: " + traceback.format_exc(limit=-4).replace("\n", " | ")
        if complaint is not None:
            print(f"finding {name} {own} {' '.join(complaint.split())}", flush=True)
        number += 1
    print("done", flush=True)
    return 0


def parent(seed: int, cases: int | None, target: str | None, seconds: float | None) -> int:
    end = None if seconds is None else time.monotonic() + seconds
    findings: list[tuple[str, int, str]] = []
    ran, following, done = collections.Counter[str](), seed, False
    while not done and (end is None or time.monotonic() < end):
        left = None if cases is None else cases - (following - seed)
        if left == 0:
            break
        done, following = watch(following, left, target, end, ran, findings)
    report(ran, findings)
    return 1 if findings else 0


def watch(
    seed: int,
    cases: int | None,
    target: str | None,
    end: float | None,
    ran: collections.Counter[str],
    findings: list[tuple[str, int, str]],
) -> tuple[bool, int]:
    """One child until it ends, hangs or the time is over.

    Returns whether nothing is left to do, and the seed to go on with.
    """
    command = [sys.executable, "-m", "tests.fuzz", "--child", "--seed", str(seed)]
    command += ["--target", target] if target else []
    command += ["--cases", str(cases)] if cases is not None else ["--minutes", "0"]
    last = ("?", seed)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout is not None
        try:
            while True:
                wait = HANG_S if end is None else min(HANG_S, max(0.0, end - time.monotonic()))
                ready = select.select([process.stdout], [], [], wait)[0]
                if not ready:
                    if end is not None and time.monotonic() >= end:
                        return True, last[1] + 1
                    findings.append((*last, f"does not end within {HANG_S} s"))
                    show(findings)
                    return False, last[1] + 1
                line = process.stdout.readline()
                if not line:
                    break
                kind, _, rest = line.strip().partition(" ")
                if kind == "case":
                    name, number = rest.split()
                    last = (name, int(number))
                    ran[name] += 1
                elif kind == "finding":
                    name, number, complaint = rest.split(" ", 2)
                    findings.append((name, int(number), complaint))
                    show(findings)
                elif kind == "done":
                    return True, last[1] + 1
        finally:
            process.kill()
    code = process.wait()
    why = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    findings.append((*last, f"the process died: {why}"))
    show(findings)
    return last[0] == "?", last[1] + 1


def show(findings: list[tuple[str, int, str]]) -> None:
    name, seed, complaint = findings[-1]
    if sum(other == name for other, *_ in findings) <= SAME or complaint.startswith(("the process", "does not end")):
        print(f"FINDING {name}: {complaint[:1500]}\n    python -m tests.fuzz --target {name} --seed {seed}", flush=True)


def report(ran: collections.Counter[str], findings: list[tuple[str, int, str]]) -> None:
    by_target = collections.Counter(name for name, *_ in findings)
    for name, count in sorted(by_target.items()):
        seeds = [seed for other, seed, _ in findings if other == name]
        print(f"{name}: {count} findings in {ran[name]} cases, seeds {seeds[:20]}")
    print(f"{sum(ran.values())} cases of {len(ran)} targets, {len(findings)} findings")


if __name__ == "__main__":
    sys.exit(main())
