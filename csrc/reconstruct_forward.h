// Operation 1, forward, in one launch or in two.
//
// In one, a block has eight tokens and 64 channels of the result. It repeats what its tokens need of
// the products over d and of the softmax over n; [Hin | z] = F·[D | G] with F = P + O·B. In two, the
// first launch has blocks for eight tokens and a piece of n, and blocks for R and S; the second adds
// up the pieces in order, and [Hin | z] = R + O·S. S is saved in either case.
//
// The softmax runs with a running maximum and sum, so that no matrix of weights is stored.
#pragma once

#include "reconstruct_parts.h"

namespace ept {

enum class Launch { only, first, second };

struct ReconstructForwardCall {
  Parts parts;
  Launch launch;
  void* prompt;  // P′ [T, m, d], P's type
  // What is saved, as in kernels.h.
  float *query, *stats, *attended, *hidden, *gates, *cross;
  // From the first launch to the second.
  float* maxima;          // [T, pieces, m]
  float* totals;          // [T, pieces, m]
  float* attended_parts;  // [T, pieces, m, r], relative to the maximum of the piece
  float* x;               // R [T, m, W]
  // The grid of a task: tiles of tokens, times tiles of d or pieces of n; then tiles of R and S.
  int tiles_m, across, products;
  int tiles_d;
  int pieces, chunk;  // of n
};

struct ReconstructForwardKernel {
  static constexpr const char* name = "reconstruct_forward";
  using Tile = ExpandTile;
  static constexpr int threads = reconstruct_threads;
  static constexpr int tokens = reconstruct_tokens;
  static constexpr int positions = 32;          // of n at a time
  static constexpr int lanes = 32;              // threads of a token
  static constexpr int own = max_rank / lanes;  // columns of O that a thread may have
  static constexpr int side = 32;               // columns of a tile of R or S
  using Call = ReconstructForwardCall;

  struct State {
    float attended[own];
    float maximum;
    float total;
  };

  // Shared memory: the factor C = [O | g_k·φ(H_k)] as [r + K·h, 8], at first with Q in O's place;
  // logits [8, K]; and what a step needs for itself.
  EPT_BOTH static int factor_floats(const Call& call) {
    const Parts& parts = call.parts;
    return tokens * (parts.r + (call.launch == Launch::first ? 0 : parts.columns));
  }

  static int64_t shared_floats(const Call& call) {
    const Parts& parts = call.parts;
    const int attention = positions * (parts.r | 1) + 2 * threads;
    const int query = LongProduct::floats(parts.r, 0);
    int most = parts.r + threads;
    if (call.launch == Launch::first) {
      most = greatest(LongProduct::floats(least(side, parts.columns), 0), query);
    } else if (call.launch == Launch::only) {
      most = greatest(LongProduct::floats(parts.columns, parts.r), query);
    }
    return factor_floats(call) + greatest(most, attention);
  }

  template <class B>
  EPT_DEVICE static void run(const B& block, float* memory, const Call& call) {
    Digits digits{block.index};
    const Parts& parts = call.parts;
    const int own_tiles = call.tiles_m * call.across;
    const int number = digits.next(own_tiles + call.products);
    const int task = static_cast<int>(digits.rest);
    if (number >= own_tiles) {
      multiply(block, memory, call, task, number - own_tiles);
      return;
    }
    const int first_m = number % call.tiles_m * tokens, other = number / call.tiles_m;
    const bool saves = other == 0;
    float* factor = memory;
    float* logits = factor + tokens * (parts.r + parts.dims);
    float* rest = memory + factor_floats(call);
    if (parts.r > 0 && call.launch != Launch::second) {
      attend(block, factor, rest, call, task, first_m, other);
    }
    if (call.launch == Launch::first) return;
    if (parts.r > 0 && call.launch == Launch::second) {
      combine(block, call, factor, task, first_m, saves);
    }
    if (parts.spaces > 0) {
      project(block, call, factor, logits, rest, task, first_m, saves);
      if (parts.gate == Gate::prompt) average(block, call, logits, rest, task);
      weigh(block, call, factor, logits, task, first_m, saves);
    }
    expand(block, call, factor, task, first_m, other * Tile::channels);
  }

