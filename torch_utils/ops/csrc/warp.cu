// The lookup of the augmentation's warp and its transpose.
//
// A line of `size` pixels, continued by reflection about its first and last pixel, is upsampled by 2 with a low-pass of
// 12 taps, and looked up bilinearly at any position u in half pixels: the weight of the pixel at c is a function of
// u - 2 c alone, straight between whole numbers and 0 outside of (-6, 7). So one sample is 7 x 7 pixels, and no plane
// of upsampled pixels is made. Each image has one affine matrix from samples to positions.
//
// The transpose gathers: a pixel finds the samples that see it, or one of its mirrored copies, through the inverse of
// the matrix. Both kernels get positions and weights from the same functions, so that they are each other's transpose
// to the last bit of a weight. Nothing here may be compiled with fast math.

#include "common.cuh"

constexpr int TAPS = 12;
constexpr int SEEN = TAPS / 2 + 1;   // pixels along a line that a sample sees
constexpr int MARGIN = TAPS / 4;     // output pixels beyond the border that are sampled for the downsampling
constexpr int LEFT = 6;              // half pixels from the left end of the weight function to its origin
constexpr int SEGMENTS = TAPS + 2;   // straight parts of the weight function, the last one 0
constexpr int TILE = 16;             // samples or pixels a side that a block computes
constexpr int GROUP = 3;             // channels that a block computes, at most
constexpr int COPIES = 1024;         // of the picture, in view of a matrix; beyond that the transpose looks everywhere
constexpr float FAR = 4194304.0f;    // 2**22: positions below it keep their place between half pixels

struct Strides {
  int image, channel, y, x;
};

struct Params {
  const void* source;
  void* target;
  const float* inverse;  // [N, 3, 3], from output to input position, in pixels from the centre
  const float* lowpass;  // [TAPS]
  int channels, height, width;  // of the pictures
  Strides from, to;
};

struct Segment {
  float start, slope;
};

// What this thread computes: `channels` numbers of one sample or pixel.
struct Index {
  int image, first, channels, y, x;
};

// A position between k and k + 1 of an upsampled line, at the share r of the way.
struct Place {
  int k;
  float r;
};

// Positions of samples, in half pixels from the first pixel.
struct Affine {
  float xx, xy, x0, yx, yy, y0;
};

__device__ inline int sampled(int size) { return 2 * (size + 2 * MARGIN); }

// Warps are tiles of 8 x 4, which stay together in the cache however the picture is turned.
__device__ inline Index index_of(int channels, int height, int width) {
  const int columns = (width + TILE - 1) / TILE, tiles = (height + TILE - 1) / TILE * columns;
  const int tile = blockIdx.x % tiles, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int first = blockIdx.y * GROUP, left = channels - first;
  return {static_cast<int>(blockIdx.x) / tiles, first, left < GROUP ? left : GROUP,
          tile / columns * TILE + warp / 2 * 4 + lane / 8, tile % columns * TILE + warp % 2 * 8 + lane % 8};
}

__device__ inline int offset_of(const Strides& s, const Index& at) {
  return at.image * s.image + at.first * s.channel + at.y * s.y + at.x * s.x;
}

// The weight function, by segments from -6 on. `table` is the block's.
__device__ inline void tabulate(const float* lowpass, Segment* table) {
  const int i = threadIdx.x;
  if (i >= SEGMENTS) return;
  const float start = i >= 1 && i <= TAPS ? 2 * lowpass[i - 1] : 0;
  const float end = i < TAPS ? 2 * lowpass[i] : 0;
  table[i] = {start, end - start};
}

__device__ inline float weight(const Segment& segment, float r) { return fmaf(segment.slope, r, segment.start); }

// Half pixels less whole periods of the reflections of a line, which is exact until u has lost its last digits.
__device__ inline float less_periods(float u, int size) {
  const float period = static_cast<float>(4 * (size - 1));
  return fmaf(-rintf(u / period), period, u);
}

// From a shift, in pixels from the centre, to half pixels from the first pixel.
__device__ inline float shifted(float pixels, int size) { return less_periods(2 * pixels, size) + (size - 1); }

__device__ inline Affine affine_of(const Params& p, int image) {
  const float* m = p.inverse + 9 * image;
  return {2 * m[0], 2 * m[1], shifted(m[2], p.width), 2 * m[3], 2 * m[4], shifted(m[5], p.height)};
}

// Output position of the k-th sample along a line, in pixels from the centre: a quarter of a pixel right of the middle
// of its half pixel, as the filter leans.
__device__ inline float offset(int k, int size) { return 0.5f * k + (0.5f - MARGIN - 0.5f * size); }

__device__ inline float position_x(const Affine& a, float x, float y) { return fmaf(a.xx, x, fmaf(a.xy, y, a.x0)); }

