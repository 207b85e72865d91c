// Plain C++: always there, and the reference of every other ISA. Its 16 "lanes" give it the exact tiling of AVX-512.
#include "../packed.h"

namespace tk::scalar {

struct Vec {
  static constexpr int kLanes = 16, kRegisters = 16;
  static constexpr int kTile = 14, kGoodTile = 10;  // vectors of a CSR tile: the most, and as a rule
  static constexpr int kWeights = 1;                // of a register: broadcast
  static constexpr bool kReadsPlanes = true;        // of pointwise convolutions in place

  template <class T>
  static T* in_register(T* p) {
    return p;
  }
  float lane[kLanes];

  static Vec set(float x) {
    Vec r;
    for (float& lane : r.lane) lane = x;
    return r;
  }
  static Vec load_first(const float* p, int32_t n) {
    Vec r{};
    for (int i = 0; i < n; ++i) r.lane[i] = p[i];
    return r;
  }
  static Vec load(const float* p) { return load_first(p, kLanes); }
  // Lanes p[0], p[2], …; reads p[0 … 2 * kLanes - 2].
  static Vec load_even(const float* p) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = p[2 * i];
    return r;
  }
  // Lanes p[offsets[0]] and so many more, p[offsets[1]] and so many more, and so on.
  template <int kColumns>
  static Vec gather(const float* p, const uint16_t* offsets) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = p[offsets[i / kColumns] + i % kColumns];
    return r;
  }
  float sum() const {
    float total = 0;
    for (const float x : lane) total += x;
    return total;
  }
  void store_first(float* p, int32_t n) const {
    for (int i = 0; i < n; ++i) p[i] = lane[i];
  }
  void store(float* p) const { store_first(p, kLanes); }
  Vec operator+(const Vec& b) const {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = lane[i] + b.lane[i];
    return r;
  }
  Vec operator*(const Vec& b) const {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = lane[i] * b.lane[i];
    return r;
  }
  Vec operator/(const Vec& b) const {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = lane[i] / b.lane[i];
    return r;
  }
  // 2^n for n + 1.5 * 2^23, whose low bits are n: -126 … 127.
  static Vec power_of_two(const Vec& shifted) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, &shifted.lane[i], sizeof(bits));
      bits = (bits << 23) + 0x3f800000;
      __builtin_memcpy(&r.lane[i], &bits, sizeof(bits));
    }
    return r;
  }
  // Ones in lanes [begin, end), for operator&.
  static Vec mask(int64_t begin, int64_t end) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = i >= begin && i < end ? 1.0f : 0.0f;
    return r;
  }
  Vec operator&(const Vec& b) const {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = b.lane[i] != 0.0f ? lane[i] : 0.0f;
    return r;
  }
};

static inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  Vec r;
  for (int i = 0; i < Vec::kLanes; ++i) r.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
  return r;
}

static inline Vec clip(const Vec& x, const Vec& lo, const Vec& hi) {
  Vec r;
  for (int i = 0; i < Vec::kLanes; ++i) r.lane[i] = x.lane[i] < lo.lane[i] ? lo.lane[i] : x.lane[i] > hi.lane[i] ? hi.lane[i] : x.lane[i];
  return r;
}

#include "common-inl.h"

// Lane j of vector i goes to lane i of vector j.
static inline void transpose(Vec* m) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float swapped = m[i].lane[j];
      m[i].lane[j] = m[j].lane[i];
      m[j].lane[i] = swapped;
    }
  }
}

#include "end-inl.h"

}  // namespace tk::scalar

namespace tk {
static constexpr Isa isa = scalar::describe("scalar", 0, [] { return true; });
extern const Isa* const isa_scalar;
const Isa* const isa_scalar = &isa;
}  // namespace tk
