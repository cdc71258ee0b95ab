// Bias, (leaky) ReLU, gain and clamp in one pass over memory each way, on CPUs. See bias_act.py for what they compute.
//
// Everything is computed in float32 and rounded once. The threads are PyTorch's own. Sums are over parts of the tensor
// that do not depend on the number of threads, and added in order: the same input gives the same bits.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32768;   // elements that are worth a thread
constexpr int64_t kLanes = 256;     // shortest inner loop over channels, which are repeated up to it
constexpr int64_t kPart = 16384;    // elements of one partial sum, unless that makes more than kParts
constexpr int64_t kParts = 64;
constexpr int64_t kFloatSums = 64;  // numbers added in float32 before they go to a float64

struct Bfloat16 {
  uint16_t bits;
};

inline float load(float x) { return x; }

inline float load(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline void store(float value, float& x) { x = value; }

// To nearest, ties to even; NaN stays NaN.
inline void store(float value, Bfloat16& x) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  x.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

template <typename T>
float rounded_to(double value) {
  T x;
  store(static_cast<float>(value), x);
  return load(x);
}

// Slopes above and below zero with the gain in them, and the limit: NaN where there is none, which no number exceeds.
// The limit has the precision of T, so that a stored number tells whether it was clamped.
struct Curve {
  float above, below, limit;
};

// relu is more than a slope of zero: it takes infinities, and gradients of infinity, to zero.
template <bool relu>
inline float curve(float v, const Curve& f) {
  float y;
  if (relu) {
    y = v * f.above;
    y = v < 0.f ? 0.f : y;
  } else {
    y = v * (v > 0.f ? f.above : f.below);
  }
  y = y > f.limit ? f.limit : y;
  return y < -f.limit ? -f.limit : y;
}

template <bool relu>
inline float slope(float dy, float y, const Curve& f) {
  float dx;
  if (relu) {
    dx = dy * f.above;
    dx = y <= 0.f ? 0.f : dx;
  } else {
    dx = dy * (y > 0.f ? f.above : f.below);
  }
  return std::fabs(y) >= f.limit ? 0.f : dx;
}

// Memory in order is [rows, channels, inner]. With inner 1, rows are taken together until they are kLanes long.
struct Layout {
  int64_t size, channels, inner, repeats;

  Layout(const Tensor& x, bool channels_innermost) : size(x.numel()), channels(x.size(1)) {
    inner = channels_innermost ? 1 : size / (x.size(0) * channels);
    repeats = inner > 1 ? 1 : (kLanes + channels - 1) / channels;
  }

  int64_t lanes() const { return channels * repeats; }
};

template <typename T, bool relu>
void forward(const T* x, const T* b, T* y, const Layout& layout, const Curve& f) {
  std::vector<float> bias(layout.lanes(), 0.f);
  if (b != nullptr) {
    for (int64_t i = 0; i < layout.lanes(); i++) bias[i] = load(b[i % layout.channels]);
  }
  const int64_t step = layout.inner > 1 ? layout.inner : layout.lanes();
  const int64_t steps = (layout.size + step - 1) / step;
  torch::stable::parallel_for(0, steps, std::max<int64_t>(1, kGrain / step), [&](int64_t begin, int64_t end) {
    const Curve g = f;
    for (int64_t s = begin; s < end; s++) {
      const int64_t n = std::min(step, layout.size - s * step);
      const T* __restrict__ in = x + s * step;
      T* __restrict__ out = y + s * step;
      if (layout.inner > 1) {
        const float plus = bias[s % layout.channels];
        for (int64_t i = 0; i < n; i++) store(curve<relu>(load(in[i]) + plus, g), out[i]);
      } else {
        const float* __restrict__ plus = bias.data();
        for (int64_t i = 0; i < n; i++) store(curve<relu>(load(in[i]) + plus[i], g), out[i]);
      }
    }
  });
}

// One plane of one channel; returns its sum.
template <typename T, bool relu>
double backward_plane(const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dx, int64_t n, Curve f) {
  constexpr int64_t width = 32;
  double sum = 0;
  int64_t i = 0;
  while (i + width <= n) {
    float sums[width] = {};
    const int64_t stop = std::min(n - width, i + (kFloatSums - 1) * width);
    for (; i <= stop; i += width) {
      for (int64_t j = 0; j < width; j++) {
        const float d = slope<relu>(load(dy[i + j]), load(y[i + j]), f);
        sums[j] += d;
        store(d, dx[i + j]);
      }
    }
    for (int64_t j = 0; j < width; j++) sum += sums[j];
  }
  for (; i < n; i++) {
    const float d = slope<relu>(load(dy[i]), load(y[i]), f);
    sum += d;
    store(d, dx[i]);
  }
  return sum;
}

template <typename T, bool relu>
void backward(const T* dy, const T* y, T* dx, T* db, const Layout& layout, const Curve& f) {
  std::vector<double> total(layout.channels, 0.0);
  if (layout.inner > 1) {
    const int64_t planes = layout.size / layout.inner;
    std::vector<double> sums(planes);
    torch::stable::parallel_for(
        0, planes, std::max<int64_t>(1, kGrain / layout.inner), [&](int64_t begin, int64_t end) {
          for (int64_t p = begin; p < end; p++) {
            const int64_t at = p * layout.inner;
            sums[p] = backward_plane<T, relu>(dy + at, y + at, dx + at, layout.inner, f);
          }
        });
    for (int64_t p = 0; p < planes; p++) total[p % layout.channels] += sums[p];
  } else {
    const int64_t lanes = layout.lanes();
    const int64_t steps = (layout.size + lanes - 1) / lanes;
    const int64_t wanted = std::clamp<int64_t>(layout.size / kPart, 1, kParts);
    const int64_t steps_per_part = (steps + wanted - 1) / wanted;
    const int64_t parts = (steps + steps_per_part - 1) / steps_per_part;
    std::vector<double> sums(db == nullptr ? 0 : parts * lanes, 0.0);
    const int64_t grain = std::max<int64_t>(1, kGrain / (steps_per_part * lanes));
    torch::stable::parallel_for(0, parts, grain, [&](int64_t begin, int64_t end) {
      const Curve g = f;
      std::vector<float> few(lanes);
      for (int64_t part = begin; part < end; part++) {
        const int64_t stop = std::min(steps, (part + 1) * steps_per_part);
        for (int64_t s = part * steps_per_part; s < stop;) {
          const int64_t pause = std::min(stop, s + kFloatSums);
          std::fill(few.begin(), few.end(), 0.f);
          float* __restrict__ sum = few.data();
          for (; s < pause; s++) {
            const int64_t n = std::min(lanes, layout.size - s * lanes);
            const T* __restrict__ d_out = dy + s * lanes;
            const T* __restrict__ out = y + s * lanes;
            T* __restrict__ d_in = dx + s * lanes;
            if (db == nullptr) {
              for (int64_t i = 0; i < n; i++) store(slope<relu>(load(d_out[i]), load(out[i]), g), d_in[i]);
            } else {
              for (int64_t i = 0; i < n; i++) {
                const float d = slope<relu>(load(d_out[i]), load(out[i]), g);
                sum[i] += d;
                store(d, d_in[i]);
              }
            }
          }
          if (db != nullptr) {
            double* __restrict__ many = sums.data() + part * lanes;
            for (int64_t i = 0; i < lanes; i++) many[i] += sum[i];
          }
        }
      }
    });
    if (db != nullptr) {
      for (int64_t i = 0; i < parts * lanes; i += layout.channels) {
        for (int64_t c = 0; c < layout.channels; c++) total[c] += sums[i + c];
      }
    }
  }
  if (db != nullptr) {
    for (int64_t c = 0; c < layout.channels; c++) store(static_cast<float>(total[c]), db[c]);
  }
}

template <typename T>
Curve curve_of(double alpha, double gain, double clamp) {
  return {static_cast<float>(gain), static_cast<float>(gain * alpha), rounded_to<T>(clamp)};
}

// Calls function(T()) with the element type of x.
template <typename Function>
void with_type_of(const Tensor& x, const Function& function) {
  if (x.scalar_type() == ScalarType::Float) {
    function(float());
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "bias_act: neither float32 nor bfloat16");
    function(Bfloat16());
  }
}

