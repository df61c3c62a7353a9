// Operation 2, backward: each gradient element is read once.
//
// A block owns a chunk of positions × channels of the rows of one task. Tile by tile it sums the
// gradient over the rows, G, and multiplies the sum into dA = c·G·Bᵀ and dB = c·Aᵀ·G: whole, or as
// parts, which a second kernel adds in order. Blocks of the prompt's tokens end with the sum, dP′.
#pragma once

#include "splice_forward.h"

namespace ept {

struct SpliceBackwardCall {
  View grad;  // strides [batch, m + S, d]
  View offset_a;
  View offset_b;
  Plan plan;
  // Where sums go: a gradient or its parts, and the type stored there.
  void* sum_p;
  void* sum_a;
  void* sum_b;
  Type type_p;
  Type type_a;
  Type type_b;
  bool whole_p;
  bool whole_a;
  bool whole_b;
  int batch;
  int length;
  int positions;
  int tasks;
  int tokens;
  int width;
  int rank;
  float scaling;
  // The grid: groups of rows, chunks of their rows, tiles of the prompt and chunks of the text,
  // chunks of channels.
  bool by_row;  // a group is a row's task rather than a task
  int chunks_b;
  int rows;
  int tiles_m;
  int chunks_s;
  int tiles_s;
  int chunks_d;
  int tiles_d;
};

template <class T, bool Vectors>
struct SpliceBackwardKernel {
  static constexpr const char* name = "splice_backward";
  using Tile = SpliceTile<T, Vectors>;
  static constexpr int threads = Tile::threads;
  static constexpr int ranks = 32;  // of A and B at a time
  static constexpr int padded = Tile::channels + 4;  // keeps four rows of floats off one bank
  static constexpr int own_ranks = ranks / (threads / Tile::lanes);
  using Call = SpliceBackwardCall;

  struct Shared {
    alignas(16) float sum[Tile::positions][padded];
    alignas(16) float b[ranks][padded];
    alignas(16) float a[Tile::positions][ranks];
    int before[threads], equal[threads];
  };

  struct State {
    float sum[Tile::own_positions][Tile::own_channels];
    float d_b[own_ranks][Tile::own_channels];
  };

  template <class B>
  using Local = typename B::template Local<State>;

  // The block's rows, by their places in the plan.
  struct Rows {
    int task;
    int first;
    int last;
    int64_t part;  // the number of their part
  };

  template <class B>
  EPT_DEVICE static void run(const B& block, Shared& shared, const Call& call) {
    Digits digits{block.index};
    const int chunk_d = digits.next(call.chunks_d);
    const int chunk = digits.next(call.tiles_m + call.chunks_s);
    const int chunk_b = digits.next(call.chunks_b);
    const int group = static_cast<int>(digits.rest);
    Rows rows;
    if (!find_rows(block, shared, call, group, chunk_b, rows)) return;
    const bool is_prompt = chunk < call.tiles_m;
    const int chunk_s = chunk - call.tiles_m;
    const int first_s = is_prompt ? chunk : chunk_s * call.tiles_s;
    const int end_s = is_prompt ? chunk + 1
                                : least(first_s + call.tiles_s,
                                        (call.length + Tile::positions - 1) / Tile::positions);
    Local<B> local;
    for (int tile_d = 0; tile_d < call.tiles_d; ++tile_d) {
      const int d = (chunk_d * call.tiles_d + tile_d) * Tile::channels;
      if (d >= call.width) return;
      for (int tile_s = first_s; tile_s < end_s; ++tile_s) {
        const int s = tile_s * Tile::positions;
        add_rows(block, local, call, rows, is_prompt, s, d);
        if (is_prompt) {
          store_prompt(block, local, call, rows, s, d);
          continue;
        }
        share_sum(block, shared, local);
        for (int r = 0; r < call.rank; r += ranks) {
          const bool only = call.rank <= ranks;  // dB stays in registers from tile to tile
          const bool load_b = !only || tile_s == first_s;
          load_factors(block, shared, call, rows.task, load_b, s, d, r);
          multiply_a(block, shared, call, rows, chunk_d, tile_d > 0, s, r);
          multiply_b(block, shared, local, !only || tile_s == first_s);
          if (!only || tile_s + 1 == end_s) {
            store_b(block, local, call, rows, chunk_s, !only && tile_s > first_s, d, r);
          }
        }
      }
    }
  }

