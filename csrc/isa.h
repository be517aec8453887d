// The instruction sets that were compiled, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace dampr {

// The kernels of the best instruction set of this processor, or of the one that DAMPR_CPU_ISA names. Throws
// std::runtime_error where that is not there.
const Kernels& kernels();

// The names of those that were compiled, best first.
std::vector<std::string> compiled_isas();

// Who made the processor, as far as the choice of a library for matrix products depends on it.
std::string vendor();

}  // namespace dampr
