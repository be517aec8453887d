// Multiplies a matrix (rows, n) by gates that are drawn for each row, or writes the gates themselves, and computes the
// gradients. A vector of gates is a matrix of one row. kernels.h (RowsForward, RowsBackward) has the equations.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "storage.h"
#include "work.h"

namespace dampr {
namespace {

// out = x * z (kTimesX) or out = z for `count` gates. p, q: what the gate type has prepared for each; u: their noise.
template <class Gate, class G, bool kTimesX>
inline void forward_chunk(const Gate& gate, const G* __restrict p, const G* __restrict q, const float* __restrict u,
                          const G* __restrict x, G* __restrict out, int count) {
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const G z = gate.at(p[j], q[j], u[j]).z;
    out[j] = kTimesX ? x[j] * z : z;
  }
}

// RowsForward; X, T: the element types of x and out. kTimesX: whether there is an x.
template <class X, class T, class Gate, bool kTimesX>
void rows_forward(const Gate& gate, const RowsForward& a, int threads) {
  using G = typename Gate::Value;
  const X* x = static_cast<const X*>(a.x);
  T* out = static_cast<T*>(a.out);
  const Grid grid(a.rows, a.n);
  parallel(grid.items(), a.rows * a.n, threads, [&](int64_t index) {
    const Item item(grid, index);
    Columns<Gate> columns;
    alignas(64) G x_buffer[kChunk];
    alignas(64) G out_buffer[kChunk];
    columns.prepare(gate, static_cast<const G*>(a.log_alpha) + item.column, item.width);
    sweep<Gate::kDrawn>(grid, item, a.seed, a.start, [&](int64_t first, int count, int column, const float* u) {
      const G* xs = kTimesX ? Storage<X>::read(x + first, x_buffer, count) : x_buffer;
      G* target = Storage<T>::stage(out + first, out_buffer);
      forward_chunk<Gate, G, kTimesX>(gate, columns.p + column, columns.q + column, u, xs, target, count);
      Storage<T>::commit(target, out + first, count);
    });
  });
}

// dx = g * z, xz = x * z and dlog_alpha = x * g * slope for `count` gates; without an x (kTimesX false) dlog_alpha =
// g * slope alone. dx may be g.
template <class Gate, class G, bool kTimesX>
inline void backward_chunk(const Gate& gate, const G* __restrict p, const G* __restrict q, const float* __restrict u,
                           const G* __restrict x, const G* g, G* dx, G* __restrict xz, G* __restrict dlog_alpha,
                           int count) {
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const auto point = gate.at(p[j], q[j], u[j]);
    const G gj = g[j];
    if (kTimesX) {
      const G xj = x[j];
      dx[j] = gj * point.z;
      xz[j] = xj * point.z;
      dlog_alpha[j] = xj * gj * point.slope;
    } else {
      dlog_alpha[j] = gj * point.slope;
    }
  }
}

// Adds `count` values to the sums of columns column, column + 1, ..., and goes on with column 0 after the last one.
template <class G>
inline void add_to_columns(const G* __restrict values, int count, int column, int width, double* __restrict sums) {
  for (int j = 0; j < count; column = 0) {
    const int run = static_cast<int>(least(count - j, width - column));
    for (int k = 0; k < run; ++k) sums[column + k] += static_cast<double>(values[j + k]);
    j += run;
  }
}

// RowsBackward; T, X: the element types of g and x. kTimesX: whether there is an x. False if there is no memory.
template <class T, class X, class Gate, bool kTimesX>
bool rows_backward(const Gate& gate, const RowsBackward& a, int threads) {
  using G = typename Gate::Value;
  const T* g = static_cast<const T*>(a.g);
  const X* x = static_cast<const X*>(a.x);
  X *dx = static_cast<X*>(a.dx), *xz = static_cast<X*>(a.xz);
  G* single = a.rows == 1 ? static_cast<G*>(a.dlog_alpha) : nullptr;  // with one row, gradients are written directly
  const bool summed = a.dlog_alpha && !single;
  const Grid grid(a.rows, a.n);
  const Partial<G> total(a.dlog_alpha, grid.blocks, a.n);
  if (!total.ready()) return false;
  parallel(grid.items(), a.rows * a.n, threads, [&](int64_t index) {
    const Item item(grid, index);
    Columns<Gate> columns;
    alignas(64) double sums[kTile];
    alignas(64) G x_buffer[kChunk], g_buffer[kChunk], dx_buffer[kChunk], xz_buffer[kChunk], slopes[kChunk];
    columns.prepare(gate, static_cast<const G*>(a.log_alpha) + item.column, item.width);
    if (summed)
      for (int j = 0; j < item.width; ++j) sums[j] = 0;
    sweep<Gate::kDrawn>(grid, item, a.seed, a.start, [&](int64_t first, int count, int column, const float* u) {
      const G* xs = kTimesX ? Storage<X>::read(x + first, x_buffer, count) : x_buffer;
      const G* gs = Storage<T>::read(g + first, g_buffer, count);
      G* dx_target = dx ? Storage<X>::stage(dx + first, dx_buffer) : dx_buffer;
      G* xz_target = xz ? Storage<X>::stage(xz + first, xz_buffer) : xz_buffer;
      G* target = single ? single + first : slopes;
      backward_chunk<Gate, G, kTimesX>(gate, columns.p + column, columns.q + column, u, xs, gs, dx_target, xz_target,
                                       target, count);
      if (dx) Storage<X>::commit(dx_target, dx + first, count);
      if (xz) Storage<X>::commit(xz_target, xz + first, count);
      if (summed) add_to_columns(slopes, count, column, item.width, sums);
    });
    if (summed) total.store(item.block_index, item.column, sums, item.width);
  });
  total.finish(threads);
  return true;
}

}  // namespace
}  // namespace dampr