  // Whether the block has rows to sum: a group by row stands aside if an earlier row has its task.
  template <class B>
  EPT_DEVICE static bool find_rows(const B& block, Shared& shared, const Call& call, int group,
                                   int chunk_b, Rows& rows) {
    rows.task = group;
    rows.part = int64_t{group} * call.chunks_b + chunk_b;
    int first = 0, number = call.batch;
    if (call.plan.tasks != nullptr) {
      if (call.by_row) {
        rows.task = call.plan.task(group);
        if (rows.task >= call.tasks) return false;
        if (group > 0 && call.plan.task(group - 1) == rows.task) return false;
      }
      block.each([&](int thread) {
        int before = 0, equal = 0;
        for (int place = thread; place < call.batch; place += threads) {
          const int task = call.plan.task(place);
          before += task < rows.task;
          equal += task == rows.task;
        }
        shared.before[thread] = before;
        shared.equal[thread] = equal;
      });
      first = sum_of(block, shared.before);
      number = sum_of(block, shared.equal);
    }
    rows.first = first + least(number, chunk_b * call.rows);
    rows.last = first + least(number, (chunk_b + 1) * call.rows);
    return true;
  }

  // G of a tile
  template <class B>
  EPT_DEVICE static void add_rows(const B& block, Local<B>& local, const Call& call,
                                  const Rows& rows, bool is_prompt, int first_s, int first_d) {
    const View& grad = call.grad;
    block.apart([&](int thread) {
      auto& sum = local[thread].sum;
      EPT_UNROLL
      for (int i = 0; i < Tile::own_positions; ++i) {
        EPT_UNROLL
        for (int c = 0; c < Tile::own_channels; ++c) sum[i][c] = 0.0f;
      }
      EPT_UNROLL_BY(1)
      for (int place = rows.first; place < rows.last; ++place) {
        const int row = call.plan.row(place);
        const int end = is_prompt ? call.tokens : call.plan.reals_of(row, call.length);
        int column[Tile::own_positions];  // -1: nothing to add
        EPT_UNROLL
        for (int i = 0; i < Tile::own_positions; ++i) {
          const int s = first_s + Tile::position(thread, i);
          column[i] = -1;
          if (s >= end) continue;
          column[i] = is_prompt ? s : call.tokens + call.plan.column(row, s, call.length);
        }
        EPT_UNROLL
        for (int move = 0; move < Tile::moves; ++move) {
          const int d = first_d + Tile::channel(thread, move);
          if (d >= call.width) continue;
          const T* data =
              static_cast<const T*>(grad.data) + row * grad.stride[0] + d * grad.stride[2];
          if constexpr (Vectors) {
            Packed packed[Tile::own_positions];
            EPT_UNROLL
            for (int i = 0; i < Tile::own_positions; ++i) {
              packed[i] = Packed{};
              if (column[i] >= 0) packed[i] = load_packed(data + column[i] * grad.stride[1]);
            }
            EPT_UNROLL
            for (int i = 0; i < Tile::own_positions; ++i) {
              EPT_UNROLL
              for (int c = 0; c < Tile::step; ++c) {
                sum[i][move * Tile::step + c] += unpack<T>(packed[i], c);
              }
            }
          } else {
            EPT_UNROLL
            for (int i = 0; i < Tile::own_positions; ++i) {
              if (column[i] >= 0) sum[i][move] += to_float(data[column[i] * grad.stride[1]]);
            }
          }
        }
      }
    });
  }

  template <class B>
  EPT_DEVICE static void store_prompt(const B& block, Local<B>& local, const Call& call,
                                      const Rows& rows, int first_s, int first_d) {
    const int64_t begin = (call.whole_p ? rows.task : rows.part) * call.tokens;
    block.apart([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < Tile::own_positions; ++i) {
        const int token = first_s + Tile::position(thread, i);
        if (token >= call.tokens) continue;
        EPT_UNROLL
        for (int c = 0; c < Tile::own_channels; ++c) {
          const int d = first_d + Tile::channel(thread, c / Tile::step) + c % Tile::step;
          if (d >= call.width) continue;
          store(call.sum_p, call.type_p, (begin + token) * call.width + d,
                local[thread].sum[i][c]);
        }
      }
    });
  }

