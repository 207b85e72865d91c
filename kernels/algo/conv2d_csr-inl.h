// Convolution with CSR weights on NCHW images. Lanes run along flattened output pixels; input channels come in blocks whose strips
// (packed.h) stay in or next to L1 while every output row of the tile passes over them. Included by isa/*.cc after rows-inl.h.

// Strips are filled in ascending order, so each may write over the start of the next; the workspace has a vector to spare behind the last.
// `limit` is the end of x.

// strip[0 … length): output pixels from (row, column) on; see Strip.
static void fill_strip(const tk_conv2d& s, int64_t out_w, const Strip& strip, const float* plane, int64_t row, int64_t column, float* to,
                       const float* limit) {
  for (int64_t left = strip.length; left > 0; ++row, column = 0) {
    const int64_t n = smaller(left, out_w - column), iy = s.stride_h * row + strip.phase - s.pad_top;
    const int64_t begin = larger(strip.inside_begin, column), end = smaller(strip.inside_end, column + n);
    if (iy < 0 || iy >= s.in_h || begin >= end) {
      zero(to, n);
    } else {
      zero(to, begin - column);
      copy_strided(plane + iy * s.in_w + begin * s.stride_w + strip.x_shift, s.stride_w, end - begin, to + (begin - column), limit);
      zero(to + (end - column), column + n - end);
    }
    to += n;
    left -= n;
  }
}

// The same where stride is 1 and out_w = in_w: the strip is the flat plane moved by x_shift, but for the columns that wrapped around.
static void fill_strip_flat(const tk_conv2d& s, const Strip& strip, const float* plane, int64_t first, float* to, const float* limit) {
  const int64_t width = s.in_w, begin = first + (strip.phase - s.pad_top) * width,
                shift = strip.x_shift;  // to[i] = plane[begin + shift + i]
  const int64_t low = larger(0, smaller(-(begin + shift), strip.length));
  const int64_t high = larger(low, smaller(s.in_h * width - (begin + shift), strip.length));
  zero(to, low);
  copy_strided(plane + begin + shift + low, 1, high - low, to + low, limit);
  zero(to + high, strip.length - high);
  const int64_t wrapped = shift < 0 ? smaller(-shift, width) : smaller(shift, width);
  const int64_t at = shift < 0 ? 0 : width - wrapped;  // first wrapped column
  int64_t row = begin % width;
  for (row = -(row < 0 ? row + width : row); row < strip.length; row += width) {
    for (int64_t i = larger(0, row + at); i < smaller(row + at + wrapped, strip.length); ++i) to[i] = 0.0f;
  }
}

static void fill_block(const Packed& p, const float* image, int64_t channel_begin, int64_t channel_end, int64_t first_pixel, float* to,
                       const float* limit) {
  const tk_conv2d& s = p.shape;
  const Strip* const strips = p.strips();
  const bool flat = s.stride_h == 1 && s.stride_w == 1 && p.out_w == s.in_w;
  const int64_t row = first_pixel / p.out_w, column = first_pixel % p.out_w;
  for (int64_t c = channel_begin; c < channel_end; ++c, to += p.channel_floats) {
    const float* const plane = image + c * s.in_h * s.in_w;
    for (int32_t i = 0; i < p.strip_count; ++i) {
      const Strip& strip = strips[i];
      if (flat) {
        fill_strip_flat(s, strip, plane, first_pixel + strip.row_min * p.out_w, to + strip.offset, limit);
      } else {
        fill_strip(s, p.out_w, strip, plane, row + strip.row_min, column, to + strip.offset, limit);
      }
    }
  }
}

static void conv2d_csr_f32(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  const tk_conv2d& s = p.shape;
  const int64_t pixels = p.out_h * p.out_w, in_pixels = s.in_h * s.in_w;
  const int64_t tile_pixels = int64_t{p.tile_vectors} * Vec::kLanes;
  const float* const limit = a.x + a.batch * s.in_channels * in_pixels;
  const int64_t parts_per_image = p.tiles * p.row_groups;
  for (int64_t part = part_begin; part < part_end;) {
    const int64_t n = part / parts_per_image, tile = part % parts_per_image / p.row_groups, group = part % p.row_groups;
    const int64_t groups = smaller(p.row_groups - group, part_end - part);
    part += groups;

    const int64_t first_pixel = tile * tile_pixels, count = smaller(tile_pixels, pixels - first_pixel);
    const int vectors = static_cast<int>((count + Vec::kLanes - 1) / Vec::kLanes);
    const float* const image = a.x + n * s.in_channels * in_pixels;
    const int64_t y_at = n * p.rows * pixels + first_pixel;
    Tile t{};
    t.entries = p.entries();
    t.x = workspace;
    t.y = a.y + y_at;
    t.residual = a.residual ? a.residual + y_at : nullptr;
    t.bias = a.bias;
    t.y_stride = pixels;
    t.row_begin = group * kGroupRows;
    t.row_end = smaller(p.rows, (group + groups) * kGroupRows);
    t.last_lanes = static_cast<int32_t>(count - (vectors - 1) * Vec::kLanes);
    t.min = a.min;
    t.max = a.max;
    for (int64_t block = 0; block < p.blocks; ++block) {
      const int64_t begin = p.block_begin(block), end = smaller(begin + p.block_channels, s.in_channels);
      fill_block(p, image, begin, end, first_pixel, workspace, limit);
      t.row_ptr = p.row_ptr(block);
      t.first = block == 0;
      t.last = block == p.blocks - 1;
      rows(vectors, t);
    }
  }
}
