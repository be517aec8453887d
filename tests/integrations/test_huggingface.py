"""transformers' models with random weights: pruned, written, read again, and trained by its Trainer to a budget."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dampr
from dampr.nn import GatedHeads, GatedLinear
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs, count_params
from tests.prune.test_models import close_at_random

transformers = pytest.importorskip("transformers")

from transformers.pytorch_utils import Conv1D  # noqa: E402

from dampr.integrations import huggingface  # noqa: E402
from tests.limits import HANG  # noqa: E402

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

ROOT = Path(__file__).parent.parent.parent
words = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MASK = torch.ones_like(words)
MASK[0, 4:] = 0


def bert(**how: Any) -> Any:
    config = transformers.BertConfig(**SIZES, **TEXT, **how)
    return transformers.BertForSequenceClassification(config), {"input_ids": words, "attention_mask": MASK}


def roberta(**how: Any) -> Any:
    config = transformers.RobertaConfig(**SIZES, **TEXT, **how)
    return transformers.RobertaForSequenceClassification(config), {"input_ids": words, "attention_mask": MASK}


def gpt2(**how: Any) -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, n_inner=48, **(TEXT | how))
    return transformers.GPT2LMHeadModel(config), {"input_ids": words, "use_cache": False}


def llama(**how: Any) -> Any:
    config = transformers.LlamaConfig(**SIZES, **TEXT, **({"num_key_value_heads": 2} | how))
    return transformers.LlamaForCausalLM(config), {"input_ids": words, "use_cache": False}


def vit(**how: Any) -> Any:
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=8, **how)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


MODELS = {
    "bert": bert,
    "gpt2": gpt2,
    "gpt2, cache": lambda: (gpt2()[0], {"input_ids": words}),
    "gpt2, cross-attention": lambda: (
        gpt2(add_cross_attention=True)[0],
        {"input_ids": words, "encoder_hidden_states": torch.randn(3, 4, 32), "use_cache": False},
    ),
    "llama": llama,
    "llama, biases": lambda: llama(num_key_value_heads=1, attention_bias=True, mlp_bias=True, head_dim=10),
    "llama, eager": lambda: llama(attn_implementation="eager", num_key_value_heads=4),
    "roberta": roberta,
    "vit": vit,
}
every_model = pytest.mark.parametrize("name", MODELS)
three_models = pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])


def built(name: str, seed: int = 0) -> tuple[Any, Any]:
    """A model whose biases and gains are not those of a fresh one."""
    torch.manual_seed(seed)
    model, x = MODELS[name]()
    for p in model.parameters():
        if p.dim() == 1:
            p.data.add_(0.3 * torch.randn_like(p))
    return model.eval(), x


def logits(model: nn.Module, x: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**x).logits


def pruned(name: str, seed: int = 0, **how: Any) -> tuple[Any, Any, Any]:
    """The gated model, with random gates closed, its inputs, and what is left of it."""
    model, x = built(name, seed)
    huggingface.convert(model, example_inputs=x)
    close_at_random(model)
    return model, x, huggingface.compact(model, example_inputs=x, **how)


@every_model
def test_a_converted_model_computes_the_same_and_every_gate_does_something(name: str) -> None:
    model, x = built(name)
    before = logits(model, x)
    assert huggingface.convert(model, example_inputs=x) is model
    assert torch.equal(logits(model, x), before)
    gated = dampr.prune.gated_layers(model)
    layers = model.config.num_hidden_layers
    attentions = layers * (1 + getattr(model.config, "add_cross_attention", False))
    assert sum(type(layer) is GatedHeads for layer in gated.values()) == attentions
    assert (
        sum(
            type(layer) is GatedLinear
            for name, layer in gated.items()
            if "pooler" not in name and "classifier" not in name
        )
        == layers
    )
    assert dampr.verify_model(model, x).ok


@every_model
@pytest.mark.parametrize("seed", range(2))
def test_masked_equals_compacted_at_the_size_foretold(name: str, seed: int) -> None:
    model, x = built(name, seed)
    huggingface.convert(model, example_inputs=x)
    costs = {metric: Cost(model, x, metric) for metric in ("macs", "params")}
    close_at_random(model)
    small = huggingface.compact(model, example_inputs=x)
    assert type(small) is type(model)
    masked, compacted = logits(model, x), logits(small, x)
    assert float((masked - compacted).norm() / masked.norm()) <= 1e-5
    foretold = {metric: int(cost(cost.decision())) for metric, cost in costs.items()}
    assert foretold == {"macs": count_macs(small, x), "params": count_params(small)}, small.dampr_manifest[
        "closed_but_kept"
    ]
    assert foretold["macs"] < costs["macs"].total
    assert small.dampr_manifest["closed_but_kept"] == {}


@every_model
def test_a_folder_gives_the_model_back(name: str, tmp_path: Any) -> None:
    _, x, small = pruned(name)
    huggingface.save_pretrained(small, tmp_path)
    again = huggingface.from_pretrained(tmp_path)
    assert type(again) is type(small)
    assert not again.training
    # eager attention is not in the config
    torch.testing.assert_close(logits(again, x), logits(small, x), atol=1e-6, rtol=1e-6)
    assert json.loads((tmp_path / "config.json").read_text())["dampr"] == small.config.dampr
    assert not list(tmp_path.glob("*.bin"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(small).from_pretrained(tmp_path)


def test_a_model_that_came_back_generates_is_saved_by_transformers_and_pruned_further(tmp_path: Any) -> None:
    _, x, small = pruned("llama")
    small.save_pretrained(tmp_path / "first")
    again = huggingface.from_pretrained(tmp_path / "first", dtype=torch.float64)
    assert again.dtype == torch.float64
    long = again.generate(words[:1], max_new_tokens=4, do_sample=False)
    cached = again.generate(words[:1], max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(long, cached)
    again = huggingface.from_pretrained(tmp_path / "first")
    huggingface.convert(again, example_inputs=x)
    close_at_random(again)
    smaller = huggingface.compact(again, example_inputs=x)
    assert count_params(smaller) < count_params(small)
    huggingface.save_pretrained(smaller, tmp_path / "second")
    assert torch.equal(logits(huggingface.from_pretrained(tmp_path / "second"), x), logits(smaller, x))


def test_a_bias_that_compaction_added_is_in_the_config(tmp_path: Any) -> None:
    """sigmoid(0) = 1/2: closed neurons leave a constant, and the layer that reads them has no bias for it."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=50, feed_forward_proj="sigmoid", **sizes)
    )
    x = {"input_ids": words, "decoder_input_ids": words[:, :3], "use_cache": False}
    huggingface.convert(model, example_inputs=x)
    close_at_random(model)
    small = huggingface.compact(model, example_inputs=x)
    assert small.config.dampr["biases"] == [
        f"{side}.block.0.layer.{i}.DenseReluDense.wo" for side, i in (("encoder", 1), ("decoder", 2))
    ]
    huggingface.save_pretrained(small, tmp_path)
    torch.testing.assert_close(logits(huggingface.from_pretrained(tmp_path), x), logits(model, x), atol=1e-5, rtol=1e-5)
    large = huggingface.expand(small)
    assert large.config.dampr == {"format": 1, "heads": {}, "linear": {}, "biases": small.config.dampr["biases"]}
    huggingface.save_pretrained(large, tmp_path)
    torch.testing.assert_close(logits(huggingface.from_pretrained(tmp_path), x), logits(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("round_to", [1, 8])
def test_a_uniform_model_is_loaded_by_transformers_alone(name: str, round_to: int, tmp_path: Any) -> None:
    model, x, small = pruned(name, uniform=True, round_to=round_to)
    huggingface.save_pretrained(small, tmp_path)
    assert not hasattr(small.config, "dampr")
    for load in (type(small).from_pretrained, huggingface.from_pretrained):
        torch.testing.assert_close(logits(load(tmp_path), x), logits(model, x), atol=1e-5, rtol=1e-5)
    neurons = small.config.n_inner if name == "gpt2" else small.config.intermediate_size
    assert neurons < 48
    assert neurons % round_to == 0
    open_heads = [
        len(layer.open_heads()) for layer in dampr.prune.gated_layers(model).values() if isinstance(layer, GatedHeads)
    ]
    if name in ("llama", "vit"):
        assert small.config.num_attention_heads == max(open_heads) * (2 if name == "llama" else 1)
    else:
        assert small.config.num_attention_heads == 4
        assert min(open_heads) < 4
        assert any(
            "BertConfig has no entry for this width" in note
            for note in small.dampr_manifest["closed_but_kept"].values()
        ) == (name == "bert")


@pytest.mark.parametrize("name", ["bert", "gpt2", "roberta"])
def test_fewer_heads_that_a_config_cannot_say_are_for_our_own_loader(name: str, tmp_path: Any) -> None:
    """Heads are hidden_size / num_attention_heads wide in these models: three of four would be other heads, or none."""
    model, x = built(name)
    huggingface.convert(model, example_inputs=x, neurons=False)
    for i, layer in enumerate(dampr.prune.gated_layers(model).values()):
        layer.gate.log_alpha.data[i] = -9.0
    uniform = huggingface.compact(model, example_inputs=x, uniform=True)
    kind = type(model.config)
    note = (
        f"1 closed gates stay: {kind.__name__} has no width of a head but hidden_size / num_attention_heads, so none "
        "for fewer heads"
    )
    notes = uniform.dampr_manifest["closed_but_kept"]
    assert notes.keys() == dampr.prune.gated_layers(model).keys()
    assert all(found.startswith(note) for found in notes.values())
    assert count_params(uniform) == count_params(model)
    said = model.config.to_dict() | {"head_dim": 6, "attention_head_size": 6}
    assert count_params(type(model)(kind(**said))) == count_params(model), "transformers reads the width of a head now"
    with pytest.raises(ValueError, match=r"multiple|divisible"):
        type(model)(kind(**said | {"num_attention_heads": 3}))
    small = huggingface.compact(model, example_inputs=x)
    assert set(small.config.dampr["heads"].values()) == {3}
    assert len(small.config.dampr["heads"]) == 2
    huggingface.save_pretrained(small, tmp_path)
    again = huggingface.from_pretrained(tmp_path)
    assert count_params(again) == count_params(small) < count_params(model)
    torch.testing.assert_close(logits(again, x), logits(model, x), atol=1e-5, rtol=1e-5)


def test_a_budget_of_neurons_alone_leaves_bert_no_zeros(tmp_path: Any) -> None:
    model, x = built("bert")
    huggingface.convert(model, example_inputs=x, heads=False, exclude="*.pooler.*")
    report = dampr.Budget(model, x, macs=0.8).finalize(same=["*.intermediate.dense"])
    small = huggingface.compact(model, example_inputs=x, uniform=True)
    assert small.dampr_manifest["closed_but_kept"] == {}
    assert small.config.intermediate_size < 48
    assert count_macs(small, x) == report.reached <= report.target
    huggingface.save_pretrained(small, tmp_path)
    torch.testing.assert_close(logits(type(small).from_pretrained(tmp_path), x), logits(model, x), atol=1e-5, rtol=1e-5)


@three_models
def test_a_budget_is_met(name: str) -> None:
    model, x = built(name)
    huggingface.convert(model, example_inputs=x)
    report = dampr.Budget(model, x, macs=0.7).finalize()
    assert count_macs(huggingface.compact(model, example_inputs=x), x) == report.reached <= report.target


def test_a_budget_of_equal_widths_needs_no_zeros(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = llama(num_key_value_heads=4)
    huggingface.convert(model, example_inputs=x)
    for layer in dampr.prune.gated_layers(model).values():
        layer.gate.log_alpha.data.uniform_(-1, 3)
    report = dampr.Budget(model, x, macs=0.7).finalize(same=["*.o_proj", "*.up_proj"])
    small = huggingface.compact(model, example_inputs=x, uniform=True)
    assert small.dampr_manifest["closed_but_kept"] == {}
    assert count_macs(small, x) == report.reached <= report.target
    huggingface.save_pretrained(small, tmp_path)
    torch.testing.assert_close(logits(type(small).from_pretrained(tmp_path), x), logits(model, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_dampr_save_and_load_know_them_too(name: str, tmp_path: Any) -> None:
    _, x, small = pruned(name)
    dampr.save(small, tmp_path / "small.safetensors")
    again = dampr.load(tmp_path / "small.safetensors", built(name)[0])
    torch.testing.assert_close(logits(again, x), logits(small, x))


@every_model
def test_an_expanded_model_has_its_old_widths_and_zeros(name: str, tmp_path: Any) -> None:
    model, x, small = pruned(name)
    large = dampr.expand(small)
    assert str(large) == str(built(name)[0])
    assert {k: v.shape for k, v in large.state_dict().items()} == {
        k: v.shape for k, v in built(name)[0].state_dict().items()
    }
    masked, expanded = logits(model, x), logits(large, x)
    assert float((masked - expanded).norm() / masked.norm()) <= 1e-5
    dampr.save(small, tmp_path / "small.safetensors")
    again = dampr.expand(dampr.load(tmp_path / "small.safetensors", built(name)[0]))
    assert all(torch.equal(v, large.state_dict()[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "gpt2, cross-attention"])
def test_what_is_left_of_conv1d_comes_back_where_it_was(name: str) -> None:
    model, x = built(name)
    dense = {k: v.clone() for k, v in model.state_dict().items()}
    huggingface.convert(model, example_inputs=x)
    for i, layer in enumerate(dampr.prune.gated_layers(model).values()):
        layer.gate.log_alpha.data[:] = 9.0
        layer.gate.log_alpha.data[i % 3 :: 3] = -9.0
    small = huggingface.compact(model, example_inputs=x)
    large = dampr.expand(small)
    layers = {k: layer for k, layer in large.named_modules() if isinstance(layer, Conv1D)}
    cut = {k: entry for k, entry in small.dampr_manifest["layers"].items() if k in layers}
    assert len(cut) == len(layers) == sum(isinstance(m, Conv1D) for m in model.__class__(model.config).modules())
    for k, entry in cut.items():
        read, written = (torch.zeros(size, dtype=torch.bool) for size in dense[f"{k}.weight"].shape)
        for side, there in (("in", read), ("out", written)):
            there[entry[side]["kept"] if side in entry else slice(None)] = True
        assert 0 < int(read.sum()) * int(written.sum()) < read.numel() * written.numel()
        assert torch.equal(layers[k].weight, dense[f"{k}.weight"] * read[:, None] * written)
        assert torch.equal(layers[k].bias, dense[f"{k}.bias"] * written)
        assert (layers[k].nx, layers[k].nf) == layers[k].weight.shape


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_transformers_alone_loads_an_expanded_model(name: str, uniform: bool, tmp_path: Any) -> None:
    _, x, small = pruned(name, uniform=uniform)
    large = huggingface.expand(small)
    assert hasattr(small.config, "dampr") != uniform
    huggingface.save_pretrained(large, tmp_path)
    again = type(small).from_pretrained(tmp_path)
    assert not hasattr(again.config, "dampr")
    assert again.config.num_attention_heads == 4
    assert str(again) == str(built(name)[0])
    torch.testing.assert_close(logits(again, x), logits(small, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("how", "kind"), [({"heads": False}, GatedLinear), ({"neurons": False}, GatedHeads)])
@three_models
def test_heads_or_neurons_alone(name: str, how: Any, kind: type) -> None:
    model, x = built(name)
    huggingface.convert(model, example_inputs=x, **how)
    assert {type(layer) for layer in dampr.prune.gated_layers(model).values()} == {kind}
    close_at_random(model)
    huggingface.compact(model, example_inputs=x)


def test_gpt2_keeps_its_parameters_and_gets_its_layers_back() -> None:
    model, x = built("gpt2")
    before = [id(p) for p in model.parameters()]
    huggingface.convert(model, example_inputs=x)
    gates = {id(p) for layer in dampr.prune.gated_layers(model).values() for p in layer.gate.parameters()}
    assert [id(p) for p in model.parameters() if id(p) not in gates] == before
    assert not any(isinstance(m, Conv1D) for m in model.modules())
    small = huggingface.compact(model, example_inputs=x)
    assert sum(isinstance(m, Conv1D) for m in small.modules()) == 8
    assert small.lm_head.weight is small.transformer.wte.weight


def test_a_failed_conversion_leaves_the_model_as_it_was() -> None:
    model, x = built("gpt2")
    before, state = str(model), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(dampr.ConversionError, match="no layer of GPT2LMHeadModel is left"):
        huggingface.convert(model, example_inputs=x, exclude="*")
    assert str(model) == before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_an_attention_that_is_not_known_is_left_alone_and_named() -> None:
    torch.manual_seed(0)
    model = transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=50, dim=32, n_layers=1, n_heads=4, hidden_dim=48, max_position_embeddings=32
        )
    )
    x = {"input_ids": words}
    huggingface.convert(model, example_inputs=x)
    assert all("attention" not in name for name in dampr.prune.gated_layers(model))
    assert "whose heads dampr does not know" in model.dampr_skipped["distilbert.transformer.layer.0.attention.q_lin"]
    close_at_random(model)
    assert huggingface.compact(model, example_inputs=x).config.dampr["heads"] == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "expected widths in format 1"),
        ({"heads": [1]}, "heads has to map"),
        ({"heads": {"model.layers.0.self_attn": 9}}, "expected an attention of LlamaForCausalLM with so many"),
        ({"heads": {"model.layers.7.self_attn": 1}}, "expected an attention of LlamaForCausalLM with so many"),
        ({"linear": {"model.layers.0.mlp.up_proj": [32, 0]}}, "linear has to map"),
        ({"linear": {"model.layers.0.mlp.up_proj": [32, 49]}}, "expected at most"),
        ({"linear": {"model.layers.0.mlp.up_proj": [32, 7]}}, "do not fit LlamaForCausalLM with the widths"),
        ({"linear": {"model.embed_tokens": [32, 7]}}, "expected a linear layer of LlamaForCausalLM"),
        ({"biases": ["lm_head"]}, "do not fit LlamaForCausalLM with the widths"),
        ({"biases": ["model.norm"]}, "expected a linear layer of LlamaForCausalLM that has none"),
        ({"biases": {}}, "biases has to be a list"),
    ],
)
def test_widths_that_were_changed_are_refused(change: Any, message: str, tmp_path: Any) -> None:
    _, _, small = pruned("llama")
    huggingface.save_pretrained(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["dampr"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(dampr.FileError, match=message):
        huggingface.from_pretrained(tmp_path)


def test_weights_that_are_cut_off_or_missing_are_refused(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    _, _, small = pruned("bert")
    huggingface.save_pretrained(small, tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["classifier.bias"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(dampr.FileError, match="missing_keys.*classifier.bias"):
        huggingface.from_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(Exception, match="(?i)incomplete|invalid|header"):
        huggingface.from_pretrained(tmp_path)


def test_errors_name_the_argument(tmp_path: Any) -> None:
    model, x = built("bert")
    with pytest.raises(TypeError, match="expected a transformers.PreTrainedModel"):
        huggingface.convert(nn.Linear(2, 2), example_inputs=x)
    with pytest.raises(ValueError, match="heads=False, neurons=False"):
        huggingface.convert(model, example_inputs=x, heads=False, neurons=False)
    huggingface.convert(model, example_inputs=x)
    with pytest.raises(TypeError, match="still has gates"):
        huggingface.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="round_to=8: expected uniform=True"):
        huggingface.compact(model, example_inputs=x, round_to=8)
    small = huggingface.compact(model, example_inputs=x)
    del small.config.dampr
    small.bert.pooler.dense = nn.Linear(32, 9)
    with pytest.raises(ValueError, match="config of BertForSequenceClassification: it says"):
        huggingface.save_pretrained(small, tmp_path)


def test_dampr_alone_finds_the_heads() -> None:
    model, x = built("bert")
    dampr.convert(model, example_inputs=x)
    close_at_random(model)
    small = dampr.compact(model, example_inputs=x)
    projection = model.bert.encoder.layer[0].attention.output.dense
    if len(projection.open_heads()) < 4:
        entry = small.dampr_manifest["layers"]["bert.encoder.layer.0.attention"]
        assert entry == {"heads": {"before": 4, "kept": projection.open_heads()}}
    torch.testing.assert_close(logits(dampr.expand(small), x), logits(model, x), atol=1e-5, rtol=1e-5)


def test_the_documented_example_runs_as_printed(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "huggingface.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert re.search(r"macs: [\d,]+ of [\d,]+ \((49|50)\.\d+%\)", done.stdout), done.stdout
    assert (tmp_path / "small" / "model.safetensors").exists()


def test_dampr_does_not_need_transformers() -> None:
    code = """
import sys, dampr
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
import dampr.integrations.huggingface
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG)
    assert (
        "ImportError: dampr.integrations.huggingface needs transformers: pip install dampr-torch[huggingface]"
        in done.stderr
    )


def test_dampr_alone_says_who_knows_gpt2() -> None:
    model, x = built("gpt2, cache")
    with pytest.raises(dampr.ConversionError, match="its Conv1D layers are known to dampr.integrations.huggingface"):
        dampr.convert(model, example_inputs=x, per_sample=True)
