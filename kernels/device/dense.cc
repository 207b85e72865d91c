// The engine `dense`: what multiplying the zeros costs without help from any library. Convolutions are a matrix product of the weights and
// the windows of the input, copied window by window as blocks of it are needed; both operands are packed into panels for a register
// block, in the manner of Goto and van de Geijn (ACM TOMS 34:3, 2008). Depthwise ones are summed tap by tap, products of one row are dot
// products. A baseline in plain C++ with the compiler's vectors: XNNPACK, where it is linked, is faster.
#include <algorithm>
#include <cstring>

#include "job.h"

namespace tk::device {
namespace {

#if defined(__x86_64__) || defined(__i386__)
constexpr int kBytes = 32, kRows = 6, kVectors = 2;  // of AVX2's 16 registers
#define TK_WIDE __attribute__((target("avx2,fma")))
#else
constexpr int kBytes = 16, kRows = 8, kVectors = 3;  // of NEON's 32
#define TK_WIDE
#endif
constexpr int kLanes = kBytes / 4, kCols = kVectors * kLanes;
constexpr int64_t kDeep = 256, kAcross = 24 * kCols;  // of a block of the packed input
typedef float Vec __attribute__((vector_size(kBytes)));

// c[kRows][kCols] += a b, a packed [deep][kRows], b packed [deep][kCols], both aligned; c starts at zero where `first`.
#define TK_BLOCK(name, attribute)                                                                                                  \
  attribute void name(const float* a, const float* b, int64_t deep, bool first, float* c, int64_t stride) {                        \
    Vec acc[kRows][kVectors];                                                                                                      \
    _Pragma("GCC unroll 8") for (int r = 0; r < kRows; ++r) {                                                                      \
      _Pragma("GCC unroll 8") for (int v = 0; v < kVectors; ++v) {                                                                 \
        acc[r][v] = Vec{};                                                                                                         \
        if (!first) std::memcpy(&acc[r][v], c + r * stride + v * kLanes, kBytes);                                                  \
      }                                                                                                                            \
    }                                                                                                                              \
    for (int64_t k = 0; k < deep; ++k, a += kRows, b += kCols) {                                                                   \
      Vec row[kVectors];                                                                                                           \
      _Pragma("GCC unroll 8") for (int v = 0; v < kVectors; ++v) std::memcpy(&row[v], b + v * kLanes, kBytes);                     \
      _Pragma("GCC unroll 8") for (int r = 0; r < kRows; ++r) {                                                                    \
        _Pragma("GCC unroll 8") for (int v = 0; v < kVectors; ++v) acc[r][v] += a[r] * row[v];                                     \
      }                                                                                                                            \
    }                                                                                                                              \
    _Pragma("GCC unroll 8") for (int r = 0; r < kRows; ++r) {                                                                      \
      _Pragma("GCC unroll 8") for (int v = 0; v < kVectors; ++v) { std::memcpy(c + r * stride + v * kLanes, &acc[r][v], kBytes); } \
    }                                                                                                                              \
  }
TK_BLOCK(block_wide, TK_WIDE)
#if defined(__x86_64__) || defined(__i386__)
TK_BLOCK(block_narrow, )
#endif
#undef TK_BLOCK

using Block = void (*)(const float*, const float*, int64_t, bool, float*, int64_t);

Block choose() {
#if defined(__x86_64__) || defined(__i386__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? block_wide : block_narrow;
#else
  return block_wide;
#endif
}

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Dense {
 public:
  explicit Dense(const Job& job)
      : l_(job.layer),
        x_(job.x.data()),
        residual_(l_.residual ? job.residual.data() : nullptr),
        y_(static_cast<size_t>(l_.y_count())),
        depth_(l_.cols()),
        weight_(static_cast<size_t>(l_.rows() * l_.cols())) {
    for (int64_t m = 0; m < l_.rows(); ++m) {
      for (int64_t i = l_.row_ptr[m]; i < l_.row_ptr[m + 1]; ++i) weight_[m * depth_ + l_.col_indices[i]] = l_.values[i];
    }
    if (l_.shape.groups > 1 || (l_.product && l_.batch == 1)) return;
    pixels_ = l_.product ? l_.batch : l_.out_h * l_.out_w;
    panels_ = over(l_.rows(), kRows);
    packed_ = Aligned<float>(static_cast<size_t>(panels_ * kRows * depth_));
    for (int64_t from = 0, at = 0; from < depth_; from += kDeep) {
      for (int64_t m = 0; m < panels_ * kRows; m += kRows) {
        for (int64_t k = from; k < std::min(from + kDeep, depth_); ++k) {
          for (int64_t r = m; r < m + kRows; ++r) packed_[at++] = r < l_.rows() ? weight_[r * depth_ + k] : 0.0f;
        }
      }
    }
    weight_ = Aligned<float>();
    input_ = Aligned<float>(static_cast<size_t>(kDeep * kAcross));
    if (l_.product) turned_ = Aligned<float>(static_cast<size_t>(l_.rows() * pixels_));
  }

  void run() {
    if (l_.product && l_.batch == 1) {
      dots();
    } else if (l_.product) {
      product(x_, turned_.data());
      for (int64_t n = 0; n < l_.batch; ++n) {
        for (int64_t m = 0; m < l_.rows(); ++m) y_[n * l_.rows() + m] = turned_[m * pixels_ + n];
      }
      for (int64_t n = 0; n < l_.batch; ++n) {
        for (int64_t m = 0; m < l_.rows(); ++m) finish(n * l_.rows() + m, m, 1);
      }
    } else {
      const int64_t in = l_.shape.in_channels * l_.shape.in_h * l_.shape.in_w, out = l_.out_h * l_.out_w;
      for (int64_t n = 0; n < l_.batch; ++n) {
        float* const y = y_.data() + n * l_.rows() * out;
        if (l_.shape.groups > 1) {
          taps(x_ + n * in, y);
        } else {
          product(x_ + n * in, y);
        }
        for (int64_t m = 0; m < l_.rows(); ++m) finish((n * l_.rows() + m) * out, m, out);
      }
    }
  }

  std::vector<float> y() const { return std::vector<float>(y_.data(), y_.data() + y_.size()); }

 private:
  // y [rows, pixels] = weight times the windows of x.
  void product(const float* x, float* y) {
    const Block block = choose();
    float edge[kRows * kCols];
    for (int64_t from = 0; from < depth_; from += kDeep) {
      const int64_t deep = std::min(kDeep, depth_ - from);
      const float* const a = packed_.data() + from * panels_ * kRows;
      for (int64_t left = 0; left < pixels_; left += kAcross) {
        const int64_t end = std::min(left + kAcross, pixels_);
        for (int64_t p = left; p < end; p += kCols)
          gather(x, from, deep, p, std::min<int64_t>(kCols, end - p), input_.data() + (p - left) * deep);
        for (int64_t p = left; p < end; p += kCols) {
          const float* const b = input_.data() + (p - left) * deep;
          const int64_t width = std::min<int64_t>(kCols, end - p);
          for (int64_t m = 0; m < l_.rows(); m += kRows) {
            const int64_t height = std::min<int64_t>(kRows, l_.rows() - m);
            float* const c = y + m * pixels_ + p;
            if (width == kCols && height == kRows) {
              block(a + m * deep, b, deep, from == 0, c, pixels_);
              continue;
            }
            for (int64_t r = 0; r < height && from; ++r) std::copy_n(c + r * pixels_, width, edge + r * kCols);
            block(a + m * deep, b, deep, from == 0, edge, kCols);
            for (int64_t r = 0; r < height; ++r) std::copy_n(edge + r * kCols, width, c + r * pixels_);
          }
        }
      }
    }
  }

  // One panel: what the output pixels p … p + width - 1 read for the columns `from` … of the weight, [deep][kCols]; the rest is zero.
  void gather(const float* x, int64_t from, int64_t deep, int64_t p, int64_t width, float* to) const {
    const tk_conv2d& s = l_.shape;
    const int64_t taps = s.kernel_h * s.kernel_w, plane = s.in_h * s.in_w;
    for (int64_t k = from; k < from + deep; ++k, to += kCols) {
      std::fill(to + width, to + kCols, 0.0f);
      if (l_.product) {
        for (int64_t t = 0; t < width; ++t) to[t] = x[(p + t) * depth_ + k];
        continue;
      }
      const float* const source = x + k / taps * plane;
      if (pointwise()) {
        std::copy_n(source + p, width, to);
        continue;
      }
      const int64_t i = k % taps / s.kernel_w, j = k % s.kernel_w;
      for (int64_t t = 0; t < width;) {
        const int64_t oh = (p + t) / l_.out_w, ow = (p + t) % l_.out_w, run = std::min(width - t, l_.out_w - ow);
        const int64_t ih = oh * s.stride_h - s.pad_top + i * s.dilation_h, iw = ow * s.stride_w - s.pad_left + j * s.dilation_w;
        const bool inside = ih >= 0 && ih < s.in_h;
        for (int64_t u = 0; u < run; ++u) {
          const int64_t column = iw + u * s.stride_w;
          to[t + u] = inside && column >= 0 && column < s.in_w ? source[ih * s.in_w + column] : 0.0f;
        }
        t += run;
      }
    }
  }

  bool pointwise() const {
    const tk_conv2d& s = l_.shape;
    return s.kernel_h * s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 && !(s.pad_top | s.pad_left | s.pad_bottom | s.pad_right);
  }

  void taps(const float* x, float* y) const {
    const tk_conv2d& s = l_.shape;
    const int64_t out = l_.out_h * l_.out_w;
    for (int64_t c = 0; c < s.out_channels; ++c, x += s.in_h * s.in_w, y += out) {
      std::fill_n(y, out, 0.0f);
      for (int64_t i = 0; i < s.kernel_h; ++i) {
        for (int64_t j = 0; j < s.kernel_w; ++j) {
          const float w = weight_[c * depth_ + i * s.kernel_w + j];
          const int64_t shift = j * s.dilation_w - s.pad_left;  // columns iw = ow * stride_w + shift inside the image
          const int64_t low = shift < 0 ? over(-shift, s.stride_w) : 0;
          const int64_t high = std::min(l_.out_w, shift < s.in_w ? (s.in_w - 1 - shift) / s.stride_w + 1 : 0);
          for (int64_t oh = 0; oh < l_.out_h; ++oh) {
            const int64_t ih = oh * s.stride_h - s.pad_top + i * s.dilation_h;
            if (ih < 0 || ih >= s.in_h) continue;
            const float* const row = x + ih * s.in_w + shift;
            float* const to = y + oh * l_.out_w;
            if (s.stride_w == 1) {
              for (int64_t ow = low; ow < high; ++ow) to[ow] += w * row[ow];
            } else {
              for (int64_t ow = low; ow < high; ++ow) to[ow] += w * row[ow * s.stride_w];
            }
          }
        }
      }
    }
  }

  void dots() {
    constexpr int kSums = 16;
    for (int64_t m = 0; m < l_.rows(); ++m) {
      const float* const w = weight_.data() + m * depth_;
      float sums[kSums] = {};
      int64_t k = 0;
      for (; k + kSums <= depth_; k += kSums) {
        for (int t = 0; t < kSums; ++t) sums[t] += w[k + t] * x_[k + t];
      }
      for (; k < depth_; ++k) sums[0] += w[k] * x_[k];
      for (int t = 1; t < kSums; ++t) sums[0] += sums[t];
      y_[m] = sums[0];
      finish(m, m, 1);
    }
  }

  // Bias of row m, residual, clip and activation of `count` outputs.
  void finish(int64_t at, int64_t m, int64_t count) {
    float* const y = y_.data() + at;
    const float bias = l_.bias[m];
    if (residual_) {
      for (int64_t i = 0; i < count; ++i) y[i] += residual_[at + i];
    }
    for (int64_t i = 0; i < count; ++i) {
      const float z = y[i] + bias, least = z < l_.min ? l_.min : z;
      y[i] = least > l_.max ? l_.max : least;
    }
    if (l_.activation == TK_IDENTITY) return;
    for (int64_t i = 0; i < count; ++i) y[i] = activated(y[i], l_.activation, l_.slope);
  }

  const BundleLayer& l_;
  const float *const x_, *const residual_;
  Aligned<float> y_;
  const int64_t depth_;
  int64_t pixels_ = 0, panels_ = 0;
  Aligned<float> weight_, packed_, input_, turned_;
};

}  // namespace

Engine dense_engine(const Job& job) {
  const auto dense = std::make_shared<Dense>(job);
  Engine e;
  e.format = "dense";
  e.run = [dense] { dense->run(); };
  e.y = [dense] { return dense->y(); };
  return e;
}

}  // namespace tk::device
