// A quick check of every kernel against its definition, on the machine at hand.
#pragma once

#include <string>
#include <vector>

#include "core/isa.h"

namespace fastmkd {

struct SelfTestResult {
  std::string name;  // "avx2/select_tokens"
  bool ok;
  std::string detail;  // the worst error found, or what went wrong
};

// Runs every available instruction set on small fixed inputs; takes a few milliseconds.
FASTMKD_API std::vector<SelfTestResult> self_test();

}  // namespace fastmkd
