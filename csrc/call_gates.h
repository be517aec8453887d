// The functions that bindings.cpp exports for gates alone and for rows or weights with gates. Each checks its
// arguments, fills a struct of kernels.h and calls the kernel without the GIL. An error names the argument.
//
// In all of them: an Address is that of a contiguous tensor, 0 if it is absent; log_alpha: (n,), float32 or, next to
// float64, float64; seed_ptr: one int64, read only if the spec draws; gate j of row m uses the noise of index start + m
// * n + j; threads: the most threads to use.
#pragma once

#include <vector>

#include "arguments.h"
#include "isa.h"

namespace dampr {
namespace {

// Checks the arguments of the two functions below and calls function(seed, start, count, out, threads).
template <class T, class F>
void philox(Address seed_ptr, int64_t start, int64_t count, const char* out_name, Address out, int64_t threads,
            F function) {
  if (start < 0) reject("start", std::to_string(start), "a gate index, 0 or more");
  if (count < 0 || start > std::numeric_limits<int64_t>::max() - count - 1024)
    reject("count", std::to_string(count), "a size that keeps indices below 2^63");
  const int team = check_threads(threads);
  T* target = required<T>(out_name, out, count);
  const uint64_t seed = read_seed(seed_ptr);
  without_gil([&] { return function(seed, start, count, target, team), true; });
}

// out: the random words of the indices start .. start + count - 1, uint32.
void philox_words(Address seed_ptr, int64_t start, int64_t count, Address out, int64_t threads) {
  philox<uint32_t>(seed_ptr, start, count, "out_u32_ptr", out, threads, kernels().philox_words);
}

// out: the uniform numbers of the indices start .. start + count - 1, float32 in (0, 1).
void philox_uniform(Address seed_ptr, int64_t start, int64_t count, Address out, int64_t threads) {
  philox<float>(seed_ptr, start, count, "out_f32_ptr", out, threads, kernels().philox_uniform);
}

// out = x * z, (rows, n), with a draw of the n gates for each row; out = z if x is absent. from, to: the dtypes of x
// and out. out_name: the name of out in errors.
void rows_forward(const py::tuple& spec, DType from, DType to, Address x, int64_t rows, int64_t n, Address log_alpha,
                  Address seed_ptr, const char* out_name, Address out, int64_t threads, int64_t start = 0) {
  const Kernels& k = kernels();
  const GateSpec s = check_spec(spec);
  check_sizes("rows", rows, "n", n);
  check_start(start, rows * n);
  const int team = check_threads(threads);
  RowsForward a{};
  a.x = pointer<const void>(x), a.log_alpha = required<const void>("log_alpha", log_alpha, n);
  required<void>(out_name, out, rows * n);
  a.out = output(out, rows * n, to, team);
  a.rows = rows, a.n = n, a.seed = s.rule == kSample ? read_seed(seed_ptr) : 0, a.start = start;
  without_gil([&] { return k.rows_forward(s, from, to, a, team), true; });
}

// The gradients of rows_forward for the gradient g of out, with the same draw: dx = g * z, xz = x * z, and dlog_alpha =
// the sum over rows of x * g * dz/dlog_alpha, with x = 1 if it is absent. Absent outputs are not computed. from, to:
// the dtypes of g and of x, dx, xz. g_name: the name of g in errors.
void rows_backward(const py::tuple& spec, DType from, DType to, Address x, const char* g_name, Address g, int64_t rows,
                   int64_t n, Address log_alpha, Address seed_ptr, Address dx, Address xz, Address dlog_alpha,
                   int64_t threads, int64_t start = 0) {
  const Kernels& k = kernels();
  const GateSpec s = check_spec(spec);
  check_sizes("rows", rows, "n", n);
  check_start(start, rows * n);
  const int team = check_threads(threads);
  RowsBackward a{};
  a.x = pointer<const void>(x), a.g = required<const void>(g_name, g, rows * n),
  a.log_alpha = required<const void>("log_alpha", log_alpha, n);
  a.dx = output(dx, rows * n, to, team), a.xz = output(xz, rows * n, to, team),
  a.dlog_alpha = output(dlog_alpha, n, to == kFloat64 ? kFloat64 : kFloat32, team);
  a.rows = rows, a.n = n, a.seed = s.rule == kSample ? read_seed(seed_ptr) : 0, a.start = start;
  without_gil([&] { return k.rows_backward(s, from, to, a, team); });
}

// Returns how many of n gates are not 0. If `places` is given, (length,) int32, it gets the indices of all open gates
// and of as many closed gates as are needed to fill it, in increasing order.
int64_t open_gates(const py::tuple& spec, int dtype, Address log_alpha, Address seed_ptr, int64_t n, Address places,
                   int64_t length) {
  const DType gate = check_dtype("dtype", dtype, true);
  check_sizes("n", n, "rows", 1);
  if (n > std::numeric_limits<int32_t>::max()) reject("n", std::to_string(n), "fewer than 2^31 gates");
  if (places && (length < 0 || length > n))
    reject("length", std::to_string(length), "0 to " + std::to_string(n) + ", the number of gates");
  required<const void>("log_alpha", log_alpha, n), check_spec(spec);  // before there is memory to be had
  std::vector<double> room(static_cast<size_t>(n));                   // of either dtype
  rows_forward(spec, gate, gate, 0, 1, n, log_alpha, seed_ptr, "z", reinterpret_cast<Address>(room.data()), 1);
  const auto is_open = [&](int64_t j) {
    return gate == kFloat64 ? room[static_cast<size_t>(j)] != 0 : reinterpret_cast<const float*>(room.data())[j] != 0;
  };
  int64_t open = 0;
  for (int64_t j = 0; j < n; ++j) open += is_open(j);
  if (!places) return open;
  if (length < open)
    reject("length", std::to_string(length), std::to_string(open) + " or more, the number of open gates");
  int64_t others = length - open;
  int32_t* next = pointer<int32_t>(places);
  for (int64_t j = 0; j < n; ++j)
    if (is_open(j) || others-- > 0) *next++ = static_cast<int32_t>(j);
  return open;
}

// z (rows, n), with a draw for each row. dtype: that of log_alpha and z.
void gates_fwd(const py::tuple& spec, int dtype, Address log_alpha, Address seed_ptr, int64_t rows, int64_t n,
               Address z, int64_t threads, int64_t start) {
  const DType checked = check_dtype("dtype", dtype, true);
  rows_forward(spec, checked, checked, 0, rows, n, log_alpha, seed_ptr, "z", z, threads, start);
}

// dlog_alpha (n,) for the gradient dz (rows, n) of z; x, dx and xz of rows_backward are absent.
void gates_bwd(const py::tuple& spec, int dtype, Address log_alpha, Address seed_ptr, int64_t rows, int64_t n,
               Address dz, Address dlog_alpha, int64_t threads, int64_t start) {
  const DType checked = check_dtype("dtype", dtype, true);
  required<void>("dlog_alpha", dlog_alpha, n);
  rows_backward(spec, checked, checked, 0, "dz", dz, rows, n, log_alpha, seed_ptr, 0, 0, dlog_alpha, threads, start);
}

// out = x * z, (rows, n), with a draw for each row. dtype: that of x and out.
void gate_rows_fwd(const py::tuple& spec, int dtype, Address x, int64_t rows, int64_t n, Address log_alpha,
                   Address seed_ptr, Address out, int64_t threads) {
  const DType checked = check_dtype("dtype", dtype);
  check_sizes("rows", rows, "n", n);
  required<void>("x", x, rows * n);
  rows_forward(spec, checked, checked, x, rows, n, log_alpha, seed_ptr, "out", out, threads);
}

// dx = g * z, xz = x * z and dlog_alpha for the gradient g (rows, n) of gate_rows_fwd.
void gate_rows_bwd(const py::tuple& spec, int dtype, Address x, Address g, int64_t rows, int64_t n, Address log_alpha,
                   Address seed_ptr, Address dx, Address xz, Address dlog_alpha, int64_t threads) {
  const DType checked = check_dtype("dtype", dtype);
  check_sizes("rows", rows, "n", n);
  required<void>("x", x, rows * n);
  rows_backward(spec, checked, checked, x, "g", g, rows, n, log_alpha, seed_ptr, dx, xz, dlog_alpha, threads);
}

// out = w * z with a gate for each of `count` weights.
void gate_weights_fwd(const py::tuple& spec, int w_dtype, int out_dtype, Address w, int64_t count, Address log_alpha,
                      Address seed_ptr, Address out, int64_t threads) {
  const DType from = check_dtype("w_dtype", w_dtype), to = check_dtype("out_dtype", out_dtype);
  check_same_gates("w_dtype", from, "out_dtype", to);
  check_sizes("count", count, "rows", 1);
  required<void>("w", w, count);
  rows_forward(spec, from, to, w, 1, count, log_alpha, seed_ptr, "out", out, threads);
}

// dw = g * z, folded = w * z and dlog_alpha for the gradient g of gate_weights_fwd.
void gate_weights_bwd(const py::tuple& spec, int g_dtype, int w_dtype, Address g, Address w, int64_t count,
                      Address log_alpha, Address seed_ptr, Address dw, Address dlog_alpha, int64_t threads,
                      Address folded) {
  const DType from = check_dtype("g_dtype", g_dtype), to = check_dtype("w_dtype", w_dtype);
  check_same_gates("g_dtype", from, "w_dtype", to);
  check_sizes("count", count, "rows", 1);
  required<void>("w", w, count);
  rows_backward(spec, from, to, w, "g", g, 1, count, log_alpha, seed_ptr, dw, folded, dlog_alpha, threads);
}

}  // namespace
}  // namespace dampr
