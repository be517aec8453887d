"""The one-pass convolution against float64, and, to the bit, against the same kernel over every block of channels."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from dampr.kernels import configs
from dampr.ops.backend_triton import gated_conv2d as launchers
from dampr.ops.gated_conv2d import Window
from dampr.testing import assert_close

SAME = Window((1, 1), (1, 1), (1, 1), 1)
NHWC = torch.channels_last

# (B, C, H, W, N, R, S) and the window: odd sizes, blocks that are not full, every argument of a convolution.
PROBLEMS = {
    "primes": ((3, 5, 7, 11, 13, 3, 3), SAME),
    "blocks": ((2, 64, 6, 6, 64, 3, 3), SAME),
    "one past a block": ((2, 33, 5, 7, 65, 3, 3), SAME),
    "half a block": ((2, 48, 5, 7, 80, 3, 3), SAME),
    "1x1": ((2, 48, 5, 5, 32, 1, 1), Window((1, 1), (0, 0), (1, 1), 1)),
    "stride": ((2, 16, 11, 13, 16, 3, 3), Window((2, 3), (1, 1), (1, 1), 1)),
    "padding": ((2, 16, 5, 7, 16, 3, 5), Window((1, 1), (4, 7), (1, 1), 1)),
    "dilation": ((2, 16, 11, 13, 16, 3, 3), Window((1, 1), (2, 0), (2, 3), 1)),
    "a filter with 11 x 2 taps": ((1, 3, 17, 9, 8, 11, 2), Window((4, 1), (2, 1), (1, 1), 1)),
    "groups": ((2, 64, 5, 7, 96, 3, 3), SAME._replace(groups=2)),
    "odd groups": ((2, 15, 5, 7, 21, 3, 3), SAME._replace(groups=3)),
    "depthwise": ((3, 7, 6, 5, 7, 3, 3), SAME._replace(groups=7)),
    "depthwise, twice as many out": ((2, 4, 5, 5, 8, 3, 3), SAME._replace(groups=4)),
    "everything": ((3, 24, 13, 11, 18, 3, 2), Window((2, 1), (3, 2), (2, 3), 2)),
    "one pixel": ((5, 7, 1, 1, 3, 1, 1), Window((1, 1), (0, 0), (1, 1), 1)),
    "no image": ((0, 4, 5, 5, 8, 3, 3), SAME),
}
DRAWS = ["none", "batch", "image", "input per image", "output per image", "input", "output"]


def gates(rows: int | None, n: int) -> torch.Tensor:
    """Gates (n,) or (rows, n), a third of them closed and a third fully open."""
    return (3 * torch.rand((n,) if rows is None else (rows, n)) - 1).clamp(0, 1)


def draw(kind: str, B: int, C: int, N: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(z_in, z_out)."""
    return {
        "none": (None, None),
        "batch": (gates(None, C), gates(None, N)),
        "image": (gates(B, C), gates(B, N)),
        "input per image": (gates(B, C), gates(None, N)),
        "output per image": (gates(None, C), gates(B, N)),
        "input": (gates(None, C), None),
        "output": (None, gates(B, N)),
    }[kind]


def problem(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Window]:
    """x, weight, bias and the window."""
    (B, C, H, W, N, R, S), window = PROBLEMS[name]
    return torch.randn(B, C, H, W), torch.randn(N, C // window.groups, R, S), torch.randn(N), window


def plain(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z_in: torch.Tensor | None,
    z_out: torch.Tensor | None,
    window: Window,
) -> torch.Tensor:
    """The definition, in the dtype of x."""
    z_in, z_out = (None if z is None else z.to(x.dtype)[..., None, None] for z in (z_in, z_out))
    y = conv2d(x if z_in is None else x * z_in, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *window)
    return y if z_out is None else y * z_out


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z_in: torch.Tensor | None,
    z_out: torch.Tensor | None,
    window: Window,
) -> torch.Tensor:
    y, tensors = launchers.gated_conv2d_one_pass(x, weight, bias, z_in, z_out, window), (weight, bias, z_in, z_out)
    assert_close("y", y, plain(x.double(), *tensors, window), plain(x, *tensors, window))
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=NHWC)
    return y


