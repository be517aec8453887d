// The functions that bindings.cpp exports for whole layers: a norm followed by gates, a small linear layer, the
// generator of Dep-L0. Each checks its arguments, fills a struct of kernels.h and calls the kernel without the GIL. An
// Address is that of a contiguous tensor, 0 if it is absent.
#pragma once

#include <memory>
#include <vector>

#include "arguments.h"
#include "call_axes.h"
#include "isa.h"

namespace dampr {
namespace {

// Memory for the gate values after a norm, and the arguments that draw them: one draw for all samples, or one for each
// outer index.
struct NormDraw {
  GateSpec spec;
  DType dtype;
  RowsForward gates{};
  std::unique_ptr<double[]> room;  // the gate values, float or double by `dtype`

  NormDraw(const py::tuple& fields, DType x, const Planes& a, Address log_alpha, Address seed_ptr)
      : spec(check_spec(fields)), dtype(x == kFloat64 ? kFloat64 : kFloat32) {
    gates.log_alpha = required<const void>("log_alpha", log_alpha, a.n);
    gates.rows = a.per_outer ? a.outer : 1, gates.n = a.n, gates.seed = spec.rule == kSample ? read_seed(seed_ptr) : 0;
    room.reset(new double[static_cast<size_t>(gates.rows * a.n)]);
    gates.out = room.get();
  }
};

// Checks the arguments that the forward and the backward of a norm share, and returns them as a NormGate.
NormGate checked_norm(int64_t outer, int64_t middle, int64_t n, int64_t inner, bool per_outer, Address gain,
                      Address bias, Address mean, Address var, double eps, bool relu) {
  check_shape(outer, middle, n, inner);
  if (!(eps >= 0)) reject("eps", std::to_string(eps), "a number, 0 or more");
  NormGate a{};
  a.planes.outer = outer, a.planes.middle = middle, a.planes.n = n, a.planes.inner = inner,
  a.planes.per_outer = per_outer;
  a.gain = pointer<const void>(gain), a.bias = pointer<const void>(bias), a.eps = eps, a.relu = relu;
  a.mean = required<const void>("mean", mean, n), a.var = required<const void>("var", var, n);
  return a;
}

// running = (1 - momentum) * running + momentum * scale * values, for n channels, computed in double and rounded once.
// A null `running` is left out.
template <class G>
void move_statistic(G* running, const void* values, int64_t n, double momentum, double scale) {
  for (int64_t j = 0; running && j < n; ++j)
    running[j] = static_cast<G>((1 - momentum) * static_cast<double>(running[j]) +
                                momentum * scale * static_cast<double>(static_cast<const G*>(values)[j]));
}

// Updates the running mean and the running variance, unbiased, from a batch of `count` values per channel.
template <class G>
void move_statistics(Address running_mean, Address running_var, const NormGate& a, int64_t count, double momentum) {
  move_statistic(pointer<G>(running_mean), a.mean, a.planes.n, momentum, 1.0);
  move_statistic(pointer<G>(running_var), a.var, a.planes.n, momentum,
                 static_cast<double>(count) / static_cast<double>(count - 1));
}

// out = z * norm(x), with a ReLU after it if `relu`; x and out: (outer, middle, n, inner). In training, it writes the
// statistics of x to mean and var (n,), and updates running_mean, running_var and `updates`, the count of batches; else
// it reads mean and var.
void norm_gate_fwd(const py::tuple& spec, int dtype, Address x, int64_t outer, int64_t middle, int64_t n, int64_t inner,
                   Address log_alpha, Address seed_ptr, bool per_outer, Address gain, Address bias, bool training,
                   Address mean, Address var, Address running_mean, Address running_var, Address updates,
                   double momentum, double eps, bool relu, Address out, int64_t threads) {
  const Kernels& k = kernels();
  const DType checked = check_dtype("dtype", dtype);
  NormGate a = checked_norm(outer, middle, n, inner, per_outer, gain, bias, mean, var, eps, relu);
  const int team = check_threads(threads);
  const int64_t elements = outer * middle * n * inner, count = outer * middle * inner;
  if (!(momentum >= 0 && momentum <= 1)) reject("momentum", std::to_string(momentum), "a number in [0, 1]");
  if (running_var && count == 1)
    reject("running_var", std::to_string(running_var), "0, as a single value per channel has no unbiased variance");
  a.planes.x = required<const void>("x", x, elements);
  required<void>("out", out, elements);
  const NormDraw drawn(spec, checked, a.planes, log_alpha, seed_ptr);
  a.planes.z = drawn.room.get(), a.planes.out = output(out, elements, checked, team);
  without_gil([&] {
    k.rows_forward(drawn.spec, drawn.dtype, drawn.dtype, drawn.gates, team);
    return (!training || k.norm_stats(checked, a.planes, pointer<void>(mean), pointer<void>(var), team)) &&
           k.norm_gate_forward(checked, a, team);
  });
  if (!training || elements == 0) return;
  drawn.dtype == kFloat64 ? move_statistics<double>(running_mean, running_var, a, count, momentum)
                          : move_statistics<float>(running_mean, running_var, a, count, momentum);
  if (updates) ++*pointer<int64_t>(updates);
}

// The gradients of norm_gate_fwd for the gradient g of out: dx, dgain, dbias and dlog_alpha; absent ones are not
// computed.
void norm_gate_bwd(const py::tuple& spec, int dtype, Address g, Address x, int64_t outer, int64_t middle, int64_t n,
                   int64_t inner, Address log_alpha, Address seed_ptr, bool per_outer, Address gain, Address bias,
                   bool training, Address mean, Address var, double eps, bool relu, Address dx, Address dgain,
                   Address dbias, Address dlog_alpha, int64_t threads) {
  const Kernels& k = kernels();
  const DType checked = check_dtype("dtype", dtype);
  NormGate a = checked_norm(outer, middle, n, inner, per_outer, gain, bias, mean, var, eps, relu);
  const int team = check_threads(threads);
  const int64_t elements = outer * middle * n * inner;
  a.planes.x = required<const void>("x", x, elements), a.planes.g = required<const void>("g", g, elements);
  const NormDraw drawn(spec, checked, a.planes, log_alpha, seed_ptr),
      gradient(spec, checked, a.planes, log_alpha, seed_ptr);
  a.planes.z = drawn.room.get(), a.planes.dz = dlog_alpha ? gradient.room.get() : nullptr;
  a.planes.out = output(dx, elements, checked, team), a.dgain = pointer<void>(dgain), a.dbias = pointer<void>(dbias),
  a.training = training;
  RowsBackward gates{};
  gates.g = a.planes.dz, gates.log_alpha = drawn.gates.log_alpha, gates.dlog_alpha = pointer<void>(dlog_alpha);
  gates.rows = drawn.gates.rows, gates.n = n, gates.seed = drawn.gates.seed;
  without_gil([&] {
    k.rows_forward(drawn.spec, drawn.dtype, drawn.dtype, drawn.gates, team);
    return k.norm_gate_backward(checked, a, team) &&
           (!dlog_alpha || k.rows_backward(drawn.spec, drawn.dtype, drawn.dtype, gates, team));
  });
}

// Checks the arguments that the forward and the backward of a small linear layer share, and returns them as a
// SmallLinear (kernels.h). x: (m, k), w: (n, k), in_log_alpha: (k,), out_log_alpha: (n,); an absent log_alpha stands
// for no gates. The seeds are read only if gates are drawn.
SmallLinear checked_small(const GateSpec& s, int64_t m, int64_t n, int64_t k, Address x, Address w,
                          Address in_log_alpha, Address out_log_alpha, Address in_seed_ptr, Address out_seed_ptr,
                          bool per_sample) {
  check_sizes("m", m, "k", k), check_sizes("m", m, "n", n), check_sizes("n", n, "k", k);
  SmallLinear a{};
  a.x = required<const void>("x", x, m * k), a.w = required<const void>("w", w, n * k);
  a.in_log_alpha = pointer<const void>(in_log_alpha), a.out_log_alpha = pointer<const void>(out_log_alpha);
  a.in_seed = in_log_alpha && s.rule == kSample ? read_seed(in_seed_ptr) : 0;
  a.out_seed = out_log_alpha && s.rule == kSample ? read_seed(out_seed_ptr) : 0;
  a.m = m, a.n = n, a.k = k, a.per_sample = per_sample;
  return a;
}

// y (m, n) = z_out * ((x * z_in) w^T + b); pre: y before the output gates, if it is given.
void small_fwd(const py::tuple& spec, int dtype, int64_t m, int64_t n, int64_t k, Address x, Address w, Address b,
               Address in_log_alpha, Address out_log_alpha, Address in_seed_ptr, Address out_seed_ptr, bool per_sample,
               Address y, Address pre) {
  const Kernels& table = kernels();
  const GateSpec s = check_spec(spec);
  const DType checked = check_dtype("dtype", dtype, true);
  SmallLinear a = checked_small(s, m, n, k, x, w, in_log_alpha, out_log_alpha, in_seed_ptr, out_seed_ptr, per_sample);
  a.b = pointer<const void>(b), a.y = required<void>("y", y, m * n), a.pre = pointer<void>(pre);
  without_gil([&] { return table.small_forward(s, checked, a); });
}

// The gradients of small_fwd for the gradient dy (m, n): dx, dw, db, din (of in_log_alpha) and dout (of out_log_alpha);
// absent ones are not computed. pre: what the forward wrote; it is computed again if it is needed and absent.
void small_bwd(const py::tuple& spec, int dtype, int64_t m, int64_t n, int64_t k, Address dy, Address x, Address w,
               Address b, Address in_log_alpha, Address out_log_alpha, Address in_seed_ptr, Address out_seed_ptr,
               bool per_sample, Address pre, Address dx, Address dw, Address db, Address din, Address dout) {
  const Kernels& table = kernels();
  const GateSpec s = check_spec(spec);
  const DType checked = check_dtype("dtype", dtype, true);
  SmallLinear a = checked_small(s, m, n, k, x, w, in_log_alpha, out_log_alpha, in_seed_ptr, out_seed_ptr, per_sample);
  a.dy = required<const void>("dy", dy, m * n), a.b = pointer<const void>(b), a.pre = pointer<void>(pre);
  a.dx = pointer<void>(dx), a.dw = pointer<void>(dw), a.db = pointer<void>(db);
  a.din = in_log_alpha ? pointer<void>(din) : nullptr, a.dout = out_log_alpha ? pointer<void>(dout) : nullptr;
  without_gil([&] { return table.small_backward(s, checked, a); });
}

// Checks the arguments that the forward and the backward of a Dep-L0 generator share, and returns them as a Generator.
// addresses: of w_1, b_1, w_2, b_2, ... widths: the sizes of a_0, a_1, ... The result points into `widths` and
// `pointers`, which have to outlive it.
Generator checked_generator(const std::vector<Address>& addresses, const std::vector<int64_t>& widths, double limit,
                            std::vector<const void*>& pointers) {
  if (widths.size() < 2) reject("widths", std::to_string(widths.size()) + " sizes", "two or more");
  if (addresses.size() != 2 * (widths.size() - 1))
    reject("parameters", std::to_string(addresses.size()) + " addresses",
           "a weight and a bias for each width but the first");
  if (!(limit > 0)) reject("limit", std::to_string(limit), "a number above 0");
  for (size_t j = 0; j < addresses.size(); ++j) {
    const int64_t in = widths[j / 2], out = widths[j / 2 + 1];
    if (in < 1 || out < 1) reject("widths", std::to_string(in < 1 ? in : out), "sizes of 1 or more");
    check_sizes("widths", out, "widths", in);
    pointers.push_back(required<const void>("parameters", addresses[j], out));
  }
  Generator a{};
  a.parameters = pointers.data(), a.widths = widths.data(), a.layers = static_cast<int64_t>(widths.size()) - 1,
  a.limit = limit;
  return a;
}

// Writes the generator's outputs a_1, a_2, ... to values, one after the other.
void generator_fwd(int dtype, const std::vector<Address>& parameters, const std::vector<int64_t>& widths, double limit,
                   Address values) {
  const Kernels& table = kernels();
  const DType checked = check_dtype("dtype", dtype, true);
  std::vector<const void*> pointers;
  Generator a = checked_generator(parameters, widths, limit, pointers);
  a.values = required<void>("values", values, 1);
  without_gil([&] { return table.generator_forward(checked, a), true; });
}

// grads: the gradients of the parameters, in their order, for the gradient dvalues of values.
void generator_bwd(int dtype, const std::vector<Address>& parameters, const std::vector<int64_t>& widths, double limit,
                   Address values, Address dvalues, const std::vector<Address>& grads) {
  const Kernels& table = kernels();
  const DType checked = check_dtype("dtype", dtype, true);
  std::vector<const void*> pointers;
  Generator a = checked_generator(parameters, widths, limit, pointers);
  a.values = required<void>("values", values, 1), a.dvalues = required<const void>("dvalues", dvalues, 1);
  if (grads.size() != parameters.size())
    reject("grads", std::to_string(grads.size()) + " addresses", "one for each parameter");
  std::vector<void*> targets;
  for (Address address : grads) targets.push_back(required<void>("grads", address, 1));
  a.grads = targets.data();
  without_gil([&] { return table.generator_backward(checked, a); });
}

}  // namespace
}  // namespace dampr
