// Reads and writes tensors of any supported dtype as float (or double). Half precision is converted in chunks through a
// small buffer; float and double are used in place.
#pragma once

#include <cstdint>

#if defined(DAMPR_AVX2) || defined(DAMPR_AVX512)
#include <immintrin.h>
#endif

namespace dampr {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The bits of a float, and the float of these bits.
inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// widen: the float with the value of a half-precision number. narrow: a float rounded to the nearest half-precision
// number, ties to even.
inline float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline void narrow(float x, BFloat16& out) {
  const uint32_t bits = bits_of(x), rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  out.bits = static_cast<uint16_t>((x != x ? bits | 0x400000u : rounded) >> 16);
}

inline float widen(Float16 x) {
  // Exponent and mantissa, shifted to where float has them, are the value times 2^-112, also for subnormal numbers.
  // Exponent 31 means infinity or NaN.
  const float magnitude = float_of((x.bits & 0x7FFFu) << 13) * 0x1p112f;
  const uint32_t bits = bits_of(magnitude) | (magnitude >= 65536.0f ? 0x7F800000u : 0u);
  return float_of(bits | static_cast<uint32_t>(x.bits & 0x8000u) << 16);
}

inline void narrow(float x, Float16& out) {
  const uint32_t sign = bits_of(x) & 0x80000000u, magnitude = bits_of(x) ^ sign;
  const uint32_t rounded = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t normal = rounded < 0x7C00u ? rounded : 0x7C00u;
  // Subnormal numbers are multiples of 2^-24, the spacing of floats just above 0.5: adding 0.5 rounds to it.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t value = magnitude > 0x7F800000u    ? 0x7E00u | ((magnitude >> 13) & 0x3FFu)
                         : magnitude >= 0x38800000u ? normal
                                                    : subnormal;
  out.bits = static_cast<uint16_t>(value | (sign >> 16));
}

// How the kernels read and write elements of type T. Gate: the type in which gates and products with them are computed.
// read() returns `count` elements as Gate. A result is computed in the memory that stage() returns and then written to
// the tensor by commit(). This general form converts through `buffer`, which has to hold `count` values.
template <class T>
struct Storage {
  using Gate = float;
  static const float* read(const T* source, float* buffer, int count) {
#pragma omp simd
    for (int j = 0; j < count; ++j) buffer[j] = widen(source[j]);
    return buffer;
  }
  static float* stage(T*, float* buffer) { return buffer; }
  static void commit(const float* buffer, T* target, int count) {
#pragma omp simd
    for (int j = 0; j < count; ++j) narrow(buffer[j], target[j]);
  }
};

// The same for types that need no conversion: read() and stage() return the tensor's own memory.
template <class G>
struct InPlace {
  using Gate = G;
  static const G* read(const G* source, G*, int) { return source; }
  static G* stage(G* target, G*) { return target; }
  static void commit(const G*, G*, int) {}
};
template <>
struct Storage<float> : InPlace<float> {};
template <>
struct Storage<double> : InPlace<double> {};

#if defined(DAMPR_AVX2) || defined(DAMPR_AVX512)
template <>
struct Storage<Float16> {
  using Gate = float;
  static const float* read(const Float16* source, float* buffer, int count) {
    int j = 0;
    for (; j + 8 <= count; j += 8)
      _mm256_storeu_ps(buffer + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + j))));
    for (; j < count; ++j) buffer[j] = widen(source[j]);
    return buffer;
  }
  static float* stage(Float16*, float* buffer) { return buffer; }
  static void commit(const float* buffer, Float16* target, int count) {
    int j = 0;
    for (; j + 8 <= count; j += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + j),
                       _mm256_cvtps_ph(_mm256_loadu_ps(buffer + j), _MM_FROUND_TO_NEAREST_INT));
    for (; j < count; ++j) narrow(buffer[j], target[j]);
  }
};
#endif

}  // namespace
}  // namespace dampr
