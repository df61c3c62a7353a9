// The kernels as operators of torch, on its stable ABI: one library for every Python 3 and every
// torch from 2.10 on. Python checks shapes and values and has its own operators, whose bodies call
// these; here types, axes and devices are checked, memory is allocated and kernels are launched.
//
// The operators have names of their own, cuda_*: an implementation of the existing ones under the
// CUDA key would take the Triton backend's calls too, which arrive under the same key.
#include "kernels.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

// Only a torch with CUDA has it. Weak: the library loads beside a torch for CPUs, to be looked at.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::initializer_list<int64_t>;

// EPT_FAST_HOST: the tests' build, over the same kernels compiled for the host.
#ifdef EPT_FAST_HOST
struct Launch {
  explicit Launch(const Tensor& tensor) : device(tensor.get_device_index()) {}
  CUstream_st* stream() const { return nullptr; }
  int32_t device;
};
bool on_our_device(const Tensor& tensor) { return tensor.is_cpu(); }
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

  int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
};
bool on_our_device(const Tensor& tensor) { return tensor.is_cuda(); }
#endif

[[noreturn]] void refuse(
    const char* name, const std::string& expected, const std::string& got) {
  throw std::runtime_error(std::string(name) + ": expected " + expected + ", got " + got);
}

std::optional<ept::Type> float_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return ept::Type::float32;
    case ScalarType::Half:
      return ept::Type::float16;
    case ScalarType::BFloat16:
      return ept::Type::bfloat16;
    default:
      return std::nullopt;
  }
}

// A bool is a byte of 0 or 1, and of a mask only zero and not zero are told apart.
std::optional<ept::Type> integer_type(ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
      return ept::Type::int8;
    case ScalarType::Short:
      return ept::Type::int16;
    case ScalarType::Int:
      return ept::Type::int32;
    case ScalarType::Long:
      return ept::Type::int64;
    default:
      return std::nullopt;
  }
}

enum class Kind { floats, mask, ids };

ept::Type type_of(const char* name, const Tensor& tensor, Kind kind) {
  const ScalarType type = tensor.scalar_type();
  const auto found = kind == Kind::floats ? float_type(type) : integer_type(type);
  const bool is_id = found == ept::Type::int32 || found == ept::Type::int64;
  if (!found || (kind == Kind::ids && !is_id)) {
    const char* expected = kind == Kind::floats ? "dtype float32, float16 or bfloat16"
                           : kind == Kind::mask ? "dtype bool or an integer one"
                                                : "dtype int64 or int32";
    refuse(name, expected, torch::headeronly::toString(type));
  }
  return *found;
}

// What a kernel sees of an input.
ept::View view(
    const char* name, const Tensor& tensor, int64_t axes, const Launch& launch,
    Kind kind = Kind::floats) {
  if (!on_our_device(tensor) || tensor.get_device_index() != launch.device) {
    refuse(name, "a tensor on the device of the first argument, cuda:" +
           std::to_string(launch.device), "one elsewhere");
  }
  if (tensor.dim() != axes) {
    refuse(name, std::to_string(axes) + " axes", std::to_string(tensor.dim()));
  }
  ept::View result;
  result.data = const_cast<void*>(tensor.const_data_ptr());
  result.type = type_of(name, tensor, kind);
  const auto strides = tensor.strides();
  for (int64_t axis = 0; axis < axes; ++axis) {
    result.stride[axis] = strides[axis];
  }
  return result;
}

Tensor empty(const Tensor& like, Sizes sizes, ScalarType type) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
}

Tensor empty_like(const Optional& tensor, const Tensor& other) {
  return tensor ? torch::stable::new_empty(*tensor, tensor->sizes())
                : torch::stable::new_empty(other, Sizes{0});
}

// The address of an output; null of one without elements, which is none to the kernels.
template <typename T = void>
T* address(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty(like, {bytes}, ScalarType::Byte);
}

void check(const ept::Status& status) {
  if (status.error != 0) {
    throw std::runtime_error(
        std::string("ept_fast: kernel ") + status.kernel + ": CUDA error " +
        std::to_string(status.error) + ": " + ept::error_string(status.error));
  }
}

