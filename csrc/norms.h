// A batch norm followed by gates, and its gradients: y = act(z (gain (x - mean) rstd + bias)), with
// rstd = 1 / sqrt(var + eps) and act a ReLU or nothing, for a tensor (outer, middle, n, inner) whose channels are on n
// (kernels.h). mean, rstd, gain and bias have one value per channel, z one per channel or per (outer, channel).
//
// Forward: v = (x - mean) a + b with a = z gain rstd and b = z bias; y = act(v).
// Backward: dp = dy, or 0 where the ReLU cuts v off. Two sums for each gate, S0 = sum dp and S1 = sum dp (x - mean),
// give the gradients of gate, gain and bias, and the numbers c0 and c1 of dx = a dp + c0 + c1 (x - mean). c0 and c1 are
// 0 with running statistics. Derivation: docs/kernels.md. (In the Triton kernel, S1 has the factor rstd; here it has
// not.)
//
// Names in the code: scale = gain rstd of a channel; slope = a and shift = b of a gate; centre = the means of the
// columns at hand; total and product = sums of S0 and of S1. In norm_stats, shift is something else: the first element
// of a part.
//
// So each pass over x needs a few numbers per channel: vectors of them if channels lie side by side in memory
// (inner = 1, channels last), else one set for each run of `inner` elements. Every pass therefore has two bodies, which
// each_part calls. The second pass (parallel<true>) runs from back to front, because the elements that the first pass
// read last are still in the cache.
#pragma once

#include <cstdint>
#include <stdlib.h>

#include "gate_families.h"
#include "kernels.h"
#include "storage.h"
#include "work.h"

namespace dampr {
namespace {

// One number in place of a vector: every index returns it.
template <class G>
struct Same {
  G value;
  G operator[](int64_t) const { return value; }
};

// the most columns of an item: a few vectors of this length stay in the L1 cache while the rows are read
constexpr int kNarrow = 512;
constexpr int kFew = 4;  // rows that are read together, so that their running sums are loaded and stored once
// So a buffer of kTile elements holds kFew rows, or one piece of a run.

// How the tensor is divided into work items. With inner = 1 an item is a block of rows of one outer index, times a tile
// of columns. Else it is `group` runs of `inner` elements of one channel each. Items store partial sums: an outer index
// has `parts` rows of n sums, one for each channel.
struct NormGrid {
  int64_t outer, middle, n, inner, group, parts;
  Grid columns;

  explicit NormGrid(const Planes& a)
      : outer(a.per_outer ? a.outer : 1),
        middle(a.per_outer ? a.middle : a.outer * a.middle),
        n(a.n),
        inner(a.inner),
        columns(middle, n, kNarrow) {
    group = inner > 0 && inner < kItem ? kItem / inner : 1;
    parts = inner == 1 ? columns.blocks : middle;
  }
  int64_t elements() const { return outer * middle * n * inner; }
  int64_t items() const {
    return elements() == 0 ? 0 : inner == 1 ? outer * columns.items() : divide_up(outer * middle * n, group);
  }
  // The number of values of a channel.
  int64_t per_channel() const { return outer * middle * inner; }
  // The number of values of a channel that a part adds up.
  int64_t in_part(int64_t part) const {
    return inner == 1 ? least(columns.block, middle - part % parts * columns.block) : inner;
  }
};

// Calls, for what item `index` covers, rows(part, outer, first row, end row, first column, width) if inner = 1, else
// run(part, outer, channel, first element) for each run of `inner` elements.
template <class Rows, class Run>
void each_part(const NormGrid& grid, int64_t index, Rows&& rows, Run&& run) {
  if (grid.inner == 1) {
    const int64_t outer = index / grid.columns.items();
    const Item item(grid.columns, index % grid.columns.items());
    rows(outer * grid.parts + item.block_index, outer, outer * grid.middle + item.row,
         outer * grid.middle + item.row_end, item.column, item.width);
    return;
  }
  const int64_t begin = index * grid.group, end = least(begin + grid.group, grid.outer * grid.middle * grid.n);
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t part = plane / grid.n;
    run(part, part / grid.middle, plane % grid.n, plane * grid.inner);
  }
}

// Calls f(first, width) for pieces of at most kTile of `count` elements.
template <class F>
void each_tile(int64_t count, F&& f) {
  for (int64_t j = 0; j < count; j += kTile) f(j, static_cast<int>(least(kTile, count - j)));
}

// Two numbers for each part and channel, (parts, n) each, in double: the mean and the sum of squared distances from it,
// or S0 and S1. first is null if there is no memory.
struct NormSums {
  int64_t n;
  double *first, *second;

