// Multi-head latent attention. A task takes some rows of one sequence and some heads: it absorbs
// W_UK into their queries, goes through the pages block by block (scores, softmax, values), and
// applies W_UV. So there is no barrier at all.
//
// Where several sequences have a few rows each (decoding side by side), that would read W_UK and
// W_UV once for each of them: their rows are absorbed and projected together, head by head, in a
// phase before and one after. And where such a sequence is long, a task takes one split of its keys
// and leaves its part of the result to the last phase, which joins them in order: so one sequence
// is enough for many threads, and no thread reads what another has read. The bits are the same.
//
// A latent page is BF16 [dim pair][64 keys][2 dims]: scores are dot products over dims with the
// keys in the lanes. For the weighted sum a block's latents are rearranged to [key pair][dim][2
// keys] in scratch, once per task and block, 64 dims at a time.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/attention_job.h"

namespace dsv3::kernels {

namespace {

// With more, fetching costs what it gains: prompts of 2,048 ran at 0.96 of their speed.
constexpr int32_t kFetchQueries = 32;
// Cache lines of one dim pair of a page's keys.
constexpr int64_t kPageLines = kPageKeys * 2 * sizeof(uint16_t) / kCacheLine;

}  // namespace

bool any_not_finite(const uint8_t* page, int32_t pairs, int64_t begin, int64_t end) {
  bool found = false;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int64_t key = begin; key < end; ++key) {
      uint32_t v;
      std::memcpy(&v, page + (pair * kPageKeys + key) * 4, 4);
      found |= (v & 0x7f80u) == 0x7f80u || (v & 0x7f800000u) == 0x7f800000u;
    }
  }
  return found;
}

size_t attention_query_bytes(const MlaShape& shape, Activation native) {
  return static_cast<size_t>(round64(even(shape.latent_dim()))) * native_bytes(native);
}

size_t attention_part_floats(const MlaShape& shape) {
  return static_cast<size_t>(round64(shape.kv_lora_rank)) + kCacheLine / sizeof(float);
}

size_t attention_input_bytes(const MlaShape& shape) {
  return static_cast<size_t>(round64(std::max(shape.qk_nope_head_dim, shape.kv_lora_rank))) *
         sizeof(float);
}

size_t attention_scratch_bytes(const MlaShape& shape, Activation native) {
  return AttentionScratch(shape, native, nullptr).bytes;
}

template <class Use>
void AttentionJob::multiply(std::span<const Matrix> heads, int32_t head, AttentionScratch& s,
                            int32_t rows, int worker, Use use) const {
  const Matrix& w = heads[static_cast<size_t>(head)];
  // Threads that are as fast as each other take turns.
  const auto then = static_cast<size_t>(head + device->threads());
  const uint8_t* after = then < heads.size() ? tile_data(heads[then], 0) : nullptr;
  auto& scratch = device->workers_[static_cast<size_t>(worker)];
  GemmArgs g;
  g.w = tiled(w);
  g.rows = rows;
  g.x = s.input_rows;
  g.out = scratch.panel.get();
  g.out_stride = kGroupColumns;
  g.scratch = scratch.gemm.get();
  const auto tiles = static_cast<int32_t>(tiles_of(w.n));
  for (g.tile = 0; g.tile < tiles; g.tile += kGroupTiles) {
    g.tiles = std::min(kGroupTiles, tiles - g.tile);
    g.next = g.tile + g.tiles < tiles ? tile_data(w, g.tile + g.tiles) : after;
    device->micro_->gemm(g);
    const int32_t column = g.tile * kTileN;
    const int32_t count = std::min(g.tiles * kTileN, w.n - column);
    for (int32_t r = 0; r < rows; ++r) use(r, column, count, g.out + r * g.out_stride);
  }
}

void AttentionJob::pack_input(const Matrix& w, const float* x, std::byte* input) const {
  const Activation type = activation_for(*device->micro_, w);
  device->micro_->pack(type, x, w.k, packed_values(type, w.k), input);
}