ept::Activation activation_of(const std::string& name) {
  std::string known;
#define EPT_NAMED(row, phi, derivative)                     \
  if (name == #row) return ept::Activation::row;       \
  known += std::string(known.empty() ? "" : ", ") + #row;
  EPT_ACTIVATIONS(EPT_NAMED)
#undef EPT_NAMED
  refuse("activation", "one of " + known, name);
}

ept::Gate gate_of(const std::string& name) {
  if (name == "token") return ept::Gate::token;
  if (name == "prompt") return ept::Gate::prompt;
  refuse("gate", "token or prompt", name);
}

using Tensors = std::vector<Tensor>;
using Given = std::vector<Optional>;

// A tensor of a list that has names, as the NamedTuples of ept_fast/ops/types.py have.
template <size_t size>
class Named {
 public:
  Named(const char* what, const char* const (&names)[size], const Given& given)
      : names_(names), given_(given) {
    if (given.size() != size) {
      refuse(what, std::to_string(size) + " tensors", std::to_string(given.size()));
    }
  }
  const Optional& operator[](const char* name) const { return given_[index(name)]; }
  const Tensor& required(const char* name) const {
    const Optional& found = (*this)[name];
    if (!found) refuse(name, "a tensor", "None");
    return *found;
  }
  ept::View view(const char* name, int64_t axes, const Launch& launch,
                 Kind kind = Kind::floats) const {
    const Optional& found = (*this)[name];
    return found ? ::view(name, *found, axes, launch, kind) : ept::View{};
  }
  // A group of tensors is given whole or not at all.
  void check_together(const char* first, const char* other) const {
    if ((*this)[first].has_value() != (*this)[other].has_value()) {
      const bool misses_first = !(*this)[first].has_value();
      refuse(misses_first ? first : other,
             std::string("a tensor beside ") + (misses_first ? other : first), "None");
    }
  }

 private:
  size_t index(const std::string& name) const {
    for (size_t i = 0; i < size; ++i) {
      if (name == names_[i]) return i;
    }
    throw std::logic_error("no tensor has the name " + name);
  }
  const char* const (&names_)[size];
  const Given& given_;
};

constexpr const char* parameter_names[] = {
    "short_prompt", "offset_a", "offset_b", "space_down", "space_up", "gate_weight", "gate_bias"};
constexpr const char* saved_names[] = {"query", "stats", "attended", "hidden", "gates", "cross"};
constexpr const char* splice_names[] = {
    "prompt", "input_ids", "weight", "inputs_embeds", "offset_a", "offset_b", "attention_mask",
    "task_ids"};

// Sizes, tensors and flags, which forward and backward have in common.
template <typename Call>
Call reconstruct_call(
    const Launch& launch, const Named<7>& given, double scaling, const std::string& activation,
    const std::string& gate, double temperature) {
  given.check_together("offset_a", "offset_b");
  given.check_together("space_down", "space_up");
  given.check_together("space_down", "gate_weight");
  given.check_together("space_down", "gate_bias");
  Call call;
  call.short_prompt = given.view("short_prompt", 3, launch);
  call.offset_a = given.view("offset_a", 3, launch);
  call.offset_b = given.view("offset_b", 3, launch);
  call.space_down = given.view("space_down", 4, launch);
  call.space_up = given.view("space_up", 4, launch);
  call.gate_weight = given.view("gate_weight", 3, launch);
  call.gate_bias = given.view("gate_bias", 2, launch);
  const Tensor& short_prompt = given.required("short_prompt");
  call.tasks = short_prompt.size(0);
  call.tokens = short_prompt.size(1);
  call.width = short_prompt.size(2);
  if (const Optional& offset_a = given["offset_a"]) {
    call.positions = offset_a->size(1);
    call.rank = offset_a->size(2);
  }
  if (const Optional& space_down = given["space_down"]) {
    call.spaces = space_down->size(1);
    call.dim = space_down->size(3);
  }
  call.scaling = scaling;
  call.temperature = temperature;
  call.activation = activation_of(activation);
  call.gate = gate_of(gate);
  return call;
}

Tensors reconstruct_forward(
    const Given& parameters, double scaling, const std::string& activation,
    const std::string& gate, double temperature) {
  const Named<7> given("parameters", parameter_names, parameters);
  const Tensor& short_prompt = given.required("short_prompt");
  const Launch launch(short_prompt);
  auto call = reconstruct_call<ept::ReconstructForward>(
      launch, given, scaling, activation, gate, temperature);

  const auto saved = [&](bool applies, Sizes sizes) {
    return applies ? empty(short_prompt, sizes, ScalarType::Float)
                   : empty(short_prompt, {0}, ScalarType::Float);
  };
  const bool offset = given["offset_a"].has_value();
  const bool spaces = given["space_down"].has_value();
  const int64_t dims = call.spaces * call.dim;
  const Tensor prompt = torch::stable::new_empty(short_prompt, short_prompt.sizes());
  const Tensor query = saved(offset, {call.tasks, call.tokens, call.rank});
  const Tensor stats = saved(offset, {call.tasks, 2, call.tokens});
  const Tensor attended = saved(offset, {call.tasks, call.tokens, call.rank});
  const Tensor hidden = saved(spaces, {call.tasks, call.tokens, dims});
  const Tensor gates = saved(spaces, {call.tasks, call.tokens, call.spaces});
  const Tensor cross = saved(offset && spaces, {call.tasks, call.rank, dims + call.spaces});
  call.prompt = address(prompt);
  call.query = address<float>(query);
  call.stats = address<float>(stats);
  call.attended = address<float>(attended);
  call.hidden = address<float>(hidden);
  call.gates = address<float>(gates);
  call.cross = address<float>(cross);

  const Tensor space = workspace(short_prompt, ept::reconstruct_forward_workspace(call));
  call.workspace = address(space);
  check(ept::reconstruct_forward(call, launch.stream()));
  return {prompt, query, stats, attended, hidden, gates, cross};
}

Tensors reconstruct_backward(
    const Tensor& grad, const Given& parameters, const Given& kept, double scaling,
    const std::string& activation, const std::string& gate, double temperature) {
  const Named<7> given("parameters", parameter_names, parameters);
  const Named<6> saved("saved", saved_names, kept);
  const Launch launch(grad);
  auto call = reconstruct_call<ept::ReconstructBackward>(
      launch, given, scaling, activation, gate, temperature);
  call.grad = view("grad", grad, 3, launch);

  Tensors held;  // copies that the launch reads
  const auto read = [&](const char* name, bool applies) {
    if (!applies) return static_cast<const float*>(nullptr);
    const Tensor& tensor = saved.required(name);
    const ept::View found = view(name, tensor, 3, launch);
    if (found.type != ept::Type::float32) {
      refuse(name, "dtype float32", torch::headeronly::toString(tensor.scalar_type()));
    }
    held.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return static_cast<const float*>(held.back().const_data_ptr());
  };
  const bool offset = given["offset_a"].has_value();
  const bool spaces = given["space_down"].has_value();
  call.query = read("query", offset);
  call.stats = read("stats", offset);
  call.attended = read("attended", offset);
  call.hidden = read("hidden", spaces);
  call.gates = read("gates", spaces);
  call.cross = read("cross", offset && spaces);

  Tensors grads;
  for (const Optional& tensor : parameters) grads.push_back(empty_like(tensor, grad));
  call.d_short_prompt = address(grads[0]);
  call.d_offset_a = address(grads[1]);
  call.d_offset_b = address(grads[2]);
  call.d_space_down = address(grads[3]);
  call.d_space_up = address(grads[4]);
  call.d_gate_weight = address(grads[5]);
  call.d_gate_bias = address(grads[6]);

  const Tensor space = workspace(grad, ept::reconstruct_backward_workspace(call));
  call.workspace = address(space);
  check(ept::reconstruct_backward(call, launch.stream()));
  return grads;
}

// What both directions see of the rows and the offset.
template <typename Call>
Call splice_call(const Launch& launch, const Named<8>& given, double scaling) {
  given.check_together("offset_a", "offset_b");
  const Tensor& prompt = given.required("prompt");
  Call call;
  call.prompt = given.view("prompt", 3, launch);
  call.offset_a = given.view("offset_a", 3, launch);
  call.offset_b = given.view("offset_b", 3, launch);
  call.attention_mask = given.view("attention_mask", 2, launch, Kind::mask);
  call.task_ids = given.view("task_ids", 1, launch, Kind::ids);
  call.tasks = prompt.size(0);
  call.tokens = prompt.size(1);
  call.width = prompt.size(2);
  call.rank = given["offset_a"] ? given["offset_a"]->size(2) : 0;
  call.scaling = scaling;
  return call;
}

Tensor splice_forward(const Given& inputs, double scaling) {
  const Named<8> given("inputs", splice_names, inputs);
  const Tensor& prompt = given.required("prompt");
  const Launch launch(prompt);
  given.check_together("input_ids", "weight");
  const bool looked_up = given["input_ids"].has_value();
  if (looked_up == given["inputs_embeds"].has_value()) {
    refuse("inputs_embeds", "either input_ids or inputs_embeds", looked_up ? "both" : "neither");
  }
  const Tensor& text = given.required(looked_up ? "input_ids" : "inputs_embeds");
  const char* source_name = looked_up ? "weight" : "inputs_embeds";
  const Tensor& source = given.required(source_name);

  auto call = splice_call<ept::SpliceForward>(launch, given, scaling);
  call.input_ids = given.view("input_ids", 2, launch, Kind::ids);
  call.source = given.view(source_name, looked_up ? 2 : 3, launch);
  call.batch = text.size(0);
  call.length = text.size(1);
  call.vocabulary = looked_up ? source.size(0) : 0;

  const Tensor out =
      empty(source, {call.batch, call.tokens + call.length, call.width}, source.scalar_type());
  call.out = address(out);
  const Tensor space = workspace(prompt, ept::splice_forward_workspace(call));
  call.workspace = address(space);
  check(ept::splice_forward(call, launch.stream()));
  return out;
}

Tensors splice_backward(
    const Tensor& grad, const Given& inputs, double scaling, bool need_prompt, bool need_offset) {
  const Named<8> given("inputs", splice_names, inputs);
  const Launch launch(grad);
  auto call = splice_call<ept::SpliceBackward>(launch, given, scaling);
  call.grad = view("grad", grad, 3, launch);
  call.batch = grad.size(0);
  call.length = grad.size(1) - call.tokens;
  call.positions = given["offset_a"] ? given["offset_a"]->size(1) : 0;

  const Optional none;
  const Tensors grads = {
      empty_like(need_prompt ? given["prompt"] : none, grad),
      empty_like(need_offset ? given["offset_a"] : none, grad),
      empty_like(need_offset ? given["offset_b"] : none, grad)};
  call.d_prompt = address(grads[0]);
  call.d_offset_a = address(grads[1]);
  call.d_offset_b = address(grads[2]);
  if (call.d_prompt == nullptr && call.d_offset_a == nullptr) return grads;
  const Tensor space = workspace(grad, ept::splice_backward_workspace(call));
  call.workspace = address(space);
  check(ept::splice_backward(call, launch.stream()));
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ept_fast, m) {
  m.def(
      "cuda_reconstruct_forward(Tensor?[] parameters, float scaling, str activation, str gate, "
      "float temperature) -> Tensor[]");
  m.def(
      "cuda_reconstruct_backward(Tensor grad, Tensor?[] parameters, Tensor?[] saved, "
      "float scaling, str activation, str gate, float temperature) -> Tensor[]");
  m.def("cuda_splice_forward(Tensor?[] inputs, float scaling) -> Tensor");
  m.def(
      "cuda_splice_backward(Tensor grad, Tensor?[] inputs, float scaling, bool need_prompt, "
      "bool need_offset) -> Tensor[]");
}

#ifdef EPT_FAST_HOST
STABLE_TORCH_LIBRARY_IMPL(ept_fast, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(ept_fast, CUDA, m) {
#endif
  m.impl("cuda_reconstruct_forward", TORCH_BOX(&reconstruct_forward));
  m.impl("cuda_reconstruct_backward", TORCH_BOX(&reconstruct_backward));
  m.impl("cuda_splice_forward", TORCH_BOX(&splice_forward));
  m.impl("cuda_splice_backward", TORCH_BOX(&splice_backward));
}
