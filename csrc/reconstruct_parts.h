// Operation 1: what its kernels share. Columns of D and U are numbered c = k·h + j.
#pragma once

#include "arithmetic.h"
#include "block.h"

namespace ept {

// Sizes of METHOD and the tensors of both directions.
struct Parts {
  int tasks, m, n, r, spaces, dim, d;
  int dims;     // K·h
  int columns;  // W = K·h + K, of [D | G]
  View p, a, b, down, up, gate_weight, gate_bias;
  float scaling;      // c
  float score_scale;        // 1 / √d
  float temperature;  // τ
  Activation activation;
  Gate gate;
};

// The elements of a tensor along d: one row of P or B, one column of D or G, one row of U.
struct Line {
  const void* data;  // null: outside, zero
  int64_t start;
  int64_t stride;
  Type type;

  EPT_BOTH float at(int d) const {
    return data == nullptr ? 0.0f : load(data, type, start + d * stride);
  }
};

EPT_BOTH Line line_of(const View& matrix, int task, int row) {
  return {matrix.data, task * matrix.stride[0] + row * matrix.stride[1], matrix.stride[2],
          matrix.type};
}

// Column c of [D | G].
EPT_BOTH Line line_of_down(const Parts& parts, int task, int c) {
  const View& down = parts.down;
  if (c >= parts.dims) {
    const View& gate = parts.gate_weight;
    return {gate.data, task * gate.stride[0] + (c - parts.dims) * gate.stride[2], gate.stride[1],
            gate.type};
  }
  const int k = c / parts.dim, j = c % parts.dim;
  return {down.data, task * down.stride[0] + k * down.stride[1] + j * down.stride[3],
          down.stride[2], down.type};
}

// Row c of U.
EPT_BOTH Line line_of_up(const Parts& parts, int task, int c) {
  const View& up = parts.up;
  const int k = c / parts.dim, j = c % parts.dim;
  return {up.data, task * up.stride[0] + k * up.stride[1] + j * up.stride[2], up.stride[3],
          up.type};
}

// The kernels over d work on tiles of 8 tokens × 64 channels: a thread has one channel of four
// tokens.
struct ExpandTile {
  static constexpr int threads = 128;
  static constexpr int tokens = 8;
  static constexpr int channels = 64;
  static constexpr int own = tokens / (threads / channels);

  EPT_BOTH static int channel(int thread) { return thread % channels; }
  EPT_BOTH static int token(int thread, int i) { return thread / channels * own + i; }

  // Columns that are summed by themselves first: fewer roundings follow one another.
  static constexpr int step = 32;

  // acc += C·M for a factor C [8, count], stored [count][8] in shared memory, and the lines of M.
  template <class LineOf>
  EPT_DEVICE static void add_product(float* acc, const float* factor, int count, int thread, int d,
                                     LineOf line) {
    const float* own_factor = factor + thread / channels * own;
    for (int first = 0; first < count; first += step) {
      const int end = least(first + step, count);
      float sum[own] = {};
      EPT_UNROLL_BY(4)
      for (int c = first; c < end; ++c) {
        const float value = line(c).at(d);
        EPT_UNROLL
        for (int i = 0; i < own; ++i) sum[i] += own_factor[c * tokens + i] * value;
      }
      EPT_UNROLL
      for (int i = 0; i < own; ++i) acc[i] += sum[i];
    }
  }
};

// Products over d of rows with columns, [rows, columns] a task, in parts of d.
//
// Forward, rows [P ; B] and columns [B | D | G]: Q, R, S. Backward, rows Y and columns [B | U]: dC.
struct ReduceCall {
  Parts parts;
  View grad;    // Y; not given: forward
  float* sums;  // [T, splits, rows, columns]
  int rows;
  int columns;
  int splits;
  int chunk;  // channels of a part
  int tiles_i, tiles_j;
};

struct ReduceKernel {
  static constexpr const char* name = "reconstruct_reduce";
  static constexpr int threads = 128;
  static constexpr int side = 32;   // of a tile
  static constexpr int depth = 32;  // channels at a time
  static constexpr int own_i = 2, own_j = 4;
  static constexpr int across = side / own_j;
  static constexpr int down = threads / across;
  using Call = ReduceCall;

  struct Shared {
    float x[side][depth + 1];
    float y[side][depth + 1];
    Line lines[2 * side];
  };

  struct State {
    float sum[own_i][own_j];
  };

  EPT_DEVICE static Line row_line(const Call& call, int task, int i) {
    if (i >= call.rows) return {};
    if (call.grad.data != nullptr) return line_of(call.grad, task, i);
    if (i < call.parts.m) return line_of(call.parts.p, task, i);
    return line_of(call.parts.b, task, i - call.parts.m);
  }

