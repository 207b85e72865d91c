// Replays the cases of replay.py through the C ABI on every usable ISA, in every packed form, convolutions in every layout. Prints what it
// checked; exit code 1 on the first wrong result, and where an ISA's tolerance lets too many wrong weights pass.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "ticketkit.h"

namespace {

std::vector<char> file;
size_t at = 0;

template <class T>
const T* take(int64_t count) {
  const T* p = reinterpret_cast<const T*>(file.data() + at);
  at += (static_cast<size_t>(count) * sizeof(T) + 7) / 8 * 8;
  if (at > file.size()) {
    std::puts("the case file is truncated");
    std::exit(1);
  }
  return p;
}

// No slack behind the last byte asked for (but rounding up to the alignment), so that a sanitizer sees every overrun.
void* aligned(size_t bytes) { return std::aligned_alloc(TK_ALIGNMENT, (bytes + TK_ALIGNMENT - 1) / TK_ALIGNMENT * TK_ALIGNMENT); }

// Images of `channels` planes of `pixels`, with their floats in tiles of so many pixels (0: one tile); or back.
std::vector<float> reordered(const float* images, int64_t batch, int64_t channels, int64_t pixels, int64_t tile, bool back) {
  if (tile == 0) tile = pixels;
  std::vector<float> to(static_cast<size_t>(batch * channels * pixels));
  for (int64_t plane = 0; plane < batch * channels; ++plane) {
    const int64_t c = plane % channels, image = plane / channels * channels * pixels;
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t first = p - p % tile, length = tile < pixels - first ? tile : pixels - first;
      const int64_t tiled = image + first * channels + c * length + p % tile, planes = plane * pixels + p;
      to[static_cast<size_t>(back ? planes : tiled)] = images[back ? tiled : planes];
    }
  }
  return to;
}

struct Case {
  const int64_t* head = take<int64_t>(20);
  const float* limits = take<float>(6);
  bool conv = head[0] != 1, depthwise = head[0] == 2;
  int64_t rows = conv ? head[5] : head[2], nnz = head[17], y_count = head[19];
  const float* x = take<float>(head[18]);
  const float* values = take<float>(nnz);
  const float* bias = take<float>(rows);
  const float* residual = take<float>(y_count);
  const float* expected = take<float>(y_count);
  const int32_t* col_indices = take<int32_t>(nnz);
  const int64_t* row_ptr = take<int64_t>(rows + 1);

  // Of the convolutions of ISAs with half precision, and of all others. Depthwise ones of a single channel are as the former.
  float tolerance(int32_t isa) const {
    return conv && head[16] == 1 && std::strcmp(tk_isa_name(isa), "neon_fp16") == 0 ? limits[5] : limits[0];
  }

  // Largest difference from the oracle, of these weights; infinite where a call fails.
  float run(int32_t isa, tk_format format, tk_layout layout, const float* values) const {
    tk_conv2d shape{};
    int64_t cols = head[3];
    if (conv) {
      int64_t* const fields = &shape.in_channels;
      for (int i = 0; i < 15; ++i) fields[i] = head[2 + i];
      shape.x_layout = shape.y_layout = layout;
      cols = (depthwise ? 1 : shape.in_channels) * shape.kernel_h * shape.kernel_w;
    }
    const tk_csr weight = {rows, cols, nnz, values, col_indices, row_ptr};
    size_t bytes = 0;
    tk_status status =
        conv ? tk_conv2d_packed_bytes(&shape, &weight, format, isa, nullptr, &bytes) : tk_gemm_packed_bytes(&weight, format, isa, &bytes);
    if (status != TK_OK) return INFINITY;
    void* const packed = aligned(bytes);
    status =
        conv ? tk_conv2d_pack(&shape, &weight, format, isa, nullptr, packed, bytes) : tk_gemm_pack(&weight, format, isa, packed, bytes);
    if (status != TK_OK) return INFINITY;
    void* const workspace = aligned(tk_workspace_bytes(packed));
    std::vector<float> y(static_cast<size_t>(y_count), NAN), x_tiles, z_tiles;
    tk_args args = {head[1], x, bias, residual, y.data(), limits[1], limits[2], static_cast<int32_t>(limits[3]), limits[4]};
    const int64_t pixels = shape.in_h * shape.in_w, y_pixels = y_count / (head[1] * rows);
    const int64_t x_tile = tk_tile_pixels(layout, pixels, isa), y_tile = tk_tile_pixels(layout, y_pixels, isa);
    if (layout != TK_PLANES) {
      x_tiles = reordered(x, head[1], shape.in_channels, pixels, x_tile, false);
      z_tiles = reordered(residual, head[1], rows, y_pixels, y_tile, false);
      args.x = x_tiles.data();
      args.residual = z_tiles.data();
    }
    const int64_t parts = tk_parts(packed, head[1]);
    status = tk_run(packed, &args, 0, parts / 2, workspace);
    if (status == TK_OK) status = tk_run(packed, &args, parts / 2, parts, workspace);
    if (layout != TK_PLANES) y = reordered(y.data(), head[1], rows, y_pixels, y_tile, true);
    float worst = status == TK_OK ? 0.0f : INFINITY;
    for (int64_t i = 0; i < y_count; ++i) {
      const float difference = std::fabs(y[static_cast<size_t>(i)] - expected[i]);
      if (!(difference <= worst)) worst = std::isnan(difference) ? INFINITY : difference;
    }
    std::free(packed);
    std::free(workspace);
    return worst;
  }
};

