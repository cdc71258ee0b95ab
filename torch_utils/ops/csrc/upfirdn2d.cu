// upfirdn2d: insert zeros, pad, filter, keep every down-th pixel; in one pass, and without making the zeros.
//
// Tensors are [images, height, width, channels], which is what channels_last is in memory; NCHW has N * C images of one
// channel. `any` does every call, an output per thread. `columns` does those that training consists of: filters that
// are products of a column and a row of taps. Its threads walk down the image, each with a column of outputs (a pack of
// channels wide), and keep what they have filtered along x of the last rows in registers: so a pixel is filtered once
// along x and once along y, and comes from memory once; neighbouring threads find it in the L1 cache.

#include "common.cuh"

struct Params {
  const void* x;    // [images, in_h, in_w, channels]
  const float* f;   // [taps_y, taps_x], or [taps_x] if separable
  void* y;          // [images, out_h, out_w, channels]
  int in_h, in_w, out_h, out_w, channels;
  int up_y, up_x, down_y, down_x, pad_y, pad_x;  // the padding before the first row and column
  int taps_y, taps_x, separable, flip;
  float gain;
  // How outputs are dealt out to threads. A unit is one output, or two on an axis that is upsampled by 2.
  int threads;
  int units_y, rows;         // of an image; of a thread, one below the other
  int first_y, first_x;      // output of the first unit, 0 or -1
  int origin_y, origin_x;    // the first pixel that it sees
  int pairs;                 // whether the two outputs of a unit along x can be written at once
  Divisor packs, columns, groups, strips;  // a thread's index is [image, strip, group of packs, column, pack]
};

// What a thread computes: the units from (first, column) to (last - 1, column), in the channels from `channel` on.
struct Place {
  int image, first, last, column, channel;
};

// False: nothing is left for this thread.
__device__ inline bool find(const Params& p, int width, Place& place) {
  unsigned n = blockIdx.x * BLOCK_THREADS + threadIdx.x;
  if (n >= static_cast<unsigned>(p.threads)) return false;
  const int pack = divide(n, p.packs);
  place.column = divide(n, p.columns);
  place.channel = (divide(n, p.groups) * p.packs.divisor + pack) * width;
  place.first = divide(n, p.strips) * p.rows;
  place.last = place.first + p.rows < p.units_y ? place.first + p.rows : p.units_y;
  place.image = n;
  return true;
}

// One tap as a correlation has it: of flipped filters the same, of others the opposite one.
__device__ inline float tap(const Params& p, int y, int x) {
  if (!p.flip) y = p.taps_y - 1 - y, x = p.taps_x - 1 - x;
  return p.separable ? p.f[y] * p.f[x] : p.f[y * p.taps_x + x];
}

template <class T>
__device__ inline float output(const Params& p, int image, int y, int x, int channel) {
  const int top = y * p.down_y - p.pad_y, left = x * p.down_x - p.pad_x;  // in the upsampled image
  // The first taps that meet a pixel.
  const int first_y = top <= 0 ? -top : (p.up_y - top % p.up_y) % p.up_y;
  const int first_x = left <= 0 ? -left : (p.up_x - left % p.up_x) % p.up_x;
  int row = (top + first_y) / p.up_y;
  const int column = (left + first_x) / p.up_x;
  float sum = 0;
  for (int i = first_y; i < p.taps_y && row < p.in_h; i += p.up_y, ++row) {
    const T* at = static_cast<const T*>(p.x) + ((image * p.in_h + row) * p.in_w + column) * p.channels + channel;
    const int pixels = p.in_w - column;
    for (int j = first_x, k = 0; j < p.taps_x && k < pixels; j += p.up_x, ++k, at += p.channels)
      sum += tap(p, i, j) * to_float(*at);
  }
  return sum * p.gain;
}

template <class T>
__device__ inline void any(const Params& p) {
  Place at;
  if (!find(p, 1, at)) return;
  T* y = static_cast<T*>(p.y) + ((at.image * p.out_h + at.first) * p.out_w + at.column) * p.channels + at.channel;
  *y = from_float<T>(output<T>(p, at.image, at.first, at.column, at.channel));
}