template <class RowOf, class QueryOf>
void AttentionJob::absorb(int32_t head, int32_t rows, RowOf row_of, QueryOf query_of,
                          AttentionScratch& s, int worker) const {
  const MlaShape& shape = args->shape;
  const Micro& micro = *device->micro_;
  const size_t size = native_bytes(micro.native);
  const int32_t rope_padded = even(shape.latent_dim()) - shape.kv_lora_rank;
  const Matrix& w = args->w_uk[static_cast<size_t>(head)];
  for (int32_t r = 0; r < rows; ++r) {
    const float* q = args->q.get() + (row_of(r) * shape.heads + head) * shape.qk_head_dim();
    std::byte* input = s.inputs + static_cast<size_t>(r) * s.input_bytes;
    pack_input(w, q, input);
    s.input_rows[r] = input;
    micro.pack(micro.native, q + shape.qk_nope_head_dim, shape.qk_rope_head_dim, rope_padded,
               query_of(r) + static_cast<size_t>(shape.kv_lora_rank) * size);
  }
  const auto keep = [&](int32_t r, int32_t column, int32_t count, const float* v) {
    micro.pack(micro.native, v, count, count, query_of(r) + static_cast<size_t>(column) * size);
  };
  multiply(args->w_uk, head, s, rows, worker, keep);
}

// scores of the queries against a block of keys.
void AttentionJob::score(const Block& b, AttentionScratch& s, const KeyBlock& keys,
                         int worker) const {
  PanelArgs p;
  p.scratch = device->workers_[static_cast<size_t>(worker)].gemm.get();
  p.pairs = even(args->shape.latent_dim()) / 2;
  p.rows = b.queries() - keys.first;
  p.x = s.query_rows + keys.first;
  p.out_stride = kKeyBlock;
  for (int32_t i = 0; i < keys.pages; ++i) {
    const int64_t first_key = keys.begin + i * kPageKeys;
    p.w = page(b, first_key);
    p.columns = static_cast<int32_t>(std::min<int64_t>(b.keys() - first_key, kPageKeys));
    p.out = s.scores + int64_t{keys.first} * kKeyBlock + i * kPageKeys;
    device->micro_->panel(p);
  }
}

// weights, max, sum and keep from the scores.
void AttentionJob::weigh(const Block& b, AttentionScratch& s, const KeyBlock& keys) const {
  const auto from =
      static_cast<int32_t>(std::clamp<int64_t>(args->first_key - keys.begin, 0, kKeyBlock));
  for (int32_t q = keys.first; q < b.queries(); ++q) {
    const int64_t last = b.first_position() + q / b.heads;
    const auto to = static_cast<int32_t>(std::min<int64_t>(last + 1 - keys.begin, kKeyBlock));
    std::byte* weights = s.weights + static_cast<size_t>(q) * s.weight_bytes;
    s.keep[q] = device->micro_->softmax(s.scores + int64_t{q} * kKeyBlock, from, to,
                                        args->softmax_scale, s.max + q, s.sum + q, weights);
    s.weight_rows[q] = weights;
  }
}

// Of the pages ahead, what call `index` of `calls` fetches: the first half of them the first page.
void AttentionJob::fetch_part(const PagesAhead& ahead, int32_t index, int32_t calls,
                              PanelArgs* p) const {
  const int32_t half = (calls + 1) / 2;
  const bool first = index < half;
  const uint8_t* page = ahead.pages[first ? 0 : 1];
  p->next = nullptr;
  if (page == nullptr) return;
  const int64_t lines = even(args->shape.latent_dim()) / 2 * kPageLines;
  const int32_t of = first ? half : calls - half;
  const int32_t at = first ? index : index - half;
  const int64_t begin = lines * at / of;
  p->next = page + begin * static_cast<int64_t>(kCacheLine);
  p->next_lines = static_cast<int32_t>(lines * (at + 1) / of - begin);
}

// part = part * keep + weights times the block's latents. 64 columns at a time, so that what is
// rearranged is still in L1 when it is multiplied: all at once took twice the time.
void AttentionJob::add_values(const Block& b, AttentionScratch& s, const KeyBlock& keys,
                              int worker) const {
  PanelArgs p;
  p.scratch = device->workers_[static_cast<size_t>(worker)].gemm.get();
  p.w = reinterpret_cast<const uint8_t*>(s.values);
  p.pairs = static_cast<int32_t>(std::min<int64_t>(b.keys() - keys.begin, kKeyBlock) + 1) / 2;
  p.rows = b.queries() - keys.first;
  p.x = s.weight_rows + keys.first;
  p.out_stride = s.value_columns;
  p.keep = keys.fresh ? nullptr : s.keep + keys.first;
  // With few queries a block is done with sooner than memory brings the next one: the first half
  // of these calls fetches its first page, the second half its second one.
  const bool fetch = p.rows <= kFetchQueries;
  const auto calls = static_cast<int32_t>(s.value_columns / 64);
  for (int32_t column = 0; column < s.value_columns; column += 64) {
    for (int32_t i = 0; i < keys.pages; ++i) {
      const int64_t page_key = keys.begin + i * kPageKeys;
      const auto in_page = [&](int64_t k) {
        return static_cast<int32_t>(std::clamp<int64_t>(k - page_key, 0, kPageKeys));
      };
      device->micro_->values(page(b, page_key) + int64_t{column} * kPageKeys * 2,
                             std::min(64, args->shape.kv_lora_rank - column),
                             in_page(args->first_key), in_page(b.keys()), i * kPageKeys / 2,
                             kKeyBlock / 2, reinterpret_cast<uint8_t*>(s.values));
    }
    if (fetch) fetch_part(keys.next, column / 64, calls, &p);
    p.out = s.part + keys.first * s.value_columns + column;
    device->micro_->panel(p);
  }
}

