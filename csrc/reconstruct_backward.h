// Operation 1, backward, in two launches: core and expand.
//
// Core has blocks for eight tokens and a piece of n. Each makes dC = Y·[B ; U]ᵀ of its tokens,
// from it dX and dO, and its part of dQ. Expand has blocks for 64 channels, and for dA: a block for
// sixteen positions goes through all tokens, so that no parts of dA are stored. The weights of the
// softmax are made again in both, from Q and the statistics of its rows.
//
// One gate for all tokens needs the sum of their dg before dX. Every block of core makes it for
// itself, or if that is too much, a launch of core before the others does.
//
// With F = P + O·B and dF = Y + dX·[D | G]ᵀ:
//     dP = dF + dQ·B    dB = Oᵀ·dF + dQᵀ·P    d[D | G] = Fᵀ·dX    dU = (g·Φ)ᵀ·Y    db = Σ dz
// With biases, Σ dHin and gᵀ·Y are their gradients, and Y times the bias of U is part of dg.
#pragma once

#include "reconstruct_parts.h"

namespace ept {

struct ReconstructBackwardCall {
  Parts parts;
  ReconstructBackward tensors;
  Launch launch;  // of core: the first one makes sums of dg only
  // From launch to launch.
  float* d_gates;     // dg of eight tokens, [T, tiles_m, K]
  float* d_x;         // [dHin | dz / τ], [T, m, W]
  float* d_attended;  // dO [T, m, r]
  float* inner;       // rows of dO·O, [T, m]
  float* d_query;     // dQ in parts, [T, pieces, m, r]
  int tiles_m;
  int pieces, chunk;  // of n
  // The grid of expand for a task: for every tile of d tiles of each result over d, then tiles of
  // dA and of db.
  int tiles_d, tiles_of[4], tiles_a, tiles_bias;

  EPT_BOTH int tiles() const {
    return (tiles_of[0] + tiles_of[1] + tiles_of[2] + tiles_of[3]) * tiles_d;
  }
};

// The results over d, as tiles_of has them: dB, d[D | G], dU, dP.
enum class Result { b, down, up, prompt };

// The softmax of eight tokens and sixteen positions, made again.
struct ScoreTile : ReconstructBlock {
  static constexpr int positions = 16;
  static constexpr int pairs = tokens * positions;

  int r;
  float* d_attended;  // [tokens, r]
  float* inner;       // [tokens]
  float* query;       // [tokens, r]
  float* rows;        // c·A [positions, r | 1]
  float* weights;     // [tokens, positions], at first the scores
  float* d_scores;    // [tokens, positions], at first the gradients of the weights

  EPT_BOTH static int floats(int r) {
    return 2 * tokens * r + tokens + positions * (r | 1) + 2 * pairs;
  }

  EPT_DEVICE ScoreTile(float* memory, int rank) : r(rank) {
    d_attended = memory;
    inner = d_attended + tokens * r;
    query = inner + tokens;
    rows = query + tokens * r;
    weights = rows + positions * (r | 1);
    d_scores = weights + pairs;
  }

  // Half of the threads multiply the rows by Q, the others by dO.
  template <class B>
  EPT_DEVICE void score(const B& block, const ReconstructBackwardCall& call, const Tokens& at,
                        int number) const {
    static_assert(2 * pairs == threads);
    block.each([&](int thread) {
      const int token = thread % pairs / positions;
      const float* left = (thread < pairs ? query : d_attended) + token * r;
      const float* row = rows + thread % positions * (r | 1);
      weights[thread] = sum_of_terms(r, [&](int i) { return left[i] * row[i]; });
    });
    block.each([&](int thread) {
      if (thread >= pairs) return;
      const Parts& parts = call.parts;
      const int token = thread / positions;
      float weight = 0.0f, d_score = 0.0f;
      if (at.has(token) && thread % positions < number) {
        const float* stats = call.tensors.stats + at.row(token) + int64_t{at.task} * at.m;
        weight = expf((weights[thread] - stats[0]) * parts.score_scale) / stats[parts.m];
        d_score = weight * (d_scores[thread] - inner[token]) * parts.score_scale;
      }
      weights[thread] = weight;
      d_scores[thread] = d_score;
    });
  }
};

template <bool plain>
struct BackwardCoreKernel : ReconstructBlock {
  static constexpr const char* name = "reconstruct_backward_core";
  using Product = LongProduct<0>;
  static constexpr int lanes = 32;              // threads of a token
  static constexpr int own = max_rank / lanes;  // columns of dQ that a thread may have
  using Call = ReconstructBackwardCall;

