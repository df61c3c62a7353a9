// The kernels as operators of torch, on its stable ABI: one library for every Python 3 and every
// torch from 2.10 on. Python checks shapes and values and has its own operators, whose bodies call
// these; here types, axes and devices are checked, memory is allocated and kernels are launched.
//
// There is one operator for each direction: of both operations in a row, or, without a text, of
// operation 1 alone. Tensors come one by one and choices as numbers, since lists and strings cost
// the host more. The names are the library's own: implementations of the existing operators under
// the CUDA key would take the Triton backend's calls too, which arrive under the same key.
#include "kernels.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

// Only a torch with CUDA has it. Weak: the library loads beside a torch for CPUs, to be looked at.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** ret_stream);

namespace {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
template <size_t number>
using Given = std::array<std::optional<Tensor>, number>;

// EPT_FAST_HOST: the tests' build, over the same kernels compiled for the host.
#ifdef EPT_FAST_HOST
struct Launch {
  explicit Launch(const Tensor& tensor) : device(tensor.get_device_index()) {}
  CUstream_st* stream() const { return nullptr; }
  int32_t device_type() const { return aoti_torch_device_type_cpu(); }
  int32_t device;
};
#else
// Makes the tensor's device the current one for as long as it lives.
struct Launch {
  explicit Launch(const Tensor& tensor) : device(tensor.get_device_index()), guard(device) {}

  // The stream that torch's operators of this thread run on.
  CUstream_st* stream() const {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream == nullptr ||
        aoti_torch_get_current_cuda_stream(device, &stream) != TORCH_SUCCESS) {
      throw std::runtime_error("ept_fast: torch has no CUDA stream");
    }
    return static_cast<CUstream_st*>(stream);
  }
  int32_t device_type() const { return aoti_torch_device_type_cuda(); }
  int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
};
#endif

[[noreturn]] void refuse(
    const char* name, const std::string& expected, const std::string& got) {
  throw std::runtime_error(std::string(name) + ": expected " + expected + ", got " + got);
}

void check(const ept::Status& status) {
  if (status.error != 0) {
    throw std::runtime_error(
        std::string("ept_fast: kernel ") + status.kernel + ": CUDA error " +
        std::to_string(status.error) + ": " + ept::error_string(status.error));
  }
}

// Inputs

enum class Kind { floats, mask, ids };

// A bool is a byte of 0 or 1, and of a mask only zero and not zero are told apart.
ept::Type type_of(const char* name, const Tensor& tensor, Kind kind) {
  using ept::Type;
  static constexpr std::pair<ScalarType, Type> types[] = {
      {ScalarType::Float, Type::float32},     {ScalarType::Half, Type::float16},
      {ScalarType::BFloat16, Type::bfloat16}, {ScalarType::Bool, Type::int8},
      {ScalarType::Byte, Type::int8},         {ScalarType::Char, Type::int8},
      {ScalarType::Short, Type::int16},       {ScalarType::Int, Type::int32},
      {ScalarType::Long, Type::int64}};
  const ScalarType type = tensor.scalar_type();
  for (const auto& [from, to] : types) {
    const bool fits = kind == Kind::floats ? to < Type::int8
                      : kind == Kind::mask ? to >= Type::int8
                                           : to >= Type::int32;
    if (from == type && fits) return to;
  }
  const char* expected[] = {"dtype float32, float16 or bfloat16", "dtype bool or an integer one",
                            "dtype int64 or int32"};
  refuse(name, expected[static_cast<int>(kind)], torch::headeronly::toString(type));
}

struct Input {
  const char* name;
  int64_t axes;
  Kind kind = Kind::floats;
};

// As in ept_fast/ops/types.py. The parameters of a single prompt may lack the axis of tasks.
enum {
  short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias, space_down_bias,
  space_up_bias, parameters
};
enum { input_ids, weight, inputs_embeds, attention_mask, task_ids, texts };
constexpr Input parameter_inputs[parameters] = {
    {"short_prompt", 3}, {"offset_a", 3},    {"offset_b", 3}, {"space_down", 4},
    {"space_up", 4},     {"gate_weight", 3}, {"gate_bias", 2},  {"space_down_bias", 3},
    {"space_up_bias", 3}};
