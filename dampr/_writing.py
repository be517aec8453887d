"""Write files so that they appear completely or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def whole_or_nothing(path: str | os.PathLike[str]) -> Iterator[str]:
    """A block that writes to the temporary file whose name it gets; at its end that file replaces ``path`` in one step.

    Before that it is flushed to the disk. Processes that write to one path at the same time do not mix; the last one
    wins. If ``path`` is a link, it stays a link and its target is written.

    Raises: FileNotFoundError if the folder does not exist; IsADirectoryError if ``path`` is a folder.
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
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """The process's umask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
