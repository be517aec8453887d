"""pytest with a module hidden: ``python -m tests.without triton -m "not slow"``, as if it were not installed."""

from __future__ import annotations

import sys
from typing import Any


class Hidden:
    """Makes the import of a module, and of all in it, fail as that of one that is not there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == self.name or name.startswith(f"{self.name}."):
            raise ModuleNotFoundError(f"No module named {name!r} (hidden)", name=name)


def main() -> int:
    hidden, *arguments = sys.argv[1:]
    sys.meta_path.insert(0, Hidden(hidden))  # type: ignore[arg-type]
    import pytest

    import dampr

    backend = {"dampr._C": "cpp", "triton": "triton"}[hidden]
    assert dampr.backend_info()[backend].startswith("missing"), dampr.backend_info()
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
