// libFuzzer target: the C ABI on weights that could come from anywhere. Whatever is not refused is packed in memory of exactly the size asked
// for and run in two cuts; sanitizers watch, and the contract of ticketkit.h is required of every call.
#include <cmath>
#include <cstring>
#include <memory>

#include "../ticketkit.h"
#include "input.h"

namespace {

using tk::fuzz::Input;

// Beyond these nothing is run: an execution takes well below a millisecond.
constexpr int64_t kMostFloats = 1 << 15;  // of a batch of images
constexpr int64_t kMostWork = 1 << 19;    // multiply-adds
constexpr size_t kMostBytes = 1 << 20;    // of a packed layer, and of its workspace
constexpr int64_t kMostRows = 1 << 12;    // of row pointers to be written

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

Memory aligned(size_t bytes) { return Memory(std::aligned_alloc(TK_ALIGNMENT, (bytes + TK_ALIGNMENT - 1) / TK_ALIGNMENT * TK_ALIGNMENT)); }

// A weight, from gap-coded positions or as CSR arrays, and what the library says of it.
struct Weight {
  std::vector<float> values;
  std::vector<int32_t> col_indices;
  std::vector<int64_t> row_ptr;
  tk_csr csr{};
  tk_status status = TK_BAD_ARGUMENT;

  Weight(Input& in, int64_t rows, int64_t cols) {
    const size_t nnz = static_cast<size_t>(in.within(0, static_cast<int64_t>(in.left() / 5)));
    values = in.numbers(nnz);
    col_indices.resize(nnz);
    row_ptr.resize(rows >= 1 && rows <= kMostRows ? static_cast<size_t>(rows) + 1 : 1);
    csr = {rows, cols, static_cast<int64_t>(nnz), values.data(), col_indices.data(), row_ptr.data()};
    if (rows > kMostRows && rows <= INT32_MAX) {  // allowed, and too much to be written
      csr.row_ptr = nullptr;
      return;
    }
    const bool from_gaps = in.flip();
    if (from_gaps) {
      const std::vector<uint16_t> gaps = in.gaps(nnz);
      status = tk_gaps_decode(rows, cols, csr.nnz, gaps.data(), col_indices.data(), row_ptr.data());
      if (status != TK_OK) return;
    } else {
      for (int32_t& column : col_indices) column = static_cast<int32_t>(in.size(in.within(0, 63)));
      for (int64_t& pointer : row_ptr) pointer = in.size(in.within(0, csr.nnz));
      row_ptr.front() = in.size(0);
      if (row_ptr.size() > 1) row_ptr.back() = in.size(csr.nnz);
    }
    status = tk_csr_validate(&csr);
    TK_REQUIRE(!from_gaps || status == TK_OK || status == TK_BAD_VALUES);
    if (status == TK_OK) require_valid();
  }

