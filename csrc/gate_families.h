// The gate functions: one type for gates that are drawn and one for all others; with_gate() at the end chooses. A new
// family without noise needs a prepare_ function and a case in Fixed. Equations and constants: dampr/spec.py.
//
// A gate type has: Value, float or double; kDrawn, whether it needs noise; prepare(), which turns log_alpha into up to
// two numbers per gate that do not depend on the noise; and at(), which computes the value z and the slope
// dz/dlog_alpha from these numbers and the noise u. Every product and sum is rounded on its own (-ffp-contract=off), so
// that the same gates are exactly 0 and exactly 1 as in dampr/reference.
//
// In the prepare_ functions: log_alpha (or x, alpha, p) is the parameter of each of `count` gates, z the value, slope
// the derivative of z by the parameter. Comparisons are made in float (`decides`) for both types, so that float and
// double agree on which gates are closed; `full` means z = 1.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "storage.h"

namespace dampr {
namespace {

inline double square_root(double x) { return __builtin_sqrt(x); }
inline float square_root(float x) { return __builtin_sqrtf(x); }

constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440054690583e-4f;  // their sum is ln 2

// exp(x) as reference.exp_portable computes it, with the same constants (dampr/spec.py); x is clamped to [-80, 80].
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

// ln t of a normal t > 0 to about one rounding, without a branch or a call, so that loops over it become vector code; a
// NaN stays one.
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

// The value of a gate and its slope, the derivative by its parameter.
template <class G>
struct GatePoint {
  G z, slope;
};

// Clamps z to [2^-24, 1 - 2^-24], so that a gate which the comparisons call neither closed nor full is neither 0 nor 1.
// A NaN stays a NaN.
template <class G>
inline G clip_open(G z) {
  constexpr G kEdge = static_cast<G>(0x1p-24);
  return z < kEdge ? kEdge : z > 1 - kEdge ? 1 - kEdge : z;
}

// Hard concrete gates that are drawn. With a = exp(-log_alpha) and t = a (1 - u) / u:
//   s = sigmoid((logit u + log_alpha) / beta) = 1 / (1 + t ** (1 / beta)),   z = clip(s (zeta - gamma) + gamma, 0, 1)
// Whether z is 0 or 1 is decided by u and a in float, before s is known: z = 0 iff u (a + c0) <= a, z = 1 iff
// u (a + c1) >= a. c0 and c1 are these thresholds solved for u (dampr/spec.py).
// kTwoThirds: beta is 2/3, where t ** (1 / beta) is t sqrt(t) and needs no logarithm.
template <class G, bool kTwoThirds>
struct HardConcreteDrawn {
  using Value = G;
  static constexpr bool kDrawn = true;
  float c0, c1;
  G gamma, range, inverse_beta;

  explicit HardConcreteDrawn(const GateSpec& s)
      : c0(static_cast<float>(s.c0)),
        c1(static_cast<float>(s.c1)),
        gamma(static_cast<G>(s.gamma)),
        range(static_cast<G>(s.zeta - s.gamma)),
        inverse_beta(static_cast<G>(1.0 / s.beta)) {}

  // p: exp(-log_alpha) in float, for the comparisons. q: the same in double, for the value, if G is double; else q is
  // not written, and the value is computed from p.
  void prepare(const G* __restrict log_alpha, G* __restrict p, G* __restrict q, int count) const {
#pragma omp simd
    for (int j = 0; j < count; ++j) p[j] = static_cast<G>(exp_portable(static_cast<float>(-log_alpha[j])));
    if constexpr (sizeof(G) > sizeof(float))
      for (int j = 0; j < count; ++j) q[j] = exponential(-log_alpha[j]);
  }

