// clamp(gain * act(x + b)), its gradient and the gradient of that, each in one pass over memory. See bias_act.py.
//
// linear, relu and lrelu are two lines that meet at zero: the sign of y tells the slope and its size whether it was
// clamped, so the gradient reads y and not x. The other activations are computed again from x and b.
//
// Memory in order is [outer, channels, inner]. Bias and sums run along channels. With inner 1 a thread stays in its
// columns (`rows`), otherwise a block stays in its channel (`planes`). Sums are of float32 numbers before they are
// rounded; a block writes its part of them, and `totals` adds the parts, always in the same order.

#include "common.cuh"

enum Act { LINEAR, RELU, LRELU, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SWISH };

struct Params {
  void* y;          // order 0: the output. Otherwise slope * t
  const void* x;    // order 0: x. Otherwise what is kept: y up to LRELU (null where it tells nothing), else x
  const void* b;    // [channels], added to x; or null
  const void* t;    // what the slope multiplies: dy in order 1, ddx in order 2
  const void* tb;   // [channels], added to t; or null
  const void* o;    // order 2: dy
  void* z;          // order 2: second derivative * t * o
  float* sums;      // [parts, width] of y in order 1, of z in order 2; or null
  unsigned channels;
  unsigned width;   // rows: length of a row, a multiple of channels. planes: channels
  unsigned length;  // number of rows; of packs in a channel
  unsigned part;    // of these, what a block takes
  Divisor inner;    // planes: packs in a plane
  int act;
  float above;      // gain
  float below;      // its product with the slope below zero
  float limit;      // NaN for none, which no number exceeds
};

struct Curve {
  float value, slope, bend;  // of an activation and its derivatives
};

__device__ inline Curve curve(int act, float u) {
  switch (act) {
    case TANH: {
      const float y = tanhf(u), slope = 1 - y * y;
      return {y, slope, -2 * y * slope};
    }
    case ELU: {
      if (!(u <= 0)) return {u, 1, 0};
      const float e = expf(u);
      return {expm1f(u), e, u < 0 ? e : 0};
    }
    case SELU: {
      constexpr float scale = 1.0507009873554804934193349852946f, alpha = 1.6732632423543772848170429916717f;
      if (!(u <= 0)) return {scale * u, scale, 0};
      const float e = scale * alpha * expf(u);
      return {scale * alpha * expm1f(u), e, u < 0 ? e : 0};
    }
    case SOFTPLUS: {
      if (u > 20) return {u, 1, 0};
      const float e = expf(u), slope = e / (1 + e);
      return {log1pf(e), slope, slope * (1 - slope)};
    }
    default: {
      const float y = 1 / (1 + expf(-u)), slope = y * (1 - y), bend = slope * (1 - 2 * y);
      if (act == SIGMOID) return {y, slope, bend};
      return {u * y, y + u * slope, 2 * slope + u * bend};  // SWISH
    }
  }
}

// At u the line through zero that the activation is there, times f. relu is more than a slope of zero: it takes
// infinities to zero.
__device__ inline float line(const Params& p, float u, float f) {
  const float y = f * (u > 0 ? p.above : p.below);
  return p.act == RELU && u <= 0 ? 0 : y;
}

// A kernel is compiled for one of these: linear, relu and lrelu, their gradient, and whatever there is, which is slower
// and takes long to compile.
enum Task { LINES, SLOPES, ANY };

// What a thread reads at once.
template <class T, int N>
struct Input {
  Pack<T, N> x, t, o;
};

// Pack after pack of N numbers that belong to CHANNELS channels: N, or 1.
template <class T, int N, int CHANNELS, Task TASK>
struct Work {
  const Params& p;
  const float limit;  // in the precision of T, so that a stored y tells whether it was clamped
  float b[CHANNELS], tb[CHANNELS], sum[CHANNELS];

  __device__ Work(const Params& p, unsigned first) : p(p), limit(to_float(from_float<T>(p.limit))) {
    unsigned channel = first % p.channels;
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) {
      b[i] = TASK != SLOPES && p.b ? to_float(static_cast<const T*>(p.b)[channel]) : 0;
      tb[i] = TASK != LINES && p.tb ? to_float(static_cast<const T*>(p.tb)[channel]) : 0;
      sum[i] = 0;
      channel = channel + 1 == p.channels ? 0 : channel + 1;
    }
  }

  __device__ bool gradient() const { return TASK == SLOPES || (TASK == ANY && p.t); }

  __device__ Input<T, N> read(unsigned at) const {
    Input<T, N> in = {};
    if (TASK == LINES || p.x) in.x = load<N>(static_cast<const T*>(p.x) + at);
    if (gradient()) in.t = load<N>(static_cast<const T*>(p.t) + at);
    if (TASK == ANY && p.o) in.o = load<N>(static_cast<const T*>(p.o) + at);
    return in;
  }

  __device__ void write(unsigned at, const Input<T, N>& in) {
    Pack<T, N> y, z;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int i = CHANNELS == 1 ? 0 : j;
      const float x = to_float(in.x.at[j]) + b[i], t = to_float(in.t.at[j]) + tb[i];
      float value, second = 0;
      if (TASK != ANY || p.act <= LRELU) {
        if (gradient()) {
          value = line(p, x, t);
          value = fabsf(x) >= limit ? 0 : value;  // a choice, no branch
        } else {
          value = clamped(line(p, x, x), limit);
        }
      } else {
        const Curve c = curve(p.act, x);
        const float height = p.above * c.value;
        const bool bites = fabsf(height) > limit;
        value = !gradient() ? clamped(height, limit) : bites ? 0 : p.above * c.slope * t;
        second = bites ? 0 : p.above * c.bend * t * to_float(in.o.at[j]);
      }
      y.at[j] = from_float<T>(value);
      z.at[j] = from_float<T>(second);
      sum[i] += TASK == ANY && p.z ? second : value;
    }
    store<N>(static_cast<T*>(p.y) + at, y);
    if (TASK == ANY && p.z) store<N>(static_cast<T*>(p.z) + at, z);
  }
};

