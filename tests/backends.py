"""The backends that run here, for tests that are parametrized by them."""

from __future__ import annotations

import pytest

import dampr

_INFO = dampr.backend_info()
ON_CPU = [name for name in ("reference", "cpp") if not _INFO[name].startswith("missing")]
needs_cpp = pytest.mark.skipif("cpp" not in ON_CPU, reason=_INFO["cpp"])
