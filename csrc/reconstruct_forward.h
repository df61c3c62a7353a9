// Operation 1, forward: after the products over d come the softmax and the expansion over d.
//
// The softmax over n runs with a running maximum and sum, so that no matrix of weights is stored;
// pieces of n go to separate blocks, and the expansion combines them.
#pragma once

#include "reconstruct_parts.h"

namespace ept {

struct ForwardCoreCall {
  Parts parts;
  const float* sums;  // of the reduction, [T, splits, rows, columns]
  int splits, rows, columns;
  float* query;   // Q [T, m, r]
  float* maxima;  // [T, pieces, m]
  float* totals;  // [T, pieces, m]
  float* attended_parts;   // [T, pieces, m, r], relative to the maximum of the piece
  float* x;       // R [T, m, W]
  float* cross;   // S [T, r, W]
  int pieces, chunk;  // of n
  int tiles;          // of m
  int blocks_x;       // that add up R and S
};

struct ForwardCoreKernel {
  static constexpr const char* name = "reconstruct_forward_core";
  static constexpr int threads = 128;
  static constexpr int tokens = 8;
  static constexpr int positions = 32;
  static constexpr int lanes = threads / tokens;         // threads of a token
  static constexpr int own = max_rank / lanes;           // columns of O that a thread may have
  static constexpr int own_scores = positions / lanes;
  static constexpr int each = 2;  // elements of R and S of a thread
  using Call = ForwardCoreCall;

  static int64_t shared_floats(const Call& call) {
    return tokens * call.parts.r + positions * (call.parts.r | 1) + tokens * positions;
  }

  struct State {
    float attended[own];
    float maximum;
    float total;
  };

  template <class B>
  EPT_DEVICE static void run(const B& block, float* memory, const Call& call) {
    Digits digits{block.index};
    const Parts& parts = call.parts;
    const int attention = parts.r > 0 ? call.tiles * call.pieces : 0;
    const int number = digits.next(attention + call.blocks_x);
    const int task = static_cast<int>(digits.rest);
    if (number < attention) {
      attend(block, memory, call, task, number % call.tiles, number / call.tiles);
    } else {
      add_products(block, call, task, number - attention);
    }
  }

  // R and S
  template <class B>
  EPT_DEVICE static void add_products(const B& block, const Call& call, int task, int piece) {
    const Parts& parts = call.parts;
    const int64_t size = int64_t{call.rows} * call.columns;
    const float* sums = call.sums + task * call.splits * size;
    block.apart([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < each; ++i) {
        const int at = (piece * each + i) * threads + thread;
        const int row = at / parts.columns, column = at % parts.columns;
        if (row >= call.rows) continue;
        const float sum = sum_of_parts(sums + int64_t{row} * call.columns + parts.r + column,
                                       call.splits, size);
        if (row < parts.m) {
          call.x[(int64_t{task} * parts.m + row) * parts.columns + column] = sum;
        } else {
          call.cross[(int64_t{task} * parts.r + row - parts.m) * parts.columns + column] = sum;
        }
      }
    });
  }

