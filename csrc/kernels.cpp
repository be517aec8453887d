// The CPU kernels. Compiled once per instruction set, with DAMPR_ISA (and DAMPR_AVX2 or DAMPR_AVX512) defined by the build.
//
// Work is cut into items of some rows times some columns whose sizes follow from the shape alone. Threads take items; sums over rows are formed
// in double per item and added up in the order of the items, so results do not depend on the number of threads.
#if defined(DAMPR_AVX512) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc's own AVX-512 header, bug 105593
#endif

#include "kernels.h"

#include <stdlib.h>

#include "gate_families.h"
#include "philox.h"
#include "storage.h"

#define DAMPR_JOIN_(a, b) a##b
#define DAMPR_JOIN(a, b) DAMPR_JOIN_(a, b)
#define DAMPR_TEXT_(a) #a
#define DAMPR_TEXT(a) DAMPR_TEXT_(a)

namespace dampr {
namespace {

constexpr int kTile = 2048;            // most columns of an item: what is kept per column has to stay in the caches (and on a small stack)
constexpr int kBlock = 32;             // fewest rows of an item: what is prepared per column is used at least this often
constexpr int64_t kItem = 32768;       // elements of an item, about, where columns are few
constexpr int64_t kSerial = 16384;     // below this many elements, waking threads costs more than it saves
constexpr int kLanes = 16;             // running sums of a row

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(0) .. f(items - 1), each once, on up to `threads` threads.
template <class F>
void parallel(int64_t items, int64_t elements, int threads, F&& f) {
  (void)threads, (void)elements;
#if defined(_OPENMP)
  const int64_t share = divide_up(items, 8 * static_cast<int64_t>(threads));  // taken at a time: enough for an even load, few fights over the counter
#pragma omp parallel for num_threads(threads) if (threads > 1 && items > 1 && elements >= kSerial) schedule(dynamic, share)
#endif
  for (int64_t item = 0; item < items; ++item) f(item);
}

// How a (rows, n) matrix is cut into items.
struct Grid {
  int64_t rows, n, tile, tiles, block, blocks;

  Grid(int64_t rows_, int64_t n_) : rows(rows_), n(n_) {
    tiles = divide_up(n, kTile);
    tile = tiles > 1 ? divide_up(divide_up(n, tiles), 64) * 64 : n;
    tiles = tile ? divide_up(n, tile) : 0;
    block = tile ? kItem / tile : 0;
    block = block > kBlock ? block : kBlock;
    blocks = n ? divide_up(rows, block) : 0;
  }
  int64_t items() const { return tiles * blocks; }
};

struct Item {
  int64_t tile_index, block_index, row, row_end, column;
  int width;

