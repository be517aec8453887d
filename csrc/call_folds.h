// The functions that bindings.cpp exports for folding gates into a weight (n_out, n_in): gates of its rows and columns,
// or of blocks of it. Each checks its arguments, draws the gates, and calls the kernel without the interpreter lock.
#pragma once

#include <vector>

#include "arguments.h"
#include "isa.h"

namespace dampr {
namespace {

// total[j] += part[j] for n gradients; gate: their dtype, float32 or float64.
void add(DType gate, const void* part, void* total, int64_t n) {
  for (int64_t j = 0; j < n; ++j)
    if (gate == kFloat64)
      static_cast<double*>(total)[j] += static_cast<const double*>(part)[j];
    else
      static_cast<float*>(total)[j] += static_cast<const float*>(part)[j];
}

// Memory for the gates of the rows (out) and columns (in) of a weight and for their gradients, and the arguments that
// draw them. dbias: the part of the row gates' gradient that comes from the bias. Pointers of absent gates are null.
struct FoldGates {
  std::vector<double> room;  // the memory; it holds floats if gates are float
  void *out = nullptr, *in = nullptr, *dout = nullptr, *din = nullptr, *dbias = nullptr;
  RowsForward rows{}, columns{};

  FoldGates(const GateSpec& s, int64_t n_out, int64_t n_in, Address out_log_alpha, Address in_log_alpha,
            Address out_seed_ptr, Address in_seed_ptr)
      : room(static_cast<size_t>((out_log_alpha ? 3 * n_out : 0) + (in_log_alpha ? 2 * n_in : 0))) {
    double* next = room.data();
    if (out_log_alpha) {
      out = next, dout = next + n_out, dbias = next + 2 * n_out, next += 3 * n_out;
      rows = {
          nullptr, pointer<const void>(out_log_alpha), out, 1, n_out, s.rule == kSample ? read_seed(out_seed_ptr) : 0};
    }
    if (in_log_alpha) {
      in = next, din = next + n_in;
      columns = {
          nullptr, pointer<const void>(in_log_alpha), in, 1, n_in, s.rule == kSample ? read_seed(in_seed_ptr) : 0};
    }
  }
  void draw(const Kernels& k, const GateSpec& s, DType gate, int team) const {
    if (out) k.rows_forward(s, gate, gate, rows, team);
    if (in) k.rows_forward(s, gate, gate, columns, team);
  }
};

// Rejects a bias without row gates, because only these multiply it.
void check_bias(Address b, Address out_log_alpha) {
  if (b && !out_log_alpha) reject("b", std::to_string(b), "0, as rows have no gates");
}

// Draws the gates; out = w * z_out[:, None] * z_in, and b_out = b * z_out if there is a bias. b has the dtype of the
// gates.
void fold_gates_fwd(const py::tuple& spec, int w_dtype, int out_dtype, Address w, Address b, int64_t n_out,
                    int64_t n_in, Address out_log_alpha, Address in_log_alpha, Address out_seed_ptr,
                    Address in_seed_ptr, Address out, Address b_out, int64_t threads) {
  const Kernels& k = kernels();
  const GateSpec s = check_spec(spec);
  const DType from = check_dtype("w_dtype", w_dtype), to = check_dtype("out_dtype", out_dtype);
  check_same_gates("w_dtype", from, "out_dtype", to);
  check_sizes("n_out", n_out, "n_in", n_in);
  const int team = check_threads(threads);
  check_bias(b, out_log_alpha);
  const FoldGates gates(s, n_out, n_in, out_log_alpha, in_log_alpha, out_seed_ptr, in_seed_ptr);
  required<void>("out", out, n_out * n_in);
  if (b) required<void>("b_out", b_out, n_out);
  const FoldForward weight{required<const void>("w", w, n_out * n_in), gates.out, gates.in,
                           output(out, n_out * n_in, to, team),        n_out,     n_in};
  const FoldForward bias{pointer<const void>(b), gates.out, nullptr, pointer<void>(b_out), n_out, 1};
  without_gil([&] {
    gates.draw(k, s, from == kFloat64 ? kFloat64 : kFloat32, team);
    k.fold_forward(from, to, weight, team);
    if (b) k.fold_forward(from == kFloat64 ? kFloat64 : kFloat32, to, bias, 1);
    return true;
  });
}

// The gradients of fold_gates_fwd, from those of out, g, and of b_out, g_b: dw, db, dout (of out_log_alpha) and din (of
// in_log_alpha). folded gets the folded weight again. Absent outputs are not computed. The gates are drawn again.
void fold_gates_bwd(const py::tuple& spec, int g_dtype, int w_dtype, Address g, Address g_b, Address w, Address b,
                    int64_t n_out, int64_t n_in, Address out_log_alpha, Address in_log_alpha, Address out_seed_ptr,
                    Address in_seed_ptr, Address dw, Address db, Address dout, Address din, Address folded,
                    int64_t threads) {
  const Kernels& k = kernels();
  const GateSpec s = check_spec(spec);
  const DType from = check_dtype("g_dtype", g_dtype), to = check_dtype("w_dtype", w_dtype),
              gate = to == kFloat64 ? kFloat64 : kFloat32;
  check_same_gates("g_dtype", from, "w_dtype", to);
  check_sizes("n_out", n_out, "n_in", n_in);
  const int team = check_threads(threads);
  check_bias(b, out_log_alpha);
  FoldGates gates(s, n_out, n_in, out_log_alpha, in_log_alpha, out_seed_ptr, in_seed_ptr);
  FoldBackward a{};
  a.g = dw || dout || din ? required<const void>("g", g, n_out * n_in) : pointer<const void>(g);
  a.w = required<const void>("w", w, n_out * n_in);
  a.z_out = gates.out, a.z_in = gates.in, a.n_out = n_out, a.n_in = n_in;
  a.dw = output(dw, n_out * n_in, to, team), a.folded = output(folded, n_out * n_in, to, team);
  a.dz_out = dout ? gates.dout : nullptr, a.dz_in = din ? gates.din : nullptr;
  FoldBackward of_bias{};
  of_bias.g = pointer<const void>(g_b), of_bias.w = pointer<const void>(b), of_bias.z_out = gates.out,
  of_bias.n_out = n_out, of_bias.n_in = 1;
  of_bias.dw = pointer<void>(db), of_bias.dz_out = b && dout ? gates.dbias : nullptr;
  without_gil([&] {
    gates.draw(k, s, gate, team);
    if ((a.dw || a.folded || a.dz_out || a.dz_in) && !k.fold_backward(from, to, a, team)) return false;
    if (g_b && (of_bias.dw || of_bias.dz_out) && !k.fold_backward(gate, gate, of_bias, 1)) return false;
    if (g_b && of_bias.dz_out) add(gate, of_bias.dz_out, a.dz_out, n_out);
    const RowsBackward rows{nullptr, a.dz_out, gates.rows.log_alpha, nullptr, nullptr, pointer<void>(dout),
                            1,       n_out,    gates.rows.seed};
    const RowsBackward columns{nullptr, a.dz_in, gates.columns.log_alpha, nullptr, nullptr, pointer<void>(din),
                               1,       n_in,    gates.columns.seed};
    return (!a.dz_out || k.rows_backward(s, gate, gate, rows, team)) &&
           (!a.dz_in || k.rows_backward(s, gate, gate, columns, team));
  });
}

// Checks the sizes of a weight and of its blocks; returns the number of blocks, partial ones included.
int64_t check_blocks(int64_t n_out, int64_t n_in, int64_t block_rows, int64_t block_cols) {
  check_sizes("n_out", n_out, "n_in", n_in);
  if (block_rows < 1) reject("block_rows", std::to_string(block_rows), "a size, 1 or more");
  if (block_cols < 1) reject("block_cols", std::to_string(block_cols), "a size, 1 or more");
  return (n_out / block_rows + (n_out % block_rows != 0)) * (n_in / block_cols + (n_in % block_cols != 0));
}

// Memory for the gates of the blocks of a weight and for their gradients, and the arguments that draw them.
struct BlockGates {
  std::vector<double> room;  // the memory; it holds floats if gates are float
  void *z, *dz;
  RowsForward rows;