  NormSums(int64_t parts, int64_t n_) : n(n_) {
    const size_t count = static_cast<size_t>(parts * n_);
    first = static_cast<double*>(malloc((2 * count + 1) * sizeof(double)));
    second = first + count;
  }
  ~NormSums() { free(first); }
  NormSums(const NormSums&) = delete;
  NormSums& operator=(const NormSums&) = delete;
};

// Adds d and d * d, with d = value - shift, of `count` values to kLanes running sums each.
template <class G>
void add_shifted(const G* __restrict values, int count, double shift, double* __restrict lanes,
                 double* __restrict squares) {
  int j = 0;
  for (; j + kLanes <= count; j += kLanes)
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const double d = static_cast<double>(values[j + lane]) - shift;
      lanes[lane] += d, squares[lane] += d * d;
    }
  for (; j < count; ++j) {
    const double d = static_cast<double>(values[j]) - shift;
    lanes[j % kLanes] += d, squares[j % kLanes] += d * d;
  }
}

// Adds d and d * d, with d = value - shift, of R rows to the sums of each column.
template <int R, class G>
void add_rows(const G* const* xs, const double* __restrict shift, double* __restrict total, double* __restrict squares,
              int width) {
#pragma omp simd
  for (int j = 0; j < width; ++j) {
    double sum = 0, square = 0;
    for (int r = 0; r < R; ++r) {
      const double d = static_cast<double>(xs[r][j]) - shift[j];
      sum += d, square += d * d;
    }
    total[j] += sum, squares[j] += square;
  }
}

