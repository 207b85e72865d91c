// A file of `ticketkit export` in ONNX Runtime from C++: with ticketkit's operators, without them, and what differs.
//
//   c++ -std=c++17 run.cc -o run -ldl
//   ./run libonnxruntime.so libticketkit.so MODEL.onnx
//
// `python -c 'import ticketkit; print(ticketkit.get_library_path())'` tells where libticketkit is. With ONNX Runtime's own headers (its release
// archives have them, no package registry does) all that is particular to ticketkit is
//
//   options.AddConfigEntry("ai.ticketkit.threads", "1");  // the number given to SetIntraOpNumThreads; without this line one for each core
//   options.RegisterCustomOpsLibrary("libticketkit.so");
//
// Here the same calls go through the slots of ONNX Runtime's stable C ABI, as in ort/ort_abi.h, so that the program builds anywhere.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ort/ort_abi.h"

namespace {

using tk::ort::Api;
using tk::ort::ApiBase;
using tk::ort::ElementType;
using tk::ort::SessionOptions;
using tk::ort::Status;
using tk::ort::TensorInfo;
using tk::ort::Value;
struct Env;
struct Session;
struct RunOptions;
struct Allocator;
struct MemoryInfo;
struct TypeInfo;

const Api* api = nullptr;

void check(Status* status) {
  if (!status) return;
  const std::string text = tk::ort::error_message(api, status);
  tk::ort::release_status(api, status);
  throw std::runtime_error(text);
}

// CALL(slot number, name, arguments …): a typed call that throws what ONNX Runtime says.
#define CALL(number, name, arguments)                                      \
  template <class... A>                                                    \
  void name(A... a) {                                                      \
    check(reinterpret_cast<Status*(*)arguments>(api->slot[number])(a...)); \
  }
CALL(3, create_env, (int severity, const char* log_id, Env**))
CALL(7, create_session, (const Env*, const char* path, const SessionOptions*, Session**))
CALL(9, run,
     (Session*, const RunOptions*, const char* const* inputs, const Value* const*, size_t, const char* const* outputs, size_t, Value**))
CALL(10, create_options, (SessionOptions**))
CALL(24, set_threads, (SessionOptions*, int))
CALL(33, input_type, (const Session*, size_t, TypeInfo**))
CALL(36, input_name, (const Session*, size_t, Allocator*, char**))
CALL(37, output_name, (const Session*, size_t, Allocator*, char**))
CALL(49, wrap, (const MemoryInfo*, void* data, size_t bytes, const int64_t* shape, size_t rank, ElementType, Value**))
CALL(51, data_of, (Value*, void**))
CALL(55, tensor_of, (const TypeInfo*, const TensorInfo**))
CALL(61, rank_of, (const TensorInfo*, size_t*))
CALL(62, shape_of, (const TensorInfo*, int64_t*, size_t))
CALL(64, count_of, (const TensorInfo*, size_t*))
CALL(65, info_of, (const Value*, TensorInfo**))
CALL(69, cpu_memory, (int allocator, int type, MemoryInfo**))
CALL(76, free_with, (Allocator*, void*))
CALL(78, default_allocator, (Allocator**))
CALL(130, set_config, (SessionOptions*, const char* key, const char* value))
CALL(228, register_library, (SessionOptions*, const char* path))
#undef CALL

template <class T, int slot>
struct Release {
  void operator()(T* p) const { reinterpret_cast<void (*)(T*)>(api->slot[slot])(p); }
};
template <class T, int slot>
using Owned = std::unique_ptr<T, Release<T, slot>>;

// A session of one thread for a model with one input and one output.
class Model {
 public:
  // `library`: libticketkit, or null for a stock session.
  Model(const Env* env, const char* path, const char* library) {
    SessionOptions* made = nullptr;
    create_options(&made);
    const Owned<SessionOptions, 100> options(made);
    set_threads(made, 1);
    if (library) {
      set_config(made, "ai.ticketkit.threads", "1");
      register_library(made, library);
    }
    Session* session = nullptr;
    try {
      create_session(env, path, made, &session);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(std::string(library ? "sparse" : "stock") + " session: " + error.what());
    }
    session_.reset(session);

    MemoryInfo* memory = nullptr;
    cpu_memory(1, 0, &memory);
    memory_.reset(memory);
    Allocator* allocator = nullptr;
    default_allocator(&allocator);
    char* name = nullptr;
    input_name(session, size_t{0}, allocator, &name);
    input_ = name;
    free_with(allocator, name);
    output_name(session, size_t{0}, allocator, &name);
    output_ = name;
    free_with(allocator, name);

    TypeInfo* type = nullptr;
    input_type(session, size_t{0}, &type);
    const Owned<TypeInfo, 98> owner(type);
    const TensorInfo* tensor = nullptr;
    tensor_of(type, &tensor);
    size_t rank = 0;
    rank_of(tensor, &rank);
    shape_.resize(rank);
    shape_of(tensor, shape_.data(), rank);
    for (int64_t& size : shape_) size = std::max<int64_t>(size, 1);  // a free dimension, such as the batch, is 1 here
  }

