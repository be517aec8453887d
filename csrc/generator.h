// The generator of Dep-L0 in one call: a_l = limit tanh(w_l a_(l-1) + b_l) with a_0 = 1, layer after layer, on one
// thread.
//
// Backward, from the last layer to the first, with da_l the gradient that comes from outside and back_l the one from
// layer l + 1: g_l = (da_l + back_l) (limit - a_l) (limit + a_l) / limit, dw_l = g_l a_(l-1)^T, db_l = g_l,
// back_(l-1) = w_l^T g_l. Each row of w is read once, in the same loop in which its row of dw is written.
#pragma once

#include <cstdint>

#include "gate_families.h"
#include "kernels.h"
#include "small.h"

namespace dampr {
namespace {

// product_rows computes this many rows at a time, with this many running sums each: enough independent sums to hide the
// latency of a multiply-add
constexpr int kRows = 4, kSums = 16;

// out[i] = the sum over j of w[i * stride + j] * a[j], for kHeight rows; a null `a` counts as ones.
template <class T, int kHeight>
inline void product_rows(const T* __restrict w, int64_t stride, const T* __restrict a, int64_t count,
                         T* __restrict out) {
  alignas(64) T sums[kHeight][kSums] = {};
  alignas(64) T ones[kSums];
  for (int s = 0; s < kSums; ++s) ones[s] = 1;
  int64_t j = 0;
  for (; j + kSums <= count; j += kSums) {
    const T* factors = a ? a + j : ones;
    for (int i = 0; i < kHeight; ++i)
#pragma omp simd
      for (int s = 0; s < kSums; ++s) sums[i][s] = multiply_add(w[i * stride + j + s], factors[s], sums[i][s]);
  }
  for (int i = 0; i < kHeight; ++i) {
    for (int half = kSums / 2; half > 0; half /= 2)
      for (int s = 0; s < half; ++s) sums[i][s] += sums[i][s + half];
    T rest = 0;
    for (int64_t k = j; k < count; ++k) rest = multiply_add(w[i * stride + k], a ? a[k] : T(1), rest);
    out[i] = sums[i][0] + rest;
  }
}

// tanh(x); a NaN stays a NaN.
template <class T>
inline T signed_tanh(T x) {
  const T y = x < 0 ? -x : x, t = tanh_positive(y, exponential(-2 * y)), value = x < 0 ? -t : t;
  return x != x ? x : value;
}

// Writes a_1, a_2, ... to a.values.
template <class T>
void generator_forward(const Generator& a) {
  const T* before = nullptr;
  T* values = static_cast<T*>(a.values);
  for (int64_t l = 0; l < a.layers; ++l) {
    const T *w = static_cast<const T*>(a.parameters[2 * l]), *b = static_cast<const T*>(a.parameters[2 * l + 1]);
    const int64_t in = a.widths[l], out = a.widths[l + 1];
    int64_t n = 0;
    for (; n + kRows <= out; n += kRows) product_rows<T, kRows>(w + n * in, in, before, in, values + n);
    for (; n < out; ++n) product_rows<T, 1>(w + n * in, in, before, in, values + n);
#pragma omp simd
    for (int64_t i = 0; i < out; ++i) values[i] = static_cast<T>(a.limit) * signed_tanh(values[i] + b[i]);
    before = values;
    values += out;
  }
}

// Writes the gradients of all parameters. False if there is no memory.
template <class T>
bool generator_backward(const Generator& a) {
  int64_t total = 0, widest = 0;
  for (int64_t l = 0; l <= a.layers; ++l) {
    if (l) total += a.widths[l];
    widest = a.widths[l] > widest ? a.widths[l] : widest;
  }
  Scratch<T> scratch(2 * widest);
  if (!scratch.memory) return false;
  T *back = scratch.take(widest), *next = scratch.take(widest);
  const T limit = static_cast<T>(a.limit), *values = static_cast<const T*>(a.values) + total,
          *upstream = static_cast<const T*>(a.dvalues) + total;
  for (int64_t j = 0; j < widest; ++j) back[j] = 0;
  for (int64_t l = a.layers - 1; l >= 0; --l) {
    const T* __restrict w = static_cast<const T*>(a.parameters[2 * l]);
    const int64_t in = a.widths[l], out = a.widths[l + 1];
    values -= out, upstream -= out;
    const T* __restrict before = values - in;  // a_(l-1); not read in the first layer, where it is 1
    T* __restrict db = static_cast<T*>(a.grads[2 * l + 1]);
    T* __restrict sums = next;
    for (int64_t k = 0; k < in; ++k) sums[k] = 0;
    for (int64_t n = 0; n < out; ++n) {
      const T g = (upstream[n] + back[n]) * ((limit - values[n]) * (limit + values[n]) / limit);
      const T* __restrict row = w + n * in;
      T* __restrict dw = static_cast<T*>(a.grads[2 * l]) + n * in;
      db[n] = g;
      if (!l) {
        for (int64_t k = 0; k < in; ++k) dw[k] = g;
        continue;
      }
#pragma omp simd
      for (int64_t k = 0; k < in; ++k) dw[k] = g * before[k], sums[k] = multiply_add(g, row[k], sums[k]);
    }
    next = back, back = sums;
  }
  return true;
}

}  // namespace
}  // namespace dampr