// The mean and the biased variance of each channel of a.x. False if there is no memory.
//
// First each part computes its mean and the sum of squared distances from it, from sums of x - shift with shift the
// first element of the part. Because shift is one of the values, x - shift is no larger than their spread, so even for
// a mean that is large against the spread almost no digits cancel. Then the parts are joined.
template <class X>
bool norm_stats(const Planes& a, void* mean_, void* var_, int threads) {
  using G = typename Storage<X>::Gate;
  const X* x = static_cast<const X*>(a.x);
  G *mean = static_cast<G*>(mean_), *var = static_cast<G*>(var_);
  const NormGrid grid(a);
  const int64_t n = grid.n, parts = grid.items() ? grid.outer * grid.parts : 0;
  NormSums sums(parts, n);
  if (!sums.first) return false;
  parallel(grid.items(), grid.elements(), threads, [&](int64_t index) {
    alignas(64) G buffer[kTile];
    each_part(
        grid, index,
        [&](int64_t part, int64_t, int64_t row, int64_t end, int64_t column, int width) {
          alignas(64) double shift[kNarrow], total[kNarrow], squares[kNarrow];
          const G* first = Storage<X>::read(x + row * n + column, buffer, width);
          for (int j = 0; j < width; ++j) shift[j] = static_cast<double>(first[j]), total[j] = squares[j] = 0;
          const double count = static_cast<double>(end - row);
          const G* xs[kFew];
          int64_t r = row;
          for (; r + kFew <= end; r += kFew) {
            for (int k = 0; k < kFew; ++k)
              xs[k] = Storage<X>::read(x + (r + k) * n + column, buffer + k * kNarrow, width);
            add_rows<kFew>(xs, shift, total, squares, width);
          }
          for (; r < end; ++r) {
            xs[0] = Storage<X>::read(x + r * n + column, buffer, width);
            add_rows<1>(xs, shift, total, squares, width);
          }
          for (int j = 0; j < width; ++j) {
            sums.first[part * n + column + j] = shift[j] + total[j] / count;
            sums.second[part * n + column + j] = squares[j] - total[j] * (total[j] / count);
          }
        },
        [&](int64_t part, int64_t, int64_t channel, int64_t first) {
          alignas(64) double lanes[kLanes] = {}, squares[kLanes] = {};
          const double shift = static_cast<double>(Storage<X>::read(x + first, buffer, 1)[0]),
                       count = static_cast<double>(grid.inner);
          each_tile(grid.inner, [&](int64_t j, int width) {
            add_shifted(Storage<X>::read(x + first + j, buffer, width), width, shift, lanes, squares);
          });
          const double total = sum_row(lanes, kLanes);
          sums.first[part * n + channel] = shift + total / count;
          sums.second[part * n + channel] = sum_row(squares, kLanes) - total * (total / count);
        });
  });
  // Join the parts in their order, by the update of Chan, Golub and LeVeque (1983).
  parallel(divide_up(n, kChunk), parts * n, threads, [&](int64_t index) {
    alignas(64) double centre[kChunk] = {}, spread[kChunk] = {};
    const int64_t column = index * kChunk, width = least(kChunk, n - column);
    double seen = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const double count = static_cast<double>(grid.in_part(part)), share = count / (seen + count);
      const double *means = sums.first + part * n + column, *squares = sums.second + part * n + column;
      for (int64_t j = 0; j < width; ++j) {
        const double gap = means[j] - centre[j];
        centre[j] += gap * share;
        spread[j] += squares[j] + gap * gap * (seen * share);
      }
      seen += count;
    }
    for (int64_t j = 0; j < width; ++j) {
      const double squared = seen > 0 ? spread[j] / seen : 0;
      mean[column + j] = static_cast<G>(centre[j]), var[column + j] = static_cast<G>(squared < 0 ? 0 : squared);
    }
  });
  return true;
}

// out = act((x - mean) * a + b), with act a ReLU if kRelu.
template <bool kRelu, class G, class V>
inline void normalise(const G* __restrict x, V mean, V a, V b, G* __restrict out, int width) {
#pragma omp simd
  for (int j = 0; j < width; ++j) {
    const G v = (x[j] - mean[j]) * a[j] + b[j];
    out[j] = kRelu && v < 0 ? G(0) : v;  // a NaN stays a NaN
  }
}

// dp of element j: g, or 0 where the ReLU cut the value off. distance: x - mean, the factor of dp in S1.
template <bool kRelu, class G, class V>
inline G let_through(G g, G x, const V& mean, const V& a, const V& b, int j, G& distance) {
  distance = x - mean[j];
  return kRelu && distance * a[j] + b[j] <= 0 ? G(0) : g;
}

// out = dx = a dp + c0 + c1 (x - mean).
template <bool kRelu, class G, class V>
inline void input_gradient(const G* __restrict g, const G* __restrict x, V mean, V a, V b, V c0, V c1,
                           G* __restrict out, int width) {
#pragma omp simd
  for (int j = 0; j < width; ++j) {
    G distance;
    const G dp = let_through<kRelu>(g[j], x[j], mean, a, b, j, distance);
    out[j] = dp * a[j] + c0[j] + c1[j] * distance;
  }
}

// Three vectors (n,) in one allocation: scale = gain * rstd of each channel, and c0 and c1 of the backward, zeros until
// norm_gate_finish sets them. scale is null if there is no memory.
template <class G>
struct NormColumns {
  G *scale, *c0, *c1;

  explicit NormColumns(const NormGate& a) {
    const int64_t n = a.planes.n;
    const G *var = static_cast<const G*>(a.var), *gain = static_cast<const G*>(a.gain);
    scale = static_cast<G*>(calloc(static_cast<size_t>(3 * n + 1), sizeof(G)));
    c0 = scale + n, c1 = c0 + n;
    if (scale)
      for (int64_t j = 0; j < n; ++j)
        scale[j] = (gain ? gain[j] : G(1)) * (G(1) / square_root(var[j] + static_cast<G>(a.eps)));
  }
  ~NormColumns() { free(scale); }
  NormColumns(const NormColumns&) = delete;
  NormColumns& operator=(const NormColumns&) = delete;
};

