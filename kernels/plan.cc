#include "plan.h"

#include <initializer_list>
#include <numeric>

namespace tk {
namespace {

constexpr int64_t kMaxDim = int64_t{1} << 24;      // of images, windows, strides, paddings: keeps every product in 64 bits
constexpr int64_t kBlockBytes = 32 * 1024;         // strips of one block that a tile reads: about L1 (kernels/README.md)
constexpr int64_t kWideBlockBytes = 96 * 1024;     // the same of blocks of a pointwise layer
constexpr int64_t kGroupBytes = 96 * 1024;         // strips of one block filled at once: a part of L2
constexpr int64_t kAccumulatorBytes = 192 * 1024;  // accumulators that wait between blocks: another part of L2
constexpr int64_t kDepthwiseBytes = 24 * 1024;     // strips of one channel's tile: most of L1
constexpr int64_t kGemmTile = 64;                  // rows of batch of a gemm's widest tile
constexpr int64_t kFewUses = 16;                   // vectors of a channel's tile that are read as seldom are not worth a copy in L1
constexpr int64_t kMaxStrips = 1 << 16;

bool is_depthwise(const tk_conv2d& s) { return s.groups > 1; }

// Vectors of the widest tile that a format's loop of a convolution takes, and of a good one.
int64_t most_vectors(int64_t unit_rows, const tk_vectors& v) { return unit_rows == 1 ? v.tile : v.block_tile; }
int64_t good_vectors(int64_t unit_rows, const tk_vectors& v) { return unit_rows == 1 ? v.good_tile : v.block_tile; }

// Vectors of a tile of so many pixels, shared out evenly.
int64_t even_vectors(int64_t pixels, int64_t unit_rows, const tk_vectors& v) {
  const int64_t vectors = ceil_div(pixels, v.lanes);
  return ceil_div(vectors, ceil_div(vectors, good_vectors(unit_rows, v)));
}

tk_status check_shape(const tk_conv2d& s, const tk_csr& w) {
  const int64_t at_least_one[] = {s.in_channels, s.in_h,     s.in_w,     s.out_channels, s.kernel_h,
                                  s.kernel_w,    s.stride_h, s.stride_w, s.dilation_h,   s.dilation_w};
  for (const int64_t x : at_least_one) {
    if (!within(x, 1, kMaxDim)) return TK_BAD_SHAPE;
  }
  const int64_t pads[] = {s.pad_top, s.pad_left, s.pad_bottom, s.pad_right};
  for (const int64_t x : pads) {
    if (!within(x, 0, kMaxDim)) return TK_BAD_SHAPE;
  }
  if (s.dilation_h * (s.kernel_h - 1) + 1 > s.in_h + s.pad_top + s.pad_bottom) return TK_BAD_SHAPE;
  if (s.dilation_w * (s.kernel_w - 1) + 1 > s.in_w + s.pad_left + s.pad_right) return TK_BAD_SHAPE;
  if (s.groups != 1 && (s.groups != s.in_channels || s.groups != s.out_channels)) return TK_BAD_SHAPE;
  const int64_t taps = s.kernel_h * s.kernel_w;
  if (w.rows != s.out_channels || w.cols % taps != 0 || w.cols / taps != s.in_channels / s.groups) return TK_BAD_SHAPE;
  return TK_OK;
}

// A header with what every kernel's has.
Packed header(Kernel kernel, tk_format format, const tk_vectors& v, const tk_csr& w) {
  Packed p{};
  p.magic = kMagic;
  p.kernel = kernel;
  p.lanes = v.lanes;
  p.rows = w.rows;
  p.cols = w.cols;
  p.unit_rows = unit_rows(format);
  p.unit_columns = unit_columns(format);
  p.value_bytes = sizeof(float);
  p.group_tiles = 1;
  p.row_groups = ceil_div(w.rows, kGroupRows);
  return p;
}

}  // namespace

int64_t tile_pixels(tk_layout layout, int64_t pixels, const tk_vectors& v) {
  if (layout == TK_PLANES) return 0;
  const int64_t tile = even_vectors(pixels, layout == TK_CSR_TILES ? 1 : kBlockRows, v) * v.lanes;
  return tile > pixels ? 0 : tile;  // a single tile, shorter: planes
}

Phases::Phases(int64_t kernel, int64_t stride_, int64_t dilation_, int64_t tile, int64_t pitch)
    : taps(kernel), stride(stride_), dilation(dilation_), period(stride / std::gcd(dilation, stride)) {
  count = smaller(taps, period);
  int64_t shared = 0;
  for (int64_t k = 0; k < count; ++k) shared += tile + reach(k) * pitch;
  if (shared > taps * tile) count = period = taps;
}

int64_t Phases::longest_reach() const {
  int64_t longest = 0;
  for (int64_t k = 0; k < count; ++k) longest = larger(longest, reach(k));
  return longest;
}

Phases row_phases(const Packed& p) {
  const tk_conv2d& s = p.shape;
  return Phases(s.kernel_h, s.stride_h, s.dilation_h, p.tile_floats(), p.pitch);
}

Phases column_phases(const Packed& p) {
  const tk_conv2d& s = p.shape;
  return Phases(s.kernel_w, s.stride_w, s.dilation_w, p.tile_w, 1);
}

tk_status plan_strips(Packed* p, Strip* strips) {
  const tk_conv2d& s = p->shape;
  const Phases rows = row_phases(*p), columns = column_phases(*p);
  if (rows.count > kMaxStrips / columns.count) return TK_TOO_LARGE;
  p->strip_count = i32(rows.count * columns.count);
  int64_t at = 0;
  for (int64_t i = 0; i < p->strip_count; ++i) {
    const int64_t column = i / rows.count, k = i % rows.count;
    const int64_t end_of_row = is_depthwise(s) ? 0 : columns.reach(column);  // where a tile ends within one
    const int64_t halo = round_up(rows.reach(k) * p->pitch + end_of_row, p->lanes), out_w = p->out_w + columns.reach(column);
    const int64_t length = p->group_tiles * p->tile_floats() + halo;
    if (length > kMaxBlockFloats - at) return TK_TOO_LARGE;
    if (strips) {
      const int64_t shift = column * s.dilation_w - s.pad_left;  // stride_w * ow + shift must be in [0, in_w)
      const int64_t begin = clamp(shift >= 0 ? 0 : ceil_div(-shift, s.stride_w), 0, out_w);
      const int64_t end = clamp(shift >= s.in_w ? 0 : ceil_div(s.in_w - shift, s.stride_w), begin, out_w);
      strips[i] = {i32(shift), i32(rows.phase(k)), i32(rows.shift(k)), i32(halo), i32(at), i32(begin), i32(end)};
    }
    at += length;
  }
  // Of a group's strips one tile reads a window: an odd number of cache lines from channel to channel spreads the windows over L1's sets.
  p->channel_floats = p->group_tiles > 1 ? round_up(at, 16) | 16 : at;
  return TK_OK;
}

namespace {

// Lanes may see rows of output as longer than they are, if that lines up the loads of vertical taps. The cost of a pitch: its vectors, more
// where loads cross cache lines, and where strips cannot be filled by whole vectors.
int64_t choose_pitch(const tk_conv2d& s, const Packed& p) {
  const double crossing = p.lanes * 4.0 / 64;  // share of misaligned loads that cross a line
  double least = 0;
  int64_t best = p.out_w;
  for (const int64_t pitch : {p.out_w, round_up(p.out_w, 8), round_up(p.out_w, 16)}) {
    int64_t misaligned = 0;
    for (int64_t i = 0; i < s.kernel_h; ++i) misaligned += i * s.dilation_h / s.stride_h * pitch % p.lanes != 0;
    const bool whole_vectors = pitch % p.lanes == 0 || (s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1);
    const double taps = 1 + crossing * static_cast<double>(misaligned) / static_cast<double>(s.kernel_h) + (whole_vectors ? 0 : 0.15);
    const double cost = static_cast<double>(ceil_div(p.out_h * pitch, p.lanes)) * taps;
    if (least == 0 || cost < 0.97 * least) {
      least = cost;
      best = pitch;
    }
  }
  return best;
}

// Strips that the columns of a window share are fewer to fill and to hold in L1, but the loads from them are not aligned: worth it for
// blocks, which use a vector for four rows, and for single rows where a stride leaves few taps to a strip. Rows get longer by the reach.
void share_columns(Packed* p) {
  const double longer = p->unit_rows > 1 ? 1.2 : p->shape.stride_w > 1 ? 1 : 0;
  Packed shared = *p;
  shared.tile_w = p->out_w;
  shared.pitch = larger(p->pitch, round_up(p->out_w + column_phases(shared).longest_reach(), p->lanes));
  if (p->shape.kernel_w > 1 && static_cast<double>(shared.pitch) <= longer * static_cast<double>(p->pitch)) *p = shared;
}

// Cuts the pixels into tiles of whole vectors: of so many, or as many as are good; of those of x where they can be read in place.
void cut_tiles(int64_t tile_vectors, const tk_vectors& v, Packed* p) {
  const int64_t pixels = p->out_h * p->pitch, in_place = p->pointwise() ? p->x_tile / p->lanes : 0;
  if (in_place > 0 && in_place <= most_vectors(p->unit_rows, v)) tile_vectors = in_place;
  p->tile_vectors = i32(tile_vectors ? tile_vectors : even_vectors(pixels, p->unit_rows, v));
  p->tiles = ceil_div(ceil_div(pixels, p->lanes), p->tile_vectors);
}

// Cuts the channels into blocks, shared out evenly, and joins tiles into groups.
tk_status cut_blocks(const tk_tuning& tuning, Packed* p) {
  tk_status status = plan_strips(p, nullptr);
  if (status != TK_OK) return status;
  const int64_t channels = p->shape.in_channels;
  int64_t block = tuning.block_channels;
  if (block == 0) {
    // A vector serves four rows: L2 is near enough. Not so for halves: the fewer a sum has, the better.
    const bool wide = p->unit_rows > 1 && p->strip_count == 1 && p->value_bytes == 4;
    block = clamp((wide ? kWideBlockBytes : kBlockBytes) / p->value_bytes / p->channel_floats, 1, channels);
    block = ceil_div(channels, ceil_div(channels, block));
  }
  p->block_channels = clamp(block, 1, channels < kMaxBlockFloats / p->channel_floats ? channels : kMaxBlockFloats / p->channel_floats);
  p->blocks = ceil_div(channels, p->block_channels);

  const int64_t most = p->in_place() ? 1 : tuning.group_tiles ? tuning.group_tiles : p->tiles;
  Packed wider = *p;
  while (wider.group_tiles < most && wider.group_tiles < p->tiles) {
    ++wider.group_tiles;
    status = plan_strips(&wider, nullptr);
    const int64_t strips = wider.block_channels * wider.channel_floats;
    if (status != TK_OK || strips > kMaxBlockFloats) break;
    const int64_t accumulators = p->blocks > 1 ? wider.group_tiles * p->rows * p->tile_floats() : 0;
    if (!tuning.group_tiles && (4 * strips > kGroupBytes || 4 * accumulators > kAccumulatorBytes)) break;
    *p = wider;
  }
  return TK_OK;
}

// Cuts the pixels of one channel into tiles of whole rows whose strips stay in L1; of parts of rows where a row would leave no offsets.
tk_status plan_depthwise(Packed* p) {
  const tk_conv2d& s = p->shape;
  if (s.in_h * s.in_w > INT32_MAX / 2 || p->out_h * p->out_w > INT32_MAX / 2) return TK_TOO_LARGE;
  p->blocks = p->block_channels = 1;
  p->row_groups = p->rows;
  p->tile_w = p->out_w;
  int64_t tile_h = p->out_h;
  for (;;) {
    p->pitch = round_up(p->tile_w + column_phases(*p).longest_reach(), p->lanes);
    tk_status status = TK_TOO_LARGE;
    if (tile_h * p->pitch <= kMaxBlockFloats) {
      p->tile_vectors = i32(tile_h * p->pitch / p->lanes);
      status = plan_strips(p, nullptr);
    }
    if (status == TK_OK && (4 * p->channel_floats <= kDepthwiseBytes || tile_h == 1)) break;
    if (tile_h > 1) {  // the next lower height of even tiles
      int64_t tiles = ceil_div(p->out_h, tile_h);
      while (ceil_div(p->out_h, tiles) >= tile_h) ++tiles;
      tile_h = ceil_div(p->out_h, tiles);
    } else if (p->tile_w > p->lanes) {
      p->tile_w = round_up(ceil_div(p->tile_w, 2), p->lanes);
    } else {
      return status;
    }
  }
  p->tiles = ceil_div(p->out_h, tile_h) * ceil_div(p->out_w, p->tile_w);
  return TK_OK;
}

}  // namespace

tk_status plan_conv2d(const tk_conv2d& s, const tk_csr& w, tk_format format, const tk_vectors& v, const tk_tuning* given, int64_t stored,
                      Packed* p) {
  const tk_status bad = check_shape(s, w);
  if (bad != TK_OK) return bad;
  tk_tuning tuning = given ? *given : tk_tuning{};
  if (!within(tuning.tile_vectors, 0, kMaxTileVectors) || tuning.block_channels < 0 || tuning.group_tiles < 0) return TK_BAD_ARGUMENT;
  if (!within(s.x_layout, TK_PLANES, TK_BSR_TILES) || !within(s.y_layout, TK_PLANES, TK_BSR_TILES)) return TK_BAD_ARGUMENT;
  if (format == TK_BSR_1X4) return TK_BAD_ARGUMENT;
  if (is_depthwise(s) && (format != TK_CSR || s.x_layout != TK_PLANES || s.y_layout != TK_PLANES)) return TK_BAD_ARGUMENT;
  *p = header(is_depthwise(s) ? k_depthwise_csr_f32 : format == TK_CSR ? k_conv2d_csr_f32 : k_conv2d_bsr_f32, format, v, w);
  tuning.tile_vectors = i32(smaller(tuning.tile_vectors, most_vectors(p->unit_rows, v)));
  p->shape = s;
  p->out_h = (s.in_h + s.pad_top + s.pad_bottom - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
  p->out_w = (s.in_w + s.pad_left + s.pad_right - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
  if (is_depthwise(s)) return plan_depthwise(p);
  p->value_bytes = v.value_bytes;
  p->x_tile = tile_pixels(static_cast<tk_layout>(s.x_layout), s.in_h * s.in_w, v);
  p->y_tile = tile_pixels(static_cast<tk_layout>(s.y_layout), p->out_h * p->out_w, v);
  p->pitch = choose_pitch(s, *p);
  share_columns(p);
  cut_tiles(tuning.tile_vectors, v, p);
  p->reads_planes = v.reads_planes && p->pointwise() && p->x_tile == 0 && s.in_h * s.in_w < kMaxCopiedPlane &&
                    stored / p->unit_rows < kFewUses * s.in_channels;
  tk_status status = cut_blocks(tuning, p);
  while (status == TK_TOO_LARGE && p->tile_vectors > 1 && !tuning.tile_vectors) {  // huge windows: narrower tiles
    cut_tiles(p->tile_vectors / 2, v, p);
    status = cut_blocks(tuning, p);
  }
  return status;
}

tk_status plan_gemm(const tk_csr& w, tk_format format, const tk_vectors& v, Packed* p) {
  if (!within(w.rows, 1, INT32_MAX) || !within(w.cols, 1, INT32_MAX)) return TK_BAD_SHAPE;
  *p = header(format == TK_CSR ? k_gemm_csr_f32 : format == TK_BSR ? k_gemm_bsr_f32 : k_gemm_bsr1x4_f32, format, v, w);
  p->tile_vectors = i32(p->unit_rows == 1 ? clamp(kGemmTile / p->lanes, 1, kGemmTileVectors) : max_block_vectors(v.registers));
  p->block_channels = kGemmColumns;
  p->blocks = ceil_div(w.cols, kGemmColumns);
  const bool short_rows = w.nnz / w.rows < w.cols / 16;  // fewer, longer pieces of them are worth more than L1
  p->x_floats = kBlockBytes / 4 * (short_rows ? 2 : 1);
  return TK_OK;
}

}  // namespace tk
