// libFuzzer target: the ONNX Runtime operators. A stand-in for the runtime, behind the same table of slots, hands them attributes and
// initializers made of the fuzzer's bytes, makes a kernel, and runs it on images of a few sizes. Whatever comes back must be a status with
// words in it, or an output.
#include <map>
#include <memory>
#include <string>

#include "../ort/ort_abi.h"
#include "input.h"

namespace tk::ort {

struct Status {
  std::string text;
};
struct TensorInfo {
  ElementType type;
  std::vector<int64_t> shape;
};
struct Value {
  TensorInfo info;
  std::vector<uint8_t> bytes;
};
struct CustomOpDomain {
  std::vector<const CustomOp*> operators;
};
struct SessionOptions {
  std::map<std::string, std::string> config;
  const CustomOpDomain* domain = nullptr;
};
struct KernelInfo {
  std::map<std::string, std::vector<int64_t>> ints;
  std::map<std::string, int64_t> numbers;
  std::map<std::string, float> floats;
  std::map<std::string, std::string> strings;
  std::vector<const Value*> inputs;  // null where they are no initializers
};
struct KernelContext {
  std::vector<const Value*> inputs;
  std::unique_ptr<Value> output;
};

}  // namespace tk::ort

extern "C" tk::ort::Status* RegisterCustomOps(tk::ort::SessionOptions* options, const tk::ort::ApiBase* base);

