// The part of ONNX Runtime's C ABI that custom operators need, and programs that run a model, declared in our own words: its headers ship
// in no package registry.
// The ABI is a table of function pointers that only ever grows at its end, so a slot number, once published, stays valid. A test loads
// the library into the installed onnxruntime and runs it, which would fail at once if a number were wrong. Nothing here is linked.
#ifndef TICKETKIT_ORT_ABI_H_
#define TICKETKIT_ORT_ABI_H_

#include <cstddef>
#include <cstdint>

namespace tk::ort {

constexpr uint32_t kApiVersion = 18;  // onnxruntime 1.18, the first with everything below

struct Status;         // null means success
struct KernelInfo;     // a node while its kernel is being made
struct KernelContext;  // a node while it runs
struct Value;          // a tensor
struct TensorInfo;     // its type and shape
struct SessionOptions;
struct CustomOpDomain;
struct Env;  // from here on what programs need (session.h)
struct Session;
struct RunOptions;
struct Allocator;
struct MemoryInfo;
struct TypeInfo;  // of an input or output

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kInvalidGraph = 10 };
enum ElementType : int { kFloat = 1, kUint16 = 4 };
enum Characteristic : int { kRequired = 0 };

struct Api {
  void (*slot[275])();
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*get_version_string)();
};

// A custom operator, field by field in the order of the ABI; null where we leave the default.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_execution_provider)(const CustomOp*);  // returns null: CPU
  ElementType (*get_input_type)(const CustomOp*, size_t index);
  size_t (*get_input_count)(const CustomOp*);
  ElementType (*get_output_type)(const CustomOp*, size_t index);
  size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy)(void* kernel);
  Characteristic (*get_input_characteristic)(const CustomOp*, size_t index);
  Characteristic (*get_output_characteristic)(const CustomOp*, size_t index);
  int (*get_input_memory_type)(const CustomOp*, size_t index);  // 0: the provider's default
  int (*get_variadic_input_min)(const CustomOp*);
  int (*get_variadic_input_homogeneity)(const CustomOp*);
  int (*get_variadic_output_min)(const CustomOp*);
  int (*get_variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_output_shape)(const CustomOp*, void*);
  int (*get_start_version)(const CustomOp*);
  int (*get_end_version)(const CustomOp*);
  size_t (*get_may_inplace)(int** inputs, int** outputs);  // outputs[i] may take the memory of inputs[i]; returns how many pairs
  void (*release_may_inplace)(int* inputs, int* outputs);
  size_t (*get_alias_map)(int** inputs, int** outputs);
  void (*release_alias_map)(int* inputs, int* outputs);
};

