// NEON with half-precision arithmetic (FEAT_FP16, since Armv8.2: Cortex-A55 and A76, Apple A11): convolutions multiply and add halves, eight at
// a time. It loses digits (ticketkit.h), so it runs only where it is asked for.
#include "../packed.h"

#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "target.h"
TK_TARGET_BEGIN("arch=armv8.2-a+fp16")

namespace tk::neon_fp16 {

// As many floats as a register has halves: two registers.
struct Vec {
  static constexpr int kLanes = 8, kRegisters = 16;
  static constexpr int kTile = 20, kGoodTile = 20;  // vectors of halves of a CSR tile: the most, and as a rule
  static constexpr int kWeights = 1;                // of a register: broadcast
  static constexpr bool kReadsPlanes = false;       // of pointwise convolutions in place: they become halves

  float32x4_t low, high;

  template <class T>
  static T* in_register(T* p) {
    return p;
  }
  static Vec set(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static Vec load_first(const float* p, int32_t n) {
    float lanes[kLanes] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  // Lanes p[0], p[2], …; reads p[0 … 15].
  static Vec load_even(const float* p) {
    return {vuzp1q_f32(vld1q_f32(p), vld1q_f32(p + 4)), vuzp1q_f32(vld1q_f32(p + 8), vld1q_f32(p + 12))};
  }
  // Lanes p[offsets[0]] and so many more, p[offsets[1]] and so many more, and so on.
  template <int kColumns>
  static Vec gather(const float* p, const uint16_t* offsets) {
    if constexpr (kColumns == 1) return {gather_four(p, offsets), gather_four(p, offsets + 4)};
    return {vld1q_f32(p + offsets[0]), vld1q_f32(p + offsets[1])};
  }
  static float32x4_t gather_four(const float* p, const uint16_t* offsets) {
    float32x4_t lanes = vld1q_dup_f32(p + offsets[0]);
    lanes = vld1q_lane_f32(p + offsets[1], lanes, 1);
    lanes = vld1q_lane_f32(p + offsets[2], lanes, 2);
    return vld1q_lane_f32(p + offsets[3], lanes, 3);
  }
  float sum() const { return vaddvq_f32(vaddq_f32(low, high)); }
  void store(float* p) const {
    vst1q_f32(p, low);
    vst1q_f32(p + 4, high);
  }
  void store_first(float* p, int32_t n) const {
    float lanes[kLanes];
    store(lanes);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
  Vec operator+(const Vec& b) const { return {vaddq_f32(low, b.low), vaddq_f32(high, b.high)}; }
  Vec operator*(const Vec& b) const { return {vmulq_f32(low, b.low), vmulq_f32(high, b.high)}; }
  Vec operator/(const Vec& b) const { return {vdivq_f32(low, b.low), vdivq_f32(high, b.high)}; }
  // 2^n for n + 1.5 * 2^23, whose low bits are n: -126 … 127.
  static Vec power_of_two(const Vec& shifted) { return {powers(shifted.low), powers(shifted.high)}; }
  static float32x4_t powers(float32x4_t shifted) {
    const uint32x4_t bits = vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23);
    return vreinterpretq_f32_u32(vaddq_u32(bits, vreinterpretq_u32_f32(vdupq_n_f32(1.0f))));
  }
  // All bits set in lanes [begin, end), for operator&.
  static Vec mask(int64_t begin, int64_t end) {
    uint32_t lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = i >= begin && i < end ? ~0u : 0u;
    return {vreinterpretq_f32_u32(vld1q_u32(lanes)), vreinterpretq_f32_u32(vld1q_u32(lanes + 4))};
  }
  Vec operator&(const Vec& b) const { return {both(low, b.low), both(high, b.high)}; }
  static float32x4_t both(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
  }
};

static inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
static inline float32x4_t clip_four(float32x4_t x, float32x4_t lo, float32x4_t hi) { return vminq_f32(vmaxq_f32(x, lo), hi); }
static inline Vec clip(const Vec& x, const Vec& lo, const Vec& hi) {
  return {clip_four(x.low, lo.low, hi.low), clip_four(x.high, lo.high, hi.high)};
}

// A vector of halves, for the inner loops of convolutions. Weights must be in the first 16 registers, so two of the 32 are left to the compiler.
struct Half {
  static constexpr int kLanes = 8, kRegisters = 30, kWeights = 4;
  using Value = float16_t;
  float16x8_t v;

  // The address itself, not the sum of two registers: only from one does a load fetch two vectors at once.
  template <class T>
  static T* in_register(T* p) {
    __asm__("" : "+r"(p));
    return p;
  }
  static Half set(float x) { return {vdupq_n_f16(static_cast<Value>(x))}; }
  static Half load(const Value* p) { return {vld1q_f16(p)}; }
  // The first N weights in lanes 0 … N - 1, for fma_lane.
  template <int N>
  static Half load_weights(const Value* p) {
    if constexpr (N == 1) return {vld1q_dup_f16(p)};
    const float16x4_t four = N == 2 ? vreinterpret_f16_u32(vld1_dup_u32(reinterpret_cast<const uint32_t*>(p))) : vld1_f16(p);
    return {vcombine_f16(four, vdup_n_f16(0))};
  }
  static Half fma_lane(const Half& a, int lane, const Half& b, const Half& c) {
    switch (lane) {  // a constant where loops are unrolled
      case 0:
        return {vfmaq_laneq_f16(c.v, b.v, a.v, 0)};
      case 1:
        return {vfmaq_laneq_f16(c.v, b.v, a.v, 1)};
      case 2:
        return {vfmaq_laneq_f16(c.v, b.v, a.v, 2)};
      default:
        return {vfmaq_laneq_f16(c.v, b.v, a.v, 3)};
    }
  }
  Half operator+(const Half& b) const { return {vaddq_f16(v, b.v)}; }
  Vec widened() const { return {vcvt_f32_f16(vget_low_f16(v)), vcvt_high_f32_f16(v)}; }
  static void narrow(const Vec& from, Value* to) { vst1q_f16(to, vcvt_high_f16_f32(vcvt_f16_f32(from.low), from.high)); }
};

#include "common-inl.h"

static inline void transpose_four(Vec* m, float32x4_t Vec::*part) {
  const float32x4x2_t low = vtrnq_f32(m[0].*part, m[1].*part), high = vtrnq_f32(m[2].*part, m[3].*part);
  TK_UNROLL for (int i = 0; i < 2; ++i) {
    m[i].*part = vcombine_f32(vget_low_f32(low.val[i]), vget_low_f32(high.val[i]));
    m[i + 2].*part = vcombine_f32(vget_high_f32(low.val[i]), vget_high_f32(high.val[i]));
  }
}

// Lane j of vector i goes to lane i of vector j.
static inline void transpose(Vec* m) {
  TK_UNROLL for (int i = 0; i < 4; ++i) {
    const float32x4_t high = m[i].high;
    m[i].high = m[i + 4].low;
    m[i + 4].low = high;
  }
  TK_UNROLL for (int i = 0; i < Vec::kLanes; i += 4) {
    transpose_four(m + i, &Vec::low);
    transpose_four(m + i, &Vec::high);
  }
}

#define TK_HALVES
#include "end-inl.h"
#undef TK_HALVES

}  // namespace tk::neon_fp16

TK_TARGET_END

namespace tk {

static bool has_fp16() {
#if defined(__linux__)
  constexpr unsigned long kScalar = 1ul << 9, kVector = 1ul << 10;  // HWCAP_FPHP, HWCAP_ASIMDHP
  return (getauxval(AT_HWCAP) & (kScalar | kVector)) == (kScalar | kVector);
#elif defined(__APPLE__)
  int32_t has = 0;
  size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_FP16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}

static constexpr Isa isa = neon_fp16::describe("neon_fp16", 25, has_fp16);
extern const Isa* const isa_neon_fp16;
const Isa* const isa_neon_fp16 = &isa;
}  // namespace tk
#else
namespace tk {
extern const Isa* const isa_neon_fp16;
const Isa* const isa_neon_fp16 = nullptr;
}  // namespace tk
#endif