  size_t input_count() const {
    size_t count = 1;
    for (const int64_t size : shape_) count *= static_cast<size_t>(size);
    return count;
  }

  std::vector<float> operator()(std::vector<float>& x) const {
    Value *input = nullptr, *output = nullptr;
    wrap(memory_.get(), x.data(), x.size() * sizeof(float), shape_.data(), shape_.size(), tk::ort::kFloat, &input);
    const Owned<Value, 96> input_owner(input);
    const char *const inputs[] = {input_.c_str()}, *const outputs[] = {output_.c_str()};
    run(session_.get(), nullptr, inputs, &input, size_t{1}, outputs, size_t{1}, &output);
    const Owned<Value, 96> output_owner(output);
    TensorInfo* info = nullptr;
    info_of(output, &info);
    const Owned<TensorInfo, 99> info_owner(info);
    size_t count = 0;
    count_of(info, &count);
    void* data = nullptr;
    data_of(output, &data);
    return std::vector<float>(static_cast<float*>(data), static_cast<float*>(data) + count);
  }

 private:
  Owned<Session, 95> session_;
  Owned<MemoryInfo, 94> memory_;
  std::string input_, output_;
  std::vector<int64_t> shape_;
};

// Median of 11 runs in milliseconds.
double milliseconds(const Model& model, std::vector<float>& x) {
  std::vector<double> times(11);
  for (double& time : times) {
    const auto start = std::chrono::steady_clock::now();
    model(x);
    time = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void report(const char* name, const std::vector<float>& y, double time) {
  std::printf("%s:", name);
  for (const float value : y) std::printf(" %.9g", static_cast<double>(value));
  std::printf("\n%s takes %.3g ms\n", name, time);
}

void compare(const char* runtime, const char* library, const char* path) {
  void* const handle = dlopen(runtime, RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(dlerror());
  const auto base = reinterpret_cast<const ApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
  api = base ? base()->get_api(tk::ort::kApiVersion) : nullptr;
  if (!api) throw std::runtime_error(std::string(runtime) + ": expected ONNX Runtime 1.18 or newer");
  Env* made = nullptr;
  create_env(3, "ticketkit", &made);  // 3: errors only
  const Owned<Env, 92> env(made);

  const Model sparse(made, path, library), stock(made, path, nullptr);
  std::vector<float> x(sparse.input_count());
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(static_cast<uint32_t>(i) * 2654435761u / 4294967296.0 - 0.5);
  const std::vector<float> y = sparse(x), expected = stock(x);
  report("sparse", y, milliseconds(sparse, x));
  report("stock", expected, milliseconds(stock, x));
  float largest = 0, scale = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    largest = std::max(largest, std::fabs(y[i] - expected[i]));
    scale = std::max(scale, std::fabs(expected[i]));
  }
  std::printf("largest difference: %.3g\n", static_cast<double>(largest));
  if (!(largest <= 1e-3f * scale)) throw std::runtime_error("the two differ by more than rounding explains");
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) {
    std::fprintf(stderr, "usage: run libonnxruntime.so libticketkit.so MODEL.onnx\n");
    return 2;
  }
  try {
    compare(words[1], words[2], words[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