  Item(const Grid& g, int64_t index)
      : tile_index(index % g.tiles), block_index(index / g.tiles), row(block_index * g.block), row_end(least(row + g.block, g.rows)),
        column(tile_index * g.tile), width(static_cast<int>(least(g.tile, g.n - column))) {}
};

// What a gate keeps per column. A chunk may run over the ends of whole rows, hence the repetition of the first columns behind the last.
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

// Calls f(first gate index, count, column in the tile, noise) for runs of at most kChunk consecutive gates, which cover the item.
template <bool kDrawn, class F>
void sweep(const Grid& grid, const Item& item, uint64_t seed, F&& f) {
  alignas(64) uint32_t words[kWordBuffer];
  alignas(64) float u[kChunk];
  const bool whole_rows = item.width == grid.n;
  const int64_t runs = whole_rows ? 1 : item.row_end - item.row;
  for (int64_t run = 0; run < runs; ++run) {
    int64_t first = (item.row + run) * grid.n + item.column;
    const int64_t end = whole_rows ? item.row_end * grid.n : first + item.width;
    for (int column = 0; first < end;) {
      const int count = static_cast<int>(least(end, first / 4 * 4 + kChunk) - first);
      if constexpr (kDrawn) words_to_uniform(draw_words(seed, first, count, words), count, u);
      f(first, count, column, static_cast<const float*>(u));
      first += count;
      column = (column + count) % item.width;
    }
  }
}

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

// Sums over one side of a grid: an item stores its own, finish() adds them up. With a single part nothing is kept in between.
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

template <class Gate, class G, bool kTimesX>
inline void forward_chunk(const Gate& gate, const G* __restrict p, const G* __restrict q, const float* __restrict u, const G* __restrict x,
                          G* __restrict out, int count) {
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    const G z = gate.at(p[j], q[j], u[j]).z;
    out[j] = kTimesX ? x[j] * z : z;
  }
}

template <class T, class Gate, bool kTimesX>
void rows_forward(const Gate& gate, const RowsForward& a, int threads) {
  using G = typename Gate::Value;
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  const Grid grid(a.rows, a.n);
  parallel(grid.items(), a.rows * a.n, threads, [&](int64_t index) {
    const Item item(grid, index);
    Columns<Gate> columns;
    alignas(64) G x_buffer[kChunk];
    alignas(64) G out_buffer[kChunk];
    columns.prepare(gate, static_cast<const G*>(a.log_alpha) + item.column, item.width);
    sweep<Gate::kDrawn>(grid, item, a.seed, [&](int64_t first, int count, int column, const float* u) {
      const G* xs = kTimesX ? Storage<T>::read(x + first, x_buffer, count) : x_buffer;
      G* target = Storage<T>::stage(out + first, out_buffer);
      forward_chunk<Gate, G, kTimesX>(gate, columns.p + column, columns.q + column, u, xs, target, count);
      Storage<T>::commit(target, out + first, count);
    });
  });
}

template <class Gate, class G, bool kTimesX>
inline void backward_chunk(const Gate& gate, const G* __restrict p, const G* __restrict q, const float* __restrict u, const G* __restrict x,
                           const G* __restrict g, G* __restrict dx, G* __restrict xz, G* __restrict dlog_alpha, int count) {
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

// sums[column ...] += values, going back to the first column behind the last.
template <class G>
inline void add_to_columns(const G* __restrict values, int count, int column, int width, double* __restrict sums) {
  for (int j = 0; j < count; column = 0) {
    const int run = static_cast<int>(least(count - j, width - column));
    for (int k = 0; k < run; ++k) sums[column + k] += static_cast<double>(values[j + k]);
    j += run;
  }
}

template <class T, class Gate, bool kTimesX>
bool rows_backward(const Gate& gate, const RowsBackward& a, int threads) {
  using G = typename Gate::Value;
  const T *x = static_cast<const T*>(a.x), *g = static_cast<const T*>(a.g);
  T *dx = static_cast<T*>(a.dx), *xz = static_cast<T*>(a.xz);
  const Grid grid(a.rows, a.n);
  const Partial<G> total(a.dlog_alpha, grid.blocks, a.n);
  if (!total.ready()) return false;
  parallel(grid.items(), a.rows * a.n, threads, [&](int64_t index) {
    const Item item(grid, index);
    Columns<Gate> columns;
    alignas(64) double sums[kTile];
    alignas(64) G x_buffer[kChunk], g_buffer[kChunk], dx_buffer[kChunk], xz_buffer[kChunk], slopes[kChunk];
    columns.prepare(gate, static_cast<const G*>(a.log_alpha) + item.column, item.width);
    for (int j = 0; j < item.width; ++j) sums[j] = 0;
    sweep<Gate::kDrawn>(grid, item, a.seed, [&](int64_t first, int count, int column, const float* u) {
      const G* xs = kTimesX ? Storage<T>::read(x + first, x_buffer, count) : x_buffer;
      const G* gs = Storage<T>::read(g + first, g_buffer, count);
      G* dx_target = dx ? Storage<T>::stage(dx + first, dx_buffer) : dx_buffer;
      G* xz_target = xz ? Storage<T>::stage(xz + first, xz_buffer) : xz_buffer;
      backward_chunk<Gate, G, kTimesX>(gate, columns.p + column, columns.q + column, u, xs, gs, dx_target, xz_target, slopes, count);
      if (dx) Storage<T>::commit(dx_target, dx + first, count);
      if (xz) Storage<T>::commit(xz_target, xz + first, count);
      if (a.dlog_alpha) add_to_columns(slopes, count, column, item.width, sums);
    });
    if (a.dlog_alpha) total.store(item.block_index, item.column, sums, item.width);
  });
  total.finish(threads);
  return true;
}

// The gates of a run of columns as an array; ones where there is no gate.
template <class G>
inline const G* gates_or_ones(const void* z, int64_t column, int count, G* buffer) {
  if (z) return static_cast<const G*>(z) + column;
  for (int j = 0; j < count; ++j) buffer[j] = 1;
  return buffer;
}
template <class G>
inline G gate_or_one(const void* z, int64_t row) {
  return z ? static_cast<const G*>(z)[row] : G(1);
}

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

// The sum of count values: kLanes running sums in double, added up pairwise.
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

template <class T, class W>
bool fold_backward(const FoldBackward& a, int threads) {
  using G = typename Storage<W>::Gate;
  const T* g = static_cast<const T*>(a.g);
  const W* w = static_cast<const W*>(a.w);
  W* dw = static_cast<W*>(a.dw);
  const Grid grid(a.n_out, a.n_in);
  const Partial<G> rows(a.dz_out, grid.tiles, a.n_out), columns(a.dz_in, grid.blocks, a.n_in);
  if (!rows.ready() || !columns.ready()) return false;
  parallel(grid.items(), a.n_out * a.n_in, threads, [&](int64_t index) {
    const Item item(grid, index);
    alignas(64) double sums[kTile];
    alignas(64) G ones[kTile], g_buffer[kTile], w_buffer[kTile], dw_buffer[kTile], products[kTile];
    const G* __restrict z_in = gates_or_ones(a.z_in, item.column, item.width, ones);
    for (int j = 0; j < item.width; ++j) sums[j] = 0;
    for (int64_t row = item.row; row < item.row_end; ++row) {
      const int64_t first = row * grid.n + item.column;
      const G z_out = gate_or_one<G>(a.z_out, row);
      const G* __restrict gs = Storage<T>::read(g + first, g_buffer, item.width);
      if (dw) {
        G* __restrict target = Storage<W>::stage(dw + first, dw_buffer);
#pragma omp simd
        for (int j = 0; j < item.width; ++j) target[j] = gs[j] * z_out * z_in[j];
        Storage<W>::commit(target, dw + first, item.width);
      }
      if (!a.dz_out && !a.dz_in) continue;
      const G* __restrict ws = Storage<W>::read(w + first, w_buffer, item.width);
#pragma omp simd
      for (int j = 0; j < item.width; ++j) {
        const G product = ws[j] * gs[j];
        products[j] = product * z_in[j];
        sums[j] += static_cast<double>(product * z_out);
      }
      if (a.dz_out) {
        const double sum = sum_row(products, item.width);
        rows.store(item.tile_index, row, &sum, 1);
      }
    }
    if (a.dz_in) columns.store(item.block_index, item.column, sums, item.width);
  });
  rows.finish(threads);
  columns.finish(threads);
  return true;
}

template <class T>
struct Tag {
  using Type = T;
};
template <class T>
struct Tag<const T&> {
  using Type = T;
};

template <class F>
inline void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case kFloat32: return f(Tag<float>());
    case kFloat64: return f(Tag<double>());
    case kBFloat16: return f(Tag<BFloat16>());
    case kFloat16: return f(Tag<Float16>());
  }
}