// Writes y to a.out, from the statistics in args. False if there is no memory.
template <bool kRelu, class X>
bool norm_gate_forward(const NormGate& args, int threads) {
  using G = typename Storage<X>::Gate;
  const Planes& a = args.planes;
  const X* x = static_cast<const X*>(a.x);
  X* out = static_cast<X*>(a.out);
  const G *z = static_cast<const G*>(a.z), *mean = static_cast<const G*>(args.mean),
          *bias = static_cast<const G*>(args.bias);
  const NormGrid grid(a);
  const NormColumns<G> columns(args);
  if (!columns.scale) return false;
  const int64_t n = grid.n, items = grid.items();
  parallel<true>(items, grid.elements(), threads, [&](int64_t index) {
    alignas(64) G x_buffer[kTile], out_buffer[kTile];
    each_part(
        grid, index,
        [&](int64_t, int64_t outer, int64_t row, int64_t end, int64_t column, int width) {
          alignas(64) G slope[kNarrow], shift[kNarrow];
          const G* gates = z + outer * n + column;
          for (int j = 0; j < width; ++j)
            slope[j] = gates[j] * columns.scale[column + j], shift[j] = bias ? gates[j] * bias[column + j] : G(0);
          const G *centre = mean + column, *slopes = slope, *shifts = shift;
          for (int64_t r = row; r < end; ++r) {
            X* to = out + r * n + column;
            G* target = Storage<X>::stage(to, out_buffer);
            normalise<kRelu>(Storage<X>::read(x + r * n + column, x_buffer, width), centre, slopes, shifts, target,
                             width);
            Storage<X>::commit(target, to, width);
          }
        },
        [&](int64_t, int64_t outer, int64_t channel, int64_t first) {
          const G gate = z[outer * n + channel];
          const Same<G> centre{mean[channel]}, slope{gate * columns.scale[channel]},
              shift{bias ? gate * bias[channel] : G(0)};
          each_tile(grid.inner, [&](int64_t j, int width) {
            X* to = out + first + j;
            G* target = Storage<X>::stage(to, out_buffer);
            normalise<kRelu>(Storage<X>::read(x + first + j, x_buffer, width), centre, slope, shift, target, width);
            Storage<X>::commit(target, to, width);
          });
        });
  });
  return true;
}

// Adds dp and dp * (x - mean) of R rows to S0 and S1 of each column. The R rows are added in the type of the gates, and
// their sum in double.
template <bool kRelu, int R, class G>
void add_products(const G* const* gs, const G* const* xs, const G* centre, const G* slope, const G* shift,
                  double* __restrict first, double* __restrict second, int width) {
#pragma omp simd
  for (int j = 0; j < width; ++j) {
    G total = 0, product = 0;
    for (int r = 0; r < R; ++r) {
      G distance;
      const G dp = let_through<kRelu>(gs[r][j], xs[r][j], centre, slope, shift, j, distance);
      total += dp, product += dp * distance;
    }
    first[j] += static_cast<double>(total), second[j] += static_cast<double>(product);
  }
}

