// AVX-512F: Intel servers since 2017, AMD since Zen 4.
#include "../packed.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own avx512fintrin.h trips them (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "target.h"
TK_TARGET_BEGIN("avx512f")

namespace tk::avx512 {

struct Vec {
  static constexpr int kLanes = 16, kRegisters = 32;
  static constexpr int kTile = 14, kGoodTile = 10;  // vectors of a CSR tile: the most, and as a rule
  static constexpr int kWeights = 1;                // of a register: broadcast
  static constexpr bool kReadsPlanes = false;       // of pointwise convolutions in place

  template <class T>
  static T* in_register(T* p) {
    return p;
  }
  __m512 v;

  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static __mmask16 first(int32_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static Vec load_first(const float* p, int32_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  // Lanes p[0], p[2], …; reads p[0 … 31].
  static Vec load_even(const float* p) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return {_mm512_permutex2var_ps(_mm512_loadu_ps(p), even, _mm512_loadu_ps(p + 16))};
  }
  // Lanes p[offsets[0]] and so many more, p[offsets[1]] and so many more, and so on.
  template <int kColumns>
  static Vec gather(const float* p, const uint16_t* offsets) {
    if constexpr (kColumns == 1) {
      return {_mm512_i32gather_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(offsets))), p, 4)};
    }
    const __m512 one = _mm512_castps128_ps512(_mm_loadu_ps(p + offsets[0]));
    const __m512 two = _mm512_insertf32x4(one, _mm_loadu_ps(p + offsets[1]), 1);
    const __m512 three = _mm512_insertf32x4(two, _mm_loadu_ps(p + offsets[2]), 2);
    return {_mm512_insertf32x4(three, _mm_loadu_ps(p + offsets[3]), 3)};
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_first(float* p, int32_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  Vec operator+(const Vec& b) const { return {_mm512_add_ps(v, b.v)}; }
  Vec operator*(const Vec& b) const { return {_mm512_mul_ps(v, b.v)}; }
  Vec operator/(const Vec& b) const { return {_mm512_div_ps(v, b.v)}; }
  // 2^n for n + 1.5 * 2^23, whose low bits are n: -126 … 127.
  static Vec power_of_two(const Vec& shifted) {
    const __m512i bits = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_castps_si512(_mm512_set1_ps(1.0f))))};
  }
  // All bits set in lanes [begin, end), for operator&.
  static Vec mask(int64_t begin, int64_t end) {
    const __mmask16 lanes = static_cast<__mmask16>(first(static_cast<int32_t>(end)) & ~first(static_cast<int32_t>(begin)));
    return {_mm512_castsi512_ps(_mm512_maskz_set1_epi32(lanes, -1))};
  }
  Vec operator&(const Vec& b) const { return {_mm512_castsi512_ps(_mm512_and_epi32(_mm512_castps_si512(v), _mm512_castps_si512(b.v)))}; }
};

static inline Vec fma(const Vec& a, const Vec& b, const Vec& c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The operand order lets NaN pass: max and min return their second operand where either is NaN.
static inline Vec clip(const Vec& x, const Vec& lo, const Vec& hi) { return {_mm512_min_ps(hi.v, _mm512_max_ps(lo.v, x.v))}; }

#include "common-inl.h"

// Lane j of vector i goes to lane i of vector j.
static inline void transpose(Vec* m) {
  __m512 pairs[Vec::kLanes], fours[Vec::kLanes], eights[Vec::kLanes];
  TK_UNROLL for (int i = 0; i < Vec::kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(m[i].v, m[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(m[i].v, m[i + 1].v);
  }
  TK_UNROLL for (int i = 0; i < Vec::kLanes; i += 4) {
    TK_UNROLL for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      fours[i + 2 * j + 1] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  }
  TK_UNROLL for (int i = 0; i < 4; ++i) {
    TK_UNROLL for (int j = 0; j < Vec::kLanes; j += 8) {
      eights[i + j] = _mm512_shuffle_f32x4(fours[i + j], fours[i + j + 4], 0x88);
      eights[i + j + 4] = _mm512_shuffle_f32x4(fours[i + j], fours[i + j + 4], 0xdd);
    }
  }
  TK_UNROLL for (int i = 0; i < 8; ++i) {
    m[i].v = _mm512_shuffle_f32x4(eights[i], eights[i + 8], 0x88);
    m[i + 8].v = _mm512_shuffle_f32x4(eights[i], eights[i + 8], 0xdd);
  }
}

#include "end-inl.h"

}  // namespace tk::avx512

TK_TARGET_END

namespace tk {
static constexpr Isa isa = avx512::describe("avx512", 30, [] { return __builtin_cpu_supports("avx512f") != 0; });
extern const Isa* const isa_avx512;
const Isa* const isa_avx512 = &isa;
}  // namespace tk
#else
namespace tk {
extern const Isa* const isa_avx512;
const Isa* const isa_avx512 = nullptr;
}  // namespace tk
#endif
