// How a layer is cut up: the header of its packed form, all but the places of the arrays. Internal.
#ifndef TICKETKIT_PLAN_H_
#define TICKETKIT_PLAN_H_

#include "packed.h"

namespace tk {

// Tap i of one axis of a window reads input pixel stride * o + i * dilation - pad of output pixel o: phase (i * dilation) % stride, shifted
// by (i * dilation) / stride output pixels. The phases repeat with period stride / gcd(dilation, stride), so taps i and i + period can
// share strips: longer ones, by the pixels between them. Where that is more than a strip for each tap (long rows, wide dilation), every
// tap has its own. `tile` and `pitch` are floats of a tile and from output pixel to output pixel.
struct Phases {
  Phases(int64_t kernel, int64_t stride, int64_t dilation, int64_t tile, int64_t pitch);
  int64_t phase(int64_t k) const { return k * dilation % stride; }
  int64_t shift(int64_t i) const { return i * dilation / stride; }
  int64_t shift_in_strip(int64_t i) const { return shift(i) - shift(i % period); }
  int64_t reach(int64_t k) const { return shift(k + (taps - 1 - k) / period * period) - shift(k); }  // of the last tap that shares with k
  int64_t longest_reach() const;

  int64_t taps, stride, dilation, period, count;
};

Phases row_phases(const Packed& p);

// With tile_w 0 every column of a window has strips of its own, so that loads stay aligned.
Phases column_phases(const Packed& p);

// Places the strips of one channel behind each other, kernel columns outside, row phases inside; writes them where `strips` is not null.
tk_status plan_strips(Packed* p, Strip* strips);

// Pixels of a tile in memory; 0 for planes.
int64_t tile_pixels(tk_layout layout, int64_t pixels, const tk_vectors& v);

// Fill the header, all but the ISA. Sizes depend on shape, vectors, tuning and the number of `stored` values, of a gemm on that of non-zeros;
// of the weight nothing but its three numbers is read.
tk_status plan_conv2d(const tk_conv2d& shape, const tk_csr& weight, tk_format format, const tk_vectors& v, const tk_tuning* tuning,
                      int64_t stored, Packed* p);
tk_status plan_gemm(const tk_csr& weight, tk_format format, const tk_vectors& v, Packed* p);

}  // namespace tk

#endif  // TICKETKIT_PLAN_H_
