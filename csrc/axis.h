// Values that are moved, never computed, so that a type is a size: some entries of one axis of a tensor (outer, n,
// inner), picked out or put back among zeros, and a matrix transposed.
#pragma once

#include <cstdint>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "work.h"

namespace dampr {
namespace {

// Calls f(first, end) for the lines of each item: `lines` lines of `length` elements, cut so that an item has about
// kItem of these.
template <class F>
void each_lines(int64_t lines, int64_t length, int threads, F&& f) {
  const int64_t block = length < kItem ? kItem / (length > 0 ? length : 1) : 1;
  parallel(divide_up(lines, block), lines * length, threads,
           [&](int64_t item) { f(item * block, least(lines, (item + 1) * block)); });
}

// out (outer, count, inner) = x[:, places]
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

// out (outer, n, inner): x (outer, count, inner) at places, zeros elsewhere. Written in order, whatever the places:
// source[j] is what comes to j.
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

// A square of kSide x kSide: whole lines in and out, columns gathered in between.
template <class T, int64_t kSide>
inline void transpose_tile(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  alignas(64) T tile[kSide][kSide], column[kSide];
  for (int64_t i = 0; i < kSide; ++i) memcpy(tile[i], from + i * from_stride, sizeof tile[i]);
  for (int64_t j = 0; j < kSide; ++j) {
    for (int64_t i = 0; i < kSide; ++i) column[i] = tile[i][j];
    memcpy(to + j * to_stride, column, sizeof column);
  }
}

// out (n, rows) = x^T of x (rows, n). A tile is as high and as wide as a line of the cache is long: each line is read
// once and written once, in one go. Where sizes are powers of two the lines of a column share a set of the cache, and
// those that are only half done with would drive each other out.
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
