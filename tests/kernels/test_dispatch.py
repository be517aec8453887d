"""The tables of thresholds: they load, a device finds its own, and a malformed one names what is wrong with it."""

import json

import pytest

from dampr.kernels import dispatch

TABLE = {"source": "a test", "one_pass_gates": 7, "small_m": 3, "skip_dead": True}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of tables; nothing that was read from it is remembered."""
    monkeypatch.setattr(dispatch, "FOLDER", tmp_path)
    dispatch.thresholds.cache_clear()
    yield tmp_path
    dispatch.thresholds.cache_clear()


@pytest.mark.parametrize("path", sorted(dispatch.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_table_that_ships_is_well_formed_and_found_by_its_name(path):
    assert dispatch.thresholds(path.stem) == dispatch.read(path)


def test_an_unknown_device_gets_the_default_table():
    assert (
        dispatch.thresholds("NVIDIA Abacus 1")
        == dispatch.thresholds()
        == dispatch.read(dispatch.FOLDER / "default.json")
    )


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb")],
)
def test_a_table_is_named_after_the_device(device, name):
    assert dispatch.table_name(device) == name


def test_the_longest_name_that_has_a_table_wins(folder):
    for small_m, name in enumerate(("default", "h100", "h100-80gb")):
        (folder / f"{name}.json").write_text(json.dumps({**TABLE, "small_m": small_m}))
    found = [dispatch.thresholds(name).small_m for name in ("NVIDIA H10", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3")]
    assert found == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"default\.json: Expecting property name.*: expected a JSON object with the keys \('source', "),
        ("[1]", r"default\.json: \[1\]: expected a JSON object"),
        ({"small_m": -1}, r"default\.json: small_m=-1: expected an integer >= 0"),
        ({"one_pass_gates": 1e6}, r"default\.json: one_pass_gates=1000000.0: expected an integer >= 0"),
        ({"small_m": True}, r"default\.json: small_m=True: expected an integer >= 0"),
        ({"skip_dead": "no"}, r"default\.json: skip_dead='no': expected true or false"),
        ({"source": ""}, r"default\.json: source='': expected a string that is not empty"),
        ({"smal_m": 3}, r"default\.json: smal_m is unknown: expected one of"),
    ],
)
def test_a_malformed_table_names_file_key_value_and_what_was_expected(folder, text, message):
    (folder / "default.json").write_text(text if isinstance(text, str) else json.dumps({**TABLE, **text}))
    with pytest.raises(ValueError, match=message):
        dispatch.thresholds()


@pytest.mark.parametrize("key", TABLE)
def test_a_key_that_is_missing_is_named(folder, key):
    (folder / "default.json").write_text(json.dumps({k: v for k, v in TABLE.items() if k != key}))
    with pytest.raises(ValueError, match=rf"default\.json: {key} is missing: expected "):
        dispatch.thresholds()