__device__ inline float position_y(const Affine& a, float x, float y) { return fmaf(a.yx, x, fmaf(a.yy, y, a.y0)); }

// For |u| < FAR, without conversions, which are slow. At whole numbers k may be one less and r 1, which is the same.
__device__ inline Place place_near(float u) {
  constexpr float WHOLE = 12582912.0f;  // 1.5 * 2**23: floats about it are the whole numbers
  const float moved = (u - 0.5f) + WHOLE;
  return {static_cast<int>(__float_as_uint(moved)) - 0x4b400000, u - (moved - WHOLE)};
}

// For any u: what is too large to be a position is 0, and what is not finite has r = NaN and some k.
__device__ inline Place place(float u, int size) {
  if (!(fabsf(u) < FAR)) {
    const float rest = less_periods(u, size);
    u = fabsf(rest) < FAR ? rest : u * 0;
  }
  return place_near(u);
}

// The first of the SEEN pixels, in [0, period).
__device__ inline int first_seen(int k, int period) {
  const int first = (k >> 1) - SEEN / 2;
  if (static_cast<unsigned>(first) < static_cast<unsigned>(period)) return first;
  const int rest = first % period;
  return rest < 0 ? rest + period : rest;
}

__device__ inline int next_seen(int index, int period) { return index + 1 == period ? 0 : index + 1; }

__device__ inline int folded(int index, int period) { return index < period - index ? index : period - index; }

// The segment in which the t-th of the SEEN pixels has its weight.
__device__ inline int segment_of(int k, int t) { return (k & 1) + 2 * (SEEN - 1 - t); }

template <class T, int CHANNELS>
__device__ inline void look_up(const Params& p, const T* source, T* target, const int* columns,
                               const float* across, const Place& v, const Segment* table) {
  const int period = 2 * (p.height - 1);
  float sum[CHANNELS] = {};
  int row = first_seen(v.k, period);
#pragma unroll 1
  for (int t = 0; t < SEEN; ++t) {
    const T* line = source + folded(row, period) * p.from.y;
    const float down = weight(table[segment_of(v.k, t)], v.r);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      float seen = 0;
#pragma unroll
      for (int i = 0; i < SEEN; ++i) seen = fmaf(across[i], to_float(line[c * p.from.channel + columns[i]]), seen);
      sum[c] = fmaf(down, seen, sum[c]);
    }
    row = next_seen(row, period);
  }
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) target[c * p.to.channel] = from_float<T>(sum[c]);
}

// pictures -> samples
template <class T>
__device__ inline void sample(const Params& p) {
  __shared__ Segment table[SEGMENTS];
  tabulate(p.lowpass, table);
  __syncthreads();
  const Index at = index_of(p.channels, sampled(p.height), sampled(p.width));
  if (at.y >= sampled(p.height) || at.x >= sampled(p.width)) return;

  const Affine a = affine_of(p, at.image);
  const float x = offset(at.x, p.width), y = offset(at.y, p.height);
  const Place u = place(position_x(a, x, y), p.width), v = place(position_y(a, x, y), p.height);
  const int period = 2 * (p.width - 1);
  int columns[SEEN], column = first_seen(u.k, period);
  float across[SEEN];
#pragma unroll
  for (int t = 0; t < SEEN; ++t) {
    columns[t] = folded(column, period) * p.from.x;
    across[t] = weight(table[segment_of(u.k, t)], u.r);
    column = next_seen(column, period);
  }

  const T* source = static_cast<const T*>(p.source) + at.image * p.from.image + at.first * p.from.channel;
  T* target = static_cast<T*>(p.target) + offset_of(p.to, at);
  if (at.channels == GROUP) return look_up<T, GROUP>(p, source, target, columns, across, v, table);
#pragma unroll 1
  for (int c = 0; c < at.channels; ++c)
    look_up<T, 1>(p, source + c * p.from.channel, target + c * p.to.channel, columns, across, v, table);
}

// Where the samples of an image look. The plane of reflections is divided into cells of size - 1 pixels, from one
// border of a picture to the other, every other one mirrored.
struct View {
  Affine affine;
  float inverse_xx, inverse_xy, inverse_yx, inverse_yy;  // from half pixels to samples
  float reach_x, reach_y;                                // samples from those that see a pixel to their middle, at most
  int first_x, last_x, first_y, last_y;                  // cells in view
  bool everywhere;  // any sample may see any pixel: the matrix has no inverse that is of use
  float nothing;    // 0, or NaN if the matrix is not finite: then samples see nothing, but pass on NaN
};