  struct State {
    float d_query[own] = {};
  };

  // Shared memory: dO and the rest of a tile of scores. Until the rest is needed, in its place: the
  // sums of dg over all tokens [K], dHin [K·h, 8], and dz [K, 8] or before it the long product.
  // With biases and a gate dz has a place of its own, which first holds Y times the bias of U.
  EPT_BOTH static int kept_floats(const Parts& parts) { return tokens * (parts.r + 1); }

  static int64_t shared_floats(const Call& call) {
    const Parts& parts = call.parts;
    const int product = Product::floats(parts.r + rows_of(parts));
    const int dims = tokens * rows_of(parts) + (parts.spaces + 3) / 4 * 4;
    return greatest(kept_floats(parts) + dims + greatest(tokens * parts.spaces, product),
                    ScoreTile::floats(parts.r));
  }

  template <class B>
  EPT_DEVICE static void run(const B& block, float* memory, const Call& call) {
    Digits digits{block.index};
    const Parts& parts = call.parts;
    Tokens at{0, digits.next(call.tiles_m) * tokens, parts.m};
    const int piece = digits.next(call.pieces);
    at.task = static_cast<int>(digits.rest);
    float* d_gates = memory + kept_floats(parts);
    float* d_x = d_gates + (parts.spaces + 3) / 4 * 4;
    float* rest = d_x + tokens * rows_of(parts);
    const bool alone = call.launch == Launch::first;
    if (call.launch == Launch::second) {
      const float* sums = call.d_gates + int64_t{at.task} * call.tiles_m * parts.spaces;
      block.each([&](int thread) {
        for (int k = thread; k < parts.spaces; k += threads) {
          d_gates[k] = sum_of_parts(sums + k, call.tiles_m, parts.spaces);
        }
      });
    } else if (parts.spaces > 0 && parts.gate == Gate::prompt) {
      add_gates(block, call, d_gates, d_x, rest, {at.task, alone ? at.first : 0, parts.m},
                alone ? 1 : call.tiles_m);
    }
    if (alone) {
      return block.apart([&](int thread) {
        float* out = call.d_gates + block.index * parts.spaces;
        for (int k = thread; k < parts.spaces; k += threads) out[k] = d_gates[k];
      });
    }
    multiply(block, rest, call, at, 0, [&](int token, int c, float value) {
      if (c < parts.r) {
        memory[token * parts.r + c] = value;
      } else {
        d_x[(c - parts.r) * tokens + token] = value;
      }
    });
    if (parts.spaces > 0) project(block, call, d_gates, d_x, at, piece == 0);
    if (parts.r > 0) attend(block, memory, call, d_x, at, piece);
  }

  // Rows of U and, with a gate, of its bias.
  EPT_BOTH static int rows_of(const Parts& parts) {
    if constexpr (plain) return parts.dims;
    return parts.up_bias.data == nullptr ? parts.dims : parts.columns;
  }

  // dC = Y·[B ; U]ᵀ of eight tokens, from a column on; with a gate Y times the bias of U after it.
  template <class B, class Put>
  EPT_DEVICE static void multiply(const B& block, float* memory, const Call& call, const Tokens& at,
                                  int first, Put put) {
    const Parts& parts = call.parts;
    Product::run(
        block, memory, parts.r + rows_of(parts) - first, parts.d,
        [&](int i) { return at.line(call.tensors.grad, i); },
        [&](int j) {
          if constexpr (!plain) {
            const int k = first + j - parts.r - parts.dims;
            if (k >= 0) return line_of(parts.up_bias, at.task, k, parts.spaces);
          }
          return line_of_factors(parts, at.task, first + j);
        },
        put);
  }

  // φ(H) of a token.
  EPT_DEVICE static float activated(const Call& call, int64_t row, int c) {
    return activate(call.tensors.hidden[row * call.parts.dims + c], call.parts.activation);
  }

