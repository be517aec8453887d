"""A file and the model that it was written of."""

import pytest

import dampr
from tests.prune.files.examples import compacted, sequential


@pytest.fixture
def saved(tmp_path):
    small = compacted(sequential())
    dampr.save(small, tmp_path / "small.safetensors")
    return small, tmp_path / "small.safetensors"
