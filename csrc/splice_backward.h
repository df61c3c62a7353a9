// Operation 2, backward: each gradient element is read once.
//
// A block owns a chunk of positions × channels of the rows of one task. Tile by tile it sums the
// gradient over the rows, G, and multiplies the sum into dA = c·G·Bᵀ and dB = c·Aᵀ·G: whole, or as
// parts, which a second kernel adds in order. Blocks of the prompt's tokens end with the sum, dP′.
#pragma once

#include "splice_forward.h"

namespace ept {

struct SpliceBackwardCall : SpliceCall {
  View grad;  // strides [batch, m + S, d]
  // Where sums go: to a gradient of float32 that is whole, or to parts.
  float *sum_p, *sum_a, *sum_b;
  bool whole_p, whole_a, whole_b;
  int positions;
  bool by_row;  // a group is a row's task rather than a task
  // The grid: groups of rows, chunks of their rows, tiles of the prompt and chunks of the text,
  // chunks of channels.
  int chunks_b, rows, tiles_m, chunks_s, tiles_s, chunks_d, tiles_d;
};

// Warps that multiply: half of them make dA, the other half dB.
template <class T, bool Vectors>
struct SpliceBackwardKernel {
  static constexpr const char* name = "splice_backward";
  using Tile = SpliceTile<T, Vectors, 64, 64, 256, 8>;
  static constexpr int threads = Tile::threads;
  static constexpr int ranks = 32;  // of A and B at a time
  static constexpr int padded = Tile::channels + 4;
  static constexpr int rows_at_once = Vectors && sizeof(T) == 2 ? 2 : 1;
  static_assert(Tile::positions == Tile::channels);
  using Unit = MatrixProduct;
  using Call = SpliceBackwardCall;

  struct Shared {
    alignas(16) float sum[Tile::positions][padded];
    Factors<Tile, ranks, 4> factors;
  };

  // Of dA a warp has 16 positions, of dB 16 channels, and of both all ranks at a time.
  static constexpr int pieces_r = ranks / Unit::columns;

  struct State {
    typename Tile::Piece grads[rows_at_once][Tile::own_positions][Tile::moves];
    float sum[Tile::own_positions][Tile::own_channels];
    WarpProduct<1, pieces_r> product;
    float total[pieces_r][4];  // of products: a tile's dA, or dB of all tiles along the text
  };

  template <class B>
  using Local = typename B::template Local<State>;

  // The block's rows, by their places in the plan.
  struct Rows {
    int task, first, last;
    int part;  // the number of their part
  };

  template <class B>
  EPT_DEVICE static void run(const B& block, Shared& shared, const Call& call) {
    Digits digits{block.index};
    const int chunk_d = digits.next(call.chunks_d);
    const int chunk = digits.next(call.tiles_m + call.chunks_s);
    const int chunk_b = digits.next(call.chunks_b);
    Rows rows;
    if (!find_rows(call, static_cast<int>(digits.rest), chunk_b, rows)) return;
    const int first_d = chunk_d * call.tiles_d * Tile::channels;
    const int end_d = least(first_d + call.tiles_d * Tile::channels, call.width);
    if (chunk < call.tiles_m) {
      sum_prompt(block, call, rows, chunk * Tile::positions, first_d, end_d);
    } else {
      sum_text(block, shared, call, rows, chunk - call.tiles_m, chunk_d, first_d, end_d);
    }
  }

  template <class B>
  EPT_DEVICE static void sum_prompt(const B& block, const Call& call, const Rows& rows, int s,
                                    int first_d, int end_d) {
    Local<B> local;
    const int64_t begin = int64_t{call.whole_p ? rows.task : rows.part} * call.tokens;
    for (int d = first_d; d < end_d; d += Tile::channels) {
      int place = rows.first;
      do {
        fetch<true>(block, local, call, rows, place, s, d);
        add_rows(block, local, place == rows.first);
        place += rows_at_once;
      } while (place < rows.last);
      put_sum(block, local, call.sum_p + (begin + s) * call.width + d, call.width, call.tokens - s,
              call.width - d);
    }
  }

