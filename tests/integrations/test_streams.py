"""The residual width of transformers' models, whose attention is made of linear layers: cut exactly,
in models of the stock classes.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dampr
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs, count_params
from tests.residual import close, norms, width_of

transformers = pytest.importorskip("transformers")

from dampr.integrations import huggingface  # noqa: E402

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT: dict[str, Any] = {
    "vocab_size": 30,
    "max_position_embeddings": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
words = {"input_ids": torch.randint(30, (2, 6), generator=torch.Generator().manual_seed(0))}
image = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
MODELS: dict[str, Any] = {
    "bert": lambda: (transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **TEXT)), words),
    "vit": lambda: (
        transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)),
        image,
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", MODELS)
def test_masked_is_compacted_at_the_size_foretold_and_loads_into_the_original(
    name: str, seed: int, tmp_path: Any
) -> None:
    torch.manual_seed(seed)
    model, x = MODELS[name]()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    dense = copy.deepcopy(model.eval())
    before = model(**x).logits
    dampr.convert(model, example_inputs=x, residual=True)
    assert torch.equal(model(**x).logits, before)
    assert len(norms(model)) == 5
    assert len({norm.gate for norm in norms(model).values()}) == 1
    costs = {metric: Cost(model, x, metric) for metric in ("macs", "params")}
    small = dampr.compact(close(model, seed), example_inputs=x)
    assert type(small) is type(dense)
    assert width_of(small) == {int(next(iter(norms(model).values())).gate.is_open().sum())}
    assert {metric: int(cost(cost.decision())) for metric, cost in costs.items()} == {
        "macs": count_macs(small, x),
        "params": count_params(small),
    }
    dampr.save(small, tmp_path / "small.safetensors")
    loaded = dampr.load(tmp_path / "small.safetensors", dense)
    assert torch.equal(loaded(**x).logits, small.eval()(**x).logits)


def test_folders_do_not_know_the_residual_width_and_say_so() -> None:
    model, x = MODELS["bert"]()
    dampr.convert(model, example_inputs=x, residual=True)
    with pytest.raises(TypeError, match="expected that only linear layers and heads became smaller"):
        huggingface.compact(close(model), example_inputs=x)


def test_attention_that_is_not_made_of_known_layers_has_its_stream_cut_by_units() -> None:
    """GPT-2 has its weights in Conv1D, whose sizes are written down in it."""
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=4, n_positions=12, **TEXT)
    model, x = transformers.GPT2LMHeadModel(config), {**words, "use_cache": False}
    dampr.convert(model.eval(), example_inputs=x, residual=True)
    assert sum(isinstance(m, dampr.nn.OpenStatistics) for m in model.modules()) == 3
    gate = model.transformer.ln_f.open_statistics.gate
    gate.set_levels_(torch.where(torch.arange(16) < 6, -3.0, gate.levels()))
    small = dampr.compact(model, example_inputs=x)
    assert small.transformer.wte.weight.shape[1] == small.transformer.h[0].ln_1.weight.shape[0] == 10
    torch.testing.assert_close(small(**x).logits, model(**x).logits)
