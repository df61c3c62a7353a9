// Operation 2, forward: the prompt before the text, the low-rank offset onto its real tokens.
//
// A block owns a tile of positions × channels of some rows. It computes the offset of the tile once
// for the rows of one task, keeps it in registers, and adds it to that tile of each of them. Other
// blocks of the launch write P′ in the same way: their tile is one of the prompt.
#pragma once

#include "arithmetic.h"
#include "splice_plan.h"

namespace ept {

struct SpliceForwardCall {
  View prompt;
  View input_ids;
  View source;  // strides [batch, S, d]; of a table [0, vocabulary, d]
  View offset_a;
  View offset_b;
  Plan plan;
  void* out;
  int batch;
  int length;
  int tasks;
  int tokens;
  int width;
  int rank;  // 0 without the offset
  int64_t vocabulary;
  float scaling;
  // The grid: chunks of rows, then tiles of the prompt and of the text, then tiles of channels.
  int rows;
  int tiles_m;
  int tiles_s;
  int tiles_d;
};

// The shape of a tile and what a thread has of it, forward and backward.
template <class T, bool Vectors>
struct SpliceTile {
  static constexpr int threads = 128;
  static constexpr int positions = 32;
  static constexpr int channels = 128;
  static constexpr int lanes = 16;                        // threads along the channels
  static constexpr int own_positions = positions / (threads / lanes);
  static constexpr int own_channels = channels / lanes;
  static constexpr int step = Vectors ? packed_size<T> : 1;  // neighbouring channels of a thread
  static constexpr int moves = own_channels / step;

  EPT_BOTH static int position(int thread, int i) {
    return thread / lanes + i * (threads / lanes);
  }
  // The first of the channels that a thread moves at once.
  EPT_BOTH static int channel(int thread, int move) {
    return (thread % lanes) * step + move * lanes * step;
  }
};

template <class T, bool Vectors>
struct SpliceForwardKernel {
  static constexpr const char* name = "splice_forward";
  using Tile = SpliceTile<T, Vectors>;
  static constexpr int threads = Tile::threads;
  static constexpr int ranks = 16;  // of A and B at a time
  using Call = SpliceForwardCall;

  // If 16 bits hide what they lose, the matrix units multiply: as three products of TF32.
  static constexpr bool uses_matrix_units = has_matrix_units && sizeof(T) == 2;
  static constexpr int padding = 8;  // keeps the elements of a fragment off each other's banks

  struct Shared {
    alignas(16) float b[ranks][Tile::channels + padding];
    float a[ranks][Tile::positions + padding];
    alignas(16) float product[sizeof(T) == 2 ? Tile::positions : 1][Tile::channels + 4];
  };

  // The matrix units' view of a warp's 32 channels: two pieces of 16 positions, four of 8 channels.
  static constexpr int pieces_s = Tile::positions / MatrixProduct::rows;
  static constexpr int pieces_d = Tile::channels / (threads / 32) / MatrixProduct::columns;

  struct State {
    float tile[Tile::own_positions][Tile::own_channels];
    uint32_t a_high[pieces_s][4], a_low[pieces_s][4], b_high[2], b_low[2];

    // The elements of one piece of the product, kept where the tile will be.
    EPT_BOTH float* piece(int s, int d) { return &tile[0][0] + (s * pieces_d + d) * 4; }
  };
  static_assert(pieces_s * pieces_d * 4 == Tile::own_positions * Tile::own_channels);

  template <class B>
  using Local = typename B::template Local<State>;

  template <class B>
  EPT_DEVICE static void run(const B& block, Shared& shared, const Call& call) {
    Digits digits{block.index};
    const int first_d = digits.next(call.tiles_d) * Tile::channels;
    const int tile = digits.next(call.tiles_m + call.tiles_s);
    const int first = static_cast<int>(digits.rest) * call.rows;
    const int last = least(first + call.rows, call.batch);
    const bool is_prompt = tile < call.tiles_m;
    const int first_s = (is_prompt ? tile : tile - call.tiles_m) * Tile::positions;

    Local<B> local;
    int next = first;
    for (int place = first; place < last; place = next) {
      const int task = call.plan.task(place);
      while (next < last && call.plan.task(next) == task) ++next;
      if (is_prompt) {
        if (task < call.tasks) load_prompt(block, local, call, task, first_s, first_d);
        write_prompt(block, local, call, place, next, task, first_s, first_d);
        continue;
      }
      const bool has_offset = call.rank > 0 && task < call.tasks;
      if (has_offset) multiply(block, shared, local, call, task, first_s, first_d);
      write_text(block, local, call, place, next, task, has_offset, first_s, first_d);
    }
  }

