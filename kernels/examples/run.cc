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
// Here the same calls go through the slots of ONNX Runtime's stable C ABI (ort/session.h), so that the program builds anywhere.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ort/session.h"

namespace {

using tk::ort::Program;
using tk::ort::Runtime;

// A session of one thread; `library`: libticketkit, or empty for a stock session.
Program open(const Runtime& runtime, const char* path, const std::string& library) {
  try {
    return Program(runtime, path, 1, library);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(library.empty() ? "stock" : "sparse") + " session: " + error.what());
  }
}

// Median of 11 runs in milliseconds.
double milliseconds(Program& model) {
  std::vector<double> times(11);
  for (double& time : times) {
    const auto start = std::chrono::steady_clock::now();
    model.run();
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

void compare(const char* library, const char* operators, const char* path) {
  const Runtime runtime(library);
  Program sparse = open(runtime, path, operators), stock = open(runtime, path, "");
  std::vector<int64_t> shape = sparse.shape();
  for (int64_t& size : shape) size = std::max<int64_t>(size, 1);  // a free dimension, such as the batch, is 1 here
  size_t count = 1;
  for (const int64_t size : shape) count *= static_cast<size_t>(size);
  std::vector<float> x(count);
  for (size_t i = 0; i < count; ++i) x[i] = static_cast<float>(static_cast<uint32_t>(i) * 2654435761u / 4294967296.0 - 0.5);
  for (Program* const program : {&sparse, &stock}) {
    program->bind(x.data(), shape);
    program->run();
  }
  const std::vector<float> y = sparse.outputs(), expected = stock.outputs();
  report("sparse", y, milliseconds(sparse));
  report("stock", expected, milliseconds(stock));
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
