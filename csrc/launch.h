// What each call launches: sizes of grids, places in the workspace, and the kernels for its types.
// The launcher runs them, on a GPU or on a host.
//
// A launcher has `template <class Kernel> Status run(int64_t blocks, const typename Kernel::Call&)`.
#pragma once

#include <cmath>

#include "partition.h"
#include "reconstruct_backward.h"
#include "reconstruct_forward.h"
#include "splice_backward.h"
#include "splice_forward.h"

namespace ept {

inline int narrow(int64_t size) { return static_cast<int>(size); }

inline bool given(const View& view) { return view.data != nullptr; }

inline int64_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

// Whether every row of a tensor can be moved in 16-byte pieces.
inline bool moves_in_vectors(const void* data, Type type, int64_t width, int64_t stride_d,
                             const int64_t* strides, int number) {
  const int64_t step = 16 / size_of(type);
  bool fits = stride_d == 1 && width % step == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int i = 0; i < number; ++i) fits = fits && strides[i] % step == 0;
  return fits;
}

// A kernel for a type of tensors.
template <template <class, bool> class Kernel, class Launcher, class Call>
Status run_for(const Launcher& launcher, Type type, bool vectors, int64_t blocks, const Call& of) {
  const auto run = [&]<class T>(T) {
    return vectors ? launcher.template run<Kernel<T, true>>(blocks, of)
                   : launcher.template run<Kernel<T, false>>(blocks, of);
  };
  if (type == Type::float32) return run(float{});
  return type == Type::float16 ? run(Half{}) : run(BFloat16{});
}

// Operation 2

inline bool has_offset(const SpliceForward& call) {
  return given(call.offset_a) && call.rank > 0 && call.length > 0;
}

inline bool has_offset(const SpliceBackward& call) {
  return call.d_offset_a != nullptr && call.rank > 0 && call.length > 0;
}

template <class Call>
bool reads_mask(const Call& call) {
  return given(call.attention_mask) && has_offset(call);
}

template <class Call>
Plan take_plan(Workspace& workspace, const Call& call) {
  Plan plan;
  if (reads_mask(call)) {
    plan.firsts = workspace.take<int32_t>(call.batch);
    plan.reals = workspace.take<int32_t>(call.batch);
    plan.columns = workspace.take<int32_t>(call.batch * call.length);
  }
  if (given(call.task_ids)) {
    plan.rows = workspace.take<int32_t>(call.batch);
    plan.tasks = workspace.take<int32_t>(call.batch);
    plan.begins = workspace.take<int32_t>(call.tasks + 2);
  }
  return plan;
}

template <class Of, class Call>
Of splice_call(const Call& call, const Plan& plan) {
  Of of{};
  of.offset_a = call.offset_a;
  of.offset_b = call.offset_b;
  of.plan = plan;
  of.batch = narrow(call.batch);
  of.length = narrow(call.length);
  of.tasks = narrow(call.tasks);
  of.tokens = narrow(call.tokens);
  of.width = narrow(call.width);
  of.rank = has_offset(call) ? narrow(call.rank) : 0;
  of.scaling = static_cast<float>(call.scaling);
  return of;
}

// A stretch of a row is what the threads of a block look at once, or more if that would make many
// blocks of a row.
template <class Launcher, class Call>
Status run_plan(const Launcher& launcher, const Call& call, const Plan& plan) {
  if (!reads_mask(call) && !given(call.task_ids)) return {};
  const int64_t step = SplicePlanKernel::step;
  const int64_t steps = reads_mask(call) ? pieces_of(call.length, step) : 1;
  auto of = splice_call<SplicePlanCall>(call, plan);
  of.attention_mask = call.attention_mask;
  of.task_ids = call.task_ids;
  of.stretch = narrow(pieces_of(steps, within(1, steps, 64)) * step);
  const int64_t stretches = pieces_of(steps * step, of.stretch);
  return launcher.template run<SplicePlanKernel>(call.batch * stretches, of);
}

inline int64_t splice_forward_bytes(const SpliceForward& call) {
  Workspace workspace(nullptr);
  take_plan(workspace, call);
  return workspace.bytes();
}

