// The engines `xnnpack-dense` and `xnnpack-sparse`: one operator of XNNPACK each, in the order of floats that it wants (NHWC, NCHW), which
// input and output are brought into outside of what is timed. Its operators fuse bias and clip; the residual and other activations are
// left out, and the results compared without them. The sparse one takes pointwise convolutions of stride 1 only.
#include <xnnpack.h>

#include <stdexcept>

#include "job.h"

namespace tk::device {
namespace {

void check(xnn_status status, const char* what) {
  if (status != xnn_status_success) throw std::runtime_error(std::string("XNNPACK: ") + what + " gave status " + std::to_string(status));
}

struct Operator {
  xnn_operator_t handle = nullptr;
  Aligned<float> x, y;
  ~Operator() {
    if (handle) xnn_delete_operator(handle);
  }
};

constexpr size_t kSlack = XNN_EXTRA_BYTES / sizeof(float);  // XNNPACK may read so far beyond an input

// [n, c, p] to [n, p, c] and back.
template <class From, class To>
void turn(const From& from, To& to, int64_t images, int64_t channels, int64_t pixels) {
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = 0; p < pixels; ++p) to[(n * pixels + p) * channels + c] = from[(n * channels + c) * pixels + p];
    }
  }
}

std::shared_ptr<Operator> operator_for(const Job& job) {
  check(xnn_initialize(nullptr), "xnn_initialize");
  const auto op = std::make_shared<Operator>();
  op->x = Aligned<float>(job.x.size(), kSlack);
  op->y = Aligned<float>(static_cast<size_t>(job.layer.y_count()), kSlack);
  return op;
}

std::vector<float> dense_weight(const BundleLayer& l) {
  std::vector<float> w(static_cast<size_t>(l.rows() * l.cols()));
  for (int64_t m = 0; m < l.rows(); ++m) {
    for (int64_t i = l.row_ptr[m]; i < l.row_ptr[m + 1]; ++i) w[m * l.cols() + l.col_indices[i]] = l.values[i];
  }
  return w;
}

Engine engine(const std::shared_ptr<Operator>& op, const char* format, std::function<std::vector<float>()> y) {
  Engine e;
  e.format = format;
  e.residual = e.activation = false;
  e.run = [op] { check(xnn_run_operator(op->handle, nullptr), "xnn_run_operator"); };
  e.y = std::move(y);
  return e;
}

}  // namespace

Engine xnnpack_dense_engine(const Job& job) {
  const BundleLayer& l = job.layer;
  const tk_conv2d& s = l.shape;
  const auto op = operator_for(job);
  const std::vector<float> w = dense_weight(l);
  const auto u = [](int64_t size) { return static_cast<uint32_t>(size); };
  const size_t batch = static_cast<size_t>(l.batch), rows = static_cast<size_t>(l.rows());
  if (l.product) {
    const size_t cols = static_cast<size_t>(l.cols());
    check(xnn_create_fully_connected_nc_f32(cols, rows, cols, rows, w.data(), l.bias.data(), l.min, l.max, 0, &op->handle),
          "fully connected");
    std::copy_n(job.x.data(), job.x.size(), op->x.data());
    check(xnn_setup_fully_connected_nc_f32(op->handle, batch, op->x.data(), op->y.data(), nullptr), "set-up");
    return engine(op, "dense", [op] { return std::vector<float>(op->y.data(), op->y.data() + op->y.size()); });
  }
  const size_t groups = static_cast<size_t>(s.groups), in = static_cast<size_t>(s.in_channels);
  std::vector<float> turned(w.size());
  turn(w, turned, l.rows(), s.in_channels / s.groups, s.kernel_h * s.kernel_w);
  check(xnn_create_convolution2d_nhwc_f32(u(s.pad_top), u(s.pad_right), u(s.pad_bottom), u(s.pad_left), u(s.kernel_h), u(s.kernel_w),
                                          u(s.stride_h), u(s.stride_w), u(s.dilation_h), u(s.dilation_w), u(s.groups), in / groups,
                                          rows / groups, in, rows, turned.data(), l.bias.data(), l.min, l.max, 0, &op->handle),
        "convolution");
  turn(job.x, op->x, l.batch, s.in_channels, s.in_h * s.in_w);
  check(xnn_setup_convolution2d_nhwc_f32(op->handle, batch, static_cast<size_t>(s.in_h), static_cast<size_t>(s.in_w), op->x.data(),
                                         op->y.data(), nullptr),
        "set-up");
  return engine(op, "dense", [op, &l] {
    std::vector<float> planes(op->y.size());
    turn(op->y, planes, l.batch, l.out_h * l.out_w, l.rows());  // the same transposition, the other way
    return planes;
  });
}

Engine xnnpack_sparse_engine(const Job& job) {
  const BundleLayer& l = job.layer;
  const tk_conv2d& s = l.shape;
  if (l.product || s.groups > 1 || s.kernel_h * s.kernel_w > 1 || s.stride_h > 1 || s.stride_w > 1 ||
      (s.pad_top | s.pad_left | s.pad_bottom | s.pad_right))
    return {};
  const auto op = operator_for(job);
  const std::vector<float> w = dense_weight(l);
  const size_t in = static_cast<size_t>(s.in_channels), rows = static_cast<size_t>(l.rows()), h = static_cast<size_t>(s.in_h),
               wide = static_cast<size_t>(s.in_w);
  // where input and output are both NCHW, pointwise convolutions of stride 1 are its sparse matrix product (SpMM), whatever the zeros
  const xnn_status status = xnn_create_convolution2d_nchw_f32(0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, in, rows, in, rows, w.data(), l.bias.data(),
                                                              l.min, l.max, 0, &op->handle);
  if (status == xnn_status_unsupported_parameter) return {};
  check(status, "sparse convolution");
  std::copy_n(job.x.data(), job.x.size(), op->x.data());
  check(xnn_setup_convolution2d_nchw_f32(op->handle, static_cast<size_t>(l.batch), h, wide, op->x.data(), op->y.data(), nullptr), "set-up");
  return engine(op, "spmm", [op] { return std::vector<float>(op->y.data(), op->y.data() + op->y.size()); });
}

}  // namespace tk::device
