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
  parts.columns = parts.dims + parts.spaces;
  parts.p = call.short_prompt;
  parts.a = call.offset_a;
  parts.b = call.offset_b;
  parts.down = call.space_down;
  parts.up = call.space_up;
  parts.gate_weight = call.gate_weight;
  parts.gate_bias = call.gate_bias;
  parts.scaling = static_cast<float>(call.scaling);
  parts.score_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(call.width)));
  parts.temperature = static_cast<float>(call.temperature);
  parts.activation = call.activation;
  parts.gate = call.gate;
  return parts;
}

// Blocks that fill a GPU of today: pieces of d and of n are made until there are about so many, and
// no more, since every part is written and read again.
inline constexpr int64_t reconstruct_blocks = 128;

// The grid of the reduction over d, and with it the shape of its sums.
inline ReduceCall reduction_of(const Parts& parts, const View& grad) {
  const bool forward = !given(grad);
  ReduceCall of{};
  of.parts = parts;
  of.grad = grad;
  of.rows = forward && parts.spaces > 0 ? parts.m + parts.r : parts.m;
  of.columns = parts.r + (forward ? parts.columns : parts.dims);
  of.tiles_i = narrow(pieces_of(of.rows, ReduceKernel::side));
  of.tiles_j = narrow(pieces_of(of.columns, ReduceKernel::side));
  const int64_t depth = ReduceKernel::depth;
  const int64_t tiles = greatest<int64_t>(1, int64_t{parts.tasks} * of.tiles_i * of.tiles_j);
  const int64_t most = pieces_of(parts.d, 2 * depth);
  const int64_t wanted = within(1, least(pieces_of(reconstruct_blocks, tiles), most), 16);
  of.chunk = narrow(pieces_of(pieces_of(parts.d, wanted), depth) * depth);
  of.splits = narrow(pieces_of(parts.d, of.chunk));
  return of;
}

inline int64_t blocks_of(const ReduceCall& of) {
  return int64_t{of.parts.tasks} * of.splits * of.tiles_i * of.tiles_j;
}

inline int64_t sums_of(const ReduceCall& of) {
  return int64_t{of.parts.tasks} * of.splits * of.rows * of.columns;
}

struct ForwardPlaces {
  ReduceCall reduction;
  int tiles;          // of m
  int pieces, chunk;  // of n
  float *maxima, *totals, *attended_parts, *x;
};

inline ForwardPlaces take_places(Workspace& workspace, const Parts& parts) {
  ForwardPlaces places{};
  places.reduction = reduction_of(parts, {});
  places.tiles = narrow(pieces_of(parts.m, ForwardCoreKernel::tokens));
  places.pieces = places.chunk = 1;
  if (parts.r > 0) {
    const int64_t tile = ForwardCoreKernel::positions, most = pieces_of(parts.n, tile);
    const int64_t wanted = reconstruct_blocks / (int64_t{parts.tasks} * places.tiles);
    const int64_t pieces = within(1, wanted, least<int64_t>(most, 32));
    places.chunk = narrow(pieces_of(most, pieces) * tile);
    places.pieces = narrow(pieces_of(parts.n, places.chunk));
  }
  const int64_t rows = int64_t{parts.tasks} * parts.m;
  const int64_t attention = parts.r > 0 ? rows * places.pieces : 0;
  places.reduction.sums = workspace.take<float>(sums_of(places.reduction));
  places.maxima = workspace.take<float>(attention);
  places.totals = workspace.take<float>(attention);
  places.attended_parts = workspace.take<float>(attention * parts.r);
  places.x = workspace.take<float>(rows * parts.columns);
  return places;
}

inline int64_t reconstruct_forward_bytes(const ReconstructForward& call) {
  Workspace workspace(nullptr);
  take_places(workspace, parts_of(call));
  return workspace.bytes();
}

template <class Launcher>
Status run_reconstruct_forward(const Launcher& launcher, const ReconstructForward& call) {
  const Parts parts = parts_of(call);
  Workspace workspace(call.workspace);
  const ForwardPlaces places = take_places(workspace, parts);
  const ReduceCall& reduction = places.reduction;
  if (reduction.columns > 0) {
    const Status reduced = launcher.template run<ReduceKernel>(blocks_of(reduction), reduction);
    if (reduced.error != 0) return reduced;
    ForwardCoreCall core{};
    core.parts = parts;
    core.sums = reduction.sums;
    core.splits = reduction.splits;
    core.rows = reduction.rows;
    core.columns = reduction.columns;
    core.query = call.query;
    core.maxima = places.maxima;
    core.totals = places.totals;
    core.attended_parts = places.attended_parts;
    core.x = places.x;
    core.cross = call.cross;
    core.pieces = places.pieces;
    core.chunk = places.chunk;
    core.tiles = places.tiles;
    core.blocks_x = narrow(pieces_of(int64_t{reduction.rows} * parts.columns,
                                     ForwardCoreKernel::threads * ForwardCoreKernel::each));
    const int64_t attention = parts.r > 0 ? int64_t{core.tiles} * core.pieces : 0;
    const Status done = launcher.template run<ForwardCoreKernel>(
        parts.tasks * (attention + core.blocks_x), core);
    if (done.error != 0) return done;
  }
  ForwardExpandCall expand{};
  expand.parts = parts;
  expand.maxima = places.maxima;
  expand.totals = places.totals;
  expand.attended_parts = places.attended_parts;
  expand.x = places.x;
  expand.cross = call.cross;
  expand.pieces = places.pieces;
  expand.prompt = call.prompt;
  expand.stats = call.stats;
  expand.attended = call.attended;
  expand.hidden = call.hidden;
  expand.gates = call.gates;
  expand.tiles_m = places.tiles;
  expand.tiles_d = narrow(pieces_of(parts.d, ExpandTile::channels));
  return launcher.template run<ForwardExpandKernel>(
      int64_t{parts.tasks} * expand.tiles_m * expand.tiles_d, expand);
}