// The first pass of the backward: S0 and S1 of each part and channel.
template <bool kRelu, class X, class G>
void norm_gate_sums(const NormGate& args, const NormGrid& grid, const G* scale, const NormSums& sums, int threads) {
  const Planes& a = args.planes;
  const X *x = static_cast<const X*>(a.x), *g = static_cast<const X*>(a.g);
  const G *z = static_cast<const G*>(a.z), *mean = static_cast<const G*>(args.mean),
          *bias = static_cast<const G*>(args.bias);
  const int64_t n = grid.n;
  parallel(grid.items(), grid.elements(), threads, [&](int64_t index) {
    alignas(64) G x_buffer[kTile], g_buffer[kTile];
    each_part(
        grid, index,
        [&](int64_t part, int64_t outer, int64_t row, int64_t end, int64_t column, int width) {
          alignas(64) G slope[kNarrow], shift[kNarrow];
          const G *gates = z + outer * n + column, *centre = mean + column;
          double* __restrict first = sums.first + part * n + column;
          double* __restrict second = sums.second + part * n + column;
          for (int j = 0; j < width; ++j) {
            slope[j] = gates[j] * scale[column + j], shift[j] = bias ? gates[j] * bias[column + j] : G(0);
            first[j] = second[j] = 0;
          }
          const G *slopes = slope, *shifts = shift;
          const G *xs[kFew], *gs[kFew];
          int64_t r = row;
          for (; r + kFew <= end; r += kFew) {
            for (int k = 0; k < kFew; ++k) {
              xs[k] = Storage<X>::read(x + (r + k) * n + column, x_buffer + k * kNarrow, width);
              gs[k] = Storage<X>::read(g + (r + k) * n + column, g_buffer + k * kNarrow, width);
            }
            add_products<kRelu, kFew>(gs, xs, centre, slopes, shifts, first, second, width);
          }
          for (; r < end; ++r) {
            xs[0] = Storage<X>::read(x + r * n + column, x_buffer, width),
            gs[0] = Storage<X>::read(g + r * n + column, g_buffer, width);
            add_products<kRelu, 1>(gs, xs, centre, slopes, shifts, first, second, width);
          }
        },
        [&](int64_t part, int64_t outer, int64_t channel, int64_t first) {
          alignas(64) G passed[kTile], products[kTile];
          const G gate = z[outer * n + channel];
          const Same<G> centre{mean[channel]}, slope{gate * scale[channel]}, shift{bias ? gate * bias[channel] : G(0)};
          double total = 0, product = 0;
          each_tile(grid.inner, [&](int64_t j, int width) {
            const G* __restrict xs = Storage<X>::read(x + first + j, x_buffer, width);
            const G* __restrict gs = Storage<X>::read(g + first + j, g_buffer, width);
#pragma omp simd
            for (int i = 0; i < width; ++i) {
              G distance;
              passed[i] = let_through<kRelu>(gs[i], xs[i], centre, slope, shift, i, distance);
              products[i] = passed[i] * distance;
            }
            total += sum_row(passed, width), product += sum_row(products, width);
          });
          sums.first[part * n + channel] = total, sums.second[part * n + channel] = product;
        });
  });
}

