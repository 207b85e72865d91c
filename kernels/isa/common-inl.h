// What every ISA shares and must compile for itself: no std templates here, or one ISA's code could be linked into another's.

#if defined(__clang__)
#define TK_UNROLL _Pragma("clang loop unroll(full)")
#else
#define TK_UNROLL _Pragma("GCC unroll 64")
#endif

static inline float clip(float x, float lo, float hi) { return x < lo ? lo : x > hi ? hi : x; }

static inline void zero(float* to, int64_t n) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) Vec::set(0.0f).store(to + i);
  for (; i < n; ++i) to[i] = 0.0f;
}

// to[i] = from[i] for i in [0, n): reads and writes nothing else.
static inline void copy(const float* from, int64_t n, float* to) {
  if (n < Vec::kLanes) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + Vec::kLanes < n; i += Vec::kLanes) Vec::load(from + i).store(to + i);
  Vec::load(from + n - Vec::kLanes).store(to + n - Vec::kLanes);
}

// The same of long pieces.
static inline void copy_long(const float* from, int64_t n, float* to) {
  constexpr int kAtOnce = 4;
  int64_t i = 0;
  for (; n - i > kAtOnce * Vec::kLanes; i += kAtOnce * Vec::kLanes) {
    Vec some[kAtOnce];
    TK_UNROLL for (int v = 0; v < kAtOnce; ++v) some[v] = Vec::load(from + i + v * Vec::kLanes);
    TK_UNROLL for (int v = 0; v < kAtOnce; ++v) some[v].store(to + i + v * Vec::kLanes);
  }
  copy(from + i, n - i, to + i);
}

// to[i] = from[i * stride] for i in [0, n). May write more, but nothing at or behind `end`; reads nothing at or behind `limit`.
static inline void copy_strided(const float* from, int64_t stride, int64_t n, float* to, const float* limit, const float* end) {
  int64_t i = 0;
  if (stride <= 2) {
    const int64_t readable = limit - from, writable = end - to;
    for (; i < n && stride * (i + Vec::kLanes) <= readable && i + Vec::kLanes <= writable; i += Vec::kLanes) {
      (stride == 1 ? Vec::load(from + i) : Vec::load_even(from + 2 * i)).store(to + i);
    }
  }
  for (; i < n; ++i) to[i] = from[i * stride];
}
