// Checks that every call makes of its arguments before a kernel runs. An error names the argument, its value, and what
// was expected.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <new>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace py = pybind11;

namespace dampr {
namespace {

using Address = std::uintptr_t;  // the address of a tensor's data; 0: there is no tensor

// Throws a Python ValueError "name=value: expected ...".
[[noreturn]] void reject(const std::string& name, const std::string& value, const std::string& expected) {
  throw py::value_error(name + "=" + value + ": expected " + expected);
}

// The number of threads as an int.
int check_threads(int64_t threads) {
  if (threads < 1 || threads > std::numeric_limits<int>::max())
    reject("threads", std::to_string(threads), "a positive number of threads");
  return static_cast<int>(threads);
}

// Rejects sizes below 0, and two whose product could overflow an offset in bytes.
void check_sizes(const char* first_name, int64_t first, const char* second_name, int64_t second) {
  if (first < 0) reject(first_name, std::to_string(first), "a size, 0 or more");
  if (second < 0) reject(second_name, std::to_string(second), "a size, 0 or more");
  if (second > 0 && first > std::numeric_limits<int64_t>::max() / 8 / second)
    reject(first_name, std::to_string(first),
           std::string("a size whose product with ") + second_name + " is below 2^60");
}

// The dtype of this code. gate_dtype: only float32 and float64 are allowed.
DType check_dtype(const char* name, int dtype, bool gate_dtype = false) {
  if (gate_dtype && dtype != kFloat32 && dtype != kFloat64)
    reject(name, std::to_string(dtype), "0 (float32) or 1 (float64)");
  if (dtype < kFloat32 || dtype > kFloat16)
    reject(name, std::to_string(dtype), "0 (float32), 1 (float64), 2 (bfloat16) or 3 (float16)");
  return static_cast<DType>(dtype);
}

// Rejects two dtypes whose gates are computed in different types: float64 goes with float64 alone.
void check_same_gates(const char* first_name, DType first, const char* second_name, DType second) {
  if ((first == kFloat64) != (second == kFloat64))
    reject(second_name, std::to_string(second),
           std::string("float64 (1) exactly if ") + first_name + "=" + std::to_string(first) + " is");
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// The address as a pointer; rejects 0, unless there are no elements.
template <class T>
T* required(const char* name, Address address, int64_t elements) {
  if (!address && elements > 0) reject(name, "0", "an address, as there are " + std::to_string(elements) + " elements");
  return pointer<T>(address);
}

// The bytes of one element.
int64_t size_of(DType dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// Makes the system give memory to a large output in huge pages (2 MB). A new allocation gets no memory until it is
// written. Getting memory in pages of 4 KB takes several times as long as filling it: 17 ms for 64 MB, against 5 ms in
// huge pages. One thread touches each page, because two threads that touch a new page at the same time would both clear
// it. Touching rewrites the byte that is there, because an output may be an input too.
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

// An output tensor as a pointer, null if it is absent.
void* output(Address address, int64_t elements, DType dtype, int threads) {
  touch_huge_pages(address, elements * size_of(dtype), threads);
  return pointer<void>(address);
}

// The seed at this address.
uint64_t read_seed(Address seed_ptr) {
  if (!seed_ptr) reject("seed_ptr", "0", "the address of an int64 seed, as noise is drawn");
  return static_cast<uint64_t>(*pointer<const int64_t>(seed_ptr));
}

// The gate spec from the fields of a dampr.spec.GateSpec; rejects unknown families and rules.
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

// Runs f without Python's interpreter lock. f returns false if it could not allocate a workspace; then this throws.
template <class F>
void without_gil(F&& f) {
  bool done = false;
  {
    py::gil_scoped_release release;
    done = f();
  }
  if (!done) throw std::bad_alloc();
}

// Rejects a first gate index with which the last one would not fit into int64.
void check_start(int64_t start, int64_t count) {
  if (start < 0 || start > std::numeric_limits<int64_t>::max() - count)
    reject("start", std::to_string(start), "an index of 0 or more, in int64 with all behind it");
}

}  // namespace
}  // namespace dampr
