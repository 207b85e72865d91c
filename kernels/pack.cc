// Validation of CSR weights and their packing into the blocked form of packed.h. Runs once per layer, at load.
#include <cmath>
#include <initializer_list>
#include <numeric>

#include "packed.h"

namespace tk {
namespace {

constexpr int64_t kMaxDim = int64_t{1} << 24;      // of images, windows, strides, paddings: keeps every product in 64 bits
constexpr int64_t kBlockBytes = 32 * 1024;         // strips of one block that a tile reads: about L1 (kernels/README.md)
constexpr int64_t kGroupBytes = 96 * 1024;         // strips of one block filled at once: a part of L2
constexpr int64_t kAccumulatorBytes = 192 * 1024;  // accumulators that wait between blocks: another part of L2
constexpr int64_t kDepthwiseBytes = 24 * 1024;     // strips of one channel's tile: most of L1
constexpr int64_t kGoodTile = 10;                  // vectors of a CSR tile: wider ones shorten the rows that fit L1, narrower ones waste
constexpr int64_t kGemmTile = 64;                  // rows of batch of a gemm's widest tile
constexpr int64_t kMaxRowPointers = int64_t{1} << 28;  // over all blocks: 1 GiB
constexpr int64_t kMaxStrips = 1 << 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

int32_t i32(int64_t x) { return static_cast<int32_t>(x); }

bool within(int64_t x, int64_t low, int64_t high) { return x >= low && x <= high; }

bool is_depthwise(const tk_conv2d& s) { return s.groups > 1; }

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

// Tap i of one axis of a window reads input pixel stride * o + i * dilation - pad of output pixel o: phase (i * dilation) % stride, shifted
// by (i * dilation) / stride output pixels. The phases repeat with period stride / gcd(dilation, stride), so taps i and i + period can
// share strips: longer ones, by the pixels between them. Where that is more than a strip for each tap (long rows, wide dilation), every
// tap has its own. `tile` and `pitch` are floats of a tile and from output pixel to output pixel.
struct Phases {
  Phases(int64_t kernel, int64_t stride_, int64_t dilation_, int64_t tile, int64_t pitch)
      : taps(kernel), stride(stride_), dilation(dilation_), period(stride / std::gcd(dilation, stride)) {
    count = smaller(taps, period);
    int64_t shared = 0;
    for (int64_t k = 0; k < count; ++k) shared += tile + reach(k) * pitch;
    if (shared > taps * tile) count = period = taps;
  }
  int64_t phase(int64_t k) const { return k * dilation % stride; }
  int64_t shift(int64_t i) const { return i * dilation / stride; }
  int64_t shift_in_strip(int64_t i) const { return shift(i) - shift(i % period); }
  int64_t reach(int64_t k) const { return shift(k + (taps - 1 - k) / period * period) - shift(k); }  // of the last tap that shares with k

