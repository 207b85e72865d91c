// NEON (Advanced SIMD): part of every AArch64 processor.
#include "../packed.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace tk::neon {

struct Vec {
  static constexpr int kLanes = 4, kRegisters = 32;
  static constexpr int kTile = 20, kGoodTile = 20;  // vectors of a CSR tile: the most, and as a rule
  static constexpr int kWeights = 4;                // of a register: multiplied by lane
  static constexpr bool kReadsPlanes = true;        // of pointwise convolutions in place
  float32x4_t v;

  static Vec set(float x) { return {vdupq_n_f32(x)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load_first(const float* p, int32_t n) {
    float lanes[kLanes] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  // Lanes p[0], p[2], …; reads p[0 … 7].
  static Vec load_even(const float* p) { return {vuzp1q_f32(vld1q_f32(p), vld1q_f32(p + 4))}; }
  // Lanes p[offsets[0]] and so many more, p[offsets[1]] and so many more, and so on.
  template <int kColumns>
  static Vec gather(const float* p, const uint16_t* offsets) {
    if constexpr (kColumns == 1) {
      float32x4_t lanes = vld1q_dup_f32(p + offsets[0]);
      lanes = vld1q_lane_f32(p + offsets[1], lanes, 1);
      lanes = vld1q_lane_f32(p + offsets[2], lanes, 2);
      return {vld1q_lane_f32(p + offsets[3], lanes, 3)};
    }
    return load(p + offsets[0]);
  }
  // The address itself, not the sum of two registers: only from one does a load fetch two vectors at once.
  template <class T>
  static T* in_register(T* p) {
    __asm__("" : "+r"(p));
    return p;
  }
  // The first N weights in lanes 0 … N - 1, for fma_lane.
  template <int N>
  static Vec load_weights(const float* p) {
    if constexpr (N == 1) return {vld1q_dup_f32(p)};
    return load(p);
  }
  static Vec fma_lane(const Vec& a, int lane, const Vec& b, const Vec& c) { return {vfmaq_n_f32(c.v, b.v, a.v[lane])}; }
  float sum() const { return vaddvq_f32(v); }
  void store(float* p) const { vst1q_f32(p, v); }
  void store_first(float* p, int32_t n) const {
    float lanes[kLanes];
    store(lanes);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
  Vec operator+(const Vec& b) const { return {vaddq_f32(v, b.v)}; }
  Vec operator*(const Vec& b) const { return {vmulq_f32(v, b.v)}; }
  Vec operator/(const Vec& b) const { return {vdivq_f32(v, b.v)}; }
  // 2^n for n + 1.5 * 2^23, whose low bits are n: -126 … 127.
  static Vec power_of_two(const Vec& shifted) {
    const uint32x4_t bits = vshlq_n_u32(vreinterpretq_u32_f32(shifted.v), 23);
    return {vreinterpretq_f32_u32(vaddq_u32(bits, vreinterpretq_u32_f32(vdupq_n_f32(1.0f))))};
  }
  // All bits set in lanes [begin, end), for operator&.
  static Vec mask(int64_t begin, int64_t end) {
    uint32_t lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = i >= begin && i < end ? ~0u : 0u;
    return {vreinterpretq_f32_u32(vld1q_u32(lanes))};
  }
  Vec operator&(const Vec& b) const { return {vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vreinterpretq_u32_f32(b.v)))}; }
};

static inline Vec fma(const Vec& a, const Vec& b, const Vec& c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
static inline Vec clip(const Vec& x, const Vec& lo, const Vec& hi) { return {vminq_f32(vmaxq_f32(x.v, lo.v), hi.v)}; }

#include "common-inl.h"

// Lane j of vector i goes to lane i of vector j.
static inline void transpose(Vec* m) {
  const float32x4x2_t low = vtrnq_f32(m[0].v, m[1].v), high = vtrnq_f32(m[2].v, m[3].v);
  TK_UNROLL for (int i = 0; i < 2; ++i) {
    m[i].v = vcombine_f32(vget_low_f32(low.val[i]), vget_low_f32(high.val[i]));
    m[i + 2].v = vcombine_f32(vget_high_f32(low.val[i]), vget_high_f32(high.val[i]));
  }
}

#include "end-inl.h"

}  // namespace tk::neon

namespace tk {
static constexpr Isa isa = neon::describe("neon", 20, [] { return true; });
extern const Isa* const isa_neon;
const Isa* const isa_neon = &isa;
}  // namespace tk
#else
namespace tk {
extern const Isa* const isa_neon;
const Isa* const isa_neon = nullptr;
}  // namespace tk
#endif
