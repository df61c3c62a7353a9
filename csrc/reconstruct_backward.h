// Operation 1, backward, in two launches.
//
// The first has blocks for eight tokens and a piece of n. Each makes dC = Y·[B ; U]ᵀ of its tokens,
// from it dX and dO, and its part of dQ. The second expands over d, and makes dA: a block for sixteen
// positions goes through all tokens, so that no parts of dA are stored. The weights of the softmax
// are made again in both, from Q and the statistics of its rows.
//
// With F = P + O·B and dF = Y + dX·[D | G]ᵀ:
//     dP = dF + dQ·B    dB = Oᵀ·dF + dQᵀ·P    d[D | G] = Fᵀ·dX    dU = (g·Φ)ᵀ·Y    db = Σ dz
#pragma once

#include "reconstruct_parts.h"

namespace ept {

struct ReconstructBackwardCall {
  Parts parts;
  View grad;  // Y
  // What the forward saved, as in kernels.h.
  const float *query, *stats, *attended, *hidden, *gates, *cross;
  // From the first launch to the second.
  float* d_x;         // [dHin | dz], [T, m, W]
  float* d_attended;  // dO [T, m, r]
  float* inner;       // rows of dO·O, [T, m]
  float* d_query;     // dQ in parts, [T, pieces, m, r]
  void *d_p, *d_a, *d_b, *d_down, *d_up, *d_gate_weight, *d_gate_bias;
  int tiles_m;
  int pieces, chunk;  // of n
  // The second grid of a task: tiles of dB, d[D | G], dU and dP for every tile of d, then of dA, then
  // of db.
  int tiles_d, tiles_b, tiles_down, tiles_up, tiles_a, tiles_bias;

  EPT_BOTH int tiles() const { return tiles_b + tiles_down + tiles_up + tiles_m; }
};

// The softmax of eight tokens and sixteen positions, made again.
struct ScoreTile {
  static constexpr int threads = reconstruct_threads;
  static constexpr int tokens = reconstruct_tokens;
  static constexpr int positions = 16;
  static constexpr int pairs = tokens * positions;

  int r;
  float* query;       // [tokens, r]
  float* d_attended;  // [tokens, r]
  float* inner;       // [tokens]
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

  template <class B>
  EPT_DEVICE void load_rows(const B& block, const Parts& parts, int task, int first,
                            int end) const {
    block.each([&](int thread) {
      EPT_UNROLL_BY(4)
      for (int at = thread; at < positions * r; at += threads) {
        const int s = at / r, column = at % r;
        rows[s * (r | 1) + column] = row_element(parts, task, first + s, end, column);
      }
    });
  }

  // Half of the threads multiply rows by Q, the others by dO.
  template <class B>
  EPT_DEVICE void score(const B& block, const ReconstructBackwardCall& call, int task, int first_m,
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
      if (first_m + token < parts.m && thread % positions < number) {
        const float* stats = call.stats + int64_t{task} * 2 * parts.m + first_m + token;
        weight = expf((weights[thread] - stats[0]) * parts.score_scale) / stats[parts.m];
        d_score = weight * (d_scores[thread] - inner[token]) * parts.score_scale;
      }
      weights[thread] = weight;
      d_scores[thread] = d_score;
    });
  }
};

struct BackwardCoreKernel {
  static constexpr const char* name = "reconstruct_backward_core";
  static constexpr int threads = reconstruct_threads;
  static constexpr int tokens = reconstruct_tokens;
  static constexpr int lanes = 32;              // threads of a token
  static constexpr int own = max_rank / lanes;  // columns of dQ that a thread may have
  using Call = ReconstructBackwardCall;

  // Shared memory: dO and what follows it in a tile of scores. Until that is needed, in place of
  // its later parts: sums of dg [K], dHin [K·h, 8], and dz [K, 8] or before it the long product.
  EPT_BOTH static int kept_floats(int r) { return r > 0 ? tokens * r + tokens : 0; }

