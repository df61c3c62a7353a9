// Operation 1: what its kernels share. Columns of D and U are numbered c = k·h + j.
#pragma once

#include "arithmetic.h"
#include "block.h"

namespace ept {

// Sizes of METHOD and the tensors of both directions.
struct Parts {
  int tasks, m, n, r, spaces, dim, d;
  int dims;     // K·h
  int columns;  // W = K·h + K, of [D | G]; K·h without a gate
  View p, a, b, down, up, gate_weight, gate_bias, down_bias, up_bias;
  float scaling;      // c
  float score_scale;  // 1 / √d
  float temperature;  // τ
  Activation activation;
  Gate gate;
};

// Kernels have two forms. The plain one is for spaces with a gate and without biases, and is compiled
// as if there were no others. The other one is for biases, or for a single space without a gate.

// The columns of G.
template <bool plain>
EPT_BOTH int gates_of(const Parts& parts) {
  if constexpr (plain) return parts.spaces;
  return parts.columns - parts.dims;
}

// The elements of a tensor along d: one row of P or B, one column of D or G, one row of U.
struct Line {
  const void* data;  // null: outside, zero
  int64_t start;
  int64_t stride;
  Type type;

  // An element as it is stored, so that many loads can be on their way before the first is needed.
  EPT_BOTH uint32_t bits(int d) const {
    if (data == nullptr) return 0;
    const int64_t at = start + d * stride;
    if (type == Type::float32) return bits_of(static_cast<const float*>(data)[at]);
    return static_cast<const uint16_t*>(data)[at];
  }

  EPT_BOTH float number(uint32_t bits) const {
    if (type == Type::float32) return float_of(bits);
    const uint16_t half = static_cast<uint16_t>(bits);
    return type == Type::float16 ? to_float(Half{half}) : to_float(BFloat16{half});
  }

