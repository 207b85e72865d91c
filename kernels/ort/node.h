// A node of the graph: inputs and attributes of the operators, checked, the packed forms of its weight, and how it runs.
//
//   inputs      X f32, values f32 [nnz], gaps u16 [nnz] (see tk_gaps_decode), B f32 [out], and for SparseConvAdd* Z f32, the residual
//   attributes  weight_shape; activation "None" | "Relu" | "Clip" (with min, max) | "LeakyRelu" (with alpha, its slope) | "HardSwish" |
//               "Silu"; SparseConv: strides [2], pads [4], dilations [2]; group, 1 or, depthwise, the number of channels; format "csr" | "bsr" | SparseGemm: "bsr1x4", the form to pack in; SparseConv: tuning [6]: lanes,
//               height and width of the image it holds for, and tile_vectors, block_channels, group_tiles (tk_tuning); SparseConv:
//               x_layout and y_layout "planes" | "csr" | "bsr" (tk_layout) of X, and of Y and Z: where another node of this library is
//               at the other end. The last five may be absent.
//
// values, gaps and B must be initializers, at the latest after graph optimizations. They are validated when the session is made; a layer
// is packed when it first meets an image size. Work is split over ONNX Runtime's own threads.
#ifndef TICKETKIT_ORT_NODE_H_
#define TICKETKIT_ORT_NODE_H_

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../ticketkit.h"
#include "support.h"

namespace tk::ort {

struct Operator : CustomOp {
  const Api* api = nullptr;
  const char* name = nullptr;
  bool is_conv = false, has_residual = false;
  int64_t threads = 1;

  // The activation in the name, "" for none.
  const char* suffix() const { return name + std::strlen(has_residual ? "SparseConvAdd" : "SparseConv"); }
};

struct Weight {
  std::vector<int32_t> col_indices;
  std::vector<int64_t> row_ptr;
  tk_csr csr;
};

// Decodes and validates; `values` is used in place.
inline Weight decode(const Tensor& values, const Tensor& gaps, int64_t rows, int64_t cols) {
  if (values.type != kFloat || values.shape.size() != 1)
    fail(kInvalidGraph, "values: expected a one-dimensional float tensor, got " + text(values.shape));
  if (gaps.type != kUint16 || gaps.shape != values.shape) {
    fail(kInvalidGraph, "gaps: expected uint16 " + text(values.shape) + " like values, got " + text(gaps.shape));
  }
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  if (rows < 1 || cols < 1 || rows > kMax || cols > kMax) fail(kInvalidGraph, "weight_shape: " + text({rows, cols}) + " is out of range");
  const int64_t nnz = values.shape[0];
  if (nnz > kMax || (nnz + cols - 1) / cols > rows)
    fail(kInvalidGraph, "values: " + std::to_string(nnz) + " of them do not fit weight " + text({rows, cols}));
  Weight w;
  w.col_indices.resize(static_cast<size_t>(nnz));
  w.row_ptr.resize(static_cast<size_t>(rows) + 1);
  tk_status status = tk_gaps_decode(rows, cols, nnz, static_cast<const uint16_t*>(gaps.data), w.col_indices.data(), w.row_ptr.data());
  w.csr = {rows, cols, nnz, static_cast<const float*>(values.data), w.col_indices.data(), w.row_ptr.data()};
  if (status == TK_OK) status = tk_csr_validate(&w.csr);
  if (status != TK_OK) fail(kInvalidGraph, tk_status_text(status));
  return w;
}

// Runs a packed layer on ONNX Runtime's threads, one contiguous range of parts each.
class Job {
 public:
  Job(const void* packed, const tk_args& args, int64_t threads) : packed_(packed), args_(args), parts_(tk_parts(packed, args.batch)) {
    ranges_ = threads < parts_ ? threads : parts_;
  }

  void run(const Api* api, KernelContext* context) {
    if (ranges_ <= 1) {
      range(this, 0);
    } else {
      check(api, parallel_for(api, context, range, static_cast<size_t>(ranges_), size_t{0}, static_cast<void*>(this)));
    }
    if (status_ != TK_OK) fail(kFail, tk_status_text(status_));
    if (out_of_memory_) throw std::bad_alloc();
  }

