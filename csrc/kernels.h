// The interface between the bindings and the kernels: a table of functions for each instruction set, and structs for
// their arguments.
// Equations: dampr/spec.py. The kernels are compiled once per instruction set. So this header and all that they include
// must not use inline code from the standard library: the linker would keep one copy of it for the whole module,
// possibly one that the processor cannot run.
#pragma once

#include <cstdint>

namespace dampr {

// These numbers are those of dampr/ops/backend_cpp/host.py (dtypes) and dampr/spec.py (families and rules).
enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
enum Family : int { kHardConcrete = 0, kValue = 1, kRamp = 2, kMask = 3 };
enum Rule : int {
  kSample = 0,
  kPaper = 1,
  kMedian = 2,
  kBinary = 3,    // hard concrete
  kIdentity = 4,  // value
  kTanh = 5,
  kRatio = 6,
  kSquareRatio = 7,
  kExponential = 8,
  kClip = 9,
  kLinear = 10,  // ramp
  kHard = 11,
  kHardConstant = 12,
  kSmooth = 13,
  kExactZero = 14,
  kLogistic = 15  // mask
};

// How values follow from parameters: the fields of dampr.spec.GateSpec.
struct GateSpec {
  int family, rule;
  double beta, gamma, zeta, c0, c1, lo, hi;
};

// out = x * z, or out = z if x is null, with a draw of the n gates for each row. Gate i of row m has the noise of index
// start + m * n + i. x, out: (rows, n); log_alpha: (n,).
struct RowsForward {
  const void *x, *log_alpha;
  void* out;
  int64_t rows, n;
  uint64_t seed;
  int64_t start = 0;
};

// The backward of RowsForward, with the same draw, for the gradient g (rows, n) of out: dx = g * z, xz = x * z,
// dlog_alpha[i] = sum_m x * g * dz/dlog_alpha, with x = 1 if it is absent. Outputs that are not needed are null; dx and
// xz have the shape and dtype of x.
struct RowsBackward {
  const void *x, *g, *log_alpha;
  void *dx, *xz, *dlog_alpha;
  int64_t rows, n;
  uint64_t seed;
  int64_t start = 0;
};

// out = w * z_out[:, None] * z_in; an absent gate is one. w, out: (n_out, n_in).
struct FoldForward {
  const void *w, *z_out, *z_in;
  void* out;
  int64_t n_out, n_in;
};

// dw = z_out z_in g; folded = z_out z_in w; dz_out = sum over columns of z_in w g; dz_in = sum over rows of z_out w g.
// Absent outputs are null.
struct FoldBackward {
  const void *g, *w, *z_out, *z_in;
  void *dw, *folded, *dz_out, *dz_in;
  int64_t n_out, n_in;
};

// out = w * z, one gate for each block of (block_rows, block_cols) weights, the last ones possibly partial:
// w[n, k] has the gate (n / block_rows) * ceil(n_in / block_cols) + k / block_cols.
struct FoldBlocksForward {
  const void *w, *z;
  void* out;
  int64_t n_out, n_in, block_rows, block_cols;
};

// dw = z g; folded = z w; dz = sum over the block of w g. Absent outputs are null.
struct FoldBlocksBackward {
  const void *g, *w, *z;
  void *dw, *folded, *dz;
  int64_t n_out, n_in, block_rows, block_cols;
};

// A tensor (outer, middle, n, inner) with gates z on axis n: (n,) or, if per_outer, (outer, n). Forward: out = x * z.
// Backward, for the gradient g: out = g * z, and dz, like z, = the sums of x * g over the elements of each gate. Absent
// outputs are null.
struct Planes {
  const void *x, *g, *z;
  void *out, *dz;
  int64_t outer, middle, n, inner;
  bool per_outer;
};

// Entries of the axis n of a tensor (outer, n, inner): places (count,) holds their indices, each at most once. gather:
// out (outer, count, inner) gets these entries of x (outer, n, inner). scatter: out (outer, n, inner) gets the entries
// of x (outer, count, inner) at these indices, and zeros elsewhere.
struct Axis {
  const void* x;
  void* out;
  const int32_t* places;
  int64_t outer, n, count, inner;
};

// A batch norm followed by gates: y = act(z (gain (x - mean) / sqrt(var + eps) + bias)). act is a ReLU if `relu`, else
// nothing. gain, bias, mean, var: (n,); a null gain is 1, a null bias 0. Derivation: docs/kernels.md.
//
// Forward: reads planes.x and planes.z, and writes y to planes.out.
// Backward, for the gradient planes.g of y: writes dx to planes.out, the gradient of z to planes.dz, and dgain and
// dbias (n,). Outputs that are not needed are null. `training` (read by the backward alone): mean and var are the
// statistics of x, so dx has terms that flow through them; else they are running statistics, which are constants.
struct NormGate {
  Planes planes;
  const void *gain, *bias, *mean, *var;
  void *dgain, *dbias;
  double eps;
  bool relu, training;
};

// A whole gated linear layer (equations: small.h). x: (m, k); dy: (m, n); w, dw: (n, k). The log_alpha of an absent
// gate is null, and so are absent outputs. pre is y before the output gates: the forward writes it if it is not null.
// The backward needs it for dout with gates per sample; if it is null, it is computed again.
struct SmallLinear {
  const void *x, *w, *b, *in_log_alpha, *out_log_alpha, *dy;
  void *y, *pre, *dx, *dw, *db, *din, *dout;
  int64_t m, n, k;
  uint64_t in_seed, out_seed;
  bool per_sample;
};

// The generator of Dep-L0 (generator.h). parameters: w_1, b_1, w_2, ..., with w_l (widths[l], widths[l - 1]); grads:
// their gradients, in the same order. values: a_1, a_2, ... one after the other; dvalues: their gradients. All are
// float or all double.
struct Generator {
  const void* const* parameters;
  const int64_t* widths;
  int64_t layers;
  double limit;
  void* values;
  const void* dvalues;
  void* const* grads;
};

// The functions of one instruction set. dx and dw may be the same memory as the gradient g if their dtypes are equal. A
// function that needs a workspace returns false if it could not allocate it. Gates, log_alpha and vectors such as gain
// are double if the tensors are float64, else float.
struct Kernels {
  const char* isa;
  void (*philox_words)(uint64_t seed, int64_t start, int64_t count, uint32_t* out, int threads);
  void (*philox_uniform)(uint64_t seed, int64_t start, int64_t count, float* out, int threads);
  void (*rows_forward)(const GateSpec&, DType x, DType out, const RowsForward&, int threads);
  bool (*rows_backward)(const GateSpec&, DType g, DType x, const RowsBackward&, int threads);
  void (*fold_forward)(DType w, DType out, const FoldForward&, int threads);
  bool (*fold_backward)(DType g, DType w, const FoldBackward&, int threads);
  void (*fold_blocks_forward)(DType w, DType out, const FoldBlocksForward&, int threads);
  bool (*fold_blocks_backward)(DType g, DType w, const FoldBlocksBackward&, int threads);
  void (*planes_forward)(DType dtype, const Planes&, int threads);
  bool (*planes_backward)(DType dtype, const Planes&, int threads);
  void (*gather)(DType dtype, const Axis&, int threads);
  bool (*scatter)(DType dtype, const Axis&, int threads);
  void (*transpose)(DType dtype, const void* x, void* out, int64_t rows, int64_t n, int threads);
  bool (*norm_stats)(DType dtype, const Planes&, void* mean, void* var, int threads);  // of planes.x, var biased
  bool (*norm_gate_forward)(DType dtype, const NormGate&, int threads);
  bool (*norm_gate_backward)(DType dtype, const NormGate&, int threads);
  bool (*small_forward)(const GateSpec&, DType dtype, const SmallLinear&);  // float32 and float64 only
  bool (*small_backward)(const GateSpec&, DType dtype, const SmallLinear&);
  void (*generator_forward)(DType dtype, const Generator&);  // float32 and float64 only
  bool (*generator_backward)(DType dtype, const Generator&);
};

// The tables; those of instruction sets that were not compiled are not defined.
const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

}  // namespace dampr
