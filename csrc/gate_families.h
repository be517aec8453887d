// The gate functions, one type per family and way of taking its value; with_gate() at the end picks one. A new family is one more type here.
//
// A gate type has: Value (float or double); kDrawn (does it take noise); prepare(), which turns log_alpha into up to two numbers per gate that do
// not depend on the noise; and at(), which gives the value z and the slope dz/dlog_alpha from these and the noise u.
// Every product and sum is rounded on its own (-ffp-contract=off), so zero and one patterns equal those of dampr/reference to the bit.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "storage.h"

namespace dampr {
namespace {

inline double square_root(double x) { return __builtin_sqrt(x); }
inline float square_root(float x) { return __builtin_sqrtf(x); }

constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440054690583e-4f;  // their sum is ln 2

// reference.exp_portable: the constants are those of dampr/spec.py.
inline float exp_portable(float x) {
  constexpr float kLog2E = 1.4426950408889634f, kRound = 12582912.0f;
  x = x < -80.0f ? -80.0f : x > 80.0f ? 80.0f : x;
  const float n = (x * kLog2E + kRound) - kRound;
  const float f = (x - n * kLn2Hi) - n * kLn2Lo;
  float p = static_cast<float>(1.0 / 720.0);
  p = p * f + static_cast<float>(1.0 / 120.0);
  p = p * f + static_cast<float>(1.0 / 24.0);
  p = p * f + static_cast<float>(1.0 / 6.0);
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return p * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}
inline float exponential(float x) { return exp_portable(x); }
inline double exponential(double x) { return __builtin_exp(x); }

// ln t of a normal t > 0 to about one rounding, without a branch or a call, so that loops over it become vector code; a NaN stays one.
inline float logarithm(float t) {
  constexpr uint32_t kSqrtHalf = 0x3F3504F3u;
  // t = m 2^n with m in [sqrt(1/2), sqrt(2)), and ln m = 2 artanh((m - 1) / (m + 1)), of which five terms are enough.
  const uint32_t above = bits_of(t) - kSqrtHalf;
  const float n = static_cast<float>(static_cast<int32_t>(above) >> 23), m = float_of((above & 0x7FFFFFu) + kSqrtHalf);
  const float r = (m - 1.0f) / (m + 1.0f), rr = r * r;
  float p = 2.0f / 9.0f;
  p = p * rr + 2.0f / 7.0f;
  p = p * rr + 2.0f / 5.0f;
  p = p * rr + 2.0f / 3.0f;
  const float result = n * kLn2Hi + (n * kLn2Lo + (r * rr * p + 2.0f * r));
  return t != t ? t : result;
}

// t ** y; in float it saturates at exp(-80) and exp(80), far beyond the thresholds of any gate.
inline float power(float t, float y) { return exp_portable(logarithm(t) * y); }
inline double power(double t, double y) { return __builtin_pow(t, y); }

template <class G>
struct GatePoint {
  G z, slope;
};

// Clips the stretched value between the thresholds; comparisons let a NaN through.
template <class G>
inline G clip_open(G z) {
  constexpr G kEdge = static_cast<G>(0x1p-24);
  return z < kEdge ? kEdge : z > 1 - kEdge ? 1 - kEdge : z;
}

// A drawn hard concrete gate. kTwoThirds: beta = 2/3, where t ** (1 / beta) needs no logarithm.
template <class G, bool kTwoThirds>
struct HardConcreteDrawn {
  using Value = G;
  static constexpr bool kDrawn = true;
  float c0, c1;
  G gamma, range, inverse_beta;

  explicit HardConcreteDrawn(const GateSpec& s)
      : c0(static_cast<float>(s.c0)), c1(static_cast<float>(s.c1)), gamma(static_cast<G>(s.gamma)), range(static_cast<G>(s.zeta - s.gamma)),
        inverse_beta(static_cast<G>(1.0 / s.beta)) {}

  // p: a = exp(-log_alpha) in float, which decides; q: the same in the precision of the value.
  void prepare(const G* __restrict log_alpha, G* __restrict p, G* __restrict q, int count) const {
#pragma omp simd
    for (int j = 0; j < count; ++j) p[j] = static_cast<G>(exp_portable(static_cast<float>(-log_alpha[j])));
    if constexpr (sizeof(G) > sizeof(float))
      for (int j = 0; j < count; ++j) q[j] = exponential(-log_alpha[j]);
  }

  inline G sigmoid(G e, G u) const {
    const G b = e * (1 - u);
    if constexpr (kTwoThirds) {
      // 1 / (1 + t sqrt(t)) with t = b / u, multiplied out: one division and one square root.
      const G uu = u * u;
      return uu / (uu + b * square_root(b * u));
    } else {
      return 1 / (1 + power(b / u, inverse_beta));
    }
  }

  inline GatePoint<G> at(G p, G q, float u) const {
    const float a = static_cast<float>(p);
    const bool closed = u * (a + c0) <= a, full = u * (a + c1) >= a;
    const G s = sigmoid(sizeof(G) > sizeof(float) ? q : p, static_cast<G>(u));
    const G z = clip_open(s * range + gamma), slope = range * inverse_beta * (s * (1 - s));
    return {closed ? 0 : full ? 1 : z, closed | full ? 0 : slope};
  }
};

// The rules without noise: all is known once log_alpha is, so prepare() already gives value and slope.
template <class G>
struct HardConcreteFixed {
  using Value = G;
  static constexpr bool kDrawn = false;
  int rule;
  float lo, hi;
  G gamma, range, beta;

  explicit HardConcreteFixed(const GateSpec& s)
      : rule(s.rule), lo(static_cast<float>(s.lo)), hi(static_cast<float>(s.hi)), gamma(static_cast<G>(s.gamma)),
        range(static_cast<G>(s.zeta - s.gamma)), beta(static_cast<G>(s.rule == kMedian ? s.beta : 1.0)) {}

  void prepare(const G* __restrict log_alpha, G* __restrict p, G* __restrict q, int count) const {
    const bool binary = rule == kBinary;
#pragma omp simd
    for (int j = 0; j < count; ++j) {
      const float decides = static_cast<float>(log_alpha[j]);
      const bool closed = decides <= lo, full = binary | (decides >= hi);
      const G s = 1 / (1 + exponential(-log_alpha[j] / beta));
      const G z = clip_open(s * range + gamma), slope = range / beta * (s * (1 - s));
      p[j] = closed ? 0 : full ? 1 : z;
      q[j] = closed | full ? 0 : slope;
    }
  }

  inline GatePoint<G> at(G p, G q, float) const { return {p, q}; }
};

// Calls f(gate) with the gate type that the spec asks for, its values of type G.
template <class G, class F>
inline void with_gate(const GateSpec& spec, F&& f) {
  const double off = spec.beta - 2.0 / 3.0;
  if (spec.rule != kSample)
    f(HardConcreteFixed<G>(spec));
  else if (off < 1e-12 && off > -1e-12)
    f(HardConcreteDrawn<G, true>(spec));
  else
    f(HardConcreteDrawn<G, false>(spec));
}

}  // namespace
}  // namespace dampr