  // A thread has every 16th column of O of one token.
  template <class B>
  EPT_DEVICE static void attend(const B& block, float* memory, const Call& call, int task, int tile,
                                int piece) {
    const Parts& parts = call.parts;
    const View& a = parts.a;
    const int r = parts.r, padded = r | 1;  // an odd width keeps a column's elements off one bank
    float* query = memory;                  // [tokens, r]
    float* rows = query + tokens * r;       // [positions, padded]
    float* scores = rows + positions * padded;  // [tokens, positions]
    const int first_m = tile * tokens;
    typename B::template Local<State> local;
    block.each([&](int thread) {
      const int64_t size = int64_t{call.rows} * call.columns;
      for (int at = thread; at < tokens * r; at += threads) {
        const int token = first_m + at / r, column = at % r;
        float sum = 0.0f;
        if (token < parts.m) {
          sum = sum_of_parts(call.sums + task * call.splits * size +
                                 int64_t{token} * call.columns + column,
                             call.splits, size);
          if (piece == 0) call.query[(int64_t{task} * parts.m + token) * r + column] = sum;
        }
        query[at] = sum;
      }
      State& state = local[thread];
      EPT_UNROLL
      for (int i = 0; i < own; ++i) state.attended[i] = 0.0f;
      state.maximum = -INFINITY;
      state.total = 0.0f;
    });
    const int end = least((piece + 1) * call.chunk, parts.n);
    for (int first = piece * call.chunk; first < end; first += positions) {
      block.each([&](int thread) {
        for (int at = thread; at < positions * r; at += threads) {
          const int s = at / r, column = at % r;
          const int64_t from = task * a.stride[0] + (first + s) * a.stride[1] +
                               column * a.stride[2];
          rows[s * padded + column] =
              first + s < end ? load(a.data, a.type, from) * parts.scaling : 0.0f;
        }
      });
      block.each([&](int thread) {
        const int token = thread / lanes;
        const float* q = query + token * r;
        EPT_UNROLL
        for (int i = 0; i < own_scores; ++i) {
          const int s = thread % lanes + i * lanes;
          const float* row = rows + s * padded;
          const float score = sum_of_terms(r, [&](int c) { return q[c] * row[c]; });
          scores[token * positions + s] = first + s < end ? score : -INFINITY;
        }
      });
      block.each([&](int thread) {
        State& state = local[thread];
        const float* own_scores_of = scores + thread / lanes * positions;
        float maximum = state.maximum;
        EPT_UNROLL_BY(8)
        for (int s = 0; s < positions; ++s) maximum = greatest(maximum, own_scores_of[s]);
        const float kept = expf((state.maximum - maximum) * parts.score_scale);
        state.maximum = maximum;
        state.total *= kept;
        EPT_UNROLL
        for (int i = 0; i < own; ++i) state.attended[i] *= kept;
        for (int s = 0; s < positions; ++s) {
          const float weight = expf((own_scores_of[s] - maximum) * parts.score_scale);
          state.total += weight;
          EPT_UNROLL
          for (int i = 0; i < own; ++i) {
            const int column = thread % lanes + i * lanes;
            if (i * lanes >= r) break;
            if (column < r) state.attended[i] += weight * rows[s * padded + column];
          }
        }
      });
    }
    block.apart([&](int thread) {
      const int token = first_m + thread / lanes;
      if (token >= parts.m) return;
      const State& state = local[thread];
      const int64_t at = (int64_t{task} * call.pieces + piece) * parts.m + token;
      if (thread % lanes == 0) {
        call.maxima[at] = state.maximum;
        call.totals[at] = state.total;
      }
      EPT_UNROLL
      for (int i = 0; i < own; ++i) {
        const int column = thread % lanes + i * lanes;
        if (column < r) call.attended_parts[at * r + column] = state.attended[i];
      }
    });
  }
};

struct ForwardExpandCall {
  Parts parts;
  const float* maxima;
  const float* totals;
  const float* attended_parts;
  const float* x;
  const float* cross;  // null: no offset
  int pieces;
  void* prompt;  // P′ [T, m, d], P's type
  float* stats;
  float* attended;
  float* hidden;
  float* gates;
  int tiles_m, tiles_d;
};

// Every block of a tile of tokens makes C = [O | g_k·φ(H_k)] for itself; the first one saves it.
struct ForwardExpandKernel {
  static constexpr const char* name = "reconstruct_forward_expand";
  using Tile = ExpandTile;
  static constexpr int threads = Tile::threads;
  static constexpr int tokens = Tile::tokens;
  using Call = ForwardExpandCall;

  // Shared memory: factor [r + K·h, 8], logits [8, K], and for one gate of all tokens the mean of
  // O, [r], and a sum of each thread.
  static int64_t shared_floats(const Call& call) {
    const Parts& parts = call.parts;
    return tokens * (parts.r + parts.dims + parts.spaces) + parts.r + threads;
  }

