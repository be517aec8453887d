// The functions that bindings.cpp exports for one axis of a tensor: gather and scatter entries, multiply by gates, and
// transpose a matrix. Each checks its arguments and calls the kernel without the interpreter lock.
#pragma once

#include "arguments.h"
#include "isa.h"

namespace dampr {
namespace {

// Checks the arguments of gather and scatter and returns them as an Axis. n_x, n_out: the entries of x and of out along
// the axis; places (count,), int32: indices in [0, n).
Axis check_axis(DType dtype, Address x, int64_t n_x, int64_t outer, int64_t n, int64_t inner, Address places,
                int64_t count, Address out, int64_t n_out, int team) {
  check_sizes("outer", outer, "n", n), check_sizes("inner", inner, "outer * n", outer * n);
  if (count < 0 || count > n || n > std::numeric_limits<int32_t>::max())
    reject("count", std::to_string(count), "0 to n=" + std::to_string(n) + ", below 2^31");
  const int32_t* first = required<const int32_t>("places", places, count);
  for (int64_t j = 0; j < count; ++j)
    if (first[j] < 0 || first[j] >= n) reject("places", std::to_string(first[j]), "0 to " + std::to_string(n - 1));
  required<void>("out", out, outer * n_out * inner);
  return {required<const void>("x", x, outer * n_x * inner),
          output(out, outer * n_out * inner, dtype, team),
          first,
          outer,
          n,
          count,
          inner};
}

// out (outer, count, inner) = x[:, places] for x (outer, n, inner).
void gather(int dtype, Address x, int64_t outer, int64_t n, int64_t inner, Address places, int64_t count, Address out,
            int64_t threads) {
  const Kernels& k = kernels();
  const int team = check_threads(threads);
  const DType checked = check_dtype("dtype", dtype);
  const Axis a = check_axis(checked, x, n, outer, n, inner, places, count, out, count, team);
  without_gil([&] { return k.gather(checked, a, team), true; });
}

// out[:, places] = x (outer, count, inner), and zeros elsewhere in out (outer, n, inner).
void scatter(int dtype, Address x, int64_t outer, int64_t n, int64_t inner, Address places, int64_t count, Address out,
             int64_t threads) {
  const Kernels& k = kernels();
  const int team = check_threads(threads);
  const DType checked = check_dtype("dtype", dtype);
  const Axis a = check_axis(checked, x, count, outer, n, inner, places, count, out, n, team);
  without_gil([&] { return k.scatter(checked, a, team); });
}

// out (n, rows) = x^T of x (rows, n).
void transpose(int dtype, Address x, int64_t rows, int64_t n, Address out, int64_t threads) {
  const Kernels& k = kernels();
  const int team = check_threads(threads);
  const DType checked = check_dtype("dtype", dtype);
  check_sizes("rows", rows, "n", n);
  const void* from = required<const void>("x", x, rows * n);
  required<void>("out", out, rows * n);
  void* to = output(out, rows * n, checked, team);
  without_gil([&] { return k.transpose(checked, from, to, rows, n, team), true; });
}

// Checks the four sizes of a tensor (outer, middle, n, inner).
void check_shape(int64_t outer, int64_t middle, int64_t n, int64_t inner) {
  check_sizes("outer", outer, "middle", middle), check_sizes("n", n, "inner", inner),
      check_sizes("outer", outer * middle, "n", n * inner);
}

// Checks a tensor (outer, middle, n, inner) and the gates z of its axis n, (n,) or (outer, n), and returns both.
Planes check_planes(Address z, int64_t outer, int64_t middle, int64_t n, int64_t inner, bool per_outer) {
  check_shape(outer, middle, n, inner);
  Planes a{};
  a.z = required<const void>("z", z, per_outer ? outer * n : n);
  a.outer = outer, a.middle = middle, a.n = n, a.inner = inner, a.per_outer = per_outer;
  return a;
}

// out = x * z along axis n.
void gate_planes_fwd(int dtype, Address x, int64_t outer, int64_t middle, int64_t n, int64_t inner, Address z,
                     bool per_outer, Address out, int64_t threads) {
  const Kernels& k = kernels();
  const DType checked = check_dtype("dtype", dtype);
  Planes a = check_planes(z, outer, middle, n, inner, per_outer);
  const int team = check_threads(threads);
  const int64_t elements = outer * middle * n * inner;
  a.x = required<const void>("x", x, elements);
  required<void>("out", out, elements);
  a.out = output(out, elements, checked, team);
  without_gil([&] { return k.planes_forward(checked, a, team), true; });
}

// dx = g * z and dz, the sums of x * g over all that share a gate, for the gradient g of gate_planes_fwd. x is read
// only for dz. Absent outputs are not computed.
void gate_planes_bwd(int dtype, Address g, Address x, int64_t outer, int64_t middle, int64_t n, int64_t inner,
                     Address z, bool per_outer, Address dx, Address dz, int64_t threads) {
  const Kernels& k = kernels();
  const DType checked = check_dtype("dtype", dtype);
  Planes a = check_planes(z, outer, middle, n, inner, per_outer);
  const int team = check_threads(threads);
  const int64_t elements = outer * middle * n * inner;
  a.g = required<const void>("g", g, elements),
  a.x = dz ? required<const void>("x", x, elements) : pointer<const void>(x);
  a.out = output(dx, elements, checked, team), a.dz = pointer<void>(dz);
  without_gil([&] { return k.planes_backward(checked, a, team); });
}

}  // namespace
}  // namespace dampr