  void require_valid() const {
    TK_REQUIRE(row_ptr.front() == 0 && row_ptr.back() == csr.nnz);
    for (size_t row = 0; row + 1 < row_ptr.size(); ++row) {
      TK_REQUIRE(row_ptr[row] <= row_ptr[row + 1]);
      for (int64_t i = row_ptr[row]; i < row_ptr[row + 1]; ++i) {
        const size_t at = static_cast<size_t>(i);
        TK_REQUIRE(col_indices[at] >= 0 && col_indices[at] < csr.cols && std::isfinite(values[at]));
        TK_REQUIRE(i == row_ptr[row] || col_indices[at - 1] < col_indices[at]);
      }
    }
  }
};

tk_conv2d geometry(Input& in) {
  tk_conv2d s{};
  s.kernel_h = in.size(in.within(1, 5));
  s.kernel_w = in.size(in.within(1, 5));
  s.in_channels = in.size(in.within(1, 20));
  s.out_channels = in.size(in.within(1, 40));
  s.in_h = in.size(in.within(1, 40));
  s.in_w = in.size(in.within(1, 40));
  s.stride_h = in.size(in.within(1, 3));
  s.stride_w = in.size(in.within(1, 3));
  for (int64_t* const pad : {&s.pad_top, &s.pad_left, &s.pad_bottom, &s.pad_right}) *pad = in.size(in.within(0, 3));
  s.dilation_h = in.size(in.within(1, 3));
  s.dilation_w = in.size(in.within(1, 3));
  const bool depthwise = in.within(0, 3) == 0;
  if (depthwise) s.out_channels = s.in_channels;
  s.groups = in.size(depthwise ? s.in_channels : 1);
  s.x_layout = static_cast<int32_t>(in.size(depthwise ? 0 : in.within(0, 2)));
  s.y_layout = static_cast<int32_t>(in.size(depthwise ? 0 : in.within(0, 2)));
  return s;
}

int64_t output_size(int64_t in, int64_t pads, int64_t kernel, int64_t dilation, int64_t stride) {
  return (in + pads - dilation * (kernel - 1) - 1) / stride + 1;
}

// Runs a packed layer on images of x_floats and y_floats each, whole and in two cuts: to the bit the same.
void run(Input& in, const void* packed, int64_t x_floats, int64_t y_floats, int64_t rows, int64_t work, int64_t most_batch) {
  const int64_t batch = in.within(1, most_batch);
  const size_t workspace_bytes = tk_workspace_bytes(packed);
  if (x_floats > kMostFloats / batch || y_floats > kMostFloats / batch || work > kMostWork / batch || workspace_bytes > kMostBytes) return;
  std::vector<float> x(static_cast<size_t>(batch * x_floats)), y(static_cast<size_t>(batch * y_floats));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 31) - 15.0f;
  const std::vector<float> bias = in.numbers(static_cast<size_t>(rows));
  std::vector<float> residual(y.size(), 0.5f);
  const bool has_residual = in.flip(), in_place = in.flip();
  tk_args args{
      batch,       x.data(), in.flip() ? bias.data() : nullptr, has_residual ? residual.data() : nullptr, y.data(), -INFINITY, INFINITY,
      TK_IDENTITY, 0.0f};
  if (in.flip()) args.min = in.number();
  if (in.flip()) args.max = in.number();
  if (in.flip()) args.activation = static_cast<int32_t>(in.within(-1, 4));
  if (in.flip()) args.slope = in.number();
  const Memory workspace = aligned(workspace_bytes);
  const int64_t parts = tk_parts(packed, batch), cut = in.within(0, parts);
  const tk_status status = tk_run(packed, &args, 0, parts, workspace.get());
  const bool valid = args.min <= args.max && std::isfinite(args.slope) && args.activation >= TK_IDENTITY && args.activation <= TK_SILU;
  TK_REQUIRE(status == (valid ? TK_OK : TK_BAD_ARGUMENT));
  if (status != TK_OK) return;
  std::vector<float> again(y.size());
  if (has_residual && in_place) again = residual;
  args.y = again.data();
  if (has_residual && in_place) args.residual = again.data();
  TK_REQUIRE(tk_run(packed, &args, 0, cut, workspace.get()) == TK_OK);
  TK_REQUIRE(tk_run(packed, &args, cut, parts, workspace.get()) == TK_OK);
  TK_REQUIRE(y.empty() || std::memcmp(y.data(), again.data(), y.size() * sizeof(float)) == 0);
  TK_REQUIRE(tk_run(packed, &args, 0, parts + 1, workspace.get()) == TK_BAD_ARGUMENT);
}

