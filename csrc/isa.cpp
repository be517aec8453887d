// Chooses the instruction set: the best one that was compiled and that this processor has, or the one that
// DAMPR_CPU_ISA names.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dampr {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  // F16C by cpuid, because not every compiler's __builtin_cpu_supports knows that name
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

// The kernels to use; null if DAMPR_CPU_ISA names an instruction set that is not available. Every call then throws
// instead of using another one.
const Kernels* choose_kernels() {
  const char* wanted = std::getenv("DAMPR_CPU_ISA");
  for (const Kernels* k : usable_kernels())
    if (!wanted || !*wanted || std::string(wanted) == k->isa) return k;
  return nullptr;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* chosen = choose_kernels();
  if (chosen) return *chosen;
  std::string names;
  for (const Kernels* k : usable_kernels()) names += std::string(names.empty() ? "" : ", ") + k->isa;
  const char* wanted = std::getenv("DAMPR_CPU_ISA");
  throw std::runtime_error("DAMPR_CPU_ISA=" + std::string(wanted ? wanted : "") +
                           ": this build on this processor offers " + names);
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

std::string vendor() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd") ? "amd" : __builtin_cpu_is("intel") ? "intel" : "other";
#else
  return "other";
#endif
}

}  // namespace dampr