  template <class B>
  EPT_DEVICE static void share_sum(const B& block, Shared& shared, Local<B>& local) {
    block.apart([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < Tile::own_positions; ++i) {
        EPT_UNROLL
        for (int c = 0; c < Tile::own_channels; ++c) {
          const int d = Tile::channel(thread, c / Tile::step) + c % Tile::step;
          shared.sum[Tile::position(thread, i)][d] = local[thread].sum[i][c];
        }
      }
    });
  }

  // A and B for a piece of the rank, zero outside: what is past the text or the width adds nothing.
  template <class B>
  EPT_DEVICE static void load_factors(const B& block, Shared& shared, const Call& call, int task,
                                      bool load_b, int first_s, int first_d, int first_r) {
    const View &a = call.offset_a, &b = call.offset_b;
    block.each([&](int thread) {
      EPT_UNROLL_BY(4)
      for (int i = 0; i < Tile::positions * ranks / threads; ++i) {
        const int r = thread % ranks, s = thread / ranks + i * (threads / ranks);
        const int64_t at = task * a.stride[0] + (first_s + s) * a.stride[1] +
                           (first_r + r) * a.stride[2];
        const bool inside = first_s + s < call.length && first_r + r < call.rank;
        shared.a[s][r] = inside ? load(a.data, a.type, at) : 0.0f;
      }
      if (!load_b) return;
      const int d = first_d + thread;
      EPT_UNROLL_BY(4)
      for (int r = 0; r < ranks; ++r) {
        const int64_t at = task * b.stride[0] + (first_r + r) * b.stride[1] + d * b.stride[2];
        const bool inside = first_r + r < call.rank && d < call.width;
        shared.b[r][thread] = inside ? load(b.data, b.type, at) : 0.0f;
      }
    });
  }

  // dA of a tile: a thread has two positions and four ranks.
  template <class B>
  EPT_DEVICE static void multiply_a(const B& block, Shared& shared, const Call& call,
                                    const Rows& rows, int chunk_d, bool add, int first_s,
                                    int first_r) {
    constexpr int across = 8;  // threads along the rank
    constexpr int own_s = Tile::positions / (threads / across), own_r = ranks / across;
    const int64_t begin = call.whole_a
                              ? int64_t{rows.task} * call.positions
                              : (rows.part * call.chunks_d + chunk_d) * call.length;
    block.apart([&](int thread) {
      float d_a[own_s][own_r] = {};
      EPT_UNROLL_BY(1)
      for (int d = 0; d < Tile::channels; d += 4) {
        EPT_UNROLL
        for (int c = d; c < d + 4; ++c) {
          EPT_UNROLL
          for (int i = 0; i < own_s; ++i) {
            const float sum = shared.sum[thread / across + i * (threads / across)][c];
            EPT_UNROLL
            for (int j = 0; j < own_r; ++j) {
              d_a[i][j] += sum * shared.b[thread % across + j * across][c];
            }
          }
        }
      }
      EPT_UNROLL
      for (int i = 0; i < own_s; ++i) {
        const int s = first_s + thread / across + i * (threads / across);
        EPT_UNROLL
        for (int j = 0; j < own_r; ++j) {
          const int r = first_r + thread % across + j * across;
          if (s >= call.length || r >= call.rank) continue;
          const int64_t at = (begin + s) * call.rank + r;
          float value = d_a[i][j] * call.scaling;
          if (add) value += static_cast<const float*>(call.sum_a)[at];
          store(call.sum_a, call.type_a, at, value);
        }
      }
    });
  }

  // The channels of dB that a thread has: four neighbours at a time, whatever the gradient's type.
  EPT_BOTH static int channel_b(int thread, int c) {
    return (thread % Tile::lanes) * 4 + c / 4 * (4 * Tile::lanes) + c % 4;
  }

  template <class B>
  EPT_DEVICE static void multiply_b(const B& block, Shared& shared, Local<B>& local, bool fresh) {
    block.each([&](int thread) {
      auto& d_b = local[thread].d_b;
      if (fresh) {
        EPT_UNROLL
        for (int i = 0; i < own_ranks; ++i) {
          EPT_UNROLL
          for (int c = 0; c < Tile::own_channels; ++c) d_b[i][c] = 0.0f;
        }
      }
      EPT_UNROLL_BY(2)
      for (int s = 0; s < Tile::positions; ++s) {
        float sum[Tile::own_channels];
        EPT_UNROLL
        for (int c = 0; c < Tile::own_channels; ++c) sum[c] = shared.sum[s][channel_b(thread, c)];
        EPT_UNROLL
        for (int i = 0; i < own_ranks; ++i) {
          const float a = shared.a[s][thread / Tile::lanes * own_ranks + i];
          EPT_UNROLL
          for (int c = 0; c < Tile::own_channels; ++c) d_b[i][c] += a * sum[c];
        }
      }
    });
  }

  template <class B>
  EPT_DEVICE static void store_b(const B& block, Local<B>& local, const Call& call,
                                 const Rows& rows, int chunk_s, bool add, int first_d,
                                 int first_r) {
    const int64_t begin =
        (call.whole_b ? rows.task : rows.part * call.chunks_s + chunk_s) * call.rank;
    block.apart([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < own_ranks; ++i) {
        const int r = first_r + thread / Tile::lanes * own_ranks + i;
        EPT_UNROLL
        for (int c = 0; c < Tile::own_channels; ++c) {
          const int d = first_d + channel_b(thread, c);
          if (r >= call.rank || d >= call.width) continue;
          const int64_t at = (begin + r) * call.width + d;
          float value = local[thread].d_b[i][c] * call.scaling;
          if (add) value += static_cast<const float*>(call.sum_b)[at];
          store(call.sum_b, call.type_b, at, value);
        }
      }
    });
  }
};