  template <class B>
  EPT_DEVICE static void run(const B& block, float* memory, const Call& call) {
    Digits digits{block.index};
    const Parts& parts = call.parts;
    const int tile_d = digits.next(call.tiles_d);
    const int first_m = digits.next(call.tiles_m) * tokens;
    const int task = static_cast<int>(digits.rest);
    const bool saves = tile_d == 0;
    float* factor = memory;
    float* logits = factor + tokens * (parts.r + parts.dims);
    float* mean = logits + tokens * parts.spaces;
    if (parts.r > 0) combine(block, call, factor, task, first_m, saves);
    if (parts.spaces > 0) {
      project(block, call, factor, logits, task, first_m, saves);
      if (parts.gate == Gate::prompt) average(block, call, logits, mean, mean + parts.r, task);
      weigh(block, call, factor, logits, task, first_m, saves);
    }
    block.apart([&](int thread) {
      const int d = tile_d * Tile::channels + Tile::channel(thread);
      if (d >= parts.d) return;
      const View& p = parts.p;
      float acc[Tile::own];
      EPT_UNROLL
      for (int i = 0; i < Tile::own; ++i) {
        const int token = first_m + Tile::token(thread, i);
        acc[i] = token < parts.m ? line_of(p, task, token).at(d) : 0.0f;
      }
      Tile::add_product(acc, factor, parts.r, thread, d,
                        [&](int c) { return line_of(parts.b, task, c); });
      Tile::add_product(acc, factor + tokens * parts.r, parts.dims, thread, d,
                        [&](int c) { return line_of_up(parts, task, c); });
      EPT_UNROLL
      for (int i = 0; i < Tile::own; ++i) {
        const int token = first_m + Tile::token(thread, i);
        if (token >= parts.m) continue;
        store(call.prompt, p.type, (int64_t{task} * parts.m + token) * parts.d + d, acc[i]);
      }
    });
  }

  // Of a row of the softmax: its largest score and the sum of its exponentials.
  struct Stats {
    float maximum, total;
  };

  EPT_DEVICE static Stats stats_of(const Call& call, int task, int token) {
    const int m = call.parts.m;
    const int64_t first = int64_t{task} * call.pieces * m + token;
    Stats stats{-INFINITY, 0.0f};
    for (int i = 0; i < call.pieces; ++i) {
      stats.maximum = greatest(stats.maximum, call.maxima[first + int64_t{i} * m]);
    }
    for (int i = 0; i < call.pieces; ++i) {
      const int64_t at = first + int64_t{i} * m;
      stats.total +=
          call.totals[at] * expf((call.maxima[at] - stats.maximum) * call.parts.score_scale);
    }
    return stats;
  }

  // One element of O, from the pieces of n.
  EPT_DEVICE static float attended_of(const Call& call, int task, int token, int column,
                                 const Stats& stats) {
    const int m = call.parts.m, r = call.parts.r;
    const int64_t first = int64_t{task} * call.pieces * m + token;
    float attended = 0.0f;
    for (int i = 0; i < call.pieces; ++i) {
      const int64_t at = first + int64_t{i} * m;
      attended += call.attended_parts[at * r + column] *
             expf((call.maxima[at] - stats.maximum) * call.parts.score_scale);
    }
    return attended / stats.total;
  }

  // O into the factor. Threads of a token share its row's statistics by computing them each.
  template <class B>
  EPT_DEVICE static void combine(const B& block, const Call& call, float* factor, int task,
                                 int first_m, bool saves) {
    const Parts& parts = call.parts;
    block.each([&](int thread) {
      const int token = thread % tokens;
      const int row = first_m + token;
      const int64_t at = int64_t{task} * parts.m + row;
      const Stats stats = row < parts.m ? stats_of(call, task, row) : Stats{0.0f, 1.0f};
      if (saves && row < parts.m && thread < tokens) {
        call.stats[int64_t{task} * 2 * parts.m + row] = stats.maximum;
        call.stats[(int64_t{task} * 2 + 1) * parts.m + row] = stats.total;
      }
      for (int column = thread / tokens; column < parts.r; column += threads / tokens) {
        const float attended = row < parts.m ? attended_of(call, task, row, column, stats) : 0.0f;
        factor[column * tokens + token] = attended;
        if (saves && row < parts.m) call.attended[at * parts.r + column] = attended;
      }
    });
  }

