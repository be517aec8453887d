// Gates of blocks folded into a matrix, and their gradients from one pass.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "storage.h"
#include "work.h"

namespace dampr {
namespace {

// One dimension cut into spans: each is some whole blocks, or a piece of one block that is longer than `most`.
struct Spans {
  int64_t size, block, blocks, pieces, step;

  Spans(int64_t size_, int64_t block_, int64_t most) : size(size_), block(least(block_, size_)) {
    blocks = block ? divide_up(size, block) : 0;
    pieces = block ? divide_up(block, most) : 0;
    step = pieces > 1 ? divide_up(block, pieces) : block ? most / block * block : 0;
  }
  int64_t count() const { return pieces > 1 ? blocks * pieces : step ? divide_up(size, step) : 0; }
};

struct Span {
  // the elements begin .. end - 1, of `blocks` blocks; none, if the last block has fewer pieces
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

// A matrix cut into items that hold whole blocks of it, or pieces of one row or column of blocks.
struct BlockGrid {
  Spans columns, rows;

  BlockGrid(int64_t n_out, int64_t n_in, int64_t block_rows, int64_t block_cols)
      : columns(n_in, block_cols, kTile),
        rows(n_out, block_rows, most_rows(columns.pieces > 1 ? columns.step : least(columns.step, n_in))) {}
  static int64_t most_rows(int64_t width) { return width && kItem / width > kBlock ? kItem / width : kBlock; }
  int64_t items() const { return rows.count() * columns.count(); }
  int64_t blocks() const { return rows.blocks * columns.blocks; }
};

template <int kBlockColumns, class G>
inline void repeat_each(const G* __restrict z, int64_t count, G* __restrict out) {
  for (int64_t b = 0; b < count; ++b)
    for (int k = 0; k < kBlockColumns; ++k) out[b * kBlockColumns + k] = z[b];
}

// The gates of one row of blocks, one per column of the span.
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

// Calls f(row of blocks, first row, end row) for each row of blocks in a span.
template <class F>
inline void each_block_row(const Spans& rows, const Span& span, F&& f) {
  for (int64_t b = 0; b < span.blocks; ++b) {
    const int64_t begin = b ? (span.block + b) * rows.block : span.begin;
    f(span.block + b, begin, least(span.end, (span.block + b + 1) * rows.block));
  }
}

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

// The sums of `count` runs of `run` values each, in order.
inline void sum_runs(const double* __restrict values, int64_t count, int64_t run, double* __restrict out) {
  for (int64_t b = 0; b < count; ++b) {
    double sum = values[b * run];
    for (int64_t k = 1; k < run; ++k) sum += values[b * run + k];
    out[b] = sum;
  }
}

// The sum over the columns of each block.
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
