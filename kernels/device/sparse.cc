// The engine `sparse`: the kernels of this library, in the format and layouts that the exported model has.
#include <cstring>
#include <stdexcept>

#include "job.h"

namespace tk::device {
namespace {

void check(tk_status status) {
  if (status != TK_OK) throw std::runtime_error(tk_status_text(status));
}

// An image [channels, pixels] between planes and tiles of `tile` pixels (tk_layout), one way or the other.
void relay(float* planes, float* tiles, int64_t channels, int64_t pixels, int64_t tile, bool to_tiles) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t start = p - p % tile, length = pixels - start < tile ? pixels - start : tile;
      float &plane = planes[c * pixels + p], &tiled = tiles[start * channels + c * length + p % tile];
      (to_tiles ? tiled : plane) = to_tiles ? plane : tiled;
    }
  }
}

// Copies a batch of images from planes to a layout or back.
void relay_all(const float* from, float* to, int64_t batch, int64_t channels, int64_t pixels, int64_t layout, int32_t isa, bool to_tiles) {
  const int64_t tile = layout == TK_PLANES ? 0 : tk_tile_pixels(static_cast<tk_layout>(layout), pixels, isa), image = channels * pixels;
  for (int64_t n = 0; n < batch; ++n) {
    float* const source = const_cast<float*>(from) + n * image;
    if (tile < 1) {
      for (int64_t i = 0; i < image; ++i) to[n * image + i] = source[i];
    } else {
      relay(to_tiles ? source : to + n * image, to_tiles ? to + n * image : source, channels, pixels, tile, to_tiles);
    }
  }
}

struct Packed {
  Aligned<uint8_t> layer, workspace;
  Aligned<float> x, residual, y;
  tk_args args{};
};

}  // namespace

Engine sparse_engine(const Job& job, int32_t isa) {
  const BundleLayer& l = job.layer;
  const tk_csr csr = l.csr();
  const tk_tuning tuning = l.lanes == tk_isa_lanes(isa) ? l.tuning : tk_tuning{};
  size_t bytes = 0;
  check(l.product ? tk_gemm_packed_bytes(&csr, l.format, isa, &bytes)
                  : tk_conv2d_packed_bytes(&l.shape, &csr, l.format, isa, &tuning, &bytes));
  const auto p = std::make_shared<Packed>();
  p->layer = Aligned<uint8_t>(bytes);
  check(l.product ? tk_gemm_pack(&csr, l.format, isa, p->layer.data(), bytes)
                  : tk_conv2d_pack(&l.shape, &csr, l.format, isa, &tuning, p->layer.data(), bytes));
  p->workspace = Aligned<uint8_t>(tk_workspace_bytes(p->layer.data()));
  p->x = Aligned<float>(job.x.size());
  p->residual = Aligned<float>(job.residual.size());
  p->y = Aligned<float>(static_cast<size_t>(l.y_count()));
  const int64_t in = l.shape.in_h * l.shape.in_w, out = l.out_h * l.out_w;
  relay_all(job.x.data(), p->x.data(), l.batch, l.shape.in_channels, in, l.shape.x_layout, isa, true);
  if (l.residual) relay_all(job.residual.data(), p->residual.data(), l.batch, l.rows(), out, l.shape.y_layout, isa, true);
  p->args = {l.batch, p->x.data(),  l.bias.data(), l.residual ? p->residual.data() : nullptr, p->y.data(), l.min,
             l.max,   l.activation, l.slope};
  const char* const formats[] = {"csr", "bsr", "bsr1x4"};
  Engine e;
  e.format = formats[l.format];
  e.half = std::strcmp(tk_isa_name(isa), "neon_fp16") == 0 && !l.product && l.shape.groups == 1;
  e.run = [p] { check(tk_run(p->layer.data(), &p->args, 0, tk_parts(p->layer.data(), p->args.batch), p->workspace.data())); };
  e.y = [p, &l, out, isa] {
    std::vector<float> planes(p->y.size());
    relay_all(p->y.data(), planes.data(), l.batch, l.rows(), out, l.shape.y_layout, isa, false);
    return planes;
  };
  return e;
}

}  // namespace tk::device