constexpr Input text_inputs[texts] = {{"input_ids", 2, Kind::ids},
                                      {"weight", 2},
                                      {"inputs_embeds", 3},
                                      {"attention_mask", 2, Kind::mask},
                                      {"task_ids", 1, Kind::ids}};

// What a kernel sees of a tensor, and its sizes; nothing of one that is not given.
struct Operand {
  ept::View view;
  int64_t size[4] = {0, 0, 0, 0};
};

Operand operand(const Launch& launch, const Input& input, const Tensor& tensor,
                int64_t added = 0) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  if (device_type != launch.device_type() || tensor.get_device_index() != launch.device) {
    refuse(input.name, "a tensor on the device of the first argument, cuda:" +
           std::to_string(launch.device), "one elsewhere");
  }
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t axes = static_cast<int64_t>(sizes.size()), missing = input.axes - axes;
  if (missing < 0 || missing > added) {
    refuse(input.name, std::to_string(input.axes) + " axes", std::to_string(axes));
  }
  Operand result;
  if (missing == 1) result.size[0] = 1;
  for (int64_t axis = 0; axis < axes; ++axis) {
    result.size[missing + axis] = sizes[axis];
    result.view.stride[missing + axis] = strides[axis];
  }
  result.view.data = const_cast<void*>(tensor.const_data_ptr());
  result.view.type = type_of(input.name, tensor, input.kind);
  return result;
}

// `added`: axes of 1 in front that a tensor may lack.
template <size_t number>
std::array<Operand, number> operands(const Launch& launch, const Input (&inputs)[number],
                                     const Given<number>& given, int64_t added = 0) {
  std::array<Operand, number> found;
  for (size_t i = 0; i < number; ++i) {
    if (given[i]) found[i] = operand(launch, inputs[i], *given[i], added);
  }
  return found;
}

// A group of tensors is given whole or not at all.
template <size_t number>
void check_together(const Input (&inputs)[number], const Given<number>& given, int first,
                    int other) {
  if (given[first].has_value() == given[other].has_value()) return;
  if (given[first]) std::swap(first, other);
  refuse(inputs[first].name, std::string("a tensor beside ") + inputs[other].name, "None");
}

std::array<Operand, parameters> parameters_of(const Launch& launch,
                                              const Given<parameters>& given) {
  check_together(parameter_inputs, given, offset_a, offset_b);
  check_together(parameter_inputs, given, space_down, space_up);
  check_together(parameter_inputs, given, gate_weight, gate_bias);
  check_together(parameter_inputs, given, space_down_bias, space_up_bias);
  const auto found = operands(launch, parameter_inputs, given, 1);
  // A single space may go without a gate.
  if (given[gate_weight] || found[space_down].size[1] > 1) {
    check_together(parameter_inputs, given, space_down, gate_weight);
  }
  if (given[space_down_bias]) {
    check_together(parameter_inputs, given, space_down, space_down_bias);
  }
  return found;
}

// The arguments of an operator, in the order of its schema.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}

  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  template <size_t number>
  Given<number> take_tensors(Given<number> found = {}, int first = 0) {
    for (size_t i = first; i < number; ++i) found[i] = take<std::optional<Tensor>>();
    return found;
  }
  Given<parameters> take_parameters() { return take_tensors<parameters>({take<Tensor>()}, 1); }

 private:
  StableIValue* next_;
};

// Memory

Tensor empty(const Launch& launch, Sizes sizes, int32_t dtype) {
  int64_t strides[4], step = 1;
  for (size_t axis = sizes.size(); axis-- > 0; step *= sizes[axis]) strides[axis] = step;
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides, dtype, launch.device_type(), launch.device, &made));
  return Tensor(made);
}

Tensor floats(const Launch& launch, Sizes sizes) {
  return empty(launch, sizes, aoti_torch_dtype_float32());
}

