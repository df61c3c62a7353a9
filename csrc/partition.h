// How the work of a call is cut into blocks: from its sizes alone, never from the GPU at hand, since
// the cut decides the order of the sums.
#pragma once

#include "arithmetic.h"

namespace ept {

inline int64_t pieces_of(int64_t length, int64_t piece) { return (length + piece - 1) / piece; }

inline int64_t within(int64_t low, int64_t value, int64_t high) {
  return greatest(low, least(value, high));
}

// Blocks that fill the largest GPU of today, and what is left of them when memory has to be saved.
inline constexpr int64_t enough_blocks = 512;
inline constexpr int64_t fewest_blocks = 128;
inline constexpr int64_t workspace_limit = 8 << 20;  // bytes

// Places in the workspace, one after the other, each aligned to 16 bytes. Without a base it only
// counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t number) {
    T* place = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += (number * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return place;
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

// Operation 2, backward: rows, positions and channels are cut into chunks. The sums of a chunk go to
// the gradient itself if they are whole and it is float32, else to a part of it in the workspace.
struct SplicePartition {
  int64_t groups;    // of rows: one task each, or one row each if there are fewer rows
  int64_t chunks_b;  // of the rows of a group
  int64_t rows;      // of a chunk
  int64_t chunks_s;  // of the positions
  int64_t tiles_s;   // of a chunk
  int64_t chunks_d;  // of the channels
  int64_t tiles_d;   // of a chunk
  int64_t part_p, part_a, part_b;  // elements of all parts; 0: whole

  int64_t bytes() const { return 4 * (part_p + part_a + part_b); }
};

// The sizes of a call and of a tile.
struct SpliceSizes {
  int64_t batch, length, tasks, tokens, width, rank;
  bool has_prompt, has_offset;
  bool float_p, float_a, float_b;  // gradients of float32
  int64_t positions, channels;

  // The cut for about so many blocks that take so many tiles of channels each.
  SplicePartition cut(int64_t blocks, int64_t tiles_d) const {
    const int64_t blocks_s = has_offset ? pieces_of(length, positions) : 0;
    const int64_t blocks_m = has_prompt ? pieces_of(tokens, positions) : 0;
    SplicePartition cut{};
    cut.groups = tasks == 1 ? 1 : least(tasks, batch);
    cut.tiles_d = tiles_d;
    cut.chunks_d = pieces_of(pieces_of(width, channels), tiles_d);
    const int64_t wanted = pieces_of(blocks, cut.chunks_d * cut.groups);
    cut.tiles_s = pieces_of(greatest<int64_t>(1, blocks_s), within(1, wanted, blocks_s));
    cut.chunks_s = greatest<int64_t>(1, pieces_of(blocks_s, cut.tiles_s));
    // Of a bank the rows of a task are few; of one prompt a block adds up four or more.
    const int64_t chunks = tasks == 1 ? wanted / greatest<int64_t>(1, cut.chunks_s + blocks_m) : 1;
    cut.rows = pieces_of(batch, within(1, chunks, pieces_of(batch, 4)));
    cut.chunks_b = pieces_of(batch, cut.rows);
    const bool whole_p = float_p && cut.chunks_b == 1;
    const bool whole_a = float_a && cut.chunks_b == 1 && cut.chunks_d == 1;
    const bool whole_b = float_b && cut.chunks_b == 1 && cut.chunks_s == 1;
    const int64_t parts = cut.groups * cut.chunks_b;
    cut.part_p = has_prompt && !whole_p ? parts * tokens * width : 0;
    cut.part_a = has_offset && !whole_a ? parts * cut.chunks_d * length * rank : 0;
    cut.part_b = has_offset && !whole_b ? parts * cut.chunks_s * rank * width : 0;
    return cut;
  }
};

// As many blocks as their parts have memory for, up to two on each multiprocessor, and then as few
// tiles of channels for each: of dA a block adds these up in memory. The parts may take 15 MB, or
// an eighth of the gradient in 16 bits if that is more.
inline SplicePartition splice_partition(const SpliceSizes& sizes) {
  const int64_t limit =
      greatest<int64_t>(15 << 20, sizes.batch * sizes.length * sizes.width / 4 - (1 << 18));
  const int64_t most = pieces_of(sizes.width, sizes.channels);
  SplicePartition smallest{};
  for (int64_t blocks = 256; blocks >= fewest_blocks; blocks -= 16) {
    for (int64_t tiles_d = 1; tiles_d < 2 * most; tiles_d *= 2) {
      const SplicePartition cut = sizes.cut(blocks, least(tiles_d, most));
      if (cut.bytes() <= limit) return cut;
      if (smallest.groups == 0 || cut.bytes() < smallest.bytes()) smallest = cut;
    }
  }
  return smallest;
}

}  // namespace ept