  // The sum of the dg of some tiles of tokens.
  template <class B>
  EPT_DEVICE static void add_gates(const B& block, const Call& call, float* d_gates, float* d_x,
                                   float* rest, Tokens at, int tiles) {
    const Parts& parts = call.parts;
    for (int tile = 0; tile < tiles; ++tile, at.first += tokens) {
      multiply(block, rest, call, at, parts.r, [&](int token, int c, float value) {
        if constexpr (!plain) {
          if (c >= parts.dims) {
            d_x[c * tokens + token] = value;  // 0 for a token that is not there
            return;
          }
        }
        d_x[c * tokens + token] = at.has(token) ? value * activated(call, at.row(token), c) : 0.0f;
      });
      block.each([&](int thread) {
        for (int k = thread; k < parts.spaces; k += threads) {
          const float* columns = d_x + k * parts.dim * tokens;
          float sum = sum_of_terms(parts.dim * tokens, [&](int i) { return columns[i]; });
          if constexpr (!plain) sum += sum_of_parts(d_x + (parts.dims + k) * tokens, tokens, 1);
          d_gates[k] = (tile > 0 ? d_gates[k] : 0.0f) + sum;
        }
      });
    }
  }

  // dX = [dHin | dz / τ] of eight tokens, from Y·Uᵀ.
  template <class B>
  EPT_DEVICE static void project(const B& block, const Call& call, const float* d_gates, float* d_x,
                                 const Tokens& at, bool saves) {
    const Parts& parts = call.parts;
    const bool has_gate = plain || gates_of<plain>(parts) > 0;
    const float* gates = has_gate ? call.tensors.gates + at.row(0) * parts.spaces : nullptr;
    block.each([&](int thread) {
      const int token = thread % tokens;
      for (int k = thread / tokens; k < gates_of<plain>(parts); k += threads / tokens) {
        float sum = 0.0f;
        if (parts.gate == Gate::prompt) {
          sum = d_gates[k] / static_cast<float>(parts.m);
        } else if (at.has(token)) {
          if constexpr (!plain) sum = d_x[(parts.dims + k) * tokens + token];
          for (int c = k * parts.dim; c < (k + 1) * parts.dim; ++c) {
            sum += d_x[c * tokens + token] * activated(call, at.row(token), c);
          }
        }
        d_x[(parts.dims + k) * tokens + token] = sum;
      }
    });
    block.each([&](int thread) {
      if (!has_gate || thread >= tokens || !at.has(thread)) return;
      const float* own_gates = gates + thread * parts.spaces;
      float* d_logits = d_x + parts.dims * tokens + thread;
      float inner = 0.0f;
      for (int k = 0; k < parts.spaces; ++k) inner += own_gates[k] * d_logits[k * tokens];
      for (int k = 0; k < parts.spaces; ++k) {
        float& value = d_logits[k * tokens];
        value = own_gates[k] * (value - inner) / parts.temperature;
      }
    });
    block.each([&](int thread) {
      const int token = thread % tokens;
      if (!at.has(token)) return;
      const int64_t row = at.row(token);
      for (int c = thread / tokens; c < parts.columns; c += threads / tokens) {
        float& value = d_x[c * tokens + token];
        if (c < parts.dims) {
          const float hidden = call.tensors.hidden[row * parts.dims + c];
          if (has_gate) {
            value *= gates[token * parts.spaces + c / parts.dim] *
                     derivative_of(hidden, parts.activation);
          } else {
            value *= derivative_of(hidden, parts.activation);
          }
        }
        if (saves) call.d_x[row * parts.columns + c] = value;
      }
    });
  }