// TK_ORT(slot number, C++ name, result, arguments …): a typed call through the table. Every slot but create_status, error_message and the
// release functions returns a Status*.
#define TK_ORT_CALLS                                                                                                          \
  TK_ORT(0, create_status, Status*, (ErrorCode, const char*))                                                                 \
  TK_ORT(2, error_message, const char*, (const Status*))                                                                      \
  TK_ORT(3, create_env, Status*, (int, const char*, Env**))                                                                   \
  TK_ORT(7, create_session, Status*, (const Env*, const char*, const SessionOptions*, Session**))                             \
  TK_ORT(9, run_session, Status*,                                                                                             \
         (Session*, const RunOptions*, const char* const*, const Value* const*, size_t, const char* const*, size_t, Value**)) \
  TK_ORT(10, create_options, Status*, (SessionOptions**))                                                                     \
  TK_ORT(24, set_threads, Status*, (SessionOptions*, int))                                                                    \
  TK_ORT(26, create_domain, Status*, (const char*, CustomOpDomain**))                                                         \
  TK_ORT(27, domain_add, Status*, (CustomOpDomain*, const CustomOp*))                                                         \
  TK_ORT(28, add_domain, Status*, (SessionOptions*, CustomOpDomain*))                                                         \
  TK_ORT(30, session_inputs, Status*, (const Session*, size_t*))                                                              \
  TK_ORT(31, session_outputs, Status*, (const Session*, size_t*))                                                             \
  TK_ORT(33, input_type, Status*, (const Session*, size_t, TypeInfo**))                                                       \
  TK_ORT(36, input_name, Status*, (const Session*, size_t, Allocator*, char**))                                               \
  TK_ORT(37, output_name, Status*, (const Session*, size_t, Allocator*, char**))                                              \
  TK_ORT(49, wrap_tensor, Status*, (const MemoryInfo*, void*, size_t, const int64_t*, size_t, ElementType, Value**))          \
  TK_ORT(51, tensor_data, Status*, (Value*, void**))                                                                          \
  TK_ORT(55, as_tensor, Status*, (const TypeInfo*, const TensorInfo**))                                                       \
  TK_ORT(60, element_type, Status*, (const TensorInfo*, ElementType*))                                                        \
  TK_ORT(61, dimension_count, Status*, (const TensorInfo*, size_t*))                                                          \
  TK_ORT(62, dimensions, Status*, (const TensorInfo*, int64_t*, size_t))                                                      \
  TK_ORT(65, tensor_info, Status*, (const Value*, TensorInfo**))                                                              \
  TK_ORT(69, cpu_memory, Status*, (int, int, MemoryInfo**))                                                                   \
  TK_ORT(76, free_with, Status*, (Allocator*, void*))                                                                         \
  TK_ORT(78, default_allocator, Status*, (Allocator**))                                                                       \
  TK_ORT(85, attribute_float, Status*, (const KernelInfo*, const char*, float*))                                              \
  TK_ORT(86, attribute_int, Status*, (const KernelInfo*, const char*, int64_t*))                                              \
  TK_ORT(87, attribute_string, Status*, (const KernelInfo*, const char*, char*, size_t*))                                     \
  TK_ORT(90, input, Status*, (const KernelContext*, size_t, const Value**))                                                   \
  TK_ORT(91, output, Status*, (KernelContext*, size_t, const int64_t*, size_t, Value**))                                      \
  TK_ORT(92, release_env, void, (Env*))                                                                                       \
  TK_ORT(93, release_status, void, (Status*))                                                                                 \
  TK_ORT(94, release_memory, void, (MemoryInfo*))                                                                             \
  TK_ORT(95, release_session, void, (Session*))                                                                               \
  TK_ORT(96, release_value, void, (Value*))                                                                                   \
  TK_ORT(98, release_type_info, void, (TypeInfo*))                                                                            \
  TK_ORT(99, release_tensor_info, void, (TensorInfo*))                                                                        \
  TK_ORT(100, release_options, void, (SessionOptions*))                                                                       \
  TK_ORT(130, add_session_config, Status*, (SessionOptions*, const char*, const char*))                                       \
  TK_ORT(163, attribute_ints, Status*, (const KernelInfo*, const char*, int64_t*, size_t*))                                   \
  TK_ORT(228, register_library, Status*, (SessionOptions*, const char*))                                                      \
  TK_ORT(237, has_session_config, Status*, (const SessionOptions*, const char*, int*))                                        \
  TK_ORT(238, session_config, Status*, (const SessionOptions*, const char*, char*, size_t*))                                  \
  TK_ORT(244, node_name, Status*, (const KernelInfo*, char*, size_t*))                                                        \
  TK_ORT(249, constant_input, Status*, (const KernelInfo*, size_t, int*, const Value**))                                      \
  TK_ORT(274, parallel_for, Status*, (const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*))

#define TK_ORT(number, name, result, arguments)           \
  template <class... A>                                   \
  result name(const Api* api, A... a) {                   \
    using Fn = result(*) arguments;                       \
    return reinterpret_cast<Fn>(api->slot[number])(a...); \
  }
TK_ORT_CALLS
#undef TK_ORT
#undef TK_ORT_CALLS

}  // namespace tk::ort

#endif  // TICKETKIT_ORT_ABI_H_
