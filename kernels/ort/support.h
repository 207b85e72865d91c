// What the operators need of ONNX Runtime in a C++ shape: errors across the boundary, tensors, attributes, aligned memory.
#ifndef TICKETKIT_ORT_SUPPORT_H_
#define TICKETKIT_ORT_SUPPORT_H_

#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "../ticketkit.h"
#include "ort_abi.h"

namespace tk::ort {

// What a callback throws inside; turned into a Status at its boundary.
struct Error {
  ErrorCode code;
  std::string text;
};

[[noreturn]] inline void fail(ErrorCode code, std::string text) { throw Error{code, std::move(text)}; }

inline void check(const Api* api, Status* status) {
  if (!status) return;
  std::string text = error_message(api, status);
  release_status(api, status);
  fail(kFail, std::move(text));
}

template <class F>
Status* guarded(const Api* api, F body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Error& e) {
    return create_status(api, e.code, e.text.c_str());
  } catch (const std::bad_alloc&) {
    return create_status(api, kFail, "ticketkit: out of memory");
  } catch (...) {
    return create_status(api, kFail, "ticketkit: unexpected failure");
  }
}

// Memory on a TK_ALIGNMENT boundary.
class Buffer {
 public:
  explicit Buffer(size_t bytes = 0) { grow(bytes); }
  void* data() const { return data_.get(); }
  void grow(size_t bytes) {
    if (bytes <= size_) return;
    const size_t rounded = (bytes + TK_ALIGNMENT - 1) / TK_ALIGNMENT * TK_ALIGNMENT;
    data_.reset(std::aligned_alloc(TK_ALIGNMENT, rounded));
    size_ = data_ ? rounded : 0;
    if (!data_) throw std::bad_alloc();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

struct Tensor {
  const void* data = nullptr;
  std::vector<int64_t> shape;
  ElementType type = kFloat;

  int64_t count() const {
    int64_t n = 1;
    for (const int64_t d : shape) n *= d;
    return n;
  }
};

inline Tensor read(const Api* api, const Value* value) {
  TensorInfo* info = nullptr;
  check(api, tensor_info(api, value, &info));
  const auto release = [api](TensorInfo* p) { release_tensor_info(api, p); };
  const std::unique_ptr<TensorInfo, decltype(release)> owner(info, release);
  Tensor t;
  size_t rank = 0;
  check(api, dimension_count(api, info, &rank));
  t.shape.resize(rank);
  check(api, dimensions(api, info, t.shape.data(), rank));
  check(api, element_type(api, info, &t.type));
  void* data = nullptr;
  check(api, tensor_data(api, const_cast<Value*>(value), &data));
  t.data = data;
  return t;
}

inline std::string text(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? "," : "") + std::to_string(shape[i]);
  return s + "]";
}

inline std::vector<int64_t> ints(const Api* api, const KernelInfo* info, const char* name, size_t expected) {
  size_t size = 0;
  if (Status* status = attribute_ints(api, info, name, nullptr, &size)) release_status(api, status);
  if (size != expected)
    fail(kInvalidGraph, std::string(name) + ": expected " + std::to_string(expected) + " integers, got " + std::to_string(size));
  std::vector<int64_t> values(size);
  check(api, attribute_ints(api, info, name, values.data(), &size));
  return values;
}

inline bool has_ints(const Api* api, const KernelInfo* info, const char* name) {
  size_t size = 0;
  if (Status* status = attribute_ints(api, info, name, nullptr, &size)) release_status(api, status);
  return size > 0;
}

}  // namespace tk::ort

#endif  // TICKETKIT_ORT_SUPPORT_H_