// Calls work for the packs at place(first), place(first + step), ... below end. One is read while another is computed.
template <class T, int N, int CHANNELS, Task TASK, class Place>
__device__ inline void walk(Work<T, N, CHANNELS, TASK>& work, unsigned first, unsigned end, unsigned step,
                            const Place& place) {
  if (first >= end) return;
  unsigned at = place(first);
  Input<T, N> in = work.read(at);
#pragma unroll 1
  while (first < end) {  // `write` stands here once, as it is long
    first += step;
    const unsigned next = first < end ? place(first) : at;
    const Input<T, N> coming = first < end ? work.read(next) : in;
    work.write(at, in);
    at = next;
    in = coming;
  }
}

// Adds the values of the threads of a column (threadIdx.x) to those of its first one.
template <int N>
__device__ inline void add_columns(float* values) {
  __shared__ float all[N][BLOCK_THREADS];
  const unsigned self = threadIdx.y * blockDim.x + threadIdx.x;
  __syncthreads();  // whoever still reads the values of the call before
#pragma unroll
  for (int j = 0; j < N; ++j) all[j][self] = values[j];
  for (unsigned rows = blockDim.y; rows > 1;) {
    const unsigned half = (rows + 1) / 2;
    __syncthreads();
    if (threadIdx.y + half < rows) {
#pragma unroll
      for (int j = 0; j < N; ++j) all[j][self] += all[j][self + half * blockDim.x];
    }
    rows = half;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) values[j] = all[j][self];
}

// Blocks: (columns, parts). Threads: (packs of a row, rows).
template <class T, int N, Task TASK>
__device__ inline void rows(const Params& p) {
  const unsigned column = (blockIdx.x * blockDim.x + threadIdx.x) * N;
  const unsigned begin = blockIdx.y * p.part;
  const unsigned end = begin + p.part < p.length ? begin + p.part : p.length;
  const bool inside = column < p.width;
  Work<T, N, N, TASK> work(p, column);
  if (inside)
    walk(work, begin + threadIdx.y, end, blockDim.y, [&](unsigned row) { return row * p.width + column; });
  if (TASK == LINES || p.sums == nullptr) return;
  add_columns<N>(work.sum);
  if (threadIdx.y > 0 || !inside) return;
#pragma unroll
  for (int j = 0; j < N; ++j) p.sums[blockIdx.y * p.width + column + j] = work.sum[j];
}

// Blocks: (channels, parts).
template <class T, int N, Task TASK>
__device__ inline void planes(const Params& p) {
  const unsigned channel = blockIdx.x;
  const unsigned begin = blockIdx.y * p.part;
  const unsigned end = begin + p.part < p.length ? begin + p.part : p.length;
  Work<T, N, 1, TASK> work(p, channel);
  walk(work, begin + threadIdx.x, end, blockDim.x, [&](unsigned i) {
    return (i + (quotient(i, p.inner) * (p.channels - 1) + channel) * p.inner.divisor) * N;
  });
  if (TASK == LINES || p.sums == nullptr) return;
  const float sum = block_sum(work.sum[0]);
  if (threadIdx.x == 0) p.sums[blockIdx.y * p.channels + channel] = sum;
}

// `bias_act_slopes_rows_4_f32`: 4 numbers at once. Where nothing else fits, `planes` of ANY do.
#define ENTRIES(layout, suffix, T, N)                                             \
  ENTRY(bias_act_lines_##layout##_##N##_##suffix, Params, layout<T, N, LINES>)    \
  ENTRY(bias_act_slopes_##layout##_##N##_##suffix, Params, layout<T, N, SLOPES>)
#define ANY_ENTRY(layout, suffix, T, N) ENTRY(bias_act_any_##layout##_##N##_##suffix, Params, layout<T, N, ANY>)

ENTRIES(rows, f32, float, 4)
ENTRIES(rows, f16, half_t, 8)
ENTRIES(rows, bf16, bfloat_t, 8)
ENTRIES(planes, f32, float, 4)
ENTRIES(planes, f16, half_t, 8)
ENTRIES(planes, bf16, bfloat_t, 8)
ANY_ENTRY(rows, f32, float, 1)
ANY_ENTRY(rows, f16, half_t, 2)
ANY_ENTRY(rows, bf16, bfloat_t, 2)
ANY_ENTRY(planes, f32, float, 1)
ANY_ENTRY(planes, f16, half_t, 1)
ANY_ENTRY(planes, bf16, bfloat_t, 1)
ENTRY(bias_act_totals, Totals, totals)