  static int64_t shared_floats(const Call& call) {
    const Parts& parts = call.parts;
    const int product = LongProduct::floats(greatest(parts.r, parts.dims), 0);
    const int projected = kept_floats(parts.r) + parts.spaces + tokens * parts.dims +
                          greatest(tokens * parts.spaces, product);
    return greatest(projected, ScoreTile::floats(parts.r));
  }

  struct State {
    float d_query[own];
  };

  struct Memory {
    float *d_attended, *d_gates, *d_x, *rest;
  };

  template <class B>
  EPT_DEVICE static void run(const B& block, float* memory, const Call& call) {
    Digits digits{block.index};
    const Parts& parts = call.parts;
    const int first_m = digits.next(call.tiles_m) * tokens;
    const int piece = digits.next(call.pieces);
    const int task = static_cast<int>(digits.rest);
    Memory shared;
    shared.d_attended = memory;
    shared.d_x = memory + kept_floats(parts.r);
    shared.rest = shared.d_x + tokens * parts.dims;
    shared.d_gates = shared.rest + greatest(tokens * parts.spaces, LongProduct::floats(
        greatest(parts.r, parts.dims), 0));
    if (parts.spaces > 0 && parts.gate == Gate::prompt) add_gates(block, shared, call, task);
    multiply_up(block, shared, call, task, first_m, [](int, int, float value) { return value; });
    if (parts.r > 0) {
      for (int first = 0; first < parts.r; first += LongProduct::columns) {
        LongProduct::run(
            block, shared.rest, least(LongProduct::columns, parts.r - first), nullptr, 0, parts.d,
            [&](int i) {
              return i < tokens ? line_of(call.grad, task, first_m + i, parts.m)
                                : line_of(parts.b, task, first + i - tokens, parts.r);
            },
            [&](int i, int j, float value) {
              shared.d_attended[i * parts.r + first + j] = value;
            });
      }
    }
    if (parts.spaces > 0) project(block, shared, call, task, first_m, piece == 0);
    if (parts.r > 0) attend(block, shared, call, task, piece, first_m);
  }

  // Hin of a token.
  EPT_DEVICE static float hidden_of(const Call& call, int task, int row, int c) {
    return call.hidden[(int64_t{task} * call.parts.m + row) * call.parts.dims + c];
  }

  // Y·Uᵀ of eight tokens as `change(row, c, value)` has it, into the place of dHin.
  template <class B, class Change>
  EPT_DEVICE static void multiply_up(const B& block, const Memory& shared, const Call& call,
                                     int task, int first_m, Change change) {
    const Parts& parts = call.parts;
    for (int first = 0; first < parts.dims; first += LongProduct::columns) {
      LongProduct::run(
          block, shared.rest, least(LongProduct::columns, parts.dims - first), nullptr, 0, parts.d,
          [&](int i) {
            return i < tokens ? line_of(call.grad, task, first_m + i, parts.m)
                              : line_of_up(parts, task, first + i - tokens);
          },
          [&](int i, int j, float value) {
            const int row = first_m + i, c = first + j;
            shared.d_x[c * tokens + i] = row < parts.m ? change(row, c, value) : 0.0f;
          });
    }
  }

  // With one gate for all tokens: the mean of their dg.
  template <class B>
  EPT_DEVICE static void add_gates(const B& block, const Memory& shared, const Call& call,
                                   int task) {
    const Parts& parts = call.parts;
    for (int first_m = 0; first_m < parts.m; first_m += tokens) {
      multiply_up(block, shared, call, task, first_m, [&](int row, int c, float value) {
        return value * activate(hidden_of(call, task, row, c), parts.activation);
      });
      block.each([&](int thread) {
        for (int k = thread; k < parts.spaces; k += threads) {
          const float* columns = shared.d_x + k * parts.dim * tokens;
          const float sum = sum_of_terms(parts.dim * tokens, [&](int i) { return columns[i]; });
          shared.d_gates[k] = (first_m > 0 ? shared.d_gates[k] : 0.0f) + sum;
        }
      });
    }
  }

