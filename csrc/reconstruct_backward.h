// Operation 1, backward: after dC = Y·[B ; U]ᵀ come the softmax's gradients and the expansion over
// d.
//
// With F = P + O·B and dF = Y + dX·[D | G]ᵀ:
//     dP = dF + dQ·B    dB = Oᵀ·dF + dQᵀ·P    d[D | G] = Fᵀ·dX    dU = (g·Φ)ᵀ·Y    db = Σ dz
#pragma once

#include "reconstruct_parts.h"

namespace ept {

// What the forward saved.
struct Saved {
  const float* query;   // Q [T, m, r]
  const float* stats;   // [T, 2, m]
  const float* attended;     // O [T, m, r]
  const float* hidden;  // Hin [T, m, K·h]
  const float* gates;   // g [T, m, K]
  const float* cross;   // S [T, r, W]
};

struct BackwardCoreCall {
  Parts parts;
  Saved saved;
  const float* sums;  // of the reduction, dC in parts, [T, splits, m, r + K·h]
  int splits;
  float* d_x;       // [dHin | dz], [T, m, W]
  float* d_query;   // dQ [T, chunks, m, r]
  void* d_a;        // dA [T, groups, n, r], or the gradient itself
  Type type_a;
  int groups, tiles;         // of tokens, and tiles of a group
  int chunks, chunk;         // of n
};

// A block takes a chunk of positions for a group of tokens, eight tokens and sixteen positions at a
// time. The weights of the softmax are made again from Q and the statistics of its rows.
struct BackwardCoreKernel {
  static constexpr const char* name = "reconstruct_backward_core";
  static constexpr int threads = 128;
  static constexpr int tokens = 8;
  static constexpr int positions = 16;
  static constexpr int lanes_q = threads / tokens;     // threads of a token
  static constexpr int lanes_a = threads / positions;  // threads of a position
  static constexpr int own_q = max_rank / lanes_q;
  static constexpr int own_a = max_rank / lanes_a;
  using Call = BackwardCoreCall;

  // Shared memory: first dX [W, 8] and a sum of each thread, then in their place Q [8, r],
  // A [16, r], weights and dS [8, 16] each; beside them dO [8, r], their products with O [8], and
  // the mean of dg [K].
  EPT_BOTH static int first_floats(const Parts& parts) {
    const int attention = tokens * parts.r + positions * (parts.r | 1) + 2 * tokens * positions;
    return greatest(tokens * parts.columns + threads + parts.dims, attention);
  }

  static int64_t shared_floats(const Call& call) {
    const Parts& parts = call.parts;
    return first_floats(parts) + tokens * parts.r + tokens + parts.spaces;
  }

  struct State {
    float d_query[own_q];
  };

  struct Memory {
    float* d_x;
    float* sums;
    float* columns;  // [K·h]
    float* query;
    float* rows;
    float* weights;
    float* d_scores;
    float* d_attended;
    float* inner;
    float* d_gates;
  };

  EPT_DEVICE static Memory share(float* memory, const Parts& parts) {
    Memory shared;
    shared.d_x = memory;
    shared.sums = shared.d_x + tokens * parts.columns;
    shared.columns = shared.sums + threads;
    shared.query = memory;
    shared.rows = shared.query + tokens * parts.r;
    shared.weights = shared.rows + positions * (parts.r | 1);
    shared.d_scores = shared.weights + tokens * positions;
    shared.d_attended = memory + first_floats(parts);
    shared.inner = shared.d_attended + tokens * parts.r;
    shared.d_gates = shared.inner + tokens;
    return shared;
  }

  template <class B>
  EPT_DEVICE static void run(const B& block, float* memory, const Call& call) {
    Digits digits{block.index};
    const Parts& parts = call.parts;
    const int chunk = digits.next(call.chunks);
    const int group = digits.next(call.groups);
    const int task = static_cast<int>(digits.rest);
    const Memory shared = share(memory, parts);
    if (parts.spaces > 0 && parts.gate == Gate::prompt) average_gates(block, shared, call, task);
    const int first = group * call.tiles * tokens;
    const int end = least(first + call.tiles * tokens, parts.m);
    for (int first_m = first; first_m < end; first_m += tokens) {
      if (parts.spaces > 0) project(block, shared, call, task, first_m, chunk == 0);
      if (parts.r > 0) attend(block, shared, call, task, group, chunk, first_m, first_m > first);
    }
  }

