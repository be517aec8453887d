"""Counter-based noise: (seed, index) -> uint32 word -> uniform number, equal to the bit in torch, C++ and Triton.

The generator is Philox4x32-10 (Salmon et al., SC 2011) with key = the 64-bit seed and counter = (group lo, group hi, 0,
0). Gate ``i`` takes word ``i % 4`` of group ``i // 4``. Noise is not stored: the backward draws it again. The index is
the *logical* index of the gate, so the noise does not depend on tiles, threads, splits or devices.
"""

from __future__ import annotations

import torch

ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
UNIFORM_SCALE = 4.6566127342e-10  # just under 2^-31: the largest word still maps below 1 (Triton's constant)
UNIFORM_MIN, UNIFORM_MAX = 2.0**-24, 1.0 - 2.0**-24
# flips key bits where one seed has to serve the input and the output gates of one layer
SECOND_STREAM = 0x5851F42D4C957F2D
SEEDS = 0, 2**63 - 1, (1,)  # seeds are drawn from 0 to below 2^63 - 1, in this shape
_LOW = 0xFFFFFFFF


def philox4x32(
    c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor, seed: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold uint32 values; ``seed``: int64, broadcastable.

    Returns four such tensors.
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        # An int64 product wraps modulo 2^64, so its two halves are the ones of the unsigned product.
        product_b, product_a = ROUND_B * c2, ROUND_A * c0
        c0, c2 = ((product_b >> 32) & _LOW) ^ c1 ^ k0, ((product_a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = product_b & _LOW, product_a & _LOW
        k0, k1 = (k0 + KEY_A) & _LOW, (k1 + KEY_B) & _LOW
    return c0, c1, c2, c3


def words(seed: torch.Tensor, count: int, start: int = 0) -> torch.Tensor:
    """The uint32 words of gates ``start .. start + count - 1``, an int64 tensor of shape (count,) on the seed's
    device.
    """
    # In an exported program the count may be dynamic, and slicing would fix it: draw a group for each word instead.
    if torch.compiler.is_exporting():
        index = torch.arange(count, dtype=torch.int64, device=seed.device) + start
        drawn = torch.stack(_groups(index >> 2, seed), dim=1)
        return drawn.gather(1, (index & 3)[:, None])[:, 0]
    first, last = start // 4, -((start + count) // -4)
    group = torch.arange(first, last, dtype=torch.int64, device=seed.device)
    return torch.stack(_groups(group, seed), dim=1).flatten()[start - 4 * first :][:count]


def _groups(group: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The four words of each group, as four tensors."""
    zero = torch.zeros_like(group)
    return philox4x32(group & _LOW, (group >> 32) & _LOW, zero, zero, seed)


def uniform(seed: torch.Tensor, count: int, start: int = 0) -> torch.Tensor:
    """Uniform float32 noise in [2^-24, 1 - 2^-24] of gates ``start .. start + count - 1``. ``seed``: int64 of shape
    (1,).
    """
    word = words(seed, count, start)
    # As Triton does, the word is read as int32 x and folded to x < 0 ? -x - 1 : x.
    signed = torch.where(word > 0x7FFFFFFF, _LOW - word, word)
    return (signed.to(torch.float32) * UNIFORM_SCALE).clamp(UNIFORM_MIN, UNIFORM_MAX)


def draw_seed(device: torch.device | str | None = None) -> torch.Tensor:
    """A new seed, int64 of shape (1,) on ``device``, drawn from torch's own generator; it therefore obeys
    ``torch.manual_seed`` and works in CUDA graphs.
    """
    return torch.randint(*SEEDS, dtype=torch.int64, device=device)
