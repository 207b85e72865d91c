// Filling the strips (packed.h) of a convolution from its input. Included by isa/*.cc before rows-inl.h.

// The strips of `channels` channels of an image, from channel `begin` on, for `tiles` tiles from pixel `first` (pitched) on, written to
// `to`. Nothing outside [x, limit) is read.
struct Fill {
  const float *x, *limit, *image;
  int64_t begin, channels, first, tiles;
  float* to;
};

// A piece of a strip: `zeros` zeros from float `to` on, `count` pixels from float `from` of the plane on, `tail` zeros.
struct Segment {
  int64_t from;
  int32_t to, zeros, count, tail;
};

// The segments of one strip, row after row of the output.
class Segments {
 public:
  // Floats [0, length) of the strip of a group that starts at pixel `first` (pitched).
  Segments(const Packed& p, const Strip& strip, int64_t first, int64_t length)
      : p_(p), strip_(strip), row_(first / p.pitch + strip.row_min), column_(first % p.pitch), left_(length) {
    const tk_conv2d& s = p.shape;
    whole_rows_ = s.stride_h == 1 && s.stride_w == 1 && p.pitch == s.in_w && strip.inside_begin == 0 && strip.inside_end == s.in_w;
  }

  bool more() const { return left_ > 0; }

  Segment next() {
    const tk_conv2d& s = p_.shape;
    const int64_t iy = s.stride_h * row_ + strip_.phase - s.pad_top;
    const bool inside = iy >= 0 && iy < s.in_h;
    const int64_t reach = whole_rows_ && inside ? (s.in_h - iy) * s.in_w : p_.pitch;
    const int64_t n = smaller(left_, reach - column_);
    const int64_t end = whole_rows_ ? column_ + n : larger(smaller(strip_.inside_end, column_ + n), column_);
    const int64_t begin = smaller(larger(strip_.inside_begin, column_), end);
    Segment segment{0, static_cast<int32_t>(to_), static_cast<int32_t>(n), 0, 0};
    if (inside && begin < end) {
      segment.from = iy * s.in_w + begin * s.stride_w + strip_.x_shift;
      segment.zeros = static_cast<int32_t>(begin - column_);
      segment.count = static_cast<int32_t>(end - begin);
      segment.tail = static_cast<int32_t>(column_ + n - end);
    }
    to_ += n;
    left_ -= n;
    row_ += (column_ + n) / p_.pitch;
    column_ = (column_ + n) % p_.pitch;
    return segment;
  }

 private:
  const Packed& p_;
  const Strip& strip_;
  int64_t row_, column_, left_, to_ = 0;
  bool whole_rows_;
};

// Pieces of a strip row by row: for every geometry and layout.
static void fill_segments(const Packed& p, const Strip& strip, const Fill& f) {
  const tk_conv2d& s = p.shape;
  const int64_t length = f.tiles * p.tile_floats() + strip.halo;
  Segments rest(p, strip, f.first, length);
  while (rest.more()) {
    const Segment segment = rest.next();
    float* const to = f.to + strip.offset;
    const int64_t tail = segment.to + segment.zeros + segment.count;
    for (int64_t c = 0; c < f.channels; ++c) zero(to + c * p.channel_floats + segment.to, segment.zeros);
    for (int64_t i = 0; i < segment.count;) {
      const Place at = place(p.x_tile, s.in_channels, s.in_h * s.in_w, segment.from + i * s.stride_w);
      const int64_t n = smaller(segment.count - i, ceil_div(at.left, s.stride_w));
      const float* const from = f.image + at.at + f.begin * at.stride;
      for (int64_t c = 0; c < f.channels; ++c) {
        float* const strip_to = to + c * p.channel_floats;
        copy_strided(from + c * at.stride, s.stride_w, n, strip_to + segment.to + segment.zeros + i, f.limit, strip_to + length);
      }
      i += n;
    }
    for (int64_t c = 0; c < f.channels; ++c) zero(to + c * p.channel_floats + tail, segment.tail);
  }
}

// A whole vector of a strip: the place in the plane of its first lane, and which lanes are inside the image.
struct VectorCopy {
  int32_t from, mask;
};

// The vectors of a strip where none holds pieces of two rows: pitches of whole vectors, and planes copied as they are.
class VectorCopies {
 public:
  enum Mask { kNone, kAll, kHead, kTail };

  // As in Segments; rows begin at column `begin`, for whole vectors.
  VectorCopies(const Packed& p, const Strip& strip, int64_t first, int64_t length, int64_t begin = 0)
      : p_(p),
        strip_(strip),
        contiguous_(p.pointwise()),
        row_(first / p.pitch + strip.row_min),
        column_(contiguous_ ? first : begin + first % p.pitch),
        left_(length),
        begin_(begin) {
    const int64_t head = strip.inside_begin / Vec::kLanes * Vec::kLanes;
    masks[kNone] = Vec::mask(0, 0);
    masks[kAll] = Vec::mask(0, Vec::kLanes);
    masks[kHead] = Vec::mask(strip.inside_begin - head, smaller(Vec::kLanes, strip.inside_end - head));
    masks[kTail] = Vec::mask(0, strip.inside_end % Vec::kLanes);
  }

