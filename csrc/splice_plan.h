// Operation 2, before its sums: where the tokens of each row lie, and which rows share a task.
//
// Of a row's columns, those of real tokens come first, in order, and those of its padding last, from
// the end: what follows goes by position, and each column is met exactly once whatever the mask is.
// Rows are sorted by task; rows of a task that the bank does not have come last, as task T.
#pragma once

#include "block.h"

namespace ept {

// What the plan says, in the workspace; null if there is no mask, or there are no task ids.
struct Plan {
  int32_t* columns = nullptr;  // [batch, S]: the column of each position, then of the padding
  int32_t* reals = nullptr;    // [batch]: how many tokens are real
  int32_t* rows = nullptr;     // [batch]: the rows by task
  int32_t* tasks = nullptr;    // [batch]: the tasks of these rows

  EPT_BOTH int column(int row, int position, int length) const {
    return columns == nullptr ? position : columns[int64_t{row} * length + position];
  }
  EPT_BOTH int reals_of(int row, int length) const {
    return reals == nullptr ? length : reals[row];
  }
  EPT_BOTH int row(int place) const { return rows == nullptr ? place : rows[place]; }
  EPT_BOTH int task(int place) const { return tasks == nullptr ? 0 : tasks[place]; }
};

struct SplicePlanCall {
  View attention_mask;
  View task_ids;
  Plan plan;
  int batch;
  int length;
  int tasks;
};

// The task at an index, T if the bank does not have it.
EPT_BOTH int task_of(const View& task_ids, int64_t row, int tasks) {
  const int64_t task = load_integer(task_ids.data, task_ids.type, row * task_ids.stride[0]);
  return task >= 0 && task < tasks ? static_cast<int>(task) : tasks;
}

// One block a row.
struct SplicePlanKernel {
  static constexpr const char* name = "splice_plan";
  static constexpr int threads = 256;
  static constexpr int each = 8;  // neighbouring columns of a thread
  static constexpr int group = 16;
  using Call = SplicePlanCall;

  struct Shared {
    int numbers[threads];
    int groups[threads / group + 1];
  };

  struct State {
    uint32_t real;
  };

  template <class B>
  EPT_DEVICE static void run(const B& block, Shared& shared, const Call& call) {
    const int row = static_cast<int>(block.index);
    if (call.plan.columns != nullptr) find_columns(block, shared, call, row);
    if (call.plan.rows != nullptr) find_place(block, shared, call, row);
  }

  template <class B>
  EPT_DEVICE static void find_columns(const B& block, Shared& shared, const Call& call, int row) {
    typename B::template Local<State> local;
    const View& mask = call.attention_mask;
    int32_t* columns = call.plan.columns + int64_t{row} * call.length;
    int seen = 0;  // real tokens so far
    for (int start = 0; start < call.length; start += threads * each) {
      block.each([&](int thread) {
        uint32_t real = 0;
        EPT_UNROLL
        for (int i = 0; i < each; ++i) {
          const int column = start + thread * each + i;
          if (column >= call.length) continue;
          const int64_t at = row * mask.stride[0] + column * mask.stride[1];
          if (load_integer(mask.data, mask.type, at) != 0) real |= 1u << i;
        }
        int number = 0;
        EPT_UNROLL
        for (int i = 0; i < each; ++i) number += (real >> i) & 1u;
        local[thread].real = real;
        shared.numbers[thread] = number;
      });
      const int total = sum_before(block, shared);
      block.each([&](int thread) {
        const uint32_t real = local[thread].real;
        int before = seen + shared.numbers[thread] + shared.groups[thread / group];
        EPT_UNROLL
        for (int i = 0; i < each; ++i) {
          const int column = start + thread * each + i;
          if (column >= call.length) continue;
          const bool is_real = (real >> i & 1u) != 0;
          columns[is_real ? before : call.length - 1 - (column - before)] = column;
          before += is_real;
        }
      });
      seen += total;
    }
    block.apart([&](int thread) {
      if (thread == 0) call.plan.reals[row] = seen;
    });
  }

  // Replaces the numbers by the sum of those before in their group, and fills in the sums before
  // the groups; returns the sum of all.
  template <class B>
  EPT_DEVICE static int sum_before(const B& block, Shared& shared) {
    constexpr int groups = threads / group;
    block.each([&](int thread) {
      if (thread >= groups) return;
      int sum = 0;
      for (int i = 0; i < group; ++i) {
        const int number = shared.numbers[thread * group + i];
        shared.numbers[thread * group + i] = sum;
        sum += number;
      }
      shared.groups[thread] = sum;
    });
    block.each([&](int thread) {
      if (thread != 0) return;
      int sum = 0;
      for (int i = 0; i < groups; ++i) {
        const int number = shared.groups[i];
        shared.groups[i] = sum;
        sum += number;
      }
      shared.groups[groups] = sum;
    });
    return block.agree([&] { return shared.groups[groups]; });
  }

  template <class B>
  EPT_DEVICE static void find_place(const B& block, Shared& shared, const Call& call, int row) {
    const int task = task_of(call.task_ids, row, call.tasks);
    block.each([&](int thread) {
      int before = 0;
      for (int other = thread; other < call.batch; other += threads) {
        const int its = task_of(call.task_ids, other, call.tasks);
        before += its < task || (its == task && other < row);
      }
      shared.numbers[thread] = before;
    });
    const int place = sum_of(block, shared.numbers);
    block.apart([&](int thread) {
      if (thread != 0) return;
      call.plan.rows[place] = row;
      call.plan.tasks[place] = task;
    });
  }
};

}  // namespace ept
