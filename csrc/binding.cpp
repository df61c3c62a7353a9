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
#include <tuple>
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

ept::View view(
    const char* name, const Optional& tensor, int64_t axes, const Launch& launch,
    Kind kind = Kind::floats) {
  return tensor ? view(name, *tensor, axes, launch, kind) : ept::View{};
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
  if (name == "gelu") return ept::Activation::gelu;
  if (name == "relu") return ept::Activation::relu;
  if (name == "silu") return ept::Activation::silu;
  if (name == "identity") return ept::Activation::identity;
  refuse("activation", "gelu, relu, silu or identity", name);
}

ept::Gate gate_of(const std::string& name) {
  if (name == "token") return ept::Gate::token;
  if (name == "prompt") return ept::Gate::prompt;
  refuse("gate", "token or prompt", name);
}

// A group of tensors is given whole or not at all.
void check_together(
    const char* first_name, const Optional& first, const char* name, const Optional& other) {
  if (first.has_value() != other.has_value()) {
    const bool misses_first = !first.has_value();
    refuse(
        misses_first ? first_name : name,
        std::string("a tensor beside ") + (misses_first ? name : first_name), "None");
  }
}

// Sizes, tensors and flags, which forward and backward have in common.
template <typename Call>
Call reconstruct_call(
    const Launch& launch, const Tensor& short_prompt, const Optional& offset_a,
    const Optional& offset_b, const Optional& space_down, const Optional& space_up,
    const Optional& gate_weight, const Optional& gate_bias, double scaling,
    const std::string& activation, const std::string& gate, double temperature) {
  check_together("offset_a", offset_a, "offset_b", offset_b);
  check_together("space_down", space_down, "space_up", space_up);
  check_together("space_down", space_down, "gate_weight", gate_weight);
  check_together("space_down", space_down, "gate_bias", gate_bias);
  Call call;
  call.short_prompt = view("short_prompt", short_prompt, 3, launch);
  call.offset_a = view("offset_a", offset_a, 3, launch);
  call.offset_b = view("offset_b", offset_b, 3, launch);
  call.space_down = view("space_down", space_down, 4, launch);
  call.space_up = view("space_up", space_up, 4, launch);
  call.gate_weight = view("gate_weight", gate_weight, 3, launch);
  call.gate_bias = view("gate_bias", gate_bias, 2, launch);
  call.tasks = short_prompt.size(0);
  call.tokens = short_prompt.size(1);
  call.width = short_prompt.size(2);
  if (offset_a) {
    call.positions = offset_a->size(1);
    call.rank = offset_a->size(2);
  }
  if (space_down) {
    call.spaces = space_down->size(1);
    call.dim = space_down->size(3);
  }
  call.scaling = scaling;
  call.temperature = temperature;
  call.activation = activation_of(activation);
  call.gate = gate_of(gate);
  return call;
}

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Seven reconstruct_forward(
    const Tensor& short_prompt, const Optional& offset_a, const Optional& offset_b,
    const Optional& space_down, const Optional& space_up, const Optional& gate_weight,
    const Optional& gate_bias, double scaling, const std::string& activation,
    const std::string& gate, double temperature) {
  const Launch launch(short_prompt);
  auto call = reconstruct_call<ept::ReconstructForward>(
      launch, short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias,
      scaling, activation, gate, temperature);

  const auto saved = [&](bool applies, Sizes sizes) {
    return applies ? empty(short_prompt, sizes, ScalarType::Float)
                   : empty(short_prompt, {0}, ScalarType::Float);
  };
  const bool offset = offset_a.has_value();
  const bool spaces = space_down.has_value();
  const int64_t dims = call.spaces * call.dim;
  const Tensor prompt = torch::stable::new_empty(short_prompt, short_prompt.sizes());
  const Tensor query = saved(offset, {call.tasks, call.tokens, call.rank});
  const Tensor stats = saved(offset, {call.tasks, 2, call.tokens});
  const Tensor mix = saved(offset, {call.tasks, call.tokens, call.rank});
  const Tensor hidden = saved(spaces, {call.tasks, call.tokens, dims});
  const Tensor gates = saved(spaces, {call.tasks, call.tokens, call.spaces});
  const Tensor cross = saved(offset && spaces, {call.tasks, call.rank, dims + call.spaces});
  call.prompt = address(prompt);
  call.query = address<float>(query);
  call.stats = address<float>(stats);
  call.mix = address<float>(mix);
  call.hidden = address<float>(hidden);
  call.gates = address<float>(gates);
  call.cross = address<float>(cross);

  const Tensor space = workspace(short_prompt, ept::reconstruct_forward_workspace(call));
  call.workspace = address(space);
  check(ept::reconstruct_forward(call, launch.stream()));
  return {prompt, query, stats, mix, hidden, gates, cross};
}

