"""Networks made of what no gated layer stands for, and functions that convert them and close some of their gates."""

import torch
import torch.nn.functional as F
from torch import nn

import dampr
from dampr.prune import gated_layers

IMAGE = torch.randn(2, 3, 16, 16)
WORDS = torch.randn(2, 9, 12)


def conv(read, written, **how):
    return nn.Sequential(nn.Conv2d(read, written, 3, padding=1, bias=False, **how), nn.BatchNorm2d(written), nn.ReLU())


class Norm(nn.BatchNorm2d):
    """A norm of a class of its own, with the activation in it."""

    def forward(self, x):
        return super().forward(x).relu()


class Custom(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x):
        return F.conv2d(x * 0.5, self.weight * 2, self.bias, padding=1)


class Dense(nn.Module):
    """Each layer reads all before it, as DenseNets do."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 1)) for i in range(3)
        )
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.deep = conv(3, 8), nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.GroupNorm(4, 12), nn.SiLU())
        self.up = nn.ConvTranspose2d(12, 8, 2, 2)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        a = self.down(x)
        return self.out(torch.cat([a, self.up(self.deep(a))], 1))


class Attention(nn.Module):
    """Query, key and value in one matrix, and a count of heads that no layer has."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(F.gelu(self.up(x)))


class Bare(nn.Module):
    """Products with parameters that no module holds."""

    def __init__(self):
        super().__init__()
        self.first, self.gain = nn.Parameter(torch.randn(12, 16) * 0.3), nn.Parameter(torch.rand(16) + 0.5)
        self.second, self.head = nn.Parameter(torch.randn(10, 16) * 0.3), nn.Linear(10, 4)

    def forward(self, x):
        h = torch.sigmoid(x @ self.first) * self.gain
        return self.head(F.relu(torch.einsum("bli,oi->blo", h, self.second)))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(12, 16))
        self.second, self.head = nn.Linear(16, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).tanh())


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.up, self.head = nn.ConvTranspose3d(8, 6, 2, 2), nn.Conv3d(6, 2, 1)

    def forward(self, x):
        return self.head(self.up(self.norm(self.first(x)).relu()).relu())


class Experts(nn.Module):
    """Each row goes to one of two experts."""

    def __init__(self):
        super().__init__()
        self.stem, self.route = nn.Linear(12, 10), nn.Linear(10, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(10, 14), nn.ReLU(), nn.Linear(14, 10)) for _ in range(2))
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        best = self.route(x).argmax(-1)
        y = torch.stack([expert(x) for expert in self.experts], -1)
        return self.head(x + y.gather(-1, best[..., None, None].expand(*x.shape, 1)).squeeze(-1))


def own_norms():
    return nn.Sequential(nn.Conv2d(3, 8, 3), Norm(8), nn.Conv2d(8, 6, 3), Norm(6), nn.Conv2d(6, 2, 1))


def own_layers():
    return nn.Sequential(Custom(3, 8, 3), nn.ReLU(), Custom(8, 6, 3), nn.ReLU(), Custom(6, 2, 3))


def grouped():
    return nn.Sequential(conv(3, 12), conv(12, 12, groups=3), conv(12, 8), nn.Conv2d(8, 2, 1))


class Shuffle(nn.Module):
    """A shuffle of channels as ShuffleNets write it."""

    def forward(self, x):
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """A unit of the first ShuffleNet, around which the stream goes on."""

    def __init__(self):
        super().__init__()
        self.first, self.depthwise, self.last = conv(12, 12, groups=2), conv(12, 12, groups=12), conv(12, 12, groups=2)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x):
        return x + self.last(self.depthwise(self.shuffle(self.first(x))))


def shuffled():
    return nn.Sequential(
        conv(3, 12), conv(12, 16, groups=2), Shuffle(), conv(16, 12, groups=2), conv(12, 8), nn.Conv2d(8, 2, 1)
    )


def shuffle_units():
    return nn.Sequential(conv(3, 12), ShuffleUnit(), ShuffleUnit(), nn.Conv2d(12, 2, 1))


def shuffled_up():
    up = [
        nn.ConvTranspose2d(12, 16, 2, 2, groups=2),
        nn.ReLU(),
        nn.ChannelShuffle(2),
        nn.ConvTranspose2d(16, 12, 3, groups=2),
        nn.ReLU(),
    ]
    return nn.Sequential(conv(3, 12), *up, nn.Conv2d(12, 2, 1))


class Gainless(nn.Module):
    """Norms over groups that have no gain, one of two widths side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(12, 8, 3, padding=1),
        )
        self.joined, self.norm, self.head = (
            nn.GroupNorm(6, 12, affine=False),
            nn.GroupNorm(8, 8, affine=False),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x):
        return self.head(self.norm(self.c(self.joined(torch.cat([self.a(x), self.b(x)], 1)).relu())).relu())


def gainless_of_instances():
    layers = [
        nn.ConvTranspose2d(3, 8, 3),
        nn.InstanceNorm2d(8),
        nn.SiLU(),
        nn.ConvTranspose2d(8, 12, 3),
        nn.BatchNorm2d(12, affine=False),
    ]
    return nn.Sequential(*layers, nn.ReLU(), nn.InstanceNorm2d(12, track_running_stats=True), nn.Conv2d(12, 2, 1))


def padded(*modes):
    layers = [
        [nn.Conv2d(8 if i else 3, 8, 3, padding=(1, 2), padding_mode=mode), nn.BatchNorm2d(8), nn.ReLU()]
        for i, mode in enumerate(modes)
    ]
    return nn.Sequential(*[layer for three in layers for layer in three], nn.Conv2d(8, 2, 1))


class Wrapped(nn.Module):
    """A border written by hand into memory that has no values yet."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.ConvTranspose2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.first(x).relu()
        wide = x.new_empty(*x.shape[:2], x.shape[2] + 2, x.shape[3])
        wide[:, :, 1:-1] = x
        wide[:, :, 0] = x[:, :, -1]
        wide[:, :, -1] = 0.5
        return self.head(self.second(wide).relu())


