// ONNX Runtime operators of domain ai.ticketkit (version 1) over the kernels of ticketkit.h: SparseConv and SparseGemm (node.h), each under
// one name for every function body a file may carry, such as SparseConvAddRelu (kNames). The session option "ai.ticketkit.threads" says
// over how many threads work is split (default: one per core). Registering a second time with the same session options changes nothing.
#include <array>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "node.h"

namespace tk::ort {
namespace {

std::string name_of(const Api* api, const KernelInfo* info) {
  char name[256] = "";
  size_t size = sizeof(name);
  if (Status* status = node_name(api, info, name, &size)) release_status(api, status);
  return name;
}

// The operator as the table of callbacks ONNX Runtime wants.
void describe(Operator* op, const Api* api, const char* name, int64_t threads) {
  static_cast<CustomOp&>(*op) = CustomOp{};
  op->api = api;
  op->name = name;
  op->is_conv = std::strncmp(name, "SparseConv", 10) == 0;
  op->has_residual = std::strncmp(name, "SparseConvAdd", 13) == 0;
  op->threads = threads;
  op->version = kApiVersion;
  op->get_name = [](const CustomOp* self) { return static_cast<const Operator*>(self)->name; };
  op->get_execution_provider = [](const CustomOp*) -> const char* { return nullptr; };
  op->get_input_type = [](const CustomOp*, size_t index) { return index == 2 ? kUint16 : kFloat; };
  op->get_input_count = [](const CustomOp* self) -> size_t { return static_cast<const Operator*>(self)->has_residual ? 5 : 4; };
  op->get_output_type = [](const CustomOp*, size_t) { return kFloat; };
  op->get_output_count = [](const CustomOp*) -> size_t { return 1; };
  op->get_input_characteristic = [](const CustomOp*, size_t) { return kRequired; };
  op->get_output_characteristic = [](const CustomOp*, size_t) { return kRequired; };
  op->get_input_memory_type = [](const CustomOp*, size_t) { return 0; };
  op->get_start_version = [](const CustomOp*) { return 1; };
  op->get_end_version = [](const CustomOp*) { return 1; };
  if (op->has_residual) {  // Y may take the memory of Z: less to fetch, and its rows are at hand
    op->get_may_inplace = [](int** inputs, int** outputs) -> size_t {
      *inputs = new int[1]{4};
      *outputs = new int[1]{0};
      return 1;
    };
    op->release_may_inplace = [](int* inputs, int* outputs) {
      delete[] inputs;
      delete[] outputs;
    };
  }
  op->create_kernel_v2 = [](const CustomOp* self, const Api* given, const KernelInfo* info, void** kernel) {
    return guarded(given, [&] {
      try {
        *kernel = new Node(*static_cast<const Operator*>(self), given, info);
      } catch (const Error& e) {
        fail(e.code, "ticketkit: node '" + name_of(given, info) + "': " + e.text);
      }
    });
  };
  op->compute_v2 = [](void* kernel, KernelContext* context) {
    Node* const node = static_cast<Node*>(kernel);
    return guarded(node->api(), [&] { node->compute(context); });
  };
  op->destroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
}

// A function body is found by the name of its operator alone (onnxruntime before 1.27 ignores overloads), so each body needs its own;
// the attributes say all of it again, and one kernel serves every name.
#define TK_ACTIVATED(op) op, op "Relu", op "Clip", op "LeakyRelu", op "HardSwish", op "Silu"
constexpr const char* kNames[] = {TK_ACTIVATED("SparseConv"), TK_ACTIVATED("SparseConvAdd"), TK_ACTIVATED("SparseGemm")};
#undef TK_ACTIVATED

// One domain per thread count (and onnxruntime: a process may hold two copies), made once and kept for the life of the process, as ONNX
// Runtime demands of registered operators.
struct Domain {
  std::array<Operator, std::size(kNames)> operators;
  CustomOpDomain* handle = nullptr;
};

bool has_config(const Api* api, const SessionOptions* options, const char* key) {
  int has = 0;
  check(api, has_session_config(api, options, key, &has));
  return has != 0;
}

int64_t threads_of(const Api* api, const SessionOptions* options) {
  const char* const key = "ai.ticketkit.threads";
  if (has_config(api, options, key)) {
    char value[32] = "";
    size_t size = sizeof(value);
    check(api, session_config(api, options, key, value, &size));
    const long long threads = std::atoll(value);
    if (threads < 1 || threads > 4096) fail(kInvalidArgument, std::string(key) + ": expected 1 … 4096, got " + value);
    return threads;
  }
  const unsigned cores = std::thread::hardware_concurrency();
  return cores ? cores : 1;
}

CustomOpDomain* domain_for(const Api* api, int64_t threads) {
  static std::mutex mutex;
  using Domains = std::map<std::pair<const Api*, int64_t>, std::unique_ptr<Domain>>;
  static Domains* const domains = new Domains;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Domain>& slot = (*domains)[{api, threads}];
  if (!slot) {
    auto made = std::make_unique<Domain>();
    check(api, create_domain(api, "ai.ticketkit", &made->handle));
    for (size_t i = 0; i < made->operators.size(); ++i) {
      describe(&made->operators[i], api, kNames[i], threads);
      check(api, domain_add(api, made->handle, &made->operators[i]));
    }
    slot = std::move(made);
  }
  return slot->handle;
}

void register_with(const Api* api, SessionOptions* options) {
  const char* const key = "ai.ticketkit.registered";
  if (has_config(api, options, key)) return;
  check(api, add_domain(api, options, domain_for(api, threads_of(api, options))));
  check(api, add_session_config(api, options, key, "1"));
}

}  // namespace
}  // namespace tk::ort

// The one symbol SessionOptions.register_custom_ops_library looks for.
extern "C" TK_API tk::ort::Status* RegisterCustomOps(tk::ort::SessionOptions* options, const tk::ort::ApiBase* base) {
  using namespace tk::ort;
  const Api* const api = base->get_api(kApiVersion);
  if (!api) {
    const std::string text = std::string("ticketkit: onnxruntime ") + base->get_version_string() + " is too old; 1.18 or newer is needed";
    return create_status(base->get_api(1), kFail, text.c_str());  // slot 0, there in every version
  }
  return guarded(api, [&] { register_with(api, options); });
}