  // While a tile is multiplied, the gradients of the next one are on their way. The tiles along the
  // text come first: dB of their channels stays in registers.
  template <class B>
  EPT_DEVICE static void sum_text(const B& block, Shared& shared, const Call& call,
                                  const Rows& rows, int chunk_s, int chunk_d, int first_d,
                                  int end_d) {
    Local<B> local;
    const int64_t part_a = int64_t{rows.part} * call.chunks_d + chunk_d;
    const int64_t part_b = int64_t{rows.part} * call.chunks_s + chunk_s;
    const int64_t begin_a =
        call.whole_a ? int64_t{rows.task} * call.positions : part_a * call.length;
    float* d_a = call.sum_a + begin_a * call.rank;
    float* d_b = call.sum_b + (call.whole_b ? rows.task : part_b) * call.rank * call.width;
    const int first_s = chunk_s * call.tiles_s * Tile::positions;
    const int end_s = least(first_s + call.tiles_s * Tile::positions, call.length);
    const bool keeps_b = call.rank <= ranks;
    // A sum of one row of 16-bit gradients is a TF32 number.
    const bool exact = sizeof(T) == 2 && rows.last - rows.first == 1;
    int next_s = first_s, next_d = first_d, place = rows.first;
    fetch<false>(block, local, call, rows, place, next_s, next_d);
    while (next_d < end_d) {
      const int s = next_s, d = next_d;
      const bool is_first = s == first_s, is_last = s + Tile::positions >= end_s;
      add_rows(block, local, place == rows.first);
      place += rows_at_once;
      const bool is_whole = place >= rows.last;
      if (is_whole) {
        put_sum(block, local, shared.sum[0], padded, Tile::positions, Tile::channels);
        place = rows.first;
        next_s = is_last ? first_s : s + Tile::positions;
        if (is_last) next_d += Tile::channels;
      }
      if (next_d < end_d) fetch<false>(block, local, call, rows, place, next_s, next_d);
      if (!is_whole) continue;
      for (int r = 0; r < call.rank; r += ranks) {
        load_factors<Tile>(block, shared.factors, call, rows.task, !keeps_b || is_first, s, d, r);
        const bool fresh = !keeps_b || is_first, done = !keeps_b || is_last;
        multiply(block, shared, local, least(pieces_r, (call.rank - r + 7) / Unit::columns), exact,
                 fresh);
        block.each([&](int thread) {
          const auto& total = local[thread].total;
          const int first = first_of_warp(thread);
          if (makes_a(thread)) {
            store_total(total, thread, call, r, d_a + int64_t{s + first} * call.rank, call.rank, 1,
                        call.length - s - first, d > first_d);
          } else if (done) {
            store_total(total, thread, call, r, d_b + d + first, 1, call.width,
                        call.width - d - first, !keeps_b && !is_first);
          }
        });
      }
    }
  }

  // Whether the block has rows to sum: a group by row stands aside if an earlier row has its task.
  EPT_DEVICE static bool find_rows(const Call& call, int group, int chunk_b, Rows& rows) {
    rows.task = group;
    rows.part = group * call.chunks_b + chunk_b;
    int begin = 0, end = call.batch;
    if (call.plan.begins != nullptr) {
      if (call.by_row) rows.task = call.plan.task(group);
      if (rows.task >= call.tasks) return false;
      begin = call.plan.begins[rows.task];
      end = call.plan.begins[rows.task + 1];
      if (call.by_row && begin != group) return false;
    }
    rows.first = least(end, begin + chunk_b * call.rows);
    rows.last = least(end, rows.first + call.rows);
    return true;
  }