  EPT_DEVICE static Line column_line(const Call& call, int task, int j) {
    if (j >= call.columns) return {};
    if (j < call.parts.r) return line_of(call.parts.b, task, j);
    j -= call.parts.r;
    return call.grad.data != nullptr ? line_of_up(call.parts, task, j)
                                     : line_of_down(call.parts, task, j);
  }

  template <class B>
  EPT_DEVICE static void run(const B& block, Shared& shared, const Call& call) {
    Digits digits{block.index};
    const int first_j = digits.next(call.tiles_j) * side;
    const int first_i = digits.next(call.tiles_i) * side;
    const int split = digits.next(call.splits);
    const int task = static_cast<int>(digits.rest);
    // B·Bᵀ is of no use.
    if (first_i >= call.parts.m && first_j + side <= call.parts.r) return;
    const int first_d = split * call.chunk, end_d = least(first_d + call.chunk, call.parts.d);

    typename B::template Local<State> local;
    block.each([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < own_i; ++i) {
        EPT_UNROLL
        for (int j = 0; j < own_j; ++j) local[thread].sum[i][j] = 0.0f;
      }
      if (thread < side) shared.lines[thread] = row_line(call, task, first_i + thread);
      if (thread >= side && thread < 2 * side) {
        shared.lines[thread] = column_line(call, task, first_j + thread - side);
      }
    });
    for (int d = first_d; d < end_d; d += depth) {
      block.each([&](int thread) {
        const int c = thread % depth;
        EPT_UNROLL_BY(4)
        for (int i = thread / depth; i < side; i += threads / depth) {
          const bool inside = d + c < end_d;
          shared.x[i][c] = inside ? shared.lines[i].at(d + c) : 0.0f;
          shared.y[i][c] = inside ? shared.lines[side + i].at(d + c) : 0.0f;
        }
      });
      block.each([&](int thread) {
        // The step's own sum comes first: fewer roundings follow one another.
        float sum[own_i][own_j] = {};
        EPT_UNROLL_BY(8)
        for (int c = 0; c < depth; ++c) {
          float y[own_j];
          EPT_UNROLL
          for (int j = 0; j < own_j; ++j) y[j] = shared.y[thread % across + j * across][c];
          EPT_UNROLL
          for (int i = 0; i < own_i; ++i) {
            const float x = shared.x[thread / across + i * down][c];
            EPT_UNROLL
            for (int j = 0; j < own_j; ++j) sum[i][j] += x * y[j];
          }
        }
        EPT_UNROLL
        for (int i = 0; i < own_i; ++i) {
          EPT_UNROLL
          for (int j = 0; j < own_j; ++j) local[thread].sum[i][j] += sum[i][j];
        }
      });
    }
    const int64_t begin = (int64_t{task} * call.splits + split) * call.rows;
    block.apart([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < own_i; ++i) {
        const int row = first_i + thread / across + i * down;
        EPT_UNROLL
        for (int j = 0; j < own_j; ++j) {
          const int column = first_j + thread % across + j * across;
          if (row >= call.rows || column >= call.columns) continue;
          call.sums[(begin + row) * call.columns + column] = local[thread].sum[i][j];
        }
      }
    });
  }
};

// One element of the sum of all parts, in order.
EPT_BOTH float sum_of_parts(const float* part, int number, int64_t size) {
  float sum = 0.0f;
  EPT_UNROLL_BY(8)
  for (int i = 0; i < number; ++i) sum += part[i * size];
  return sum;
}

// The mean over all tokens of `term(token, column)` for each column. The threads of a
// column take turns at the tokens; their sums, one for each thread in `sums`, are added in order.
template <class B, class Term>
EPT_DEVICE void mean_of_tokens(const B& block, float* sums, float* mean, int columns, int tokens,
                               Term term) {
  int wide = 1;
  while (wide < columns && wide < B::threads) wide *= 2;
  const int groups = B::threads / wide;
  for (int first = 0; first < columns; first += wide) {
    block.each([&](int thread) {
      const int column = first + thread % wide;
      float sum = 0.0f;
      if (column < columns) {
        for (int token = thread / wide; token < tokens; token += groups) sum += term(token, column);
      }
      sums[thread] = sum;
    });
    block.each([&](int thread) {
      if (thread >= wide || first + thread >= columns) return;
      float sum = 0.0f;
      for (int group = 0; group < groups; ++group) sum += sums[thread + group * wide];
      mean[first + thread] = sum / static_cast<float>(tokens);
    });
  }
}

}  // namespace ept
