// A layer of a bundle with its input, ready for the engines: each computes the same output in its own way.
#ifndef TICKETKIT_DEVICE_JOB_H_
#define TICKETKIT_DEVICE_JOB_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "bundle.h"

namespace tk::device {

// Zeroed memory on a TK_ALIGNMENT boundary.
template <class T>
class Aligned {
 public:
  explicit Aligned(size_t count = 0, size_t slack = 0) : count_(count) {
    constexpr size_t kAlignment = TK_ALIGNMENT;
    const size_t bytes = (count + slack + 1) * sizeof(T);
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment)) throw std::bad_alloc();
    data_.reset(static_cast<T*>(memory));
    for (size_t i = 0; i < count + slack; ++i) data_.get()[i] = T{};
  }
  T* data() const { return data_.get(); }
  size_t size() const { return count_; }
  T& operator[](size_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  size_t count_;
};

struct Job {
  const BundleLayer& layer;
  Aligned<float> x, residual;  // in planes; the residual is empty where the layer has none
};

// One engine on one layer. `run` is what is timed; `y` then gives the output in planes, [batch, out_channels, out_h, out_w].
struct Engine {
  std::function<void()> run;
  std::function<std::vector<float>()> y;
  std::string format;      // what the weights are packed in
  bool residual = true;    // whether it adds the residual
  bool half = false;       // whether it computes in half precision
  bool activation = true;  // whether it applies more than the clip
};

inline float activated(float value, int32_t activation, float slope) {
  switch (activation) {
    case TK_LEAKY_RELU:
      return value < 0 ? slope * value : value;
    case TK_HARD_SWISH:
      return value * std::fmin(std::fmax(value / 6 + 0.5f, 0.0f), 1.0f);
    case TK_SILU:
      return value / (1 + std::exp(-value));
    default:
      return value;
  }
}

// Each makes an engine, or returns one without `run` where it does not take such a layer. They throw std::runtime_error.
Engine sparse_engine(const Job& job, int32_t isa);
Engine dense_engine(const Job& job);
Engine xnnpack_dense_engine(const Job& job);   // of xnnpack.cc, in builds with it only
Engine xnnpack_sparse_engine(const Job& job);  // the same; pointwise layers of stride 1

}  // namespace tk::device

#endif  // TICKETKIT_DEVICE_JOB_H_
