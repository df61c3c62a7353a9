// Operation 2, forward: the prompt before the text, the low-rank offset onto its real tokens.
//
// A block owns a tile of positions × channels of some rows. It computes the offset of the tile once
// for the rows of one task, keeps it in registers, and adds it to that tile of each of them. Other
// blocks of the launch write P′ in the same way: their tile is one of the prompt.
#pragma once

#include "splice_plan.h"
#include "splice_tile.h"

namespace ept {

struct SpliceForwardCall : SpliceCall {
  View prompt, input_ids;
  View source;  // strides [batch, S, d]; of a table [0, vocabulary, d]
  void* out;
  int64_t vocabulary;
  // The grid: chunks of rows, then tiles of the prompt and of the text, then tiles of channels.
  int rows, tiles_m, tiles_s, tiles_d;
};

template <class T, bool Vectors>
struct SpliceForwardKernel {
  static constexpr const char* name = "splice_forward";
  using Tile = SpliceTile<T, Vectors, 32, 128, 128, 4>;
  static constexpr int threads = Tile::threads;
  using Call = SpliceForwardCall;
  using Shared = Factors<Tile, 16, 2>;

  // If 16 bits hide what they lose, the matrix units multiply. Of the product a warp has all
  // positions and its own channels, in an order that leaves each thread with its part of the tile.
  static constexpr bool uses_matrix_units = has_matrix_units && sizeof(T) == 2;
  static constexpr int pieces_s = Tile::positions / MatrixProduct::rows;
  static constexpr int pieces_d = Tile::channels / Tile::across / MatrixProduct::columns;

  struct State {
    WarpProduct<pieces_s, pieces_d> product;

    // P′ or A·B at one of the thread's positions and channels
    EPT_BOTH float& tile(int i, int c) { return product.sums[i / 2][c / 2][i % 2 * 2 + c % 2]; }
  };

  template <class B>
  using Local = typename B::template Local<State>;

  // A tile, for the rows of one task.
  struct At {
    bool is_prompt;
    int s, d;
    int task;
  };

  template <class B>
  EPT_DEVICE static void run(const B& block, Shared& shared, const Call& call) {
    Digits digits{block.index};
    At at{};
    at.d = digits.next(call.tiles_d) * Tile::channels;
    const int tile = digits.next(call.tiles_m + call.tiles_s);
    at.is_prompt = tile < call.tiles_m;
    at.s = (at.is_prompt ? tile : tile - call.tiles_m) * Tile::positions;
    const int first = static_cast<int>(digits.rest) * call.rows;
    const int last = least(first + call.rows, call.batch);

    Local<B> local;
    int next = first;
    for (int place = first; place < last; place = next) {
      at.task = call.plan.task(place);
      next = least(last, call.plan.end_of(at.task, call.batch));
      if (at.task < call.tasks && at.is_prompt) {
        load_prompt(block, local, call, at);
      } else if (at.task < call.tasks && call.rank > 0) {
        multiply(block, shared, local, call, at);
      }
      write_rows(block, local, call, at, place, next);
    }
  }

  template <class B>
  EPT_DEVICE static void load_prompt(const B& block, Local<B>& local, const Call& call,
                                     const At& tile) {
    const View& prompt = call.prompt;
    block.apart([&](int thread) {
      with_numbers(prompt.data, prompt.type, [&](const auto* data) {
        const int d = tile.d + Tile::channel(thread);
        data += tile.task * prompt.stride[0] + d * prompt.stride[2];
        EPT_UNROLL
        for (int i = 0; i < Tile::own_positions; ++i) {
          const int token = tile.s + Tile::position(thread, i);
          const auto* at = data + token * prompt.stride[1];
          EPT_UNROLL
          for (int c = 0; c < Tile::own_channels; ++c) {
            // Where channels move in vectors, the width is a multiple of them.
            const bool inside =
                token < call.tokens && d + Tile::beyond(c / Tile::step * Tile::step) < call.width;
            local[thread].tile(i, c) = inside ? to_float(*at) : 0.0f;
            at += (Tile::beyond(c + 1) - Tile::beyond(c)) * prompt.stride[2];
          }
        }
      });
    });
  }

  // A·B of the tile
  template <class B>
  EPT_DEVICE static void multiply(const B& block, Shared& shared, Local<B>& local, const Call& call,
                                  const At& tile) {
    block.apart([&](int thread) { local[thread].product = {}; });
    for (int first_r = 0; first_r < call.rank; first_r += Shared::ranks) {
      load_factors<Tile>(block, shared, call, tile.task, true, tile.s, tile.d, first_r);
      add_product<uses_matrix_units, pieces_s, pieces_d>(
          block, local, Shared::ranks, pieces_d, false,
          [&](int, int s, int r) { return shared.a[s][r]; },
          [&](int thread, int r, int column) {
            const int owner = thread / 32 * 32 + column % 8 / 2, c = column / 8 * 2 + column % 2;
            return shared.b[r][Tile::channel(owner) + Tile::beyond(c)];
          });
      block.each([](int) {});  // the next factors take the place of these
    }
  }