__device__ inline int floor_divided(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Cells with a copy of a pixel that may be seen from positions up to `extent` from `centre`.
__device__ inline void cells_in_view(float centre, float extent, int size, int& first, int& last) {
  const int low = static_cast<int>(floorf((centre - extent) / 2)) - SEEN;
  const int high = static_cast<int>(ceilf((centre + extent) / 2)) + SEEN;
  first = floor_divided(low, size - 1);  // with what is on the border of two cells: low is less than any such pixel
  last = floor_divided(high, size - 1);
}

__device__ inline View view_of(const Params& p, int image) {
  View view;
  const Affine a = affine_of(p, image);
  view.affine = a;
  view.nothing = a.xx * 0 + a.xy * 0 + a.x0 * 0 + a.yx * 0 + a.yy * 0 + a.y0 * 0;
  const float x = MARGIN + 0.5f * p.width, y = MARGIN + 0.5f * p.height;  // no sample is farther from the centre
  const float extent_x = fabsf(a.xx) * x + fabsf(a.xy) * y, extent_y = fabsf(a.yx) * x + fabsf(a.yy) * y;
  const float farthest_x = extent_x + fabsf(a.x0), farthest_y = extent_y + fabsf(a.y0);
  // The determinant with both products to their last bit.
  const float product = a.xy * a.yx;
  const float determinant = fmaf(a.xx, a.yy, -product) - fmaf(a.xy, a.yx, -product);
  view.inverse_xx = 2 * a.yy / determinant;
  view.inverse_xy = -2 * a.xy / determinant;
  view.inverse_yx = -2 * a.yx / determinant;
  view.inverse_yy = 2 * a.xx / determinant;
  const float size = fabsf(view.inverse_xx) + fabsf(view.inverse_xy) + fabsf(view.inverse_yx) + fabsf(view.inverse_yy);
  view.everywhere = !(farthest_x < FAR / 2 && farthest_y < FAR / 2 && size < 1e6f);  // NaN: everywhere
  if (view.everywhere) return view;

  cells_in_view(a.x0, extent_x, p.width, view.first_x, view.last_x);
  cells_in_view(a.y0, extent_y, p.height, view.first_y, view.last_y);
  const float cells = static_cast<float>(view.last_x - view.first_x + 1) * (view.last_y - view.first_y + 1);
  view.everywhere = cells > COPIES;
  // Half of the weight function's support, and what roundings may add. With e = 2^-24: a position is wrong by 3 e
  // farthest at most, and the entries of the inverse, of a determinant that is exact to 2 e, by 3 e of themselves; what
  // they are multiplied with, at most farthest + 8 where it matters, and the products are wrong by another 3 e. Together
  // that is 9 e (farthest + 8); 4e-6 is 67 e. Last, a sample's index, less than 2^17, is wrong by e of itself: 0.01.
  const float reach_u = 6.5f + 4e-6f * (farthest_x + 8), reach_v = 6.5f + 4e-6f * (farthest_y + 8);
  view.reach_x = fabsf(view.inverse_xx) * reach_u + fabsf(view.inverse_xy) * reach_v + 0.01f;
  view.reach_y = fabsf(view.inverse_yx) * reach_u + fabsf(view.inverse_yy) * reach_v + 0.01f;
  return view;
}

// Position of the copy of a pixel that is in a cell.
__device__ inline int copy_of(int pixel, int cell, int size) {
  return cell & 1 ? (cell + 1) * (size - 1) - pixel : cell * (size - 1) + pixel;
}

// Whether this copy lies on the border of its cell and is that of the next, too: those that are not mirrored have it.
__device__ inline bool is_double(int pixel, int cell, int size) {
  return (cell & 1) && (pixel == 0 || pixel == size - 1);
}

// The samples along a line, from first to last, within `reach` of `middle`.
__device__ inline void range_of(float middle, float reach, int count, int& first, int& last) {
  const float end = static_cast<float>(count);
  first = static_cast<int>(fminf(fmaxf(ceilf(middle - reach), 0), end));
  last = static_cast<int>(fminf(fmaxf(floorf(middle + reach), -1), end - 1));
}

// Adds what a copy of a pixel, at (x, y) in the plane, gives to the samples that see it.
template <class T, int CHANNELS>
__device__ inline void gather(const Params& p, const T* source, const View& view, const Segment* table, int x, int y,
                              float* sum) {
  const Affine& a = view.affine;
  const float u = 2 * x + 0.5f - a.x0, v = 2 * y + 0.5f - a.y0;  // the middle of those that see it
  int top, bottom, left, right;
  const float row = view.inverse_yx * u + view.inverse_yy * v - 2 * offset(0, p.height);
  range_of(row, view.reach_y, sampled(p.height), top, bottom);
  const float column = view.inverse_xx * u + view.inverse_xy * v - 2 * offset(0, p.width);
  range_of(column, view.reach_x, sampled(p.width), left, right);
  if (left > right) return;
#pragma unroll 1
  for (int j = top; j <= bottom; ++j) {
    const float sample_y = offset(j, p.height);
    const T* seen = source + j * p.from.y + left * p.from.x;
#pragma unroll 1
    for (int i = left; i <= right; ++i, seen += p.from.x) {
      const float sample_x = offset(i, p.width);
      const Place horizontal = place_near(position_x(a, sample_x, sample_y));
      const Place vertical = place_near(position_y(a, sample_x, sample_y));
      const unsigned across = horizontal.k - (2 * x - LEFT), down = vertical.k - (2 * y - LEFT);
      if (across >= SEGMENTS || down >= SEGMENTS) continue;
      const float both = weight(table[across], horizontal.r) * weight(table[down], vertical.r);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) sum[c] = fmaf(both, to_float(seen[c * p.from.channel]), sum[c]);
    }
  }
}