// The column and the row of taps whose product a filter is, in a correlation's order; the gain is in the column's.
// False: it is no such product. Every thread of a block must call it.
template <int TAPS>
__device__ inline bool factors(const Params& p, float (&column)[TAPS], float (&row)[TAPS]) {
  __shared__ float shared_column[TAPS], shared_row[TAPS];
  __shared__ int product;
  const int thread = threadIdx.x;
  if (thread == 0) product = 1;
  __syncthreads();
  if (p.separable) {
    if (thread < TAPS) shared_column[thread] = shared_row[thread] = p.f[p.flip ? thread : TAPS - 1 - thread];
  } else if (thread < TAPS * TAPS) {
    const int y = thread / TAPS, x = thread % TAPS;
    const float middle = tap(p, TAPS / 2, TAPS / 2);
    const float of_column = tap(p, y, TAPS / 2), of_row = tap(p, TAPS / 2, x) / middle;
    const float wrong = fabsf(tap(p, y, x) - of_column * of_row);
    if (!(wrong <= 4e-7f * fabsf(middle))) product = 0;  // NaN too
    if (x == 0) shared_column[y] = of_column;
    if (y == 0) shared_row[x] = of_row;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < TAPS; ++i) {
    column[i] = shared_column[i] * p.gain;
    row[i] = shared_row[i];
  }
  return product;
}

// `columns` for filters that are no product.
template <class T, int WIDTH, int UP>
__device__ inline void each_output(const Params& p, const Place& at) {
  for (int i = 0; i < (at.last - at.first) * UP * UP * WIDTH; ++i) {
    const int channel = at.channel + i % WIDTH, x = p.first_x + at.column * UP + i / WIDTH % UP;
    const int y = p.first_y + at.first * UP + i / (WIDTH * UP);
    if (x < 0 || x >= p.out_w || y < 0 || y >= p.out_h) continue;
    static_cast<T*>(p.y)[((at.image * p.out_h + y) * p.out_w + x) * p.channels + channel] =
        from_float<T>(output<T>(p, at.image, y, x, channel));
  }
}

// N words, or zeros if not `inside`, when the address may be any. No branch, which would keep loads from overlapping.
template <int N>
__device__ inline Pack<unsigned, N> load_if(bool inside, const void* address) {
  static_assert(N == 1 || N == 2 || N == 4, "");
#ifdef GAN_HOST
  return inside ? load<N>(static_cast<const unsigned*>(address)) : Pack<unsigned, N>{};
#else
  Pack<unsigned, N> words;
  if constexpr (N == 1) {
    asm("{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.b32 %0, [%1]; }"
        : "=r"(words.at[0])
        : "l"(address), "r"(static_cast<int>(inside)));
  } else if constexpr (N == 2) {
    asm("{ .reg .pred p; setp.ne.b32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; @p ld.global.nc.v2.b32 {%0, %1}, [%2]; }"
        : "=r"(words.at[0]), "=r"(words.at[1])
        : "l"(address), "r"(static_cast<int>(inside)));
  } else {
    asm("{ .reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
        " @p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4]; }"
        : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
        : "l"(address), "r"(static_cast<int>(inside)));
  }
  return words;
#endif
}

// One of the numbers in words.
template <class T>
__device__ inline float number(const unsigned* words, int i) {
  if constexpr (sizeof(T) == sizeof(unsigned)) {
    return __uint_as_float(words[i]);
  } else {
    return to_float(T{static_cast<unsigned short>(words[i / 2] >> i % 2 * 16)});
  }
}

