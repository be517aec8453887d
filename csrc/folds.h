// Multiplies gates of rows and columns into a matrix, and computes the gradients of weights and gates in one pass.
// kernels.h (FoldForward, FoldBackward) has the equations.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "storage.h"
#include "work.h"

namespace dampr {
namespace {

// The gates of `count` columns from `column` on; without gates (z is null) ones, in `buffer`.
template <class G>
inline const G* gates_or_ones(const void* z, int64_t column, int count, G* buffer) {
  if (z) return static_cast<const G*>(z) + column;
  for (int j = 0; j < count; ++j) buffer[j] = 1;
  return buffer;
}
// The gate of a row; 1 without gates.
template <class G>
inline G gate_or_one(const void* z, int64_t row) {
  return z ? static_cast<const G*>(z)[row] : G(1);
}

// The sum of w * g * z over `count` elements, in kLanes running sums in double.
template <class G>
inline double sum_products(const G* __restrict w, const G* __restrict g, const G* __restrict z, int count) {
  alignas(64) double lanes[kLanes] = {};
  int j = 0;
  for (; j + kLanes <= count; j += kLanes)
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane)
      lanes[lane] += static_cast<double>(w[j + lane] * g[j + lane] * z[j + lane]);
  for (; j < count; ++j) lanes[j % kLanes] += static_cast<double>(w[j] * g[j] * z[j]);
  return sum_row(lanes, kLanes);
}

// out = w * z_out[:, None] * z_in; W, T: the element types of w and out.
template <class W, class T>
void fold_forward(const FoldForward& a, int threads) {
  using G = typename Storage<W>::Gate;
  const W* w = static_cast<const W*>(a.w);
  T* out = static_cast<T*>(a.out);
  const Grid grid(a.n_out, a.n_in);
  parallel(grid.items(), a.n_out * a.n_in, threads, [&](int64_t index) {
    const Item item(grid, index);
    alignas(64) G ones[kTile], w_buffer[kTile], out_buffer[kTile];
    const G* __restrict z_in = gates_or_ones(a.z_in, item.column, item.width, ones);
    for (int64_t row = item.row; row < item.row_end; ++row) {
      const int64_t first = row * grid.n + item.column;
      const G z_out = gate_or_one<G>(a.z_out, row);
      const G* __restrict ws = Storage<W>::read(w + first, w_buffer, item.width);
      G* __restrict target = Storage<T>::stage(out + first, out_buffer);
#pragma omp simd
      for (int j = 0; j < item.width; ++j) target[j] = ws[j] * z_out * z_in[j];
      Storage<T>::commit(target, out + first, item.width);
    }
  });
}

// The gradients of fold_forward for the gradient g of out, and the folded weight; T, W: the element types of g and w.
// Sums over columns (for row gates) and over rows (for column gates) are formed for each item and added at the end.
// False if there is no memory.
template <class T, class W>
bool fold_backward(const FoldBackward& a, int threads) {
  using G = typename Storage<W>::Gate;
  const T* g = static_cast<const T*>(a.g);
  const W* w = static_cast<const W*>(a.w);
  W *dw = static_cast<W*>(a.dw), *folded = static_cast<W*>(a.folded);
  const Grid grid(a.n_out, a.n_in);
  const Partial<G> rows(a.dz_out, grid.tiles, a.n_out), columns(a.dz_in, grid.blocks, a.n_in);
  if (!rows.ready() || !columns.ready()) return false;
  parallel(grid.items(), a.n_out * a.n_in, threads, [&](int64_t index) {
    const Item item(grid, index);
    alignas(64) double sums[kTile];
    alignas(64) G ones[kTile], g_buffer[kTile], w_buffer[kTile], dw_buffer[kTile];
    const G* __restrict z_in = gates_or_ones(a.z_in, item.column, item.width, ones);
    for (int j = 0; j < item.width; ++j) sums[j] = 0;
    for (int64_t row = item.row; row < item.row_end; ++row) {
      const int64_t first = row * grid.n + item.column;
      const G z_out = gate_or_one<G>(a.z_out, row);
      const G* gs = Storage<T>::read(g + first, g_buffer, item.width);
      const G* __restrict ws =
          a.dz_out || a.dz_in || folded ? Storage<W>::read(w + first, w_buffer, item.width) : nullptr;
      if (a.dz_in)
#pragma omp simd
        for (int j = 0; j < item.width; ++j) sums[j] += static_cast<double>(ws[j] * gs[j] * z_out);
      if (a.dz_out) {
        const double sum = sum_products(ws, gs, z_in, item.width);
        rows.store(item.tile_index, row, &sum, 1);
      }
      if (folded) {
        G* __restrict target = Storage<W>::stage(folded + first, dw_buffer);
#pragma omp simd
        for (int j = 0; j < item.width; ++j) target[j] = ws[j] * z_out * z_in[j];
        Storage<W>::commit(target, folded + first, item.width);
      }
      if (dw) {  // last, because dw may be g
        G* target = Storage<W>::stage(dw + first, dw_buffer);
#pragma omp simd
        for (int j = 0; j < item.width; ++j) target[j] = gs[j] * z_out * z_in[j];
        Storage<W>::commit(target, dw + first, item.width);
      }
    }
    if (a.dz_in) columns.store(item.block_index, item.column, sums, item.width);
  });
  rows.finish(threads);
  columns.finish(threads);
  return true;
}

}  // namespace
}  // namespace dampr
