// Philox4x32-10 noise, equal to dampr/philox.py to the bit. One evaluation gives a group of four 32-bit words, for four
// gates. Several groups are computed side by side, each in a 64-bit lane of vector registers. A word is the low half of
// its lane; the high half may hold anything, because the 32 x 32 -> 64 bit multiplication reads low halves only, and
// join() masks the results at the end.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are stored two to a 64-bit lane, low word first");

namespace dampr {
namespace {

#if defined(DAMPR_AVX512)
// The vector operations of an instruction set. kCount: groups at a time. join: the low halves of two vectors as one
// vector of word pairs. store_interleaved: writes the words of each group one after the other.
struct Lanes {
  using Vector = __m512i;
  static constexpr int kCount = 8;
  static Vector all(uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
  static Vector count_from(uint64_t x) { return _mm512_add_epi64(all(x), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)); }
  static Vector multiply_low(Vector a, Vector b) { return _mm512_mul_epu32(a, b); }
  static Vector high(Vector a) { return _mm512_srli_epi64(a, 32); }
  static Vector xor3(Vector a, Vector b, Vector c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  static Vector join(Vector low, Vector high) { return _mm512_mask_shuffle_epi32(low, 0xAAAA, high, _MM_PERM_CCAA); }
  static void store_interleaved(uint32_t* out, Vector a, Vector b) {
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(a, _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), b));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(a, _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4), b));
  }
};
#elif defined(DAMPR_AVX2)
struct Lanes {
  using Vector = __m256i;
  static constexpr int kCount = 4;
  static Vector all(uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
  static Vector count_from(uint64_t x) { return _mm256_add_epi64(all(x), _mm256_set_epi64x(3, 2, 1, 0)); }
  static Vector multiply_low(Vector a, Vector b) { return _mm256_mul_epu32(a, b); }
  static Vector high(Vector a) { return _mm256_srli_epi64(a, 32); }
  static Vector xor3(Vector a, Vector b, Vector c) { return _mm256_xor_si256(_mm256_xor_si256(a, c), b); }
  static Vector join(Vector low, Vector high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA); }
  static void store_interleaved(uint32_t* out, Vector a, Vector b) {
    const Vector even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
    _mm256_storeu_si256(reinterpret_cast<Vector*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(reinterpret_cast<Vector*>(out + 8), _mm256_permute2x128_si256(even, odd, 0x31));
  }
};
#elif defined(__x86_64__)
struct Lanes {
  using Vector = __m128i;
  static constexpr int kCount = 2;
  static Vector all(uint64_t x) { return _mm_set1_epi64x(static_cast<long long>(x)); }
  static Vector count_from(uint64_t x) { return _mm_add_epi64(all(x), _mm_set_epi64x(1, 0)); }
  static Vector multiply_low(Vector a, Vector b) { return _mm_mul_epu32(a, b); }
  static Vector high(Vector a) { return _mm_srli_epi64(a, 32); }
  static Vector xor3(Vector a, Vector b, Vector c) { return _mm_xor_si128(_mm_xor_si128(a, c), b); }
  static Vector join(Vector low, Vector high) {
    return _mm_or_si128(_mm_and_si128(low, all(0xFFFFFFFFu)), _mm_slli_epi64(high, 32));
  }
  static void store_interleaved(uint32_t* out, Vector a, Vector b) {
    _mm_storeu_si128(reinterpret_cast<Vector*>(out), _mm_unpacklo_epi64(a, b));
    _mm_storeu_si128(reinterpret_cast<Vector*>(out + 4), _mm_unpackhi_epi64(a, b));
  }
};
#else
struct Lanes {
  using Vector = uint64_t;
  static constexpr int kCount = 1;
  static Vector all(uint64_t x) { return x; }
  static Vector count_from(uint64_t x) { return x; }
  static Vector multiply_low(Vector a, Vector b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
  static Vector high(Vector a) { return a >> 32; }
  static Vector xor3(Vector a, Vector b, Vector c) { return a ^ b ^ c; }
  static Vector join(Vector low, Vector high) { return (low & 0xFFFFFFFFu) | (high << 32); }
  static void store_interleaved(uint32_t* out, Vector a, Vector b) {
    out[0] = static_cast<uint32_t>(a), out[1] = static_cast<uint32_t>(a >> 32);
    out[2] = static_cast<uint32_t>(b), out[3] = static_cast<uint32_t>(b >> 32);
  }
};
#endif

// the number of gates that are computed at a time; their noise, values and converted tensors stay in the L1 cache
constexpr int kChunk = 512;
// words for a chunk, plus those that complete the last vector of groups, plus up to three gates in front of the first
constexpr int kWordBuffer = kChunk + 8 * 4 + 16;

// Draws the words of gates start .. start + count - 1 (count <= kChunk) into the buffer. Returns the address of the
// first one: whole groups are drawn, so up to three words lie in front of it.
inline const uint32_t* draw_words(uint64_t seed, int64_t start, int count, uint32_t (&buffer)[kWordBuffer]) {
  constexpr uint64_t kMultiplyA = 0xD2511F53u, kMultiplyB = 0xCD9E8D57u;
  constexpr uint32_t kKeyA = 0x9E3779B9u, kKeyB = 0xBB67AE85u;
  const int skip = static_cast<int>(start & 3);
  const uint64_t first_group = static_cast<uint64_t>(start) / 4;
  const Lanes::Vector multiply_a = Lanes::all(kMultiplyA), multiply_b = Lanes::all(kMultiplyB);
  for (int done = 0; done < skip + count; done += 4 * Lanes::kCount) {
    Lanes::Vector c0 = Lanes::count_from(first_group + static_cast<uint64_t>(done / 4));
    Lanes::Vector c1 = Lanes::high(c0), c2 = Lanes::all(0), c3 = c2;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, k0 += kKeyA, k1 += kKeyB) {
      const Lanes::Vector product_a = Lanes::multiply_low(c0, multiply_a),
                          product_b = Lanes::multiply_low(c2, multiply_b);
      c0 = Lanes::xor3(Lanes::high(product_b), c1, Lanes::all(k0)), c1 = product_b;
      c2 = Lanes::xor3(Lanes::high(product_a), c3, Lanes::all(k1)), c3 = product_a;
    }
    Lanes::store_interleaved(buffer + done, Lanes::join(c0, c1), Lanes::join(c2, c3));
  }
  return buffer + skip;
}

// Words as uniform numbers in [2^-24, 1 - 2^-24], as Triton computes them: with x the word as int32, x < 0 ? -x - 1 :
// x, times a number just below 2^-31.
inline void words_to_uniform(const uint32_t* __restrict words, int count, float* __restrict u) {
  constexpr float kScale = 4.6566127342e-10f, kMin = 0x1p-24f, kMax = 1.0f - 0x1p-24f;
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const int32_t x = static_cast<int32_t>(words[j]);
    const float v = static_cast<float>(x ^ (x >> 31)) * kScale;
    u[j] = v < kMin ? kMin : v > kMax ? kMax : v;
  }
}

}  // namespace
}  // namespace dampr
