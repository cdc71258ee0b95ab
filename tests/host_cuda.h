// Stands for the language of the device when a kernel is compiled for the host: g++ -DGAN_HOST -include host_cuda.h.
//
// Blocks run one after the other. The threads of a block are fibers that run until they wait, for their block
// (__syncthreads) or for their warp (shuffles); what would hang a GPU ends the process with a message. Fibers are made
// once and change places by setjmp and longjmp, as swapcontext asks the system for the signal mask each time.

#pragma once

#undef _FORTIFY_SOURCE  // takes a jump to another stack for an error
#include <setjmp.h>
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
#define __noinline__ __attribute__((noinline))
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
  jmp_buf place;
  std::vector<char> stack;
  State state;
  unsigned shuffles;
  bool made;
};

static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static unsigned current;  // index of the running thread in its block
static const std::function<void()>* kernel;
static std::vector<double> slots[2];  // what the threads of a block show each other in shuffles, even and odd ones

inline void leave(State state) {
  fibers[current].state = state;
  if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

inline void body() {
  for (;;) {
    (*kernel)();
    leave(DONE);  // and comes back as a thread of the next block
  }
}

inline void enter(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.made) _longjmp(fiber.place, 1);
  fiber.made = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack.data();
  start.uc_stack.ss_size = fiber.stack.size();
  makecontext(&start, body, 0);
  setcontext(&start);
}

inline void wait(State state) {
  const unsigned self = current;
  leave(state);
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
    fibers[i].state = RUNS;
    fibers[i].shuffles = 0;
  }
  const unsigned plane = blockDim.x * blockDim.y;
  static bool backwards;  // every other block, so that one who reads what no barrier promises him reads it too early
  backwards = !backwards;
  for (;;) {
    bool all_done = true;
    for (unsigned turn = 0; turn < count; ++turn) {
      const unsigned i = backwards ? count - 1 - turn : turn;
      if (fibers[i].state != RUNS) continue;
      current = i;
      threadIdx = {i % blockDim.x, i % plane / blockDim.x, i / plane};
      enter(fibers[i]);
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
  for (std::vector<double>& each : slots) each.resize(fibers.size());
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
  extern "C" const unsigned name##_size = sizeof(Params);             \
  extern "C" const unsigned name##_threads = BLOCK_THREADS;

inline void __syncthreads() { host::wait(host::WAITS_FOR_BLOCK); }

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned self = host::current;
  // Who is in the next shuffle may write while others still read what this one was told, but not in the one after.
  std::vector<double>& shown = host::slots[host::fibers[self].shuffles++ % 2];
  shown[self] = value;
  host::wait(host::WAITS_FOR_WARP);
  return static_cast<T>(shown[self ^ static_cast<unsigned>(mask)]);
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
