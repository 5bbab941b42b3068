// A coverage-guided fuzzer for compilers without libFuzzer: inputs that reach new code are kept and changed further.
//
// GCC's -fsanitize-coverage=trace-pc calls __sanitizer_cov_trace_pc at every basic block. Takes libFuzzer's flags
// -max_total_time=SECONDS, -runs=N and -seed=N. An input that ends the process is left in crash.bin; a file given as
// an argument is run once instead of fuzzing.
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());
extern "C" __attribute__((visibility("default"))) void __sanitizer_cov_trace_pc();

namespace {

using Input = std::vector<uint8_t>;

constexpr size_t kPlaces = 1 << 16, kMostBytes = 512;
uint8_t hits[kPlaces];  // by hashed address, of the input at hand
uint8_t seen[kPlaces];  // one bit for each power of two of hits, of all inputs
Input current;

void leave_input() {
  std::ofstream("crash.bin", std::ios::binary)
      .write(reinterpret_cast<const char*>(current.data()), static_cast<std::streamsize>(current.size()));
  std::fprintf(stderr, "the input is in crash.bin\n");
}

// Whether the last input did something that none before it did; counts places seen for the first time.
bool is_new(int64_t& places) {
  bool found = false;
  for (size_t i = 0; i < kPlaces; ++i) {
    if (hits[i] == 0) continue;
    uint8_t bit = 1;
    for (uint8_t count = hits[i]; count > 1; count >>= 1) bit = static_cast<uint8_t>(bit << 1);
    places += seen[i] == 0;
    found |= (seen[i] & bit) == 0;
    seen[i] |= bit;
    hits[i] = 0;
  }
  return found;
}

Input changed(Input input, const std::vector<Input>& corpus, std::mt19937& engine) {
  const auto draw = [&](size_t count) { return std::uniform_int_distribution<size_t>(0, count - 1)(engine); };
  for (size_t times = 1 + draw(4); times > 0; --times) {
    const size_t kind = input.empty() ? 3 : draw(5);
    if (kind == 0) {
      input[draw(input.size())] = static_cast<uint8_t>(engine());
    } else if (kind == 1) {
      input[draw(input.size())] ^= static_cast<uint8_t>(1u << draw(8));
    } else if (kind == 2) {
      input.erase(input.begin() + static_cast<std::ptrdiff_t>(draw(input.size())));
    } else if (kind == 3) {
      input.insert(input.end(), 1 + draw(16), static_cast<uint8_t>(engine()));
    } else {  // the tail of another
      const Input& other = corpus[draw(corpus.size())];
      const size_t at = draw(input.size());
      input.resize(at);
      if (at < other.size()) input.insert(input.end(), other.begin() + static_cast<std::ptrdiff_t>(at), other.end());
    }
  }
  if (input.size() > kMostBytes) input.resize(kMostBytes);
  return input;
}

}  // namespace

void __sanitizer_cov_trace_pc() {
  const auto address = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  uint8_t& count = hits[(address * 0x9e3779b97f4a7c15u) >> 48];
  if (count < 255) ++count;
}

int main(int argc, char** argv) {
  double seconds = 1e18, runs = 1e18;
  unsigned seed = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const std::string value = argument.substr(argument.find('=') + 1);
    if (argument.rfind("-max_total_time=", 0) == 0) {
      seconds = std::stod(value);
    } else if (argument.rfind("-runs=", 0) == 0) {
      runs = std::stod(value);
    } else if (argument.rfind("-seed=", 0) == 0) {
      seed = static_cast<unsigned>(std::stoul(value));
    } else {
      std::ifstream file(argument, std::ios::binary);
      current.assign(std::istreambuf_iterator<char>(file), {});
      LLVMFuzzerTestOneInput(current.data(), current.size());
      return EXIT_SUCCESS;
    }
  }
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(leave_input);
  std::signal(SIGABRT, [](int) { leave_input(); });
  std::mt19937 engine(seed);
  std::vector<Input> corpus{{}};
  int64_t executions = 0, places = 0;
  const auto start = std::chrono::steady_clock::now();
  const auto passed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  for (; passed() < seconds && static_cast<double>(executions) < runs; ++executions) {
    current = changed(corpus[std::uniform_int_distribution<size_t>(0, corpus.size() - 1)(engine)], corpus, engine);
    LLVMFuzzerTestOneInput(current.data(), current.size());
    if (is_new(places)) corpus.push_back(current);
  }
  std::printf("%lld executions in %.0f s, %zu inputs kept, %lld places reached\n", static_cast<long long>(executions),
              passed(), corpus.size(), static_cast<long long>(places));
  return EXIT_SUCCESS;
}
