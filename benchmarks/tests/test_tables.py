"""Every table of the documentation is the one that its results files give."""

from __future__ import annotations

import pytest

from benchmarks import tables

PLACES = [
    (document, match[2], match[0])
    for document in tables.DOCUMENTS
    for match in tables.PLACE.finditer(document.read_text())
]


@pytest.mark.parametrize(("document", "name", "text"), PLACES, ids=[name for _, name, _ in PLACES])
def test_a_table_is_that_of_its_results(document, name, text) -> None:
    assert tables.render(name, document) in text, "run python -m benchmarks.tables"
