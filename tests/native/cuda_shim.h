// Runs a CUDA kernel's source on a CPU, one block after the other.
//
// Each CUDA thread is a fibre (ucontext) of one OS thread, switched only at barriers and shuffles, so a run is exactly
// repeatable. The order in which fibres run between two barriers is an argument: a kernel whose result changes with it
// lacks a barrier. A barrier that part of the block does not reach is an error, not a hang. What this cannot show:
// speed, memory coalescing, and races between two accesses that no order of whole segments exposes.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // blocks run one at a time, and a stale value of the block before is what a device has too
#define __launch_bounds__(...)
#define __grid_constant__
#define FASTMKD_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(cuda_shim::dynamic_shared())

struct ShimIndex {
  unsigned x = 0, y = 0, z = 0;
};
inline ShimIndex threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_shim {

enum class Order { forward, reverse, shuffled };

class Block {
 public:
  Block(unsigned threads, size_t shared_bytes, Order order, const std::function<void()>& kernel)
      : kernel_(kernel), fibres_(threads), shared_(shared_bytes), sequence_(threads), order_(order), engine_(7) {
    std::iota(sequence_.begin(), sequence_.end(), 0u);
    if (order == Order::reverse) std::reverse(sequence_.begin(), sequence_.end());
    for (Fibre& fibre : fibres_) fibre.stack = std::make_unique_for_overwrite<std::byte[]>(kStackBytes);
  }

  void run() {
    current = this;
    std::fill(shared_.begin(), shared_.end(), std::byte{0xcd});
    for (Fibre& fibre : fibres_) {
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.get();
      fibre.context.uc_stack.ss_size = kStackBytes;
      fibre.context.uc_link = &scheduler_;
      fibre.state = State::ready;
      makecontext(&fibre.context, &Block::enter, 0);
    }
    while (!all_in(0, fibres_.size(), State::done)) {
      if (order_ == Order::shuffled) std::shuffle(sequence_.begin(), sequence_.end(), engine_);
      for (unsigned i : sequence_) {
        if (fibres_[i].state == State::ready) resume(i);
      }
      release();
    }
  }

  void wait_for_block() { wait(State::at_block_barrier); }

  // The value that `source` wrote, for the whole warp at once.
  template <class T>
  T exchange(T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    std::memcpy(&fibres_[running_].slot, &value, sizeof(T));
    wait(State::at_warp_barrier);
    T result;
    std::memcpy(&result, &fibres_[running_ / kWarp * kWarp + source].slot, sizeof(T));
    wait(State::at_warp_barrier);
    return result;
  }

  void* shared() { return shared_.data(); }

  static inline Block* current = nullptr;

 private:
  enum class State { ready, at_block_barrier, at_warp_barrier, done };

  struct Fibre {
    ucontext_t context{};
    std::unique_ptr<std::byte[]> stack;
    State state = State::ready;
    uint64_t slot = 0;
  };

  static constexpr size_t kStackBytes = 64 * 1024;
  static constexpr size_t kWarp = 32;

  static void enter() {
    current->kernel_();
    current->fibres_[current->running_].state = State::done;
  }

  void resume(unsigned i) {
    running_ = i;
    threadIdx.x = i;
    swapcontext(&scheduler_, &fibres_[i].context);
  }

  void wait(State state) {
    const unsigned self = running_;
    fibres_[self].state = state;
    swapcontext(&fibres_[self].context, &scheduler_);
  }

  bool all_in(size_t begin, size_t end, State state) const {
    return std::all_of(fibres_.begin() + static_cast<std::ptrdiff_t>(begin),
                       fibres_.begin() + static_cast<std::ptrdiff_t>(end),
                       [state](const Fibre& fibre) { return fibre.state == state; });
  }

  void set(size_t begin, size_t end, State state) {
    for (size_t i = begin; i < end; ++i) fibres_[i].state = state;
  }

  // Opens every barrier that all of its threads have reached.
  void release() {
    bool opened = all_in(0, fibres_.size(), State::done);
    if (all_in(0, fibres_.size(), State::at_block_barrier)) {
      set(0, fibres_.size(), State::ready);
      opened = true;
    }
    for (size_t begin = 0; begin < fibres_.size(); begin += kWarp) {
      const size_t end = std::min(begin + kWarp, fibres_.size());
      if (all_in(begin, end, State::at_warp_barrier)) {
        set(begin, end, State::ready);
        opened = true;
      }
    }
    if (!opened) throw std::runtime_error("a barrier or shuffle that part of the block does not reach");
  }

  const std::function<void()>& kernel_;
  std::vector<Fibre> fibres_;
  std::vector<std::byte> shared_;
  std::vector<unsigned> sequence_;
  Order order_;
  std::mt19937 engine_;
  ucontext_t scheduler_{};
  unsigned running_ = 0;
};

inline void* dynamic_shared() { return Block::current->shared(); }

// kernel<<<blocks, threads, shared_bytes>>>(args...)
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), unsigned blocks, unsigned threads, size_t shared_bytes, Order order,
            Args... args) {
  const std::function<void()> call = [=] { kernel(args...); };
  blockDim = {threads, 1, 1};
  gridDim = {blocks, 1, 1};
  Block block(threads, shared_bytes, order, call);
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx = {i, 0, 0};
    block.run();
  }
}

}  // namespace cuda_shim

inline void __syncthreads() { cuda_shim::Block::current->wait_for_block(); }

template <class T>
T __shfl_up_sync(unsigned /*mask*/, T value, unsigned delta) {
  const unsigned lane = threadIdx.x % 32;
  return cuda_shim::Block::current->exchange(value, lane >= delta ? lane - delta : lane);
}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

// `volatile` keeps the host compiler from fusing them.
inline float __fmul_rn(float a, float b) {
  volatile float result = a * b;
  return result;
}
inline float __fadd_rn(float a, float b) {
  volatile float result = a + b;
  return result;
}
inline float __fsub_rn(float a, float b) {
  volatile float result = a - b;
  return result;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