template <class Launcher>
Status run_splice_forward(const Launcher& launcher, const SpliceForward& call) {
  using Tile = SpliceForwardKernel<float, false>::Tile;
  Workspace workspace(call.workspace);
  auto of = splice_call<SpliceForwardCall>(call, take_plan(workspace, call));
  of.prompt = call.prompt;
  of.input_ids = call.input_ids;
  of.source = call.source;
  if (given(call.input_ids)) {
    of.source.stride[0] = 0;
    of.source.stride[1] = call.source.stride[0];
    of.source.stride[2] = call.source.stride[1];
  }
  of.out = call.out;
  of.vocabulary = call.vocabulary;
  of.tiles_m = narrow(pieces_of(call.tokens, Tile::positions));
  of.tiles_s = narrow(pieces_of(call.length, Tile::positions));
  of.tiles_d = narrow(pieces_of(call.width, Tile::channels));
  // The offset of a tile is computed once for its rows: as many as leave enough blocks.
  const int64_t tiles = int64_t{of.tiles_m + of.tiles_s} * of.tiles_d;
  of.rows = narrow(within(1, pieces_of(tiles * call.batch, enough_blocks), 8));
  const int64_t blocks = pieces_of(call.batch, of.rows) * tiles;

  const Status planned = run_plan(launcher, call, of.plan);
  if (planned.error != 0) return planned;
  const Type type = call.source.type;
  const bool vectors =
      moves_in_vectors(call.out, type, call.width, 1, nullptr, 0) &&
      moves_in_vectors(call.source.data, type, call.width, of.source.stride[2], of.source.stride, 2);
  return run_for<SpliceForwardKernel>(launcher, type, vectors, blocks, of);
}

inline SplicePartition partition_of(const SpliceBackward& call) {
  using Kernel = SpliceBackwardKernel<float, false>;
  const auto is_float = [](const View& view) { return view.type == Type::float32; };
  return splice_partition({call.batch, call.length, call.tasks, call.tokens, call.width, call.rank,
                           call.d_prompt != nullptr, has_offset(call), is_float(call.prompt),
                           is_float(call.offset_a), is_float(call.offset_b),
                           Kernel::Tile::positions, Kernel::Tile::channels});
}

inline SpliceBackwardCall splice_call(Workspace& workspace, const SpliceBackward& call,
                                      const SplicePartition& cut) {
  using Tile = SpliceBackwardKernel<float, false>::Tile;
  auto of = splice_call<SpliceBackwardCall>(call, take_plan(workspace, call));
  const auto sum = [&](int64_t parts, void* gradient) {
    return parts > 0 ? workspace.take<float>(parts) : static_cast<float*>(gradient);
  };
  of.grad = call.grad;
  of.sum_p = sum(cut.part_p, call.d_prompt);
  of.sum_a = sum(cut.part_a, call.d_offset_a);
  of.sum_b = sum(cut.part_b, call.d_offset_b);
  of.whole_p = cut.part_p == 0;
  of.whole_a = cut.part_a == 0;
  of.whole_b = cut.part_b == 0;
  of.positions = narrow(call.positions);
  of.by_row = given(call.task_ids) && call.tasks > call.batch;
  of.chunks_b = narrow(cut.chunks_b);
  of.rows = narrow(cut.rows);
  of.tiles_m = call.d_prompt == nullptr ? 0 : narrow(pieces_of(call.tokens, Tile::positions));
  of.chunks_s = has_offset(call) ? narrow(cut.chunks_s) : 0;
  of.tiles_s = narrow(cut.tiles_s);
  of.chunks_d = narrow(cut.chunks_d);
  of.tiles_d = narrow(cut.tiles_d);
  return of;
}

inline int64_t splice_backward_bytes(const SpliceBackward& call) {
  Workspace workspace(nullptr);
  splice_call(workspace, call, partition_of(call));
  return workspace.bytes();
}

template <class Launcher>
Status run_splice_backward(const Launcher& launcher, const SpliceBackward& call) {
  const SplicePartition cut = partition_of(call);
  Workspace workspace(call.workspace);
  const SpliceBackwardCall of = splice_call(workspace, call, cut);
  const Status planned = run_plan(launcher, call, of.plan);
  if (planned.error != 0) return planned;
  const int64_t blocks =
      cut.groups * cut.chunks_b * (of.tiles_m + of.chunks_s) * int64_t{of.chunks_d};
  const View& grad = call.grad;
  const Status summed = run_for<SpliceBackwardKernel>(
      launcher, grad.type,
      moves_in_vectors(grad.data, grad.type, call.width, grad.stride[2], grad.stride, 2), blocks,
      of);
  if (summed.error != 0) return summed;

  // What is whole needs the second kernel only for its zeros.
  SpliceFinishCall finish{};
  const auto add = [&](int index, void* gradient, Type type, const float* parts, int64_t number,
                       int64_t size, int64_t covered) {
    if (gradient == nullptr) return;
    if (number == 0 && !of.by_row && size == covered) return;
    finish.sums[index] = {gradient, type, parts, narrow(number), size, covered};
    finish.blocks += narrow(pieces_of(size, SpliceFinishKernel::threads));
  };
  const int64_t size_p = call.tokens * call.width, size_b = call.rank * call.width;
  const int64_t covered = has_offset(call) ? call.length * call.rank : 0;
  add(0, call.d_prompt, call.prompt.type, of.sum_p, of.whole_p ? 0 : cut.chunks_b, size_p, size_p);
  add(1, call.d_offset_a, call.offset_a.type, of.sum_a,
      of.whole_a ? 0 : cut.chunks_b * cut.chunks_d, call.positions * call.rank, covered);
  add(2, call.d_offset_b, call.offset_b.type, of.sum_b,
      of.whole_b ? 0 : cut.chunks_b * cut.chunks_s, size_b, covered > 0 ? size_b : 0);
  finish.plan = of.plan;
  finish.by_row = of.by_row;
  return launcher.template run<SpliceFinishKernel>(call.tasks * finish.blocks, finish);
}