  // Where a thread's positions of one row lie, and what they read.
  struct Places {
    int row;
    int reals;
    int column[Tile::own_positions];  // -1: past the prompt or the text
    int from[Tile::own_positions];    // a column or an id; -1: one that is not known
  };

  EPT_DEVICE static Places places_of(const Call& call, const At& tile, int place, int thread) {
    const View& ids = call.input_ids;
    const TextRow text = tile.is_prompt ? call.plan.prompt(place, call.tokens)
                                        : call.plan.text(place, call.length);
    Places places{text.row, text.reals, {}, {}};
    EPT_UNROLL
    for (int i = 0; i < Tile::own_positions; ++i) {
      const int s = tile.s + Tile::position(thread, i);
      const bool inside = s < (tile.is_prompt ? call.tokens : call.length);
      places.column[i] = inside ? text.column(s) : -1;
      places.from[i] = tile.task < call.tasks ? places.column[i] : -1;
    }
    if (tile.is_prompt || ids.data == nullptr) return places;
    with_integers(ids, [&](const auto* data) {
      data += text.row * ids.stride[0];
      EPT_UNROLL
      for (int i = 0; i < Tile::own_positions; ++i) {
        const int64_t id = places.from[i] >= 0 ? data[places.from[i] * ids.stride[1]] : -1;
        places.from[i] = id >= 0 && id < call.vocabulary ? static_cast<int>(id) : -1;
      }
    });
    return places;
  }

  // While a row's embeddings are on their way, the places of the next row are looked up.
  template <class B>
  EPT_DEVICE static void write_rows(const B& block, Local<B>& local, const Call& call,
                                    const At& tile, int first, int last) {
    constexpr int at_once = Vectors ? Tile::own_positions / Tile::moves : 1;
    const View& source = call.source;
    block.apart([&](int thread) {
      const int d = tile.d + Tile::channel(thread);
      Places next = places_of(call, tile, first, thread);
      EPT_UNROLL_BY(1)
      for (int place = first; place < last; ++place) {
        const Places places = next;
        const T* data = static_cast<const T*>(source.data) + places.row * source.stride[0] +
                        d * source.stride[2];
        const int64_t begin = int64_t{places.row} * (call.tokens + call.length) +
                              (tile.is_prompt ? 0 : call.tokens);
        EPT_UNROLL
        for (int first_i = 0; first_i < Tile::own_positions; first_i += at_once) {
          typename Tile::Piece pieces[at_once][Tile::moves] = {};
          EPT_UNROLL
          for (int i = 0; i < at_once; ++i) {
            const int from = places.from[first_i + i];
            const T* at = data + from * source.stride[1];
            EPT_UNROLL
            for (int move = 0; move < Tile::moves; ++move) {
              const int beyond = Tile::beyond(move * Tile::step);
              const bool reads = !tile.is_prompt && from >= 0 && d + beyond < call.width;
              if (reads) pieces[i][move] = Tile::load(at);
              at += (Tile::beyond((move + 1) * Tile::step) - beyond) * source.stride[2];
            }
          }
          if (first_i == 0 && place + 1 < last) next = places_of(call, tile, place + 1, thread);
          EPT_UNROLL
          for (int i = first_i; i < first_i + at_once; ++i) {
            if (places.column[i] < 0) continue;
            const bool is_real = call.rank > 0 && tile.s + Tile::position(thread, i) < places.reals;
            T* out = static_cast<T*>(call.out) + (begin + places.column[i]) * call.width + d;
            EPT_UNROLL
            for (int move = 0; move < Tile::moves; ++move) {
              float values[Tile::step];
              EPT_UNROLL
              for (int c = 0; c < Tile::step; ++c) {
                const float own = local[thread].tile(i, move * Tile::step + c);
                values[c] =
                    tile.is_prompt ? own : Tile::number(pieces[i - first_i][move], c);
                if (!tile.is_prompt && is_real) values[c] += call.scaling * own;
                if (places.from[i] < 0) values[c] = not_a_number();
              }
              const int beyond = Tile::beyond(move * Tile::step);
              if (d + beyond < call.width) write(out + beyond, values);
            }
          }
        }
      }
    });
  }

  EPT_DEVICE static void write(T* out, const float* values) {
    if constexpr (Vectors) {
      store_packed(out, pack<T>(values));
    } else {
      *out = from_float<T>(*values);
    }
  }
};

}  // namespace ept
