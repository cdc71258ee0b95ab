// Factors of samples and channels, noise, bias, (leaky) activation, gain and clamp in one pass over memory, and in one
// pass all their gradients, sums included. See noise_bias_act_cuda.py for what is computed and how it is launched.
//
// A tensor is planes (NCHW: a block has some planes, or a part of one) or rows of channels (channels_last: a block has
// some rows of one sample). A thread goes through packs of V numbers: of one plane, or of V channels. Where sizes or
// addresses allow no packs, V is 1, and one entry point serves both layouts.

#include "common.cuh"

constexpr int WARPS = BLOCK_THREADS / WARP;

struct Shape {
  unsigned samples, channels, pixels;
  unsigned noise_step;  // from the noise of one sample to the next: pixels, or 0 where they share it
  unsigned chunks;      // blocks that share a plane, or a sample's rows
  unsigned chunk;       // packs, or rows, of each
  unsigned lanes;       // threads side by side along a plane, or a row: a power of two
  unsigned rows;        // whether it is rows
};

template <int V, bool ROWS>
__device__ inline bool is_rows(const Shape& s) {
  return V == 1 ? s.rows != 0 : ROWS;
}

// Slopes above and below zero with the gain in them, and the limit: NaN where there is none. The limit has the precision
// of what is stored, so that a stored number tells whether it was clamped.
struct Curve {
  float alpha, gain, limit;

  template <class T>
  __device__ Curve stored_as() const {
    return {alpha * gain, gain, to_float(from_float<T>(limit))};
  }
  // Of a curve that `stored_as` has made: alpha is the slope below zero.
  __device__ float at(float x) const {
    const float y = x * (x > 0 ? gain : alpha);
    const float below = y > limit ? limit : y;
    return y < -limit ? -limit : below;
  }
  __device__ float slope(float y) const { return fabsf(y) >= limit ? 0 : y > 0 ? gain : alpha; }
};

// Which part of the tensor a thread goes through: `for (i = first; i < end; i += step)`.
template <int V, bool ROWS>
struct Place {
  unsigned sample, channel, first, end, step, lane;
  bool inside;

  __device__ explicit Place(const Shape& s) {
    lane = threadIdx.x % s.lanes;
    const unsigned row = threadIdx.x / s.lanes, rows = BLOCK_THREADS / s.lanes;
    unsigned begin, size;
    if (is_rows<V, ROWS>(s)) {
      sample = blockIdx.x / s.chunks;
      begin = blockIdx.x % s.chunks * s.chunk;
      channel = (blockIdx.y * s.lanes + lane) * V;
      inside = channel < s.channels;
      size = s.pixels;
      first = begin + row;
      step = rows;
    } else {
      const unsigned plane = blockIdx.x * rows + row;
      sample = plane / s.channels;
      channel = plane % s.channels;
      begin = blockIdx.y * s.chunk;
      inside = sample < s.samples;
      size = s.pixels / V;
      first = begin + lane;
      step = s.lanes;
    }
    end = begin + s.chunk < size ? begin + s.chunk : size;
    if (!inside) end = first;
  }

  __device__ unsigned at(const Shape& s, unsigned i) const {
    return is_rows<V, ROWS>(s) ? (sample * s.pixels + i) * s.channels + channel
                               : (sample * s.channels + channel) * s.pixels + i * V;
  }

  // V numbers of `[C]` (from: 0) or of one sample of `[N, C]`.
  __device__ void channels_of(const float* numbers, unsigned from, float otherwise, float (&out)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = otherwise;
    if (numbers != nullptr && inside) {
#pragma unroll
      for (int j = 0; j < V; ++j) out[j] = numbers[from + channel + (ROWS ? j : 0)];
    }
  }

  __device__ void noise_at(const float* noise, const Shape& s, unsigned i, float (&out)[V]) const {
    constexpr int W = ROWS || V < 4 ? 1 : 4;
    const float* address = noise + sample * s.noise_step + (ROWS ? i : i * V);
#pragma unroll
    for (int j = 0; j < V; j += W) {
      const Pack<float, W> few = load<W>(address + (ROWS ? 0 : j));
#pragma unroll
      for (int k = 0; k < W; ++k) out[j + k] = few.at[k];
    }
  }
};