  template <class B>
  EPT_DEVICE static void load_prompt(const B& block, Local<B>& local, const Call& call, int task,
                                     int first_s, int first_d) {
    const View& prompt = call.prompt;
    block.apart([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < Tile::own_positions; ++i) {
        const int token = first_s + Tile::position(thread, i);
        const int64_t from = task * prompt.stride[0] + token * prompt.stride[1];
        EPT_UNROLL
        for (int c = 0; c < Tile::own_channels; ++c) {
          const int d = first_d + Tile::channel(thread, c / Tile::step) + c % Tile::step;
          const bool inside = token < call.tokens && d < call.width;
          local[thread].tile[i][c] =
              inside ? load(prompt.data, prompt.type, from + d * prompt.stride[2]) : 0.0f;
        }
      }
    });
  }

  template <class B>
  EPT_DEVICE static void write_prompt(const B& block, Local<B>& local, const Call& call, int first,
                                      int last, int task, int first_s, int first_d) {
    block.apart([&](int thread) {
      for (int place = first; place < last; ++place) {
        const int64_t begin = int64_t{call.plan.row(place)} * (call.tokens + call.length);
        EPT_UNROLL
        for (int i = 0; i < Tile::own_positions; ++i) {
          const int token = first_s + Tile::position(thread, i);
          if (token >= call.tokens) continue;
          EPT_UNROLL
          for (int move = 0; move < Tile::moves; ++move) {
            const int d = first_d + Tile::channel(thread, move);
            if (d >= call.width) continue;
            float values[Tile::step];
            EPT_UNROLL
            for (int c = 0; c < Tile::step; ++c) {
              const float value = local[thread].tile[i][move * Tile::step + c];
              values[c] = task < call.tasks ? value : not_a_number();
            }
            write(call, (begin + token) * call.width + d, values);
          }
        }
      }
    });
  }