// Adds up S0 and S1 and computes from them dz, dgain and dbias; in training also c0 and c1, the part of dx that flows
// through mean and variance.
template <class G>
void norm_gate_finish(const NormGate& args, const NormGrid& grid, const NormColumns<G>& columns, const NormSums& sums,
                      int threads) {
  const Planes& a = args.planes;
  const G *z = static_cast<const G*>(a.z), *var = static_cast<const G*>(args.var),
          *bias = static_cast<const G*>(args.bias);
  G *dz = static_cast<G*>(a.dz), *dgain = static_cast<G*>(args.dgain), *dbias = static_cast<G*>(args.dbias);
  const int64_t n = grid.n, parts = grid.items() ? grid.parts : 0;
  const double count = static_cast<double>(grid.per_channel());
  parallel(divide_up(n, kChunk), grid.outer * (parts + 1) * n, threads, [&](int64_t index) {
    alignas(64) double total[kChunk] = {}, product[kChunk] = {};
    const int64_t column = index * kChunk, width = least(kChunk, n - column);
    for (int64_t outer = 0; outer < grid.outer; ++outer) {
      alignas(64) double s0[kChunk] = {}, s1[kChunk] = {};
      for (int64_t part = outer * parts; part < (outer + 1) * parts; ++part)
        for (int64_t j = 0; j < width; ++j)
          s0[j] += sums.first[part * n + column + j], s1[j] += sums.second[part * n + column + j];
      for (int64_t j = 0; j < width; ++j) {
        const int64_t i = column + j;
        const double gate = static_cast<double>(z[outer * n + i]);
        total[j] += gate * s0[j], product[j] += gate * s1[j];
        if (dz)
          dz[outer * n + i] = static_cast<G>(static_cast<double>(columns.scale[i]) * s1[j] +
                                             (bias ? static_cast<double>(bias[i]) * s0[j] : 0.0));
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      const int64_t i = column + j;
      const double rstd = static_cast<double>(G(1) / square_root(var[i] + static_cast<G>(args.eps))),
                   scale = static_cast<double>(columns.scale[i]);
      if (dbias) dbias[i] = static_cast<G>(total[j]);
      if (dgain) dgain[i] = static_cast<G>(product[j] * rstd);
      if (args.training && count > 0) {
        columns.c0[i] = static_cast<G>(-scale * total[j] / count);
        columns.c1[i] = static_cast<G>(-scale * rstd * rstd * product[j] / count);
      }
    }
  });
}

// The gradients of norm_gate_forward: sums first, if something needs them, then a second pass for dx. False if there is
// no memory.
template <bool kRelu, class X>
bool norm_gate_backward(const NormGate& args, int threads) {
  using G = typename Storage<X>::Gate;
  const Planes& a = args.planes;
  const NormGrid grid(a);
  const NormColumns<G> columns(args);
  if (!columns.scale) return false;
  const int64_t n = grid.n, items = grid.items();
  if (a.dz || args.dgain || args.dbias || args.training) {
    const NormSums sums(items ? grid.outer * grid.parts : 0, n);
    if (!sums.first) return false;
    norm_gate_sums<kRelu, X>(args, grid, columns.scale, sums, threads);
    norm_gate_finish(args, grid, columns, sums, threads);
  }
  if (!a.out) return true;
  const X *x = static_cast<const X*>(a.x), *g = static_cast<const X*>(a.g);
  X* out = static_cast<X*>(a.out);
  const G *z = static_cast<const G*>(a.z), *mean = static_cast<const G*>(args.mean),
          *bias = static_cast<const G*>(args.bias);
  parallel<true>(items, grid.elements(), threads, [&](int64_t index) {
    alignas(64) G x_buffer[kTile], g_buffer[kTile], out_buffer[kTile];
    each_part(
        grid, index,
        [&](int64_t, int64_t outer, int64_t row, int64_t end, int64_t column, int width) {
          alignas(64) G slope[kNarrow], shift[kNarrow];
          const G* gates = z + outer * n + column;
          for (int j = 0; j < width; ++j)
            slope[j] = gates[j] * columns.scale[column + j], shift[j] = bias ? gates[j] * bias[column + j] : G(0);
          const G *centre = mean + column, *slopes = slope, *shifts = shift, *c0 = columns.c0 + column,
                  *c1 = columns.c1 + column;
          for (int64_t r = row; r < end; ++r) {
            X* to = out + r * n + column;
            G* target = Storage<X>::stage(to, out_buffer);
            const G* xs = Storage<X>::read(x + r * n + column, x_buffer, width);
            input_gradient<kRelu>(Storage<X>::read(g + r * n + column, g_buffer, width), xs, centre, slopes, shifts, c0,
                                  c1, target, width);
            Storage<X>::commit(target, to, width);
          }
        },
        [&](int64_t, int64_t outer, int64_t channel, int64_t first) {
          const G gate = z[outer * n + channel];
          const Same<G> centre{mean[channel]}, slope{gate * columns.scale[channel]},
              shift{bias ? gate * bias[channel] : G(0)};
          const Same<G> c0{columns.c0[channel]}, c1{columns.c1[channel]};
          each_tile(grid.inner, [&](int64_t j, int width) {
            X* to = out + first + j;
            G* target = Storage<X>::stage(to, out_buffer);
            const G* xs = Storage<X>::read(x + first + j, x_buffer, width);
            input_gradient<kRelu>(Storage<X>::read(g + first + j, g_buffer, width), xs, centre, slope, shift, c0, c1,
                                  target, width);
            Storage<X>::commit(target, to, width);
          });
        });
  });
  return true;
}

}  // namespace
}  // namespace dampr