  // s for e = exp(-log_alpha) and the noise u.
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

// Hard concrete gates without noise, as in evaluation. z = clip(sigmoid(log_alpha / beta) * (zeta - gamma) + gamma) for
// the rules kPaper (with beta = 1) and kMedian; for kBinary, z is 0 or 1. A gate is closed if log_alpha <= lo and full
// if log_alpha >= hi.
template <class G>
void prepare_hard_concrete(const GateSpec& s, const G* __restrict log_alpha, G* __restrict z, G* __restrict slope,
                           int count) {
  const bool binary = s.rule == kBinary;
  const float lo = static_cast<float>(s.lo), hi = static_cast<float>(s.hi);
  const G gamma = static_cast<G>(s.gamma), range = static_cast<G>(s.zeta - s.gamma),
          beta = static_cast<G>(s.rule == kMedian ? s.beta : 1.0);
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const float decides = static_cast<float>(log_alpha[j]);
    const bool closed = decides <= lo, full = binary | (decides >= hi);
    const G c = 1 / (1 + exponential(-log_alpha[j] / beta));
    const G inside = clip_open(c * range + gamma), steep = range / beta * (c * (1 - c));
    z[j] = closed ? 0 : full ? 1 : inside;
    slope[j] = closed | full ? 0 : steep;
  }
}

// Gates whose parameter is their value.
template <class G>
void prepare_value(const G* __restrict p, G* __restrict z, G* __restrict slope, int count) {
#pragma omp simd
  for (int j = 0; j < count; ++j) z[j] = p[j], slope[j] = 1;
}

// tanh(y) for y >= 0, from y and e = exp(-2 y). In float it has no branch and no call, and small y are precise too
// (constants: dampr/spec.py).
inline float tanh_positive(float y, float e) {
  const float yy = y * y;
  float p = -5.717043105e-03f;
  p = p * yy + 2.065058541e-02f;
  p = p * yy - 5.374349745e-02f;
  p = p * yy + 1.333149128e-01f;
  p = p * yy - 3.333328392e-01f;
  const float small = y + y * (yy * p), large = (1 - e) / (1 + e);
  return y <= 0.625f ? small : large;
}
inline double tanh_positive(double y, double) { return __builtin_tanh(y); }

// z, but at least 2^-24, so that a gate which is not closed is not 0. A NaN stays a NaN.
template <class G>
inline G off_zero(G z) {
  constexpr G kEdge = static_cast<G>(0x1p-24);
  return z < kEdge ? kEdge : z;
}

// h(y) and h'(y) for y >= 0, of the ramp kShape (DAM, DiffPrune). A NaN stays a NaN.
template <class G, Rule kShape>
inline GatePoint<G> ramp_point(G y) {
  if constexpr (kShape == kClip || kShape == kLinear) return {y, 1};
  constexpr G kLimit = static_cast<G>(0x1p60);
  y = y > kLimit ? kLimit : y;
  if constexpr (kShape == kRatio) {
    const G r = 1 / (1 + y);
    return {y * r, r * r};
  } else if constexpr (kShape == kSquareRatio) {
    const G r = 1 / (1 + y * y);
    return {y * y * r, 2 * y * r * r};
  } else if constexpr (kShape == kTanh) {
    const G e = exponential(-2 * y), r = 1 / (1 + e);
    return {tanh_positive(y, e), 4 * e * r * r};
  } else {
    const G e = exponential(-y), half = tanh_positive(y / 2, e);  // 1 - exp(-y) without its cancellation
    return {2 * half / (1 + half), e};
  }
}

// Ramp (DAM, DiffPrune): z = h(k x), with sharpness k = beta; 0 if x <= lo and, for kClip, 1 if x >= hi.
template <class G, Rule kShape>
void prepare_ramp(const GateSpec& s, const G* __restrict x, G* __restrict z, G* __restrict slope, int count) {
  const float lo = static_cast<float>(s.lo), hi = static_cast<float>(s.hi);
  const G k = static_cast<G>(s.beta);
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const float decides = static_cast<float>(x[j]);
    const bool closed = decides <= lo, full = kShape == kClip && decides >= hi;
    const GatePoint<G> point = ramp_point<G, kShape>(k * x[j]);
    z[j] = closed ? 0 : full ? 1 : off_zero(point.z);
    slope[j] = closed | full ? 0 : k * point.slope;
  }
}

// Differentiable Mask: z = alpha M(y) with y = b (|alpha| - t), slope b = beta and threshold t = lo. The slope is
// dz/dalpha = M + |alpha| b M'(y). The variant chooses M (dampr/spec.py). kHard and kHardConstant have a step
// as M; instead of its derivative, kHard takes that of kSmooth, and kHardConstant 0. In the loop: m = M, steep = M'(y),
// size = |alpha|, distance = |y|, e = exp(-|y|), which cannot overflow. y and |alpha| are clamped, so that no product
// is infinite times 0.
template <class G, Rule kVariant>
void prepare_mask(const GateSpec& s, const G* __restrict alpha, G* __restrict z, G* __restrict slope, int count) {
  constexpr G kLimit = 80, kWide = static_cast<G>(0x1p60);
  const float threshold = static_cast<float>(s.lo);
  const G b = static_cast<G>(s.beta), t = static_cast<G>(s.lo);
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const G a = alpha[j], size = a < 0 ? -a : a;
    const float decides = static_cast<float>(size);
    const bool closed = decides <= threshold;
    G y = b * (size - t);
    y = y < -kLimit ? -kLimit : y > kLimit ? kLimit : y;
    const G distance = y < 0 ? -y : y, e = exponential(-distance), r = 1 / (1 + e);
    const G above = y < 0 ? e * r : r, below = y < 0 ? r : e * r;  // sigmoid(y), sigmoid(-y)
    G m = closed ? 0 : 1, steep = 0;
    if constexpr (kVariant == kSmooth) m = above * (1 + y * below);
    if constexpr (kVariant == kSmooth || kVariant == kHard) steep = e * r * r * (2 - distance * ((1 - e) * r));
    if constexpr (kVariant == kLogistic) m = above, steep = above * below;
    if constexpr (kVariant == kExactZero) {
      const G ee = e * e, rr = 1 / (1 + ee);
      m = closed ? 0 : off_zero(y < 0 ? 0 : tanh_positive(y, ee));
      steep = closed ? 0 : 4 * ee * rr * rr;
    }
    z[j] = a * m;
    slope[j] = m + (size > kWide ? kWide : size) * (b * steep);
  }
}