@pytest.mark.parametrize("kind", ["none", "batch", "image"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_matches_float64(name: str, kind: str) -> None:
    x, weight, bias, window = problem(name)
    check(x, weight, bias, *draw(kind, x.shape[0], x.shape[1], weight.shape[0]), window)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("biased", [True, False])
def test_each_side_has_gates_of_its_own(kind: str, biased: bool) -> None:
    x, weight, bias, window = problem("everything")
    check(x, weight, bias if biased else None, *draw(kind, x.shape[0], x.shape[1], weight.shape[0]), window)


@pytest.mark.parametrize("name", ["primes", "one past a block", "half a block", "depthwise", "everything"])
def test_half_precision_with_float32_parameters(name: str) -> None:
    x, weight, bias, window = problem(name)
    check(x.half(), weight, bias, *draw("image", x.shape[0], x.shape[1], weight.shape[0]), window)


@pytest.mark.parametrize(
    "tile",
    [*configs.CONV_TILES["half"], configs.Tile(32, 32, 16, 8, 4, 5)],
    ids=lambda tile: f"{tile.rows}x{tile.cols}",
)
def test_every_tile_gives_the_same_result(tile: configs.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "conv_tile", lambda *problem: tile)
    x, weight, bias, window = problem("one past a block")
    check(x, weight, bias, *draw("image", x.shape[0], x.shape[1], weight.shape[0]), window)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_any_layout(layout: str) -> None:
    x, weight, bias, window = problem("primes")
    if layout == "channels_last":
        x, weight = x.contiguous(memory_format=NHWC), weight.contiguous(memory_format=NHWC)
    elif layout == "sliced":
        x = torch.cat((x, x), 1)[:, 2:7]
        weight = torch.cat((weight, weight), 3)[..., 1:4]
        bias = torch.cat((bias, bias))[1::2]
    elif layout == "expanded":
        x, weight = x[:1].expand(3, -1, -1, -1), weight[:, :, :1].expand(-1, -1, 3, -1)
    z_in, z_out = draw("image", x.shape[0], x.shape[1], weight.shape[0])
    check(x, weight, bias, z_in.t().contiguous().t(), z_out[:1].expand(3, -1), window)


def close(z: torch.Tensor, dead: str, depth: int) -> torch.Tensor:
    """``z`` with every other block of ``depth`` of each group closed, all but a single gate, or all."""
    index = torch.arange(z.shape[-1])
    closed = {
        "nothing": index < 0,
        "blocks": index // depth % 2 == 0,
        "all but one": index != index.numel() // 2,
        "all": index >= 0,
    }[dead]
    return z.masked_fill(closed, 0.0)


@pytest.mark.parametrize("outputs", ["nothing", "blocks", "all"])
@pytest.mark.parametrize("inputs", ["nothing", "blocks", "all but one", "all"])
@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_skipping_changes_no_bit(groups: int, rows: int | None, inputs: str, outputs: str) -> None:
    window = Window((1, 2), (1, 0), (1, 1), groups)
    x, weight, bias = torch.randn(2, 112, 3, 5), torch.randn(160, 112 // groups, 2, 1), torch.randn(160)
    tile = configs.conv_tile(1, 12, 160 // groups, 112 // groups, True, "fp32", 0)
    z_in, z_out = close(gates(rows, 112), inputs, tile.depth), close(gates(rows, 160), outputs, tile.cols)
    live, count = launchers._list_live(z_in, groups, tile.depth)
    everything = (
        torch.arange(live.shape[1], dtype=torch.int32).expand_as(live).contiguous(),
        torch.full_like(count, live.shape[1]),
    )
    full = launchers._conv(x, weight, bias, z_in, None, everything, window, tile)
    full = torch.where(z_out[..., None, None] == 0, 0.0, full * z_out[..., None, None])
    y = launchers.gated_conv2d_one_pass(x, weight, bias, z_in, z_out, window)
    assert torch.equal(y.contiguous().view(torch.int32), full.contiguous().view(torch.int32))
    assert_close(
        "y", y, plain(x.double(), weight, bias, z_in, z_out, window), plain(x, weight, bias, z_in, z_out, window)
    )


@pytest.mark.parametrize("C", [1, 31, 32, 33, 1100])
@pytest.mark.parametrize("depth", [16, 32])
def test_each_image_and_group_lists_its_blocks_with_an_open_gate_in_order(C: int, depth: int) -> None:
    z = torch.rand(2, 3 * C) * (torch.rand(2, 3 * C) < 0.04)
    live, count = launchers._list_live(z, 3, depth)
    assert count.shape == (6, 1)
    for row, values in enumerate(z.view(6, C)):
        blocks = [i for i, block in enumerate(values.split(depth)) if bool((block != 0).any())]
        assert live[row, : int(count[row])].tolist() == blocks


def test_what_is_dead_for_one_image_is_not_read_there() -> None:
    """NaN in dead channels of an image, in dead filters, and in weights of channels that are dead everywhere,
    does not reach y.
    """
    x, weight = torch.randn(2, 96, 5, 5), torch.randn(128, 96, 3, 3)
    z_in, z_out = torch.ones(2, 96), torch.ones(128)
    z_in[0, :64], z_in[1, 32:], z_out[:64] = 0, 0, 0
    expected = launchers.gated_conv2d_one_pass(x, weight, None, z_in, z_out, SAME)
    x[z_in == 0] = float("nan")
    weight[:, (z_in == 0).all(0)] = float("nan")
    weight[z_out == 0] = float("nan")
    assert torch.equal(launchers.gated_conv2d_one_pass(x, weight, None, z_in, z_out, SAME), expected)


def test_a_gate_that_is_not_a_number_stays_visible() -> None:
    z_in = torch.zeros(2, 64)
    z_in[1, 40] = float("nan")
    y = launchers.gated_conv2d_one_pass(torch.randn(2, 64, 3, 3), torch.randn(5, 64, 3, 3), None, z_in, None, SAME)
    assert y[1].isnan().all()
    assert not y[0].isnan().any()


def test_padding_is_zero_whatever_the_gates() -> None:
    """Pixels whose window lies wholly in the padding are the gated bias."""
    window = Window((1, 1), (3, 3), (1, 1), 1)
    x, weight, bias = torch.randn(1, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.randn(3)
    y = launchers.gated_conv2d_one_pass(x, weight, bias, torch.ones(4), torch.full((3,), 0.5), window)
    assert torch.equal(y[0, :, 0, 0], 0.5 * bias)


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ((1, 256 * 56 * 56, 64, 64, "bf16", 90), (128, 64)),
        ((1, 256 * 14 * 14, 256, 256, "bf16", 90), (128, 256)),
        ((1, 8 * 14 * 14, 256, 256, "bf16", 90), (128, 128)),  # too few tiles to fill a GPU
        ((256, 14 * 14, 256, 256, "fp16", 90), (128, 256)),
        ((256, 7 * 7, 512, 512, "bf16", 90), (64, 128)),  # an image is less than a tile
        ((256, 7 * 7, 512, 512, "tf32", 90), (64, 64)),
        ((1, 256 * 14 * 14, 256, 256, "tf32", 80), (128, 128)),
        ((1, 256 * 14 * 14, 256, 256, "fp32", 100), (32, 64)),
        ((1, 256 * 14 * 14, 256, 256, "bf16", 0), (64, 64)),
        ((1, 256 * 14 * 14, 99, 64, "bf16", 90), (32, 32)),
    ],
    ids=str,
)
def test_tiles_follow_the_shape(problem: tuple[int, int, int, int, str, int], expected: tuple[int, int]) -> None:
    assert configs.conv_tile(*problem[:4], True, *problem[4:])[:2] == expected