// The negative control: cases whose largest weight has the wrong sign, and those of them that are found out. In a case it may be weight of
// padding alone, or its outputs clipped.
struct Control {
  int tried = 0, found = 0;

  void add(const Case& c, int32_t isa) {
    std::vector<float> wrong(c.values, c.values + c.nnz);
    size_t largest = 0;
    for (size_t i = 0; i < wrong.size(); ++i) largest = std::fabs(wrong[i]) > std::fabs(wrong[largest]) ? i : largest;
    if (wrong.empty()) return;
    wrong[largest] = -wrong[largest];
    ++tried;
    found += !(c.run(isa, TK_CSR, TK_PLANES, wrong.data()) <= c.tolerance(isa));
  }
  bool passed() const { return tried > 0 && 5 * found >= 4 * tried; }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::puts("usage: replay CASES");
    return 1;
  }
  std::ifstream in(argv[1], std::ios::binary);
  file.assign(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
  int cases = 0, usable = 0;
  std::vector<Control> controls;
  for (; at < file.size(); ++cases) {
    const Case c;
    usable = 0;
    for (int32_t isa = 0; isa < tk_isa_count(); ++isa) {
      if (!tk_isa_usable(isa)) continue;
      ++usable;
      controls.resize(static_cast<size_t>(tk_isa_count()));
      controls[static_cast<size_t>(isa)].add(c, isa);
      for (const tk_format format : {TK_CSR, TK_BSR, TK_BSR_1X4}) {
        if (format == TK_BSR_1X4 ? c.conv : format == TK_BSR && c.depthwise) continue;
        for (const tk_layout layout : {TK_PLANES, TK_CSR_TILES, TK_BSR_TILES}) {
          if (layout != TK_PLANES && (!c.conv || c.depthwise)) continue;
          const float worst = c.run(isa, format, layout, c.values);
          if (!(worst <= c.tolerance(isa))) {
            std::printf("case %d on %s, format %d, layout %d: difference %g, tolerance %g\n", cases, tk_isa_name(isa), format, layout,
                        worst, c.tolerance(isa));
            return 1;
          }
        }
      }
    }
  }
  for (int32_t isa = 0; isa < static_cast<int32_t>(controls.size()); ++isa) {
    const Control& control = controls[static_cast<size_t>(isa)];
    if (!tk_isa_usable(isa)) continue;
    std::printf("%s: %d of %d wrong weights found\n", tk_isa_name(isa), control.found, control.tried);
    if (!control.passed()) return 1;
  }
  int32_t active = 0;
  tk_isa_active(&active);
  std::printf("%d cases agree on %d instruction sets, the fastest %s\n", cases, usable, tk_isa_name(active));
  return cases > 0 && usable > 0 ? 0 : 1;
}
