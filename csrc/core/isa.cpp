#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastmkd {
namespace {

constexpr Isa kAllIsas[] = {Isa::generic, Isa::neon, Isa::avx2, Isa::avx512, Isa::avx512_bf16};
constexpr int kUnresolved = -1;

std::atomic<int> active{kUnresolved};

bool was_compiled(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::neon:
#ifdef FASTMKD_HAVE_NEON
      return true;
#else
      return false;
#endif
    case Isa::avx2:
#ifdef FASTMKD_HAVE_AVX2
      return true;
#else
      return false;
#endif
    case Isa::avx512:
#ifdef FASTMKD_HAVE_AVX512
      return true;
#else
      return false;
#endif
    case Isa::avx512_bf16:
#ifdef FASTMKD_HAVE_AVX512_BF16
      return true;
#else
      return false;
#endif
  }
  return false;
}

// The compiler's support library also asks whether the operating system saves the wide registers.
bool can_run(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::neon:
      return false;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
#ifdef FASTMKD_HAVE_AVX512_BF16
      return avx512 && __builtin_cpu_supports("avx512bf16");
#else
      return false;
#endif
  }
  return false;
#elif defined(__aarch64__)
  return isa == Isa::generic || isa == Isa::neon;
#else
  return isa == Isa::generic;
#endif
}

bool is_available(Isa isa) { return was_compiled(isa) && can_run(isa); }

std::string join_available() {
  std::string names;
  for (Isa isa : available_isas()) names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  return names;
}

Isa parse(const std::string& name, const std::string& source) {
  for (Isa isa : kAllIsas) {
    if (name != isa_name(isa)) continue;
    if (is_available(isa)) return isa;
    const char* why = was_compiled(isa) ? "this processor does not have it" : "it was not compiled into this build";
    throw std::invalid_argument(source + " asks for instruction set '" + name + "', but " + why +
                                "; available: " + join_available());
  }
  throw std::invalid_argument(source + " asks for instruction set '" + name +
                              "', which does not exist; available: " + join_available());
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return "generic";
    case Isa::neon:
      return "neon";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("sse4.2")) features.emplace_back("sse4.2");
  if (__builtin_cpu_supports("avx2")) features.emplace_back("avx2");
  if (__builtin_cpu_supports("fma")) features.emplace_back("fma");
  if (__builtin_cpu_supports("avx512f")) features.emplace_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) features.emplace_back("avx512bw");
  if (__builtin_cpu_supports("avx512dq")) features.emplace_back("avx512dq");
  if (__builtin_cpu_supports("avx512vl")) features.emplace_back("avx512vl");
  if (__builtin_cpu_supports("avx512vnni")) features.emplace_back("avx512_vnni");
#ifdef FASTMKD_HAVE_AVX512_BF16
  if (__builtin_cpu_supports("avx512bf16")) features.emplace_back("avx512_bf16");
#endif
#elif defined(__aarch64__)
  features.emplace_back("neon");
#endif
  return features;
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa isa : kAllIsas) {
    if (is_available(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa active_isa() {
  const int current = active.load(std::memory_order_relaxed);
  if (current != kUnresolved) return static_cast<Isa>(current);
  const char* wanted = std::getenv("FASTMKD_ISA");
  const Isa isa = wanted != nullptr && *wanted != '\0' ? parse(wanted, "FASTMKD_ISA") : available_isas().back();
  // Another thread may have called set_isa() in the meantime: its choice stays.
  int expected = kUnresolved;
  active.compare_exchange_strong(expected, static_cast<int>(isa), std::memory_order_relaxed);
  return static_cast<Isa>(active.load(std::memory_order_relaxed));
}

void set_isa(const std::string& name) {
  active.store(static_cast<int>(parse(name, "set_isa")), std::memory_order_relaxed);
}

}  // namespace fastmkd
