// Operation 1, forward, in one launch or in two.
//
// In one, a block has eight tokens and 64 channels of the result, and repeats what its tokens need
// of the products over d and of the softmax over n: [Hin | z] = F·[D | G] with F = P + O·B. In two,
// the first has blocks for eight tokens and a piece of n, and blocks for R; the second adds up the
// pieces in order, and [Hin | z] = R + O·S. S, which is saved, has blocks in the first or only one.
//
// The softmax runs with a running maximum and sum, so that no matrix of weights is stored.
#pragma once

#include "reconstruct_parts.h"

namespace ept {

struct ReconstructForwardCall {
  Parts parts;
  ReconstructForward tensors;
  Launch launch;
  // From the first launch to the second: R [T, m, W], and the softmax in pieces of n as
  // [T, m, pieces, 2 + r]: the largest score, the sum of the exponentials, and the sum of the rows
  // of c·A with these as weights.
  float *x, *softmax;
  // The grid of a task: tiles of tokens, times tiles of d or pieces of n; then tiles of R and S.
  int tiles_m, across, products;
  int pieces, chunk;  // of n
};

template <bool plain>
struct ReconstructForwardKernel : ReconstructBlock {
  static constexpr const char* name = "reconstruct_forward";
  using Tile = ExpandTile;
  using Product = LongProduct<0>;
  static constexpr int most_fused = 32;  // r, in one launch
  using FusedProduct = LongProduct<most_fused>;
  static constexpr int positions = 32;          // of n at a time
  static constexpr int lanes = 32;              // threads of a token
  static constexpr int own = max_rank / lanes;  // columns of O that a thread may have
  static constexpr int side = 32;               // columns of a tile of R or S
  using Call = ReconstructForwardCall;

  struct State {
    float attended[own] = {};
    float maximum = -INFINITY, total = 0.0f;
  };

  // Shared memory: the factor C = [O | g_k·φ(H_k)] as [r + K·h, 8], at first with Q in O's place;
  // the logits [8, K], at first the softmax; and what a step needs for itself.
  EPT_BOTH static int kept_floats(const Call& call) {
    const Parts& parts = call.parts;
    if (call.launch == Launch::first) return tokens * parts.r;
    return tokens * (parts.r + parts.dims + greatest(parts.spaces, 2 + parts.r));
  }

  static int64_t shared_floats(const Call& call) {
    const Parts& parts = call.parts;
    if (call.launch == Launch::second) {
      return kept_floats(call) + greatest(parts.r, Tile::lines * line_floats);
    }
    const int fused = call.launch == Launch::only ? parts.r : 0;
    return kept_floats(call) +
           greatest(positions * (parts.r | 1) + 2 * threads,
                    FusedProduct::floats(greatest(parts.r, parts.columns), fused));
  }

  template <class B>
  EPT_DEVICE static void run(const B& block, float* memory, const Call& call) {
    Digits digits{block.index};
    const Parts& parts = call.parts;
    const int tiles = call.tiles_m * call.across;
    const int number = digits.next(tiles + call.products);
    const int task = static_cast<int>(digits.rest);
    if (number >= tiles) return multiply(block, memory, call, task, number - tiles);
    const Tokens at{task, number % call.tiles_m * tokens, parts.m};
    const int other = number / call.tiles_m;
    const bool saves = other == 0;
    float* factor = memory;
    float* logits = memory + tokens * (parts.r + parts.dims);
    float* rest = memory + kept_floats(call);
    float* softmax = call.launch == Launch::only ? logits : softmax_of(call, at);
    if (parts.r > 0 && call.launch != Launch::second) {
      const int piece = call.launch == Launch::first ? other : 0;
      attend(block, factor, softmax, rest, call, at, piece, saves);
    }
    if (call.launch == Launch::first) return;
    if (parts.spaces > 0 && parts.gate == Gate::prompt) {
      average(block, call, factor, logits, rest, task);
    }
    if (parts.r > 0) combine(block, call, softmax, factor, at, saves);
    if (parts.spaces > 0) {
      project(block, call, factor, logits, rest, at, saves);
      weigh(block, call, factor, logits, at, saves);
    }
    expand(block, call, factor, logits, rest, at, other * Tile::channels);
  }

  EPT_DEVICE static float* softmax_of(const Call& call, const Tokens& at) {
    return call.softmax + at.row(0) * call.pieces * (2 + call.parts.r);
  }

  // A tile of R or S: eight lines of P or B with 32 columns of [D | G].
  template <class B>
  EPT_DEVICE static void multiply(const B& block, float* memory, const Call& call, int task,
                                  int tile) {
    const Parts& parts = call.parts;
    const int across = (parts.columns + side - 1) / side, down = tile / across;
    const int first_c = tile % across * side, count = least(side, parts.columns - first_c);
    const int tiles_p = call.launch == Launch::first ? call.tiles_m : 0;
    const bool of_p = down < tiles_p;
    const int first = (of_p ? down : down - tiles_p) * tokens, rows = of_p ? parts.m : parts.r;
    float* out = of_p ? call.x : call.tensors.cross;
    out += int64_t{task} * rows * parts.columns + first_c;
    Product::run(
        block, memory, count, parts.d,
        [&](int i) { return line_of(of_p ? parts.p : parts.b, task, first + i, rows); },
        [&](int j) { return line_of_down(parts, task, first_c + j); },
        [&](int i, int j, float value) {
          if (first + i < rows) out[int64_t{first + i} * parts.columns + j] = value;
        });
  }