  // [Hin | z] = R + O·S + [0 | b], Hin into the factor and z / τ into the logits.
  template <class B>
  EPT_DEVICE static void project(const B& block, const Call& call, float* factor, float* logits,
                                 int task, int first_m, bool saves) {
    const Parts& parts = call.parts;
    block.each([&](int thread) {
      const int token = thread % tokens;
      const int row = first_m + token;
      for (int c = thread / tokens; c < parts.columns; c += threads / tokens) {
        float sum = 0.0f;
        if (row < parts.m) {
          const float* cross = call.cross + int64_t{task} * parts.r * parts.columns + c;
          sum = call.x[(int64_t{task} * parts.m + row) * parts.columns + c] +
                sum_of_terms(parts.r, [&](int i) {
                  return factor[i * tokens + token] * cross[int64_t{i} * parts.columns];
                });
        }
        if (c < parts.dims) {
          factor[(parts.r + c) * tokens + token] = sum;
          if (saves && row < parts.m) {
            call.hidden[(int64_t{task} * parts.m + row) * parts.dims + c] = sum;
          }
        } else {
          logits[token * parts.spaces + c - parts.dims] =
              (sum + bias_of(parts, task, c - parts.dims)) / parts.temperature;
        }
      }
    });
  }

  EPT_DEVICE static float bias_of(const Parts& parts, int task, int space) {
    const View& bias = parts.gate_bias;
    return load(bias.data, bias.type, task * bias.stride[0] + space * bias.stride[1]);
  }

  // With one gate for all tokens: the mean of the logits, from the means of O and R.
  template <class B>
  EPT_DEVICE static void average(const B& block, const Call& call, float* logits, float* mean,
                                 float* sums, int task) {
    const Parts& parts = call.parts;
    mean_of_tokens(block, sums, mean, parts.r, parts.m, [&](int token, int column) {
      return attended_of(call, task, token, column, stats_of(call, task, token));
    });
    mean_of_tokens(block, sums, logits, parts.spaces, parts.m, [&](int token, int k) {
      return call.x[(int64_t{task} * parts.m + token) * parts.columns + parts.dims + k];
    });
    block.each([&](int thread) {
      for (int k = thread; k < parts.spaces; k += threads) {
        const float* cross =
            call.cross + int64_t{task} * parts.r * parts.columns + parts.dims + k;
        const float sum = logits[k] + sum_of_terms(parts.r, [&](int i) {
                            return mean[i] * cross[int64_t{i} * parts.columns];
                          });
        logits[k] = (sum + bias_of(parts, task, k)) / parts.temperature;
      }
    });
    block.each([&](int thread) {
      for (int at = thread; at < (tokens - 1) * parts.spaces; at += threads) {
        logits[parts.spaces + at] = logits[at % parts.spaces];
      }
    });
  }

  // The gates, and what they make of the hidden columns: g_k·φ(H_k).
  template <class B>
  EPT_DEVICE static void weigh(const B& block, const Call& call, float* factor, float* logits,
                               int task, int first_m, bool saves) {
    const Parts& parts = call.parts;
    block.each([&](int thread) {
      if (thread >= tokens) return;
      float* own = logits + thread * parts.spaces;
      float maximum = -INFINITY, total = 0.0f;
      for (int k = 0; k < parts.spaces; ++k) maximum = greatest(maximum, own[k]);
      for (int k = 0; k < parts.spaces; ++k) total += own[k] = expf(own[k] - maximum);
      for (int k = 0; k < parts.spaces; ++k) {
        own[k] /= total;
        if (saves && first_m + thread < parts.m) {
          call.gates[(int64_t{task} * parts.m + first_m + thread) * parts.spaces + k] = own[k];
        }
      }
    });
    block.each([&](int thread) {
      for (int at = thread; at < parts.dims * tokens; at += threads) {
        const int token = at % tokens, c = at / tokens;
        float& hidden = factor[parts.r * tokens + at];
        hidden = logits[token * parts.spaces + c / parts.dim] * activate(hidden, parts.activation);
      }
    });
  }
};

}  // namespace ept
