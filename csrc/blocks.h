// Gates on blocks of a weight matrix: the forward multiplies each weight by the gate of its block; the backward
// computes the gradients of weights and gates in one pass. kernels.h (FoldBlocksForward, FoldBlocksBackward) has the
// equations.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "storage.h"
#include "work.h"

namespace dampr {
namespace {

// One dimension of a matrix of `size` elements, of which each `block` shares a gate, cut into spans for threads. A span
// is several whole blocks, or, if a block is longer than `most`, one of the `pieces` of one block. step: elements of a
// full span.
struct Spans {
  int64_t size, block, blocks, pieces, step;

  Spans(int64_t size_, int64_t block_, int64_t most) : size(size_), block(least(block_, size_)) {
    blocks = block ? divide_up(size, block) : 0;
    pieces = block ? divide_up(block, most) : 0;
    step = pieces > 1 ? divide_up(block, pieces) : block ? most / block * block : 0;
  }
  int64_t count() const { return pieces > 1 ? blocks * pieces : step ? divide_up(size, step) : 0; }
};

// One span: the elements begin .. end - 1, which belong to `blocks` blocks from number `block` on. piece: which piece
// of a long block it is. A span can be empty, because the last block of a dimension may have fewer pieces.
struct Span {
  int64_t begin, end, block, blocks, piece;

  Span(const Spans& s, int64_t index) {
    piece = s.pieces > 1 ? index % s.pieces : 0;
    block = s.pieces > 1 ? index / s.pieces : index * (s.step / s.block);
    begin = block * s.block + piece * s.step;
    end = least(begin + s.step, s.pieces > 1 ? least(s.size, (block + 1) * s.block) : s.size);
    end = end < begin ? begin : end;
    blocks = s.pieces > 1 ? 1 : divide_up(end - begin, s.block);
  }
};

// How a matrix (n_out, n_in) with a gate for each block is cut into work items. An item is a span of rows times a span
// of columns, so it covers whole blocks, or a piece of one row or column of blocks.
struct BlockGrid {
  Spans columns, rows;