  EPT_BOTH float at(int d) const { return number(bits(d)); }
};

// A row of P, B or Y; `rows` of the matrix are inside.
EPT_BOTH Line line_of(const View& matrix, int task, int row, int rows) {
  if (row >= rows) return {};
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

// Row c of [B ; U].
EPT_BOTH Line line_of_factors(const Parts& parts, int task, int c) {
  if (c < parts.r) return line_of(parts.b, task, c, parts.r);
  const View& up = parts.up;
  const int k = (c - parts.r) / parts.dim, j = (c - parts.r) % parts.dim;
  return {up.data, task * up.stride[0] + k * up.stride[1] + j * up.stride[2], up.stride[3],
          up.type};
}

// One element of the sum of all parts, in order.
EPT_BOTH float sum_of_parts(const float* part, int number, int64_t size) {
  float sum = 0.0f;
  EPT_UNROLL_BY(8)
  for (int i = 0; i < number; ++i) sum += part[i * size];
  return sum;
}

// Which of a kernel's launches it is.
enum class Launch { only, first, second };

// All kernels have blocks of 256 threads and work on eight tokens at a time.
struct ReconstructBlock {
  static constexpr int threads = 256;
  static constexpr int tokens = 8;
};
inline constexpr int line_floats = sizeof(Line) / sizeof(float);

// Eight rows of P, of a task.
struct Tokens {
  int task, first, m;

  EPT_BOTH bool has(int token) const { return first + token < m; }
  EPT_BOTH int64_t row(int token) const { return int64_t{task} * m + first + token; }
  EPT_BOTH Line line(const View& matrix, int token) const {
    return line_of(matrix, task, first + token, m);
  }
};

// The columns of a row of r that a thread has: every so many from its own lane on.
template <int Lanes, class Act>
EPT_DEVICE void each_column(int thread, int r, Act act) {
  EPT_UNROLL
  for (int i = 0; i < max_rank / Lanes; ++i) {
    if (i * Lanes >= r) break;
    const int column = thread % Lanes + i * Lanes;
    if (column < r) act(i, column);
  }
}

// Eight tokens × 64 channels: a thread has one channel of two tokens.
struct ExpandTile : ReconstructBlock {
  static constexpr int channels = 64;
  static constexpr int own = tokens / (threads / channels);
  static constexpr int step = 32;   // columns summed by themselves: fewer roundings in a row
  static constexpr int lines = 64;  // of a matrix at a time

  EPT_BOTH static int channel(int thread) { return thread % channels; }
  EPT_BOTH static int token(int thread, int i) { return thread / channels * own + i; }

  struct State {
    float acc[own];
  };

  // acc = rows of P or Y
  template <class B, class Local>
  EPT_DEVICE static void start(const B& block, Local& local, const View& matrix, const Tokens& at,
                               int first_d, int d) {
    block.apart([&](int thread) {
      const int c = first_d + channel(thread);
      EPT_UNROLL
      for (int i = 0; i < own; ++i) {
        local[thread].acc[i] = c < d ? at.line(matrix, token(thread, i)).at(c) : 0.0f;
      }
    });
  }

  // To rows of P′ or dP.
  template <class B, class Local>
  EPT_DEVICE static void store(const B& block, Local& local, void* out, Type type,
                               const Tokens& at, int first_d, int d) {
    block.apart([&](int thread) {
      const int c = first_d + channel(thread);
      EPT_UNROLL
      for (int i = 0; i < own; ++i) {
        if (!at.has(token(thread, i)) || c >= d) continue;
        ept::store(out, type, at.row(token(thread, i)) * d + c, local[thread].acc[i]);
      }
    });
  }

  // acc += C·M for a factor C [8, number], stored [number][8] in shared memory, and up to 64 lines
  // of M, for which there is a place there.
  template <class B, class Local, class LineAt>
  EPT_DEVICE static void add_lines(const B& block, Line* place, Local& local, const float* factor,
                                   int number, int first_d, int d, LineAt line) {
    block.each([&](int thread) {
      if (thread < number) place[thread] = line(thread);
    });
    block.each([&](int thread) {
      const int c = first_d + channel(thread);
      if (c >= d) return;
      add_product(local[thread].acc, factor, number, thread,
                  [&](int i) { return place[i].at(c); });
    });
  }

  // The same for a thread, for which `value(c)` is the element of row c of M in its channel.
  template <class Value>
  EPT_DEVICE static void add_product(float* acc, const float* factor, int count, int thread,
                                     Value value) {
    for (int first = 0; first < count; first += step) {
      const int end = least(first + step, count);
      float sum[own] = {};
      EPT_UNROLL_BY(8)
      for (int c = first; c < end; ++c) {
        const float of_row = value(c);
        EPT_UNROLL
        for (int i = 0; i < own; ++i) sum[i] += factor[c * tokens + token(thread, i)] * of_row;
      }
      EPT_UNROLL
      for (int i = 0; i < own; ++i) acc[i] += sum[i];
    }
  }
};

// X·Yᵀ over all of d, for eight lines X and any number of lines Y, 64 at a time.
//
// A step takes 64 channels of every line to shared memory, while those of the next step are loaded.
// A warp multiplies eight of the channels: a thread has two rows and every eighth column. The sums
// of the warps are added at the end, in order.
//
// With up to `MostFused` lines M and their factor C, [count, 8], X + C·M takes the place of X.
template <int MostFused>
struct LongProduct : ReconstructBlock {
  static constexpr int rows = tokens;
  static constexpr int columns = 64;
  static constexpr int depth = ExpandTile::channels;
  static constexpr int padded = depth + 4;  // keeps 16 bytes of neighbouring lines off one bank
  static constexpr int warps = threads / 32;
  static constexpr int own_rows = 2, own_columns = columns / 8;
  static constexpr int per_load = threads / depth;  // lines
  static constexpr int loads = (rows + columns + MostFused) / per_load;

  struct State {
    uint32_t bits[loads];
    float sum[own_rows][own_columns] = {};
  };

  // Shared memory for so many lines Y and M.
  EPT_BOTH static int floats(int count, int fused = 0) {
    return (rows + least(count, columns) + fused) * (padded + line_floats);
  }

  // `x(i)`, `y(j)` and `m(i)` are the lines, d long; `put(i, j, value)` takes the result.
  template <class B, class X, class Y, class Put>
  EPT_DEVICE static void run(const B& block, float* memory, int count, int d, X x, Y y, Put put) {
    run(block, memory, count, d, x, y, put, 0, nullptr, [](int) { return Line{}; });
  }

  template <class B, class X, class Y, class Put, class M>
  EPT_DEVICE static void run(const B& block, float* memory, int count, int d, X x, Y y, Put put,
                             int fused, const float* factor, M m) {
    for (int first = 0; first < count; first += columns) {
      const int number = least(columns, count - first);
      multiply(
          block, memory, number, d, fused, factor,
          [&](int i) {
            if (i < rows) return x(i);
            i -= rows;
            return i < number ? y(first + i) : m(i - number);
          },
          [&](int i, int j, float value) { put(i, first + j, value); });
    }
  }

 private:
  template <class B, class LineAt, class Put>
  EPT_DEVICE static void multiply(const B& block, float* memory, int count, int d, int fused,
                                  const float* factor, LineAt line, Put put) {
    const int number = rows + count + fused;
    float* tile = memory;
    Line* lines = reinterpret_cast<Line*>(memory + number * padded);
    typename B::template Local<State> local;
    block.each([&](int thread) {
      if (thread < number) lines[thread] = line(thread);
    });
    block.apart([&](int thread) { load(local[thread], lines, number, thread, 0, d); });
    for (int first = 0; first < d; first += depth) {
      block.each([&](int thread) {
        EPT_UNROLL
        for (int i = 0; i < loads; ++i) {
          const int at = thread / depth + i * per_load;
          if (i * per_load >= number) break;
          if (at >= number) continue;
          tile[at * padded + thread % depth] = lines[at].number(local[thread].bits[i]);
        }
      });
      if (MostFused > 0 && fused > 0) {
        block.each([&](int thread) {
          const int c = ExpandTile::channel(thread);
          float acc[ExpandTile::own] = {};
          ExpandTile::add_product(acc, factor, fused, thread, [&](int i) {
            return tile[(rows + count + i) * padded + c];
          });
          EPT_UNROLL
          for (int i = 0; i < ExpandTile::own; ++i) {
            tile[ExpandTile::token(thread, i) * padded + c] += acc[i];
          }
        });
      }
      block.each([&](int thread) {
        load(local[thread], lines, number, thread, first + depth, d);
        add(local[thread], tile, count, thread);
      });
    }
    const int wide = (count + 7) / 8 * 8;
    block.each([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < own_rows; ++i) {
        EPT_UNROLL
        for (int j = 0; j < own_columns; ++j) {
          if (j * 8 >= count) break;
          tile[(thread / 32 * rows + row(thread, i)) * wide + column(thread, j)] =
              local[thread].sum[i][j];
        }
      }
    });
    block.each([&](int thread) {
      for (int at = thread; at < rows * count; at += threads) {
        const int i = at / count, j = at % count;
        put(i, j, sum_of_parts(tile + i * wide + j, warps, rows * wide));
      }
    });
  }

  EPT_BOTH static int row(int thread, int i) { return thread % 32 / 8 + i * 4; }
  EPT_BOTH static int column(int thread, int j) { return thread % 8 + j * 8; }

  // A thread takes one channel of every fourth line.
  EPT_DEVICE static void load(State& state, const Line* lines, int number, int thread, int first,
                              int d) {
    const int c = first + thread % depth;
    EPT_UNROLL
    for (int i = 0; i < loads; ++i) {
      const int at = thread / depth + i * per_load;
      if (i * per_load >= number) break;
      state.bits[i] = at < number && c < d ? lines[at].bits(c) : 0;
    }
  }

  EPT_DEVICE static void add(State& state, const float* tile, int count, int thread) {
    const float* own = tile + thread / 32 * (depth / warps);
    EPT_UNROLL
    for (int i = 0; i < own_rows; ++i) {
      float sum[own_columns] = {};  // of this step
      EPT_UNROLL
      for (int k = 0; k < depth / warps; k += 4) {
        const Packed x = load_packed(own + row(thread, i) * padded + k);
        EPT_UNROLL
        for (int j = 0; j < own_columns; ++j) {
          if (j * 8 >= count) break;
          const int y_line = least(column(thread, j), count - 1);
          const Packed y = load_packed(own + (rows + y_line) * padded + k);
          EPT_UNROLL
          for (int e = 0; e < 4; ++e) sum[j] += unpack<float>(x, e) * unpack<float>(y, e);
        }
      }
      EPT_UNROLL
      for (int j = 0; j < own_columns; ++j) state.sum[i][j] += sum[j];
    }
  }
};

// Rows of c·A to shared memory, [number, r | 1]; those of `end` and after it are zeros.
template <class B>
EPT_DEVICE void load_rows(const B& block, const Parts& parts, float* rows, int number, int task,
                          int first, int end) {
  const View& a = parts.a;
  block.each([&](int thread) {
    EPT_UNROLL_BY(4)
    for (int at = thread; at < number * parts.r; at += ReconstructBlock::threads) {
      const int s = at / parts.r, column = at % parts.r;
      const int64_t from =
          task * a.stride[0] + (first + s) * a.stride[1] + column * a.stride[2];
      rows[s * (parts.r | 1) + column] =
          first + s < end ? load(a.data, a.type, from) * parts.scaling : 0.0f;
    }
  });
}

}  // namespace ept