  // Has the gradients of a tile of some rows on their way.
  template <bool Prompt, class B>
  EPT_DEVICE static void fetch(const B& block, Local<B>& local, const Call& call, const Rows& rows,
                               int place, int first_s, int first_d) {
    const View& grad = call.grad;
    block.apart([&](int thread) {
      const int d = first_d + Tile::channel(thread);
      TextRow texts[rows_at_once];
      EPT_UNROLL
      for (int j = 0; j < rows_at_once; ++j) {
        texts[j] = {0, 0, 0, nullptr};
        if (place + j >= rows.last) continue;
        texts[j] = Prompt ? call.plan.prompt(place + j, call.tokens)
                          : call.plan.text(place + j, call.length);
      }
      EPT_UNROLL
      for (int j = 0; j < rows_at_once; ++j) {
        const TextRow& text = texts[j];
        const T* data = static_cast<const T*>(grad.data) + text.row * grad.stride[0] +
                        d * grad.stride[2];
        EPT_UNROLL
        for (int i = 0; i < Tile::own_positions; ++i) {
          const int s = first_s + Tile::position(thread, i);
          const bool is_real = s < text.reals;
          const int column = is_real ? text.column(s) + (Prompt ? 0 : call.tokens) : 0;
          const T* at = data + column * grad.stride[1];
          EPT_UNROLL
          for (int move = 0; move < Tile::moves; ++move) {
            const int beyond = Tile::beyond(move * Tile::step);
            auto& piece = local[thread].grads[j][i][move];
            piece = {};
            if (is_real && d + beyond < call.width) piece = Tile::load(at);
            at += (Tile::beyond((move + 1) * Tile::step) - beyond) * grad.stride[2];
          }
        }
      }
    });
  }

  // G of a tile
  template <class B>
  EPT_DEVICE static void add_rows(const B& block, Local<B>& local, bool fresh) {
    block.apart([&](int thread) {
      auto& [grads, sum, product, total] = local[thread];
      EPT_UNROLL
      for (int i = 0; i < Tile::own_positions; ++i) {
        EPT_UNROLL
        for (int c = 0; c < Tile::own_channels; ++c) {
          if (fresh) sum[i][c] = 0.0f;
          EPT_UNROLL
          for (int j = 0; j < rows_at_once; ++j) {
            sum[i][c] += Tile::number(grads[j][i][c / Tile::step], c % Tile::step);
          }
        }
      }
    });
  }

  // Writes the sum of a tile, of which so many positions and channels are wanted.
  template <class B>
  EPT_DEVICE static void put_sum(const B& block, Local<B>& local, float* data, int64_t stride,
                                 int positions, int channels) {
    block.apart([&](int thread) {
      const int d = Tile::channel(thread);
      EPT_UNROLL
      for (int i = 0; i < Tile::own_positions; ++i) {
        const int s = Tile::position(thread, i);
        float* row = data + s * stride + d;
        EPT_UNROLL
        for (int c = 0; c < Tile::own_channels; ++c) {
          if (s >= positions || d + Tile::beyond(c) >= channels) continue;
          row[Tile::beyond(c)] = local[thread].sum[i][c];
        }
      }
    });
  }

  EPT_BOTH static bool makes_a(int thread) { return thread < threads / 2; }

  // A warp's first position or channel, by the thread.
  EPT_BOTH static int first_of_warp(int thread) {
    return thread % (threads / 2) / 32 * Unit::rows;
  }

  // Another order of the positions that a warp multiplies at once, which are summed anyway: in this
  // one its lanes read different banks.
  EPT_BOTH static int reordered(int s) { return (s & ~7) | (s & 3) << 1 | (s >> 2 & 1); }

