#include "reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tk::device {
namespace {

// y [out_h, out_w] += w x, x [in_h, in_w] read at the tap (i, j).
void add_tap(const BundleLayer& l, double w, const float* x, int64_t i, int64_t j, double* y) {
  const tk_conv2d& s = l.shape;
  for (int64_t oh = 0; oh < l.out_h; ++oh, y += l.out_w) {
    const int64_t ih = oh * s.stride_h - s.pad_top + i * s.dilation_h;
    if (ih < 0 || ih >= s.in_h) continue;
    for (int64_t ow = 0; ow < l.out_w; ++ow) {
      const int64_t iw = ow * s.stride_w - s.pad_left + j * s.dilation_w;
      if (iw >= 0 && iw < s.in_w) y[ow] += w * static_cast<double>(x[ih * s.in_w + iw]);
    }
  }
}

double largest(const Aligned<float>& values) {
  double most = 0;
  for (size_t i = 0; i < values.size(); ++i) most = std::max(most, std::fabs(static_cast<double>(values[i])));
  return most;
}

}  // namespace

Reference reference(const Job& job) {
  const BundleLayer& l = job.layer;
  const tk_conv2d& s = l.shape;
  const int64_t in = s.in_h * s.in_w, out = l.out_h * l.out_w, taps = s.kernel_h * s.kernel_w;
  const double x_most = largest(job.x), residual_most = largest(job.residual);
  Reference r;
  r.sums.resize(static_cast<size_t>(l.y_count()));
  for (int64_t n = 0; n < l.batch; ++n) {
    for (int64_t m = 0; m < l.rows(); ++m) {
      double* const y = r.sums.data() + (n * l.rows() + m) * out;
      std::fill_n(y, out, static_cast<double>(l.bias[m]));
      for (int64_t k = l.row_ptr[m]; k < l.row_ptr[m + 1]; ++k) {
        const int64_t column = l.col_indices[k], channel = s.groups > 1 ? m : column / taps;
        add_tap(l, static_cast<double>(l.values[k]), job.x.data() + (n * s.in_channels + channel) * in, column % taps / s.kernel_w,
                column % s.kernel_w, y);
      }
    }
  }
  constexpr double kEpsilon = std::numeric_limits<float>::epsilon(), kHalfEpsilon = 1.0 / 1024, kHalfLeast = 1.0 / (1 << 24);
  for (int64_t m = 0; m < l.rows(); ++m) {
    const double around = std::fabs(static_cast<double>(l.bias[m])) + residual_most;
    double magnitude = around, w_most = 0;
    for (int64_t k = l.row_ptr[m]; k < l.row_ptr[m + 1]; ++k) {
      const double w = std::fabs(static_cast<double>(l.values[k]));
      magnitude += w * x_most;
      w_most = std::max(w_most, w);
    }
    const double terms = static_cast<double>(l.row_ptr[m + 1] - l.row_ptr[m] + 3);
    r.tolerance = std::max(r.tolerance, 2 * kEpsilon * terms * magnitude);
    r.half_tolerance = std::max(r.half_tolerance, 2 * terms * (kHalfEpsilon * magnitude + kHalfLeast * (1 + w_most + x_most)));
  }
  return r;
}

double expected(const Reference& r, const Job& job, const Engine& engine, size_t i) {
  const BundleLayer& l = job.layer;
  double z = r.sums[i] + (engine.residual && l.residual ? static_cast<double>(job.residual[i]) : 0.0);
  z = std::min(std::max(z, static_cast<double>(l.min)), static_cast<double>(l.max));
  if (!engine.activation) return z;
  switch (l.activation) {
    case TK_LEAKY_RELU:
      return z < 0 ? static_cast<double>(l.slope) * z : z;
    case TK_HARD_SWISH:
      return z * std::min(std::max(z / 6 + 0.5, 0.0), 1.0);
    case TK_SILU:
      return z / (1 + std::exp(-z));
    default:
      return z;
  }
}

}  // namespace tk::device