Tensor bytes(const Launch& launch, int64_t number) {
  return empty(launch, {number}, aoti_torch_dtype_uint8());
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// Null if the tensor has no elements: none to the kernels.
char* address(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<char*>(tensor.mutable_data_ptr());
}

int64_t size_of(const Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

int64_t rounded(int64_t size) { return (size + 15) / 16 * 16; }

// What the operations are called with

// What all calls have in common.
template <class Call>
void set_sizes(Call& call, const std::array<Operand, parameters>& given) {
  call.tasks = given[short_prompt].size[0];
  call.tokens = given[short_prompt].size[1];
  call.width = given[short_prompt].size[2];
  call.offset_a = given[offset_a].view;
  call.offset_b = given[offset_b].view;
  call.rank = given[offset_a].size[2];
}

void set_reconstruct(ept::Reconstruct& call, std::array<Operand, parameters> given,
                     Arguments& in) {
  call.scaling = in.take<double>();
  call.activation = static_cast<ept::Activation>(in.take<int64_t>());
  call.gate = static_cast<ept::Gate>(in.take<int64_t>());
  call.temperature = in.take<double>();
  const bool fusion = in.take<bool>();
  if (!fusion) given[offset_a] = given[offset_b] = {};
  set_sizes(call, given);
  call.positions = given[offset_a].size[1];
  call.spaces = given[space_down].size[1];
  call.dim = given[space_down].size[3];
  call.short_prompt = given[short_prompt].view;
  call.space_down = given[space_down].view;
  call.space_up = given[space_up].view;
  call.gate_weight = given[gate_weight].view;
  call.gate_bias = given[gate_bias].view;
  call.space_down_bias = given[space_down_bias].view;
  call.space_up_bias = given[space_up_bias].view;
}

void set_splice(ept::Splice& call, const std::array<Operand, parameters>& given,
                const std::array<Operand, texts>& text, double scaling) {
  set_sizes(call, given);
  call.prompt = given[short_prompt].view;
  call.attention_mask = text[attention_mask].view;
  call.task_ids = text[task_ids].view;
  call.scaling = scaling;
}

// Whether anything is left of operation 1 but a copy.
bool changes_prompt(const ept::Reconstruct& call) { return call.rank > 0 || call.spaces > 0; }

// P′ or its gradient, contiguous.
ept::View prompt_at(const ept::Reconstruct& call, void* data, ept::Type type) {
  return {data, type, {call.tokens * call.width, call.width, 1}};
}

using Shape = std::array<int64_t, 3>;

int64_t elements(const Shape& shape) { return shape[0] * shape[1] * shape[2]; }

// Where what the forward saves lies: `place` takes a shape, which has no elements if the tensor
// does not apply, and gives an address.
template <class Call, class Place>
void place_saved(Call& call, Place place) {
  const auto placed = [&](int64_t rows, int64_t columns) {
    return reinterpret_cast<float*>(place(Shape{call.tasks, rows, columns}));
  };
  const int64_t dims = call.spaces * call.dim;
  const int64_t gates = call.gate_weight.data == nullptr ? 0 : call.spaces;
  call.query = placed(call.tokens, call.rank);
  call.stats = placed(call.rank > 0 ? 2 : 0, call.tokens);
  call.attended = placed(call.tokens, call.rank);
  call.hidden = placed(call.tokens, dims);
  call.gates = placed(call.tokens, gates);
  call.cross = placed(call.spaces > 0 ? call.rank : 0, dims + gates);
}

// In one tensor, each from a multiple of 16 bytes on; gives the size of all.
template <class Call>
int64_t save_in_one(Call& call, char* memory) {
  int64_t size = 0;
  place_saved(call, [&](const Shape& shape) {
    char* const place = memory == nullptr || elements(shape) == 0 ? nullptr : memory + size;
    size += rounded(4 * elements(shape));
    return place;
  });
  return size;
}

// The operators

// P′ and, tensor by tensor, what is saved for its backward.
Tensors forward_of_prompt(const Launch& launch, const Tensor& prompt,
                          ept::ReconstructForward& call) {
  Tensors made = {empty(launch, prompt.sizes(), dtype_of(prompt))};
  place_saved(call, [&](const Shape& shape) {
    made.push_back(elements(shape) > 0 ? floats(launch, shape) : floats(launch, {0}));
    return address(made.back());
  });
  const Tensor workspace = bytes(launch, ept::reconstruct_forward_workspace(call));
  call.prompt = address(made[0]);
  call.workspace = address(workspace);
  check(ept::reconstruct_forward(call, launch.stream()));
  return made;
}

// The spliced text and one tensor for its backward; or, without a text, as above.
Tensors forward(Arguments in) {
  const auto tensors = in.take_parameters();
  const auto behind = in.take_tensors<texts>();
  const Launch launch(*tensors[short_prompt]);
  const auto given = parameters_of(launch, tensors);
  ept::ReconstructForward first;
  set_reconstruct(first, given, in);
  check_together(text_inputs, behind, input_ids, weight);
  if (behind[input_ids] && behind[inputs_embeds]) {
    refuse("inputs_embeds", "either input_ids or inputs_embeds", "both");
  }
  const int words = behind[input_ids] ? input_ids : inputs_embeds;
  if (!behind[words]) return forward_of_prompt(launch, *tensors[short_prompt], first);

  const int source = behind[input_ids] ? weight : inputs_embeds;
  const auto text = operands(launch, text_inputs, behind);
  ept::SpliceForward second;
  set_splice(second, given, text, first.scaling);
  second.input_ids = text[input_ids].view;
  second.source = text[source].view;
  second.batch = text[words].size[0];
  second.length = text[words].size[1];
  second.vocabulary = text[weight].size[0];

  const bool changes = changes_prompt(first);
  const int64_t prompt_size = changes ? rounded(size_of(*tensors[short_prompt])) : 0;
  const int64_t size = std::max(changes ? ept::reconstruct_forward_workspace(first) : 0,
                                ept::splice_forward_workspace(second));
  const Tensor workspace = bytes(launch, prompt_size + size);
  const Tensor kept = bytes(launch, changes ? save_in_one(first, nullptr) : 0);
  const Tensor out = empty(launch, {second.batch, second.tokens + second.length, second.width},
                           dtype_of(*behind[source]));
  first.prompt = address(workspace);
  first.workspace = second.workspace = address(workspace) + prompt_size;
  second.out = address(out);
  if (changes) {
    save_in_one(first, address(kept));
    check(ept::reconstruct_forward(first, launch.stream()));
    second.prompt = prompt_at(first, first.prompt, first.short_prompt.type);
  }
  if (second.batch > 0) check(ept::splice_forward(second, launch.stream()));
  return {out, kept};
}

// The parameters' gradients from that of what the forward gave; without elements if not needed.
// Without biases there are none of theirs.
Tensors backward(Arguments in) {
  const Tensor grad = in.take<Tensor>();
  const auto tensors = in.take_parameters();
  const auto behind = in.take_tensors<texts>({}, attention_mask);
  const auto kept = in.take<Tensors>();
  const bool need_prompt = in.take<bool>(), need_offset = in.take<bool>();
  const Launch launch(grad);
  const auto given = parameters_of(launch, tensors);
  const Operand seen = operand(launch, {"grad", 3}, grad);
  ept::ReconstructBackward first;
  set_reconstruct(first, given, in);
  const bool splices = kept.size() == 1, fuses = first.rank > 0;
  const bool changes = need_prompt && changes_prompt(first);

  bool fits = true;
  if (splices) {
    fits = save_in_one(first, address(kept[0])) == kept[0].numel();
  } else {
    size_t index = 0;
    place_saved(first, [&](const Shape& shape) {
      fits = fits && index < kept.size() && kept[index].numel() == elements(shape);
      return fits ? address(kept[index++]) : nullptr;
    });
  }
  if (!fits) refuse("kept", "what the forward gave", "something else");

  Tensors grads;
  const auto add_gradient = [&](int i, bool needed) {
    grads.push_back(tensors[i] && needed
                        ? empty(launch, tensors[i]->sizes(), dtype_of(*tensors[i]))
                        : floats(launch, {0}));
    return address(grads.back());
  };
  const bool of_offset = need_offset || (need_prompt && fuses);
  first.d_short_prompt = add_gradient(short_prompt, need_prompt);
  first.d_offset_a = add_gradient(offset_a, of_offset);
  first.d_offset_b = add_gradient(offset_b, of_offset);
  first.d_space_down = add_gradient(space_down, need_prompt);
  first.d_space_up = add_gradient(space_up, need_prompt);
  first.d_gate_weight = add_gradient(gate_weight, need_prompt);
  first.d_gate_bias = add_gradient(gate_bias, need_prompt);
  if (tensors[space_down_bias]) {
    first.d_space_down_bias = add_gradient(space_down_bias, need_prompt);
    first.d_space_up_bias = add_gradient(space_up_bias, need_prompt);
  }

  ept::SpliceBackward second;
  set_splice(second, given, operands(launch, text_inputs, behind), first.scaling);
  second.grad = first.grad = seen.view;
  second.batch = seen.size[0];
  second.length = seen.size[1] - second.tokens;
  second.positions = given[offset_a].size[1];
  second.d_prompt = first.d_short_prompt;
  if (need_offset) {
    second.d_offset_a = first.d_offset_a;
    second.d_offset_b = first.d_offset_b;
  }
  if (!fuses) first.d_offset_a = first.d_offset_b = nullptr;

  // First in the workspace are the gradient of P′ in float32 and the text's halves of the offset's.
  const bool halves = changes && fuses && need_offset;
  const int64_t size_p = splices && changes ? rounded(4 * tensors[short_prompt]->numel()) : 0;
  const int64_t size_a = halves ? rounded(size_of(grads[offset_a])) : 0;
  const int64_t size_b = halves ? rounded(size_of(grads[offset_b])) : 0;
  const int64_t size = std::max(changes ? ept::reconstruct_backward_workspace(first) : 0,
                                splices ? ept::splice_backward_workspace(second) : 0);
  const Tensor workspace = bytes(launch, size_p + size_a + size_b + size);
  char* const begin = address(workspace);
  first.workspace = second.workspace = begin + size_p + size_a + size_b;
  if (size_p > 0) {
    second.d_prompt = begin;
    second.prompt.type = ept::Type::float32;
    first.grad = prompt_at(first, begin, ept::Type::float32);
  }
  if (halves) {
    second.d_offset_a = begin + size_p;
    second.d_offset_b = begin + size_p + size_a;
  }
  if (splices && (second.d_prompt != nullptr || second.d_offset_a != nullptr)) {
    check(ept::splice_backward(second, launch.stream()));
  }
  if (changes) check(ept::reconstruct_backward(first, launch.stream()));
  if (halves) {
    check(ept::add({{first.d_offset_a, first.d_offset_b},
                    {second.d_offset_a, second.d_offset_b},
                    {first.offset_a.type, first.offset_b.type},
                    {grads[offset_a].numel(), grads[offset_b].numel()}},
                   launch.stream()));
  }
  return grads;
}

template <Tensors (*run)(Arguments)>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(run(Arguments(stack)));
}

}  // namespace