 private:
  static void range(void* self, size_t index) {
    thread_local Buffer workspace;
    Job& job = *static_cast<Job*>(self);
    try {
      workspace.grow(tk_workspace_bytes(job.packed_));
    } catch (const std::bad_alloc&) {
      job.out_of_memory_ = true;
      return;
    }
    const int64_t i = static_cast<int64_t>(index);
    const tk_status status =
        tk_run(job.packed_, &job.args_, job.parts_ * i / job.ranges_, job.parts_ * (i + 1) / job.ranges_, workspace.data());
    if (status != TK_OK) job.status_ = status;
  }

  const void* packed_;
  const tk_args args_;
  const int64_t parts_;
  int64_t ranges_ = 1;
  std::atomic<tk_status> status_{TK_OK};
  std::atomic<bool> out_of_memory_{false};
};

// A node of the graph: what its attributes say and its packed forms, one per image size met.
class Node {
 public:
  Node(const Operator& op, const Api* api, const KernelInfo* info)
      : api_(api), is_conv_(op.is_conv), has_residual_(op.has_residual), threads_(op.threads) {
    if (tk_isa_active(&isa_) != TK_OK) {
      const char* forced = std::getenv("TICKETKIT_ISA");
      fail(kInvalidArgument, std::string("TICKETKIT_ISA=") + (forced ? forced : "") + " is unknown or cannot run here");
    }
    shape_ = ints(api, info, "weight_shape", is_conv_ ? 4 : 2);
    if (is_conv_) {
      strides_ = ints(api, info, "strides", 2);
      pads_ = ints(api, info, "pads", 4);
      dilations_ = ints(api, info, "dilations", 2);
      check_range("strides", strides_, 1);
      check_range("pads", pads_, 0);
      check_range("dilations", dilations_, 1);
      read_group(info);
    }
    check_range("weight_shape", shape_, 1);
    read_activation(info, op.suffix());
    read_execution(info);
    const Tensor values = constant(info, 1, "values"), gaps = constant(info, 2, "gaps");
    check_bias(constant(info, 3, "B"));  // first: it bounds what the decoder allocates
    decode(values, gaps, rows(), cols());
  }

  void compute(KernelContext* context) {
    const Tensor x = input(context, 0), bias = input(context, 3);
    const std::vector<int64_t> y_shape = output_shape(x);
    const Tensor residual = has_residual_ ? input(context, 4) : Tensor{};
    if (residual.data && residual.shape != y_shape)
      fail(kInvalidArgument, "Z: expected " + text(y_shape) + " like Y, got " + text(residual.shape));
    Value* y = nullptr;
    check(api_, output(api_, context, size_t{0}, y_shape.data(), y_shape.size(), &y));
    if (x.shape[0] == 0) return;
    void* y_data = nullptr;
    check(api_, tensor_data(api_, y, &y_data));
    const std::shared_ptr<const Buffer> packed = packed_for(context, x);
    const tk_args args = {x.shape[0],
                          static_cast<const float*>(x.data),
                          static_cast<const float*>(bias.data),
                          static_cast<const float*>(residual.data),
                          static_cast<float*>(y_data),
                          min_,
                          max_,
                          activation_,
                          slope_};
    Job(packed->data(), args, threads_).run(api_, context);
  }

  const Api* api() const { return api_; }

 private:
  int64_t rows() const { return shape_[0]; }
  int64_t channels() const { return shape_[1] * group_; }
  // At most 2^31 - 1, or refused; the product of three dimensions below 2^24 could not be held otherwise.
  int64_t cols() const {
    const int64_t taps = is_conv_ ? shape_[2] * shape_[3] : 1;
    return taps > std::numeric_limits<int32_t>::max() ? taps : shape_[1] * taps;
  }

  static constexpr int64_t kMostSize = int64_t{1} << 24;  // keeps every product of sizes in 64 bits

  static void check_range(const char* name, const std::vector<int64_t>& values, int64_t least) {
    for (const int64_t v : values) {
      if (v < least || v > kMostSize) fail(kInvalidGraph, std::string(name) + ": " + text(values) + " is out of range");
    }
  }

  void check_bias(const Tensor& bias) const {
    if (bias.type != kFloat || bias.shape != std::vector<int64_t>{rows()}) {
      fail(kInvalidGraph, "B: expected float " + text({rows()}) + ", got " + text(bias.shape));
    }
  }

