// Multiplies a tensor (outer, middle, n, inner) by gates of axis n, and computes the gradients. z: (n,), or (outer, n)
// with a row of gates for each outer index. A batch of images is (B, 1, C, H W) or, in channels last, (B, H W, C, 1).
#pragma once

#include <cstdint>
#include <stdlib.h>

#include "kernels.h"
#include "storage.h"
#include "work.h"

namespace dampr {
namespace {

// How the tensor is divided into work items. A row is n * inner contiguous elements. An item is `rows` rows of one
// outer index; an outer index has `pieces` items. Within a row, runs are processed: of one gate (inner > 1), or of one
// gate per element (inner = 1).
struct PlaneGrid {
  int64_t outer, middle, n, inner, rows, pieces;

  explicit PlaneGrid(const Planes& a) : outer(a.outer), middle(a.middle), n(a.n), inner(a.inner) {
    const int64_t row = n * inner;
    rows = row > 0 ? kItem / row : 1;
    rows = rows < 1 ? 1 : rows;
    pieces = divide_up(middle, rows);
  }
  int64_t items() const { return n * inner > 0 ? outer * pieces : 0; }
  int64_t elements() const { return outer * middle * n * inner; }
};

// Calls f(first element, width, first gate) for all runs of an item; a run has at most kTile elements.
template <class F>
void each_run(const PlaneGrid& grid, int64_t item, F&& f) {
  const int64_t outer = item / grid.pieces, begin = item % grid.pieces * grid.rows,
                end = least(begin + grid.rows, grid.middle);
  for (int64_t middle = begin; middle < end; ++middle) {
    const int64_t row = (outer * grid.middle + middle) * grid.n * grid.inner;
    if (grid.inner == 1)
      for (int64_t j = 0; j < grid.n; j += kTile) f(row + j, static_cast<int>(least(kTile, grid.n - j)), j);
    else
      for (int64_t gate = 0; gate < grid.n; ++gate)
        for (int64_t j = 0; j < grid.inner; j += kTile)
          f(row + gate * grid.inner + j, static_cast<int>(least(kTile, grid.inner - j)), gate);
  }
}

// out = x * z.
template <class X>
void planes_forward(const Planes& a, int threads) {
  using G = typename Storage<X>::Gate;
  const X* x = static_cast<const X*>(a.x);
  X* out = static_cast<X*>(a.out);
  const PlaneGrid grid(a);
  parallel(grid.items(), grid.elements(), threads, [&](int64_t item) {
    alignas(64) G x_buffer[kTile], out_buffer[kTile];
    const G* z = static_cast<const G*>(a.z) + (a.per_outer ? item / grid.pieces * grid.n : 0);
    each_run(grid, item, [&](int64_t first, int width, int64_t gate) {
      const G* __restrict xs = Storage<X>::read(x + first, x_buffer, width);
      G* __restrict target = Storage<X>::stage(out + first, out_buffer);
      if (grid.inner == 1) {
        const G* __restrict zs = z + gate;
#pragma omp simd
        for (int j = 0; j < width; ++j) target[j] = xs[j] * zs[j];
      } else {
        const G one = z[gate];
#pragma omp simd
        for (int j = 0; j < width; ++j) target[j] = xs[j] * one;
      }
      Storage<X>::commit(target, out + first, width);
    });
  });
}

// dx = g * z and dz = the sums of x * g over the elements of each gate; either may be absent. False if there is no
// memory.
template <class X>
bool planes_backward(const Planes& a, int threads) {
  using G = typename Storage<X>::Gate;
  const X *x = static_cast<const X*>(a.x), *g = static_cast<const X*>(a.g);
  X* dx = static_cast<X*>(a.out);
  const PlaneGrid grid(a);
  double* sums = nullptr;  // (items, n)
  if (a.dz) {
    sums = static_cast<double*>(calloc(static_cast<size_t>(grid.items() * grid.n + 1), sizeof(double)));
    if (!sums) return false;
  }
  parallel(grid.items(), grid.elements(), threads, [&](int64_t item) {
    alignas(64) G x_buffer[kTile], g_buffer[kTile], dx_buffer[kTile], products[kTile];
    const G* z = static_cast<const G*>(a.z) + (a.per_outer ? item / grid.pieces * grid.n : 0);
    double* own = sums ? sums + item * grid.n : nullptr;
    each_run(grid, item, [&](int64_t first, int width, int64_t gate) {
      const G* __restrict gs = Storage<X>::read(g + first, g_buffer, width);
      if (own) {
        const G* __restrict xs = Storage<X>::read(x + first, x_buffer, width);
        if (grid.inner == 1) {
          double* __restrict columns = own + gate;
#pragma omp simd
          for (int j = 0; j < width; ++j) columns[j] += static_cast<double>(xs[j] * gs[j]);
        } else {
#pragma omp simd
          for (int j = 0; j < width; ++j) products[j] = xs[j] * gs[j];
          own[gate] += sum_row(products, width);
        }
      }
      if (!dx) return;
      G* __restrict target = Storage<X>::stage(dx + first, dx_buffer);
      if (grid.inner == 1) {
        const G* __restrict zs = z + gate;
#pragma omp simd
        for (int j = 0; j < width; ++j) target[j] = gs[j] * zs[j];
      } else {
        const G one = z[gate];
#pragma omp simd
        for (int j = 0; j < width; ++j) target[j] = gs[j] * one;
      }
      Storage<X>::commit(target, dx + first, width);
    });
  });
  if (!sums) return true;
  G* dz = static_cast<G*>(a.dz);
  if (a.per_outer)
    for (int64_t outer = 0; outer < grid.outer; ++outer)
      add_parts(sums + outer * grid.pieces * grid.n, grid.pieces, grid.n, dz + outer * grid.n, 1);
  else
    add_parts(sums, grid.items(), grid.n, dz, threads);
  free(sums);
  return true;
}

}  // namespace
}  // namespace dampr