// All gates without noise. Value and slope depend on the parameter alone, so prepare() computes both and at() returns
// them.
template <class G>
struct Fixed {
  using Value = G;
  static constexpr bool kDrawn = false;
  const GateSpec& spec;

  explicit Fixed(const GateSpec& s) : spec(s) {}

  void prepare(const G* parameter, G* z, G* slope, int count) const {
    switch (spec.rule) {
      case kIdentity:
        return prepare_value(parameter, z, slope, count);
      case kTanh:
        return prepare_ramp<G, kTanh>(spec, parameter, z, slope, count);
      case kRatio:
        return prepare_ramp<G, kRatio>(spec, parameter, z, slope, count);
      case kSquareRatio:
        return prepare_ramp<G, kSquareRatio>(spec, parameter, z, slope, count);
      case kExponential:
        return prepare_ramp<G, kExponential>(spec, parameter, z, slope, count);
      case kClip:
        return prepare_ramp<G, kClip>(spec, parameter, z, slope, count);
      case kLinear:
        return prepare_ramp<G, kLinear>(spec, parameter, z, slope, count);
      case kHard:
        return prepare_mask<G, kHard>(spec, parameter, z, slope, count);
      case kHardConstant:
        return prepare_mask<G, kHardConstant>(spec, parameter, z, slope, count);
      case kSmooth:
        return prepare_mask<G, kSmooth>(spec, parameter, z, slope, count);
      case kExactZero:
        return prepare_mask<G, kExactZero>(spec, parameter, z, slope, count);
      case kLogistic:
        return prepare_mask<G, kLogistic>(spec, parameter, z, slope, count);
      default:
        return prepare_hard_concrete(spec, parameter, z, slope, count);
    }
  }

  inline GatePoint<G> at(G p, G q, float) const { return {p, q}; }
};

// Calls f(gate) with the gate type for `spec`; the values of its gates have type G.
template <class G, class F>
inline void with_gate(const GateSpec& spec, F&& f) {
  const double off = spec.beta - 2.0 / 3.0;
  if (spec.rule != kSample)
    f(Fixed<G>(spec));
  else if (off < 1e-12 && off > -1e-12)
    f(HardConcreteDrawn<G, true>(spec));
  else
    f(HardConcreteDrawn<G, false>(spec));
}

}  // namespace
}  // namespace dampr
