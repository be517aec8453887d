// The instruction sets that were compiled, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace dampr {

// The kernels of the best compiled instruction set that this processor has, or of the one that the environment variable
// DAMPR_CPU_ISA names. Throws std::runtime_error if that one is not available.
const Kernels& kernels();

// The names of the compiled instruction sets, best first.
std::vector<std::string> compiled_isas();

// "amd", "intel" or "other", the maker of the processor. The choice of a library for matrix products depends on it.
std::string vendor();

}  // namespace dampr
