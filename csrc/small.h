// A whole gated linear layer in one call on one thread, products and gates, for layers so small that calls would cost
// more than arithmetic.
//
// Forward: y = z_out * pre, pre = xz w^T + b, xz = x * z_in. Backward, with g = dy * z_out and r = g w: dx = r * z_in,
// dw = g^T xz, db = sum_m g, dlog_alpha_in = sum_m x * r * z_in', dlog_alpha_out = sum_m pre * dy * z_out'; z' is the
// slope dz/dlog_alpha. If all rows share their output gates, dlog_alpha_out is computed without pre
// (shared_gates_backward). x: (m, k), w: (n, k), y: (m, n), all float or all double.
#pragma once

#include <cstdint>
#include <stdlib.h>

#include "folds.h"
#include "kernels.h"
#include "rows.h"
#include "work.h"

namespace dampr {
namespace {

// a * b + c, fused (rounded once) where the instruction set has it.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline double multiply_add(double a, double b, double c) {
#if defined(__FMA__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

constexpr int kBand = 4, kStrip = 32;  // rows and columns of an output block, whose running sums stay in registers
// A long sum is added in runs of this many terms, so that its error grows with the number of runs, not of terms.
constexpr int64_t kRun = 256;

// c += a b for one block of c of `height` rows and `width` columns (kBand and kStrip if kWhole), with `sums` terms.
// a(i, s) = a[i * row_step + s * sum_step], so that a may be transposed. b_step and c_step: the distances between the
// rows of b and of c.
template <class T, bool kWhole>
inline void product_block(const T* a, int64_t row_step, int64_t sum_step, const T* b, int64_t b_step, T* c,
                          int64_t c_step, int64_t sums, int height, int width) {
  const int band = kWhole ? kBand : height, strip = kWhole ? kStrip : width;
  alignas(64) T acc[kBand][kStrip];
  for (int i = 0; i < band; ++i)
    for (int j = 0; j < strip; ++j) acc[i][j] = 0;
  for (int64_t s = 0; s < sums; ++s)
    for (int i = 0; i < band; ++i) {
      const T factor = a[i * row_step + s * sum_step];
#pragma omp simd
      for (int j = 0; j < strip; ++j) acc[i][j] = multiply_add(factor, b[s * b_step + j], acc[i][j]);
    }
  for (int i = 0; i < band; ++i)
    for (int j = 0; j < strip; ++j) c[i * c_step + j] += acc[i][j];
}

// c += a b for a strip of `width` columns of c and all its rows; the strides are those of product_block.
template <class T>
void add_strip(const T* a, int64_t row_step, int64_t sum_step, const T* b, int64_t b_step, T* c, int64_t c_step,
               int64_t rows, int64_t sums, int width) {
  for (int64_t s = 0; s < sums; s += kRun) {
    const int64_t run = least(kRun, sums - s);
    for (int64_t i = 0; i < rows; i += kBand) {
      const int height = static_cast<int>(least(kBand, rows - i));
      const T* first = a + i * row_step + s * sum_step;
      if (height == kBand && width == kStrip)
        product_block<T, true>(first, row_step, sum_step, b + s * b_step, b_step, c + i * c_step, c_step, run, kBand,
                               kStrip);
      else
        product_block<T, false>(first, row_step, sum_step, b + s * b_step, b_step, c + i * c_step, c_step, run, height,
                                width);
    }
  }
}

// c (rows, cols) += a b for a (rows, sums) with the strides of product_block, and b (sums, cols).
template <class T>
void add_product(const T* a, int64_t row_step, int64_t sum_step, const T* b, T* c, int64_t rows, int64_t sums,
                 int64_t cols) {
  for (int64_t j = 0; j < cols; j += kStrip)
    add_strip(a, row_step, sum_step, b + j, cols, c + j, cols, rows, sums, static_cast<int>(least(kStrip, cols - j)));
}

// The sum of a[j] * b[j]: each product is rounded to T, the sum is in double.
template <class T>
inline double dot(const T* a, const T* b, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += static_cast<double>(a[j] * b[j]);
  return sum;
}

// out (cols) = the sums of g (rows, cols) over its rows, added up in double.
template <class T>
void add_rows(const T* g, int64_t rows, int64_t cols, T* out) {
  for (int64_t first = 0; first < cols; first += kStrip) {
    const int width = static_cast<int>(least(kStrip, cols - first));
    double sums[kStrip] = {};
    for (int64_t i = 0; i < rows; ++i)
      for (int j = 0; j < width; ++j) sums[j] += static_cast<double>(g[i * cols + first + j]);
    for (int j = 0; j < width; ++j) out[first + j] = static_cast<T>(sums[j]);
  }
}

// c (rows, cols) += a b^T for a (rows, sums) and b (cols, sums). Strips of b are transposed into `panel`, memory for
// sums * kStrip values, which stays in the nearest cache. The transposition costs as much as the products of three rows
// of a, so with fewer rows each element of c is a dot product instead.
template <class T>
void add_product_transposed(const T* a, const T* b, T* c, int64_t rows, int64_t sums, int64_t cols, T* panel) {
  constexpr int64_t kDeep = 16;
  if (rows < 3) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) {
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t s = 0; s < sums; ++s) sum += a[i * sums + s] * b[j * sums + s];
        c[i * cols + j] += sum;
      }
    return;
  }
  for (int64_t first = 0; first < cols; first += kStrip) {
    const int width = static_cast<int>(least(kStrip, cols - first));
    for (int64_t depth = 0; depth < sums; depth += kDeep)
      for (int j = 0; j < width; ++j)
        for (int64_t s = depth; s < least(depth + kDeep, sums); ++s) panel[s * kStrip + j] = b[(first + j) * sums + s];
    add_strip(a, sums, 1, panel, kStrip, c + first, cols, rows, sums, width);
  }
}

