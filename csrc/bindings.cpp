// dampr._C: checks arguments, picks the kernels of the best instruction set, and calls them without the interpreter
// lock. Tensors arrive as addresses (Python ints, 0 = absent), so nothing of torch is needed to build or load this
// module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace py = pybind11;

namespace dampr {
namespace {

using Address = std::uintptr_t;

#if defined(__x86_64__)
bool has_avx2() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  // not a name that every compiler's __builtin_cpu_supports knows
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// The compiled instruction sets that this processor has, best first.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> found;
#if defined(DAMPR_HAVE_AVX512)
  if (has_avx512()) found.push_back(kernels_avx512());
#endif
#if defined(DAMPR_HAVE_AVX2)
  if (has_avx2()) found.push_back(kernels_avx2());
#endif
  found.push_back(kernels_baseline());
  return found;
}

std::vector<std::string> compiled_isas() {
  return {
#if defined(DAMPR_HAVE_AVX512)
      "avx512",
#endif
#if defined(DAMPR_HAVE_AVX2)
      "avx2",
#endif
      "baseline"};
}

// Null if DAMPR_CPU_ISA asks for what is not there; every function then says so instead of quietly using something
// else.
const Kernels* choose_kernels() {
  const char* wanted = std::getenv("DAMPR_CPU_ISA");
  for (const Kernels* k : usable_kernels())
    if (!wanted || !*wanted || std::string(wanted) == k->isa) return k;
  return nullptr;
}

const Kernels& kernels() {
  static const Kernels* chosen = choose_kernels();
  if (chosen) return *chosen;
  std::string names;
  for (const Kernels* k : usable_kernels()) names += std::string(names.empty() ? "" : ", ") + k->isa;
  const char* wanted = std::getenv("DAMPR_CPU_ISA");
  throw std::runtime_error("DAMPR_CPU_ISA=" + std::string(wanted ? wanted : "") +
                           ": this build on this processor offers " + names);
}

[[noreturn]] void reject(const std::string& name, const std::string& value, const std::string& expected) {
  throw py::value_error(name + "=" + value + ": expected " + expected);
}

int check_threads(int64_t threads) {
  if (threads < 1 || threads > std::numeric_limits<int>::max())
    reject("threads", std::to_string(threads), "a positive number of threads");
  return static_cast<int>(threads);
}

void check_sizes(const char* first_name, int64_t first, const char* second_name, int64_t second) {
  if (first < 0) reject(first_name, std::to_string(first), "a size, 0 or more");
  if (second < 0) reject(second_name, std::to_string(second), "a size, 0 or more");
  if (second > 0 && first > std::numeric_limits<int64_t>::max() / 8 / second)
    reject(first_name, std::to_string(first),
           std::string("a size whose product with ") + second_name + " is below 2^60");
}

DType check_dtype(const char* name, int dtype, bool gate_dtype = false) {
  if (gate_dtype && dtype != kFloat32 && dtype != kFloat64)
    reject(name, std::to_string(dtype), "0 (float32) or 1 (float64)");
  if (dtype < kFloat32 || dtype > kFloat16)
    reject(name, std::to_string(dtype), "0 (float32), 1 (float64), 2 (bfloat16) or 3 (float16)");
  return static_cast<DType>(dtype);
}

void check_same_gates(const char* first_name, DType first, const char* second_name, DType second) {
  if ((first == kFloat64) != (second == kFloat64))
    reject(second_name, std::to_string(second),
           std::string("float64 (1) exactly if ") + first_name + "=" + std::to_string(first) + " is");
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
T* required(const char* name, Address address, int64_t elements) {
  if (!address && elements > 0) reject(name, "0", "an address, as there are " + std::to_string(elements) + " elements");
  return pointer<T>(address);
}

int64_t size_of(DType dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// An output that was just allocated has no memory behind it yet, and getting that in pages of 4 KB takes several times
// as long as filling it: 64 MB in 17 ms, in huge pages 5 ms. So whole huge pages inside of a large output are asked
// for, as a hint, and each is touched by one thread, because two that meet in a fresh page both clear one. Touching
// keeps what is there: an output may lie over an input.
void touch_huge_pages(Address address, int64_t bytes, int threads) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr Address kHugePage = Address{1} << 21;
  if (!address || bytes < static_cast<int64_t>(4 * kHugePage)) return;
  const Address first = (address + kHugePage - 1) / kHugePage * kHugePage,
                last = (address + static_cast<Address>(bytes)) / kHugePage * kHugePage;
  if (last <= first || madvise(pointer<void>(first), last - first, MADV_HUGEPAGE) != 0) return;
  const int64_t pages = static_cast<int64_t>((last - first) / kHugePage);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t page = 0; page < pages; ++page) {
    volatile char* byte = pointer<volatile char>(first + static_cast<Address>(page) * kHugePage);
    *byte = *byte;
  }
#else
  (void)address, (void)bytes, (void)threads;
#endif
}

// An output tensor, 0 where it may be absent.
void* output(Address address, int64_t elements, DType dtype, int threads) {
  touch_huge_pages(address, elements * size_of(dtype), threads);
  return pointer<void>(address);
}

uint64_t read_seed(Address seed_ptr) {
  if (!seed_ptr) reject("seed_ptr", "0", "the address of an int64 seed, as noise is drawn");
  return static_cast<uint64_t>(*pointer<const int64_t>(seed_ptr));
}

GateSpec check_spec(const py::tuple& fields) {
  if (fields.size() != 9) reject("spec", std::string(py::repr(fields)), "the 9 fields of dampr.spec.GateSpec");
  GateSpec s{};
  s.family = fields[0].cast<int>(), s.rule = fields[1].cast<int>();
  double* const numbers[] = {&s.beta, &s.gamma, &s.zeta, &s.c0, &s.c1, &s.lo, &s.hi};
  for (size_t j = 0; j < 7; ++j) *numbers[j] = fields[j + 2].cast<double>();
  struct Rules {
    int first, last;
    const char* names;
  };
  static const Rules rules[] = {
      {kSample, kBinary, "0 (sample), 1 (paper), 2 (median) or 3 (binary)"},
      {kIdentity, kIdentity, "4 (identity)"},
      {kTanh, kLinear, "5 (tanh), 6 (ratio), 7 (square_ratio), 8 (exponential), 9 (clip) or 10 (linear)"},
      {kHard, kLogistic, "11 (hard), 12 (hard_constant), 13 (smooth), 14 (exact_zero) or 15 (logistic)"}};
  if (s.family < kHardConcrete || s.family > kMask)
    reject("spec.family", std::to_string(s.family), "0 (hard_concrete), 1 (value), 2 (ramp) or 3 (mask)");
  const Rules& allowed = rules[s.family];
  if (s.rule < allowed.first || s.rule > allowed.last) reject("spec.rule", std::to_string(s.rule), allowed.names);
  if (!(s.beta > 0)) reject("spec.beta", std::to_string(s.beta), "a number above 0");
  return s;
}

// Runs f without the interpreter lock; a false result means that a workspace could not be had.
template <class F>
void without_gil(F&& f) {
  bool done = false;
  {
    py::gil_scoped_release release;
    done = f();
  }
  if (!done) throw std::bad_alloc();
}

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

void philox_words(Address seed_ptr, int64_t start, int64_t count, Address out, int64_t threads) {
  philox<uint32_t>(seed_ptr, start, count, "out_u32_ptr", out, threads, kernels().philox_words);
}

void philox_uniform(Address seed_ptr, int64_t start, int64_t count, Address out, int64_t threads) {
  philox<float>(seed_ptr, start, count, "out_f32_ptr", out, threads, kernels().philox_uniform);
}

// Indices of gates stay within int64.
void check_start(int64_t start, int64_t count) {
  if (start < 0 || start > std::numeric_limits<int64_t>::max() - count)
    reject("start", std::to_string(start), "an index of 0 or more, in int64 with all behind it");
}

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

// How many of n gates are not 0, and, if wanted, a list of these in order, filled up with others to `length` entries.
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

void gates_fwd(const py::tuple& spec, int dtype, Address log_alpha, Address seed_ptr, int64_t rows, int64_t n,
               Address z, int64_t threads, int64_t start) {
  const DType checked = check_dtype("dtype", dtype, true);
  rows_forward(spec, checked, checked, 0, rows, n, log_alpha, seed_ptr, "z", z, threads, start);
}

void gates_bwd(const py::tuple& spec, int dtype, Address log_alpha, Address seed_ptr, int64_t rows, int64_t n,
               Address dz, Address dlog_alpha, int64_t threads, int64_t start) {
  const DType checked = check_dtype("dtype", dtype, true);
  required<void>("dlog_alpha", dlog_alpha, n);
  rows_backward(spec, checked, checked, 0, "dz", dz, rows, n, log_alpha, seed_ptr, 0, 0, dlog_alpha, threads, start);
}

void gate_rows_fwd(const py::tuple& spec, int dtype, Address x, int64_t rows, int64_t n, Address log_alpha,
                   Address seed_ptr, Address out, int64_t threads) {
  const DType checked = check_dtype("dtype", dtype);
  check_sizes("rows", rows, "n", n);
  required<void>("x", x, rows * n);
  rows_forward(spec, checked, checked, x, rows, n, log_alpha, seed_ptr, "out", out, threads);
}

void gate_rows_bwd(const py::tuple& spec, int dtype, Address x, Address g, int64_t rows, int64_t n, Address log_alpha,
                   Address seed_ptr, Address dx, Address xz, Address dlog_alpha, int64_t threads) {
  const DType checked = check_dtype("dtype", dtype);
  check_sizes("rows", rows, "n", n);
  required<void>("x", x, rows * n);
  rows_backward(spec, checked, checked, x, "g", g, rows, n, log_alpha, seed_ptr, dx, xz, dlog_alpha, threads);
}

void gate_weights_fwd(const py::tuple& spec, int w_dtype, int out_dtype, Address w, int64_t count, Address log_alpha,
                      Address seed_ptr, Address out, int64_t threads) {
  const DType from = check_dtype("w_dtype", w_dtype), to = check_dtype("out_dtype", out_dtype);
  check_same_gates("w_dtype", from, "out_dtype", to);
  check_sizes("count", count, "rows", 1);
  required<void>("w", w, count);
  rows_forward(spec, from, to, w, 1, count, log_alpha, seed_ptr, "out", out, threads);
}

void gate_weights_bwd(const py::tuple& spec, int g_dtype, int w_dtype, Address g, Address w, int64_t count,
                      Address log_alpha, Address seed_ptr, Address dw, Address dlog_alpha, int64_t threads,
                      Address folded) {
  const DType from = check_dtype("g_dtype", g_dtype), to = check_dtype("w_dtype", w_dtype);
  check_same_gates("g_dtype", from, "w_dtype", to);
  check_sizes("count", count, "rows", 1);
  required<void>("w", w, count);
  rows_backward(spec, from, to, w, "g", g, 1, count, log_alpha, seed_ptr, dw, folded, dlog_alpha, threads);
}

// total += part, both of a gate dtype.
void add(DType gate, const void* part, void* total, int64_t n) {
  for (int64_t j = 0; j < n; ++j)
    if (gate == kFloat64)
      static_cast<double*>(total)[j] += static_cast<const double*>(part)[j];
    else
      static_cast<float*>(total)[j] += static_cast<const float*>(part)[j];
}

// The gates of the rows and columns of a matrix, drawn (or evaluated) once for all, with room for their gradients.
// Absent ones are null.
struct FoldGates {
  std::vector<double> room;  // of either gate dtype
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

// A bias has an element for each row only where rows have gates.
void check_bias(Address b, Address out_log_alpha) {
  if (b && !out_log_alpha) reject("b", std::to_string(b), "0, as rows have no gates");
}

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

// The number of blocks of a weight, after checks of what it follows from.
int64_t check_blocks(int64_t n_out, int64_t n_in, int64_t block_rows, int64_t block_cols) {
  check_sizes("n_out", n_out, "n_in", n_in);
  if (block_rows < 1) reject("block_rows", std::to_string(block_rows), "a size, 1 or more");
  if (block_cols < 1) reject("block_cols", std::to_string(block_cols), "a size, 1 or more");
  return (n_out / block_rows + (n_out % block_rows != 0)) * (n_in / block_cols + (n_in % block_cols != 0));
}

// The gates of blocks of a matrix, drawn (or evaluated) once, with room for their gradient.
struct BlockGates {
  std::vector<double> room;  // of either gate dtype
  void *z, *dz;
  RowsForward rows;

