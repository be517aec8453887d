"""Reads the content of a file that :func:`dampr.save` wrote, and checks that it is complete, unchanged since it was
written and of the right form.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .unit_compact import sizes_of

FORMAT = 1
KEY = "dampr"


class FileError(RuntimeError):
    """A file is damaged, of another kind than expected, or does not fit the model."""


@dataclass(frozen=True)
class Content:
    """The content of a file, of the right form. Whether it fits a model is checked by :func:`fit`.

    Attributes:
        where: the file, for error messages.
        state: name -> tensor.
        widths: name of a layer -> its sizes by attribute, such as ``{"in_features": 20}``.
        architecture: the whole model as data, if it can be built from that alone; else None.
        leftovers: name -> description of each ``dampr.nn`` layer that compaction put into the model.
        compaction: the manifest of compaction, or None.
    """

    where: str
    state: dict[str, Tensor]
    widths: dict[str, dict[str, int]]
    architecture: dict[str, Any] | None
    leftovers: dict[str, Any]
    compaction: dict[str, Any] | None


def read(path: str | os.PathLike[str]) -> Content:
    """The content of a file, after all checks of its form.

    safetensors opens the file twice by its name, for the header and for the tensors. If another file took its place in
    between, the new one is read instead.
    """
    where = f"path={os.fspath(path)!r}"
    while True:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{where}: expected a file written by dampr.save")
        found = _identity(path)
        try:
            content = _read_once(path, where)
        except FileError:
            if _identity(path) == found:
                raise
            continue
        if _identity(path) == found:
            return content


def _identity(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Device, inode and time of change of a file, by which a replaced file is noticed."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns


def _read_once(path: str | os.PathLike[str], where: str) -> Content:
    """Read and check the file. Raises FileError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise FileError(f"{where}: not a whole safetensors file ({error})") from error
    try:
        manifest = json.loads(metadata[KEY])
        sha256 = digest(manifest, state) if isinstance(manifest, dict) else None
    except (KeyError, ValueError, RecursionError) as error:
        raise FileError(f"{where}: no dampr manifest in its header; expected a file written by dampr.save") from error
    if sha256 is None or manifest.get("format") != FORMAT:
        found = manifest.get("format") if sha256 else manifest
        raise FileError(f"{where}: format {found!r}, expected {FORMAT}; a newer dampr may have written it")
    if manifest.get("sha256") != sha256:
        raise FileError(
            f"{where}: tensors and manifest do not match the recorded SHA-256; the file was changed after it was "
            "written"
        )
    widths, architecture, compaction = (manifest.get(key) for key in ("widths", "architecture", "compaction"))
    if not isinstance(widths, dict) or not all(
        isinstance(w, dict) and all(map(is_size, w.values())) for w in widths.values()
    ):
        raise FileError(f"{where}: manifest: widths has to map names of layers to their sizes")
    for key, value in (("architecture", architecture), ("compaction", compaction)):
        if key not in manifest or not isinstance(value, dict | None):
            raise FileError(f"{where}: manifest: {key} has to be an object or null")
    left = manifest.get("leftovers", {})  # older files have none
    if not isinstance(left, dict):
        raise FileError(f"{where}: manifest: leftovers has to map names of layers to what they are")
    try:
        sizes_of(compaction)
    except ValueError as error:
        raise FileError(f"{where}: {error}") from error
    return Content(where, state, widths, architecture, left, compaction)


def is_size(value: Any) -> bool:
    """Whether ``value`` is an int that a dimension can have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def digest(manifest: dict[str, Any], state: dict[str, Tensor]) -> str:
    """The SHA-256 over the manifest without its own digest, and the names, dtypes, shapes and values of all tensors."""
    # Through JSON and back, because keys that are not strings become strings in the file.
    rest = json.loads(json.dumps({key: value for key, value in manifest.items() if key != "sha256"}))
    total = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"\n{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
