// The table of the Python module dampr._C. Tensors are passed as addresses (Python ints, 0 = absent), so torch is
// needed neither to build the module nor to load it. The functions are in the call_*.h headers, by subject. Only this
// file includes these, so pybind11 is compiled once.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "call_axes.h"
#include "call_folds.h"
#include "call_gates.h"
#include "call_layers.h"
#include "isa.h"

namespace dampr {
namespace {

// The compiler, the compiled instruction sets, and the version of OpenMP.
py::dict build_info() {
  py::dict info;
  info["compiler"] = std::string(
#if defined(__clang__)
      "clang "
#elif defined(__GNUC__)
      "gcc "
#endif
      __VERSION__);
  info["isas"] = compiled_isas();
#if defined(_OPENMP)
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
  return info;
}

}  // namespace
}  // namespace dampr

PYBIND11_MODULE(_C, m) {
  using namespace py::literals;
  m.doc() =
      "CPU kernels of dampr. Tensors are addresses (0 = absent), contiguous and row-major; dtypes: 0 float32, 1 "
      "float64, 2 bfloat16, 3 float16.";
  m.def(
      "isa", [] { return std::string(dampr::kernels().isa); },
      "The instruction set in use: baseline, avx2 or avx512. DAMPR_CPU_ISA chooses one; if it is not there, every "
      "function raises RuntimeError.");
  m.def("vendor", &dampr::vendor, "Who made the processor: amd, intel or other.");
  m.def("build_info", &dampr::build_info,
        "compiler, isas (compiled in, best first), openmp (its version date, 0 without).");
  m.def("philox_words", &dampr::philox_words, "Noise words (uint32) of gates start .. start + count - 1.", "seed_ptr"_a,
        "start"_a, "count"_a, "out_u32_ptr"_a, "threads"_a);
  m.def("philox_uniform", &dampr::philox_uniform, "Uniform noise (float32) of gates start .. start + count - 1.",
        "seed_ptr"_a, "start"_a, "count"_a, "out_f32_ptr"_a, "threads"_a);
  m.def("gates_fwd", &dampr::gates_fwd, "z (rows, n): gates drawn for each row, or deterministic.", "spec"_a, "dtype"_a,
        "log_alpha"_a, "seed_ptr"_a, "rows"_a, "n"_a, "z"_a, "threads"_a, "start"_a = 0);
  m.def("gates_bwd", &dampr::gates_bwd, "dlog_alpha (n,) = sum over rows of dz * dz/dlog_alpha.", "spec"_a, "dtype"_a,
        "log_alpha"_a, "seed_ptr"_a, "rows"_a, "n"_a, "dz"_a, "dlog_alpha"_a, "threads"_a, "start"_a = 0);
  m.def("fold_gates_fwd", &dampr::fold_gates_fwd,
        "The gates drawn, and out = w * z_out[:, None] * z_in, b_out = b * z_out; b is of the gates' dtype.", "spec"_a,
        "w_dtype"_a, "out_dtype"_a, "w"_a, "b"_a, "n_out"_a, "n_in"_a, "out_log_alpha"_a, "in_log_alpha"_a,
        "out_seed_ptr"_a, "in_seed_ptr"_a, "out"_a, "b_out"_a, "threads"_a);
  m.def("fold_gates_bwd", &dampr::fold_gates_bwd,
        "The same draw again: gradients from those of out, g, and b_out, g_b (like b and db of the gates' dtype); "
        "folded is out once more.",
        "spec"_a, "g_dtype"_a, "w_dtype"_a, "g"_a, "g_b"_a, "w"_a, "b"_a, "n_out"_a, "n_in"_a, "out_log_alpha"_a,
        "in_log_alpha"_a, "out_seed_ptr"_a, "in_seed_ptr"_a, "dw"_a, "db"_a, "dout"_a, "din"_a, "folded"_a,
        "threads"_a);
  m.def(
      "fold_blocks_fwd", &dampr::fold_blocks_fwd,
      "The gates drawn, and out = w * z, one for each block; w[n, k] has the gate (n // R) * ceil(n_in / C) + k // C.",
      "spec"_a, "w_dtype"_a, "out_dtype"_a, "w"_a, "n_out"_a, "n_in"_a, "block_rows"_a, "block_cols"_a, "log_alpha"_a,
      "seed_ptr"_a, "out"_a, "threads"_a);
  m.def("fold_blocks_bwd", &dampr::fold_blocks_bwd,
        "The same draw again: gradients from that of out, g; folded is out once more.", "spec"_a, "g_dtype"_a,
        "w_dtype"_a, "g"_a, "w"_a, "n_out"_a, "n_in"_a, "block_rows"_a, "block_cols"_a, "log_alpha"_a, "seed_ptr"_a,
        "dw"_a, "dlog_alpha"_a, "folded"_a, "threads"_a);
  m.def("gate_weights_fwd", &dampr::gate_weights_fwd, "out = w * z, a gate for every weight, z never stored.", "spec"_a,
        "w_dtype"_a, "out_dtype"_a, "w"_a, "count"_a, "log_alpha"_a, "seed_ptr"_a, "out"_a, "threads"_a);
  m.def("gate_weights_bwd", &dampr::gate_weights_bwd,
        "The same draw again: dw = g z, dlog_alpha = w g dz/dlog_alpha, folded = w z.", "spec"_a, "g_dtype"_a,
        "w_dtype"_a, "g"_a, "w"_a, "count"_a, "log_alpha"_a, "seed_ptr"_a, "dw"_a, "dlog_alpha"_a, "threads"_a,
        "folded"_a = 0);
  m.def("gate_rows_fwd", &dampr::gate_rows_fwd, "out = x * z, a draw per row, z never stored.", "spec"_a, "dtype"_a,
        "x"_a, "rows"_a, "n"_a, "log_alpha"_a, "seed_ptr"_a, "out"_a, "threads"_a);
  m.def("gate_rows_bwd", &dampr::gate_rows_bwd,
        "The same draw again: dx = g z, xz = x z, dlog_alpha = sum over rows of x g dz/dlog_alpha.", "spec"_a,
        "dtype"_a, "x"_a, "g"_a, "rows"_a, "n"_a, "log_alpha"_a, "seed_ptr"_a, "dx"_a, "xz"_a, "dlog_alpha"_a,
        "threads"_a);
  m.def("gate_planes_fwd", &dampr::gate_planes_fwd,
        "out = x * z[..., :, None] for x (outer, middle, n, inner) and z (n,) or, per_outer, (outer, n).", "dtype"_a,
        "x"_a, "outer"_a, "middle"_a, "n"_a, "inner"_a, "z"_a, "per_outer"_a, "out"_a, "threads"_a);
  m.def("gate_planes_bwd", &dampr::gate_planes_bwd,
        "dx = g z and dz = the sums of x g over all that shares a gate, in one pass.", "dtype"_a, "g"_a, "x"_a,
        "outer"_a, "middle"_a, "n"_a, "inner"_a, "z"_a, "per_outer"_a, "dx"_a, "dz"_a, "threads"_a);
  m.def("open_gates", &dampr::open_gates,
        "How many gates are not 0; places (int32): these in order, filled up with closed ones to length entries.",
        "spec"_a, "dtype"_a, "log_alpha"_a, "seed_ptr"_a, "n"_a, "places"_a = 0, "length"_a = 0);
  m.def("pick", &dampr::gather, "out (outer, count, inner) = x[:, places] of x (outer, n, inner).", "dtype"_a, "x"_a,
        "outer"_a, "n"_a, "inner"_a, "places"_a, "count"_a, "out"_a, "threads"_a);
  m.def("place", &dampr::scatter, "out (outer, n, inner), zeros but for out[:, places] = x (outer, count, inner).",
        "dtype"_a, "x"_a, "outer"_a, "n"_a, "inner"_a, "places"_a, "count"_a, "out"_a, "threads"_a);
  m.def("transpose", &dampr::transpose, "out (n, rows) = x^T of x (rows, n).", "dtype"_a, "x"_a, "rows"_a, "n"_a,
        "out"_a, "threads"_a);
  m.def("norm_gate_fwd", &dampr::norm_gate_fwd,
        "out = act(z (gain (x - mean) / sqrt(var + eps) + bias)) for x (outer, middle, n, inner), z drawn once or, "
        "per_outer, for each outer index. "
        "training: mean and var (biased) are written, running ones moved towards them and updates (int64) counted, "
        "where given.",
        "spec"_a, "dtype"_a, "x"_a, "outer"_a, "middle"_a, "n"_a, "inner"_a, "log_alpha"_a, "seed_ptr"_a, "per_outer"_a,
        "gain"_a, "bias"_a, "training"_a, "mean"_a, "var"_a, "running_mean"_a, "running_var"_a, "updates"_a,
        "momentum"_a, "eps"_a, "relu"_a, "out"_a, "threads"_a);
  m.def("norm_gate_bwd", &dampr::norm_gate_bwd,
        "The same draw again: its gradients, those that are asked for; training: mean and var are those of x.",
        "spec"_a, "dtype"_a, "g"_a, "x"_a, "outer"_a, "middle"_a, "n"_a, "inner"_a, "log_alpha"_a, "seed_ptr"_a,
        "per_outer"_a, "gain"_a, "bias"_a, "training"_a, "mean"_a, "var"_a, "eps"_a, "relu"_a, "dx"_a, "dgain"_a,
        "dbias"_a, "dlog_alpha"_a, "threads"_a);
  m.def("small_fwd", &dampr::small_fwd,
        "y = z_out * ((x * z_in) w^T + b) and, if asked for, pre, y before the output gate; one thread.", "spec"_a,
        "dtype"_a, "m"_a, "n"_a, "k"_a, "x"_a, "w"_a, "b"_a, "in_log_alpha"_a, "out_log_alpha"_a, "in_seed_ptr"_a,
        "out_seed_ptr"_a, "per_sample"_a, "y"_a, "pre"_a);
  m.def("small_bwd", &dampr::small_bwd,
        "Its gradients, those that are asked for; without pre it is computed again for dout. One thread.", "spec"_a,
        "dtype"_a, "m"_a, "n"_a, "k"_a, "dy"_a, "x"_a, "w"_a, "b"_a, "in_log_alpha"_a, "out_log_alpha"_a,
        "in_seed_ptr"_a, "out_seed_ptr"_a, "per_sample"_a, "pre"_a, "dx"_a, "dw"_a, "db"_a, "din"_a, "dout"_a);
  m.def("generator_fwd", &dampr::generator_fwd,
        "values = a_1, a_2, ... with a_l = limit tanh(w_l a_(l-1) + b_l), a_0 = 1; parameters: w_1, b_1, w_2, ...; one "
        "thread.",
        "dtype"_a, "parameters"_a, "widths"_a, "limit"_a, "values"_a);
  m.def("generator_bwd", &dampr::generator_bwd,
        "Its gradients: grads, like parameters, from values and dvalues. One thread.", "dtype"_a, "parameters"_a,
        "widths"_a, "limit"_a, "values"_a, "dvalues"_a, "grads"_a);
}
