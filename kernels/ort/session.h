// ONNX Runtime for programs: its library through dlopen, and sessions of one float input, by the slots of ort_abi.h. Nothing is linked.
#ifndef TICKETKIT_ORT_SESSION_H_
#define TICKETKIT_ORT_SESSION_H_

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace tk::ort {

// The runtime of one library, kept to the end of the process. Throws std::runtime_error, as everything here, with what to do about it.
class Runtime {
 public:
  explicit Runtime(const std::string& library) {
    void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) throw std::runtime_error(dlerror());
    const auto base = reinterpret_cast<const ApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
    if (!base) throw std::runtime_error(library + ": expected libonnxruntime, but it has no OrtGetApiBase");
    version_ = base()->get_version_string();
    api_ = base()->get_api(kApiVersion);
    if (!api_) throw std::runtime_error(library + ": expected ONNX Runtime 1.18 or newer, got " + version_);
    check(create_env(api_, 3, "ticketkit", &env_));  // 3: errors only
  }
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;
  ~Runtime() { release_env(api_, env_); }

  const Api* api() const { return api_; }
  const Env* env() const { return env_; }
  const std::string& version() const { return version_; }

  void check(Status* status) const {
    if (!status) return;
    const std::string text = error_message(api_, status);
    release_status(api_, status);
    throw std::runtime_error(text);
  }

 private:
  const Api* api_ = nullptr;
  Env* env_ = nullptr;
  std::string version_;
};

// Something ONNX Runtime made, given back by `release`, one of the calls of ort_abi.h.
template <class T>
class Owned {
 public:
  Owned() = default;
  Owned(const Api* api, T* made, void (*release)(const Api*, T*)) : api_(api), made_(made), release_(release) {}
  Owned(Owned&& other) noexcept { *this = std::move(other); }
  Owned& operator=(Owned&& other) noexcept {
    std::swap(api_, other.api_);
    std::swap(made_, other.made_);
    std::swap(release_, other.release_);
    return *this;
  }
  ~Owned() {
    if (made_) release_(api_, made_);
  }
  T* get() const { return made_; }

 private:
  const Api* api_ = nullptr;
  T* made_ = nullptr;
  void (*release_)(const Api*, T*) = nullptr;
};

// A model with one float input and any number of float outputs.
class Program {
 public:
  // `operators`: path of libticketkit, or empty for a stock session. `threads` are those within one operator.
  Program(const Runtime& runtime, const std::string& model, int threads, const std::string& operators) : runtime_(runtime) {
    const Api* const api = runtime.api();
    SessionOptions* options = nullptr;
    runtime.check(create_options(api, &options));
    const Owned<SessionOptions> options_owner(api, options, release_options<SessionOptions*>);
    runtime.check(ort::set_threads(api, options, threads));
    if (!operators.empty()) {
      runtime.check(add_session_config(api, options, "ai.ticketkit.threads", std::to_string(threads).c_str()));
      runtime.check(register_library(api, options, operators.c_str()));
    }
    Session* session = nullptr;
    runtime.check(create_session(api, runtime.env(), model.c_str(), options, &session));
    session_ = {api, session, release_session<Session*>};
    MemoryInfo* memory = nullptr;
    runtime.check(cpu_memory(api, 1, 0, &memory));
    memory_ = {api, memory, release_memory<MemoryInfo*>};
    read_names();
    read_shape();
  }

  // Of the input, as the model declares it; -1 where a dimension is free.
  const std::vector<int64_t>& shape() const { return shape_; }

  // What every later `run` reads: floats of this shape, which the caller keeps where they are.
  void bind(float* x, const std::vector<int64_t>& shape) {
    size_t bytes = sizeof(float);
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    Value* input = nullptr;
    runtime_.check(wrap_tensor(runtime_.api(), memory_.get(), static_cast<void*>(x), bytes, shape.data(), shape.size(), kFloat, &input));
    input_ = {runtime_.api(), input, release_value<Value*>};
  }