  // Q, and the softmax over a piece of n or all of it. A warp has a token, a thread every 32nd
  // column of its O.
  template <class B>
  EPT_DEVICE static void attend(const B& block, float* query, float* softmax, float* rest,
                                const Call& call, const Tokens& at, int piece, bool saves) {
    const Parts& parts = call.parts;
    const int r = parts.r, padded = r | 1;  // an odd width keeps a column's elements off one bank
    Product::run(
        block, rest, r, parts.d,
        [&](int i) { return at.line(parts.p, i); },
        [&](int j) { return line_of(parts.b, at.task, j, r); },
        [&](int i, int j, float value) {
          query[j * tokens + i] = value;
          if (saves && at.has(i)) call.tensors.query[at.row(i) * r + j] = value;
        });
    float* rows = rest;                         // [positions, padded]
    float* scores = rows + positions * padded;  // [tokens, positions]
    float* weights = scores + threads;          // [tokens, positions]
    typename B::template Local<State> local;
    const int end = least((piece + 1) * call.chunk, parts.n);
    for (int first = piece * call.chunk; first < end; first += positions) {
      load_rows(block, parts, rows, positions, at.task, first, end);
      block.each([&](int thread) {
        const int token = thread / lanes, s = thread % lanes;
        const float* row = rows + s * padded;
        const float score =
            sum_of_terms(r, [&](int c) { return query[c * tokens + token] * row[c]; });
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
          each_column<lanes>(thread, r, [&](int i, int column) {
            state.attended[i] += weight * rows[s * padded + column];
          });
        }
      });
    }
    block.each([&](int thread) {
      const State& state = local[thread];
      const int token = thread / lanes;
      if (!at.has(token)) return;
      float* of_token = softmax + (int64_t{token} * call.pieces + piece) * (2 + r);
      of_token[0] = state.maximum;
      of_token[1] = state.total;
      each_column<lanes>(thread, r, [&](int i, int column) {
        of_token[2 + column] = state.attended[i];
      });
    });
  }

  // O into the factor, from the pieces of n.
  template <class B>
  EPT_DEVICE static void combine(const B& block, const Call& call, const float* softmax,
                                 float* factor, const Tokens& at, bool saves) {
    const Parts& parts = call.parts;
    const int r = parts.r;
    block.each([&](int thread) {
      const int token = thread % tokens;
      const float* of_token = softmax + int64_t{token} * call.pieces * (2 + r);
      for (int column = thread / tokens; column < r; column += threads / tokens) {
        float maximum = -INFINITY, total = 0.0f, sum = 0.0f;
        factor[column * tokens + token] = 0.0f;
        if (!at.has(token)) continue;
        for (int i = 0; i < call.pieces; ++i) maximum = greatest(maximum, of_token[i * (2 + r)]);
        for (int i = 0; i < call.pieces; ++i) {
          const float* piece = of_token + i * (2 + r);
          const float weight = expf((piece[0] - maximum) * parts.score_scale);
          total += weight * piece[1];
          sum += weight * piece[2 + column];
        }
        factor[column * tokens + token] = sum / total;
        if (!saves) continue;
        call.tensors.attended[at.row(token) * r + column] = sum / total;
        if (column > 0) continue;
        float* stats = call.tensors.stats + at.row(token) + int64_t{at.task} * at.m;
        stats[0] = maximum;
        stats[at.m] = total;
      }
    });
  }

  EPT_DEVICE static float bias_of(const Parts& parts, int task, int space) {
    const View& bias = parts.gate_bias;
    return load(bias.data, bias.type, task * bias.stride[0] + space * bias.stride[1]);
  }

  EPT_DEVICE static float down_bias_of(const Parts& parts, int task, int c) {
    const View& bias = parts.down_bias;
    if (bias.data == nullptr) return 0.0f;
    const int k = c / parts.dim, j = c % parts.dim;
    return load(bias.data, bias.type,
                task * bias.stride[0] + k * bias.stride[1] + j * bias.stride[2]);
  }

