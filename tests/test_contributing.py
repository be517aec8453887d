"""The recipes of CONTRIBUTING.md name every file that their example is in, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {  # what stands in each file of a recipe, as a pattern
    "A gate family inside the kernels": (
        r"MASK|kMask|kExactZero|EXACT_ZERO|\bmask\b|[Dd]ifferentiable_?[Mm]ask|diffmask"
    ),
    "A layer": r"GatedLayerNorm",
    "A kind of network that can be pruned": r"pack_padded_sequence",
    "An operator": r"weight_gated_linear",
    "A CPU kernel": r"[Gg]enerator_?[Ff]orward|generator_fwd|dependency_generator",
    "A tile of a Triton kernel": r"CONV_TILES|conv_tile|gated_conv2d",
}


def recipes() -> dict[str, list[str]]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    parts = re.split(
        r"^### (.+)$", text[text.index("## How to add") : text.index("## How to run what")], flags=re.MULTILINE
    )
    lists = {
        title: re.findall(r"^- (.+?): ", body, re.MULTILINE)
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {title: re.findall(r"`([^`]+/[^`]+)`", " ".join(entries)) for title, entries in lists.items()}


def test_there_are_six_recipes_and_one_for_families_is_short() -> None:
    assert recipes().keys() == EXAMPLES.keys()
    assert len(recipes()["A gate family inside the kernels"]) <= 8


@pytest.mark.parametrize("title", EXAMPLES)
def test_the_example_of_a_recipe_is_in_each_of_its_files(title: str) -> None:
    files = recipes()[title]
    assert len(files) >= 2
    for name in files:
        assert re.search(EXAMPLES[title], (ROOT / name).read_text()), name


def test_no_source_file_that_a_family_is_in_is_missing_from_its_recipe() -> None:
    """Files that loop over all families name none of them."""
    found = {
        str(path.relative_to(ROOT))
        for folder in (
            "dampr/kernels",
            "dampr/ops",
            "dampr/functional",
            "dampr/nn",
            "dampr/reference",
            "dampr/gates",
            "csrc",
        )
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp") and re.search(r"\bMASK\b|\bkMask\b", path.read_text())
    }
    assert found <= set(recipes()["A gate family inside the kernels"]) | {"csrc/arguments.h"}