// t = x * x_factor + z * z_factor + noise * strength + b, and out = curve(t), or t * slope(y). A null pointer: without.
struct Map {
  const void* x;           // [N, C, H, W]
  const float* x_factor;   // [N, C]
  const void* z;           // [N, C, H, W]
  const float* z_factor;   // [N, C]
  const float* noise;      // [N, 1, H, W] or [H, W]
  const float* strength;   // []
  const float* b;          // [C]
  const void* y;           // [N, C, H, W]
  void* out;               // [N, C, H, W]
  Shape shape;
  Curve curve;
};

// Zeros if there is nothing. All loads stand in front of what waits for them.
template <class T, int V>
__device__ inline Pack<T, V> load_if(const void* there, unsigned at) {
  return there != nullptr ? load<V>(static_cast<const T*>(there) + at) : Pack<T, V>{};
}

template <class T, int V>
__device__ inline void add_product(const Pack<T, V>& x, const float (&factor)[V], float (&t)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) t[j] += to_float(x.at[j]) * factor[j];
}

template <class T, int V, bool ROWS>
__device__ inline void map(const Map& p) {
  const Place<V, ROWS> place(p.shape);
  const Curve curve = p.curve.stored_as<T>();
  const float strength = p.strength != nullptr ? *p.strength : 1;
  float x_factor[V], z_factor[V], b[V];
  place.channels_of(p.x_factor, place.sample * p.shape.channels, 1, x_factor);
  place.channels_of(p.z_factor, place.sample * p.shape.channels, 1, z_factor);
  place.channels_of(p.b, 0, 0, b);
  // x is read a step ahead, so that two packs are under way: all that the modulation of a convolution reads.
  Pack<T, V> coming = load_if<T, V>(place.first < place.end ? p.x : nullptr, place.at(p.shape, place.first));
#pragma unroll 1
  for (unsigned i = place.first; i < place.end; i += place.step) {
    const unsigned at = place.at(p.shape, i), next = i + place.step;
    const Pack<T, V> x = coming, z = load_if<T, V>(p.z, at), y = load_if<T, V>(p.y, at);
    if (next < place.end) coming = load_if<T, V>(p.x, place.at(p.shape, next));
    float t[V];
#pragma unroll
    for (int j = 0; j < V; ++j) t[j] = b[j];
    if (p.noise != nullptr) {
      float noise[V];
      place.noise_at(p.noise, p.shape, i, noise);
#pragma unroll
      for (int j = 0; j < V; ++j) t[j] += noise[j] * strength;
    }
    add_product(x, x_factor, t);
    if (p.z != nullptr) add_product(z, z_factor, t);
    if (p.y != nullptr) {
#pragma unroll
      for (int j = 0; j < V; ++j) t[j] *= curve.slope(to_float(y.at[j]));
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) t[j] = curve.at(t[j]);
    }
    Pack<T, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out.at[j] = from_float<T>(t[j]);
    store(static_cast<T*>(p.out) + at, out);
  }
}

// With g = dy * slope(y) (without y: * gain): dx = g * factor, and the sums of each block of g * x and g over its pixels
// and of g * noise over everything that it has. A null pointer: without, or not wanted.
struct Gradient {
  const void* dy;        // [N, C, H, W]
  const void* y;         // [N, C, H, W]
  const void* x;         // [N, C, H, W]
  const float* factor;   // [N, C]
  const float* noise;    // [N, 1, H, W] or [H, W]
  void* dx;              // [N, C, H, W]
  float* factor_parts;   // [N, chunks, C]
  float* b_parts;        // [N, chunks, C]
  float* noise_parts;    // [blocks]
  Shape shape;
  Curve curve;
};