// One allocation for the intermediate results of a call; take(count) returns the next `count` elements of it. memory is
// null if the allocation failed.
template <class T>
struct Scratch {
  T* memory;
  int64_t used = 0;

  explicit Scratch(int64_t count) : memory(static_cast<T*>(malloc(static_cast<size_t>(count + 1) * sizeof(T)))) {}
  ~Scratch() { free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* take(int64_t count) {
    T* piece = memory + used;
    used += count;
    return piece;
  }
};

// out = t * z for t (m, n), with a draw of the gates for each row (a.per_sample) or one for all rows. z: memory for n
// values.
template <class T, class Gate>
void gate_matrix(const Gate& gate, const SmallLinear& a, const T* t, const void* log_alpha, uint64_t seed, int64_t n,
                 T* z, T* out) {
  if (a.per_sample) return rows_forward<T, T, Gate, true>(gate, {t, log_alpha, out, a.m, n, seed}, 1);
  rows_forward<T, T, Gate, false>(gate, {nullptr, log_alpha, z, 1, n, seed}, 1);
  fold_forward<T, T>({t, nullptr, z, out, a.m, n}, 1);
}

// The backward of gate_matrix for the gradient g of out: product = g * z, gated = t * z, dlog_alpha = the sum over rows
// of t * g * z'. Outputs that are not needed are null. z, dz: memory for n values each. False if there is no memory.
template <class T, class Gate>
bool gate_matrix_backward(const Gate& gate, const SmallLinear& a, const T* t, const T* g, const void* log_alpha,
                          uint64_t seed, int64_t n, T* z, T* dz, T* product, T* gated, void* dlog_alpha) {
  if (a.per_sample)
    return rows_backward<T, T, Gate, true>(gate, {t, g, log_alpha, product, gated, dlog_alpha, a.m, n, seed}, 1);
  rows_forward<T, T, Gate, false>(gate, {nullptr, log_alpha, z, 1, n, seed}, 1);
  if (gated) fold_forward<T, T>({t, nullptr, z, gated, a.m, n}, 1);
  if (!fold_backward<T, T>({g, t, nullptr, z, product, nullptr, nullptr, dlog_alpha ? dz : nullptr, a.m, n}, 1))
    return false;
  return !dlog_alpha ||
         rows_backward<T, T, Gate, false>(gate, {nullptr, dz, log_alpha, nullptr, nullptr, dlog_alpha, 1, n, seed}, 1);
}

// The number of values that compute_pre takes from the scratch memory.
inline int64_t pre_scratch(const SmallLinear& a) { return a.m * a.k + a.k * kStrip + a.k; }

// pre (m, n) = (x * z_in) w^T + b.
template <class T, class Gate>
void compute_pre(const Gate& gate, const SmallLinear& a, Scratch<T>& scratch, T* pre) {
  const T *x = static_cast<const T*>(a.x), *b = static_cast<const T*>(a.b);
  if (a.in_log_alpha) {
    T* xz = scratch.take(a.m * a.k);
    gate_matrix(gate, a, x, a.in_log_alpha, a.in_seed, a.k, scratch.take(a.k), xz);
    x = xz;
  }
  for (int64_t m = 0; m < a.m; ++m)
    for (int64_t n = 0; n < a.n; ++n) pre[m * a.n + n] = b ? b[n] : T(0);
  add_product_transposed(x, static_cast<const T*>(a.w), pre, a.m, a.k, a.n, scratch.take(a.k * kStrip));
}

// The forward: writes a.y, and a.pre if it is given. False if there is no memory.
template <class T, class Gate>
bool small_forward(const Gate& gate, const SmallLinear& a) {
  Scratch<T> scratch(pre_scratch(a) + a.n);
  if (!scratch.memory) return false;
  T *y = static_cast<T*>(a.y), *pre = a.pre ? static_cast<T*>(a.pre) : y;
  compute_pre(gate, a, scratch, pre);
  if (a.out_log_alpha) gate_matrix(gate, a, pre, a.out_log_alpha, a.out_seed, a.n, scratch.take(a.n), y);
  return true;
}

// The gradients of output gates that all rows share, and of w, from raw (n, k) = dy^T xz, without activations. a.dout =
// z' * (sum_k w * raw + b * sum_m dy), with z' in `slope`; then raw is multiplied by z and becomes dw. sum_dy: memory
// for n values.
template <class T>
void shared_gates_backward(const SmallLinear& a, const T* z, const T* slope, T* raw, T* sum_dy) {
  const T *w = static_cast<const T*>(a.w), *b = static_cast<const T*>(a.b);
  if (a.dout && b) add_rows(static_cast<const T*>(a.dy), a.m, a.n, sum_dy);
  for (int64_t n = 0; n < a.n && a.dout; ++n) {
    const double sum =
        dot(w + n * a.k, raw + n * a.k, a.k) + (b ? static_cast<double>(b[n]) * static_cast<double>(sum_dy[n]) : 0);
    static_cast<T*>(a.dout)[n] = static_cast<T>(sum) * slope[n];
  }
  for (int64_t n = 0; n < a.n && a.dw; ++n)
    for (int64_t k = 0; k < a.k; ++k) raw[n * a.k + k] *= z[n];
}

// The backward: writes those of a.dx, a.dw, a.db, a.din and a.dout that are not null. False if there is no memory.
//
// Three steps. (1) g = dy * z_out; with a draw per row this also gives dout, which needs pre: a.pre or, without it, a
// new product. (2) r = g w; dx = r * z_in, din, and xz = x * z_in. (3) raw (n, k): dy^T xz if all rows share their
// output gates (`shared`), from which shared_gates_backward computes dout and dw; else g^T xz, which is dw. `spare` is
// memory for gate_matrix and gate_matrix_backward.
template <class T, class Gate>
bool small_backward(const Gate& gate, const SmallLinear& a) {
  const bool shared = a.out_log_alpha && !a.per_sample, recompute = a.dout && !shared && !a.pre,
             need_raw = a.dw || (shared && a.dout);
  Scratch<T> scratch(2 * (a.n + a.k) + 2 * a.n + 2 * a.m * (a.n + a.k) + (recompute ? pre_scratch(a) : 0) +
                     (need_raw && !a.dw ? a.n * a.k : 0));
  if (!scratch.memory) return false;
  const T *x = static_cast<const T*>(a.x), *w = static_cast<const T*>(a.w), *g = static_cast<const T*>(a.dy);
  T *spare = scratch.take(2 * (a.n + a.k)), *z_out = scratch.take(a.n), *slope = scratch.take(a.n);
  if (a.out_log_alpha) {
    T* gated = scratch.take(a.m * a.n);
    if (shared) {
      for (int64_t n = 0; n < a.n; ++n) spare[n] = 1;
      if (!rows_backward<T, T, Gate, true>(
              gate, {spare, spare, a.out_log_alpha, z_out, nullptr, slope, 1, a.n, a.out_seed}, 1))
        return false;
      fold_forward<T, T>({g, nullptr, z_out, gated, a.m, a.n}, 1);
    } else {
      const T* pre = a.pre ? static_cast<const T*>(a.pre) : g;  // not read if there is no dout
      if (recompute) {
        T* again = scratch.take(a.m * a.n);
        compute_pre(gate, a, scratch, again);
        pre = again;
      }
      if (!gate_matrix_backward<T>(gate, a, pre, g, a.out_log_alpha, a.out_seed, a.n, spare, spare + a.n, gated,
                                   nullptr, a.dout))
        return false;
    }
    g = gated;
  }
  if (a.db) add_rows(g, a.m, a.n, static_cast<T*>(a.db));
  T* back = a.in_log_alpha || !a.dx ? scratch.take(a.m * a.k) : static_cast<T*>(a.dx);
  if (a.dx || a.din) {
    for (int64_t i = 0; i < a.m * a.k; ++i) back[i] = 0;
    add_product(g, a.n, 1, w, back, a.m, a.n, a.k);
  }
  if (a.in_log_alpha) {
    T* xz = need_raw ? scratch.take(a.m * a.k) : nullptr;
    T* dx = static_cast<T*>(a.dx);
    if (!dx && !a.din) {
      if (xz) gate_matrix(gate, a, x, a.in_log_alpha, a.in_seed, a.k, spare, xz);
    } else if (!gate_matrix_backward<T>(gate, a, x, back, a.in_log_alpha, a.in_seed, a.k, spare, spare + a.k, dx, xz,
                                        a.din)) {
      return false;
    }
    x = xz;
  }
  if (!need_raw) return true;
  T* raw = a.dw ? static_cast<T*>(a.dw) : scratch.take(a.n * a.k);
  for (int64_t i = 0; i < a.n * a.k; ++i) raw[i] = 0;
  add_product(shared ? static_cast<const T*>(a.dy) : g, 1, a.n, x, raw, a.n, a.m, a.k);
  if (shared) shared_gates_backward(a, z_out, slope, raw, spare);
  return true;
}

}  // namespace
}  // namespace dampr