// Operation 1

template <class Call>
Parts parts_of(const Call& call) {
  Parts parts{};
  parts.tasks = narrow(call.tasks);
  parts.m = narrow(call.tokens);
  parts.d = narrow(call.width);
  if (given(call.offset_a)) {
    parts.n = narrow(call.positions);
    parts.r = narrow(call.rank);
  }
  parts.dim = 1;
  if (given(call.space_down)) {
    parts.spaces = narrow(call.spaces);
    parts.dim = narrow(call.dim);
  }
  parts.dims = given(call.space_down) ? parts.spaces * parts.dim : 0;
  parts.columns = parts.dims + (given(call.gate_weight) ? parts.spaces : 0);
  parts.p = call.short_prompt;
  parts.a = call.offset_a;
  parts.b = call.offset_b;
  parts.down = call.space_down;
  parts.up = call.space_up;
  parts.gate_weight = call.gate_weight;
  parts.gate_bias = call.gate_bias;
  parts.down_bias = call.space_down_bias;
  parts.up_bias = call.space_up_bias;
  parts.scaling = static_cast<float>(call.scaling);
  parts.score_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(call.width)));
  parts.temperature = static_cast<float>(call.temperature);
  parts.activation = call.activation;
  parts.gate = given(call.gate_weight) ? call.gate : Gate::token;
  return parts;
}

// Whether the kernels' plain form serves a call.
template <class Call>
bool is_plain(const Call& call) {
  return !given(call.space_down) || (given(call.gate_weight) && !given(call.space_down_bias));
}

// Positions of a piece of n, so that there are about so many blocks; `step` at a time.
inline int chunk_of(const Parts& parts, int64_t blocks, int64_t step) {
  const int64_t steps = pieces_of(parts.n, step);
  const int64_t tiles = int64_t{parts.tasks} * pieces_of(parts.m, ReconstructBlock::tokens);
  return narrow(pieces_of(steps, within(1, blocks / tiles, least<int64_t>(steps, 64))) * step);
}

// Whether blocks that repeat so many multiplications each take longer than a launch that makes
// their results once: beyond about 10 µs for one block, or for all of them on a GPU, by estimate.
inline bool repeats_too_much(int64_t multiplications, int64_t blocks) {
  return multiplications > 1 << 20 || multiplications * blocks > 1 << 27;
}

// Whether the forward takes one launch. One gate for all tokens needs O of all of them.
inline bool takes_one_launch(const Parts& parts, int64_t blocks) {
  if (parts.r == 0 && parts.spaces == 0) return true;
  if (parts.spaces > 0 && parts.gate == Gate::prompt) return false;
  // What shared memory has room for.
  if (parts.r > ReconstructForwardKernel<true>::most_fused || parts.columns > 128) return false;
  const int64_t over_d = int64_t{parts.d} * (2 * parts.r + parts.columns);
  const int64_t over_n = int64_t{parts.n} * 2 * parts.r;
  return !repeats_too_much(ReconstructBlock::tokens * (over_d + over_n), blocks);
}

inline ReconstructForwardCall plan_of(Workspace& workspace, const ReconstructForward& call) {
  using Kernel = ReconstructForwardKernel<true>;
  ReconstructForwardCall of{};
  of.tensors = call;
  const Parts& parts = of.parts = parts_of(call);
  of.tiles_m = narrow(pieces_of(parts.m, Kernel::tokens));
  of.across = narrow(pieces_of(parts.d, ExpandTile::channels));
  of.pieces = 1;
  of.chunk = parts.n;
  const int64_t tiles_c = pieces_of(parts.columns, Kernel::side);
  of.products = narrow(pieces_of(parts.r, Kernel::tokens) * tiles_c);
  if (takes_one_launch(parts, int64_t{parts.tasks} * of.tiles_m * of.across)) return of;
  of.launch = Launch::first;
  if (parts.r > 0) {
    of.chunk = chunk_of(parts, 256, Kernel::positions);
    of.pieces = narrow(pieces_of(parts.n, of.chunk));
  }
  of.across = parts.r > 0 ? of.pieces : 0;
  of.products += narrow(of.tiles_m * tiles_c);
  const int64_t rows = int64_t{parts.tasks} * parts.m;
  of.x = workspace.take<float>(rows * parts.columns);
  of.softmax = workspace.take<float>(rows * of.across * (2 + parts.r));
  return of;
}