  BlockGates(const GateSpec& s, int64_t blocks, Address log_alpha, Address seed_ptr)
      : room(static_cast<size_t>(2 * blocks)),
        z(room.data()),
        dz(room.data() + blocks),
        rows{nullptr, required<const void>("log_alpha", log_alpha, blocks), z, 1,
             blocks,  s.rule == kSample ? read_seed(seed_ptr) : 0} {}
};

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

// Which entries of an axis are moved, and between what; x has n_x entries there, out n_out.
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

void pick(int dtype, Address x, int64_t outer, int64_t n, int64_t inner, Address places, int64_t count, Address out,
          int64_t threads) {
  const Kernels& k = kernels();
  const int team = check_threads(threads);
  const DType checked = check_dtype("dtype", dtype);
  const Axis a = check_axis(checked, x, n, outer, n, inner, places, count, out, count, team);
  without_gil([&] { return k.pick(checked, a, team), true; });
}

void place(int dtype, Address x, int64_t outer, int64_t n, int64_t inner, Address places, int64_t count, Address out,
           int64_t threads) {
  const Kernels& k = kernels();
  const int team = check_threads(threads);
  const DType checked = check_dtype("dtype", dtype);
  const Axis a = check_axis(checked, x, count, outer, n, inner, places, count, out, n, team);
  without_gil([&] { return k.place(checked, a, team); });
}

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

void check_shape(int64_t outer, int64_t middle, int64_t n, int64_t inner) {
  check_sizes("outer", outer, "middle", middle), check_sizes("n", n, "inner", inner),
      check_sizes("outer", outer * middle, "n", n * inner);
}

// A tensor (outer, middle, n, inner) and the gates of its third axis.
Planes check_planes(Address z, int64_t outer, int64_t middle, int64_t n, int64_t inner, bool per_outer) {
  check_shape(outer, middle, n, inner);
  Planes a{};
  a.z = required<const void>("z", z, per_outer ? outer * n : n);
  a.outer = outer, a.middle = middle, a.n = n, a.inner = inner, a.per_outer = per_outer;
  return a;
}

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

// The gates behind a norm, a draw for all or one for each outer index, in memory of this call.
struct NormDraw {
  GateSpec spec;
  DType dtype;
  RowsForward gates{};
  std::unique_ptr<double[]> room;  // of either dtype

