"""Models that are saved, and files that are changed by hand."""

import json
import struct

import torch
from torch import nn

import dampr
from dampr.prune.file_content import digest

X = torch.randn(9, 20, generator=torch.Generator().manual_seed(3))


def sequential():
    norm = nn.BatchNorm1d(30)
    return nn.Sequential(
        nn.Linear(20, 30), norm, nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(30, 4, bias=False), nn.Softmax(dim=1)
    )


def compacted(model, **convert):
    torch.manual_seed(1)
    dampr.convert(model, example_inputs=X, **convert)
    with torch.no_grad():
        for layer in dampr.prune.gated_layers(model).values():
            layer.gate.log_alpha[::3] = -5
    return dampr.compact(model, example_inputs=X).eval()


def rewrite(path, change):
    """Rewrite the JSON header of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def with_manifest(change):
    def apply(header):
        manifest = json.loads(header["__metadata__"]["dampr"])
        change(manifest)
        header["__metadata__"]["dampr"] = json.dumps(manifest)

    return apply


def forge(path, change):
    """Change the manifest as somebody would who knows how to recompute the digest."""
    from safetensors.torch import load_file

    def apply(manifest):
        change(manifest)
        manifest["sha256"] = digest(manifest, load_file(path))

    rewrite(path, with_manifest(apply))


def transformers():
    """Attention, transformer layers and stacks of torch.nn, with inputs."""
    x, memory, causal = torch.randn(2, 5, 8), torch.randn(2, 4, 8), nn.Transformer.generate_square_subsequent_mask(5)
    how = {"dim_feedforward": 12, "batch_first": True}
    other = {"dropout": 0.3, "layer_norm_eps": 1e-3, "norm_first": True, "bias": False}
    yield nn.MultiheadAttention(8, 4), (x, x, x)
    yield (
        nn.MultiheadAttention(8, 2, 0.1, bias=False, add_bias_kv=True, add_zero_attn=True, kdim=3, batch_first=True),
        (x, x[..., :3], x),
    )
    yield nn.TransformerEncoderLayer(8, 4, **how), (x, causal)
    yield nn.TransformerEncoderLayer(8, 4, activation="gelu", **how, **other), (x,)
    yield nn.TransformerEncoderLayer(8, 4, activation=nn.LeakyReLU(0.2), **how), (x,)
    yield nn.TransformerDecoderLayer(8, 4, 12), (x.transpose(0, 1), memory.transpose(0, 1))
    yield nn.TransformerDecoderLayer(8, 4, activation=nn.PReLU(), **how, **other), (x, memory, causal)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 4, **how), 2)
    yield encoder, (x, None, torch.arange(5) >= torch.tensor([[5], [3]]))
    first, second = nn.TransformerEncoderLayer(8, 4, **how), nn.TransformerEncoderLayer(8, 2, 7, batch_first=True)
    unlike = nn.TransformerEncoder(first, 2, nn.LayerNorm(8), enable_nested_tensor=False, mask_check=False)
    unlike.layers[1] = second
    yield unlike, (x,)
    yield nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 4, **how), 2, nn.RMSNorm(8)), (x, memory)
    yield nn.Transformer(8, 2, 1, 2, 12, activation="gelu", batch_first=True), (memory, x)
