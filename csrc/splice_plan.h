// Operation 2, before its sums: where the tokens of each row lie, and which rows share a task.
//
// Position p of a row is its p-th real token; the positions past the last one stand for its
// padding, so that each column is met by exactly one position. If the real tokens are one stretch, a column
// follows from where that begins; of a row with padding in between, the columns are written down.
// Rows are sorted by task; rows of a task that the bank does not have come last, as task T.
#pragma once

#include "arithmetic.h"
#include "block.h"

namespace ept {

// What the plan says of a row's text.
struct TextRow {
  int row;
  int first;           // the column of its first real token; -1: padding lies between them
  int reals;           // how many tokens are real
  const int* columns;  // of its positions, if padding lies between them

  EPT_BOTH int column(int position) const {
    if (first < 0) return columns[position];
    const int padding = position - reals;
    return padding < 0 ? first + position : padding < first ? padding : position;
  }
};

// The plan, in the workspace; null if there is no mask, or there are no task ids.
struct Plan {
  int32_t* firsts = nullptr;   // [batch]
  int32_t* reals = nullptr;    // [batch]
  int32_t* columns = nullptr;  // [batch, S]: real tokens in order, then padding
  int32_t* rows = nullptr;     // [batch]: the rows by task
  int32_t* tasks = nullptr;    // [batch]: the tasks of these rows
  int32_t* begins = nullptr;   // [T + 2]: how many rows have a task before each

  EPT_BOTH int row(int place) const { return rows == nullptr ? place : rows[place]; }
  EPT_BOTH int task(int place) const { return tasks == nullptr ? 0 : tasks[place]; }
  EPT_BOTH int end_of(int task, int batch) const {
    return begins == nullptr ? batch : begins[task + 1];
  }
  // A row of the prompt, whose tokens lie where they lie, or of the text.
  EPT_BOTH TextRow prompt(int place, int tokens) const { return {row(place), 0, tokens, nullptr}; }
  EPT_BOTH TextRow text(int place, int length) const {
    const int its = row(place);
    if (firsts == nullptr) return {its, 0, length, nullptr};
    return {its, firsts[its], reals[its], columns + int64_t{its} * length};
  }
};

// What every kernel sees of a call.
struct SpliceCall {
  View offset_a, offset_b;
  Plan plan;
  int batch, length, tasks, tokens, width;
  int rank;  // 0 without the offset
  float scaling;
};

struct SplicePlanCall : SpliceCall {
  View attention_mask, task_ids;
  int stretch;  // The grid: the rows, then stretches of so many columns.
};

// A block has a stretch of a row. It counts the tokens of the whole row itself, so that no block
// waits for another.
struct SplicePlanKernel {
  static constexpr const char* name = "splice_plan";
  static constexpr int threads = 256;
  static constexpr int each = 8;  // neighbouring columns of a thread
  static constexpr int step = threads * each;
  static constexpr int group = 16, groups = threads / group;
  using Call = SplicePlanCall;

  // Real tokens of a row: all, those before the stretch, the first column, the one past the last.
  struct Tokens {
    int total, before, first, past;
  };
  // Rows with a lower task, with the same, those of them before this one; the next higher task.
  struct Order {
    int lower, same, before, next;
  };

  struct Shared {
    Tokens tokens[threads];
    Order orders[threads];
    int numbers[threads];
    int sums[groups];
  };

  struct State {
    uint32_t real;
  };

  template <class B>
  EPT_DEVICE static void run(const B& block, Shared& shared, const Call& call) {
    Digits digits{block.index};
    const int row = digits.next(call.batch), stretch = static_cast<int>(digits.rest);
    if (call.plan.rows != nullptr && stretch == 0) sort(block, shared, call, row);
    if (call.plan.firsts != nullptr) find_tokens(block, shared, call, row, stretch * call.stretch);
  }