  // One element of dC.
  EPT_DEVICE static float d_factor(const Call& call, int task, int token, int column) {
    const Parts& parts = call.parts;
    const int64_t columns = parts.r + parts.dims, size = parts.m * columns;
    return sum_of_parts(call.sums + task * call.splits * size + token * columns + column,
                        call.splits, size);
  }

  // dL/dφ(H), times φ(H): what a column adds to the gradient of its gate.
  EPT_DEVICE static float d_gate_of(const Call& call, int task, int token, int c) {
    const Parts& parts = call.parts;
    const float hidden = call.saved.hidden[(int64_t{task} * parts.m + token) * parts.dims + c];
    return d_factor(call, task, token, parts.r + c) * activate(hidden, parts.activation);
  }

  // With one gate for all tokens: the mean of their dg.
  template <class B>
  EPT_DEVICE static void average_gates(const B& block, const Memory& shared, const Call& call,
                                       int task) {
    const Parts& parts = call.parts;
    mean_of_tokens(block, shared.sums, shared.columns, parts.dims, parts.m,
                   [&](int token, int c) { return d_gate_of(call, task, token, c); });
    block.each([&](int thread) {
      for (int k = thread; k < parts.spaces; k += threads) {
        float sum = 0.0f;
        for (int j = 0; j < parts.dim; ++j) sum += shared.columns[k * parts.dim + j];
        shared.d_gates[k] = sum;
      }
    });
  }