struct BackwardPlaces {
  ReduceCall reduction;
  int groups, tiles;  // of m
  int chunks, chunk;  // of n
  bool whole_a;
  float *d_x, *d_query, *d_a;
};

inline BackwardPlaces take_places(Workspace& workspace, const ReconstructBackward& call,
                                  const Parts& parts) {
  using Kernel = BackwardCoreKernel;
  BackwardPlaces places{};
  places.reduction = reduction_of(parts, call.grad);
  const int64_t tiles_m = pieces_of(parts.m, Kernel::tokens);
  int64_t groups = within(1, pieces_of(reconstruct_blocks, parts.tasks), tiles_m);
  places.chunks = places.chunk = 1;
  if (parts.r > 0) {
    // The parts of dA are one for each group: a quarter of the workspace, or else one.
    const int64_t size = 4 * int64_t{parts.tasks} * parts.n * parts.r;
    groups = within(1, workspace_limit / 4 / size, groups);
  }
  places.tiles = narrow(pieces_of(tiles_m, groups));
  places.groups = narrow(pieces_of(tiles_m, places.tiles));
  if (parts.r > 0) {
    const int64_t tile = Kernel::positions, most = pieces_of(parts.n, tile);
    const int64_t wanted = pieces_of(reconstruct_blocks, int64_t{parts.tasks} * places.groups);
    const int64_t chunks = within(1, least<int64_t>(wanted, 64), most);
    places.chunk = narrow(pieces_of(most, chunks) * tile);
    places.chunks = narrow(pieces_of(parts.n, places.chunk));
  }
  // What is added to group by group, or tile by tile, has to be float32.
  places.whole_a =
      places.groups == 1 && (places.tiles == 1 || call.offset_a.type == Type::float32);
  const int64_t rows = int64_t{parts.tasks} * parts.m;
  places.reduction.sums = workspace.take<float>(sums_of(places.reduction));
  places.d_x = workspace.take<float>(rows * parts.columns);
  places.d_query = workspace.take<float>(rows * places.chunks * parts.r);
  const int64_t parts_a = int64_t{parts.tasks} * places.groups * parts.n * parts.r;
  places.d_a = workspace.take<float>(places.whole_a ? 0 : parts_a);
  return places;
}

inline int64_t reconstruct_backward_bytes(const ReconstructBackward& call) {
  Workspace workspace(nullptr);
  take_places(workspace, call, parts_of(call));
  return workspace.bytes();
}

template <class Launcher>
Status run_reconstruct_backward(const Launcher& launcher, const ReconstructBackward& call) {
  const Parts parts = parts_of(call);
  Workspace workspace(call.workspace);
  const BackwardPlaces places = take_places(workspace, call, parts);
  const ReduceCall& reduction = places.reduction;
  const Saved saved{call.query, call.stats, call.attended, call.hidden, call.gates, call.cross};
  if (reduction.columns > 0) {
    const Status reduced = launcher.template run<ReduceKernel>(blocks_of(reduction), reduction);
    if (reduced.error != 0) return reduced;
    BackwardCoreCall core{};
    core.parts = parts;
    core.saved = saved;
    core.sums = reduction.sums;
    core.splits = reduction.splits;
    core.d_x = places.d_x;
    core.d_query = places.d_query;
    core.d_a = places.whole_a ? call.d_offset_a : places.d_a;
    core.type_a = places.whole_a ? call.offset_a.type : Type::float32;
    core.groups = places.groups;
    core.tiles = places.tiles;
    core.chunks = places.chunks;
    core.chunk = places.chunk;
    const Status done = launcher.template run<BackwardCoreKernel>(
        int64_t{parts.tasks} * core.groups * core.chunks, core);
    if (done.error != 0) return done;
  }
  using Kernel = BackwardExpandKernel;
  BackwardExpandCall expand{};
  expand.parts = parts;
  expand.saved = saved;
  expand.grad = call.grad;
  expand.d_x = places.d_x;
  expand.d_query = places.d_query;
  expand.d_a_parts = places.d_a;
  expand.chunks = places.chunks;
  expand.groups = places.groups;
  expand.d_p = call.d_short_prompt;
  expand.d_a = call.d_offset_a;
  expand.d_b = call.d_offset_b;
  expand.d_down = call.d_space_down;
  expand.d_up = call.d_space_up;
  expand.d_gate_weight = call.d_gate_weight;
  expand.d_gate_bias = call.d_gate_bias;
  expand.tiles_d = narrow(pieces_of(parts.d, ExpandTile::channels));
  expand.tiles_p = narrow(pieces_of(parts.m, Kernel::tokens));
  expand.tiles_b = narrow(pieces_of(parts.r, Kernel::columns));
  expand.tiles_down = narrow(pieces_of(parts.columns, Kernel::columns));
  expand.tiles_up = narrow(pieces_of(parts.dims, Kernel::columns));
  const bool sums_a = parts.r > 0 && !places.whole_a;
  expand.blocks_a =
      sums_a ? narrow(pieces_of(int64_t{parts.n} * parts.r, Kernel::threads * Kernel::each)) : 0;
  expand.blocks_bias = narrow(pieces_of(parts.spaces, Kernel::threads));
  const int64_t tiles = expand.tiles_p + expand.tiles_b + expand.tiles_down + expand.tiles_up;
  return launcher.template run<BackwardExpandKernel>(
      parts.tasks * (tiles * expand.tiles_d + expand.blocks_a + expand.blocks_bias), expand);
}

}  // namespace ept