  void read_group(const KernelInfo* info) {
    if (Status* status = attribute_int(api_, info, "group", &group_)) release_status(api_, status);
    if (group_ != 1 && (group_ != shape_[0] || shape_[1] != 1)) {
      fail(kInvalidGraph, "group: expected 1, or " + std::to_string(shape_[0]) + " for weight [" + std::to_string(shape_[0]) +
                              ",1,kh,kw], got " + std::to_string(group_) + " for weight " + text(shape_));
    }
  }

  // `suffix`: what the operator's name says of the activation; a stock runtime goes by the name's function body.
  void read_activation(const KernelInfo* info, const char* suffix) {
    char name[16] = "";
    size_t size = sizeof(name);
    check(api_, attribute_string(api_, info, "activation", name, &size));
    if (std::strcmp(name, "Relu") == 0) {
      min_ = 0.0f;
    } else if (std::strcmp(name, "Clip") == 0) {
      check(api_, attribute_float(api_, info, "min", &min_));
      check(api_, attribute_float(api_, info, "max", &max_));
    } else if (std::strcmp(name, "LeakyRelu") == 0) {
      check(api_, attribute_float(api_, info, "alpha", &slope_));
      activation_ = TK_LEAKY_RELU;
    } else if (std::strcmp(name, "HardSwish") == 0) {
      activation_ = TK_HARD_SWISH;
    } else if (std::strcmp(name, "Silu") == 0) {
      activation_ = TK_SILU;
    } else if (std::strcmp(name, "None") != 0) {
      fail(kInvalidGraph, std::string("activation: expected None, Relu, Clip, LeakyRelu, HardSwish or Silu, got ") + name);
    }
    if (std::strcmp(*suffix ? suffix : "None", name) != 0)
      fail(kInvalidGraph, std::string("activation: ") + name + " contradicts the operator's name");
    if (!std::isfinite(slope_)) fail(kInvalidGraph, "alpha: expected a finite number, got " + std::to_string(slope_));
    if (!(min_ <= max_)) fail(kInvalidGraph, "min, max: expected min <= max, got " + std::to_string(min_) + " and " + std::to_string(max_));
  }

  void read_execution(const KernelInfo* info) {
    format_ = static_cast<tk_format>(read_name(info, "format", {"csr", "bsr", "bsr1x4"}));
    if (!is_conv_) return;
    if (format_ == TK_BSR_1X4) fail(kInvalidGraph, "format: bsr1x4 is for SparseGemm only; expected csr or bsr");
    x_layout_ = read_name(info, "x_layout", {"planes", "csr", "bsr"});
    y_layout_ = read_name(info, "y_layout", {"planes", "csr", "bsr"});
    if (group_ > 1 && (x_layout_ || y_layout_)) fail(kInvalidGraph, "x_layout, y_layout: expected planes for a depthwise convolution");
    if (!has_ints(api_, info, "tuning")) return;
    tuning_ = ints(api_, info, "tuning", 6);
    for (const int64_t v : tuning_) {
      if (v < 0 || v > std::numeric_limits<int32_t>::max()) fail(kInvalidGraph, "tuning: " + text(tuning_) + " is out of range");
    }
  }

  // Which of the names an attribute holds, the first where it is absent.
  int32_t read_name(const KernelInfo* info, const char* key, std::initializer_list<const char*> names) const {
    size_t size = 0;
    if (Status* status = attribute_string(api_, info, key, nullptr, &size)) {
      release_status(api_, status);
      return 0;
    }
    std::string name(size + 1, '\0'), known;
    check(api_, attribute_string(api_, info, key, name.data(), &size));
    int32_t index = 0;
    for (const char* const each : names) {
      if (std::strcmp(name.c_str(), each) == 0) return index;
      known += (index++ ? ", " : "") + std::string(each);
    }
    fail(kInvalidGraph, std::string(key) + ": expected one of " + known + ", got " + name.c_str());
  }

  // Tuning for images of this size; all zero if there is none.
  tk_tuning tuning(const std::vector<int64_t>& size) const {
    if (tuning_.empty() || tuning_[0] != tk_isa_lanes(isa_) || tuning_[1] != size[0] || tuning_[2] != size[1]) return {};
    return {static_cast<int32_t>(tuning_[3]), static_cast<int32_t>(tuning_[4]), static_cast<int32_t>(tuning_[5])};
  }