  // dO, and the part of dQ that comes from a piece of n. A warp has a token, a thread every 32nd
  // column of its dQ.
  template <class B>
  EPT_DEVICE static void attend(const B& block, float* memory, const Call& call, const float* d_x,
                                const Tokens& at, int piece) {
    const Parts& parts = call.parts;
    const int r = parts.r;
    const ScoreTile tile(memory, r);
    typename B::template Local<State> local;
    // dO = dC + dX·Sᵀ
    block.each([&](int thread) {
      const int token = thread % tokens;
      if (!at.has(token)) return;
      for (int column = thread / tokens; column < r; column += threads / tokens) {
        const float* cross = call.tensors.cross + (int64_t{at.task} * r + column) * parts.columns;
        float& value = tile.d_attended[token * r + column];
        value += sum_of_terms(parts.columns,
                              [&](int c) { return d_x[c * tokens + token] * cross[c]; });
        if (piece == 0) call.d_attended[at.row(token) * r + column] = value;
      }
    });
    // Q; and dO·O, the sum over n of weight times gradient of weight.
    block.each([&](int thread) {
      for (int i = thread; i < tokens * r; i += threads) {
        tile.query[i] = at.has(i / r) ? call.tensors.query[at.row(0) * r + i] : 0.0f;
      }
      if (thread >= tokens || !at.has(thread)) return;
      const float* attended = call.tensors.attended + at.row(thread) * r;
      const float* d_attended = tile.d_attended + thread * r;
      const float inner = sum_of_terms(r, [&](int i) { return d_attended[i] * attended[i]; });
      tile.inner[thread] = inner;
      if (piece == 0) call.inner[at.row(thread)] = inner;
    });
    const int end = least((piece + 1) * call.chunk, parts.n);
    for (int first = piece * call.chunk; first < end; first += ScoreTile::positions) {
      load_rows(block, parts, tile.rows, ScoreTile::positions, at.task, first, end);
      tile.score(block, call, at, end - first);
      block.each([&](int thread) {
        const float* d_scores = tile.d_scores + thread / lanes * ScoreTile::positions;
        each_column<lanes>(thread, r, [&](int i, int column) {
          local[thread].d_query[i] += sum_of_terms(ScoreTile::positions, [&](int s) {
            return d_scores[s] * tile.rows[s * (r | 1) + column];
          });
        });
      });
    }
    block.apart([&](int thread) {
      if (!at.has(thread / lanes)) return;
      const int64_t part = int64_t{at.task} * call.pieces + piece;
      float* d_query = call.d_query + (part * at.m + at.first + thread / lanes) * r;
      each_column<lanes>(thread, r, [&](int i, int column) {
        d_query[column] = local[thread].d_query[i];
      });
    });
  }
};

template <bool plain>
struct BackwardExpandKernel : ReconstructBlock {
  static constexpr const char* name = "reconstruct_backward_expand";
  using Tile = ExpandTile;
  static constexpr int columns = 32;                                // of a tile of a sum
  static constexpr int own = columns / (threads / Tile::channels);  // of a thread
  static constexpr int depth = Tile::lines;                         // of a factor at a time
  static constexpr int lanes_a = threads / ScoreTile::positions;    // threads of a row of dA
  static constexpr int own_a = max_rank / lanes_a;
  using Call = ReconstructBackwardCall;

  // What the rows of a matrix are multiplied by, [m, columns].
  enum class Factor { attended, d_query, d_x, gated };

  struct Sums {
    Line lines[depth];
    float factor[depth * tokens];
    float left[tokens][columns];
    float right[tokens][Tile::channels];
  };

  static int64_t shared_floats(const Call& call) {
    const int sums = static_cast<int>(sizeof(Sums) / sizeof(float));
    return greatest(sums, call.tiles_a > 0 ? ScoreTile::floats(call.parts.r) : 0);
  }

  struct State : Tile::State {
    float sum[own] = {};
  };
  struct RowState {
    float sum[own_a] = {};
  };

  template <class B>
  EPT_DEVICE static void run(const B& block, float* memory, const Call& call) {
    Digits digits{block.index};
    const int number = digits.next(call.tiles() + call.tiles_a + call.tiles_bias);
    const int task = static_cast<int>(digits.rest);
    const int rest = number - call.tiles();
    if (rest >= call.tiles_a) return make_bias(block, call, task, rest - call.tiles_a);
    if (rest >= 0) return make_a(block, memory, call, task, rest * ScoreTile::positions);
    int tile = number / call.tiles_d, result = 0;
    while (tile >= call.tiles_of[result]) tile -= call.tiles_of[result++];
    expand(block, *reinterpret_cast<Sums*>(memory), call, task, static_cast<Result>(result), tile,
           number % call.tiles_d * Tile::channels);
  }

  EPT_DEVICE static float element(const Call& call, Factor factor, const Tokens& at, int token,
                                  int c) {
    if (!at.has(token)) return 0.0f;
    const Parts& parts = call.parts;
    const int64_t row = at.row(token), size = int64_t{parts.m} * parts.r;
    if (factor == Factor::attended) return call.tensors.attended[row * parts.r + c];
    if (factor == Factor::d_x) return call.d_x[row * parts.columns + c];
    if (factor == Factor::gated) {
      if constexpr (!plain) {
        const bool has_gate = gates_of<plain>(parts) > 0;
        if (c >= parts.dims) {
          return has_gate ? call.tensors.gates[row * parts.spaces + c - parts.dims] : 1.0f;
        }
        if (!has_gate) return BackwardCoreKernel<plain>::activated(call, row, c);
      }
      return call.tensors.gates[row * parts.spaces + c / parts.dim] *
             BackwardCoreKernel<plain>::activated(call, row, c);
    }
    const int64_t first = at.task * call.pieces * size + int64_t{at.first + token} * parts.r + c;
    return sum_of_parts(call.d_query + first, call.pieces, size);
  }