  // One run of the model; its outputs replace those of the run before.
  void run() {
    std::vector<const char*> names;
    for (const std::string& name : output_names_) names.push_back(name.c_str());
    std::vector<Value*> made(names.size(), nullptr);
    const char* const input_names[] = {input_name_.c_str()};
    const Value* const inputs[] = {input_.get()};
    outputs_.clear();
    runtime_.check(
        run_session(runtime_.api(), session_.get(), nullptr, input_names, inputs, size_t{1}, names.data(), names.size(), made.data()));
    for (Value* const value : made) outputs_.emplace_back(runtime_.api(), value, release_value<Value*>);
  }

  // The outputs of the last run, one behind the other in the order of the graph.
  std::vector<float> outputs() const {
    std::vector<float> all;
    for (size_t i = 0; i < outputs_.size(); ++i) {
      const Api* const api = runtime_.api();
      TensorInfo* info = nullptr;
      runtime_.check(tensor_info(api, outputs_[i].get(), &info));
      const Owned<TensorInfo> owner(api, info, release_tensor_info<TensorInfo*>);
      const std::vector<int64_t> shape = sizes(info, "output " + output_names_[i]);
      size_t count = 1;
      for (const int64_t size : shape) count *= static_cast<size_t>(size);
      void* data = nullptr;
      runtime_.check(tensor_data(api, outputs_[i].get(), &data));
      const float* const floats = static_cast<const float*>(data);
      all.insert(all.end(), floats, floats + count);
    }
    return all;
  }

 private:
  // Shape of a tensor of floats.
  std::vector<int64_t> sizes(const TensorInfo* info, const std::string& what) const {
    ElementType type = kFloat;
    size_t rank = 0;
    runtime_.check(element_type(runtime_.api(), info, &type));
    if (type != kFloat) throw std::runtime_error(what + ": expected float32, got ONNX element type " + std::to_string(type));
    runtime_.check(dimension_count(runtime_.api(), info, &rank));
    std::vector<int64_t> shape(rank);
    runtime_.check(dimensions(runtime_.api(), info, shape.data(), rank));
    return shape;
  }

  void read_names() {
    const Api* const api = runtime_.api();
    size_t inputs = 0, outputs = 0;
    runtime_.check(session_inputs(api, session_.get(), &inputs));
    runtime_.check(session_outputs(api, session_.get(), &outputs));
    if (inputs != 1) throw std::runtime_error("expected a model with one input, got " + std::to_string(inputs));
    Allocator* allocator = nullptr;
    runtime_.check(default_allocator(api, &allocator));
    const auto text = [&](char* name) {
      std::string copy = name;
      runtime_.check(free_with(api, allocator, static_cast<void*>(name)));
      return copy;
    };
    char* name = nullptr;
    runtime_.check(input_name(api, session_.get(), size_t{0}, allocator, &name));
    input_name_ = text(name);
    for (size_t i = 0; i < outputs; ++i) {
      runtime_.check(output_name(api, session_.get(), i, allocator, &name));
      output_names_.push_back(text(name));
    }
  }

  void read_shape() {
    TypeInfo* type = nullptr;
    runtime_.check(input_type(runtime_.api(), session_.get(), size_t{0}, &type));
    const Owned<TypeInfo> owner(runtime_.api(), type, release_type_info<TypeInfo*>);
    const TensorInfo* tensor = nullptr;
    runtime_.check(as_tensor(runtime_.api(), type, &tensor));
    if (!tensor) throw std::runtime_error("input " + input_name_ + ": expected a tensor");
    shape_ = sizes(tensor, "input " + input_name_);
  }

  const Runtime& runtime_;
  Owned<Session> session_;
  Owned<MemoryInfo> memory_;
  std::string input_name_;
  std::vector<std::string> output_names_;
  std::vector<int64_t> shape_;
  Owned<Value> input_;
  std::vector<Owned<Value>> outputs_;
};

}  // namespace tk::ort

#endif  // TICKETKIT_ORT_SESSION_H_