  BlockGates(const GateSpec& s, int64_t blocks, Address log_alpha, Address seed_ptr)
      : room(static_cast<size_t>(2 * blocks)),
        z(room.data()),
        dz(room.data() + blocks),
        rows{nullptr, required<const void>("log_alpha", log_alpha, blocks), z, 1,
             blocks,  s.rule == kSample ? read_seed(seed_ptr) : 0} {}
};

// Draws the gates; out = w * z with the gate z of each weight's block.
void fold_blocks_fwd(const py::tuple& spec, int w_dtype, int out_dtype, Address w, int64_t n_out, int64_t n_in,
                     int64_t block_rows, int64_t block_cols, Address log_alpha, Address seed_ptr, Address out,
                     int64_t threads) {
  const Kernels& k = kernels();
  const GateSpec s = check_spec(spec);
  const DType from = check_dtype("w_dtype", w_dtype), to = check_dtype("out_dtype", out_dtype),
              gate = from == kFloat64 ? kFloat64 : kFloat32;
  check_same_gates("w_dtype", from, "out_dtype", to);
  const BlockGates gates(s, check_blocks(n_out, n_in, block_rows, block_cols), log_alpha, seed_ptr);
  const int team = check_threads(threads);
  required<void>("out", out, n_out * n_in);
  const FoldBlocksForward a{required<const void>("w", w, n_out * n_in),
                            gates.z,
                            output(out, n_out * n_in, to, team),
                            n_out,
                            n_in,
                            block_rows,
                            block_cols};
  without_gil(
      [&] { return k.rows_forward(s, gate, gate, gates.rows, team), k.fold_blocks_forward(from, to, a, team), true; });
}

// The gradients of fold_blocks_fwd for the gradient g of out: dw and dlog_alpha. folded gets the folded weight again.
// Absent outputs are not computed.
void fold_blocks_bwd(const py::tuple& spec, int g_dtype, int w_dtype, Address g, Address w, int64_t n_out, int64_t n_in,
                     int64_t block_rows, int64_t block_cols, Address log_alpha, Address seed_ptr, Address dw,
                     Address dlog_alpha, Address folded, int64_t threads) {
  const Kernels& k = kernels();
  const GateSpec s = check_spec(spec);
  const DType from = check_dtype("g_dtype", g_dtype), to = check_dtype("w_dtype", w_dtype),
              gate = to == kFloat64 ? kFloat64 : kFloat32;
  check_same_gates("g_dtype", from, "w_dtype", to);
  const BlockGates gates(s, check_blocks(n_out, n_in, block_rows, block_cols), log_alpha, seed_ptr);
  const int team = check_threads(threads);
  FoldBlocksBackward a{};
  a.g = required<const void>("g", g, n_out * n_in), a.w = required<const void>("w", w, n_out * n_in), a.z = gates.z;
  a.dw = output(dw, n_out * n_in, to, team), a.folded = output(folded, n_out * n_in, to, team),
  a.dz = dlog_alpha ? gates.dz : nullptr;
  a.n_out = n_out, a.n_in = n_in, a.block_rows = block_rows, a.block_cols = block_cols;
  const RowsBackward rows{nullptr, gates.dz,     gates.rows.log_alpha, nullptr, nullptr, pointer<void>(dlog_alpha),
                          1,       gates.rows.n, gates.rows.seed};
  without_gil([&] {
    k.rows_forward(s, gate, gate, gates.rows, team);
    return k.fold_blocks_backward(from, to, a, team) && (!dlog_alpha || k.rows_backward(s, gate, gate, rows, team));
  });
}

}  // namespace
}  // namespace dampr
