// Kernels that move values and compute nothing: gather entries of one axis of a tensor (outer, n, inner), scatter them
// among zeros, transpose a matrix. T is any type of the size of an element.
#pragma once

#include <cstdint>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "work.h"

namespace dampr {
namespace {

// Calls f(first line, end line) for work items that together cover `lines` lines of `length` contiguous elements each.
// An item is a range of lines with about kItem elements in all.
template <class F>
void each_lines(int64_t lines, int64_t length, int threads, F&& f) {
  const int64_t block = length < kItem ? kItem / (length > 0 ? length : 1) : 1;
  parallel(divide_up(lines, block), lines * length, threads,
           [&](int64_t item) { f(item * block, least(lines, (item + 1) * block)); });
}

// out (outer, count, inner) = x[:, places] for x (outer, n, inner).
template <class T>
void gather(const Axis& a, int threads) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  if (a.inner == 0) return;
  if (a.inner == 1)
    each_lines(a.outer, a.count, threads, [&](int64_t line, int64_t end) {
      for (; line < end; ++line) {
        const T* __restrict from = x + line * a.n;
        T* __restrict to = out + line * a.count;
#pragma omp simd
        for (int64_t j = 0; j < a.count; ++j) to[j] = from[a.places[j]];
      }
    });
  else
    each_lines(a.outer * a.count, a.inner, threads, [&](int64_t line, int64_t end) {
      for (; line < end; ++line) {
        const int64_t from = line / a.count * a.n + a.places[line % a.count];
        memcpy(out + line * a.inner, x + from * a.inner, static_cast<size_t>(a.inner) * sizeof(T));
      }
    });
}

// out[:, places] = x (outer, count, inner), and zeros elsewhere in out (outer, n, inner). The output is written from
// front to back: source[j] is the entry of x that goes to index j, or -1. False if there is no memory.
template <class T>
bool scatter(const Axis& a, int threads) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  if (a.inner == 0) return true;
  int32_t* source = static_cast<int32_t*>(malloc(static_cast<size_t>(a.n + 1) * sizeof(int32_t)));
  if (!source) return false;
  for (int64_t j = 0; j < a.n; ++j) source[j] = -1;
  for (int64_t j = 0; j < a.count; ++j) source[a.places[j]] = static_cast<int32_t>(j);
  if (a.inner == 1)
    each_lines(a.outer, a.n, threads, [&](int64_t line, int64_t end) {
      for (; line < end; ++line) {
        const T* __restrict from = x + line * a.count;
        T* __restrict to = out + line * a.n;
#pragma omp simd
        for (int64_t j = 0; j < a.n; ++j) to[j] = source[j] < 0 ? T(0) : from[source[j]];
      }
    });
  else
    each_lines(a.outer * a.n, a.inner, threads, [&](int64_t line, int64_t end) {
      for (; line < end; ++line) {
        const int64_t from = source[line % a.n];
        const size_t bytes = static_cast<size_t>(a.inner) * sizeof(T);
        if (from < 0)
          memset(out + line * a.inner, 0, bytes);
        else
          memcpy(out + line * a.inner, x + (line / a.n * a.count + from) * a.inner, bytes);
      }
    });
  free(source);
  return true;
}

// Transposes one tile of kSide x kSide elements: reads it in whole rows, writes it in whole rows.
template <class T, int64_t kSide>
inline void transpose_tile(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  alignas(64) T tile[kSide][kSide], column[kSide];
  for (int64_t i = 0; i < kSide; ++i) memcpy(tile[i], from + i * from_stride, sizeof tile[i]);
  for (int64_t j = 0; j < kSide; ++j) {
    for (int64_t i = 0; i < kSide; ++i) column[i] = tile[i][j];
    memcpy(to + j * to_stride, column, sizeof column);
  }
}

// out (n, rows) = x^T of x (rows, n). The side of a tile is one cache line (64 bytes), so each line is read once and
// written once, as a whole. This matters if sizes are powers of two: all lines of a column then compete for the same
// few places of the cache, and a line that is only partly used would be evicted before the rest of it is.
template <class T>
void transpose(const T* x, T* out, int64_t rows, int64_t n, int threads) {
  constexpr int64_t kLine = 64 / sizeof(T), kStrip = 4 * kLine, kHigh = 16 * kLine;
  const int64_t strips = divide_up(n, kStrip);
  parallel(strips * divide_up(rows, kHigh), rows * n, threads, [&](int64_t item) {
    const int64_t left = item % strips * kStrip, right = least(n, left + kStrip), top = item / strips * kHigh,
                  bottom = least(rows, top + kHigh);
    for (int64_t row = top; row < bottom; row += kLine)
      for (int64_t column = left; column < right; column += kLine) {
        const int64_t high = least(kLine, bottom - row), wide = least(kLine, right - column);
        const T* from = x + row * n + column;
        T* to = out + column * rows + row;
        if (high == kLine && wide == kLine)
          transpose_tile<T, kLine>(from, n, to, rows);
        else
          for (int64_t j = 0; j < wide; ++j)
            for (int64_t i = 0; i < high; ++i) to[j * rows + i] = from[i * n + j];
      }
  });
}

}  // namespace
}  // namespace dampr