class Masked(nn.Conv2d):
    """A convolution whose weight a buffer masks, as those of autoregressive models."""

    def __init__(self, read, written):
        super().__init__(read, written, 3, padding=1)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[:, :, 1, 2:], self.mask[:, :, 2] = 0, 0

    def forward(self, x):
        return F.conv2d(x, self.mask * self.weight, self.bias, padding=1)


class Merged(nn.Module):
    """A weight that is made of several: added up, scaled, and divided by its norm."""

    def __init__(self):
        super().__init__()
        self.first, self.weight, self.gain = (
            nn.Linear(12, 16),
            nn.Parameter(torch.randn(8, 16) * 0.3),
            nn.Parameter(torch.rand(16) + 0.5),
        )
        self.up, self.down = nn.Parameter(torch.randn(8, 4) * 0.3), nn.Parameter(torch.randn(4, 16) * 0.3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        weight = self.weight * self.gain + 2 * (self.up @ self.down)
        return self.head(
            F.linear(self.first(x).sigmoid(), weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-6)).relu()
        )


class Handed(nn.Module):
    """Two layers that add one constant, made as wide as a number says, as T5 does with the bias of its attention."""

    def __init__(self):
        super().__init__()
        self.width = 16
        self.first, self.middle, self.second = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        bias = torch.zeros((1, self.width)) + 0.5
        x = self.middle((self.first(x) + bias).relu())
        return self.head((self.second(x) + bias).relu())


class Colliding(nn.Module):
    """Three numbers of one size: one is the width that the code asks for, two are something else."""

    def __init__(self):
        super().__init__()
        self.width, self.buckets, self.bins = 16, 16, 16
        self.first, self.head = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(x).reshape(-1, 9, self.width)
        return self.head(x.relu() * 8 / (self.buckets + 2 * self.bins))


class Own(nn.Linear):
    """A linear layer of a class of its own."""


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.head = Own(12, 16), Own(16, 16), Own(16, 16), Own(16, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(self.first(x).relu()).relu()).relu())


class TwoNames(Tied):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.b = self.a


class Listed(nn.Module):
    """A plain list of layers that have names as well, and a width in a tuple."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = Own(12, 20), Own(20, 16), Own(16, 4)
        self.order, self.shape, self.gain = [self.a, self.b], (1, 1, 16), nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x):
        for layer in self.order:
            x = layer(x).relu()
        return self.head(x * self.gain.reshape(self.shape))


class Headed(nn.LSTM):
    """A recurrent layer of torch with a layer in it."""

    def __init__(self):
        super().__init__(12, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(super().forward(x)[0])


NETS = {
    "one weight in two layers": (Tied, WORDS),
    "one layer of two names": (TwoNames, WORDS),
    "a list of layers": (Listed, WORDS),
    "recurrent, with a head in it": (Headed, WORDS),
    "numbers that are as large": (Colliding, WORDS),
    "a constant for two layers": (Handed, WORDS),
    "norms of a class of their own": (own_norms, IMAGE),
    "layers of a class of their own": (own_layers, IMAGE),
    "groups": (grouped, IMAGE),
    "densenet": (Dense, IMAGE),
    "unet": (UNet, IMAGE),
    "attention": (lambda: nn.Sequential(Attention(), Attention(), nn.Linear(12, 4)), WORDS),
    "bare": (Bare, WORDS),
    "weight norm": (Normed, WORDS),
    "volume": (Volume, torch.randn(1, 3, 4, 4, 4)),
    "experts": (Experts, WORDS),
    "masked": (
        lambda: nn.Sequential(
            Masked(3, 8), nn.BatchNorm2d(8), nn.ReLU(), Masked(8, 10), nn.ReLU(), nn.Conv2d(10, 2, 1)
        ),
        IMAGE,
    ),
    "merged": (Merged, WORDS),
    "shuffle": (shuffled, IMAGE),
    "shuffle units": (shuffle_units, IMAGE),
    "shuffle, transposed": (shuffled_up, IMAGE),
    "groups without gain": (Gainless, IMAGE),
    "instances without gain": (gainless_of_instances, IMAGE),
    "circular": (lambda: padded("circular", "circular", "circular"), IMAGE),
    "other borders": (lambda: padded("reflect", "replicate", "circular"), IMAGE),
    "border by hand": (Wrapped, IMAGE),
}


def shaken(model):
    """Norms that are not the identity, so that a channel that is cut would be missed."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            for t, low, high in (
                (module.weight, 0.5, 1),
                (module.bias, -1, 1),
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
            ):
                nn.init.uniform_(t, low, high)
    return model


def converted(name, **how):
    torch.manual_seed(0)
    build, x = NETS[name]
    model = shaken(build()).eval()
    return model, x, model(x).detach(), dampr.convert(model, example_inputs=x, **how)


def close_some(model, seed=0):
    torch.manual_seed(seed)
    for gate in dict.fromkeys(layer.gate for layer in gated_layers(model).values()):
        closed = (torch.rand(gate.num_gates) < 0.5) & (torch.arange(gate.num_gates) > 0)  # DAM closes from the end
        gate.set_levels_(torch.where(closed, -3.0, gate.levels()))
