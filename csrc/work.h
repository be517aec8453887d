// How work is divided between threads. A matrix is cut into items, each some rows times some columns, whose sizes
// depend on the shape alone. Each thread takes consecutive items. Sums over rows are formed in double for each item (in
// norms.h for four rows at a time in their own type) and added in the order of the items, so results do not depend on
// the number of threads.
#pragma once

#include <cstdint>
#include <stdlib.h>

#include "gate_families.h"
#include "philox.h"

namespace dampr {
namespace {

// The most columns of an item: the values kept for each column have to stay in the caches and on a small stack.
constexpr int kTile = 2048;
// The fewest rows of an item: the values prepared for each column are used at least this often.
constexpr int kBlock = 32;
constexpr int64_t kItem = 32768;    // about this many elements in an item with few columns
constexpr int64_t kSerial = 16384;  // below this many elements, waking threads costs more than it saves

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(0) .. f(items - 1), each once, on up to `threads` threads. Each thread takes a run of consecutive items, from
// its start or, if kBackwards, from its end. elements: the elements of the matrix; small ones run on one thread.
template <bool kBackwards = false, class F>
void parallel(int64_t items, int64_t elements, int threads, F&& f) {
  (void)elements;
  // All threads or one: libgomp ends the threads that a smaller team does not use.
  const int team = items > 1 && elements >= kSerial ? threads : 1;
#if defined(_OPENMP)
  // One run of items for each thread, like torch's own loops: a thread then finds what it wrote in the last pass in its
  // own part of the cache.
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
#endif
  for (int run = 0; run < team; ++run) {
    const int64_t begin = items * run / team, end = items * (run + 1) / team;
    for (int64_t i = begin; i < end; ++i) f(kBackwards ? begin + end - 1 - i : i);
  }
}

// How a (rows, n) matrix is cut into items: `tiles` tiles of `tile` columns times `blocks` blocks of `block` rows.
struct Grid {
  int64_t rows, n, tile, tiles, block, blocks;

  Grid(int64_t rows_, int64_t n_, int64_t widest = kTile) : rows(rows_), n(n_) {
    tiles = divide_up(n, widest);
    tile = tiles > 1 ? divide_up(divide_up(n, tiles), 64) * 64 : n;
    tiles = tile ? divide_up(n, tile) : 0;
    block = tile ? kItem / tile : 0;
    block = block > kBlock ? block : kBlock;
    blocks = n ? divide_up(rows, block) : 0;
  }
  int64_t items() const { return tiles * blocks; }
};

// One item of a Grid: the rows row .. row_end - 1 and `width` columns from `column` on.
struct Item {
  int64_t tile_index, block_index, row, row_end, column;
  int width;

  Item(const Grid& g, int64_t index)
      : tile_index(index % g.tiles),
        block_index(index / g.tiles),
        row(block_index * g.block),
        row_end(least(row + g.block, g.rows)),
        column(tile_index * g.tile),
        width(static_cast<int>(least(g.tile, g.n - column))) {}
};

// The values that a gate type prepares for each column of an item (gate_families.h). A chunk of kChunk gates may run
// over the end of a row into the next one, so the first columns are repeated after the last.
template <class Gate>
struct Columns {
  using G = typename Gate::Value;
  alignas(64) G p[kTile + kChunk];
  alignas(64) G q[kTile + kChunk];

  void prepare(const Gate& gate, const G* log_alpha, int width) {
    gate.prepare(log_alpha, p, q, width);
    for (int j = 0; j < kChunk; ++j) p[width + j] = p[j], q[width + j] = q[j];
  }
};

// Calls f(first gate, count, column, u) for runs of at most kChunk consecutive gates that together cover the item.
// Gates are numbered row by row through the whole matrix. column: the column of the first gate within the item. u: the
// noise of the gates if kDrawn; gate i has the noise of index start + i. Each run but the last ends at a noise index
// that is a multiple of 4, because Philox makes four words at a time. If the item has whole rows, a run may go on into
// the next row.
template <bool kDrawn, class F>
void sweep(const Grid& grid, const Item& item, uint64_t seed, int64_t start, F&& f) {
  alignas(64) uint32_t words[kWordBuffer];
  alignas(64) float u[kChunk];
  const bool whole_rows = item.width == grid.n;
  const int64_t runs = whole_rows ? 1 : item.row_end - item.row;
  for (int64_t run = 0; run < runs; ++run) {
    int64_t first = (item.row + run) * grid.n + item.column;
    const int64_t end = whole_rows ? item.row_end * grid.n : first + item.width;
    for (int column = 0; first < end;) {
      const int count = static_cast<int>(least(end, (start + first) / 4 * 4 + kChunk - start) - first);
      if constexpr (kDrawn) words_to_uniform(draw_words(seed, start + first, count, words), count, u);
      f(first, count, column, static_cast<const float*>(u));
      first += count;
      column = (column + count) % item.width;
    }
  }
}

// Writes `count` sums to out, rounded to G.
template <class G>
void write_sums(const double* sums, G* out, int64_t count) {
  for (int64_t j = 0; j < count; ++j) out[j] = static_cast<G>(sums[j]);
}

// out[i] = parts[0][i] + parts[1][i] + ..., in this order; parts: (count, n).
template <class G>
void add_parts(const double* parts, int64_t count, int64_t n, G* out, int threads) {
  parallel(divide_up(n, kChunk), count * n, threads, [&](int64_t index) {
    alignas(64) double sums[kChunk];
    const int64_t column = index * kChunk, width = least(kChunk, n - column);
    for (int64_t j = 0; j < width; ++j) sums[j] = 0;
    for (int64_t part = 0; part < count; ++part)
      for (int64_t j = 0; j < width; ++j) sums[j] += parts[part * n + column + j];
    write_sums(sums, out + column, width);
  });
}

// Sums over the items that lie along one dimension of a grid, n sums of `count` parts each. An item stores its part
// with store(); finish() adds the parts in their order. With one part, store() writes to `out` at once. A null `out`
// stores nothing.
template <class G>
struct Partial {
  G* out;
  int64_t count, n;
  double* parts = nullptr;

  Partial(void* out_, int64_t count_, int64_t n_) : out(static_cast<G*>(out_)), count(count_), n(n_) {
    if (out && count > 1) parts = static_cast<double*>(malloc(static_cast<size_t>(count * n) * sizeof(double)));
  }
  ~Partial() { free(parts); }
  Partial(const Partial&) = delete;
  Partial& operator=(const Partial&) = delete;

  bool ready() const { return !out || count <= 1 || parts; }
  void store(int64_t part, int64_t column, const double* sums, int64_t width) const {
    if (parts)
      for (int64_t j = 0; j < width; ++j) parts[part * n + column + j] = sums[j];
    else
      write_sums(sums, out + column, width);
  }
  void finish(int threads) const {
    if (!out) return;
    if (count == 0)
      for (int64_t j = 0; j < n; ++j) out[j] = 0;
    else if (parts)
      add_parts(parts, count, n, out, threads);
  }
};

constexpr int kLanes = 16;  // the number of running sums in sum_row

// The sum of `count` values: kLanes running sums in double, which are then added pairwise.
template <class G>
inline double sum_row(const G* __restrict values, int count) {
  alignas(64) double lanes[kLanes] = {};
  int j = 0;
  for (; j + kLanes <= count; j += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(values[j + lane]);
  for (; j < count; ++j) lanes[j % kLanes] += static_cast<double>(values[j]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

}  // namespace
}  // namespace dampr
