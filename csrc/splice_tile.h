// What both directions of operation 2 do with a tile of positions × channels: which of it a thread
// has, the factors A and B beside it, and products of warps.
#pragma once

#include <type_traits>

#include "arithmetic.h"
#include "block.h"

namespace ept {

// `Lanes` of a warp lie along the channels, and its other threads along the positions.
template <class T, bool Vectors, int Positions, int Channels, int Threads, int Lanes>
struct SpliceTile {
  static constexpr int threads = Threads;
  static constexpr int positions = Positions;
  static constexpr int channels = Channels;
  static constexpr int own_channels = 8;
  static constexpr int across = channels / (Lanes * own_channels);  // warps along the channels
  static constexpr int step_s = threads / (Lanes * across);
  static constexpr int own_positions = positions / step_s;
  static constexpr int step = Vectors ? packed_size<T> : 1;  // neighbouring channels of a thread
  static constexpr int moves = own_channels / step;

  EPT_BOTH static int position(int thread, int i) {
    return thread / 32 / across * (32 / Lanes) + thread % 32 / Lanes + i * step_s;
  }
  // The first channel of a thread, and how far each of them lies beyond it.
  EPT_BOTH static int channel(int thread) {
    return thread / 32 % across * (Lanes * own_channels) + thread % Lanes * step;
  }
  EPT_BOTH static constexpr int beyond(int c) { return c / step * (Lanes * step) + c % step; }

  // The channels that a thread moves at once.
  using Piece = std::conditional_t<Vectors, Packed, T>;

  EPT_BOTH static Piece load(const T* data) {
    if constexpr (Vectors) {
      return load_packed(data);
    } else {
      return *data;
    }
  }
  EPT_BOTH static float number(const Piece& piece, int c) {
    if constexpr (Vectors) {
      return unpack<T>(piece, c);
    } else {
      return to_float(piece);
    }
  }
};

// Some ranks of A and B, zero outside: what is past the text, the width or the rank adds nothing.
// The padding keeps the numbers that a warp reads at once off each other's banks.
template <class Tile, int Ranks, int Padding>
struct Factors {
  static constexpr int ranks = Ranks;
  float a[Tile::positions][ranks + 4];
  alignas(16) float b[ranks][Tile::channels + Padding];
};

template <class Tile, class B, class Shared, class Call>
EPT_DEVICE void load_factors(const B& block, Shared& shared, const Call& call, int task,
                             bool with_b, int first_s, int first_d, int first_r) {
  constexpr int ranks = Shared::ranks, threads = B::threads;
  const View &a = call.offset_a, &b = call.offset_b;
  block.each([&](int thread) {
    with_numbers(a.data, a.type, [&](const auto* data) {
      constexpr int step = threads / ranks;
      const int r = first_r + thread % ranks, s = first_s + thread / ranks;
      data += task * a.stride[0] + s * a.stride[1] + r * a.stride[2];
      EPT_UNROLL
      for (int i = 0; i < Tile::positions / step; ++i) {
        const bool inside = s + i * step < call.length && r < call.rank;
        shared.a[thread / ranks + i * step][thread % ranks] =
            inside ? to_float(*data) : 0.0f;
        data += step * a.stride[1];
      }
    });
    if (!with_b) return;
    with_numbers(b.data, b.type, [&](const auto* data) {
      constexpr int step = threads / Tile::channels;
      const int r = first_r + thread / Tile::channels, d = first_d + thread % Tile::channels;
      data += task * b.stride[0] + r * b.stride[1] + d * b.stride[2];
      EPT_UNROLL_BY(8)
      for (int i = 0; i < ranks / step; ++i) {
        const bool inside = r + i * step < call.rank && d < call.width;
        shared.b[thread / Tile::channels + i * step][thread % Tile::channels] =
            inside ? to_float(*data) : 0.0f;
        data += step * b.stride[1];
      }
    });
  });
}

// A warp's product of M × N pieces, as the matrix units deal it out to a thread.
template <int M, int N>
struct WarpProduct {
  float sums[M][N][4];
  uint32_t left_high[M][4], left_low[M][4], right_high[2], right_low[2];
};

// x = high + low, both in TF32
EPT_BOTH void split(float x, uint32_t& high, uint32_t& low) {
  high = to_tf32(x);
  low = to_tf32(x - float_of(high));
}

// Adds the product of left(thread, row, k) and right(thread, k, column) over a depth to the first
// `pieces` pieces of columns. The units multiply x = high + low of both: the product of the low
// parts is left out, and what is zero if the left numbers are TF32 numbers already (`exact`).
template <bool Units, int M, int N, class B, class Local, class Left, class Right>
EPT_DEVICE void add_product(const B& block, Local& local, int depth, int pieces, bool exact,
                            Left left, Right right) {
  using Unit = MatrixProduct;
  if constexpr (Units) {
    EPT_UNROLL_BY(1)
    for (int k = 0; k < depth; k += Unit::depth) {
      block.apart([&](int thread) {
        auto& product = local[thread].product;
        EPT_UNROLL
        for (int m = 0; m < M; ++m) {
          EPT_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int row = m * Unit::rows + Unit::row_of_a(thread % 32, i);
            split(left(thread, row, k + Unit::column_of_a(thread % 32, i)),
                  product.left_high[m][i], product.left_low[m][i]);
          }
        }
      });
      EPT_UNROLL
      for (int n = 0; n < N; ++n) {
        if (n >= pieces) continue;
        block.apart([&](int thread) {
          auto& product = local[thread].product;
          const int column = n * Unit::columns + Unit::column_of_b(thread % 32);
          EPT_UNROLL
          for (int i = 0; i < 2; ++i) {
            split(right(thread, k + Unit::row_of_b(thread % 32, i), column), product.right_high[i],
                  product.right_low[i]);
          }
        });
        EPT_UNROLL
        for (int m = 0; m < M; ++m) {
          if (!exact) {
            block.multiply([&](int thread) -> Unit {
              auto& product = local[thread].product;
              return {product.left_low[m], product.right_high, product.sums[m][n]};
            });
          }
          block.multiply([&](int thread) -> Unit {
            auto& product = local[thread].product;
            return {product.left_high[m], product.right_low, product.sums[m][n]};
          });
          block.multiply([&](int thread) -> Unit {
            auto& product = local[thread].product;
            return {product.left_high[m], product.right_high, product.sums[m][n]};
          });
        }
      }
    }
  } else {
    // The sum over this depth comes first: fewer roundings follow one another.
    block.apart([&](int thread) {
      auto& product = local[thread].product;
      EPT_UNROLL
      for (int m = 0; m < M; ++m) {
        float sums[N][4] = {};
        EPT_UNROLL_BY(2)
        for (int k = 0; k < depth; ++k) {
          EPT_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int row = m * Unit::rows + Unit::row_of_c(thread % 32, i);
            const float factor = left(thread, row, k);
            EPT_UNROLL
            for (int n = 0; n < N; ++n) {
              const int column = n * Unit::columns + Unit::column_of_c(thread % 32, i);
              sums[n][i] += factor * right(thread, k, column);
            }
          }
        }
        EPT_UNROLL
        for (int n = 0; n < N; ++n) {
          EPT_UNROLL
          for (int i = 0; i < 4; ++i) product.sums[m][n][i] += sums[n][i];
        }
      }
    });
  }
}

}  // namespace ept