// part, max and sum of the split's keys that the block has.
void AttentionJob::attend_keys(const Block& b, AttentionScratch& s, int64_t split,
                               const PagesAhead& then, int worker) const {
  const int64_t begin = split_begin(split);
  const int64_t end = std::min(split_begin(split + 1), b.keys());
  const int32_t split_first = first_query(b, begin);
  std::fill(s.max + split_first, s.max + b.queries(), -std::numeric_limits<float>::infinity());
  std::fill(s.sum + split_first, s.sum + b.queries(), 0.0f);
  for (int64_t key = begin; key < end; key += kKeyBlock) {
    const KeyBlock keys = {.begin = key,
                           .next = key + kKeyBlock < end ? pages_at(b, key + kKeyBlock) : then,
                           .pages = key + kPageKeys < b.keys() ? 2 : 1,
                           .first = first_query(b, key),
                           .fresh = key == begin};
    score(b, s, keys, worker);
    weigh(b, s, keys);
    add_values(b, s, keys, worker);
  }
}

// Joins the current split to the total of those before it. only: there are none.
void AttentionJob::join(const Block& b, AttentionScratch& s, int32_t first, bool only) const {
  for (int32_t q = first; q < b.queries(); ++q) {
    join(s, q, s.part + q * s.value_columns, s.max[q], s.sum[q], only);
  }
}

void AttentionJob::join(AttentionScratch& s, int32_t query, const float* part, float max, float sum,
                        bool only) const {
  float* total = s.total + query * s.value_columns;
  float& total_max = s.total_max[query];
  float& total_sum = s.total_sum[query];
  if (only) {
    std::copy_n(part, s.value_columns, total);
    total_max = max;
    total_sum = sum;
    return;
  }
  const float both = std::max(total_max, max);
  const float a = std::exp(total_max - both);
  const float c = std::exp(max - both);
  device->micro_->merge(total, a, part, c, static_cast<int32_t>(s.value_columns));
  total_sum = total_sum * a + sum * c;
  total_max = both;
}

void AttentionJob::normalise(int32_t head, int32_t q, AttentionScratch& s, std::byte* input) const {
  const Matrix& w = args->w_uv[static_cast<size_t>(head)];
  float* total = s.total + q * s.value_columns;
  const float norm = s.total_sum[q] == 0 ? 0.0f : 1.0f / s.total_sum[q];
  for (int32_t i = 0; i < args->shape.kv_lora_rank; ++i) total[i] *= norm;
  pack_input(w, total, input);
}

template <class RowOf>
void AttentionJob::project(int32_t head, int32_t rows, RowOf row_of, AttentionScratch& s,
                           int worker) const {
  const MlaShape& shape = args->shape;
  const auto keep = [&](int32_t r, int32_t column, int32_t count, const float* v) {
    std::copy_n(v, count,
                args->out.get() + (row_of(r) * shape.heads + head) * shape.v_head_dim + column);
  };
  multiply(args->w_uv, head, s, rows, worker, keep);
}

// A later row's latent weighs nothing in an earlier row, but zero times NaN or infinity is NaN:
// then the rows go one by one.
bool AttentionJob::rows_must_part(const Block& b) const {
  const int32_t pairs = even(args->shape.latent_dim()) / 2;
  for (int64_t key = b.first_position() + 1; key < b.keys();) {
    const int64_t page_begin = key / kPageKeys * kPageKeys;
    const int64_t page_end = std::min(b.keys(), page_begin + kPageKeys);
    if (any_not_finite(page(b, key), pairs, key - page_begin, page_end - page_begin)) return true;
    key = page_end;
  }
  return false;
}