  // c·A·B of the tile
  template <class B>
  EPT_DEVICE static void multiply(const B& block, Shared& shared, Local<B>& local, const Call& call,
                                  int task, int first_s, int first_d) {
    block.apart([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < Tile::own_positions; ++i) {
        EPT_UNROLL
        for (int c = 0; c < Tile::own_channels; ++c) local[thread].tile[i][c] = 0.0f;
      }
    });
    for (int first_r = 0; first_r < call.rank; first_r += ranks) {
      load_factors(block, shared, call, task, first_s, first_d, first_r);
      if constexpr (uses_matrix_units) {
        add_by_units(block, shared, local);
      } else {
        add_plainly(block, shared, local);
      }
    }
    if constexpr (uses_matrix_units) deal_out(block, shared, local);
    block.apart([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < Tile::own_positions; ++i) {
        EPT_UNROLL
        for (int c = 0; c < Tile::own_channels; ++c) local[thread].tile[i][c] *= call.scaling;
      }
    });
  }

  template <class B>
  EPT_DEVICE static void load_factors(const B& block, Shared& shared, const Call& call, int task,
                                      int first_s, int first_d, int first_r) {
    const View &a = call.offset_a, &b = call.offset_b;
    block.each([&](int thread) {
      EPT_UNROLL_BY(4)
      for (int i = 0; i < Tile::positions * ranks / threads; ++i) {
        const int r = thread % ranks, s = thread / ranks + i * (threads / ranks);
        const int64_t at = task * a.stride[0] + (first_s + s) * a.stride[1] +
                           (first_r + r) * a.stride[2];
        const bool inside = first_s + s < call.length && first_r + r < call.rank;
        shared.a[r][s] = inside ? load(a.data, a.type, at) : 0.0f;
      }
      EPT_UNROLL_BY(8)
      for (int r = 0; r < ranks; ++r) {
        const int d = first_d + thread;
        const int64_t at = task * b.stride[0] + (first_r + r) * b.stride[1] + d * b.stride[2];
        const bool inside = first_r + r < call.rank && d < call.width;
        shared.b[r][thread] = inside ? load(b.data, b.type, at) : 0.0f;
      }
    });
  }

  // Four channels at a time, whose sum over these ranks comes first: fewer roundings follow one
  // another.
  template <class B>
  EPT_DEVICE static void add_plainly(const B& block, const Shared& shared, Local<B>& local) {
    constexpr int some = 4;
    block.each([&](int thread) {
      EPT_UNROLL
      for (int first = 0; first < Tile::own_channels; first += some) {
        float sum[Tile::own_positions][some] = {};
        EPT_UNROLL_BY(4)
        for (int r = 0; r < ranks; ++r) {
          float values[some];
          EPT_UNROLL
          for (int c = 0; c < some; ++c) {
            const int own = first + c;
            values[c] = shared.b[r][Tile::channel(thread, own / Tile::step) + own % Tile::step];
          }
          EPT_UNROLL
          for (int i = 0; i < Tile::own_positions; ++i) {
            const float factor = shared.a[r][Tile::position(thread, i)];
            EPT_UNROLL
            for (int c = 0; c < some; ++c) sum[i][c] += factor * values[c];
          }
        }
        EPT_UNROLL
        for (int i = 0; i < Tile::own_positions; ++i) {
          EPT_UNROLL
          for (int c = 0; c < some; ++c) local[thread].tile[i][first + c] += sum[i][c];
        }
      }
    });
  }

  // x = high + low, both in TF32: the product of what is lost in both is left out.
  template <class B>
  EPT_DEVICE static void add_by_units(const B& block, const Shared& shared, Local<B>& local) {
    using Product = MatrixProduct;
    EPT_UNROLL_BY(1)
    for (int k = 0; k < ranks; k += Product::depth) {
      block.apart([&](int thread) {
        State& state = local[thread];
        EPT_UNROLL
        for (int s = 0; s < pieces_s; ++s) {
          EPT_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int row = Product::row_of_a(thread % 32, i);
            const int column = Product::column_of_a(thread % 32, i);
            const float value = shared.a[k + column][s * Product::rows + row];
            state.a_high[s][i] = to_tf32(value);
            state.a_low[s][i] = to_tf32(value - float_of(state.a_high[s][i]));
          }
        }
      });
      EPT_UNROLL
      for (int d = 0; d < pieces_d; ++d) {
        block.apart([&](int thread) {
          State& state = local[thread];
          const int first = (thread / 32 * pieces_d + d) * Product::columns;
          EPT_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int row = Product::row_of_b(thread % 32, i);
            const float value = shared.b[k + row][first + Product::column_of_b(thread % 32)];
            state.b_high[i] = to_tf32(value);
            state.b_low[i] = to_tf32(value - float_of(state.b_high[i]));
          }
        });
        EPT_UNROLL
        for (int s = 0; s < pieces_s; ++s) {
          block.multiply([&](int thread) -> Product {
            State& state = local[thread];
            return {state.a_low[s], state.b_high, state.piece(s, d)};
          });
          block.multiply([&](int thread) -> Product {
            State& state = local[thread];
            return {state.a_high[s], state.b_low, state.piece(s, d)};
          });
          block.multiply([&](int thread) -> Product {
            State& state = local[thread];
            return {state.a_high[s], state.b_high, state.piece(s, d)};
          });
        }
      }
    }
    block.each([](int) {});  // the next factors take the place of these
  }

  // From the elements that the matrix units gave a thread to those of its part of the tile.
  template <class B>
  EPT_DEVICE static void deal_out(const B& block, Shared& shared, Local<B>& local) {
    using Product = MatrixProduct;
    block.each([&](int thread) {
      EPT_UNROLL
      for (int s = 0; s < pieces_s; ++s) {
        EPT_UNROLL
        for (int d = 0; d < pieces_d; ++d) {
          EPT_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int row = s * Product::rows + Product::row_of_c(thread % 32, i);
            const int column = (thread / 32 * pieces_d + d) * Product::columns +
                               Product::column_of_c(thread % 32, i);
            shared.product[row][column] = local[thread].piece(s, d)[i];
          }
        }
      }
    });
    block.each([&](int thread) {
      EPT_UNROLL
      for (int i = 0; i < Tile::own_positions; ++i) {
        EPT_UNROLL
        for (int c = 0; c < Tile::own_channels; ++c) {
          const int d = Tile::channel(thread, c / Tile::step) + c % Tile::step;
          local[thread].tile[i][c] = shared.product[Tile::position(thread, i)][d];
        }
      }
    });
  }

  template <class B>
  EPT_DEVICE static void write_text(const B& block, Local<B>& local, const Call& call, int first,
                                    int last, int task, bool has_offset, int first_s,
                                    int first_d) {
    const View &ids = call.input_ids, &source = call.source;
    block.apart([&](int thread) {
      EPT_UNROLL_BY(1)
      for (int place = first; place < last; ++place) {
        const int row = call.plan.row(place);
        const int reals = has_offset ? call.plan.reals_of(row, call.length) : 0;
        const int64_t begin = int64_t{row} * (call.tokens + call.length) + call.tokens;
        int column[Tile::own_positions];
        int from[Tile::own_positions];  // a column or an id; -1: one that the table does not have
        EPT_UNROLL
        for (int i = 0; i < Tile::own_positions; ++i) {
          const int s = first_s + Tile::position(thread, i);
          column[i] = s < call.length ? call.plan.column(row, s, call.length) : -1;
        }
        EPT_UNROLL
        for (int i = 0; i < Tile::own_positions; ++i) {
          from[i] = -1;
          if (column[i] < 0 || task >= call.tasks) continue;
          if (ids.data == nullptr) {
            from[i] = column[i];
            continue;
          }
          const int64_t at = row * ids.stride[0] + column[i] * ids.stride[1];
          const int64_t id = load_integer(ids.data, ids.type, at);
          if (id >= 0 && id < call.vocabulary) from[i] = static_cast<int>(id);
        }
        EPT_UNROLL
        for (int move = 0; move < Tile::moves; ++move) {
          const int d = first_d + Tile::channel(thread, move);
          if (d >= call.width) continue;
          float values[Tile::own_positions][Tile::step];
          read(source, row, from, d, values);
          EPT_UNROLL
          for (int i = 0; i < Tile::own_positions; ++i) {
            if (column[i] < 0) continue;
            if (first_s + Tile::position(thread, i) < reals) {
              EPT_UNROLL
              for (int c = 0; c < Tile::step; ++c) {
                values[i][c] += local[thread].tile[i][move * Tile::step + c];
              }
            }
            write(call, (begin + column[i]) * call.width + d, values[i]);
          }
        }
      }
    });
  }

  // One move of each position: all loads are on their way before the first is needed.
  EPT_DEVICE static void read(const View& source, int row, const int* from, int d,
                              float (*values)[Tile::step]) {
    const T* data =
        static_cast<const T*>(source.data) + row * source.stride[0] + d * source.stride[2];
    if constexpr (Vectors) {
      Packed packed[Tile::own_positions];
      EPT_UNROLL
      for (int i = 0; i < Tile::own_positions; ++i) {
        if (from[i] >= 0) packed[i] = load_packed(data + from[i] * source.stride[1]);
      }
      EPT_UNROLL
      for (int i = 0; i < Tile::own_positions; ++i) {
        EPT_UNROLL
        for (int c = 0; c < Tile::step; ++c) {
          values[i][c] = from[i] >= 0 ? unpack<T>(packed[i], c) : not_a_number();
        }
      }
    } else {
      EPT_UNROLL
      for (int i = 0; i < Tile::own_positions; ++i) {
        values[i][0] =
            from[i] >= 0 ? to_float(data[from[i] * source.stride[1]]) : not_a_number();
      }
    }
  }

  EPT_DEVICE static void write(const Call& call, int64_t at, const float* values) {
    T* out = static_cast<T*>(call.out) + at;
    if constexpr (Vectors) {
      store_packed(out, pack<T>(values));
    } else {
      *out = from_float<T>(*values);
    }
  }
};

}  // namespace ept
