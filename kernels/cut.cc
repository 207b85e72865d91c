// How a layer would be cut up on vectors of any width, whatever processor this is: what its packed form would say, in counts.
#include "plan.h"

namespace tk {
namespace {

constexpr int32_t kMaxLanes = 16, kMinRegisters = 8, kMaxRegisters = 32;
constexpr int64_t kMost = int64_t{1} << 60;  // counts beyond are given as this

int64_t times(int64_t a, int64_t b) { return b > 0 && a > kMost / b ? kMost : a * b; }

bool known(const tk_vectors* v) {
  return v && within(v->lanes, 1, kMaxLanes) && (v->lanes & (v->lanes - 1)) == 0 && within(v->registers, kMinRegisters, kMaxRegisters) &&
         within(v->tile, 1, kMaxTileVectors) && within(v->good_tile, 1, v->tile) && within(v->block_tile, 1, kMaxTileVectors) &&
         within(v->reads_planes, 0, 1) && (v->value_bytes == 4 || v->value_bytes == 2);
}

// A cut with what every kernel's has.
tk_cut cut_of(const Packed& p) {
  tk_cut cut{};
  cut.tiles = p.tiles;
  cut.tile_vectors = p.tile_vectors;
  cut.units = p.units();
  cut.blocks = p.blocks;
  cut.block_channels = p.block_channels;
  cut.group_tiles = p.group_tiles;
  cut.pitch = p.pitch;
  cut.in_place = p.in_place();
  return cut;
}

// Floats of one channel that a tile reads.
int64_t window(const Packed& p) {
  if (p.in_place()) return p.tile_floats();
  const Phases rows = row_phases(p), columns = column_phases(p);
  int64_t floats = 0;
  for (int64_t column = 0; column < columns.count; ++column) {
    for (int64_t row = 0; row < rows.count; ++row) {
      floats += p.tile_floats() + round_up(rows.reach(row) * p.pitch + columns.reach(column), p.lanes);
    }
  }
  return floats;
}

// Taps whose loads begin in the middle of a vector: taps by the place in it that the row's shift leads to, then by the column's.
int64_t misaligned_taps(const Packed& p) {
  const Phases rows = row_phases(p), columns = column_phases(p);
  int64_t by_row[kMaxLanes] = {}, aligned = 0;
  for (int64_t i = 0; i < rows.taps; ++i) ++by_row[rows.shift_in_strip(i) * p.pitch % p.lanes];
  for (int64_t j = 0; j < columns.taps; ++j) aligned += by_row[(p.lanes - columns.shift_in_strip(j) % p.lanes) % p.lanes];
  return rows.taps * columns.taps - aligned;
}

void count_depthwise(const Packed& p, tk_cut* cut) {
  const int64_t height = p.tile_floats() / p.pitch, down = ceil_div(p.out_h, height), across = ceil_div(p.out_w, p.tile_w);
  const int64_t last = p.out_w - (across - 1) * p.tile_w;  // columns of the last tile in a row of them
  cut->vectors = p.out_h * ((across - 1) * ceil_div(p.tile_w, p.lanes) + ceil_div(last, p.lanes));
  cut->window = p.channel_floats;
  cut->filled = times(down * across, p.channel_floats);
}

void count_conv2d(const Packed& p, tk_cut* cut) {
  const int64_t pixels = p.out_h * p.pitch, first_of_last = (p.tiles - 1) * p.tile_floats(), strips = p.strip_count;
  cut->vectors = (p.tiles - 1) * p.tile_vectors + ceil_div(pixels - first_of_last, p.lanes);
  const int64_t of_channel = window(p), halo = of_channel - (p.in_place() ? 1 : strips) * p.tile_floats();
  cut->window = p.block_channels * of_channel;
  if (p.blocks > 1) cut->waiting = p.group_tiles * p.units() * p.unit_rows * p.tile_floats();
  const int64_t left_over = !p.reads_planes && pixels - first_of_last < p.tile_floats();
  const int64_t filled_tiles = p.in_place() ? left_over : p.tiles, groups = ceil_div(filled_tiles, p.group_tiles);
  const int64_t strip_floats = smaller(times(filled_tiles, strips * p.tile_floats()) + times(groups, halo), kMost);
  cut->filled = times(strip_floats, p.shape.in_channels);
  if (!p.whole_vectors()) {
    const int64_t tiles_of_x = p.x_tile > 0 ? ceil_div(strip_floats, p.x_tile) : 0;
    cut->pieces = times(ceil_div(strip_floats, p.pitch) + times(groups, strips) + tiles_of_x, p.shape.in_channels);
  }
  const bool row_by_row = p.pitch != p.out_w, other_tiles = p.y_tile > 0 && p.y_tile != p.tile_floats();
  cut->spans = (row_by_row ? p.out_h + p.tiles - 1 : 0) + (other_tiles ? p.tiles + ceil_div(p.out_h * p.out_w, p.y_tile) : 0);
}

// Passes of the loop over blocks of columns: as gemm-inl.h joins them for a tile of so many floats.
int64_t gemm_passes(const Packed& p, int64_t tile) {
  constexpr int64_t kSpanBlocks = kMaxBlockFloats / kGemmColumns;
  const int64_t groups = ceil_div(p.blocks, p.x_floats / tile / kGemmColumns), step = ceil_div(p.blocks, groups);
  const int64_t whole_spans = p.blocks / kSpanBlocks, rest = p.blocks % kSpanBlocks;
  return whole_spans * ceil_div(kSpanBlocks, step) + ceil_div(rest, step);
}

void count_gemm(const Packed& p, int64_t batch, tk_cut* cut) {
  cut->pitch = 0;
  if (batch == 1) {  // dot products
    cut->tiles = 1;
    cut->tile_vectors = 0;
    cut->blocks = 1;
    return;
  }
  const int64_t tile = p.batch_tile(batch), chunks = ceil_div(p.row_groups, kGemmFloats / tile / kGroupRows);
  cut->tiles = ceil_div(batch, tile);
  cut->tile_vectors = tile / p.lanes;
  cut->vectors = cut->tiles * cut->tile_vectors;
  cut->blocks = gemm_passes(p, tile);
  cut->window = ceil_div(p.blocks, cut->blocks) * kGemmColumns * tile;
  cut->waiting = ceil_div(p.row_groups, chunks) * kGroupRows * tile;
  cut->filled = times(cut->tiles * tile * chunks, round_up(p.cols, p.lanes));
}

}  // namespace
}  // namespace tk