  BlockGrid(int64_t n_out, int64_t n_in, int64_t block_rows, int64_t block_cols)
      : columns(n_in, block_cols, kTile),
        rows(n_out, block_rows, most_rows(columns.pieces > 1 ? columns.step : least(columns.step, n_in))) {}
  static int64_t most_rows(int64_t width) { return width && kItem / width > kBlock ? kItem / width : kBlock; }
  int64_t items() const { return rows.count() * columns.count(); }
  int64_t blocks() const { return rows.blocks * columns.blocks; }
};

// out = z[0], z[0], ..., z[1], z[1], ...: each of `count` values kBlockColumns times.
template <int kBlockColumns, class G>
inline void repeat_each(const G* __restrict z, int64_t count, G* __restrict out) {
  for (int64_t b = 0; b < count; ++b)
    for (int k = 0; k < kBlockColumns; ++k) out[b * kBlockColumns + k] = z[b];
}

// The gates of the columns of a span: z, one gate for each block, with each gate repeated for the columns of its block.
// Returns z itself for blocks of one column, else `buffer`.
template <class G>
inline const G* gate_per_column(const G* z, const Span& span, int64_t block, G* buffer) {
  const int64_t width = span.end - span.begin, whole = width / block;
  if (block == 1) return z;
  if (block == 2)
    repeat_each<2>(z, whole, buffer);
  else if (block == 4)
    repeat_each<4>(z, whole, buffer);
  else if (block == 8)
    repeat_each<8>(z, whole, buffer);
  else
    for (int64_t b = 0; b < whole; ++b)
      for (int64_t k = 0; k < block; ++k) buffer[b * block + k] = z[b];
  for (int64_t j = whole * block; j < width; ++j) buffer[j] = z[whole];
  return buffer;
}

// Calls f(block row, first row, end row) for each row of blocks that the span of rows covers.
template <class F>
inline void each_block_row(const Spans& rows, const Span& span, F&& f) {
  for (int64_t b = 0; b < span.blocks; ++b) {
    const int64_t begin = b ? (span.block + b) * rows.block : span.begin;
    f(span.block + b, begin, least(span.end, (span.block + b + 1) * rows.block));
  }
}

// out = w * z with the gate z of each weight's block; W, T: the element types of w and out.
template <class W, class T>
void fold_blocks_forward(const FoldBlocksForward& a, int threads) {
  using G = typename Storage<W>::Gate;
  const W* w = static_cast<const W*>(a.w);
  T* out = static_cast<T*>(a.out);
  const BlockGrid grid(a.n_out, a.n_in, a.block_rows, a.block_cols);
  parallel(grid.items(), a.n_out * a.n_in, threads, [&](int64_t index) {
    const Span columns(grid.columns, index % grid.columns.count()), rows(grid.rows, index / grid.columns.count());
    const int width = static_cast<int>(columns.end - columns.begin);
    alignas(64) G z_buffer[kTile], w_buffer[kTile], out_buffer[kTile];
    each_block_row(grid.rows, rows, [&](int64_t block_row, int64_t row, int64_t row_end) {
      const G* z = static_cast<const G*>(a.z) + block_row * grid.columns.blocks + columns.block;
      const G* __restrict zs = gate_per_column(z, columns, grid.columns.block, z_buffer);
      for (; row < row_end; ++row) {
        const int64_t first = row * a.n_in + columns.begin;
        const G* __restrict ws = Storage<W>::read(w + first, w_buffer, width);
        G* __restrict target = Storage<T>::stage(out + first, out_buffer);
#pragma omp simd
        for (int j = 0; j < width; ++j) target[j] = ws[j] * zs[j];
        Storage<T>::commit(target, out + first, width);
      }
    });
  });
}

// out[b] = the sum of the b-th run of `run` consecutive values, added in order; `count` runs.
inline void sum_runs(const double* __restrict values, int64_t count, int64_t run, double* __restrict out) {
  for (int64_t b = 0; b < count; ++b) {
    double sum = values[b * run];
    for (int64_t k = 1; k < run; ++k) sum += values[b * run + k];
    out[b] = sum;
  }
}

// The sum of `values`, one per column of a span, over the columns of each block. Returns `values` itself for blocks of
// one column, else `out`.
inline const double* sum_columns(const double* values, const Span& span, int64_t block, double* out) {
  const int64_t width = span.end - span.begin, whole = width / block;
  if (block == 1) return values;
  if (block == 2)
    sum_runs(values, whole, 2, out);
  else if (block == 4)
    sum_runs(values, whole, 4, out);
  else if (block < kLanes)
    sum_runs(values, whole, block, out);
  else
    for (int64_t b = 0; b < whole; ++b) out[b] = sum_row(values + b * block, static_cast<int>(block));
  if (whole < span.blocks) out[whole] = sum_row(values + whole * block, static_cast<int>(width - whole * block));
  return out;
}

// dw = z g, folded = z w and dz = the sum of w g over each block; T, W: the element types of g and w. False if there is
// no memory.
template <class T, class W>
bool fold_blocks_backward(const FoldBlocksBackward& a, int threads) {
  using G = typename Storage<W>::Gate;
  const T* g = static_cast<const T*>(a.g);
  const W* w = static_cast<const W*>(a.w);
  W *dw = static_cast<W*>(a.dw), *folded = static_cast<W*>(a.folded);
  const BlockGrid grid(a.n_out, a.n_in, a.block_rows, a.block_cols);
  const Partial<G> total(a.dz, grid.rows.pieces * grid.columns.pieces, grid.blocks());
  if (!total.ready()) return false;
  parallel(grid.items(), a.n_out * a.n_in, threads, [&](int64_t index) {
    const Span columns(grid.columns, index % grid.columns.count()), rows(grid.rows, index / grid.columns.count());
    const int width = static_cast<int>(columns.end - columns.begin);
    alignas(64) double sums[kTile], block_sums[kTile];
    alignas(64) G z_buffer[kTile], g_buffer[kTile], w_buffer[kTile], dw_buffer[kTile];
    each_block_row(grid.rows, rows, [&](int64_t block_row, int64_t row, int64_t row_end) {
      const int64_t block = block_row * grid.columns.blocks + columns.block;
      const G* __restrict zs =
          dw || folded ? gate_per_column(static_cast<const G*>(a.z) + block, columns, grid.columns.block, z_buffer)
                       : z_buffer;
      for (int j = 0; j < width; ++j) sums[j] = 0;
      for (; row < row_end; ++row) {
        const int64_t first = row * a.n_in + columns.begin;
        const G* gs = Storage<T>::read(g + first, g_buffer, width);
        if (a.dz) {
          const G* __restrict ws = Storage<W>::read(w + first, w_buffer, width);
#pragma omp simd
          for (int j = 0; j < width; ++j) sums[j] += static_cast<double>(ws[j] * gs[j]);
        }
        if (folded) {
          const G* __restrict ws = Storage<W>::read(w + first, w_buffer, width);
          G* __restrict target = Storage<W>::stage(folded + first, dw_buffer);
#pragma omp simd
          for (int j = 0; j < width; ++j) target[j] = ws[j] * zs[j];
          Storage<W>::commit(target, folded + first, width);
        }
        if (!dw) continue;
        G* target = Storage<W>::stage(dw + first, dw_buffer);  // last, because dw may be g
#pragma omp simd
        for (int j = 0; j < width; ++j) target[j] = gs[j] * zs[j];
        Storage<W>::commit(target, dw + first, width);
      }
      if (!a.dz) return;
      const double* found = sum_columns(sums, columns, grid.columns.block, block_sums);
      total.store(rows.piece * grid.columns.pieces + columns.piece, block, found, columns.blocks);
    });
  });
  total.finish(threads);
  return true;
}

}  // namespace
}  // namespace dampr
