// The table of kernels for one instruction set. The build compiles this file once for each, with DAMPR_ISA (and
// DAMPR_AVX2 or DAMPR_AVX512) defined.
//
// The loops are templates in rows.h, folds.h, blocks.h, planes.h, axis.h, norms.h, small.h and generator.h. Each
// function here that ends in _entry is a row of the table: it picks the instance of the template of the same name for
// the dtypes and the gate family of a call. kernels.h says what each computes, and what a false result means.
#if defined(DAMPR_AVX512) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc's own AVX-512 header, bug 105593
#endif

#include "kernels.h"

#include "axis.h"
#include "blocks.h"
#include "folds.h"
#include "gate_families.h"
#include "generator.h"
#include "norms.h"
#include "philox.h"
#include "planes.h"
#include "rows.h"
#include "small.h"
#include "storage.h"
#include "work.h"

#define DAMPR_JOIN_(a, b) a##b
#define DAMPR_JOIN(a, b) DAMPR_JOIN_(a, b)
#define DAMPR_TEXT_(a) #a
#define DAMPR_TEXT(a) DAMPR_TEXT_(a)

namespace dampr {
namespace {

// A type as a value, to pass types to lambdas: Tag<T>().
template <class T>
struct Tag {
  using Type = T;
};
template <class T>
struct Tag<const T&> {
  using Type = T;
};

// Calls f(Tag<T>()) with the type of this dtype.
template <class F>
inline void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case kFloat32:
      return f(Tag<float>());
    case kFloat64:
      return f(Tag<double>());
    case kBFloat16:
      return f(Tag<BFloat16>());
    case kFloat16:
      return f(Tag<Float16>());
  }
}

// Calls f(a, b) if both types have the same gate type (both are double, or neither); callers have checked that.
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

void rows_forward_entry(const GateSpec& spec, DType x, DType out, const RowsForward& a, int threads) {
  with_dtypes(x, out, [&](auto from, auto to) {
    using X = typename decltype(from)::Type;
    using T = typename decltype(to)::Type;
    with_gate<typename Storage<T>::Gate>(spec, [&](const auto& gate) {
      using Gate = typename Tag<decltype(gate)>::Type;
      using G = typename Gate::Value;
      if (a.x)
        rows_forward<X, T, Gate, true>(gate, a, threads);
      else
        rows_forward<G, G, Gate, false>(gate, a, threads);  // z itself is never stored narrower than it is computed
    });
  });
}

bool rows_backward_entry(const GateSpec& spec, DType g, DType x, const RowsBackward& a, int threads) {
  bool done = false;
  with_dtypes(g, x, [&](auto from, auto to) {
    using T = typename decltype(from)::Type;
    using X = typename decltype(to)::Type;
    with_gate<typename Storage<T>::Gate>(spec, [&](const auto& gate) {
      using Gate = typename Tag<decltype(gate)>::Type;
      using G = typename Gate::Value;
      done =
          a.x ? rows_backward<T, X, Gate, true>(gate, a, threads) : rows_backward<G, G, Gate, false>(gate, a, threads);
    });
  });
  return done;
}

void fold_forward_entry(DType w, DType out, const FoldForward& a, int threads) {
  with_dtypes(w, out, [&](auto from, auto to) {
    fold_forward<typename decltype(from)::Type, typename decltype(to)::Type>(a, threads);
  });
}

bool fold_backward_entry(DType g, DType w, const FoldBackward& a, int threads) {
  bool done = false;
  with_dtypes(g, w, [&](auto from, auto to) {
    done = fold_backward<typename decltype(from)::Type, typename decltype(to)::Type>(a, threads);
  });
  return done;
}

void fold_blocks_forward_entry(DType w, DType out, const FoldBlocksForward& a, int threads) {
  with_dtypes(w, out, [&](auto from, auto to) {
    fold_blocks_forward<typename decltype(from)::Type, typename decltype(to)::Type>(a, threads);
  });
}

bool fold_blocks_backward_entry(DType g, DType w, const FoldBlocksBackward& a, int threads) {
  bool done = false;
  with_dtypes(g, w, [&](auto from, auto to) {
    done = fold_blocks_backward<typename decltype(from)::Type, typename decltype(to)::Type>(a, threads);
  });
  return done;
}

void planes_forward_entry(DType dtype, const Planes& a, int threads) {
  with_dtype(dtype, [&](auto x) { planes_forward<typename decltype(x)::Type>(a, threads); });
}