void convolution(Input& in, int32_t isa, tk_format format) {
  const tk_conv2d s = geometry(in);
  const auto usual = [](int64_t v) { return v >= 1 && v <= (1 << 24); };
  int64_t cols = 1;
  if (usual(s.kernel_h) && usual(s.kernel_w) && usual(s.in_channels) && s.kernel_h * s.kernel_w < (1 << 24))
    cols = (s.groups > 1 ? 1 : s.in_channels) * s.kernel_h * s.kernel_w;
  const Weight w(in, in.size(s.out_channels), in.size(cols));
  const tk_tuning tuning = {static_cast<int32_t>(in.size(in.within(0, 20))), static_cast<int32_t>(in.size(in.within(0, 20))),
                            static_cast<int32_t>(in.size(in.within(0, 4)))};
  const tk_tuning* const given = in.flip() ? &tuning : nullptr;
  size_t bytes = 0;
  tk_cut cut;
  const tk_vectors vectors = {4, 32, 20, 20, 6, 1, 4};
  const tk_status status = tk_conv2d_packed_bytes(&s, &w.csr, format, isa, given, &bytes);
  const tk_status of_cut = tk_conv2d_cut(&s, static_cast<int64_t>(w.csr.nnz < 0 ? 0 : w.csr.nnz), format, &vectors, given,
                                         &cut);  // of its own geometry, whatever the weight
  if (of_cut == TK_OK) TK_REQUIRE(cut.tiles >= 1 && cut.blocks >= 1 && cut.filled >= 0 && cut.pieces >= 0);
  if (status == TK_OK) TK_REQUIRE(of_cut == TK_OK || of_cut == TK_TOO_LARGE);  // wider tiles may have too long strips
  if (w.status != TK_OK) TK_REQUIRE(status != TK_OK);
  if (status != TK_OK || bytes > kMostBytes) return;
  const Memory packed = aligned(bytes);
  TK_REQUIRE(tk_conv2d_pack(&s, &w.csr, format, isa, given, packed.get(), bytes - 1) == TK_BAD_BUFFER);
  TK_REQUIRE(tk_conv2d_pack(&s, &w.csr, format, isa, given, packed.get(), bytes) == TK_OK);
  const int64_t out_h = output_size(s.in_h, s.pad_top + s.pad_bottom, s.kernel_h, s.dilation_h, s.stride_h);
  const int64_t out_w = output_size(s.in_w, s.pad_left + s.pad_right, s.kernel_w, s.dilation_w, s.stride_w);
  if (s.in_h * s.in_w > kMostFloats || out_h * out_w > kMostFloats) return;
  const int64_t work = (tk_stored_values(&w.csr, format) + w.csr.rows + s.in_channels * s.kernel_h * s.kernel_w) * out_h * out_w;
  run(in, packed.get(), s.in_channels * s.in_h * s.in_w, s.out_channels * out_h * out_w, w.csr.rows, work, 3);
}

void product(Input& in, int32_t isa, tk_format format) {
  const int64_t rows = in.size(in.within(1, 60)), cols = in.size(in.within(1, 300));
  const Weight w(in, rows, cols);
  size_t bytes = 0;
  tk_cut cut;
  const tk_vectors vectors = {4, 32, 20, 20, 6, 1, 4};
  const tk_status status = tk_gemm_packed_bytes(&w.csr, format, isa, &bytes);
  const tk_status of_cut = tk_gemm_cut(rows, cols, w.csr.nnz, format, &vectors, cols, &cut);
  if (of_cut == TK_OK) TK_REQUIRE(cut.tiles >= 1 && cut.blocks >= 1 && cut.filled >= 0);
  if (w.status != TK_OK) TK_REQUIRE(status != TK_OK);
  if (status != TK_OK || bytes > kMostBytes) return;
  const Memory packed = aligned(bytes);
  TK_REQUIRE(tk_gemm_pack(&w.csr, format, isa, packed.get(), bytes - 1) == TK_BAD_BUFFER);
  TK_REQUIRE(tk_gemm_pack(&w.csr, format, isa, packed.get(), bytes) == TK_OK);
  run(in, packed.get(), cols, rows, rows, tk_stored_values(&w.csr, format) + rows + cols, 80);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  Input in(bytes, size);
  const bool conv = in.flip();
  const int32_t isa = static_cast<int32_t>(in.size(in.within(0, tk_isa_count() - 1)));
  const tk_format format = static_cast<tk_format>(in.size(in.within(0, 2)) & 3);
  if (conv) {
    convolution(in, isa, format);
  } else {
    product(in, isa, format);
  }
  return 0;
}