  Tensor constant(const KernelInfo* info, size_t index, const char* name) const {
    int is_constant = 0;
    const Value* value = nullptr;
    check(api_, constant_input(api_, info, index, &is_constant, &value));
    if (!is_constant || !value)
      fail(kInvalidGraph, std::string(name) + ": must be an initializer of the model, or a cast of one with graph optimizations on");
    return read(api_, value);
  }

  Tensor input(KernelContext* context, size_t index) const {
    const Value* value = nullptr;
    check(api_, ort::input(api_, context, index, &value));
    return value ? read(api_, value) : Tensor{};
  }

  std::vector<int64_t> output_shape(const Tensor& x) const {
    const size_t rank = is_conv_ ? 4 : 2;
    if (x.shape.size() != rank || x.shape[1] != channels()) {
      fail(kInvalidArgument, "X: expected [N," + std::to_string(channels()) + (is_conv_ ? ",H,W]" : "]") + ", got " + text(x.shape));
    }
    if (!is_conv_) return {x.shape[0], rows()};
    std::vector<int64_t> y = {x.shape[0], rows(), 0, 0};
    for (size_t i = 0; i < 2; ++i) {
      if (x.shape[2 + i] < 0 || x.shape[2 + i] > kMostSize) fail(kInvalidArgument, "X: " + text(x.shape) + " is out of range");
      const int64_t room = x.shape[2 + i] + pads_[i] + pads_[2 + i] - dilations_[i] * (shape_[2 + i] - 1) - 1;
      if (room < 0) fail(kInvalidArgument, "X: " + text(x.shape) + " is smaller than the window of weight " + text(shape_));
      y[2 + i] = room / strides_[i] + 1;
    }
    return y;
  }

  std::shared_ptr<const Buffer> packed_for(KernelContext* context, const Tensor& x) {
    constexpr size_t kKeep = 4;  // image sizes
    const std::vector<int64_t> size(x.shape.begin() + 2, x.shape.end());
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& entry : packed_) {
      if (entry.first == size) return entry.second;
    }
    const Tensor values = input(context, 1), gaps = input(context, 2);
    auto packed = pack(decode(values, gaps, rows(), cols()), size);
    if (packed_.size() == kKeep) packed_.erase(packed_.begin());
    packed_.emplace_back(size, packed);
    return packed;
  }

  std::shared_ptr<const Buffer> pack(const Weight& w, const std::vector<int64_t>& size) const {
    size_t bytes = 0;
    tk_conv2d s{};
    if (is_conv_) {
      s = {channels(), size[0],  size[1],  shape_[0],     shape_[2],     shape_[3], strides_[0], strides_[1], pads_[0],
           pads_[1],   pads_[2], pads_[3], dilations_[0], dilations_[1], group_,    x_layout_,   y_layout_};
    }
    const tk_tuning cut = is_conv_ ? tuning(size) : tk_tuning{};
    tk_status status =
        is_conv_ ? tk_conv2d_packed_bytes(&s, &w.csr, format_, isa_, &cut, &bytes) : tk_gemm_packed_bytes(&w.csr, format_, isa_, &bytes);
    if (status != TK_OK) fail(kFail, tk_status_text(status));
    auto packed = std::make_shared<Buffer>(bytes);
    status = is_conv_ ? tk_conv2d_pack(&s, &w.csr, format_, isa_, &cut, packed->data(), bytes)
                      : tk_gemm_pack(&w.csr, format_, isa_, packed->data(), bytes);
    if (status != TK_OK) fail(kFail, tk_status_text(status));
    return packed;
  }

  const Api* api_;
  const bool is_conv_, has_residual_;
  const int64_t threads_;
  int32_t isa_ = 0;
  int64_t group_ = 1;
  int32_t x_layout_ = TK_PLANES, y_layout_ = TK_PLANES;
  tk_format format_ = TK_CSR;
  std::vector<int64_t> shape_, strides_, pads_, dilations_, tuning_;
  float min_ = -std::numeric_limits<float>::infinity(), max_ = std::numeric_limits<float>::infinity();
  tk_activation activation_ = TK_IDENTITY;
  float slope_ = 0.0f;
  std::mutex mutex_;
  std::vector<std::pair<std::vector<int64_t>, std::shared_ptr<const Buffer>>> packed_;
};

}  // namespace tk::ort

#endif  // TICKETKIT_ORT_NODE_H_