bool planes_backward_entry(DType dtype, const Planes& a, int threads) {
  bool done = false;
  with_dtype(dtype, [&](auto x) { done = planes_backward<typename decltype(x)::Type>(a, threads); });
  return done;
}

// Calls f(Tag<T>()) with a type of the size of this dtype's elements, for kernels that only move values.
template <class F>
void with_size(DType dtype, F&& f) {
  if (dtype == kFloat64) return f(Tag<double>());
  if (dtype == kFloat32) return f(Tag<float>());
  f(Tag<uint16_t>());
}

void gather_entry(DType dtype, const Axis& a, int threads) {
  with_size(dtype, [&](auto x) { gather<typename decltype(x)::Type>(a, threads); });
}

// Returns false if scatter could not allocate its workspace.
bool scatter_entry(DType dtype, const Axis& a, int threads) {
  bool done = false;
  with_size(dtype, [&](auto x) { done = scatter<typename decltype(x)::Type>(a, threads); });
  return done;
}

void transpose_entry(DType dtype, const void* x, void* out, int64_t rows, int64_t n, int threads) {
  with_size(dtype, [&](auto t) {
    using T = typename decltype(t)::Type;
    transpose(static_cast<const T*>(x), static_cast<T*>(out), rows, n, threads);
  });
}

bool norm_stats_entry(DType dtype, const Planes& a, void* mean, void* var, int threads) {
  bool done = false;
  with_dtype(dtype, [&](auto x) { done = norm_stats<typename decltype(x)::Type>(a, mean, var, threads); });
  return done;
}

bool norm_gate_forward_entry(DType dtype, const NormGate& a, int threads) {
  bool done = false;
  with_dtype(dtype, [&](auto x) {
    using X = typename decltype(x)::Type;
    done = a.relu ? norm_gate_forward<true, X>(a, threads) : norm_gate_forward<false, X>(a, threads);
  });
  return done;
}

bool norm_gate_backward_entry(DType dtype, const NormGate& a, int threads) {
  bool done = false;
  with_dtype(dtype, [&](auto x) {
    using X = typename decltype(x)::Type;
    done = a.relu ? norm_gate_backward<true, X>(a, threads) : norm_gate_backward<false, X>(a, threads);
  });
  return done;
}

// Calls f(gate) with the gate type for `spec` in float or double, and returns its result.
template <class F>
bool with_small_gate(const GateSpec& spec, DType dtype, F&& f) {
  bool done = false;
  const auto run = [&](const auto& gate) { done = f(gate); };
  if (dtype == kFloat64)
    with_gate<double>(spec, run);
  else
    with_gate<float>(spec, run);
  return done;
}

bool small_forward_entry(const GateSpec& spec, DType dtype, const SmallLinear& a) {
  return with_small_gate(
      spec, dtype, [&](const auto& gate) { return small_forward<typename Tag<decltype(gate)>::Type::Value>(gate, a); });
}

bool small_backward_entry(const GateSpec& spec, DType dtype, const SmallLinear& a) {
  return with_small_gate(spec, dtype, [&](const auto& gate) {
    return small_backward<typename Tag<decltype(gate)>::Type::Value>(gate, a);
  });
}

void generator_forward_entry(DType dtype, const Generator& a) {
  return dtype == kFloat64 ? generator_forward<double>(a) : generator_forward<float>(a);
}

bool generator_backward_entry(DType dtype, const Generator& a) {
  return dtype == kFloat64 ? generator_backward<double>(a) : generator_backward<float>(a);
}

constexpr Kernels kKernels = {DAMPR_TEXT(DAMPR_ISA),   philox_words_entry,        philox_uniform_entry,
                              rows_forward_entry,      rows_backward_entry,       fold_forward_entry,
                              fold_backward_entry,     fold_blocks_forward_entry, fold_blocks_backward_entry,
                              planes_forward_entry,    planes_backward_entry,     gather_entry,
                              scatter_entry,           transpose_entry,           norm_stats_entry,
                              norm_gate_forward_entry, norm_gate_backward_entry,  small_forward_entry,
                              small_backward_entry,    generator_forward_entry,   generator_backward_entry};

}  // namespace

const Kernels* DAMPR_JOIN(kernels_, DAMPR_ISA)() { return &kKernels; }

}  // namespace dampr