  // dX = [dHin | dz / τ] of eight tokens, from Y·Uᵀ.
  template <class B>
  EPT_DEVICE static void project(const B& block, const Memory& shared, const Call& call, int task,
                                 int first_m, bool saves) {
    const Parts& parts = call.parts;
    float* d_x = shared.d_x;
    block.each([&](int thread) {
      const int token = thread % tokens, row = first_m + token;
      for (int k = thread / tokens; k < parts.spaces; k += threads / tokens) {
        float sum = 0.0f;
        if (parts.gate == Gate::prompt) {
          sum = shared.d_gates[k] / static_cast<float>(parts.m);
        } else if (row < parts.m) {
          for (int c = k * parts.dim; c < (k + 1) * parts.dim; ++c) {
            sum += d_x[c * tokens + token] *
                   activate(hidden_of(call, task, row, c), parts.activation);
          }
        }
        d_x[(parts.dims + k) * tokens + token] = sum;
      }
    });
    block.each([&](int thread) {
      if (thread >= tokens || first_m + thread >= parts.m) return;
      const int64_t row = int64_t{task} * parts.m + first_m + thread;
      const float* gates = call.gates + row * parts.spaces;
      float* d_gates = d_x + parts.dims * tokens + thread;
      float inner = 0.0f;
      for (int k = 0; k < parts.spaces; ++k) inner += gates[k] * d_gates[k * tokens];
      for (int k = 0; k < parts.spaces; ++k) {
        d_gates[k * tokens] = gates[k] * (d_gates[k * tokens] - inner) / parts.temperature;
      }
    });
    block.each([&](int thread) {
      const int token = thread % tokens, row = first_m + token;
      const int64_t at = int64_t{task} * parts.m + row;
      for (int c = thread / tokens; c < parts.columns; c += threads / tokens) {
        float& value = d_x[c * tokens + token];
        if (row >= parts.m) {
          value = 0.0f;
          continue;
        }
        if (c < parts.dims) {
          const float gate = call.gates[at * parts.spaces + c / parts.dim];
          value *= gate * derivative_of(hidden_of(call, task, row, c), parts.activation);
        }
        if (saves) call.d_x[at * parts.columns + c] = value;
      }
    });
  }

  // dO, and the part of dQ that comes from a piece of n. A warp has a token, a thread every 32nd
  // column of its dQ.
  template <class B>
  EPT_DEVICE static void attend(const B& block, const Memory& shared, const Call& call, int task,
                                int piece, int first_m) {
    const Parts& parts = call.parts;
    const int r = parts.r;
    const ScoreTile tile(shared.d_attended, r);
    typename B::template Local<State> local;
    // dO = dC + dX·Sᵀ
    block.each([&](int thread) {
      const int token = thread % tokens, row = first_m + token;
      for (int column = thread / tokens; column < r; column += threads / tokens) {
        const float* cross = call.cross + (int64_t{task} * r + column) * parts.columns;
        float& value = tile.d_attended[token * r + column];
        value += sum_of_terms(parts.columns,
                              [&](int c) { return shared.d_x[c * tokens + token] * cross[c]; });
        if (piece > 0 || row >= parts.m) continue;
        call.d_attended[(int64_t{task} * parts.m + row) * r + column] = value;
      }
      EPT_UNROLL
      for (int i = 0; i < own; ++i) local[thread].d_query[i] = 0.0f;
    });
    // Q; and dO·O, the sum over n of weight times gradient of weight.
    block.each([&](int thread) {
      for (int at = thread; at < tokens * r; at += threads) {
        const int row = first_m + at / r;
        tile.query[at] =
            row < parts.m ? call.query[(int64_t{task} * parts.m + row) * r + at % r] : 0.0f;
      }
      if (thread >= tokens || first_m + thread >= parts.m) return;
      const int64_t row = int64_t{task} * parts.m + first_m + thread;
      const float *attended = call.attended + row * r, *d_attended = tile.d_attended + thread * r;
      const float inner = sum_of_terms(r, [&](int i) { return d_attended[i] * attended[i]; });
      tile.inner[thread] = inner;
      if (piece == 0) call.inner[row] = inner;
    });
    const int end = least((piece + 1) * call.chunk, parts.n);
    for (int first = piece * call.chunk; first < end; first += ScoreTile::positions) {
      tile.load_rows(block, parts, task, first, end);
      tile.score(block, call, task, first_m, end - first);
      block.each([&](int thread) {
        const float* d_scores = tile.d_scores + thread / lanes * ScoreTile::positions;
        EPT_UNROLL
        for (int i = 0; i < own; ++i) {
          const int column = thread % lanes + i * lanes;
          if (i * lanes >= r) break;
          if (column >= r) continue;
          float sum = 0.0f;
          EPT_UNROLL
          for (int s = 0; s < ScoreTile::positions; ++s) {
            sum += d_scores[s] * tile.rows[s * (r | 1) + column];
          }
          local[thread].d_query[i] += sum;
        }
      });
    }
    block.apart([&](int thread) {
      const int row = first_m + thread / lanes;
      if (row >= parts.m) return;
      const int64_t at = ((int64_t{task} * call.pieces + piece) * parts.m + row) * r;
      EPT_UNROLL
      for (int i = 0; i < own; ++i) {
        const int column = thread % lanes + i * lanes;
        if (column < r) call.d_query[at + column] = local[thread].d_query[i];
      }
    });
  }
};