  // G·Bᵀ of a warp's positions, or Gᵀ·A of its channels, some products at a time: their sums are
  // added outside of the matrix units, which cut where a float32 sum rounds.
  template <class B>
  EPT_DEVICE static void multiply(const B& block, const Shared& shared, Local<B>& local,
                                  int pieces, bool exact, bool fresh) {
    constexpr int depth = 32;
    EPT_UNROLL_BY(1)
    for (int first = 0; first < Tile::channels; first += depth) {
      block.apart([&](int thread) { local[thread].product = {}; });
      add_product<has_matrix_units, 1, pieces_r>(
          block, local, depth, pieces, exact,
          [&](int thread, int row, int k) {
            const int own = first_of_warp(thread) + row;
            return makes_a(thread) ? shared.sum[own][first + k]
                                   : shared.sum[first + reordered(k)][own];
          },
          [&](int thread, int k, int r) {
            return makes_a(thread) ? shared.factors.b[r][first + k]
                                   : shared.factors.a[first + reordered(k)][r];
          });
      block.apart([&](int thread) {
        auto& [grads, sum, product, total] = local[thread];
        EPT_UNROLL
        for (int n = 0; n < pieces_r; ++n) {
          EPT_UNROLL
          for (int i = 0; i < 4; ++i) {
            const bool starts = first == 0 && (fresh || makes_a(thread));
            total[n][i] = (starts ? 0.0f : total[n][i]) + product.sums[0][n][i];
          }
        }
      });
    }
  }

  // A warp's positions or channels, of which there are so many, × ranks.
  EPT_DEVICE static void store_total(const float (&total)[pieces_r][4], int thread,
                                     const Call& call, int first_r, float* data, int stride,
                                     int stride_r, int rows, bool adds) {
    const int row = Unit::row_of_c(thread % 32, 0);
    const int r = first_r + Unit::column_of_c(thread % 32, 0);
    data += int64_t{row} * stride + int64_t{r} * stride_r;
    EPT_UNROLL
    for (int n = 0; n < pieces_r; ++n, data += int64_t{Unit::columns} * stride_r) {
      const auto each = [&](auto body) {
        EPT_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int down = Unit::row_of_c(0, i), along = Unit::column_of_c(0, i);
          if (row + down >= rows || r + n * Unit::columns + along >= call.rank) continue;
          body(i, data + int64_t{down} * stride + int64_t{along} * stride_r);
        }
      };
      float before[4] = {};
      if (adds) each([&](int i, const float* at) { before[i] = *at; });
      each([&](int i, float* at) { *at = before[i] + total[n][i] * call.scaling; });
    }
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
  bool by_row;
  int blocks;  // of a task
};

struct SpliceFinishKernel {
  static constexpr const char* name = "splice_finish";
  static constexpr int threads = 256;
  static constexpr int parts = 16;  // that are on their way at once
  using Call = SpliceFinishCall;

  struct Shared {};

  template <class B>
  EPT_DEVICE static void run(const B& block, Shared&, const Call& call) {
    Digits digits{block.index};
    int64_t piece = digits.next(call.blocks);
    const int task = static_cast<int>(digits.rest);
    int group = task;
    if (call.by_row) {
      // The group is the first place of the task's rows.
      group = call.plan.begins[task];
      if (call.plan.begins[task + 1] == group) group = -1;
    }
    for (int i = 0; i < 3; ++i) {
      const SpliceSum& sum = call.sums[i];
      const int64_t pieces = (sum.size + threads - 1) / threads;
      if (piece >= 0 && piece < pieces) add_parts(block, sum, task, group, piece * threads);
      piece -= pieces;
    }
  }

  template <class B>
  EPT_DEVICE static void add_parts(const B& block, const SpliceSum& sum, int task, int group,
                                   int64_t first) {
    block.apart([&](int thread) {
      const int64_t at = first + thread;
      const bool there = group >= 0 && at < sum.covered;
      if (at >= sum.size || (there && sum.number == 0)) return;
      float total = 0.0f;
      for (int first_part = 0; there && first_part < sum.number; first_part += parts) {
        const float* data =
            sum.parts + (int64_t{group} * sum.number + first_part) * sum.covered + at;
        EPT_UNROLL
        for (int j = 0; j < parts; ++j) {
          if (first_part + j < sum.number) total += data[j * sum.covered];
        }
      }
      store(sum.gradient, sum.type, task * sum.size + at, total);
    });
  }
};

}  // namespace ept
