"""Pickles of whole models name classes by the modules in which they once were."""

from __future__ import annotations

import pickle

import pytest

from dampr import nn as dampr_nn

FORMER = {
    "gate": ("Gate", "GatedEmbedding", "GatedResidual", "Residual", "Scale"),
    "norm": ("GatedBatchNorm1d", "GatedBatchNorm2d", "GatedBatchNorm3d", "GatedLayerNorm", "TakenReLU"),
    "pruned_attention": ("PrunedMultiheadAttention",),
    "pruned_transformer": ("PrunedTransformerDecoderLayer", "PrunedTransformerEncoderLayer"),
    "rnn": ("ScaledRNN",),
    "stacked_rnn": ("StackedRNN",),
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in FORMER.items() for name in names])
def test_a_class_is_found_where_older_pickles_have_it(module: str, name: str) -> None:
    assert pickle.loads(f"cdampr.nn.{module}\n{name}\n.".encode()) is getattr(dampr_nn, name)


def test_the_place_of_a_removed_sublayer_is_found_under_both_of_its_names() -> None:
    found = [pickle.loads(f"cdampr.nn.pruned_transformer\n{name}\n.".encode()) for name in ("RemovedPart", "_Removed")]
    assert found == [dampr_nn.pruned.transformer.RemovedPart] * 2


def test_classes_are_found_under_their_former_names() -> None:
    assert dampr_nn.Gate is dampr_nn.GatedActivation
    assert dampr_nn.TakenReLU is dampr_nn.AbsorbedReLU