template <typename T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

Tensor bias_act(Tensor x, std::optional<Tensor> b, bool channels_innermost, bool relu, double alpha, double gain,
                double clamp) {
  STD_TORCH_CHECK(x.dim() >= 2, "bias_act: fewer than two dimensions");
  if (b.has_value()) {
    STD_TORCH_CHECK(b->numel() == x.size(1) && b->is_contiguous() && b->scalar_type() == x.scalar_type(),
                    "bias_act: the bias does not fit");
  }
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const Layout layout(x, channels_innermost);
  with_type_of(x, [&](auto zero) {
    using T = decltype(zero);
    const T* bias = b.has_value() ? read<T>(*b) : nullptr;
    const Curve f = curve_of<T>(alpha, gain, clamp);
    (relu ? forward<T, true> : forward<T, false>)(read<T>(x), bias, write<T>(y), layout, f);
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_act_grad(Tensor dy, Tensor y, bool channels_innermost, bool relu, double alpha,
                                         double gain, double clamp, bool bias) {
  STD_TORCH_CHECK(y.dim() >= 2 && dy.numel() == y.numel() && dy.scalar_type() == y.scalar_type(),
                  "bias_act_grad: the gradient does not fit the output");
  Tensor dx = torch::stable::empty_like(y);
  Tensor db = torch::stable::new_zeros(y, {bias ? y.size(1) : 0});
  if (y.numel() == 0) return {dx, db};
  const Layout layout(y, channels_innermost);
  with_type_of(y, [&](auto zero) {
    using T = decltype(zero);
    T* sums = bias ? write<T>(db) : nullptr;
    const Curve f = curve_of<T>(alpha, gain, clamp);
    (relu ? backward<T, true> : backward<T, false>)(read<T>(dy), read<T>(y), write<T>(dx), sums, layout, f);
  });
  return {dx, db};
}

}  // namespace

// clamp is NaN for none. Tensors are dense; channels_innermost says in which order. No autograd: bias_act.py does that.
STABLE_TORCH_LIBRARY(gan_cpu, m) {
  m.def(
      "bias_act(Tensor x, Tensor? b, bool channels_innermost, bool relu, float alpha, float gain, float clamp)"
      " -> Tensor");
  m.def(
      "bias_act_grad(Tensor dy, Tensor y, bool channels_innermost, bool relu, float alpha, float gain, float clamp,"
      " bool bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gan_cpu, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&bias_act));
  m.impl("bias_act_grad", TORCH_BOX(&bias_act_grad));
}