  // dX = [dHin | dz / τ] of eight tokens, and what O gets through it.
  template <class B>
  EPT_DEVICE static void project(const B& block, const Memory& shared, const Call& call, int task,
                                 int first_m, bool saves) {
    const Parts& parts = call.parts;
    float* d_x = shared.d_x;
    block.each([&](int thread) {
      const int token = thread % tokens, row = first_m + token;
      if (row >= parts.m) return;
      for (int c = thread / tokens; c < parts.dims; c += threads / tokens) {
        d_x[c * tokens + token] = d_factor(call, task, row, parts.r + c);
      }
    });
    block.each([&](int thread) {
      const int token = thread % tokens, row = first_m + token;
      if (row >= parts.m) return;
      for (int k = thread / tokens; k < parts.spaces; k += threads / tokens) {
        float sum = 0.0f;
        if (parts.gate == Gate::prompt) {
          sum = shared.d_gates[k];
        } else {
          for (int c = k * parts.dim; c < (k + 1) * parts.dim; ++c) {
            const float hidden =
                call.saved.hidden[(int64_t{task} * parts.m + row) * parts.dims + c];
            sum += d_x[c * tokens + token] * activate(hidden, parts.activation);
          }
        }
        d_x[(parts.dims + k) * tokens + token] = sum;
      }
    });
    block.each([&](int thread) {
      if (thread >= tokens || first_m + thread >= parts.m) return;
      const int64_t row = int64_t{task} * parts.m + first_m + thread;
      const float* gates = call.saved.gates + row * parts.spaces;
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
          const float gate = call.saved.gates[at * parts.spaces + c / parts.dim];
          value *= gate * derivative_of(call.saved.hidden[at * parts.dims + c], parts.activation);
        }
        if (saves) call.d_x[at * parts.columns + c] = value;
      }
    });
  }

  template <class B>
  EPT_DEVICE static void attend(const B& block, const Memory& shared, const Call& call, int task,
                                int group, int chunk, int first_m, bool add) {
    const Parts& parts = call.parts;
    const int r = parts.r;
    typename B::template Local<State> local;
    // dO = dC + dX·Sᵀ
    block.each([&](int thread) {
      const int token = thread % tokens, row = first_m + token;
      for (int column = thread / tokens; column < r; column += threads / tokens) {
        float sum = 0.0f;
        if (row < parts.m) {
          const float* cross = call.saved.cross + (int64_t{task} * r + column) * parts.columns;
          sum = d_factor(call, task, row, column) + sum_of_terms(parts.columns, [&](int c) {
                  return shared.d_x[c * tokens + token] * cross[c];
                });
        }
        shared.d_attended[token * r + column] = sum;
      }
      EPT_UNROLL
      for (int i = 0; i < own_q; ++i) local[thread].d_query[i] = 0.0f;
    });
    // Q in the place of dX; dO·O, the sum over n of weight times gradient of weight
    block.each([&](int thread) {
      for (int at = thread; at < tokens * r; at += threads) {
        const int row = first_m + at / r;
        shared.query[at] =
            row < parts.m ? call.saved.query[(int64_t{task} * parts.m + row) * r + at % r] : 0.0f;
      }
      if (thread >= tokens) return;
      float inner = 0.0f;
      if (first_m + thread < parts.m) {
        const float* attended = call.saved.attended + (int64_t{task} * parts.m + first_m + thread) * r;
        const float* d_attended = shared.d_attended + thread * r;
        inner = sum_of_terms(r, [&](int i) { return d_attended[i] * attended[i]; });
      }
      shared.inner[thread] = inner;
    });
    const int end = least((chunk + 1) * call.chunk, parts.n);
    for (int first = chunk * call.chunk; first < end; first += positions) {
      load_rows(block, shared, parts, task, first, end);
      score(block, shared, call, task, first_m, first, end);
      block.apart([&](int thread) { add_query(shared, r, thread, local[thread]); });
      block.each([&](int thread) {
        add_rows(shared, call, int64_t{task} * call.groups + group, first, end, add, thread);
      });
    }
    block.apart([&](int thread) {
      const int row = first_m + thread / lanes_q;
      if (row >= parts.m) return;
      const int64_t at = ((int64_t{task} * call.chunks + chunk) * parts.m + row) * r;
      EPT_UNROLL
      for (int i = 0; i < own_q; ++i) {
        const int column = thread % lanes_q + i * lanes_q;
        if (column < r) call.d_query[at + column] = local[thread].d_query[i];
      }
    });
    block.each([](int) {});  // dX of the next tokens takes the place of what was read here
  }

  template <class B>
  EPT_DEVICE static void load_rows(const B& block, const Memory& shared, const Parts& parts,
                                   int task, int first, int end) {
    const View& a = parts.a;
    const int r = parts.r;
    block.each([&](int thread) {
      for (int at = thread; at < positions * r; at += threads) {
        const int s = at / r, column = at % r;
        const int64_t from =
            task * a.stride[0] + (first + s) * a.stride[1] + column * a.stride[2];
        shared.rows[s * (r | 1) + column] =
            first + s < end ? load(a.data, a.type, from) * parts.scaling : 0.0f;
      }
    });
  }

  // A thread has the weight of one position for one token, and its gradient.
  template <class B>
  EPT_DEVICE static void score(const B& block, const Memory& shared, const Call& call, int task,
                               int first_m, int first, int end) {
    static_assert(tokens * positions == threads);
    const Parts& parts = call.parts;
    const int r = parts.r;
    block.each([&](int thread) {
      const int token = thread / positions, s = thread % positions;
      const float* row = shared.rows + s * (r | 1);
      float weight = 0.0f, d_score = 0.0f;
      if (first_m + token < parts.m && first + s < end) {
        const float *query = shared.query + token * r, *d_attended = shared.d_attended + token * r;
        const float score = sum_of_terms(r, [&](int i) { return query[i] * row[i]; });
        const float d_weight = sum_of_terms(r, [&](int i) { return d_attended[i] * row[i]; });
        const float* stats = call.saved.stats + int64_t{task} * 2 * parts.m + first_m + token;
        weight = expf((score - stats[0]) * parts.score_scale) / stats[parts.m];
        d_score = weight * (d_weight - shared.inner[token]) * parts.score_scale;
      }
      shared.weights[thread] = weight;
      shared.d_scores[thread] = d_score;
    });
  }

  // dQ += dS·(c·A)
  EPT_DEVICE static void add_query(const Memory& shared, int r, int thread, State& state) {
    const float* d_scores = shared.d_scores + thread / lanes_q * positions;
    EPT_UNROLL_BY(2)
    for (int s = 0; s < positions; ++s) {
      const float d_score = d_scores[s];
      EPT_UNROLL
      for (int i = 0; i < own_q; ++i) {
        const int column = thread % lanes_q + i * lanes_q;
        if (i * lanes_q >= r) break;
        if (column < r) state.d_query[i] += d_score * shared.rows[s * (r | 1) + column];
      }
    }
  }

  // dA of sixteen positions from eight tokens: c·(Wᵀ·dO + dSᵀ·Q)
  EPT_DEVICE static void add_rows(const Memory& shared, const Call& call, int64_t part, int first,
                                  int end, bool add, int thread) {
    const int r = call.parts.r, s = thread / lanes_a;
    if (first + s >= end) return;
    for (int column = thread % lanes_a; column < r; column += lanes_a) {
      float sum = 0.0f;
      EPT_UNROLL
      for (int token = 0; token < tokens; ++token) {
        sum += shared.weights[token * positions + s] * shared.d_attended[token * r + column];
        sum += shared.d_scores[token * positions + s] * shared.query[token * r + column];
      }
      const int64_t at = (part * call.parts.n + first + s) * r + column;
      sum *= call.parts.scaling;
      if (add) sum += static_cast<const float*>(call.d_a)[at];
      store(call.d_a, call.type_a, at, sum);
    }
  }
};