Seven reconstruct_backward(
    const Tensor& grad, const Tensor& short_prompt, const Optional& offset_a,
    const Optional& offset_b, const Optional& space_down, const Optional& space_up,
    const Optional& gate_weight, const Optional& gate_bias, const Tensor& query,
    const Tensor& stats, const Tensor& mix, const Tensor& hidden, const Tensor& gates,
    const Tensor& cross, double scaling, const std::string& activation, const std::string& gate,
    double temperature) {
  const Launch launch(grad);
  auto call = reconstruct_call<ept::ReconstructBackward>(
      launch, short_prompt, offset_a, offset_b, space_down, space_up, gate_weight, gate_bias,
      scaling, activation, gate, temperature);
  call.grad = view("grad", grad, 3, launch);

  std::vector<Tensor> held;  // copies that the launch reads
  const auto saved = [&](const char* name, const Tensor& tensor, bool applies, int64_t axes) {
    if (!applies) return static_cast<const float*>(nullptr);
    const ept::View found = view(name, tensor, axes, launch);
    if (found.type != ept::Type::float32) {
      refuse(name, "dtype float32", torch::headeronly::toString(tensor.scalar_type()));
    }
    held.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return static_cast<const float*>(held.back().const_data_ptr());
  };
  const bool offset = offset_a.has_value();
  const bool spaces = space_down.has_value();
  call.query = saved("query", query, offset, 3);
  call.stats = saved("stats", stats, offset, 3);
  call.mix = saved("mix", mix, offset, 3);
  call.hidden = saved("hidden", hidden, spaces, 3);
  call.gates = saved("gates", gates, spaces, 3);
  call.cross = saved("cross", cross, offset && spaces, 3);

  const Tensor d_short_prompt = empty_like(short_prompt, query);
  const Tensor d_offset_a = empty_like(offset_a, query);
  const Tensor d_offset_b = empty_like(offset_b, query);
  const Tensor d_space_down = empty_like(space_down, query);
  const Tensor d_space_up = empty_like(space_up, query);
  const Tensor d_gate_weight = empty_like(gate_weight, query);
  const Tensor d_gate_bias = empty_like(gate_bias, query);
  call.d_short_prompt = address(d_short_prompt);
  call.d_offset_a = address(d_offset_a);
  call.d_offset_b = address(d_offset_b);
  call.d_space_down = address(d_space_down);
  call.d_space_up = address(d_space_up);
  call.d_gate_weight = address(d_gate_weight);
  call.d_gate_bias = address(d_gate_bias);

  const Tensor space = workspace(grad, ept::reconstruct_backward_workspace(call));
  call.workspace = address(space);
  check(ept::reconstruct_backward(call, launch.stream()));
  return {d_short_prompt, d_offset_a,    d_offset_b, d_space_down,
          d_space_up,     d_gate_weight, d_gate_bias};
}

