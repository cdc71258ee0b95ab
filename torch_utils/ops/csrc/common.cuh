// What the CUDA kernels share.
//
// Plain CUDA C++ without any header, of CUDA, PyTorch or C++, so that NVRTC needs nothing but these sources. All
// arithmetic is in float. The tests compile the same files for the host (GAN_HOST), behind a shim that stands for the
// language of the device, and run them on the CPU.

#pragma once

#ifndef GAN_HOST
#define ENTRY(name, Params, ...) \
  extern "C" __global__ void __launch_bounds__(BLOCK_THREADS) name(const Params p) { __VA_ARGS__(p); }
#endif

// ENTRY(name, Params, function) makes `name` callable from outside: it runs `function(p)` with at most BLOCK_THREADS
// threads a block. The names are C's, so that nobody has to mangle them.
#ifndef BLOCK_THREADS
#define BLOCK_THREADS 256
#endif

constexpr int WARP = 32;

// 16-bit numbers are bits here: their arithmetic is that of float.
struct half_t {
  unsigned short bits;
};
struct bfloat_t {
  unsigned short bits;
};

__device__ inline float to_float(float x) { return x; }

__device__ inline float to_float(bfloat_t x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ inline float to_float(half_t x) {
#ifdef GAN_HOST
  return host::from_half(x.bits);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

template <class T>
__device__ inline T from_float(float x);

template <>
__device__ inline float from_float<float>(float x) {
  return x;
}

template <>
__device__ inline bfloat_t from_float<bfloat_t>(float x) {  // to the nearest, ties to even; NaN is 0x7fff in both
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bfloat_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  unsigned bits = __float_as_uint(x);
  if (x != x) return bfloat_t{0x7fff};
  return bfloat_t{static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
__device__ inline half_t from_float<half_t>(float x) {
#ifdef GAN_HOST
  return half_t{host::to_half(x)};
#else
  half_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

// N numbers that are read and written at once; their address is a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <int N, class T>
__device__ inline Pack<T, N> load(const T* address) {
  return *reinterpret_cast<const Pack<T, N>*>(address);
}

template <int N, class T>
__device__ inline void store(T* address, const Pack<T, N>& values) {
  *reinterpret_cast<Pack<T, N>*>(address) = values;
}

// Limits to [-limit, limit] where there is a limit (NaN: none). NaN stays NaN, as in PyTorch.
__device__ inline float clamped(float x, float limit) {
  x = x > limit ? limit : x;  // choices, that become no branches
  return x < -limit ? -limit : x;
}

// The sum over a warp, in each of its threads; the order of the additions is always the same.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// The sum over a block of blockDim.x threads, a multiple of WARP, in its first thread. Every thread must call it.
__device__ inline float block_sum(float x) {
  __shared__ float partial[BLOCK_THREADS / WARP];
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  x = warp_sum(x);
  __syncthreads();  // whoever still reads the sums of the call before
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  if (warp != 0) return 0;
  const int warps = blockDim.x / WARP;
  return warp_sum(lane < warps ? partial[lane] : 0);
}

// Divides numbers below 2^31 by multiplication: n / divisor = (high half of n * multiplier + n) >> shift.
struct Divisor {
  unsigned divisor, multiplier, shift;
};

__device__ inline unsigned quotient(unsigned n, const Divisor& by) {
  const unsigned high = static_cast<unsigned>((static_cast<unsigned long long>(n) * by.multiplier) >> 32);
  return (high + n) >> by.shift;
}

// Leaves the quotient in n and returns the remainder.
__device__ inline unsigned divide(unsigned& n, const Divisor& by) {
  const unsigned whole = quotient(n, by), remainder = n - whole * by.divisor;
  n = whole;
  return remainder;
}

// The second stage of sums: what blocks have added up, [outer, count, columns], is summed over count.
struct Total {
  const float* parts;
  void* sums;  // [outer, columns]
  unsigned outer, count, columns;
  int type;    // of the sums: 0 float, 1 half_t, 2 bfloat_t
};

// Up to three of them at once. Blocks: (8 columns, or the only one; the outer ones of all).
struct Totals {
  Total of[3];
};

__device__ inline void totals(const Totals& p) {
  __shared__ float shared[BLOCK_THREADS];
  unsigned outer = blockIdx.y;
  Total total = p.of[0];
  if (outer >= total.outer) {
    outer -= total.outer;
    total = p.of[1];
    if (outer >= total.outer) {
      outer -= total.outer;
      total = p.of[2];
    }
  }
  const unsigned width = total.columns == 1 ? 1 : 8;  // 32 bytes, what memory is read in
  const unsigned rows = BLOCK_THREADS / width, column = blockIdx.x * width + threadIdx.x % width;
  float sum = 0;
  if (column < total.columns) {
    const float* parts = total.parts + outer * total.count * total.columns + column;
#pragma unroll 8
    for (unsigned i = threadIdx.x / width; i < total.count; i += rows) sum += parts[i * total.columns];
  }
  shared[threadIdx.x] = sum;
  for (unsigned half = BLOCK_THREADS / 2; half >= width; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x >= width || column >= total.columns) return;
  const unsigned at = outer * total.columns + column;
  sum = shared[threadIdx.x];
  if (total.type == 0) static_cast<float*>(total.sums)[at] = sum;
  if (total.type == 1) static_cast<half_t*>(total.sums)[at] = from_float<half_t>(sum);
  if (total.type == 2) static_cast<bfloat_t*>(total.sums)[at] = from_float<bfloat_t>(sum);
}
