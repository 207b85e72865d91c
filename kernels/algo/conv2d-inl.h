// Convolution, for every weight format: `Rows` is the format's inner loop. Lanes run along flattened output pixels; input
// channels come in blocks whose strips (packed.h) stay in or next to L1 while every output row of the tile passes over them. Included by
// isa/*.cc after rows-inl.h and strips-inl.h.

// Spans of the tile of `count` pixels from pixel `first` (pitched) on, from the start of the image; returns their number.
static int32_t tile_spans(const Packed& p, int64_t first, int64_t count, Span* spans) {
  int32_t n = 0;
  spans[0] = {};  // a tile may hold nothing but what rows are longer by
  for (int64_t at = 0; at < count;) {
    const int64_t row = (first + at) / p.pitch, column = (first + at) % p.pitch;
    const Place to = place(p.y_tile, p.rows, p.out_h * p.out_w, row * p.out_w + column);
    int64_t here = smaller(count - at, p.pitch - column);
    if (const int64_t inside = smaller(smaller(here, p.out_w - column), to.left); inside > 0) {
      spans[n++] = {static_cast<int32_t>(at), static_cast<int32_t>(inside), to.at, to.stride};
      if (column + inside < p.out_w) here = inside;
    }
    at += here;
  }
  return n;
}

// One range of rows of a group of tiles.
template <class Rows>
struct Conv2dGroup {
  const Packed& p;
  const tk_args& a;
  int64_t image, tile, tiles, row_begin, row_end;
  float *strips, *accumulators;

  struct Input {
    const float* x;
    int64_t step;  // floats from offset to offset
  };

  // The input of a block for the group's tiles.
  Input input(int64_t block) const {
    const int64_t planes = p.shape.in_channels, pixels = p.shape.in_h * p.shape.in_w, begin = p.block_begin(block);
    const int64_t channels = smaller(p.block_channels, planes - begin), first = tile * p.tile_floats();
    const float* const from = a.x + image * planes * pixels;
    const float* const limit = a.x + a.batch * planes * pixels;
    if (p.tiles_in_place() && first + p.tile_floats() <= pixels) return {from + first * planes + begin * p.tile_floats(), 1};
    if (p.reads_planes) {  // the last vector may end in the next plane, if there is one
      const float* const plane = from + begin * pixels + first;
      if (limit - plane >= (channels - 1) * pixels + smaller(p.tile_floats(), round_up(pixels - first, p.lanes))) return {plane, pixels};
    }
    return {Rows::fill(p, {a.x, limit, from, begin, channels, first, tiles, strips}), p.reads_planes ? p.channel_floats : 1};
  }

  // The rows of the group's i-th tile, whose accumulators lie at `acc`.
  void rows(int64_t block, const Input& input, int64_t i, float* acc) const {
    const int64_t first = (tile + i) * p.tile_floats(), count = smaller(p.tile_floats(), p.out_h * p.pitch - first);
    const int vectors = static_cast<int>((count + Vec::kLanes - 1) / Vec::kLanes);
    Span spans[Vec::kTile * Vec::kLanes];
    Tile t{};
    t.values = p.values();
    t.offsets = p.offsets();
    t.row_ptr = p.row_ptr(block);
    t.x = Rows::at(input.x, i * p.tile_floats());
    t.x_step = input.step;
    t.acc_stride = p.tile_floats();
    t.acc = acc - row_begin * t.acc_stride;
    t.bias = a.bias;
    t.row_begin = row_begin;
    t.row_end = row_end;
    t.last_lanes = static_cast<int32_t>(count - (vectors - 1) * Vec::kLanes);
    t.first = block == 0;
    t.last = block == p.blocks - 1;
    t.min = a.min;
    t.max = a.max;
    t.activation = a.activation;
    t.slope = a.slope;
    const int64_t pixels = p.out_h * p.out_w;
    Place to = place(p.y_tile, p.rows, pixels, smaller(first, pixels - 1));
    if (t.last && (p.pitch != p.out_w || to.left < count)) {
      t.spans = spans;
      t.span_count = tile_spans(p, first, count, spans);
      to.at = spans[0].to;
      to.stride = spans[0].stride;
      for (int32_t s = 0; s < t.span_count; ++s) spans[s].to -= to.at;
    }
    t.y_stride = to.stride;
    t.y = a.y + image * p.rows * pixels + to.at;
    t.residual = a.residual ? a.residual + (t.y - a.y) : nullptr;
    t.plain = !t.spans && !t.residual && t.last_lanes == Vec::kLanes && t.activation == TK_IDENTITY;
    run_rows<Rows>(vectors, t);
  }

  // Every block passes over all rows in turn, their accumulators wait.
  void run() const {
    for (int64_t block = 0; block < p.blocks; ++block) {
      const Input x = input(block);
      for (int64_t i = 0; i < tiles; ++i) {
        rows(block, x, i, accumulators + i * p.units() * p.unit_rows * p.tile_floats());
      }
    }
  }
};

template <class Rows>
static void conv2d(const Packed& p, const tk_args& a, int64_t part_begin, int64_t part_end, float* workspace) {
  const int64_t parts_per_image = p.tiles * p.row_groups;
  for (int64_t part = part_begin; part < part_end;) {
    const int64_t image = part / parts_per_image, tile = part % parts_per_image / p.row_groups, group = part % p.row_groups;
    // A range that starts or ends within a tile takes some rows of that one; else whole tiles, as many as are filled together.
    const int64_t groups = smaller(p.row_groups - group, part_end - part), whole = (part_end - part) / p.row_groups;
    const int64_t tiles = groups < p.row_groups ? 1 : smaller(smaller(whole, p.group_tiles), p.tiles - tile);
    part += groups < p.row_groups ? groups : tiles * groups;
    const int64_t row_begin = group * kGroupRows, row_end = smaller(p.rows, (group + groups) * kGroupRows);
    Conv2dGroup<Rows>{p, a, image, tile, tiles, row_begin, row_end, workspace, workspace + p.strips_floats()}.run();
  }
}