// Two dtypes that go together: both float64, or neither.
template <class A, class B, class F>
inline void with_matching(Tag<A> a, Tag<B> b, F& f) {
  if constexpr (sizeof(typename Storage<A>::Gate) == sizeof(typename Storage<B>::Gate)) f(a, b);
  (void)a, (void)b, (void)f;
}
template <class F>
inline void with_dtypes(DType first, DType second, F&& f) {
  with_dtype(first, [&](auto a) { with_dtype(second, [&](auto b) { with_matching(a, b, f); }); });
}

void philox_words_entry(uint64_t seed, int64_t start, int64_t count, uint32_t* out, int threads) {
  parallel(divide_up(count, kChunk), count, threads, [&](int64_t index) {
    alignas(64) uint32_t buffer[kWordBuffer];
    const int64_t first = index * kChunk;
    const int width = static_cast<int>(least(kChunk, count - first));
    const uint32_t* words = draw_words(seed, start + first, width, buffer);
    for (int j = 0; j < width; ++j) out[first + j] = words[j];
  });
}

void philox_uniform_entry(uint64_t seed, int64_t start, int64_t count, float* out, int threads) {
  parallel(divide_up(count, kChunk), count, threads, [&](int64_t index) {
    alignas(64) uint32_t buffer[kWordBuffer];
    const int64_t first = index * kChunk;
    const int width = static_cast<int>(least(kChunk, count - first));
    words_to_uniform(draw_words(seed, start + first, width, buffer), width, out + first);
  });
}

void rows_forward_entry(const GateSpec& spec, DType dtype, const RowsForward& a, int threads) {
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    with_gate<typename Storage<T>::Gate>(spec, [&](const auto& gate) {
      using Gate = typename Tag<decltype(gate)>::Type;
      if (a.x)
        rows_forward<T, Gate, true>(gate, a, threads);
      else
        rows_forward<typename Gate::Value, Gate, false>(gate, a, threads);  // z itself is never stored narrower than it is computed
    });
  });
}

bool rows_backward_entry(const GateSpec& spec, DType dtype, const RowsBackward& a, int threads) {
  bool done = false;
  with_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    with_gate<typename Storage<T>::Gate>(spec, [&](const auto& gate) {
      using Gate = typename Tag<decltype(gate)>::Type;
      done = a.x ? rows_backward<T, Gate, true>(gate, a, threads) : rows_backward<typename Gate::Value, Gate, false>(gate, a, threads);
    });
  });
  return done;
}

void fold_forward_entry(DType w, DType out, const FoldForward& a, int threads) {
  with_dtypes(w, out, [&](auto from, auto to) { fold_forward<typename decltype(from)::Type, typename decltype(to)::Type>(a, threads); });
}

bool fold_backward_entry(DType g, DType w, const FoldBackward& a, int threads) {
  bool done = false;
  with_dtypes(g, w, [&](auto from, auto to) { done = fold_backward<typename decltype(from)::Type, typename decltype(to)::Type>(a, threads); });
  return done;
}

constexpr Kernels kKernels = {DAMPR_TEXT(DAMPR_ISA), philox_words_entry,  philox_uniform_entry, rows_forward_entry,
                              rows_backward_entry,   fold_forward_entry, fold_backward_entry};

}  // namespace

const Kernels* DAMPR_JOIN(kernels_, DAMPR_ISA)() { return &kKernels; }

}  // namespace dampr
