// From an instruction set to its kernels.
#pragma once

#include "core/isa.h"
#include "core/kernels.h"

namespace fastmkd {

// Kernels of one instruction set (it must be available), and of the active one.
FASTMKD_API const Kernels& kernels(Isa isa);
FASTMKD_API const Kernels& kernels();

}  // namespace fastmkd