struct BackwardExpandKernel {
  static constexpr const char* name = "reconstruct_backward_expand";
  using Tile = ExpandTile;
  static constexpr int threads = reconstruct_threads;
  static constexpr int tokens = reconstruct_tokens;
  static constexpr int columns = 32;                                // of a tile of a sum
  static constexpr int own = columns / (threads / Tile::channels);  // of a thread
  static constexpr int depth = 64;                                  // of a factor at a time
  static constexpr int lanes_a = threads / ScoreTile::positions;    // threads of a row of dA
  static constexpr int own_a = max_rank / lanes_a;
  using Call = ReconstructBackwardCall;

  struct Sums {
    float factor[depth * tokens];
    float left[tokens][columns];
    float right[tokens][Tile::channels];
  };

  static int64_t shared_floats(const Call& call) {
    const int tile = static_cast<int>(sizeof(Sums) / sizeof(float));
    return greatest(tile, call.tiles_a > 0 ? ScoreTile::floats(call.parts.r) : 0);
  }

  struct State {
    float acc[Tile::own];
    float sum[own];
  };
  struct RowState {
    float sum[own_a];
  };

  template <class B>
  using Local = typename B::template Local<State>;

  template <class B>
  EPT_DEVICE static void run(const B& block, float* memory, const Call& call) {
    Digits digits{block.index};
    const int over_d = call.tiles() * call.tiles_d;
    const int number = digits.next(over_d + call.tiles_a + call.tiles_bias);
    const int task = static_cast<int>(digits.rest);
    if (number >= over_d + call.tiles_a) {
      add_bias(block, call, task, number - over_d - call.tiles_a);
    } else if (number >= over_d) {
      make_a(block, memory, call, task, (number - over_d) * ScoreTile::positions);
    } else {
      const int first_d = number % call.tiles_d * Tile::channels;
      expand(block, *reinterpret_cast<Sums*>(memory), call, task, number / call.tiles_d, first_d);
    }
  }