Tensor splice_forward(
    const Tensor& prompt, const Optional& input_ids, const Optional& weight,
    const Optional& inputs_embeds, const Optional& offset_a, const Optional& offset_b,
    const Optional& attention_mask, const Optional& task_ids, double scaling) {
  const Launch launch(prompt);
  check_together("input_ids", input_ids, "weight", weight);
  check_together("offset_a", offset_a, "offset_b", offset_b);
  if (input_ids.has_value() == inputs_embeds.has_value()) {
    refuse("inputs_embeds", "either input_ids or inputs_embeds", input_ids ? "both" : "neither");
  }
  const Tensor& text = input_ids ? *input_ids : *inputs_embeds;
  const Tensor& source = input_ids ? *weight : *inputs_embeds;

  ept::SpliceForward call;
  call.prompt = view("prompt", prompt, 3, launch);
  call.input_ids = view("input_ids", input_ids, 2, launch, Kind::ids);
  call.source = input_ids ? view("weight", source, 2, launch)
                          : view("inputs_embeds", source, 3, launch);
  call.offset_a = view("offset_a", offset_a, 3, launch);
  call.offset_b = view("offset_b", offset_b, 3, launch);
  call.attention_mask = view("attention_mask", attention_mask, 2, launch, Kind::mask);
  call.task_ids = view("task_ids", task_ids, 1, launch, Kind::ids);
  call.batch = text.size(0);
  call.length = text.size(1);
  call.tasks = prompt.size(0);
  call.tokens = prompt.size(1);
  call.width = prompt.size(2);
  call.rank = offset_a ? offset_a->size(2) : 0;
  call.vocabulary = input_ids ? source.size(0) : 0;
  call.scaling = scaling;

  const Tensor out =
      empty(source, {call.batch, call.tokens + call.length, call.width}, source.scalar_type());
  call.out = address(out);
  const Tensor space = workspace(prompt, ept::splice_forward_workspace(call));
  call.workspace = address(space);
  check(ept::splice_forward(call, launch.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> splice_backward(
    const Tensor& grad, const Tensor& prompt, const Optional& offset_a, const Optional& offset_b,
    const Optional& attention_mask, const Optional& task_ids, double scaling, bool need_prompt,
    bool need_offset) {
  const Launch launch(grad);
  check_together("offset_a", offset_a, "offset_b", offset_b);
  ept::SpliceBackward call;
  call.grad = view("grad", grad, 3, launch);
  call.prompt = view("prompt", prompt, 3, launch);
  call.offset_a = view("offset_a", offset_a, 3, launch);
  call.offset_b = view("offset_b", offset_b, 3, launch);
  call.attention_mask = view("attention_mask", attention_mask, 2, launch, Kind::mask);
  call.task_ids = view("task_ids", task_ids, 1, launch, Kind::ids);
  call.batch = grad.size(0);
  call.tasks = prompt.size(0);
  call.tokens = prompt.size(1);
  call.length = grad.size(1) - call.tokens;
  call.width = prompt.size(2);
  call.positions = offset_a ? offset_a->size(1) : 0;
  call.rank = offset_a ? offset_a->size(2) : 0;
  call.scaling = scaling;

  const Optional none;
  const Tensor d_prompt = empty_like(need_prompt ? Optional(prompt) : none, grad);
  const Tensor d_offset_a = empty_like(need_offset ? offset_a : none, grad);
  const Tensor d_offset_b = empty_like(need_offset ? offset_b : none, grad);
  call.d_prompt = address(d_prompt);
  call.d_offset_a = address(d_offset_a);
  call.d_offset_b = address(d_offset_b);
  if (call.d_prompt == nullptr && call.d_offset_a == nullptr) {
    return {d_prompt, d_offset_a, d_offset_b};
  }
  const Tensor space = workspace(grad, ept::splice_backward_workspace(call));
  call.workspace = address(space);
  check(ept::splice_backward(call, launch.stream()));
  return {d_prompt, d_offset_a, d_offset_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ept_fast, m) {
  m.def(
      "cuda_reconstruct_forward(Tensor short_prompt, Tensor? offset_a, Tensor? offset_b, "
      "Tensor? space_down, Tensor? space_up, Tensor? gate_weight, Tensor? gate_bias, "
      "float scaling, str activation, str gate, float temperature) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_reconstruct_backward(Tensor grad, Tensor short_prompt, Tensor? offset_a, "
      "Tensor? offset_b, Tensor? space_down, Tensor? space_up, Tensor? gate_weight, "
      "Tensor? gate_bias, Tensor query, Tensor stats, Tensor mix, Tensor hidden, Tensor gates, "
      "Tensor cross, float scaling, str activation, str gate, float temperature) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_splice_forward(Tensor prompt, Tensor? input_ids, Tensor? weight, "
      "Tensor? inputs_embeds, Tensor? offset_a, Tensor? offset_b, Tensor? attention_mask, "
      "Tensor? task_ids, float scaling) -> Tensor");
  m.def(
      "cuda_splice_backward(Tensor grad, Tensor prompt, Tensor? offset_a, Tensor? offset_b, "
      "Tensor? attention_mask, Tensor? task_ids, float scaling, bool need_prompt, "
      "bool need_offset) -> (Tensor, Tensor, Tensor)");
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