  template <class B>
  EPT_DEVICE static void find_tokens(const B& block, Shared& shared, const Call& call, int row,
                                     int begin) {
    const View& mask = call.attention_mask;
    block.each([&](int thread) {
      Tokens tokens{0, 0, call.length, 0};
      const auto count = [&](int column, bool is_real) {
        if (!is_real) return;
        ++tokens.total;
        tokens.before += column < begin;
        tokens.first = least(tokens.first, column);
        tokens.past = greatest(tokens.past, column + 1);
      };
      with_integers(mask, [&]<class Integer>(const Integer* data) {
        struct alignas(sizeof(Integer) == 1 ? 8 : 16) Eight {
          Integer value[each];
        };
        data += row * mask.stride[0];
        const bool is_wide =
            mask.stride[1] == 1 && reinterpret_cast<uintptr_t>(data) % alignof(Eight) == 0;
        const int eights = is_wide ? call.length / each : 0;
        EPT_UNROLL_BY(4)
        for (int i = thread; i < eights; i += threads) {
          const Eight eight = reinterpret_cast<const Eight*>(data)[i];
          EPT_UNROLL
          for (int j = 0; j < each; ++j) count(i * each + j, eight.value[j] != 0);
        }
        EPT_UNROLL_BY(4)
        for (int column = eights * each + thread; column < call.length; column += threads) {
          count(column, data[column * mask.stride[1]] != 0);
        }
      });
      shared.tokens[thread] = tokens;
    });
    const Tokens tokens = fold_of(block, shared.tokens, [](Tokens& all, const Tokens& some) {
      all.total += some.total;
      all.before += some.before;
      all.first = least(all.first, some.first);
      all.past = greatest(all.past, some.past);
    });
    const bool has_holes = tokens.past - tokens.first > tokens.total;
    block.apart([&](int thread) {
      if (thread != 0 || begin != 0) return;
      call.plan.firsts[row] = has_holes ? -1 : least(tokens.first, tokens.past);
      call.plan.reals[row] = tokens.total;
    });
    if (has_holes) write_columns(block, shared, call, row, begin, tokens.before);
  }

  // The columns of a stretch, of which the first comes after `seen` real tokens: the places of
  // padding are counted from the end.
  template <class B>
  EPT_DEVICE static void write_columns(const B& block, Shared& shared, const Call& call, int row,
                                       int begin, int seen) {
    typename B::template Local<State> local;
    const View& mask = call.attention_mask;
    int32_t* columns = call.plan.columns + int64_t{row} * call.length;
    const int end = least(begin + call.stretch, call.length);
    for (int start = begin; start < end; start += step) {
      block.each([&](int thread) {
        uint32_t real = 0;
        int number = 0;
        with_integers(mask, [&](const auto* data) {
          EPT_UNROLL
          for (int i = 0; i < each; ++i) {
            const int column = start + thread * each + i;
            if (column >= call.length) continue;
            const bool is_real = data[row * mask.stride[0] + column * mask.stride[1]] != 0;
            real |= uint32_t{is_real} << i;
            number += is_real;
          }
        });
        local[thread].real = real;
        shared.numbers[thread] = number;
      });
      block.each([&](int thread) {
        if (thread >= groups) return;
        int sum = 0;
        for (int i = 0; i < group; ++i) sum += shared.numbers[thread * group + i];
        shared.sums[thread] = sum;
      });
      block.each([&](int thread) {
        const uint32_t real = local[thread].real;
        int before = seen;
        for (int i = 0; i < thread / group; ++i) before += shared.sums[i];
        for (int i = thread / group * group; i < thread; ++i) before += shared.numbers[i];
        EPT_UNROLL
        for (int i = 0; i < each; ++i) {
          const int column = start + thread * each + i;
          if (column >= call.length) continue;
          const bool is_real = (real >> i & 1u) != 0;
          columns[is_real ? before : call.length - 1 - (column - before)] = column;
          before += is_real;
        }
      });
      seen += block.agree([&] {
        int sum = 0;
        for (int i = 0; i < groups; ++i) sum += shared.sums[i];
        return sum;
      });
    }
  }

  // The place of a row, and if it is the first of its task where this task and the tasks without
  // rows after it begin.
  template <class B>
  EPT_DEVICE static void sort(const B& block, Shared& shared, const Call& call, int row) {
    const View& ids = call.task_ids;
    const auto known = [&](int64_t task) {
      return task >= 0 && task < call.tasks ? static_cast<int>(task) : call.tasks;
    };
    const int task = known(load_integer(ids.data, ids.type, row * ids.stride[0]));
    block.each([&](int thread) {
      Order order{0, 0, 0, call.tasks + 1};
      with_integers(ids, [&](const auto* data) {
        EPT_UNROLL_BY(4)
        for (int other = thread; other < call.batch; other += threads) {
          const int its = known(data[other * ids.stride[0]]);
          order.lower += its < task;
          order.same += its == task;
          order.before += its == task && other < row;
          if (its > task) order.next = least(order.next, its);
        }
      });
      shared.orders[thread] = order;
    });
    const Order order = fold_of(block, shared.orders, [](Order& all, const Order& some) {
      all.lower += some.lower;
      all.same += some.same;
      all.before += some.before;
      all.next = least(all.next, some.next);
    });
    block.apart([&](int thread) {
      if (thread == 0) {
        call.plan.rows[order.lower + order.before] = row;
        call.plan.tasks[order.lower + order.before] = task;
      }
      if (order.before > 0) return;
      const int from = order.lower == 0 ? 0 : task + 1;
      for (int its = from + thread; its <= order.next; its += threads) {
        call.plan.begins[its] = its <= task ? 0 : order.lower + order.same;
      }
    });
  }
};

}  // namespace ept
