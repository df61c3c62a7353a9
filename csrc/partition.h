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
// the gradient itself if they are whole, else to a part of it in the workspace.
struct SplicePartition {
  int64_t groups;    // of rows: one task each, or one row each if there are fewer rows
  int64_t chunks_b;  // of the rows of a group
  int64_t rows;      // of a chunk
  int64_t chunks_s;  // of the positions
  int64_t tiles_s;   // of a chunk
  int64_t chunks_d;  // of the channels
  int64_t tiles_d;   // of a chunk
  bool whole_p, whole_a, whole_b;
  int64_t part_p, part_a, part_b;  // elements of all parts; 0 if they are whole
};

inline SplicePartition splice_partition(int64_t batch, int64_t length, int64_t tasks,
                                        int64_t tokens, int64_t width, int64_t rank,
                                        bool has_prompt, bool has_offset, int64_t tile_s,
                                        int64_t tile_d, int64_t ranks) {
  const int64_t blocks_s = greatest<int64_t>(1, pieces_of(length, tile_s));
  const int64_t blocks_d = pieces_of(width, tile_d);
  SplicePartition cut{};
  cut.groups = tasks == 1 ? 1 : least(tasks, batch);
  cut.chunks_b = 1;
  if (tasks == 1) {
    const int64_t wanted = pieces_of(enough_blocks, blocks_s * blocks_d);
    cut.chunks_b = within(1, wanted, pieces_of(batch, 4));
  }
  cut.chunks_d = blocks_d;
  cut.chunks_s =
      within(1, pieces_of(enough_blocks, blocks_d * cut.chunks_b * cut.groups), blocks_s);
  cut.tiles_d = 1;
  for (;;) {
    cut.rows = pieces_of(batch, cut.chunks_b);
    cut.chunks_b = pieces_of(batch, cut.rows);
    cut.tiles_s = pieces_of(blocks_s, cut.chunks_s);
    cut.chunks_s = pieces_of(blocks_s, cut.tiles_s);
    cut.chunks_d = pieces_of(blocks_d, cut.tiles_d);
    // What a block adds to step by step has to be float32, so it is whole only if it is one step.
    cut.whole_p = cut.chunks_b == 1;
    cut.whole_a = cut.chunks_b == 1 && cut.chunks_d == 1 && cut.tiles_d == 1;
    cut.whole_b =
        cut.chunks_b == 1 && cut.chunks_s == 1 && (cut.tiles_s == 1 || rank <= ranks);
    const int64_t parts = cut.groups * cut.chunks_b;
    cut.part_p = has_prompt && !cut.whole_p ? parts * tokens * width : 0;
    cut.part_a = has_offset && !cut.whole_a ? parts * cut.chunks_d * length * rank : 0;
    cut.part_b = has_offset && !cut.whole_b ? parts * cut.chunks_s * rank * width : 0;
    const int64_t bytes = 4 * (cut.part_p + cut.part_a + cut.part_b + batch * (length + 3));
    const int64_t blocks = parts * cut.chunks_s * cut.chunks_d;
    if (bytes <= workspace_limit || blocks < 2 * fewest_blocks) return cut;
    if (cut.chunks_b > 1) {
      cut.chunks_b = pieces_of(cut.chunks_b, 2);
    } else if (cut.part_a >= cut.part_b && cut.tiles_d < blocks_d) {
      cut.tiles_d *= 2;
    } else if (cut.chunks_s > 1) {
      cut.chunks_s = pieces_of(cut.chunks_s, 2);
    } else {
      return cut;
    }
  }
}

}  // namespace ept