struct BackwardExpandCall {
  Parts parts;
  Saved saved;
  View grad;              // Y
  const float* d_x;       // [T, m, W]
  const float* d_query;   // [T, chunks, m, r]
  const float* d_a_parts; // [T, groups, n, r]; null: dA is written
  int chunks, groups;
  void *d_p, *d_a, *d_b, *d_down, *d_up, *d_gate_weight, *d_gate_bias;
  // The grid of a task: tiles of dP, dB, d[D | G] and dU for every tile of d, then blocks of dA and
  // of db.
  int tiles_d, tiles_p, tiles_b, tiles_down, tiles_up, blocks_a, blocks_bias;
};

struct BackwardExpandKernel {
  static constexpr const char* name = "reconstruct_backward_expand";
  using Tile = ExpandTile;
  static constexpr int threads = Tile::threads;
  static constexpr int tokens = Tile::tokens;
  static constexpr int columns = 16;                                       // of a tile of a sum
  static constexpr int own = columns / (threads / Tile::channels);         // of a thread
  static constexpr int depth = 64;  // columns of a factor at a time
  static constexpr int each = 2;    // elements of dA of a thread
  using Call = BackwardExpandCall;

  struct Shared {
    float factor[depth * tokens];
    float left[tokens][columns];
    float right[tokens][Tile::channels];
  };

  struct State {
    float acc[Tile::own];
    float sum[own];
  };

  template <class B>
  using Local = typename B::template Local<State>;