inline int64_t reconstruct_forward_bytes(const ReconstructForward& call) {
  Workspace workspace(nullptr);
  plan_of(workspace, call);
  return workspace.bytes();
}

template <class Launcher>
Status run_reconstruct_forward(const Launcher& launcher, const ReconstructForward& call) {
  Workspace workspace(call.workspace);
  ReconstructForwardCall of = plan_of(workspace, call);
  const auto run = [&] {
    const int64_t blocks = call.tasks * (int64_t{of.tiles_m} * of.across + of.products);
    if (is_plain(call)) return launcher.template run<ReconstructForwardKernel<true>>(blocks, of);
    return launcher.template run<ReconstructForwardKernel<false>>(blocks, of);
  };
  const Status done = run();
  if (of.launch == Launch::only || done.error != 0) return done;
  of.launch = Launch::second;
  of.across = narrow(pieces_of(call.width, ExpandTile::channels));
  of.products = 0;
  return run();
}

inline ReconstructBackwardCall plan_of(Workspace& workspace, const ReconstructBackward& call) {
  using Kernel = BackwardExpandKernel<true>;
  ReconstructBackwardCall of{};
  of.tensors = call;
  const Parts& parts = of.parts = parts_of(call);
  of.tiles_m = narrow(pieces_of(parts.m, Kernel::tokens));
  of.pieces = 1;
  if (parts.r > 0) {
    // Each piece repeats the products over d, so only long ones are cut further.
    of.chunk = chunk_of(parts, 128, ScoreTile::positions);
    if (of.chunk > 512) of.chunk = chunk_of(parts, 256, ScoreTile::positions);
    of.pieces = narrow(pieces_of(parts.n, of.chunk));
    of.tiles_a = narrow(pieces_of(parts.n, ScoreTile::positions));
  }
  of.tiles_d = narrow(pieces_of(parts.d, ExpandTile::channels));
  const bool plain = is_plain(call);
  using Other = BackwardExpandKernel<false>;
  const int rows_of_up = plain ? Kernel::rows_of_up(parts) : Other::rows_of_up(parts);
  const int64_t rows_of[] = {parts.r, parts.columns, rows_of_up};
  for (int i = 0; i < 3; ++i) of.tiles_of[i] = narrow(pieces_of(rows_of[i], Kernel::columns));
  of.tiles_of[3] = of.tiles_m;
  const int summed = plain ? Kernel::summed(parts) : Other::summed(parts);
  of.tiles_bias = narrow(pieces_of(summed, Kernel::threads));
  const int64_t rows = int64_t{parts.tasks} * parts.m;
  if (parts.spaces > 0 && parts.gate == Gate::prompt) {
    const int64_t repeated = parts.m * int64_t{parts.d} * parts.dims;
    if (repeats_too_much(repeated, int64_t{parts.tasks} * of.tiles_m * of.pieces)) {
      of.launch = Launch::first;
      of.d_gates = workspace.take<float>(int64_t{parts.tasks} * of.tiles_m * parts.spaces);
    }
  }
  of.d_x = workspace.take<float>(rows * parts.columns);
  of.d_attended = workspace.take<float>(rows * parts.r);
  of.inner = workspace.take<float>(rows);
  of.d_query = workspace.take<float>(rows * of.pieces * parts.r);
  return of;
}

inline int64_t reconstruct_backward_bytes(const ReconstructBackward& call) {
  Workspace workspace(nullptr);
  plan_of(workspace, call);
  return workspace.bytes();
}

template <class Launcher>
Status run_reconstruct_backward(const Launcher& launcher, const ReconstructBackward& call) {
  Workspace workspace(call.workspace);
  ReconstructBackwardCall of = plan_of(workspace, call);
  const auto run_core = [&](const ReconstructBackwardCall& core) {
    const int64_t blocks = call.tasks * core.tiles_m * core.pieces;
    if (is_plain(call)) return launcher.template run<BackwardCoreKernel<true>>(blocks, core);
    return launcher.template run<BackwardCoreKernel<false>>(blocks, core);
  };
  if (of.launch == Launch::first) {
    ReconstructBackwardCall gates = of;
    gates.pieces = 1;
    const Status done = run_core(gates);
    if (done.error != 0) return done;
    of.launch = Launch::second;
  }
  if (of.parts.r > 0 || of.parts.spaces > 0) {
    const Status done = run_core(of);
    if (done.error != 0) return done;
  }
  const int64_t blocks = call.tasks * (of.tiles() + of.tiles_a + of.tiles_bias);
  if (is_plain(call)) return launcher.template run<BackwardExpandKernel<true>>(blocks, of);
  return launcher.template run<BackwardExpandKernel<false>>(blocks, of);
}

}  // namespace ept