void AttentionJob::attend(const Block& block, const PagesAhead& after, int worker) const {
  if (block.rows() > 1 && rows_must_part(block)) {
    for (int32_t row = block.begin; row < block.end; ++row) {
      attend({block.seq, row, row + 1, block.first_head, block.heads, block.shared}, {}, worker);
    }
    return;
  }
  AttentionScratch s = scratch_of(worker);
  const bool shared = block.shared >= 0;
  const auto row_of = [&](int32_t r) -> int64_t { return block.seq->row_begin + block.begin + r; };
  for (int32_t h = 0; h < block.heads; ++h) {
    const int32_t head = block.first_head + h;
    const auto query_of = [&](int32_t r) {
      return shared ? shared_query(block.shared + block.begin + r, head)
                    : s.queries + static_cast<size_t>(r * block.heads + h) * s.query_bytes;
    };
    for (int32_t r = 0; r < block.rows(); ++r) s.query_rows[r * block.heads + h] = query_of(r);
    if (!shared) absorb(head, block.rows(), row_of, query_of, s, worker);
  }
  for (int64_t split = first_split(); split_begin(split) < block.keys(); ++split) {
    const int64_t then = split_begin(split + 1);
    attend_keys(block, s, split, then < block.keys() ? pages_at(block, then) : after, worker);
    join(block, s, first_query(block, split_begin(split)), split == first_split());
  }
  for (int32_t h = 0; h < block.heads; ++h) {
    const int32_t head = block.first_head + h;
    for (int32_t r = 0; r < block.rows(); ++r) {
      std::byte* input = shared ? shared_input(block.shared + block.begin + r, head)
                                : s.inputs + static_cast<size_t>(r) * s.input_bytes;
      normalise(head, r * block.heads + h, s, input);
      s.input_rows[r] = input;
    }
    if (!shared) project(head, block.rows(), row_of, s, worker);
  }
}

void AttentionJob::attend_split(const Block& block, int64_t split, const PagesAhead& after,
                                int worker) const {
  if (block.rows() > 1 && rows_must_part(block)) {
    for (int32_t row = block.begin; row < block.end; ++row) {
      const Block alone{block.seq, row, row + 1, block.first_head, block.heads, block.shared};
      if (split_begin(split) < alone.keys()) attend_split(alone, split, {}, worker);
    }
    return;
  }
  AttentionScratch s = scratch_of(worker);
  for (int32_t q = 0; q < block.queries(); ++q) {
    s.query_rows[q] = shared_query(block.shared + block.begin + q / block.heads,
                                   block.first_head + q % block.heads);
  }
  attend_keys(block, s, split, after, worker);
  for (int32_t q = first_query(block, split_begin(split)); q < block.queries(); ++q) {
    float* part = part_of(block.shared + block.begin + q / block.heads,
                          block.first_head + q % block.heads, split - first_split());
    std::copy_n(s.part + q * s.value_columns, s.value_columns, part);
    part[s.value_columns] = s.max[q];
    part[s.value_columns + 1] = s.sum[q];
  }
}

// One head and up to kQueryRows of the shared rows.
void AttentionJob::absorb_task(void* context, int index, int worker) {
  const AttentionJob& job = *static_cast<AttentionJob*>(context);
  AttentionScratch s = job.scratch_of(worker);
  const int32_t head = index % job.args->shape.heads;
  const int32_t first = index / job.args->shape.heads * kQueryRows;
  job.absorb(
      head, std::min(kQueryRows, job.shared_rows - first),
      [&](int32_t r) { return job.shared_row(first + r); },
      [&](int32_t r) { return job.shared_query(first + r, head); }, s, worker);
}

void AttentionJob::project_task(void* context, int index, int worker) {
  const AttentionJob& job = *static_cast<AttentionJob*>(context);
  AttentionScratch s = job.scratch_of(worker);
  const int32_t head = index % job.args->shape.heads;
  const int32_t first = index / job.args->shape.heads * kQueryRows;
  const int32_t rows = std::min(kQueryRows, job.shared_rows - first);
  for (int32_t r = 0; r < rows; ++r) {
    const int32_t i = first + r;
    std::byte* input = job.shared_input(i, head);
    if (job.by_splits) {
      for (int32_t p = 0; p < job.parts_of(i); ++p) {
        const float* part = job.part_of(i, head, p);
        job.join(s, 0, part, part[s.value_columns], part[s.value_columns + 1], p == 0);
      }
      job.normalise(head, 0, s, input);
    }
    s.input_rows[r] = input;
  }
  job.project(
      head, rows, [&](int32_t r) { return job.shared_row(first + r); }, s, worker);
}

}  // namespace dsv3::kernels
