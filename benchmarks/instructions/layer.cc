// Runs one pointwise convolution, 90 % zeros or as many as asked for, once through libticketkit and once through XNNPACK's sparse operator,
// each call between two marks for counter.c. Prints nnz, the stored values of ticketkit's format and the largest difference of the outputs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "ticketkit.h"
#ifdef WITH_XNNPACK
#include "xnnpack.h"
#endif

namespace {

__attribute__((noinline)) void count_begin() { asm volatile("hint #97" ::: "memory"); }
__attribute__((noinline)) void count_end() { asm volatile("hint #98" ::: "memory"); }

[[noreturn]] void fail(const char* what, int status) {
  std::fprintf(stderr, "%s: status %d\n", what, status);
  std::exit(1);
}

struct Problem {
  int64_t in_channels, height, width, out_channels, block;  // rows that share their zeros
  std::vector<float> weight, x, bias;                       // [out, in], [in, height * width], [out]
};

Problem problem(char** argv) {
  Problem p{std::atoll(argv[0]), std::atoll(argv[1]), std::atoll(argv[2]), std::atoll(argv[3]), std::atoll(argv[5]), {}, {}, {}};
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(0.5f, 1.0f);
  const auto sign = [&](float v) { return random() % 2 ? v : -v; };
  const int64_t blocks = p.out_channels / p.block * p.in_channels;
  std::vector<char> kept(static_cast<size_t>(blocks));
  std::fill_n(kept.begin(), std::llround(static_cast<double>(blocks) * (1 - std::atof(argv[4]) / 100)), 1);
  std::shuffle(kept.begin(), kept.end(), random);
  p.weight.resize(static_cast<size_t>(p.out_channels * p.in_channels));
  for (size_t i = 0; i < p.weight.size(); ++i) {
    const size_t row = i / static_cast<size_t>(p.in_channels), column = i % static_cast<size_t>(p.in_channels);
    if (kept[row / static_cast<size_t>(p.block) * static_cast<size_t>(p.in_channels) + column]) p.weight[i] = sign(uniform(random));
  }
  p.x.resize(static_cast<size_t>(p.in_channels * p.height * p.width));
  for (float& v : p.x) v = sign(uniform(random));
  p.bias.resize(static_cast<size_t>(p.out_channels));
  for (float& v : p.bias) v = sign(uniform(random));
  return p;
}

void* aligned(size_t bytes) { return std::aligned_alloc(TK_ALIGNMENT, (bytes + TK_ALIGNMENT - 1) / TK_ALIGNMENT * TK_ALIGNMENT); }

std::vector<float> by_ticketkit(const Problem& p, tk_format format) {
  std::vector<float> values;
  std::vector<int32_t> columns;
  std::vector<int64_t> rows = {0};
  for (size_t i = 0; i < p.weight.size(); ++i) {
    if (p.weight[i] != 0) {
      values.push_back(p.weight[i]);
      columns.push_back(static_cast<int32_t>(static_cast<int64_t>(i) % p.in_channels));
    }
    if (static_cast<int64_t>(i + 1) % p.in_channels == 0) rows.push_back(static_cast<int64_t>(values.size()));
  }
  const tk_csr weight = {p.out_channels, p.in_channels, static_cast<int64_t>(values.size()), values.data(), columns.data(), rows.data()};
  tk_conv2d shape{};
  shape.in_channels = p.in_channels;
  shape.in_h = p.height;
  shape.in_w = p.width;
  shape.out_channels = p.out_channels;
  shape.kernel_h = shape.kernel_w = shape.stride_h = shape.stride_w = shape.dilation_h = shape.dilation_w = shape.groups = 1;
  int32_t isa = 0;
  size_t bytes = 0;
  tk_status status = tk_isa_active(&isa);
  if (status == TK_OK) status = tk_conv2d_packed_bytes(&shape, &weight, format, isa, nullptr, &bytes);
  if (status != TK_OK) fail(tk_status_text(status), status);
  void* const packed = aligned(bytes);
  status = tk_conv2d_pack(&shape, &weight, format, isa, nullptr, packed, bytes);
  if (status != TK_OK) fail(tk_status_text(status), status);
  void* const workspace = aligned(tk_workspace_bytes(packed));
  std::vector<float> y(static_cast<size_t>(p.out_channels * p.height * p.width));
  const tk_args args = {1, p.x.data(), p.bias.data(), nullptr, y.data(), 0, INFINITY, TK_IDENTITY, 0};
  count_begin();
  status = tk_run(packed, &args, 0, tk_parts(packed, 1), workspace);
  count_end();
  if (status != TK_OK) fail(tk_status_text(status), status);
  std::printf("ticketkit %s %lld %lld\n", tk_isa_name(isa), static_cast<long long>(weight.nnz),
              static_cast<long long>(tk_stored_values(&weight, format)));
  std::free(packed);
  std::free(workspace);
  return y;
}

#ifdef WITH_XNNPACK
std::vector<float> by_xnnpack(const Problem& p) {
  xnn_status status = xnn_initialize(nullptr);
  if (status != xnn_status_success) fail("xnn_initialize", status);
  xnn_operator_t op = nullptr;
  const size_t in = static_cast<size_t>(p.in_channels), out = static_cast<size_t>(p.out_channels);
  status = xnn_create_convolution2d_nchw_f32(0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, in, out, in, out, p.weight.data(), p.bias.data(), 0, INFINITY,
                                             0, &op);
  if (status != xnn_status_success) fail("xnn_create_convolution2d_nchw_f32", status);
  std::vector<float> y(out * static_cast<size_t>(p.height * p.width));
  count_begin();
  status =
      xnn_setup_convolution2d_nchw_f32(op, 1, static_cast<size_t>(p.height), static_cast<size_t>(p.width), p.x.data(), y.data(), nullptr);
  count_end();
  if (status != xnn_status_success) fail("xnn_setup_convolution2d_nchw_f32", status);
  count_begin();
  status = xnn_run_operator(op, nullptr);
  count_end();
  if (status != xnn_status_success) fail("xnn_run_operator", status);
  std::puts("xnnpack");
  return y;
}
#endif

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8 || std::atoll(argv[6]) < 1) {
    std::fputs("usage: layer IN_CHANNELS HEIGHT WIDTH OUT_CHANNELS PERCENT_ZEROS BLOCK_ROWS csr|bsr\n", stderr);
    return 1;
  }
  const Problem p = problem(argv + 1);
  const std::vector<float> ours = by_ticketkit(p, std::strcmp(argv[7], "bsr") == 0 ? TK_BSR : TK_CSR);
#ifdef WITH_XNNPACK
  const std::vector<float> theirs = by_xnnpack(p);
  float worst = 0;
  for (size_t i = 0; i < ours.size(); ++i) worst = std::fmax(worst, std::isnan(ours[i]) ? INFINITY : std::fabs(ours[i] - theirs[i]));
  std::printf("difference %g\n", worst);
#endif
  return 0;
}