  // A tile of R or S: eight lines of P or B with 32 columns of [D | G].
  template <class B>
  EPT_DEVICE static void multiply(const B& block, float* memory, const Call& call, int task,
                                  int tile) {
    const Parts& parts = call.parts;
    const int across = (parts.columns + side - 1) / side;
    const int first_c = tile % across * side, count = least(side, parts.columns - first_c);
    int first = tile / across * tokens;
    const bool of_p = call.launch == Launch::first && first < call.tiles_m * tokens;
    if (call.launch == Launch::first && !of_p) first -= call.tiles_m * tokens;
    const int rows = of_p ? parts.m : parts.r;
    float* out = (of_p ? call.x : call.cross) + int64_t{task} * rows * parts.columns + first_c;
    LongProduct::run(
        block, memory, count, nullptr, 0, parts.d,
        [&](int i) {
          return i < tokens ? line_of(of_p ? parts.p : parts.b, task, first + i, rows)
                            : line_of_down(parts, task, first_c + i - tokens);
        },
        [&](int i, int j, float value) {
          if (first + i < rows) out[int64_t{first + i} * parts.columns + j] = value;
        });
  }

  // Q, and the softmax over a piece of n or all of it. A warp has a token, a thread every 32nd
  // column of its O.
  template <class B>
  EPT_DEVICE static void attend(const B& block, float* factor, float* rest, const Call& call,
                                int task, int first_m, int other) {
    const Parts& parts = call.parts;
    const int r = parts.r, padded = r | 1;  // an odd width keeps a column's elements off one bank
    const bool saves = other == 0;
    const int piece = call.launch == Launch::first ? other : 0;
    for (int first = 0; first < r; first += LongProduct::columns) {
      LongProduct::run(
          block, rest, least(LongProduct::columns, r - first), nullptr, 0, parts.d,
          [&](int i) {
            return i < tokens ? line_of(parts.p, task, first_m + i, parts.m)
                              : line_of(parts.b, task, first + i - tokens, r);
          },
          [&](int i, int j, float value) {
            factor[(first + j) * tokens + i] = value;
            if (!saves || first_m + i >= parts.m) return;
            call.query[(int64_t{task} * parts.m + first_m + i) * r + first + j] = value;
          });
    }
    float* rows = rest;                         // [positions, padded]
    float* scores = rows + positions * padded;  // [tokens, positions]
    float* weights = scores + threads;          // [tokens, positions]
    typename B::template Local<State> local;
    block.apart([&](int thread) {
      State& state = local[thread];
      EPT_UNROLL
      for (int i = 0; i < own; ++i) state.attended[i] = 0.0f;
      state.maximum = -INFINITY;
      state.total = 0.0f;
    });
    const int end = least((piece + 1) * call.chunk, parts.n);
    for (int first = piece * call.chunk; first < end; first += positions) {
      block.each([&](int thread) {
        EPT_UNROLL_BY(4)
        for (int at = thread; at < positions * r; at += threads) {
          const int s = at / r, column = at % r;
          rows[s * padded + column] = row_element(parts, task, first + s, end, column);
        }
      });
      block.each([&](int thread) {
        const int token = thread / lanes, s = thread % lanes;
        const float* row = rows + s * padded;
        const float score =
            sum_of_terms(r, [&](int c) { return factor[c * tokens + token] * row[c]; });
        scores[thread] = first + s < end ? score : -INFINITY;
      });
      block.each([&](int thread) {
        State& state = local[thread];
        float maximum = state.maximum;
        EPT_UNROLL_BY(8)
        for (int s = 0; s < positions; ++s) {
          maximum = greatest(maximum, scores[thread / lanes * positions + s]);
        }
        const float kept = expf((state.maximum - maximum) * parts.score_scale);
        weights[thread] = expf((scores[thread] - maximum) * parts.score_scale);
        state.maximum = maximum;
        state.total *= kept;
        EPT_UNROLL
        for (int i = 0; i < own; ++i) state.attended[i] *= kept;
      });
      block.each([&](int thread) {
        State& state = local[thread];
        EPT_UNROLL_BY(4)
        for (int s = 0; s < positions; ++s) {
          const float weight = weights[thread / lanes * positions + s];
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
    block.each([&](int thread) {
      const State& state = local[thread];
      const int token = thread / lanes, row = first_m + token;
      const bool inside = row < parts.m;
      const int64_t at = (int64_t{task} * call.pieces + piece) * parts.m + row;
      if (call.launch == Launch::only) {
        if (thread % lanes == 0 && inside && saves) {
          save_stats(call, task, row, {state.maximum, state.total});
        }
      } else if (thread % lanes == 0 && inside) {
        call.maxima[at] = state.maximum;
        call.totals[at] = state.total;
      }
      EPT_UNROLL
      for (int i = 0; i < own; ++i) {
        const int column = thread % lanes + i * lanes;
        if (column >= r) break;
        if (call.launch == Launch::only) {
          put_attended(call, factor, task, first_m, token, column,
                       state.attended[i] / state.total, saves);
        } else if (inside) {
          call.attended_parts[at * r + column] = state.attended[i];
        }
      }
    });
  }

  // Of a row of the softmax: its largest score and the sum of its exponentials.
  struct Stats {
    float maximum, total;
  };

  EPT_DEVICE static void save_stats(const Call& call, int task, int row, const Stats& stats) {
    float* saved = call.stats + int64_t{task} * 2 * call.parts.m + row;
    saved[0] = stats.maximum;
    saved[call.parts.m] = stats.total;
  }

  EPT_DEVICE static void put_attended(const Call& call, float* factor, int task, int first_m,
                                      int token, int column, float value, bool saves) {
    const int row = first_m + token;
    factor[column * tokens + token] = value;
    if (!saves || row >= call.parts.m) return;
    call.attended[(int64_t{task} * call.parts.m + row) * call.parts.r + column] = value;
  }

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
      const int token = thread % tokens, row = first_m + token;
      const bool inside = row < parts.m;
      const Stats stats = inside ? stats_of(call, task, row) : Stats{0.0f, 1.0f};
      if (saves && inside && thread < tokens) save_stats(call, task, row, stats);
      for (int column = thread / tokens; column < parts.r; column += threads / tokens) {
        const float value = inside ? attended_of(call, task, row, column, stats) : 0.0f;
        put_attended(call, factor, task, first_m, token, column, value, saves);
      }
    });
  }

  EPT_DEVICE static float bias_of(const Parts& parts, int task, int space) {
    const View& bias = parts.gate_bias;
    return load(bias.data, bias.type, task * bias.stride[0] + space * bias.stride[1]);
  }

  // One element of S, column c of [D | G].
  EPT_DEVICE static float cross_of(const Call& call, int task, int row, int c) {
    return call.cross[(int64_t{task} * call.parts.r + row) * call.parts.columns + c];
  }

  // [Hin | z], Hin into the factor and z / τ into the logits.
  template <class B>
  EPT_DEVICE static void project(const B& block, const Call& call, float* factor, float* logits,
                                 float* rest, int task, int first_m, bool saves) {
    const Parts& parts = call.parts;
    const auto put = [&](int token, int c, float value) {
      const int row = first_m + token;
      if (c >= parts.dims) {
        const int k = c - parts.dims;
        logits[token * parts.spaces + k] = (value + bias_of(parts, task, k)) / parts.temperature;
        return;
      }
      factor[(parts.r + c) * tokens + token] = value;
      if (!saves || row >= parts.m) return;
      call.hidden[(int64_t{task} * parts.m + row) * parts.dims + c] = value;
    };
    if (call.launch == Launch::second) {
      block.each([&](int thread) {
        const int token = thread % tokens, row = first_m + token;
        for (int c = thread / tokens; c < parts.columns; c += threads / tokens) {
          float sum = 0.0f;
          if (row < parts.m) {
            sum = call.x[(int64_t{task} * parts.m + row) * parts.columns + c] +
                  sum_of_terms(parts.r, [&](int i) {
                    return factor[i * tokens + token] * cross_of(call, task, i, c);
                  });
          }
          put(token, c, sum);
        }
      });
      return;
    }
    for (int first = 0; first < parts.columns; first += LongProduct::columns) {
      const int count = least(LongProduct::columns, parts.columns - first);
      LongProduct::run(
          block, rest, count, parts.r > 0 ? factor : nullptr, parts.r, parts.d,
          [&](int i) {
            if (i < tokens) return line_of(parts.p, task, first_m + i, parts.m);
            i -= tokens;
            return i < count ? line_of_down(parts, task, first + i)
                             : line_of(parts.b, task, i - count, parts.r);
          },
          [&](int i, int j, float value) { put(i, first + j, value); });
    }
  }

  // The mean over all tokens of `term(token, column)` for each column. The threads of a column take
  // turns at the tokens; their sums, one of each thread in `sums`, are added in order.
  template <class B, class Term>
  EPT_DEVICE static void mean_of_tokens(const B& block, float* sums, float* mean, int columns,
                                        int number, Term term) {
    int wide = 1;
    while (wide < columns && wide < threads) wide *= 2;
    const int groups = threads / wide;
    for (int first = 0; first < columns; first += wide) {
      block.each([&](int thread) {
        const int column = first + thread % wide;
        float sum = 0.0f;
        if (column < columns) {
          for (int token = thread / wide; token < number; token += groups) {
            sum += term(token, column);
          }
        }
        sums[thread] = sum;
      });
      block.each([&](int thread) {
        if (thread >= wide || first + thread >= columns) return;
        mean[first + thread] =
            sum_of_parts(sums + thread, groups, wide) / static_cast<float>(number);
      });
    }
  }

  // With one gate for all tokens: the mean of the logits, from the means of O and R.
  template <class B>
  EPT_DEVICE static void average(const B& block, const Call& call, float* logits, float* rest,
                                 int task) {
    const Parts& parts = call.parts;
    float *mean = rest, *sums = rest + parts.r;
    mean_of_tokens(block, sums, mean, parts.r, parts.m, [&](int token, int column) {
      return attended_of(call, task, token, column, stats_of(call, task, token));
    });
    mean_of_tokens(block, sums, logits, parts.spaces, parts.m, [&](int token, int k) {
      return call.x[(int64_t{task} * parts.m + token) * parts.columns + parts.dims + k];
    });
    block.each([&](int thread) {
      for (int k = thread; k < parts.spaces; k += threads) {
        const float sum = logits[k] + sum_of_terms(parts.r, [&](int i) {
                            return mean[i] * cross_of(call, task, i, parts.dims + k);
                          });
        const float logit = (sum + bias_of(parts, task, k)) / parts.temperature;
        for (int token = 0; token < tokens; ++token) logits[token * parts.spaces + k] = logit;
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
      float* of_token = logits + thread * parts.spaces;
      float maximum = -INFINITY, total = 0.0f;
      for (int k = 0; k < parts.spaces; ++k) maximum = greatest(maximum, of_token[k]);
      for (int k = 0; k < parts.spaces; ++k) total += of_token[k] = expf(of_token[k] - maximum);
      for (int k = 0; k < parts.spaces; ++k) {
        of_token[k] /= total;
        if (saves && first_m + thread < parts.m) {
          call.gates[(int64_t{task} * parts.m + first_m + thread) * parts.spaces + k] = of_token[k];
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

  // P′ = P + C·[B ; U] in 64 channels.
  template <class B>
  EPT_DEVICE static void expand(const B& block, const Call& call, const float* factor, int task,
                                int first_m, int first_d) {
    const Parts& parts = call.parts;
    block.apart([&](int thread) {
      const int d = first_d + Tile::channel(thread);
      if (d >= parts.d) return;
      float acc[Tile::own];
      EPT_UNROLL
      for (int i = 0; i < Tile::own; ++i) {
        acc[i] = line_of(parts.p, task, first_m + Tile::token(thread, i), parts.m).at(d);
      }
      Tile::add_product(acc, factor, parts.r, thread,
                        [&](int c) { return line_of(parts.b, task, c, parts.r).at(d); });
      Tile::add_product(acc, factor + tokens * parts.r, parts.dims, thread,
                        [&](int c) { return line_of_up(parts, task, c).at(d); });
      EPT_UNROLL
      for (int i = 0; i < Tile::own; ++i) {
        const int token = first_m + Tile::token(thread, i);
        if (token >= parts.m) continue;
        store(call.prompt, parts.p.type, (int64_t{task} * parts.m + token) * parts.d + d, acc[i]);
      }
    });
  }
};

}  // namespace ept