template <class T, int WIDTH, int TAPS, int UP, int DOWN>
__device__ inline void columns(const Params& p) {
  // Of the two outputs of a unit that is upsampled by 2 one is made with the even taps, the other with the odd ones. If
  // the odd ones come first both see the same pixels. If the even ones do, as along x where packs are of one number,
  // they see one more, but the first output has an even index wherever training upsamples: both are written at once.
  constexpr bool EVEN_FIRST = UP == 2 && WIDTH == 1;
  constexpr int SEEN = TAPS / UP + EVEN_FIRST;  // pixels, by a unit, along x
  constexpr int LIVES = TAPS / (UP * DOWN);     // steps down the image that a unit takes part in
  constexpr int WORDS = WIDTH * sizeof(T) / sizeof(unsigned);
  float down_taps[TAPS], along_taps[TAPS];
  Place at;
  const bool product = factors<TAPS>(p, down_taps, along_taps);
  if (!find(p, WIDTH, at)) return;
  if constexpr (TAPS == 4) {
    if (!product) return each_output<T, WIDTH, UP>(p, at);
  }

  const int left = p.origin_x + at.column * DOWN, first_x = p.first_x + at.column * UP;
  int row = p.origin_y + at.first * DOWN;
  const int end = row + (at.last - at.first + LIVES - 1) * DOWN, end_row = end < p.in_h ? end : p.in_h;
  const T* x = static_cast<const T*>(p.x) + at.channel +
               (static_cast<long long>(at.image * p.in_h + row) * p.in_w + left) * p.channels;
  T* y = static_cast<T*>(p.y) + at.channel +
         (static_cast<long long>(at.image * p.out_h + p.first_y + at.first * UP) * p.out_w + first_x) * p.channels;
  bool inside_x[SEEN];
#pragma unroll
  for (int i = 0; i < SEEN; ++i) inside_x[i] = static_cast<unsigned>(left + i) < static_cast<unsigned>(p.in_w);
  Pack<unsigned, WORDS> pixels[DOWN][SEEN] = {};  // of the next step
  float begun[UP][LIVES - 1][UP][WIDTH] = {};     // sums that lack rows still to come, the next to be complete first
#pragma unroll(WIDTH == 1 && TAPS == 4 && UP == 1 ? 2 : 1)
  for (int unit = at.first - LIVES; unit < at.last; ++unit) {  // the first step of all only reads
    float along[DOWN][UP][WIDTH];                              // filtered along x
#pragma unroll
    for (int d = 0; d < DOWN; ++d)
#pragma unroll
      for (int c = 0; c < WIDTH; ++c)
#pragma unroll
        for (int phase = 0; phase < UP; ++phase) {
          const int skipped = EVEN_FIRST ? phase : 0, first_tap = EVEN_FIRST ? phase : UP - 1 - phase;
          float sum = 0;
#pragma unroll
          for (int i = 0; i < TAPS / UP; ++i)
            sum += along_taps[i * UP + first_tap] * number<T>(pixels[d][i + skipped].at, c);
          along[d][phase][c] = sum;
        }
    // The reading of the next step goes on while this one is computed.
#pragma unroll
    for (int d = 0; d < DOWN; ++d) {
      const bool inside = row >= 0 && row < end_row;
#pragma unroll
      for (int i = 0; i < SEEN; ++i) pixels[d][i] = load_if<WORDS>(inside && inside_x[i], x + i * p.channels);
      ++row;
      x += p.in_w * p.channels;
    }
    Pack<T, WIDTH> result[UP][UP];
#pragma unroll
    for (int phase = 0; phase < UP; ++phase)
#pragma unroll
      for (int other = 0; other < UP; ++other)
#pragma unroll
        for (int c = 0; c < WIDTH; ++c)
#pragma unroll
          for (int i = 0; i < LIVES; ++i) {
            float sum = i + 1 < LIVES ? begun[phase][i][other][c] : 0;
#pragma unroll
            for (int d = 0; d < DOWN; ++d)
              sum += down_taps[((LIVES - 1 - i) * DOWN + d) * UP + UP - 1 - phase] * along[d][other][c];
            if (i == 0) {
              result[phase][other].at[c] = from_float<T>(sum);
            } else {
              begun[phase][i - 1][other][c] = sum;
            }
          }
    if (unit < at.first) continue;
#pragma unroll
    for (int phase = 0; phase < UP; ++phase, y += p.out_w * p.channels) {
      const int out = p.first_y + unit * UP + phase;
      if (UP == 2 && static_cast<unsigned>(out) >= static_cast<unsigned>(p.out_h)) continue;
      if constexpr (EVEN_FIRST) {
        if (p.pairs) {
          store<2>(y, Pack<T, 2>{{result[phase][0].at[0], result[phase][1].at[0]}});
          continue;
        }
      }
#pragma unroll
      for (int other = 0; other < UP; ++other)
        if (UP == 1 || static_cast<unsigned>(first_x + other) < static_cast<unsigned>(p.out_w))
          store<WIDTH>(y + other * p.channels, result[phase][other]);
    }
  }
}

ENTRY(upfirdn2d_any_f32, Params, any<float>)
ENTRY(upfirdn2d_any_f16, Params, any<half_t>)
ENTRY(upfirdn2d_any_bf16, Params, any<bfloat_t>)
ENTRY(upfirdn2d_filter4_f32, Params, columns<float, 1, 4, 1, 1>)
ENTRY(upfirdn2d_up4_f32, Params, columns<float, 1, 4, 2, 1>)
ENTRY(upfirdn2d_down4_f32, Params, columns<float, 1, 4, 1, 2>)
ENTRY(upfirdn2d_up12_f32, Params, columns<float, 1, 12, 2, 1>)
ENTRY(upfirdn2d_down12_f32, Params, columns<float, 1, 12, 1, 2>)
ENTRY(upfirdn2d_filter4_f16, Params, columns<half_t, 8, 4, 1, 1>)
ENTRY(upfirdn2d_up4_f16, Params, columns<half_t, 8, 4, 2, 1>)
ENTRY(upfirdn2d_down4_f16, Params, columns<half_t, 4, 4, 1, 2>)
ENTRY(upfirdn2d_filter4_bf16, Params, columns<bfloat_t, 8, 4, 1, 1>)
ENTRY(upfirdn2d_up4_bf16, Params, columns<bfloat_t, 8, 4, 2, 1>)
ENTRY(upfirdn2d_down4_bf16, Params, columns<bfloat_t, 4, 4, 1, 2>)
