// What the fuzz targets make of their bytes: sizes that are mostly small and fitting, at times anything at all.
#ifndef TICKETKIT_FUZZ_INPUT_H_
#define TICKETKIT_FUZZ_INPUT_H_

#include <fuzzer/FuzzedDataProvider.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace tk::fuzz {

// Ends the process, as a finding, with the condition in words.
#define TK_REQUIRE(condition)                                                      \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (false)

class Input {
 public:
  Input(const uint8_t* bytes, size_t size) : data_(bytes, size) {}

  bool flip() { return data_.ConsumeBool(); }
  bool rarely() { return data_.ConsumeIntegralInRange(0, 31) == 31; }
  int64_t within(int64_t low, int64_t high) { return data_.ConsumeIntegralInRange(low, high); }
  size_t left() { return data_.remaining_bytes(); }

  // `usual`, rarely a size at the edge of what is allowed, or any number.
  int64_t size(int64_t usual) {
    constexpr int64_t kEdges[] = {-1, 0, 1, 2, 1 << 16, 1 << 24, (1 << 24) + 1, INT32_MAX, int64_t{INT32_MAX} + 1, INT64_MAX, INT64_MIN};
    if (!rarely()) return usual;
    return flip() ? data_.PickValueInArray(kEdges) : data_.ConsumeIntegral<int64_t>();
  }

  // Finite and small, rarely any four bytes.
  float number() {
    if (!rarely()) return static_cast<float>(data_.ConsumeIntegral<int8_t>()) / 16.0f;
    const uint32_t bits = data_.ConsumeIntegral<uint32_t>();
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  std::vector<float> numbers(size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = number();
    return values;
  }

  // Steps from position to position, mostly of less than 16: gap-coded weights (tk_gaps_decode).
  std::vector<uint16_t> gaps(size_t count) {
    std::vector<uint16_t> steps(count);
    for (uint16_t& step : steps) step = rarely() ? data_.ConsumeIntegral<uint16_t>() : data_.ConsumeIntegralInRange<uint16_t>(1, 15);
    return steps;
  }

 private:
  FuzzedDataProvider data_;
};

}  // namespace tk::fuzz

#endif  // TICKETKIT_FUZZ_INPUT_H_
