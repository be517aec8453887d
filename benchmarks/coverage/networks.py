"""The networks that are measured: for each (library, name) a function that builds one with random weights, and
inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dampr.prune.modules import gates_of

from . import by_hand

Made = tuple[nn.Module, Any]

TIMM = """
resnet18 resnet26d seresnet18 skresnet18 resnext26ts wide_resnet50_2 densenet121 vgg11_bn mobilenetv1_100
mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small_050 mobilenetv4_hybrid_medium_075 efficientnet_b0
tinynet_e lcnet_050 mnasnet_050 rexnet_100 regnetx_002 ghostnet_050 hrnet_w18_small dla34 res2net50_26w_4s resnest14d
nf_resnet26 repvgg_a0 hgnetv2_b0 starnet_s050 convnext_atto poolformer_s12 vit_tiny_patch16_224 deit_tiny_patch16_224
cait_xxs24_224 beit_base_patch16_224 swin_tiny_patch4_window7_224 twins_svt_small pvt_v2_b0 xcit_nano_12_p16_224
volo_d1_224 mixer_s32_224 gmlp_ti16_224 mobilevit_xxs edgenext_xx_small
""".split()  # noqa: SIM905
_FIXED_SIZE = ("224", "vit", "pvt", "twins", "hybrid", "edgenext")  # need images of 224 x 224; others take 64 x 64

TORCHVISION = {
    "shufflenet_v2_x0_5": "models",
    "regnet_x_400mf": "models",
    "googlenet": "models",
    "inception_v3": "models",
    "deeplabv3_mobilenet_v3_large": "models.segmentation",
    "lraspp_mobilenet_v3_large": "models.segmentation",
}

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_DECODER = _SIZES | {"vocab_size": 99, "max_position_embeddings": 64}
_IMAGE = {"image_size": 32, "patch_size": 8, "num_channels": 3}
_SIDES = {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertModel", _DECODER),
    "roberta": ("RobertaConfig", "RobertaModel", _DECODER),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertModel",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99},
    ),
    "albert": ("AlbertConfig", "AlbertModel", _DECODER | {"embedding_size": 16}),
    "electra": ("ElectraConfig", "ElectraModel", _DECODER | {"embedding_size": 16}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64},
    ),
    "opt": ("OPTConfig", "OPTForCausalLM", _DECODER | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER | {"num_key_value_heads": 2}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _DECODER | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _DECODER | {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _DECODER | {"num_key_value_heads": 2, "head_dim": 8}),
    "t5": (
        "T5Config",
        "T5Model",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
    ),
    # Several sizes have equal values, such as inner width and buckets (32), which a tracer could confuse.
    "longt5": (
        "LongT5Config",
        "LongT5Model",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
    ),
    "bart": (
        "BartConfig",
        "BartModel",
        {
            "d_model": 32,
            "vocab_size": 99,
            "max_position_embeddings": 64,
            **_SIDES,
        },
    ),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": _DECODER, "vision_config": _SIZES | _IMAGE, "projection_dim": 16},
    ),
    "vit": ("ViTConfig", "ViTModel", _SIZES | _IMAGE),
    # This one draws which patches to leave out, in evaluation mode too.
    "vit_mae": (
        "ViTMAEConfig",
        "ViTMAEModel",
        _SIZES | _IMAGE,
    ),
    "swin": (
        "SwinConfig",
        "SwinModel",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    "segformer": (
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 32,
        },
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2Model",
        _SIZES
        | {
            "conv_dim": (32,) * 3,
            "conv_kernel": (10, 3, 3),
            "conv_stride": (5, 2, 2),
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperModel",
        {
            "d_model": 32,
            "vocab_size": 99,
            "num_mel_bins": 16,
            "max_source_positions": 30,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            **_SIDES,
        },
    ),
}

CI = tuple(("by hand", name) for name in by_hand.NETWORKS) + tuple(
    ("transformers", name) for name in ("gemma", "gpt2", "qwen3", "t5", "longt5", "vit_mae")
)
"""Networks that CI runs."""


def names() -> list[tuple[str, str]]:
    """Every network, (library, name)."""
    found = (
        [("timm", name) for name in TIMM] + [("torchvision", name) for name in TORCHVISION] + [("smp", "unet_resnet18")]
    )
    return found + [("transformers", name) for name in TRANSFORMERS] + [("by hand", name) for name in by_hand.NETWORKS]


def build(library: str, name: str) -> Made:
    """A fresh network in evaluation mode, and its inputs. Raises ImportError without the library."""
    torch.manual_seed(0)
    model, x = _BUILDERS[library](name)
    return model.eval(), x


def shaken(model: nn.Module) -> nn.Module:
    """``model`` with other constants: parameters whose elements are all equal, and batch norm statistics, are drawn
    anew.

    Fresh networks have norms with weight 1 and bias 0, and zero gains on residual branches, which training would
    change, and which could hide errors. Changes ``model`` in place, except for its gates.
    """
    generator = torch.Generator().manual_seed(3)
    gates = {id(p) for gate in gates_of(model) for p in gate.parameters()}
    with torch.no_grad():
        for p in model.parameters():
            if id(p) not in gates and p.is_floating_point() and p.numel() and bool((p == p.flatten()[0]).all()):
                p.copy_(0.3 + 0.4 * torch.rand(p.shape, generator=generator))
        for module in model.modules():
            if (
                isinstance(module, nn.modules.batchnorm._NormBase)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                module.running_mean.copy_(0.2 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model


def _timm(name: str) -> Made:
    """A network of timm by its name, with random weights, and an input for it."""
    size = 224 if any(word in name for word in _FIXED_SIZE) else 64
    return importlib.import_module("timm").create_model(name), torch.randn(2, 3, size, size)


def _torchvision(name: str) -> Made:
    """A network of torchvision by its name, with random weights, and an input for it."""
    module = importlib.import_module(f"torchvision.{TORCHVISION[name]}")
    how: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        how |= {"init_weights": False, "aux_logits": True}
    if TORCHVISION[name] == "models.segmentation":
        how |= {"weights_backbone": None, "num_classes": 5}
    size = 299 if name == "inception_v3" else 64  # its auxiliary head, which training alone reaches, wants that
    return getattr(module, name)(**how), torch.randn(2, 3, size, size)


def _smp(name: str) -> Made:
    """A U-Net of segmentation_models_pytorch with random weights, whatever ``name`` is, and an input for it."""
    library = importlib.import_module("segmentation_models_pytorch")
    return library.Unet("resnet18", encoder_weights=None, classes=3), torch.randn(2, 3, 64, 64)


def _transformers(name: str) -> Made:
    library = importlib.import_module("transformers")
    config, kind, sizes = TRANSFORMERS[name]
    made = getattr(library, config)(**sizes)
    made._attn_implementation = "eager"
    model = getattr(library, kind)(made)
    words = {"input_ids": torch.randint(3, 99, (2, 9))}
    image = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name in ("vit", "vit_mae", "swin"):
        return model, image
    if name == "segformer":
        return model, {"pixel_values": torch.randn(2, 3, 64, 64)}
    if name == "clip":
        return model, words | image | {"return_loss": False}
    if name == "wav2vec2":
        return model, {"input_values": torch.randn(2, 800)}
    if name == "whisper":
        return model, {
            "input_features": torch.randn(2, 16, 60),
            "decoder_input_ids": words["input_ids"],
            "use_cache": False,
        }
    if name in ("t5", "longt5", "bart"):
        return model, words | {"decoder_input_ids": words["input_ids"], "use_cache": False}
    return model, words | (
        {} if name in ("bert", "roberta", "distilbert", "albert", "electra") else {"use_cache": False}
    )


def _by_hand(name: str) -> Made:
    made: Callable[[], Made] = by_hand.NETWORKS[name]
    return made()


_BUILDERS: dict[str, Callable[[str], Made]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "smp": _smp,
    "transformers": _transformers,
    "by hand": _by_hand,
}
