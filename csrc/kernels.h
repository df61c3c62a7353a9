// The contract between the kernels and whoever launches them: plain C++, neither torch nor CUDA.
//
// A caller fills a struct, asks for the size of its workspace, allocates it together with the
// outputs, and launches. A launch allocates nothing, waits for nothing and reads no tensor on the
// host. Symbols are those of docs/method.md; T tasks come first in every tensor of parameters.
//
// Every tensor has elements: a call with an empty one (m, n, r, d, K, h, T, batch or length of 0) is
// the caller's to answer without a kernel, unless a field below says otherwise.
#pragma once

#include "activations.h"

#include <cstdint>

struct CUstream_st;  // what cudaStream_t points to

namespace ept {

// Types of parameters, embeddings and gradients, in any mixture.
enum class Type : int32_t {
  float32 = 0,
  float16 = 1,
  bfloat16 = 2,
  // Types of masks, ids and task ids only; a bool or uint8 mask is passed as int8.
  int8 = 3,
  int16 = 4,
  int32 = 5,
  int64 = 6,
};

// A tensor as it lies in memory. Strides count elements, first axis first, and may be 0 (expanded);
// those of axes that the tensor does not have are not read. `data == nullptr`: not given.
struct View {
  void* data = nullptr;
  Type type = Type::float32;
  int64_t stride[4] = {0, 0, 0, 0};
};

#define EPT_NAME(name, phi, derivative) name,
enum class Activation : int32_t { EPT_ACTIVATIONS(EPT_NAME) };
#undef EPT_NAME
enum class Gate : int32_t { token = 0, prompt = 1 };

// The largest sizes that the kernels serve, as in ept_fast/backends/fused.py.
inline constexpr int64_t max_rank = 256;      // r
inline constexpr int64_t max_spaces = 512;    // K·h; K·(h + 1) with biases beside a gate
inline constexpr int64_t max_tokens = 512;    // m of operation 1
inline constexpr int64_t max_size = 1 << 30;  // any one axis

// What a launch came to. `error` is a cudaError_t, 0 for success; `kernel` names the kernel that
// was to be launched, and is never null.
struct Status {
  int error = 0;
  const char* kernel = "";
};

// CUDA's words for an error, such as "invalid device function".
const char* error_string(int error);

// Operation 1, what both directions take. Offset and spaces are each given whole or not at all, but
// for the gate of a single space, which is then 1; with neither, the result is the short prompt
// itself. Biases are given both or neither, with the spaces.
struct Reconstruct {
  int64_t tasks = 1;      // T
  int64_t tokens = 0;     // m
  int64_t positions = 0;  // n; 0 without the offset
  int64_t rank = 0;       // r; 0 without the offset
  int64_t spaces = 0;     // K; 0 without the spaces
  int64_t dim = 0;        // h; 0 without the spaces
  int64_t width = 0;      // d

  View short_prompt;     // P [T, m, d]
  View offset_a;         // A [T, n, r]
  View offset_b;         // B [T, r, d]
  View space_down;       // D [T, K, d, h]
  View space_up;         // U [T, K, h, d]
  View gate_weight;      // G [T, d, K]
  View gate_bias;        // b [T, K]; read for its type only by the backward
  View space_down_bias;  // u [T, K, h]; read for its type only by the backward
  View space_up_bias;    // v [T, K, d]

  double scaling = 1;      // c
  double temperature = 1;  // τ
  Activation activation = Activation::gelu;
  Gate gate = Gate::token;

  void* workspace = nullptr;  // as many bytes as the call needs, aligned to 16; may be none
};

// Outputs, contiguous. The prompt has the type of short_prompt; what is saved is float32 and null
// if it does not apply.
struct ReconstructForward : Reconstruct {
  void* prompt = nullptr;     // P′ [T, m, d]
  float* query = nullptr;     // Q [T, m, r]                with the offset
  float* stats = nullptr;     // [T, 2, m]                  with the offset: row maxima and row sums
  float* attended = nullptr;  // O [T, m, r]                with the offset
  float* hidden = nullptr;    // Hin [T, m, K·h]            with the spaces
  float* gates = nullptr;     // g [T, m, K]                with a gate
  float* cross = nullptr;     // S [T, r, K·h + K]          with both; [T, r, K·h] without a gate
};

struct ReconstructBackward : Reconstruct {
  View grad;  // Y = dL/dP′ [T, m, d]