  template <class B>
  EPT_DEVICE static void expand(const B& block, Sums& shared, const Call& call, int task,
                                int tile, int first_d) {
    Local<B> local;
    block.apart([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < own; ++i) local[thread].sum[i] = 0.0f;
    });
    if (tile < call.tiles_b) {
      make_b(block, shared, local, call, task, tile * columns, first_d);
      return;
    }
    tile -= call.tiles_b;
    if (tile < call.tiles_down) {
      make_down(block, shared, local, call, task, tile * columns, first_d);
      return;
    }
    tile -= call.tiles_down;
    if (tile < call.tiles_up) {
      make_up(block, shared, local, call, task, tile * columns, first_d);
    } else {
      make_prompt(block, shared, local, call, task, (tile - call.tiles_up) * tokens, first_d);
    }
  }

  // Elements of the factors, by token and column.
  EPT_DEVICE static float attended_of(const Call& call, int task, int token, int column) {
    return call.attended[(int64_t{task} * call.parts.m + token) * call.parts.r + column];
  }
  EPT_DEVICE static float d_query_of(const Call& call, int task, int token, int column) {
    const int64_t size = int64_t{call.parts.m} * call.parts.r;
    return sum_of_parts(call.d_query + task * call.pieces * size + token * call.parts.r + column,
                        call.pieces, size);
  }
  EPT_DEVICE static float d_x_of(const Call& call, int task, int token, int column) {
    return call.d_x[(int64_t{task} * call.parts.m + token) * call.parts.columns + column];
  }
  EPT_DEVICE static float gated_of(const Call& call, int task, int token, int column) {
    const Parts& parts = call.parts;
    const int64_t at = int64_t{task} * parts.m + token;
    return call.gates[at * parts.spaces + column / parts.dim] *
           activate(call.hidden[at * parts.dims + column], parts.activation);
  }

  // acc of eight tokens: the matrix's rows
  template <class B>
  EPT_DEVICE static void start(const B& block, Local<B>& local, const Call& call,
                               const View& matrix, int task, int first_m, int first_d) {
    block.apart([&](int thread) {
      const int d = first_d + Tile::channel(thread);
      EPT_UNROLL
      for (int i = 0; i < Tile::own; ++i) {
        const Line line = line_of(matrix, task, first_m + Tile::token(thread, i), call.parts.m);
        local[thread].acc[i] = d < call.parts.d ? line.at(d) : 0.0f;
      }
    });
  }

  // acc += factor·lines
  template <class B, class Element, class LineOf>
  EPT_DEVICE static void multiply(const B& block, Sums& shared, Local<B>& local,
                                  const Call& call, int count, int first_m, int first_d,
                                  Element element, LineOf line) {
    for (int first = 0; first < count; first += depth) {
      const int number = least(depth, count - first);
      block.each([&](int thread) {
        const int token = thread % tokens;
        for (int c = thread / tokens; c < number; c += threads / tokens) {
          const bool inside = first_m + token < call.parts.m;
          shared.factor[c * tokens + token] = inside ? element(first_m + token, first + c) : 0.0f;
        }
      });
      block.each([&](int thread) {
        const int d = first_d + Tile::channel(thread);
        if (d >= call.parts.d) return;
        Tile::add_product(local[thread].acc, shared.factor, number, thread,
                          [&](int c) { return line(first + c).at(d); });
      });
    }
  }

  // acc: dF = Y + dX·[D | G]ᵀ
  template <class B>
  EPT_DEVICE static void make_d_fused(const B& block, Sums& shared, Local<B>& local,
                                      const Call& call, int task, int first_m, int first_d) {
    const Parts& parts = call.parts;
    start(block, local, call, call.grad, task, first_m, first_d);
    multiply(
        block, shared, local, call, parts.columns, first_m, first_d,
        [&](int token, int c) { return d_x_of(call, task, token, c); },
        [&](int c) { return line_of_down(parts, task, c); });
  }

  // sum += leftᵀ·acc for eight tokens
  template <class B, class Element>
  EPT_DEVICE static void add_to_sum(const B& block, Sums& shared, Local<B>& local,
                                    const Call& call, int count, int first_m, int first_c,
                                    Element element) {
    static_assert(tokens * columns == threads);
    block.each([&](int thread) {
      const int token = thread / columns, c = first_c + thread % columns;
      const bool inside = first_m + token < call.parts.m && c < count;
      shared.left[token][thread % columns] = inside ? element(first_m + token, c) : 0.0f;
      EPT_UNROLL
      for (int i = 0; i < Tile::own; ++i) {
        shared.right[Tile::token(thread, i)][Tile::channel(thread)] = local[thread].acc[i];
      }
    });
    block.each([&](int thread) {
      EPT_UNROLL
      for (int token = 0; token < tokens; ++token) {
        const float right = shared.right[token][Tile::channel(thread)];
        EPT_UNROLL
        for (int i = 0; i < own; ++i) {
          local[thread].sum[i] += shared.left[token][thread / Tile::channels * own + i] * right;
        }
      }
    });
  }

  template <class B>
  EPT_DEVICE static void make_prompt(const B& block, Sums& shared, Local<B>& local,
                                     const Call& call, int task, int first_m, int first_d) {
    const Parts& parts = call.parts;
    make_d_fused(block, shared, local, call, task, first_m, first_d);
    multiply(
        block, shared, local, call, parts.r, first_m, first_d,
        [&](int token, int c) { return d_query_of(call, task, token, c); },
        [&](int c) { return line_of(parts.b, task, c, parts.r); });
    block.apart([&](int thread) {
      const int d = first_d + Tile::channel(thread);
      EPT_UNROLL
      for (int i = 0; i < Tile::own; ++i) {
        const int token = first_m + Tile::token(thread, i);
        if (token >= parts.m || d >= parts.d) continue;
        store(call.d_p, parts.p.type, (int64_t{task} * parts.m + token) * parts.d + d,
              local[thread].acc[i]);
      }
    });
  }

  template <class B>
  EPT_DEVICE static void make_b(const B& block, Sums& shared, Local<B>& local, const Call& call,
                                int task, int first_c, int first_d) {
    const Parts& parts = call.parts;
    for (int first_m = 0; first_m < parts.m; first_m += tokens) {
      make_d_fused(block, shared, local, call, task, first_m, first_d);
      add_to_sum(block, shared, local, call, parts.r, first_m, first_c,
                 [&](int token, int c) { return attended_of(call, task, token, c); });
      start(block, local, call, parts.p, task, first_m, first_d);
      add_to_sum(block, shared, local, call, parts.r, first_m, first_c,
                 [&](int token, int c) { return d_query_of(call, task, token, c); });
    }
    store_sum(block, local, call, parts.r, first_c, first_d, [&](int c, int d, float value) {
      store(call.d_b, parts.b.type, (int64_t{task} * parts.r + c) * parts.d + d, value);
    });
  }

  template <class B>
  EPT_DEVICE static void make_down(const B& block, Sums& shared, Local<B>& local,
                                   const Call& call, int task, int first_c, int first_d) {
    const Parts& parts = call.parts;
    for (int first_m = 0; first_m < parts.m; first_m += tokens) {
      start(block, local, call, parts.p, task, first_m, first_d);
      multiply(
          block, shared, local, call, parts.r, first_m, first_d,
          [&](int token, int c) { return attended_of(call, task, token, c); },
          [&](int c) { return line_of(parts.b, task, c, parts.r); });
      add_to_sum(block, shared, local, call, parts.columns, first_m, first_c,
                 [&](int token, int c) { return d_x_of(call, task, token, c); });
    }
    store_sum(block, local, call, parts.columns, first_c, first_d, [&](int c, int d, float value) {
      if (c < parts.dims) {
        const int64_t row = (int64_t{task} * parts.spaces + c / parts.dim) * parts.d + d;
        store(call.d_down, parts.down.type, row * parts.dim + c % parts.dim, value);
      } else {
        const int64_t row = int64_t{task} * parts.d + d;
        store(call.d_gate_weight, parts.gate_weight.type, row * parts.spaces + c - parts.dims,
              value);
      }
    });
  }

  template <class B>
  EPT_DEVICE static void make_up(const B& block, Sums& shared, Local<B>& local, const Call& call,
                                 int task, int first_c, int first_d) {
    const Parts& parts = call.parts;
    for (int first_m = 0; first_m < parts.m; first_m += tokens) {
      start(block, local, call, call.grad, task, first_m, first_d);
      add_to_sum(block, shared, local, call, parts.dims, first_m, first_c,
                 [&](int token, int c) { return gated_of(call, task, token, c); });
    }
    store_sum(block, local, call, parts.dims, first_c, first_d, [&](int c, int d, float value) {
      store(call.d_up, parts.up.type, (int64_t{task} * parts.dims + c) * parts.d + d, value);
    });
  }

  template <class B, class Put>
  EPT_DEVICE static void store_sum(const B& block, Local<B>& local, const Call& call, int count,
                                   int first_c, int first_d, Put put) {
    block.apart([&](int thread) {
      const int d = first_d + Tile::channel(thread);
      EPT_UNROLL
      for (int i = 0; i < own; ++i) {
        const int c = first_c + thread / Tile::channels * own + i;
        if (c < count && d < call.parts.d) put(c, d, local[thread].sum[i]);
      }
    });
  }

  // dA of sixteen positions: c·(Wᵀ·dO + dSᵀ·Q)
  template <class B>
  EPT_DEVICE static void make_a(const B& block, float* memory, const Call& call, int task,
                                int first) {
    const Parts& parts = call.parts;
    const int r = parts.r, number = least(ScoreTile::positions, parts.n - first);
    const ScoreTile tile(memory, r);
    typename B::template Local<RowState> local;
    block.apart([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < own_a; ++i) local[thread].sum[i] = 0.0f;
    });
    tile.load_rows(block, parts, task, first, parts.n);
    for (int first_m = 0; first_m < parts.m; first_m += tokens) {
      block.each([&](int thread) {
        const int64_t row = int64_t{task} * parts.m + first_m;
        for (int at = thread; at < tokens * r; at += threads) {
          const bool inside = first_m + at / r < parts.m;
          tile.query[at] = inside ? call.query[row * r + at] : 0.0f;
          tile.d_attended[at] = inside ? call.d_attended[row * r + at] : 0.0f;
        }
        if (thread < tokens && first_m + thread < parts.m) {
          tile.inner[thread] = call.inner[row + thread];
        }
      });
      tile.score(block, call, task, first_m, number);
      block.each([&](int thread) {
        const int s = thread / lanes_a;
        EPT_UNROLL
        for (int i = 0; i < own_a; ++i) {
          const int column = thread % lanes_a + i * lanes_a;
          if (i * lanes_a >= r) break;
          if (column >= r) continue;
          float sum = 0.0f;
          EPT_UNROLL
          for (int token = 0; token < tokens; ++token) {
            const int pair = token * ScoreTile::positions + s;
            sum += tile.weights[pair] * tile.d_attended[token * r + column];
            sum += tile.d_scores[pair] * tile.query[token * r + column];
          }
          local[thread].sum[i] += sum;
        }
      });
    }
    block.apart([&](int thread) {
      const int s = thread / lanes_a;
      if (s >= number) return;
      EPT_UNROLL
      for (int i = 0; i < own_a; ++i) {
        const int column = thread % lanes_a + i * lanes_a;
        if (column >= r) break;
        store(call.d_a, parts.a.type, (int64_t{task} * parts.n + first + s) * r + column,
              local[thread].sum[i] * parts.scaling);
      }
    });
  }

  template <class B>
  EPT_DEVICE static void add_bias(const B& block, const Call& call, int task, int tile) {
    const Parts& parts = call.parts;
    block.apart([&](int thread) {
      const int k = tile * threads + thread;
      if (k >= parts.spaces) return;
      const float* first = call.d_x + int64_t{task} * parts.m * parts.columns + parts.dims + k;
      const float sum = sum_of_parts(first, parts.m, parts.columns);
      store(call.d_gate_bias, parts.gate_bias.type, int64_t{task} * parts.spaces + k, sum);
    });
  }
};

}  // namespace ept
