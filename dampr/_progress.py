"""Progress bars on stderr for long work, if stderr is a terminal; else nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
DELAY = 1.0  # seconds before a bar appears, so that short work shows none; a caller with long work can ask for less
_EACH = 0.1  # least seconds between two updates

_screen: Any = None  # the rich.progress.Progress that is shown; bars of nested work are lines in it


def track(items: Collection[T], what: str, *, delay: float | None = None) -> Iterator[T]:
    """Yield ``items``, with a bar that shows how many are done."""
    with bar(what, len(items), delay=delay) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def bar(what: str, total: int, *, delay: float | None = None) -> Iterator[Callable[..., None]]:
    """A block with a bar. It yields a function to call after each of ``total`` parts, with an optional note to show."""
    console = terminal()
    if console is None:
        yield lambda note="": None
        return
    shown = _Bar(console, what, total, DELAY if delay is None else delay)
    try:
        yield shown.advance
    finally:
        shown.close()


def terminal() -> Any:
    """A rich console on stderr; None if that is not a terminal, in all processes of torchrun but the first, and without
    rich.
    """
    if sys.stderr is None or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    return None if console.is_dumb_terminal else console


class _Bar:
    """One bar on the screen. It is drawn only when it advances, so no thread disturbs what is being timed."""

    def __init__(self, console: Any, what: str, total: int, delay: float) -> None:
        self._console, self._what, self._total = console, what, total
        self._done, self._task = 0, None
        self._due = time.monotonic() + delay
        if delay <= 0:
            self._draw("")

    def advance(self, note: str = "") -> None:
        """Count one part, and draw the bar if it is time."""
        self._done += 1
        if time.monotonic() >= self._due or (self._task is not None and self._done == self._total):
            self._draw(note)

    def _draw(self, note: str) -> None:
        """Put the bar on the shared screen if it is not there yet, and draw its present state."""
        screen = _open(self._console)
        if self._task is None:
            self._task = screen.add_task(self._what, total=self._total, note=note)
        screen.update(self._task, completed=self._done, note=note)
        screen.refresh()
        self._due = time.monotonic() + _EACH

    def close(self) -> None:
        """Remove the bar from the shared screen, and end the screen if this was its last bar."""
        global _screen
        if self._task is not None:
            _screen.remove_task(self._task)
            if not _screen.tasks:
                _screen.stop()
                _screen = None


def _open(console: Any) -> Any:
    """The screen that all bars share, started if there is none."""
    global _screen
    if _screen is None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        _screen = Progress(*columns, console=console, auto_refresh=False, transient=True, redirect_stdout=False)
        _screen.start()
    return _screen
