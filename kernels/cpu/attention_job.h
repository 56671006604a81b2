// One call of attention in latent space: how it is cut into tasks, and what a task works on.
// attention.cc computes, attention_plan.cc cuts.
#pragma once

#include <algorithm>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/cpu_device.h"

namespace dsv3::kernels {

// Where the parts of a worker's scratch lie.
struct AttentionScratch {
  std::byte* queries;  // [kMaxQueries][latent_dim, padded] native
  std::byte* inputs;   // [kQueryRows][k, padded]: of W_UK and W_UV
  std::byte* weights;  // [kMaxQueries][kKeyBlock] native: the probabilities of a key block
  std::byte* values;   // BF16 [kKeyBlock/2][64][2]: 64 columns of a key block, rearranged
  float* scores;       // [kMaxQueries][kKeyBlock]
  float* part;         // [kMaxQueries][kv_lora_rank, padded]: of the current split
  float* total;        // [kMaxQueries][kv_lora_rank, padded]: of the splits before it
  float *max, *sum, *total_max, *total_sum, *keep;  // [kMaxQueries]
  const void** query_rows;                          // [kMaxQueries]
  const void** weight_rows;                         // [kMaxQueries]
  const void** input_rows;                          // [kQueryRows]
  size_t query_bytes, input_bytes, weight_bytes;    // of one row
  int64_t value_columns;                            // kv_lora_rank, padded
  size_t bytes = 0;

  AttentionScratch(const MlaShape& s, Activation native, std::byte* base) {
    value_columns = round64(s.kv_lora_rank);
    query_bytes = attention_query_bytes(s, native);
    input_bytes = attention_input_bytes(s);
    weight_bytes = kKeyBlock * native_bytes(native);
    const ScratchCutter take{base, &bytes};
    const auto columns = static_cast<size_t>(value_columns);
    take(&queries, kMaxQueries * query_bytes);
    take(&inputs, kQueryRows * input_bytes);
    take(&weights, kMaxQueries * weight_bytes);
    take(&values, size_t{64} * kKeyBlock * sizeof(uint16_t));
    take(&scores, size_t{kMaxQueries} * kKeyBlock);
    take(&part, kMaxQueries * columns);
    take(&total, kMaxQueries * columns);
    for (float** p : {&max, &sum, &total_max, &total_sum, &keep}) take(p, kMaxQueries);
    take(&query_rows, kMaxQueries);
    take(&weight_rows, kMaxQueries);
    take(&input_rows, kQueryRows);
  }
};

struct AttentionJob {
  CpuDevice* device;
  const MlaAttentionArgs* args;
  int32_t row_step, head_step;
  int32_t shared_rows = 0;  // of all sequences that are absorbed and projected together
  int32_t most_shared = kSharedRows;
  bool by_splits = false;        // these sequences' splits are tasks of their own
  int32_t shared_head_step = 1;  // then: heads of such a task
  int64_t attend_tasks = 0;

  // Rows [begin, end) of a sequence and heads [first_head, first_head + heads).
  struct Block {
    const SequenceRows* seq;
    int32_t begin, end, first_head, heads;
    int32_t shared;  // index of the sequence's first row among the shared ones, -1: not shared
    int32_t rows() const { return end - begin; }
    int32_t queries() const { return rows() * heads; }
    int64_t first_position() const { return seq->first_position + begin; }
    int64_t keys() const { return seq->first_position + end; }
  };