// The sum over neighbouring threads, at least in the first of them: a part of a warp, or the block. Every thread must
// call it.
__device__ __noinline__ float sum_of_lanes(float x, unsigned lanes) {
  if (lanes > WARP) return block_sum(x);
#pragma unroll 1
  for (unsigned distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Adds up what the threads of a block have for the same channel and writes it to parts `[N, chunks, C]`. Every thread
// must call it.
template <int V, bool ROWS>
__device__ inline void store_channel_sums(float (&sums)[V], const Place<V, ROWS>& place, const Shape& s, float* parts) {
  if (is_rows<V, ROWS>(s)) {
    __shared__ float shared[WARPS][WARP * V];
    for (unsigned distance = WARP / 2; distance >= s.lanes; distance /= 2) {
#pragma unroll
      for (int j = 0; j < V; ++j) sums[j] += __shfl_xor_sync(0xffffffffu, sums[j], distance);
    }
    __syncthreads();  // whoever still reads the sums of the call before
    if (threadIdx.x % WARP < s.lanes) {
#pragma unroll
      for (int j = 0; j < V; ++j) shared[threadIdx.x / WARP][place.lane * V + j] = sums[j];
    }
    __syncthreads();
    const unsigned width = s.lanes * V, channel = blockIdx.y * width + threadIdx.x;
    if (threadIdx.x < width && channel < s.channels) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < WARPS; ++i) sum += shared[i][threadIdx.x];
      parts[blockIdx.x * s.channels + channel] = sum;
    }
  } else {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) sum += sums[j];
    sum = sum_of_lanes(sum, s.lanes);
    if (place.lane == 0 && place.inside) {
      parts[(place.sample * s.chunks + blockIdx.y) * s.channels + place.channel] = sum;
    }
  }
}

template <class T, int V, bool ROWS>
__device__ inline void gradient(const Gradient& p) {
  const Place<V, ROWS> place(p.shape);
  const Curve curve = p.curve.stored_as<T>();
  float factor[V], factor_sums[V], b_sums[V], noise_sum = 0;
  place.channels_of(p.factor, place.sample * p.shape.channels, 1, factor);
#pragma unroll
  for (int j = 0; j < V; ++j) factor_sums[j] = b_sums[j] = 0;
#pragma unroll 1
  for (unsigned i = place.first; i < place.end; i += place.step) {
    const unsigned at = place.at(p.shape, i);
    const Pack<T, V> dy = load<V>(static_cast<const T*>(p.dy) + at);
    const Pack<T, V> y = load_if<T, V>(p.y, at), x = load_if<T, V>(p.x, at);
    float g[V];
    if (p.y != nullptr) {
#pragma unroll
      for (int j = 0; j < V; ++j) g[j] = to_float(dy.at[j]) * curve.slope(to_float(y.at[j]));
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) g[j] = to_float(dy.at[j]) * curve.gain;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) b_sums[j] += g[j];
    add_product(x, g, factor_sums);
    if (p.noise != nullptr) {
      float noise[V], sum = 0;
      place.noise_at(p.noise, p.shape, i, noise);
#pragma unroll
      for (int j = 0; j < V; ++j) sum += g[j] * noise[j];
      noise_sum += sum;
    }
    if (p.dx != nullptr) {
      Pack<T, V> dx;
#pragma unroll
      for (int j = 0; j < V; ++j) dx.at[j] = from_float<T>(g[j] * factor[j]);
      store(static_cast<T*>(p.dx) + at, dx);
    }
  }
  if (p.factor_parts != nullptr) store_channel_sums<V, ROWS>(factor_sums, place, p.shape, p.factor_parts);
  if (p.b_parts != nullptr) store_channel_sums<V, ROWS>(b_sums, place, p.shape, p.b_parts);
  if (p.noise_parts != nullptr) {
    noise_sum = sum_of_lanes(noise_sum, BLOCK_THREADS);
    if (threadIdx.x == 0) p.noise_parts[blockIdx.y * gridDim.x + blockIdx.x] = noise_sum;
  }
}

#define ENTRIES(suffix, T, PACK)                                                       \
  ENTRY(noise_bias_act_map_##suffix, Map, map<T, 1, false>)                            \
  ENTRY(noise_bias_act_map_planes_##suffix, Map, map<T, PACK, false>)                  \
  ENTRY(noise_bias_act_map_rows_##suffix, Map, map<T, PACK, true>)                     \
  ENTRY(noise_bias_act_gradient_##suffix, Gradient, gradient<T, 1, false>)             \
  ENTRY(noise_bias_act_gradient_planes_##suffix, Gradient, gradient<T, PACK, false>)   \
  ENTRY(noise_bias_act_gradient_rows_##suffix, Gradient, gradient<T, PACK, true>)

ENTRIES(f32, float, 4)
ENTRIES(f16, half_t, 8)
ENTRIES(bf16, bfloat_t, 8)
ENTRY(noise_bias_act_totals, Totals, totals)