  // 64 channels of 32 rows of dB, d[D | G]ᵀ or dU, or of eight tokens of dP.
  template <class B>
  EPT_DEVICE static void expand(const B& block, Sums& shared, const Call& call, int task,
                                Result result, int tile, int first_d) {
    const Parts& parts = call.parts;
    const int first_c = tile * columns;
    const bool of_prompt = result == Result::prompt;
    Tokens at{task, of_prompt ? tile * tokens : 0, parts.m};
    const int tiles = of_prompt ? 1 : call.tiles_m;
    typename B::template Local<State> local;
    const auto start = [&](const View& matrix) {
      Tile::start(block, local, matrix, at, first_d, parts.d);
    };
    // acc += factor·M, where M is [D | G]ᵀ for dX and B for others
    const auto multiply = [&](Factor factor, int count) {
      for (int first = 0; first < count; first += depth) {
        const int number = least(depth, count - first);
        block.apart([&](int thread) {
          const int token = thread % tokens;
          for (int c = thread / tokens; c < number; c += threads / tokens) {
            shared.factor[c * tokens + token] = element(call, factor, at, token, first + c);
          }
        });
        Tile::add_lines(block, shared.lines, local, shared.factor, number, first_d, parts.d,
                        [&](int i) {
                          return factor == Factor::d_x ? line_of_down(parts, task, first + i)
                                                       : line_of(parts.b, task, first + i, parts.r);
                        });
      }
    };
    // sum += factorᵀ·acc
    const auto add = [&](Factor factor, int count) {
      static_assert(tokens * columns == threads);
      block.each([&](int thread) {
        const int token = thread / columns, c = first_c + thread % columns;
        shared.left[token][thread % columns] =
            c < count ? element(call, factor, at, token, c) : 0.0f;
        EPT_UNROLL
        for (int i = 0; i < Tile::own; ++i) {
          shared.right[Tile::token(thread, i)][Tile::channel(thread)] = local[thread].acc[i];
        }
      });
      block.each([&](int thread) {
        float sum[own] = {};  // of these tokens
        EPT_UNROLL
        for (int token = 0; token < tokens; ++token) {
          const float right = shared.right[token][Tile::channel(thread)];
          EPT_UNROLL
          for (int i = 0; i < own; ++i) {
            sum[i] += shared.left[token][thread / Tile::channels * own + i] * right;
          }
        }
        EPT_UNROLL
        for (int i = 0; i < own; ++i) local[thread].sum[i] += sum[i];
      });
    };
    for (int i = 0; i < tiles; ++i, at.first += tokens) {
      if (result == Result::up) {
        start(call.tensors.grad);
        add(Factor::gated, rows_of_up(parts));
      } else if (result == Result::down) {
        start(parts.p);
        multiply(Factor::attended, parts.r);
        add(Factor::d_x, parts.columns);
      } else {
        start(call.tensors.grad);
        multiply(Factor::d_x, parts.columns);
        if (of_prompt) {
          multiply(Factor::d_query, parts.r);
          return Tile::store(block, local, call.tensors.d_short_prompt, parts.p.type, at, first_d,
                             parts.d);
        }
        add(Factor::attended, parts.r);
        start(parts.p);
        add(Factor::d_query, parts.r);
      }
    }
    block.apart([&](int thread) {
      const int d = first_d + Tile::channel(thread);
      EPT_UNROLL
      for (int i = 0; i < own; ++i) {
        const int c = first_c + thread / Tile::channels * own + i;
        if (d < parts.d) put(call, task, result, c, d, local[thread].sum[i]);
      }
    });
  }

  // Rows of dU and of the gradient of its bias.
  EPT_BOTH static int rows_of_up(const Parts& parts) {
    if constexpr (plain) return parts.dims;
    return parts.dims + (parts.up_bias.data == nullptr ? 0 : parts.spaces);
  }

  // Columns that are summed over the tokens: of dz and, with biases, of dHin before it.
  EPT_BOTH static int summed(const Parts& parts) {
    if constexpr (plain) return parts.spaces;
    return parts.columns;
  }