  size_t share_rows();
  bool has_long_shared() const;
  int64_t tasks() const;
  void choose_rows(int32_t most_rows);
  void choose_heads();
  static void absorb_task(void* context, int index, int worker);
  static void attend_task(void* context, int index, int worker);
  static void project_task(void* context, int index, int worker);
  AttentionScratch scratch_of(int worker) const {
    return {args->shape, device->micro_->native,
            device->workers_[static_cast<size_t>(worker)].attention.get()};
  }
  // Pages that will probably be read next, null where there is none.
  struct PagesAhead {
    const uint8_t* pages[2] = {};
  };
  PagesAhead pages_at(const Block& block, int64_t key) const {
    PagesAhead ahead;
    for (int i = 0; i < 2; ++i, key += kPageKeys) {
      if (key < block.keys()) ahead.pages[i] = page(block, key);
    }
    return ahead;
  }
  // What a task attends to: a block's keys, or those of one split.
  struct Part {
    Block block;
    int64_t split;  // -1: all keys
  };
  Part part_of(int64_t index) const;
  void attend(const Block& block, const PagesAhead& after, int worker) const;
  // The same for the keys of one split alone, up to their part of the result.
  void attend_split(const Block& block, int64_t split, const PagesAhead& after, int worker) const;
  // then: what the thread will probably go on with.
  void attend_keys(const Block& b, AttentionScratch& s, int64_t split, const PagesAhead& then,
                   int worker) const;
  // Up to kKeyBlock keys of a split.
  struct KeyBlock {
    int64_t begin;
    PagesAhead next;
    int32_t pages;
    int32_t first;  // query that attends to any of them
    bool fresh;     // the split's first: nothing is in `part` yet
  };
  void fetch_part(const PagesAhead& ahead, int32_t index, int32_t calls, PanelArgs* p) const;
  void score(const Block& b, AttentionScratch& s, const KeyBlock& keys, int worker) const;
  void weigh(const Block& b, AttentionScratch& s, const KeyBlock& keys) const;
  void add_values(const Block& b, AttentionScratch& s, const KeyBlock& keys, int worker) const;
  void join(const Block& block, AttentionScratch& s, int32_t first, bool only) const;
  // The same for one query: its total and what belongs to it, and a part with its max and sum.
  void join(AttentionScratch& s, int32_t query, const float* part, float max, float sum,
            bool only) const;
  // queries = (W_UK q_nope, q_rope) of a head and `rows` rows, rounded. row_of(r) is a row of the
  // batch, query_of(r) where its query goes.
  void pack_input(const Matrix& w, const float* x, std::byte* input) const;
  template <class RowOf, class QueryOf>
  void absorb(int32_t head, int32_t rows, RowOf row_of, QueryOf query_of, AttentionScratch& s,
              int worker) const;
  // input = total / sum of query q, rounded for W_UV.
  void normalise(int32_t head, int32_t q, AttentionScratch& s, std::byte* input) const;
  // out = W_UV s.input_rows
  template <class RowOf>
  void project(int32_t head, int32_t rows, RowOf row_of, AttentionScratch& s, int worker) const;
  bool rows_must_part(const Block& block) const;
  // Is this sequence, after `before` shared rows, one of those?
  bool shares(const SequenceRows& seq, int32_t before) const {
    return seq.rows <= kFewRows && before + seq.rows <= most_shared;
  }
  int64_t first_split() const { return split_of(args->first_key); }
  int64_t splits_of(const SequenceRows& seq) const {
    return split_of(seq.first_position + seq.rows - 1) + 1 - first_split();
  }
  // Tasks of the phase that attends, for a sequence; and those of them that differ in heads alone.
  int32_t head_blocks(bool shared) const {
    const int32_t step = by_splits && shared ? shared_head_step : head_step;
    return (args->shape.heads + step - 1) / step;
  }
  int64_t tasks_of(const SequenceRows& seq, bool shared) const {
    const int64_t blocks = (seq.rows + row_step - 1) / row_step;
    return (by_splits && shared ? splits_of(seq) : blocks) * head_blocks(shared);
  }
  // A shared row's part of a head's result from a split (counted from its first): [columns], max,
  // sum.
  float* part_of(int32_t i, int32_t head, int64_t split) const {
    const int64_t index =
        (device->attention_first_part_[static_cast<size_t>(i)] + split) * args->shape.heads + head;
    return device->attention_parts_.get() +
           static_cast<size_t>(index) * attention_part_floats(args->shape);
  }
  int32_t parts_of(int32_t i) const {
    const auto at = static_cast<size_t>(i);
    return device->attention_first_part_[at + 1] - device->attention_first_part_[at];
  }
  int64_t shared_row(int32_t i) const { return device->attention_rows_[static_cast<size_t>(i)]; }
  // The query of a shared row, and its values on their way into W_UV.
  std::byte* shared_query(int32_t i, int32_t head) const {
    return device->attention_queries_.get() +
           static_cast<size_t>(i * args->shape.heads + head) *
               attention_query_bytes(args->shape, device->micro_->native);
  }
  std::byte* shared_input(int32_t i, int32_t head) const {
    return device->attention_inputs_.get() +
           static_cast<size_t>(i * args->shape.heads + head) * attention_input_bytes(args->shape);
  }
  const uint8_t* page(const Block& block, int64_t key) const {
    return reinterpret_cast<const uint8_t*>(block.seq->pages[key / kPageKeys].get()) +
           args->page_offset;
  }
  // The first row of the block that attends to a key at or after `key`, as a query's index.
  int32_t first_query(const Block& block, int64_t key) const {
    return static_cast<int32_t>(std::max<int64_t>(0, key - block.first_position())) * block.heads;
  }
  // A head's W times the rows of `s.input_rows`; use(row, column, count, values) gets the results.
  template <class Use>
  void multiply(std::span<const Matrix> heads, int32_t head, AttentionScratch& s, int32_t rows,
                int worker, Use use) const;
};

}  // namespace dsv3::kernels
