"""Noise: the published words, the layout of the design, and statistics at five sigma."""

import math

import pytest
import torch

from dampr import philox

LARGEST = 2**63 - 1


def _seed(value):
    return torch.tensor([value], dtype=torch.int64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    key64 = key[0] | key[1] << 32
    seed = _seed(key64 - 2**64 if key64 >= 2**63 else key64)
    words = philox.philox4x32(*(torch.tensor([c], dtype=torch.int64) for c in counter), seed)
    assert " ".join(f"{int(w):08x}" for w in words) == expected


@pytest.mark.parametrize("start", [0, 1, 3, 4, 2**32 - 2, 2**34 - 1, 2**40 + 5])
def test_a_word_depends_on_seed_and_index_only(start):
    seed = _seed(LARGEST - 12345)
    whole = philox.words(seed, 64, start)
    for offset, count in ((0, 1), (1, 7), (13, 4), (63, 1)):
        assert torch.equal(philox.words(seed, count, start + offset), whole[offset : offset + count])


def test_gate_i_is_word_i_mod_4_of_group_i_div_4():
    seed, index = _seed(2**62 + 99), 2**35 + 6
    group, zero = torch.tensor([index // 4]), torch.tensor([0])
    expected = philox.philox4x32(group & 0xFFFFFFFF, group >> 32, zero, zero, seed)[index % 4]
    assert torch.equal(philox.words(seed, 1, index), expected)


def test_uniforms_stay_off_both_ends_and_follow_the_signed_rule():
    words = philox.words(_seed(7), 200_000)
    u = philox.uniform(_seed(7), 200_000)
    assert u.dtype == torch.float32
    assert u.min() >= 2**-24
    assert u.max() <= 1 - 2**-24
    folded = torch.where(words >= 2**31, 2**32 - 1 - words, words).double() * 2.0**-31
    assert (u.double() - folded.clamp(2**-24, 1 - 2**-24)).abs().max() < 2**-23


@pytest.mark.parametrize("seed", [0, 1, 2**31, LARGEST])
def test_uniform_moments_and_bins_at_five_sigma(seed):
    n, bins = 1 << 20, 64
    u = philox.uniform(_seed(seed), n).double()
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    counts = torch.histc(u, bins, 0, 1)
    chi2 = ((counts - n / bins) ** 2 / (n / bins)).sum()
    assert abs(chi2 - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64, 1000])
def test_neighbouring_indices_are_uncorrelated_at_five_sigma(lag):
    u = philox.uniform(_seed(3), (1 << 20) + lag).double() - 0.5
    r = (u[:-lag] * u[lag:]).mean() * 12
    assert abs(r) < 5 / math.sqrt(1 << 20)


@pytest.mark.parametrize("other", [1, 2**32, 2**62, philox.SECOND_STREAM])
def test_seeds_that_differ_in_few_bits_are_independent_at_five_sigma(other):
    n = 1 << 20
    a, b = philox.uniform(_seed(12), n).double() - 0.5, philox.uniform(_seed(12 ^ other), n).double() - 0.5
    assert abs((a * b).mean() * 12) < 5 / math.sqrt(n)
    both_low = ((a < 0) & (b < 0)).double().mean()
    assert abs(both_low - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)


def test_drawn_seeds_obey_manual_seed_and_differ():
    torch.manual_seed(5)
    first, second = philox.draw_seed(), philox.draw_seed()
    torch.manual_seed(5)
    assert torch.equal(philox.draw_seed(), first)
    assert not torch.equal(first, second)
    assert first.shape == (1,)
    assert first.dtype == torch.int64