// A gradient and its parts: what the second kernel makes of them.
struct SpliceSum {
  void* gradient;
  Type type;
  const float* parts;
  int number;       // of parts a group has; 0: the gradient is written, save for its zeros
  int64_t size;     // elements of a task
  int64_t covered;  // of these, those that the text reaches
};

struct SpliceFinishCall {
  SpliceSum sums[3];
  Plan plan;
  int batch;
  bool by_row;
  int blocks;  // of a task
};

struct SpliceFinishKernel {
  static constexpr const char* name = "splice_finish";
  static constexpr int threads = 256;
  static constexpr int each = 2;  // elements of a thread
  using Call = SpliceFinishCall;

  struct Shared {
    int numbers[threads];
  };

  template <class B>
  EPT_DEVICE static void run(const B& block, Shared& shared, const Call& call) {
    Digits digits{block.index};
    int64_t piece = digits.next(call.blocks);
    const int task = static_cast<int>(digits.rest);
    int group = task;
    if (call.by_row) {
      // The group is the first place of the task's rows.
      const auto count = [&](bool equal) {
        block.each([&](int thread) {
          int number = 0;
          for (int place = thread; place < call.batch; place += threads) {
            const int its = call.plan.task(place);
            number += equal ? its == task : its < task;
          }
          shared.numbers[thread] = number;
        });
        return sum_of(block, shared.numbers);
      };
      group = count(false);
      if (count(true) == 0) group = -1;
    }
    for (int i = 0; i < 3; ++i) {
      const SpliceSum& sum = call.sums[i];
      const int64_t pieces = (sum.size + threads * each - 1) / (threads * each);
      if (piece >= 0 && piece < pieces) add_parts(block, sum, task, group, piece);
      piece -= pieces;
    }
  }

  template <class B>
  EPT_DEVICE static void add_parts(const B& block, const SpliceSum& sum, int task, int group,
                                   int64_t piece) {
    block.apart([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < each; ++i) {
        const int64_t at = (piece * each + i) * threads + thread;
        if (at >= sum.size) continue;
        const bool there = group >= 0 && at < sum.covered;
        if (there && sum.number == 0) continue;
        float total = 0.0f;
        if (there) {
          const float* part = sum.parts + int64_t{group} * sum.number * sum.covered + at;
          EPT_UNROLL_BY(8)
          for (int j = 0; j < sum.number; ++j) total += part[j * sum.covered];
        }
        store(sum.gradient, sum.type, task * sum.size + at, total);
      }
    });
  }
};

}  // namespace ept
