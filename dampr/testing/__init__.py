"""How kernels are tested: tolerance rules for anybody's kernels (here), and ``dampr verify`` and the reading of machine
code.

:mod:`dampr.testing.tolerances` states the rules.
"""

from .tolerances import (
    HARD_SHAPES,
    RMS_BOUND,
    TILED_SHAPES,
    Comparison,
    as_tf32,
    assert_close,
    compare,
    layouts,
    poisoned_empty,
)

__all__ = [
    "HARD_SHAPES",
    "RMS_BOUND",
    "TILED_SHAPES",
    "Comparison",
    "as_tf32",
    "assert_close",
    "compare",
    "layouts",
    "poisoned_empty",
]