template <class T, int CHANNELS>
__device__ inline void gather_copies(const Params& p, const T* source, T* target, const Index& at, const View& view,
                                     const Segment* table) {
  float sum[CHANNELS] = {};
#pragma unroll 1
  for (int row = view.first_y; row <= view.last_y; ++row) {
    if (is_double(at.y, row, p.height)) continue;
    const int y = copy_of(at.y, row, p.height);
#pragma unroll 1
    for (int column = view.first_x; column <= view.last_x; ++column) {
      if (is_double(at.x, column, p.width)) continue;
      gather<T, CHANNELS>(p, source, view, table, copy_of(at.x, column, p.width), y, sum);
    }
  }
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) target[c * p.to.channel] = from_float<T>(sum[c]);
}

// The weight of a pixel in a sample, by trying all that the sample sees.
__device__ inline float weight_of(int pixel, const Place& at, int size, const Segment* table) {
  const int period = 2 * (size - 1);
  float sum = 0;
  int index = first_seen(at.k, period);
#pragma unroll 1
  for (int t = 0; t < SEEN; ++t) {
    if (folded(index, period) == pixel) sum += weight(table[segment_of(at.k, t)], at.r);
    index = next_seen(index, period);
  }
  return sum;
}

// The same as gather_copies for any matrix, slowly.
template <class T>
__device__ inline void gather_everywhere(const Params& p, const T* source, T* target, const Index& at, const Affine& a,
                                         const Segment* table) {
  float sum[GROUP] = {};
#pragma unroll 1
  for (int j = 0; j < sampled(p.height); ++j) {
    const float y = offset(j, p.height);
    const T* seen = source + j * p.from.y;
#pragma unroll 1
    for (int i = 0; i < sampled(p.width); ++i, seen += p.from.x) {
      const float x = offset(i, p.width);
      const float down = weight_of(at.y, place(position_y(a, x, y), p.height), p.height, table);
      if (down == 0) continue;
      const float both = down * weight_of(at.x, place(position_x(a, x, y), p.width), p.width, table);
#pragma unroll
      for (int c = 0; c < GROUP; ++c)
        if (c < at.channels) sum[c] = fmaf(both, to_float(seen[c * p.from.channel]), sum[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < GROUP; ++c)
    if (c < at.channels) target[c * p.to.channel] = from_float<T>(sum[c]);
}

// samples -> pictures
template <class T>
__device__ inline void sample_transposed(const Params& p) {
  __shared__ Segment table[SEGMENTS];
  __shared__ View view;
  const Index at = index_of(p.channels, p.height, p.width);
  tabulate(p.lowpass, table);
  if (threadIdx.x == 0) view = view_of(p, at.image);
  __syncthreads();
  if (at.y >= p.height || at.x >= p.width) return;
  const T* source = static_cast<const T*>(p.source) + at.image * p.from.image + at.first * p.from.channel;
  T* target = static_cast<T*>(p.target) + offset_of(p.to, at);
  if (view.nothing != 0) {
#pragma unroll 1
    for (int c = 0; c < at.channels; ++c) target[c * p.to.channel] = from_float<T>(view.nothing);
    return;
  }
  if (view.everywhere) return gather_everywhere(p, source, target, at, view.affine, table);
  if (at.channels == GROUP) return gather_copies<T, GROUP>(p, source, target, at, view, table);
#pragma unroll 1
  for (int c = 0; c < at.channels; ++c, source += p.from.channel, target += p.to.channel)
    gather_copies<T, 1>(p, source, target, at, view, table);
}

ENTRY(warp_sample_f32, Params, sample<float>)
ENTRY(warp_sample_f16, Params, sample<half_t>)
ENTRY(warp_sample_bf16, Params, sample<bfloat_t>)
ENTRY(warp_sample_transposed_f32, Params, sample_transposed<float>)
ENTRY(warp_sample_transposed_f16, Params, sample_transposed<half_t>)
ENTRY(warp_sample_transposed_bf16, Params, sample_transposed<bfloat_t>)