  int64_t taps, stride, dilation, period, count;
};

Phases row_phases(const Packed& p) {
  const tk_conv2d& s = p.shape;
  return Phases(s.kernel_h, s.stride_h, s.dilation_h, p.tile_floats(), p.pitch);
}

// A convolution over all channels (tile_w 0) has strips for every column, so that loads stay aligned; depthwise would spend its time
// filling them.
Phases column_phases(const Packed& p) {
  const tk_conv2d& s = p.shape;
  return Phases(s.kernel_w, s.stride_w, s.dilation_w, p.tile_w, 1);
}

// A header with what every kernel's has.
Packed header(Kernel csr, Kernel bsr, tk_format format, int32_t isa, const tk_csr& w) {
  Packed p{};
  p.magic = kMagic;
  p.kernel = format == TK_CSR ? csr : bsr;
  p.isa = isa;
  p.lanes = tk_isa_lanes(isa);
  p.rows = w.rows;
  p.cols = w.cols;
  p.unit_rows = format == TK_CSR ? 1 : kBlockRows;
  p.group_tiles = 1;
  p.row_groups = ceil_div(w.rows, kGroupRows);
  return p;
}

// Places the strips of one channel behind each other, kernel columns outside, row phases inside; writes them where `strips` is not null.
tk_status plan_strips(Packed* p, Strip* strips) {
  const tk_conv2d& s = p->shape;
  const Phases rows = row_phases(*p), columns = column_phases(*p);
  if (rows.count > kMaxStrips / columns.count) return TK_TOO_LARGE;
  p->strip_count = i32(rows.count * columns.count);
  int64_t at = 0;
  for (int64_t i = 0; i < p->strip_count; ++i) {
    const int64_t column = i / rows.count, k = i % rows.count;
    const int64_t halo = round_up(rows.reach(k) * p->pitch, p->lanes), out_w = p->out_w + columns.reach(column);
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

// Vectors of the widest tile its loop takes.
int64_t most_vectors(const Packed& p) { return p.unit_rows == 1 ? kMaxTileVectors : max_block_vectors(isa_at(p.isa)->registers); }

// Cuts the pixels into tiles of whole vectors, shared out evenly.
void cut_tiles(int64_t tile_vectors, Packed* p) {
  const int64_t vectors = ceil_div(p->out_h * p->pitch, p->lanes), good = p->unit_rows == 1 ? kGoodTile : most_vectors(*p);
  p->tile_vectors = i32(tile_vectors ? tile_vectors : ceil_div(vectors, ceil_div(vectors, good)));
  p->tiles = ceil_div(vectors, p->tile_vectors);
}

// Cuts the channels into blocks, shared out evenly, and joins tiles into groups.
tk_status cut_blocks(const tk_tuning& tuning, Packed* p) {
  tk_status status = plan_strips(p, nullptr);
  if (status != TK_OK) return status;
  const int64_t channels = p->shape.in_channels;
  int64_t block = tuning.block_channels;
  if (block == 0) {
    block = clamp(kBlockBytes / 4 / p->channel_floats, 1, channels);
    block = ceil_div(channels, ceil_div(channels, block));
  }
  p->block_channels = clamp(block, 1, channels < kMaxBlockFloats / p->channel_floats ? channels : kMaxBlockFloats / p->channel_floats);
  p->blocks = ceil_div(channels, p->block_channels);

  const int64_t most = tuning.group_tiles ? tuning.group_tiles : p->tiles;
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
    const Phases columns = column_phases(*p);
    int64_t reach = 0;
    for (int64_t k = 0; k < columns.count; ++k) reach = larger(reach, columns.reach(k));
    p->pitch = round_up(p->tile_w + reach, p->lanes);
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

// Fills the header, all but the places of the arrays. Sizes depend on shape, nnz, ISA and tuning only.
tk_status plan_conv2d(const tk_conv2d& s, const tk_csr& w, tk_format format, int32_t isa, const tk_tuning* given, Packed* p) {
  const tk_status bad = check_shape(s, w);
  if (bad != TK_OK) return bad;
  tk_tuning tuning = given ? *given : tk_tuning{};
  if (!within(tuning.tile_vectors, 0, kMaxTileVectors) || tuning.block_channels < 0 || tuning.group_tiles < 0) return TK_BAD_ARGUMENT;
  if (is_depthwise(s) && format != TK_CSR) return TK_BAD_ARGUMENT;
  *p = header(is_depthwise(s) ? k_depthwise_csr_f32 : k_conv2d_csr_f32, k_conv2d_bsr_f32, format, isa, w);
  if (tuning.tile_vectors > most_vectors(*p)) tuning.tile_vectors = i32(most_vectors(*p));
  p->shape = s;
  p->out_h = (s.in_h + s.pad_top + s.pad_bottom - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
  p->out_w = (s.in_w + s.pad_left + s.pad_right - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
  if (is_depthwise(s)) return plan_depthwise(p);
  p->pitch = choose_pitch(s, *p);
  cut_tiles(tuning.tile_vectors, p);
  tk_status status = cut_blocks(tuning, p);
  while (status == TK_TOO_LARGE && p->tile_vectors > 1 && !tuning.tile_vectors) {  // huge windows: narrower tiles
    cut_tiles(p->tile_vectors / 2, p);
    status = cut_blocks(tuning, p);
  }
  return status;
}

tk_status plan_gemm(const tk_csr& w, tk_format format, int32_t isa, Packed* p) {
  if (!within(w.rows, 1, INT32_MAX) || !within(w.cols, 1, INT32_MAX)) return TK_BAD_SHAPE;
  *p = header(k_gemm_csr_f32, k_gemm_bsr_f32, format, isa, w);
  p->tile_vectors = i32(format == TK_CSR ? clamp(kGemmTile / p->lanes, 1, kGemmTileVectors) : most_vectors(*p));
  p->block_channels = kGemmColumns;
  p->blocks = ceil_div(w.cols, kGemmColumns);
  const bool short_rows = w.nnz / w.rows < w.cols / 16;  // fewer, longer pieces of them are worth more than L1
  p->x_floats = kBlockBytes / 4 * (short_rows ? 2 : 1);
  return TK_OK;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % TK_ALIGNMENT == 0; }

template <class T>
T* mutable_at(void* packed, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(packed) + offset);
}

// Walks the columns of p.unit_rows rows that have a non-zero in any of them, ascending: `at` is the column, INT64_MAX at the end.
struct UnitColumns {
  UnitColumns(const tk_csr& weight, int64_t unit_rows, int64_t unit) : w(weight), rows(i32(unit_rows)) {
    for (int32_t r = 0; r < rows; ++r) {
      const int64_t m = unit * unit_rows + r;
      next[r] = m < w.rows ? w.row_ptr[m] : 0;
      end[r] = m < w.rows ? w.row_ptr[m + 1] : 0;
    }
    find();
  }
  // The unit's values in this column; then on to the next.
  void take(float* values) {
    for (int32_t r = 0; r < rows; ++r) {
      const bool here = next[r] < end[r] && w.col_indices[next[r]] == at;
      if (values) values[r] = here ? w.values[next[r]] : 0.0f;
      next[r] += here;
    }
    find();
  }
  void find() {
    at = INT64_MAX;
    for (int32_t r = 0; r < rows; ++r) {
      if (next[r] < end[r] && w.col_indices[next[r]] < at) at = w.col_indices[next[r]];
    }
  }

  const tk_csr& w;
  int32_t rows;
  int64_t at, next[kBlockRows], end[kBlockRows];
};

// The weight must be valid.
int64_t stored_values(const tk_csr& w, int64_t unit_rows) {
  if (unit_rows == 1) return w.nnz;
  int64_t columns = 0;
  for (int64_t unit = 0; unit < ceil_div(w.rows, unit_rows); ++unit) {
    for (UnitColumns c(w, unit_rows, unit); c.at != INT64_MAX; c.take(nullptr)) ++columns;
  }
  return columns * unit_rows;
}

// Writes the stored values block by block, units in order; offset(column) says where a column's input starts within its block.
template <class Offset>
void write_entries(const tk_csr& w, int64_t columns_per_channel, const Packed& p, void* packed, Offset offset) {
  uint32_t* const row_ptr = mutable_at<uint32_t>(packed, p.row_ptr_at);
  float* const values = mutable_at<float>(packed, p.values_at);
  uint16_t* const offsets = mutable_at<uint16_t>(packed, p.offsets_at);
  const int64_t units = p.units(), block_columns = p.block_channels * columns_per_channel;
  const auto pointer = [&](int64_t block, int64_t unit) -> uint32_t& { return row_ptr[block * (units + 1) + unit]; };
  for (int64_t i = 0; i < p.blocks * (units + 1); ++i) row_ptr[i] = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    for (UnitColumns c(w, p.unit_rows, unit); c.at != INT64_MAX; c.take(nullptr)) ++pointer(c.at / block_columns, unit + 1);
  }
  for (int64_t block = 0; block < p.blocks; ++block) {  // from counts to where each unit of a block starts
    if (block > 0) pointer(block, 0) = pointer(block - 1, units);
    for (int64_t unit = 0; unit < units; ++unit) pointer(block, unit + 1) += pointer(block, unit);
  }
  for (int64_t unit = 0; unit < units; ++unit) {
    int64_t block = -1, to = 0;
    for (UnitColumns c(w, p.unit_rows, unit); c.at != INT64_MAX; ++to) {
      if (c.at / block_columns != block) {
        block = c.at / block_columns;
        to = pointer(block, unit);
      }
      offsets[to] = static_cast<uint16_t>(offset(c.at - block * block_columns));
      c.take(values + to * p.unit_rows);
    }
  }
}

// Writes the stored values of a gemm: unit by unit, columns in order, with a pointer to where each block of columns starts.
void write_rows(const tk_csr& w, const Packed& p, void* packed) {
  uint32_t* const row_ptr = mutable_at<uint32_t>(packed, p.row_ptr_at);
  float* const values = mutable_at<float>(packed, p.values_at);
  uint16_t* const offsets = mutable_at<uint16_t>(packed, p.offsets_at);
  int64_t to = 0, pointers = 0;
  const auto start = [&](int64_t pointer) {
    while (pointers <= pointer) row_ptr[pointers++] = static_cast<uint32_t>(to);
  };
  for (int64_t unit = 0; unit < p.units(); ++unit) {
    for (UnitColumns c(w, p.unit_rows, unit); c.at != INT64_MAX; ++to) {
      start(unit * p.blocks + c.at / kGemmColumns);
      offsets[to] = static_cast<uint16_t>(c.at);
      c.take(values + to * p.unit_rows);
    }
  }
  start(p.units() * p.blocks);
}

// Places the arrays behind the header.
tk_status lay_out(const tk_csr& w, Packed* p) {
  if (p->blocks > kMaxRowPointers / (p->units() + 1)) return TK_TOO_LARGE;
  const int64_t stored = stored_values(w, p->unit_rows);
  if (stored > INT32_MAX) return TK_TOO_LARGE;
  p->strips_at = round_up(sizeof(Packed), TK_ALIGNMENT);
  p->row_ptr_at = round_up(p->strips_at + p->strip_count * int64_t{sizeof(Strip)}, TK_ALIGNMENT);
  p->values_at = round_up(p->row_ptr_at + p->blocks * (p->units() + 1) * int64_t{sizeof(uint32_t)}, TK_ALIGNMENT);
  p->offsets_at = round_up(p->values_at + stored * int64_t{sizeof(float)}, TK_ALIGNMENT);
  p->total_bytes = round_up(p->offsets_at + stored / p->unit_rows * int64_t{sizeof(uint16_t)}, TK_ALIGNMENT);
  return TK_OK;
}

bool is_gemm(const Packed& p) { return p.kernel == k_gemm_csr_f32 || p.kernel == k_gemm_bsr_f32; }

tk_status check_buffer(const Packed& p, const void* packed, size_t bytes) {
  return packed && aligned(packed) && bytes >= static_cast<size_t>(p.total_bytes) ? TK_OK : TK_BAD_BUFFER;
}

bool known_format(tk_format format) { return format == TK_CSR || format == TK_BSR; }

// What every packing checks first.
tk_status check_weight(const tk_csr& w, tk_format format, int32_t isa) {
  if (!known_format(format)) return TK_BAD_ARGUMENT;
  if (!within(isa, 0, tk_isa_count() - 1) || !tk_isa_usable(isa)) return TK_BAD_ISA;
  return tk_csr_validate(&w);
}

}  // namespace
}  // namespace tk

using namespace tk;

extern "C" {

tk_status tk_csr_validate(const tk_csr* w) {
  if (!w || !w->row_ptr || (w->nnz > 0 && (!w->values || !w->col_indices))) return TK_BAD_ARGUMENT;
  if (!within(w->rows, 1, INT32_MAX) || !within(w->cols, 1, INT32_MAX)) return TK_BAD_SHAPE;
  if (!within(w->nnz, 0, INT32_MAX)) return TK_TOO_LARGE;
  if (w->row_ptr[0] != 0 || w->row_ptr[w->rows] != w->nnz) return TK_BAD_ROW_PTR;
  for (int64_t m = 0; m < w->rows; ++m) {
    if (w->row_ptr[m + 1] < w->row_ptr[m] || w->row_ptr[m + 1] > w->nnz) return TK_BAD_ROW_PTR;
    int64_t previous = -1;
    for (int64_t i = w->row_ptr[m]; i < w->row_ptr[m + 1]; ++i) {
      if (w->col_indices[i] <= previous || w->col_indices[i] >= w->cols) return TK_BAD_COL_INDICES;
      previous = w->col_indices[i];
    }
  }
  for (int64_t i = 0; i < w->nnz; ++i) {
    if (!std::isfinite(w->values[i])) return TK_BAD_VALUES;
  }
  return TK_OK;
}

tk_status tk_gaps_decode(int64_t rows, int64_t cols, int64_t nnz, const uint16_t* gaps, int32_t* col_indices, int64_t* row_ptr) {
  if (!row_ptr || (nnz > 0 && (!gaps || !col_indices))) return TK_BAD_ARGUMENT;
  if (!within(rows, 1, INT32_MAX) || !within(cols, 1, INT32_MAX)) return TK_BAD_SHAPE;
  if (!within(nnz, 0, INT32_MAX)) return TK_TOO_LARGE;
  int64_t position = 0, row = 0;
  row_ptr[0] = 0;
  for (int64_t i = 0; i < nnz; ++i) {
    if (i > 0 && gaps[i] == 0) return TK_BAD_GAPS;
    position += gaps[i];
    if (position >= rows * cols) return TK_BAD_GAPS;
    while (position >= (row + 1) * cols) row_ptr[++row] = i;
    col_indices[i] = static_cast<int32_t>(position - row * cols);
  }
  while (row < rows) row_ptr[++row] = nnz;
  return TK_OK;
}

int64_t tk_stored_values(const tk_csr* w, tk_format format) {
  if (tk_csr_validate(w) != TK_OK || !known_format(format)) return 0;
  return stored_values(*w, format == TK_CSR ? 1 : kBlockRows);
}

tk_status tk_conv2d_packed_bytes(const tk_conv2d* shape, const tk_csr* w, tk_format format, int32_t isa, const tk_tuning* tuning,
                                 size_t* packed_bytes) {
  if (!shape || !w || !packed_bytes) return TK_BAD_ARGUMENT;
  Packed p;
  tk_status status = check_weight(*w, format, isa);
  if (status == TK_OK) status = plan_conv2d(*shape, *w, format, isa, tuning, &p);
  if (status == TK_OK) status = lay_out(*w, &p);
  if (status == TK_OK) *packed_bytes = static_cast<size_t>(p.total_bytes);
  return status;
}

tk_status tk_conv2d_pack(const tk_conv2d* shape, const tk_csr* w, tk_format format, int32_t isa, const tk_tuning* tuning, void* packed,
                         size_t packed_bytes) {
  if (!shape || !w) return TK_BAD_ARGUMENT;
  Packed p;
  tk_status status = check_weight(*w, format, isa);
  if (status == TK_OK) status = plan_conv2d(*shape, *w, format, isa, tuning, &p);
  if (status == TK_OK) status = lay_out(*w, &p);
  if (status == TK_OK) status = check_buffer(p, packed, packed_bytes);
  if (status != TK_OK) return status;
  *static_cast<Packed*>(packed) = p;
  const tk_conv2d& s = *shape;
  Strip* const strips = mutable_at<Strip>(packed, p.strips_at);
  plan_strips(&p, strips);

  const int64_t taps = s.kernel_h * s.kernel_w;
  const Phases rows = row_phases(p), columns = column_phases(p);
  write_entries(*w, taps, p, packed, [&](int64_t column) {
    const int64_t i = column % taps / s.kernel_w, j = column % s.kernel_w;
    const Strip& strip = strips[j % columns.period * rows.count + i % rows.period];
    return column / taps * p.channel_floats + strip.offset + rows.shift_in_strip(i) * p.pitch + columns.shift_in_strip(j);
  });
  return TK_OK;
}

tk_status tk_gemm_packed_bytes(const tk_csr* w, tk_format format, int32_t isa, size_t* packed_bytes) {
  if (!w || !packed_bytes) return TK_BAD_ARGUMENT;
  Packed p;
  tk_status status = check_weight(*w, format, isa);
  if (status == TK_OK) status = plan_gemm(*w, format, isa, &p);
  if (status == TK_OK) status = lay_out(*w, &p);
  if (status == TK_OK) *packed_bytes = static_cast<size_t>(p.total_bytes);
  return status;
}

tk_status tk_gemm_pack(const tk_csr* w, tk_format format, int32_t isa, void* packed, size_t packed_bytes) {
  if (!w) return TK_BAD_ARGUMENT;
  Packed p;
  tk_status status = check_weight(*w, format, isa);
  if (status == TK_OK) status = plan_gemm(*w, format, isa, &p);
  if (status == TK_OK) status = lay_out(*w, &p);
  if (status == TK_OK) status = check_buffer(p, packed, packed_bytes);
  if (status != TK_OK) return status;
  *static_cast<Packed*>(packed) = p;
  write_rows(*w, p, packed);
  return TK_OK;
}

int64_t tk_parts(const void* packed, int64_t batch) {
  const Packed* p = static_cast<const Packed*>(packed);
  if (!p || p->magic != kMagic || !within(batch, 1, INT32_MAX)) return 0;
  if (p->kernel == k_depthwise_csr_f32) return batch * p->row_groups;
  const int64_t tiles = is_gemm(*p) ? ceil_div(batch, p->batch_tile(batch)) : batch * p->tiles;
  return tiles * p->row_groups;
}

size_t tk_workspace_bytes(const void* packed) {
  const Packed* p = static_cast<const Packed*>(packed);
  if (!p || p->magic != kMagic) return 0;
  int64_t floats = p->strips_floats();
  if (p->kernel == k_depthwise_csr_f32) {
    floats += p->lists_floats();
  } else if (is_gemm(*p)) {
    const int64_t rows = round_up(p->rows, kGroupRows) * p->tile_floats();
    floats = p->x_floats + (rows < kGemmFloats ? rows : kGemmFloats);
  } else if (p->blocks > 1) {
    floats += p->group_tiles * p->units() * p->unit_rows * p->tile_floats();
  }
  return static_cast<size_t>(round_up(floats * 4, TK_ALIGNMENT));
}

}  // extern "C"