  NormDraw(const py::tuple& fields, DType x, const Planes& a, Address log_alpha, Address seed_ptr)
      : spec(check_spec(fields)), dtype(x == kFloat64 ? kFloat64 : kFloat32) {
    gates.log_alpha = required<const void>("log_alpha", log_alpha, a.n);
    gates.rows = a.per_outer ? a.outer : 1, gates.n = a.n, gates.seed = spec.rule == kSample ? read_seed(seed_ptr) : 0;
    room.reset(new double[static_cast<size_t>(gates.rows * a.n)]);
    gates.out = room.get();
  }
};

// What both directions of a norm have in common.
NormGate check_norm(int64_t outer, int64_t middle, int64_t n, int64_t inner, bool per_outer, Address gain, Address bias,
                    Address mean, Address var, double eps, bool relu) {
  check_shape(outer, middle, n, inner);
  if (!(eps >= 0)) reject("eps", std::to_string(eps), "a number, 0 or more");
  NormGate a{};
  a.planes.outer = outer, a.planes.middle = middle, a.planes.n = n, a.planes.inner = inner,
  a.planes.per_outer = per_outer;
  a.gain = pointer<const void>(gain), a.bias = pointer<const void>(bias), a.eps = eps, a.relu = relu;
  a.mean = required<const void>("mean", mean, n), a.var = required<const void>("var", var, n);
  return a;
}

// running = (1 - momentum) running + momentum scale value, rounded once.
template <class G>
void move_statistic(G* running, const void* values, int64_t n, double momentum, double scale) {
  for (int64_t j = 0; running && j < n; ++j)
    running[j] = static_cast<G>((1 - momentum) * static_cast<double>(running[j]) +
                                momentum * scale * static_cast<double>(static_cast<const G*>(values)[j]));
}

template <class G>
void move_statistics(Address running_mean, Address running_var, const NormGate& a, int64_t count, double momentum) {
  move_statistic(pointer<G>(running_mean), a.mean, a.planes.n, momentum, 1.0);
  move_statistic(pointer<G>(running_var), a.var, a.planes.n, momentum,
                 static_cast<double>(count) / static_cast<double>(count - 1));
}

void norm_gate_fwd(const py::tuple& spec, int dtype, Address x, int64_t outer, int64_t middle, int64_t n, int64_t inner,
                   Address log_alpha, Address seed_ptr, bool per_outer, Address gain, Address bias, bool training,
                   Address mean, Address var, Address running_mean, Address running_var, Address updates,
                   double momentum, double eps, bool relu, Address out, int64_t threads) {
  const Kernels& k = kernels();
  const DType checked = check_dtype("dtype", dtype);
  NormGate a = check_norm(outer, middle, n, inner, per_outer, gain, bias, mean, var, eps, relu);
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

void norm_gate_bwd(const py::tuple& spec, int dtype, Address g, Address x, int64_t outer, int64_t middle, int64_t n,
                   int64_t inner, Address log_alpha, Address seed_ptr, bool per_outer, Address gain, Address bias,
                   bool training, Address mean, Address var, double eps, bool relu, Address dx, Address dgain,
                   Address dbias, Address dlog_alpha, int64_t threads) {
  const Kernels& k = kernels();
  const DType checked = check_dtype("dtype", dtype);
  NormGate a = check_norm(outer, middle, n, inner, per_outer, gain, bias, mean, var, eps, relu);
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

// What both directions of a small layer have in common.
SmallLinear check_small(const GateSpec& s, int64_t m, int64_t n, int64_t k, Address x, Address w, Address in_log_alpha,
                        Address out_log_alpha, Address in_seed_ptr, Address out_seed_ptr, bool per_sample) {
  check_sizes("m", m, "k", k), check_sizes("m", m, "n", n), check_sizes("n", n, "k", k);
  SmallLinear a{};
  a.x = required<const void>("x", x, m * k), a.w = required<const void>("w", w, n * k);
  a.in_log_alpha = pointer<const void>(in_log_alpha), a.out_log_alpha = pointer<const void>(out_log_alpha);
  a.in_seed = in_log_alpha && s.rule == kSample ? read_seed(in_seed_ptr) : 0;
  a.out_seed = out_log_alpha && s.rule == kSample ? read_seed(out_seed_ptr) : 0;
  a.m = m, a.n = n, a.k = k, a.per_sample = per_sample;
  return a;
}

void small_fwd(const py::tuple& spec, int dtype, int64_t m, int64_t n, int64_t k, Address x, Address w, Address b,
               Address in_log_alpha, Address out_log_alpha, Address in_seed_ptr, Address out_seed_ptr, bool per_sample,
               Address y, Address pre) {
  const Kernels& table = kernels();
  const GateSpec s = check_spec(spec);
  const DType checked = check_dtype("dtype", dtype, true);
  SmallLinear a = check_small(s, m, n, k, x, w, in_log_alpha, out_log_alpha, in_seed_ptr, out_seed_ptr, per_sample);
  a.b = pointer<const void>(b), a.y = required<void>("y", y, m * n), a.pre = pointer<void>(pre);
  without_gil([&] { return table.small_forward(s, checked, a); });
}

void small_bwd(const py::tuple& spec, int dtype, int64_t m, int64_t n, int64_t k, Address dy, Address x, Address w,
               Address b, Address in_log_alpha, Address out_log_alpha, Address in_seed_ptr, Address out_seed_ptr,
               bool per_sample, Address pre, Address dx, Address dw, Address db, Address din, Address dout) {
  const Kernels& table = kernels();
  const GateSpec s = check_spec(spec);
  const DType checked = check_dtype("dtype", dtype, true);
  SmallLinear a = check_small(s, m, n, k, x, w, in_log_alpha, out_log_alpha, in_seed_ptr, out_seed_ptr, per_sample);
  a.dy = required<const void>("dy", dy, m * n), a.b = pointer<const void>(b), a.pre = pointer<void>(pre);
  a.dx = pointer<void>(dx), a.dw = pointer<void>(dw), a.db = pointer<void>(db);
  a.din = in_log_alpha ? pointer<void>(din) : nullptr, a.dout = out_log_alpha ? pointer<void>(dout) : nullptr;
  without_gil([&] { return table.small_backward(s, checked, a); });
}

// What both directions of a generator have in common. widths: of a_0, a_1, ...; addresses and pointers hold on to the
// parameters.
Generator check_generator(const std::vector<Address>& addresses, const std::vector<int64_t>& widths, double limit,
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

void generator_fwd(int dtype, const std::vector<Address>& parameters, const std::vector<int64_t>& widths, double limit,
                   Address values) {
  const Kernels& table = kernels();
  const DType checked = check_dtype("dtype", dtype, true);
  std::vector<const void*> pointers;
  Generator a = check_generator(parameters, widths, limit, pointers);
  a.values = required<void>("values", values, 1);
  without_gil([&] { return table.generator_forward(checked, a), true; });
}

void generator_bwd(int dtype, const std::vector<Address>& parameters, const std::vector<int64_t>& widths, double limit,
                   Address values, Address dvalues, const std::vector<Address>& grads) {
  const Kernels& table = kernels();
  const DType checked = check_dtype("dtype", dtype, true);
  std::vector<const void*> pointers;
  Generator a = check_generator(parameters, widths, limit, pointers);
  a.values = required<void>("values", values, 1), a.dvalues = required<const void>("dvalues", dvalues, 1);
  if (grads.size() != parameters.size())
    reject("grads", std::to_string(grads.size()) + " addresses", "one for each parameter");
  std::vector<void*> targets;
  for (Address address : grads) targets.push_back(required<void>("grads", address, 1));
  a.grads = targets.data();
  without_gil([&] { return table.generator_backward(checked, a); });
}

// Who made the processor, as far as the choice of a library for matrix products depends on it.
std::string vendor() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd") ? "amd" : __builtin_cpu_is("intel") ? "intel" : "other";
#else
  return "other";
#endif
}

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
  m.def("pick", &dampr::pick, "out (outer, count, inner) = x[:, places] of x (outer, n, inner).", "dtype"_a, "x"_a,
        "outer"_a, "n"_a, "inner"_a, "places"_a, "count"_a, "out"_a, "threads"_a);
  m.def("place", &dampr::place, "out (outer, n, inner), zeros but for out[:, places] = x (outer, count, inner).",
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