  template <class B>
  EPT_DEVICE static void run(const B& block, Shared& shared, const Call& call) {
    Digits digits{block.index};
    const int tiles = call.tiles_p + call.tiles_b + call.tiles_down + call.tiles_up;
    const int number = digits.next(tiles * call.tiles_d + call.blocks_a + call.blocks_bias);
    const int task = static_cast<int>(digits.rest);
    if (number >= tiles * call.tiles_d + call.blocks_a) {
      add_bias(block, call, task, number - tiles * call.tiles_d - call.blocks_a);
      return;
    }
    if (number >= tiles * call.tiles_d) {
      add_rows(block, call, task, number - tiles * call.tiles_d);
      return;
    }
    const int first_d = number % call.tiles_d * Tile::channels;
    int tile = number / call.tiles_d;
    Local<B> local;
    if (tile < call.tiles_p) {
      make_prompt(block, shared, local, call, task, tile * tokens, first_d);
      return;
    }
    tile -= call.tiles_p;
    block.apart([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < own; ++i) local[thread].sum[i] = 0.0f;
    });
    if (tile < call.tiles_b) {
      make_b(block, shared, local, call, task, tile * columns, first_d);
    } else if (tile < call.tiles_b + call.tiles_down) {
      make_down(block, shared, local, call, task, (tile - call.tiles_b) * columns, first_d);
    } else {
      const int first_c = (tile - call.tiles_b - call.tiles_down) * columns;
      make_up(block, shared, local, call, task, first_c, first_d);
    }
  }

  // Elements of the factors, by token and column.
  EPT_DEVICE static float mix_of(const Call& call, int task, int token, int column) {
    const Parts& parts = call.parts;
    return call.saved.attended[(int64_t{task} * parts.m + token) * parts.r + column];
  }
  EPT_DEVICE static float d_query_of(const Call& call, int task, int token, int column) {
    const Parts& parts = call.parts;
    const int64_t size = int64_t{parts.m} * parts.r;
    return sum_of_parts(call.d_query + task * call.chunks * size + token * parts.r + column,
                        call.chunks, size);
  }
  EPT_DEVICE static float d_x_of(const Call& call, int task, int token, int column) {
    const Parts& parts = call.parts;
    return call.d_x[(int64_t{task} * parts.m + token) * parts.columns + column];
  }
  EPT_DEVICE static float gated_of(const Call& call, int task, int token, int column) {
    const Parts& parts = call.parts;
    const int64_t at = int64_t{task} * parts.m + token;
    return call.saved.gates[at * parts.spaces + column / parts.dim] *
           activate(call.saved.hidden[at * parts.dims + column], parts.activation);
  }

  // acc of eight tokens: the matrix's rows
  template <class B>
  EPT_DEVICE static void start(const B& block, Local<B>& local, const Call& call,
                               const View& matrix, int task, int first_m, int first_d) {
    block.apart([&](int thread) {
      const int d = first_d + Tile::channel(thread);
      EPT_UNROLL
      for (int i = 0; i < Tile::own; ++i) {
        const int token = first_m + Tile::token(thread, i);
        const bool inside = token < call.parts.m && d < call.parts.d;
        local[thread].acc[i] = inside ? line_of(matrix, task, token).at(d) : 0.0f;
      }
    });
  }

  // acc += factor·lines
  template <class B, class Element, class LineOf>
  EPT_DEVICE static void multiply(const B& block, Shared& shared, Local<B>& local,
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
        Tile::add_product(local[thread].acc, shared.factor, number, thread, d,
                          [&](int c) { return line(first + c); });
      });
    }
  }

  // acc: dF = Y + dX·[D | G]ᵀ
  template <class B>
  EPT_DEVICE static void make_d_fused(const B& block, Shared& shared, Local<B>& local,
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
  EPT_DEVICE static void add_to_sum(const B& block, Shared& shared, Local<B>& local,
                                    const Call& call, int count, int first_m, int first_c,
                                    Element element) {
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
  EPT_DEVICE static void make_prompt(const B& block, Shared& shared, Local<B>& local,
                                     const Call& call, int task, int first_m, int first_d) {
    const Parts& parts = call.parts;
    make_d_fused(block, shared, local, call, task, first_m, first_d);
    multiply(
        block, shared, local, call, parts.r, first_m, first_d,
        [&](int token, int c) { return d_query_of(call, task, token, c); },
        [&](int c) { return line_of(parts.b, task, c); });
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
  EPT_DEVICE static void make_b(const B& block, Shared& shared, Local<B>& local, const Call& call,
                                int task, int first_c, int first_d) {
    const Parts& parts = call.parts;
    for (int first_m = 0; first_m < parts.m; first_m += tokens) {
      make_d_fused(block, shared, local, call, task, first_m, first_d);
      add_to_sum(block, shared, local, call, parts.r, first_m, first_c,
                 [&](int token, int c) { return mix_of(call, task, token, c); });
      start(block, local, call, parts.p, task, first_m, first_d);
      add_to_sum(block, shared, local, call, parts.r, first_m, first_c,
                 [&](int token, int c) { return d_query_of(call, task, token, c); });
    }
    store_sum(block, local, call, parts.r, first_c, first_d, [&](int c, int d, float value) {
      store(call.d_b, parts.b.type, (int64_t{task} * parts.r + c) * parts.d + d, value);
    });
  }

  template <class B>
  EPT_DEVICE static void make_down(const B& block, Shared& shared, Local<B>& local,
                                   const Call& call, int task, int first_c, int first_d) {
    const Parts& parts = call.parts;
    for (int first_m = 0; first_m < parts.m; first_m += tokens) {
      start(block, local, call, parts.p, task, first_m, first_d);
      multiply(
          block, shared, local, call, parts.r, first_m, first_d,
          [&](int token, int c) { return mix_of(call, task, token, c); },
          [&](int c) { return line_of(parts.b, task, c); });
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
  EPT_DEVICE static void make_up(const B& block, Shared& shared, Local<B>& local, const Call& call,
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

  template <class B>
  EPT_DEVICE static void add_rows(const B& block, const Call& call, int task, int piece) {
    const Parts& parts = call.parts;
    const int64_t size = int64_t{parts.n} * parts.r;
    block.apart([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < each; ++i) {
        const int64_t at = (int64_t{piece} * each + i) * threads + thread;
        if (at >= size) continue;
        const float sum =
            sum_of_parts(call.d_a_parts + task * call.groups * size + at, call.groups, size);
        store(call.d_a, parts.a.type, task * size + at, sum);
      }
    });
  }

  template <class B>
  EPT_DEVICE static void add_bias(const B& block, const Call& call, int task, int piece) {
    const Parts& parts = call.parts;
    block.apart([&](int thread) {
      const int k = piece * threads + thread;
      if (k >= parts.spaces) return;
      const float* first = call.d_x + int64_t{task} * parts.m * parts.columns + parts.dims + k;
      const float sum = sum_of_parts(first, parts.m, parts.columns);
      store(call.d_gate_bias, parts.gate_bias.type, int64_t{task} * parts.spaces + k, sum);
    });
  }
};

}  // namespace ept
