// Stands for the language of the device when a kernel is compiled for the host: g++ -DGAN_HOST -include host_cuda.h.
//
// Blocks run one after the other. The threads of a block are fibers that run until they wait, for their block
// (__syncthreads) or for their warp (shuffles); what would hang a GPU ends the process with a message.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

enum State { RUNS, WAITS_FOR_BLOCK, WAITS_FOR_WARP, DONE };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static unsigned current;  // index of the running thread in its block
static const std::function<void()>* kernel;
static std::vector<double> slots;  // what the threads of a block show each other in shuffles

inline void body() {
  (*kernel)();
  fibers[current].state = DONE;
}

inline void wait(State state) {
  fibers[current].state = state;
  const unsigned self = current;
  swapcontext(&fibers[self].context, &scheduler);
  const unsigned plane = blockDim.x * blockDim.y;
  threadIdx = {self % blockDim.x, self % plane / blockDim.x, self / plane};
}

// Lets those go on whose whole block or warp waits; a thread that has ended is waited for by nobody. False: none can.
inline bool release(unsigned count) {
  bool released = false, all_wait = true;
  for (unsigned i = 0; i < count; ++i) all_wait &= fibers[i].state == WAITS_FOR_BLOCK || fibers[i].state == DONE;
  for (unsigned first = 0; first < count; first += 32) {
    const unsigned end = first + 32 < count ? first + 32 : count;
    bool warp_waits = true;
    for (unsigned i = first; i < end; ++i) warp_waits &= fibers[i].state == WAITS_FOR_WARP;
    for (unsigned i = first; i < end; ++i) {
      if ((all_wait && fibers[i].state == WAITS_FOR_BLOCK) || warp_waits) {
        fibers[i].state = RUNS;
        released = true;
      }
    }
  }
  return released;
}

inline void run_block(unsigned count) {
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = RUNS;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, body, 0);
  }
  const unsigned plane = blockDim.x * blockDim.y;
  for (;;) {
    bool all_done = true;
    for (unsigned i = 0; i < count; ++i) {
      if (fibers[i].state != RUNS) continue;
      current = i;
      threadIdx = {i % blockDim.x, i % plane / blockDim.x, i / plane};
      swapcontext(&scheduler, &fibers[i].context);
    }
    for (unsigned i = 0; i < count; ++i) all_done &= fibers[i].state == DONE;
    if (all_done) return;
    if (!release(count)) {
      std::fprintf(stderr, "threads of a block wait for others that do not come\n");
      std::abort();
    }
  }
}

inline void run(const unsigned* dims, const std::function<void()>& function) {
  gridDim = {dims[0], dims[1], dims[2]};
  blockDim = {dims[3], dims[4], dims[5]};
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  if (fibers.size() < count) fibers.resize(count);
  for (Fiber& fiber : fibers) fiber.stack.resize(1 << 16);
  slots.resize(count);
  kernel = &function;
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        run_block(count);
      }
}

inline float from_half(unsigned short bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}

inline unsigned short to_half(float value) {
  const _Float16 x = static_cast<_Float16>(value);
  unsigned short bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

}  // namespace host

#define ENTRY(name, Params, ...)                                       \
  extern "C" void name(const void* params, const unsigned* dims) {   \
    Params p;                                                      \
    std::memcpy(&p, params, sizeof p);                             \
    host::run(dims, [&] { __VA_ARGS__(p); });                      \
  }                                                                  \
  extern "C" const unsigned name##_size = sizeof(Params);

inline void __syncthreads() { host::wait(host::WAITS_FOR_BLOCK); }

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned self = host::current;
  host::slots[self] = value;
  host::wait(host::WAITS_FOR_WARP);
  const unsigned other = self ^ static_cast<unsigned>(mask);
  const T result = static_cast<T>(host::slots[other]);
  host::wait(host::WAITS_FOR_WARP);
  return result;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
