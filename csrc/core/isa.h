// Which instruction set the kernels use: found at run time, overridable by FASTMKD_ISA or set_isa().
#pragma once

#include <string>
#include <vector>

#define FASTMKD_API __attribute__((visibility("default")))

namespace fastmkd {

// Ordered from the plainest to the fastest; the last available one is the default.
enum class Isa : int { generic, neon, avx2, avx512, avx512_bf16 };

// "generic", "neon", "avx2", "avx512" or "avx512_bf16".
FASTMKD_API const char* isa_name(Isa isa);

// Instruction set extensions of this processor that the library knows about, for reports ("avx2", "avx512f", ...).
FASTMKD_API std::vector<std::string> cpu_features();

// Instruction sets that were compiled in and that this processor (and its operating system) can run.
FASTMKD_API std::vector<Isa> available_isas();

// The one in use. The first call reads FASTMKD_ISA; throws std::invalid_argument when that names one that cannot run.
FASTMKD_API Isa active_isa();

// Switches every later kernel call; throws std::invalid_argument for an unknown or unavailable name.
// Calls already running finish with the instruction set they started with.
FASTMKD_API void set_isa(const std::string& name);

}  // namespace fastmkd