  // An element of dB, d[D | G]ᵀ or dU, unless it is past the last row.
  EPT_DEVICE static void put(const Call& call, int task, Result result, int row, int d,
                             float value) {
    const Parts& parts = call.parts;
    const ReconstructBackward& to = call.tensors;
    const int k = row - parts.dims;
    if (result == Result::b) {
      if (row >= parts.r) return;
      store(to.d_offset_b, parts.b.type, (int64_t{task} * parts.r + row) * parts.d + d, value);
    } else if (result == Result::up) {
      if constexpr (!plain) {
        if (k >= 0 && row < rows_of_up(parts)) {
          store(to.d_space_up_bias, parts.up_bias.type,
                (int64_t{task} * parts.spaces + k) * parts.d + d, value);
        }
      }
      if (k >= 0) return;
      store(to.d_space_up, parts.up.type, (int64_t{task} * parts.dims + row) * parts.d + d, value);
    } else if (k < 0) {
      const int64_t line = (int64_t{task} * parts.spaces + row / parts.dim) * parts.d + d;
      store(to.d_space_down, parts.down.type, line * parts.dim + row % parts.dim, value);
    } else if (k < gates_of<plain>(parts)) {
      const int64_t line = int64_t{task} * parts.d + d;
      store(to.d_gate_weight, parts.gate_weight.type, line * parts.spaces + k, value);
    }
  }

  // dA of sixteen positions: c·(Wᵀ·dO + dSᵀ·Q)
  template <class B>
  EPT_DEVICE static void make_a(const B& block, float* memory, const Call& call, int task,
                                int first) {
    const Parts& parts = call.parts;
    const int r = parts.r, number = least(ScoreTile::positions, parts.n - first);
    const ScoreTile tile(memory, r);
    typename B::template Local<RowState> local;
    load_rows(block, parts, tile.rows, ScoreTile::positions, task, first, parts.n);
    for (Tokens at{task, 0, parts.m}; at.has(0); at.first += tokens) {
      block.each([&](int thread) {
        for (int i = thread; i < tokens * r; i += threads) {
          const int64_t from = at.row(0) * r + i;
          tile.query[i] = at.has(i / r) ? call.tensors.query[from] : 0.0f;
          tile.d_attended[i] = at.has(i / r) ? call.d_attended[from] : 0.0f;
        }
        if (thread < tokens && at.has(thread)) tile.inner[thread] = call.inner[at.row(thread)];
      });
      tile.score(block, call, at, number);
      block.each([&](int thread) {
        const int s = thread / lanes_a;
        each_column<lanes_a>(thread, r, [&](int i, int column) {
          float sum = 0.0f;
          EPT_UNROLL
          for (int token = 0; token < tokens; ++token) {
            const int pair = token * ScoreTile::positions + s;
            sum += tile.weights[pair] * tile.d_attended[token * r + column];
            sum += tile.d_scores[pair] * tile.query[token * r + column];
          }
          local[thread].sum[i] += sum;
        });
      });
    }
    block.apart([&](int thread) {
      const int s = thread / lanes_a;
      if (s >= number) return;
      const int64_t row = int64_t{task} * parts.n + first + s;
      each_column<lanes_a>(thread, r, [&](int i, int column) {
        store(call.tensors.d_offset_a, parts.a.type, row * r + column,
              local[thread].sum[i] * parts.scaling);
      });
    });
  }

  template <class B>
  EPT_DEVICE static void make_bias(const B& block, const Call& call, int task, int tile) {
    const Parts& parts = call.parts;
    block.apart([&](int thread) {
      int k = tile * threads + thread;
      if (k >= summed(parts)) return;
      if constexpr (!plain) k -= parts.dims;
      const float* first = call.d_x + int64_t{task} * parts.m * parts.columns + parts.dims + k;
      const float sum = sum_of_parts(first, parts.m, parts.columns);
      if constexpr (!plain) {
        if (k < 0) {
          void* to = call.tensors.d_space_down_bias;
          const int64_t at = int64_t{task} * parts.dims + parts.dims + k;
          if (to != nullptr) store(to, parts.down_bias.type, at, sum);
          return;
        }
      }
      store(call.tensors.d_gate_bias, parts.gate_bias.type, int64_t{task} * parts.spaces + k, sum);
    });
  }
};

}  // namespace ept