  // With one gate for all tokens: the mean of the logits, from the means of O and R.
  template <class B>
  EPT_DEVICE static void average(const B& block, const Call& call, float* factor, float* logits,
                                 float* mean, int task) {
    const Parts& parts = call.parts;
    const int r = parts.r;
    const auto number = static_cast<float>(parts.m);
    for (Tokens at{task, 0, parts.m}; at.has(0) && r > 0; at.first += tokens) {
      combine(block, call, softmax_of(call, at), factor, at, false);
      block.each([&](int thread) {
        for (int column = thread; column < r; column += threads) {
          const float sum = sum_of_parts(factor + column * tokens, tokens, 1) / number;
          mean[column] = (at.first > 0 ? mean[column] : 0.0f) + sum;
        }
      });
    }
    block.each([&](int thread) {
      for (int k = thread; k < parts.spaces; k += threads) {
        const int c = parts.dims + k;
        const float* x = call.x + int64_t{task} * parts.m * parts.columns + c;
        const float* cross = call.tensors.cross + int64_t{task} * r * parts.columns + c;
        const float z = sum_of_parts(x, parts.m, parts.columns) / number +
                        sum_of_terms(r, [&](int i) { return mean[i] * cross[i * parts.columns]; });
        for (int token = 0; token < tokens; ++token) {
          logits[token * parts.spaces + k] = (z + bias_of(parts, task, k)) / parts.temperature;
        }
      }
    });
  }

  // [Hin | z], Hin into the factor and z / τ into the logits, if these are not there.
  template <class B>
  EPT_DEVICE static void project(const B& block, const Call& call, float* factor, float* logits,
                                 float* rest, const Tokens& at, bool saves) {
    const Parts& parts = call.parts;
    const auto put = [&](int token, int c, float value) {
      const int k = c - parts.dims;
      if (k < 0) {
        if constexpr (!plain) value += down_bias_of(parts, at.task, c);
        factor[(parts.r + c) * tokens + token] = value;
        if (saves && at.has(token)) call.tensors.hidden[at.row(token) * parts.dims + c] = value;
      } else if (parts.gate == Gate::token) {
        logits[token * parts.spaces + k] = (value + bias_of(parts, at.task, k)) / parts.temperature;
      }
    };
    if (call.launch == Launch::second) {
      block.each([&](int thread) {
        const int token = thread % tokens;
        const float* x = call.x + at.row(at.has(token) ? token : 0) * parts.columns;
        for (int c = thread / tokens; c < parts.columns; c += threads / tokens) {
          const float* cross = call.tensors.cross + int64_t{at.task} * parts.r * parts.columns + c;
          const float product = sum_of_terms(parts.r, [&](int i) {
            return factor[i * tokens + token] * cross[i * parts.columns];
          });
          put(token, c, x[c] + product);
        }
      });
      return;
    }
    FusedProduct::run(
        block, rest, parts.columns, parts.d,
        [&](int i) { return at.line(parts.p, i); },
        [&](int j) { return line_of_down(parts, at.task, j); }, put, parts.r, factor,
        [&](int i) { return line_of(parts.b, at.task, i, parts.r); });
  }

  // The gates, and what they make of the hidden columns: g_k·φ(H_k).
  template <class B>
  EPT_DEVICE static void weigh(const B& block, const Call& call, float* factor, float* logits,
                               const Tokens& at, bool saves) {
    const Parts& parts = call.parts;
    block.each([&](int thread) {
      if (thread >= tokens) return;
      float* gates = logits + thread * parts.spaces;
      if constexpr (!plain) {
        if (gates_of<plain>(parts) == 0) {
          gates[0] = 1.0f;
          return;
        }
      }
      float maximum = -INFINITY, total = 0.0f;
      for (int k = 0; k < parts.spaces; ++k) maximum = greatest(maximum, gates[k]);
      for (int k = 0; k < parts.spaces; ++k) total += gates[k] = expf(gates[k] - maximum);
      for (int k = 0; k < parts.spaces; ++k) {
        gates[k] /= total;
        if (!saves || !at.has(thread)) continue;
        call.tensors.gates[at.row(thread) * parts.spaces + k] = gates[k];
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

  // P′ = P + C·[B ; U], and the bias of U times g, in 64 channels.
  template <class B>
  EPT_DEVICE static void expand(const B& block, const Call& call, const float* factor,
                                const float* gates, float* rest, const Tokens& at, int first_d) {
    const Parts& parts = call.parts;
    Line* lines = reinterpret_cast<Line*>(rest);
    typename B::template Local<Tile::State> local;
    Tile::start(block, local, parts.p, at, first_d, parts.d);
    for (int first = 0; first < parts.r + parts.dims; first += Tile::lines) {
      Tile::add_lines(block, lines, local, factor + first * tokens,
                      least(Tile::lines, parts.r + parts.dims - first), first_d, parts.d,
                      [&](int i) { return line_of_factors(parts, at.task, first + i); });
    }
    if constexpr (!plain) {
      block.apart([&](int thread) {
        const int c = first_d + Tile::channel(thread);
        if (parts.up_bias.data == nullptr || c >= parts.d) return;
        EPT_UNROLL
        for (int i = 0; i < Tile::own; ++i) {
          const float* own = gates + Tile::token(thread, i) * parts.spaces;
          local[thread].acc[i] += sum_of_terms(parts.spaces, [&](int k) {
            return own[k] * line_of(parts.up_bias, at.task, k, parts.spaces).at(c);
          });
        }
      });
    }
    Tile::store(block, local, call.tensors.prompt, parts.p.type, at, first_d, parts.d);
  }
};

}  // namespace ept
