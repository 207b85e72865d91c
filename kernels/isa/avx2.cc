// AVX2 + FMA: x86-64 since 2013 (Intel) and 2015 (AMD).
#include "../packed.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"
TK_TARGET_BEGIN("avx2,fma")

namespace tk::avx2 {

struct Vec {
  static constexpr int kLanes = 8, kRegisters = 16;
  static constexpr int kTile = 14, kGoodTile = 10;  // vectors of a CSR tile: the most, and as a rule
  static constexpr int kWeights = 1;                // of a register: broadcast
  static constexpr bool kReadsPlanes = false;       // of pointwise convolutions in place

  template <class T>
  static T* in_register(T* p) {
    return p;
  }
  __m256 v;

  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static __m256i first(int32_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  static Vec load_first(const float* p, int32_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  // Lanes p[0], p[2], …; reads p[0 … 15].
  static Vec load_even(const float* p) {
    const __m256 mixed = _mm256_shuffle_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8), 0x88);
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8))};
  }
  // Lanes p[offsets[0]] and so many more, p[offsets[1]] and so many more, and so on.
  template <int kColumns>
  static Vec gather(const float* p, const uint16_t* offsets) {
    if constexpr (kColumns == 1) {
      uint64_t low, high;
      __builtin_memcpy(&low, offsets, 8);
      __builtin_memcpy(&high, offsets + 4, 8);
      return {_mm256_setr_ps(p[low & 0xffff], p[(low >> 16) & 0xffff], p[(low >> 32) & 0xffff], p[low >> 48], p[high & 0xffff],
                             p[(high >> 16) & 0xffff], p[(high >> 32) & 0xffff], p[high >> 48])};
    }
    return {_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + offsets[0])), _mm_loadu_ps(p + offsets[1]), 1)};
  }
  float sum() const {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  // Not by maskstore: microcode on AMD, 40 cycles and more.
  void store_first(float* p, int32_t n) const {
    __m128 part = _mm256_castps256_ps128(v);
    if (n >= 4) {
      _mm_storeu_ps(p, part);
      part = _mm256_extractf128_ps(v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
      part = _mm_movehl_ps(part, part);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, part);
  }
  Vec operator+(const Vec& b) const { return {_mm256_add_ps(v, b.v)}; }
  Vec operator*(const Vec& b) const { return {_mm256_mul_ps(v, b.v)}; }
  Vec operator/(const Vec& b) const { return {_mm256_div_ps(v, b.v)}; }
  // 2^n for n + 1.5 * 2^23, whose low bits are n: -126 … 127.
  static Vec power_of_two(const Vec& shifted) {
    const __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_castps_si256(_mm256_set1_ps(1.0f))))};
  }
  // All bits set in lanes [begin, end), for operator&.
  static Vec mask(int64_t begin, int64_t end) {
    const __m256i from = first(static_cast<int32_t>(begin)), to = first(static_cast<int32_t>(end));
    return {_mm256_castsi256_ps(_mm256_andnot_si256(from, to))};
  }
  Vec operator&(const Vec& b) const { return {_mm256_and_ps(v, b.v)}; }
};

static inline Vec fma(const Vec& a, const Vec& b, const Vec& c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// The operand order lets NaN pass: max and min return their second operand where either is NaN.
static inline Vec clip(const Vec& x, const Vec& lo, const Vec& hi) { return {_mm256_min_ps(hi.v, _mm256_max_ps(lo.v, x.v))}; }

#include "common-inl.h"

// Lane j of vector i goes to lane i of vector j.
static inline void transpose(Vec* m) {
  __m256 pairs[Vec::kLanes], fours[Vec::kLanes];
  TK_UNROLL for (int i = 0; i < Vec::kLanes; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(m[i].v, m[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(m[i].v, m[i + 1].v);
  }
  TK_UNROLL for (int i = 0; i < Vec::kLanes; i += 4) {
    TK_UNROLL for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  }
  TK_UNROLL for (int i = 0; i < Vec::kLanes / 2; ++i) {
    m[i].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    m[i + 4].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

#include "end-inl.h"

}  // namespace tk::avx2

TK_TARGET_END

namespace tk {
static constexpr Isa isa = avx2::describe("avx2", 20, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); });
extern const Isa* const isa_avx2;
const Isa* const isa_avx2 = &isa;
}  // namespace tk
#else
namespace tk {
extern const Isa* const isa_avx2;
const Isa* const isa_avx2 = nullptr;
}  // namespace tk
#endif