using namespace tk;

extern "C" {

tk_status tk_isa_vectors(int32_t isa, tk_vectors* vectors) {
  if (!vectors) return TK_BAD_ARGUMENT;
  if (!isa_at(isa)) return TK_BAD_ISA;
  *vectors = isa_at(isa)->vectors();
  return TK_OK;
}

tk_status tk_conv2d_cut(const tk_conv2d* shape, int64_t stored, tk_format format, const tk_vectors* vectors, const tk_tuning* tuning,
                        tk_cut* cut) {
  if (!shape || !cut || stored < 0 || !known(vectors) || !within(format, TK_CSR, TK_BSR_1X4)) return TK_BAD_ARGUMENT;
  const tk_conv2d& s = *shape;
  if (!within(s.kernel_h, 1, INT32_MAX) || !within(s.kernel_w, 1, INT32_MAX / s.kernel_h)) return TK_BAD_SHAPE;
  const int64_t taps = s.kernel_h * s.kernel_w;
  if (s.groups < 1 || !within(s.in_channels / s.groups, 1, INT32_MAX / taps)) return TK_BAD_SHAPE;
  const tk_csr weight{s.out_channels, s.in_channels / s.groups * taps, stored, nullptr, nullptr, nullptr};
  Packed p;
  const tk_status status = plan_conv2d(s, weight, format, *vectors, tuning, stored, &p);
  if (status != TK_OK) return status;
  *cut = cut_of(p);
  s.groups > 1 ? count_depthwise(p, cut) : count_conv2d(p, cut);
  cut->strips = p.strip_count;
  cut->taps = taps;
  cut->misaligned_taps = misaligned_taps(p);
  return TK_OK;
}

tk_status tk_gemm_cut(int64_t rows, int64_t cols, int64_t nnz, tk_format format, const tk_vectors* vectors, int64_t batch, tk_cut* cut) {
  if (!cut || !known(vectors) || !within(format, TK_CSR, TK_BSR_1X4)) return TK_BAD_ARGUMENT;
  if (!within(batch, 1, INT32_MAX) || nnz < 0) return TK_BAD_ARGUMENT;
  Packed p;
  const tk_status status = plan_gemm({rows, cols, nnz, nullptr, nullptr, nullptr}, format, *vectors, &p);
  if (status != TK_OK) return status;
  *cut = cut_of(p);
  cut->taps = 1;
  count_gemm(p, batch, cut);
  return TK_OK;
}

}  // extern "C"