  // What the forward saved: float32, contiguous, null if it does not apply.
  const float* query = nullptr;
  const float* stats = nullptr;
  const float* attended = nullptr;
  const float* hidden = nullptr;
  const float* gates = nullptr;
  const float* cross = nullptr;

  // Gradients, contiguous, each in its parameter's type and shape; null if the parameter is not
  // given.
  void* d_short_prompt = nullptr;
  void* d_offset_a = nullptr;
  void* d_offset_b = nullptr;
  void* d_space_down = nullptr;
  void* d_space_up = nullptr;
  void* d_gate_weight = nullptr;
  void* d_gate_bias = nullptr;
  void* d_space_down_bias = nullptr;
  void* d_space_up_bias = nullptr;
};

// Operation 2, what both directions take.
struct Splice {
  int64_t batch = 0;
  int64_t length = 0;  // S; may be 0: the prompt alone
  int64_t tasks = 1;   // T
  int64_t tokens = 0;  // m; may be 0: the text alone
  int64_t width = 0;   // d
  int64_t rank = 0;    // r; 0 without the offset

  View prompt;          // P′ [T, m, d]; read for its type only by the backward
  View offset_a;        // A [T, n, r], n >= S; not given: no offset, and the mask is not read
  View offset_b;        // B [T, r, d]
  View attention_mask;  // [batch, S], any integer type, 0: padding; not given: all tokens are real
  View task_ids;        // [batch], int32 or int64; not given: T is 1

  double scaling = 1;  // c

  void* workspace = nullptr;  // as many bytes as the call needs, aligned to 16; may be none
};

// Either ids and a table, or embeddings.
//
// A token id outside the table, or a task id outside the bank, makes NaN of its token or row, and
// nothing is read through it.
struct SpliceForward : Splice {
  int64_t vocabulary = 0;  // rows of the table; 0 if source is embeddings
  View input_ids;          // [batch, S], int32 or int64; not given: source is embeddings
  View source;             // [vocabulary, d], the table, or [batch, S, d], the embeddings
  void* out = nullptr;     // [batch, m + S, d], contiguous, the source's type
};

// The gradients of prompt and offset, each if it is asked for. With S of 0 those of the offset are
// zeros, as they are at positions from S on.
struct SpliceBackward : Splice {
  int64_t positions = 0;  // n
  View grad;              // of the output, [batch, m + S, d]

  // Gradients, contiguous, each in its parameter's type and shape; null if it is not needed.
  // Those of the offset are needed both or neither.
  void* d_prompt = nullptr;
  void* d_offset_a = nullptr;
  void* d_offset_b = nullptr;
};

// After the backward of both: sum += half for A and B, contiguous and of their parameters' types.
struct Addition {
  void* sum[2];
  const void* half[2];
  Type type[2];
  int64_t size[2];  // elements
};

// The structs of the calls that have a workspace, and the functions that launch them.
#define EPT_CALLS(ROW)                           \
  ROW(ReconstructForward, reconstruct_forward)   \
  ROW(ReconstructBackward, reconstruct_backward) \
  ROW(SpliceForward, splice_forward)             \
  ROW(SpliceBackward, splice_backward)

// Bytes of workspace for a call: from its sizes and from which of its tensors are given. The
// structs' pointers need not be valid yet, but have to be null or not as they will be; outputs and
// the workspace itself may still be null, save the gradients of SpliceBackward, which say what is
// needed: any other address will do for them.
#define EPT_WORKSPACE(Call, name) int64_t name##_workspace(const Call& call);
EPT_CALLS(EPT_WORKSPACE)
#undef EPT_WORKSPACE

// Launch on a stream of the current device.
#define EPT_LAUNCH(Call, name) Status name(const Call& call, CUstream_st* stream);
EPT_CALLS(EPT_LAUNCH)
#undef EPT_LAUNCH
Status add(const Addition& call, CUstream_st* stream);

}  // namespace ept
