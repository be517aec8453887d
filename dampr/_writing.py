"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def whole_or_nothing(path: str | os.PathLike[str]) -> Iterator[str]:
    """A file of a name of its own to write, which then takes the place of ``path`` at once, and is on the disk when it
    does.

    Processes that write to one path at a time do not write into each other; the last one stays. A link stays one, and
    what it points to is written. Raises FileNotFoundError for a folder that is not there, IsADirectoryError for a
    ``path`` that is one.
    """
    target = os.path.realpath(os.fspath(path))
    folder = os.path.dirname(target)
    if os.path.isdir(target):
        raise IsADirectoryError(f"path={os.fspath(path)!r}: expected a file, it is a folder")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"path={os.fspath(path)!r}: expected it in a folder that exists")
    handle, partial = tempfile.mkstemp(prefix=f".{os.path.basename(target)}.", suffix=".partial", dir=folder)
    os.close(handle)
    try:
        yield partial
        mode = os.stat(target).st_mode & 0o777 if os.path.exists(target) else 0o666 & ~_umask()
        os.chmod(partial, mode)
        _to_disk(partial)
        os.replace(partial, target)
        if os.name == "posix":
            _to_disk(folder)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _to_disk(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