#define EPT_PARAMETERS                                                                     \
  "Tensor short_prompt, Tensor? offset_a, Tensor? offset_b, Tensor? space_down, "          \
  "Tensor? space_up, Tensor? gate_weight, Tensor? gate_bias, Tensor? space_down_bias, "    \
  "Tensor? space_up_bias, "
#define EPT_FLAGS "float scaling, int activation, int gate, float temperature, bool fusion"

STABLE_TORCH_LIBRARY_FRAGMENT(ept_fast, m) {
  m.def(
      "cuda_forward(" EPT_PARAMETERS
      "Tensor? input_ids, Tensor? weight, Tensor? inputs_embeds, Tensor? attention_mask, "
      "Tensor? task_ids, " EPT_FLAGS ") -> Tensor[]");
  m.def(
      "cuda_backward(Tensor grad, " EPT_PARAMETERS
      "Tensor? attention_mask, Tensor? task_ids, Tensor[] kept, bool need_prompt, "
      "bool need_offset, " EPT_FLAGS ") -> Tensor[]");
}

#ifdef EPT_FAST_HOST
STABLE_TORCH_LIBRARY_IMPL(ept_fast, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(ept_fast, CUDA, m) {
#endif
  m.impl("cuda_forward", &boxed<forward>);
  m.impl("cuda_backward", &boxed<backward>);
}