  // Up to `most` further vectors, 0 at the end; and the range [low, high) of the plane that they read.
  int next(VectorCopy* vectors, int most) {
    int n = 0;
    low = high = 0;
    for (; n < most && left_ > 0; ++n, left_ -= Vec::kLanes, column_ += Vec::kLanes) {
      if (!contiguous_ && column_ == begin_ + p_.pitch) {
        column_ = begin_;
        ++row_;
      }
      vectors[n] = contiguous_ ? VectorCopy{static_cast<int32_t>(column_), kAll} : of_row();
      low = smaller(low, vectors[n].from);
      high = larger(high, vectors[n].from + p_.shape.stride_w * Vec::kLanes);
    }
    return n;
  }

  int64_t low = 0, high = 0;
  Vec masks[kStripMasks];

 private:
  VectorCopy of_row() const {
    const tk_conv2d& s = p_.shape;
    const int64_t iy = s.stride_h * row_ + strip_.phase - s.pad_top;
    if (iy < 0 || iy >= s.in_h || column_ + Vec::kLanes <= strip_.inside_begin || column_ >= strip_.inside_end) return {0, kNone};
    const bool head = column_ <= strip_.inside_begin, tail = strip_.inside_end < column_ + Vec::kLanes;
    return {static_cast<int32_t>(iy * s.in_w + column_ * s.stride_w + strip_.x_shift), head ? kHead : tail ? kTail : kAll};
  }

  const Packed& p_;
  const Strip& strip_;
  const bool contiguous_;
  int64_t row_, column_, left_;
  const int64_t begin_;
};

template <int Stride>
static inline void copy_vectors(const float* plane, const VectorCopy* vectors, int n, const Vec* masks, float* to) {
  for (int k = 0; k < n; ++k) {
    const float* const from = plane + vectors[k].from;
    ((Stride == 1 ? Vec::load(from) : Vec::load_even(from)) & masks[vectors[k].mask]).store(to + k * Vec::kLanes);
  }
}

// The same, lane by lane where whole vectors would reach outside, in the first and last planes of x; for any stride.
static void copy_lanes(const Fill& f, int64_t stride, const float* plane, const VectorCopy* vectors, int n, const Vec* masks, float* to) {
  for (int k = 0; k < n; ++k, to += Vec::kLanes) {
    const int64_t at = plane + vectors[k].from - f.x, count = f.limit - f.x;
    if (stride <= 2 && at >= 0 && at + stride * Vec::kLanes <= count) {
      stride == 1 ? copy_vectors<1>(plane, vectors + k, 1, masks, to) : copy_vectors<2>(plane, vectors + k, 1, masks, to);
      continue;
    }
    float lanes[Vec::kLanes];
    for (int64_t i = 0; i < Vec::kLanes; ++i) lanes[i] = at + i * stride >= 0 && at + i * stride < count ? f.x[at + i * stride] : 0.0f;
    (Vec::load(lanes) & masks[vectors[k].mask]).store(to);
  }
}

// Vectors of one plane; [low, high) is the range of it that they read.
static inline void copy_plane(const Fill& f, int64_t stride, const float* plane, const VectorCopy* vectors, int n, const Vec* masks,
                              int64_t low, int64_t high, float* to) {
  if (stride > 2 || plane - f.x < -low || f.limit - plane < high) {
    copy_lanes(f, stride, plane, vectors, n, masks, to);
  } else if (stride == 1) {
    copy_vectors<1>(plane, vectors, n, masks, to);
  } else {
    copy_vectors<2>(plane, vectors, n, masks, to);
  }
}

static void fill_vectors(const Packed& p, const Strip& strip, const Fill& f) {
  constexpr int kAtOnce = 64;
  const int64_t stride = p.shape.stride_w;
  VectorCopies rest(p, strip, f.first, f.tiles * p.tile_floats() + strip.halo);
  VectorCopy vectors[kAtOnce];
  float* to = f.to + strip.offset;
  while (const int n = rest.next(vectors, kAtOnce)) {
    for (int64_t c = 0; c < f.channels; ++c) {
      const float* const plane = f.image + (f.begin + c) * p.shape.in_h * p.shape.in_w;
      copy_plane(f, stride, plane, vectors, n, rest.masks, rest.low, rest.high, to + c * p.channel_floats);
    }
    to += int64_t{n} * Vec::kLanes;
  }
}

// Strips of a pointwise convolution: pieces of planes as they are, zeros behind the last pixel.
static void fill_planes(const Packed& p, const Fill& f) {
  const int64_t pixels = p.out_h * p.out_w, length = f.tiles * p.tile_floats(), inside = smaller(length, pixels - f.first);
  for (int64_t c = 0; c < f.channels; ++c) {
    float* const to = f.to + c * p.channel_floats;
    copy_long(f.image + (f.begin + c) * pixels + f.first, inside, to);
    zero(to + inside, length - inside);
  }
}

static void fill_strips(const Packed& p, const Fill& f) {
  if (p.x_tile == 0 && p.pointwise()) return fill_planes(p, f);
  const bool vectors = p.whole_vectors();
  for (int32_t i = 0; i < p.strip_count; ++i) (vectors ? fill_vectors : fill_segments)(p, p.strips()[i], f);
}