namespace {

using namespace tk::ort;
using tk::fuzz::Input;

constexpr int64_t kMostFloats = 1 << 15;  // of a tensor: more is refused, as memory that is not to be had

Status* refuse(const std::string& text) { return new Status{text}; }

// The slots, by what ort_abi.h says of each.
Status* s_create_status(ErrorCode, const char* text) { return refuse(text); }
const char* s_error_message(const Status* status) { return status->text.c_str(); }
void s_release_status(Status* status) { delete status; }
Status* s_create_domain(const char*, CustomOpDomain** domain) {
  *domain = new CustomOpDomain;
  return nullptr;
}
Status* s_domain_add(CustomOpDomain* domain, const CustomOp* op) {
  domain->operators.push_back(op);
  return nullptr;
}
Status* s_add_domain(SessionOptions* options, CustomOpDomain* domain) {
  TK_REQUIRE(!options->domain);
  options->domain = domain;
  return nullptr;
}
Status* s_tensor_data(Value* value, void** data) {
  *data = value->bytes.data();
  return nullptr;
}
Status* s_element_type(const TensorInfo* info, ElementType* type) {
  *type = info->type;
  return nullptr;
}
Status* s_dimension_count(const TensorInfo* info, size_t* rank) {
  *rank = info->shape.size();
  return nullptr;
}
Status* s_dimensions(const TensorInfo* info, int64_t* sizes, size_t count) {
  TK_REQUIRE(count == info->shape.size());
  for (size_t i = 0; i < count; ++i) sizes[i] = info->shape[i];
  return nullptr;
}
Status* s_tensor_info(const Value* value, TensorInfo** info) {
  *info = new TensorInfo(value->info);
  return nullptr;
}
void s_release_tensor_info(TensorInfo* info) { delete info; }

template <class T>
Status* look_up(const std::map<std::string, T>& attributes, const char* name, T* value) {
  const auto found = attributes.find(name);
  if (found == attributes.end()) return refuse(std::string("no attribute ") + name);
  *value = found->second;
  return nullptr;
}
Status* s_attribute_float(const KernelInfo* info, const char* name, float* value) { return look_up(info->floats, name, value); }
Status* s_attribute_int(const KernelInfo* info, const char* name, int64_t* value) { return look_up(info->numbers, name, value); }

// As ONNX Runtime's: without a buffer the size is told; a buffer too small is refused.
Status* copy_text(const std::string& text, char* to, size_t* size) {
  const size_t needed = text.size() + 1, given = *size;
  *size = needed;
  if (!to) return nullptr;
  if (given < needed) return refuse("the buffer is too small");
  std::memcpy(to, text.c_str(), needed);
  return nullptr;
}
Status* s_attribute_string(const KernelInfo* info, const char* name, char* to, size_t* size) {
  std::string text;
  Status* const status = look_up(info->strings, name, &text);
  return status ? status : copy_text(text, to, size);
}
Status* s_attribute_ints(const KernelInfo* info, const char* name, int64_t* to, size_t* size) {
  std::vector<int64_t> values;
  if (Status* const status = look_up(info->ints, name, &values)) return status;
  const size_t given = *size;
  *size = values.size();
  if (!to) return nullptr;
  if (given < values.size()) return refuse("the buffer is too small");
  for (size_t i = 0; i < values.size(); ++i) to[i] = values[i];
  return nullptr;
}

Status* s_input(const KernelContext* context, size_t index, const Value** value) {
  TK_REQUIRE(index < context->inputs.size());
  *value = context->inputs[index];
  return nullptr;
}
Status* s_output(KernelContext* context, size_t index, const int64_t* sizes, size_t rank, Value** value) {
  TK_REQUIRE(index == 0);
  int64_t count = 1;
  for (size_t i = 0; i < rank; ++i) {
    TK_REQUIRE(sizes[i] >= 0);
    if (sizes[i] > kMostFloats || count * sizes[i] > kMostFloats) return refuse("no memory for an output this large");
    count *= sizes[i];
  }
  context->output = std::make_unique<Value>(Value{{kFloat, {sizes, sizes + rank}}, std::vector<uint8_t>(static_cast<size_t>(count) * 4)});
  *value = context->output.get();
  return nullptr;
}
Status* s_add_session_config(SessionOptions* options, const char* key, const char* value) {
  options->config[key] = value;
  return nullptr;
}
Status* s_has_session_config(const SessionOptions* options, const char* key, int* has) {
  *has = options->config.count(key) > 0;
  return nullptr;
}
Status* s_session_config(const SessionOptions* options, const char* key, char* to, size_t* size) {
  std::string text;
  Status* const status = look_up(options->config, key, &text);
  return status ? status : copy_text(text, to, size);
}
Status* s_node_name(const KernelInfo*, char* to, size_t* size) { return copy_text("node", to, size); }
Status* s_constant_input(const KernelInfo* info, size_t index, int* is_constant, const Value** value) {
  TK_REQUIRE(index < info->inputs.size());
  *value = info->inputs[index];
  *is_constant = *value != nullptr;
  return nullptr;
}
Status* s_parallel_for(const KernelContext*, void (*work)(void*, size_t), size_t total, size_t, void* self) {
  for (size_t i = total; i > 0; --i) work(self, i - 1);
  return nullptr;
}

const Api* table() {
  static Api api{};
  const auto set = [](int slot, auto* function) { api.slot[slot] = reinterpret_cast<void (*)()>(function); };
  set(0, s_create_status), set(2, s_error_message), set(26, s_create_domain), set(27, s_domain_add), set(28, s_add_domain);
  set(51, s_tensor_data), set(60, s_element_type), set(61, s_dimension_count), set(62, s_dimensions), set(65, s_tensor_info);
  set(85, s_attribute_float), set(86, s_attribute_int), set(87, s_attribute_string), set(90, s_input), set(91, s_output);
  set(93, s_release_status), set(99, s_release_tensor_info), set(130, s_add_session_config), set(163, s_attribute_ints);
  set(237, s_has_session_config), set(238, s_session_config), set(244, s_node_name), set(249, s_constant_input), set(274, s_parallel_for);
  return &api;
}

// The registered operators; twice registered is as good as once.
const std::vector<const CustomOp*>& operators() {
  static SessionOptions options{{{"ai.ticketkit.threads", "3"}}, nullptr};
  static const ApiBase base = {[](uint32_t version) { return version <= kApiVersion ? table() : nullptr; }, [] { return "a stand-in"; }};
  if (!options.domain) {
    TK_REQUIRE(!RegisterCustomOps(&options, &base));
    TK_REQUIRE(!RegisterCustomOps(&options, &base));
  }
  return options.domain->operators;
}

// True where there was no error; an error must have words.
bool succeeded(Status* status) {
  const std::unique_ptr<Status> owner(status);
  TK_REQUIRE(!status || !status->text.empty());
  return !status;
}

template <class T>
Value tensor(Input& in, ElementType type, const std::vector<T>& items) {
  Value value{{in.rarely() ? static_cast<ElementType>(in.within(0, 16)) : type, {static_cast<int64_t>(items.size())}}, {}};
  value.bytes.resize(items.size() * sizeof(T));
  if (!items.empty()) std::memcpy(value.bytes.data(), items.data(), value.bytes.size());
  if (in.rarely()) value.info.shape.insert(value.info.shape.begin() + in.within(0, 1), 1);
  return value;
}

std::vector<int64_t> sizes(Input& in, size_t count, int64_t low, int64_t high) {
  if (in.rarely()) count = static_cast<size_t>(in.within(0, 7));
  std::vector<int64_t> values(count);
  for (int64_t& value : values) value = in.size(in.within(low, high));
  return values;
}

const char* name(Input& in, std::initializer_list<const char*> usual) {
  constexpr const char* kOthers[] = {"", "ell", "planes", "bsr1x4", "Clip", "a name that is longer than the sixteen bytes of a buffer"};
  if (in.rarely()) return kOthers[in.within(0, 5)];
  return usual.begin()[in.within(0, static_cast<int64_t>(usual.size()) - 1)];
}

KernelInfo attributes(Input& in, const std::string& op, bool conv) {
  KernelInfo info;
  std::vector<int64_t>& shape = info.ints["weight_shape"] = sizes(in, conv ? 4 : 2, 1, 6);
  std::string activation = "None";
  for (const char* const each : {"Relu", "LeakyRelu", "Clip", "HardSwish", "Silu"}) {
    if (op.find(each) != op.npos) activation = each;
  }
  info.strings["activation"] = in.rarely() ? name(in, {"None", "Relu"}) : activation;
  if (!in.rarely()) info.floats = {{"min", in.number()}, {"max", in.number() + 8.0f}, {"alpha", in.number()}};
  if (in.flip()) info.strings["format"] = name(in, {"csr", "bsr"});
  if (!conv) return info;
  if (shape.size() == 4 && in.within(0, 3) == 0) {  // depthwise
    shape[1] = 1;
    info.numbers["group"] = in.size(shape[0]);
  }
  info.ints["strides"] = sizes(in, 2, 1, 3);
  info.ints["pads"] = sizes(in, 4, 0, 3);
  info.ints["dilations"] = sizes(in, 2, 1, 3);
  if (in.flip()) info.strings["x_layout"] = name(in, {"planes", "csr", "bsr"});
  if (in.flip()) info.strings["y_layout"] = name(in, {"planes", "csr", "bsr"});
  if (in.flip())
    info.ints["tuning"] = {in.size(8),
                           in.size(in.within(1, 20)),
                           in.size(in.within(1, 20)),
                           in.size(in.within(0, 20)),
                           in.size(in.within(0, 8)),
                           in.size(in.within(0, 4))};
  return info;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  Input in(bytes, size);
  const CustomOp* const op = operators()[static_cast<size_t>(in.within(0, static_cast<int64_t>(operators().size()) - 1))];
  const std::string op_name = op->get_name(op);
  const bool conv = op_name.rfind("SparseConv", 0) == 0;
  KernelInfo info = attributes(in, op_name, conv);
  const std::vector<int64_t>& shape = info.ints["weight_shape"];
  const int64_t rows = shape.empty() ? 1 : shape[0], channels = shape.size() < 2 ? 1 : shape[1];

  const size_t nnz = static_cast<size_t>(in.within(0, static_cast<int64_t>(in.left() / 5)));
  const Value values = tensor(in, kFloat, in.numbers(nnz)), gaps = tensor(in, kUint16, in.gaps(in.rarely() ? nnz / 2 : nnz));
  const Value bias = tensor(in, kFloat, in.numbers(static_cast<size_t>(rows >= 0 && rows < 256 && !in.rarely() ? rows : 3)));
  info.inputs = {nullptr, &values, &gaps, &bias, nullptr};
  if (in.rarely()) info.inputs[static_cast<size_t>(in.within(1, 3))] = nullptr;
  void* kernel = nullptr;
  if (!succeeded(op->create_kernel_v2(op, table(), &info, &kernel))) return 0;

  for (int64_t run = in.within(1, 6); run > 0; --run) {
    const int64_t groups = info.numbers.count("group") ? info.numbers["group"] : 1;
    std::vector<int64_t> x_shape = {in.size(in.within(0, 3)), in.size(channels * groups)};
    if (conv) x_shape.insert(x_shape.end(), {in.size(in.within(1, 20)), in.size(in.within(1, 20))});
    if (in.rarely()) x_shape.pop_back();
    int64_t count = 1;
    for (const int64_t each : x_shape) count = each < 0 || each > kMostFloats || count * each > kMostFloats ? 0 : count * each;
    if (count == 0 && x_shape[0] != 0) continue;
    Value x{{kFloat, x_shape}, std::vector<uint8_t>(static_cast<size_t>(count) * 4, 0x3e)};
    KernelContext context{{&x, &values, &gaps, &bias}, nullptr};
    std::unique_ptr<Value> residual;
    if (op->get_input_count(op) == 5) {  // of the shape of the output, as the first run without it tells; rarely another
      context.inputs.push_back(nullptr);
      if (!succeeded(op->compute_v2(kernel, &context)) || !context.output) continue;
      residual = std::move(context.output);
      if (in.rarely()) residual->info.shape.back() += 1;
      context.inputs[4] = residual.get();
    }
    if (succeeded(op->compute_v2(kernel, &context))) TK_REQUIRE(context.output);
  }
  op->destroy(kernel);
  return 0;
}
