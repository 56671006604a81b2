// Multi-head latent attention. A task takes some rows of one sequence and some heads: it absorbs
// W_UK into their queries, goes through the pages block by block (scores, softmax, values), and
// applies W_UV. So there is no barrier at all.
//
// Where several sequences have a few rows each (decoding side by side), that would read W_UK and
// W_UV once for each of them: their rows are absorbed and projected together, head by head, in a
// phase before and one after.
//
// A latent page is BF16 [dim pair][64 keys][2 dims]: scores are dot products over dims with the
// keys in the lanes. For the weighted sum a block's latents are rearranged to [key pair][dim][2
// keys] in scratch, once per task and block, 64 dims at a time.
#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/cpu_device.h"

namespace dsv3::kernels {
namespace {

constexpr int32_t round64(int32_t n) { return (n + 63) / 64 * 64; }
constexpr size_t native_bytes(Activation native) {
  return native == Activation::kF32 ? sizeof(float) : sizeof(uint16_t);
}

constexpr size_t kWorthSharing = size_t{512} << 10;  // bytes of W_UK and W_UV
size_t bytes_of(const Matrix& w) { return matrix_bytes(w.dtype, w.layout, w.n, w.k); }

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
    const auto take = [&](auto** p, size_t count) {
      using T = std::remove_reference_t<decltype(**p)>;
      *p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + bytes);  // null: only measure
      bytes += (count * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
    };
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

size_t attention_input_bytes(const MlaShape& shape) {
  return static_cast<size_t>(round64(std::max(shape.qk_nope_head_dim, shape.kv_lora_rank))) *
         sizeof(float);
}

size_t attention_scratch_bytes(const MlaShape& shape, Activation native) {
  return AttentionScratch(shape, native, nullptr).bytes;
}

struct AttentionJob {
  CpuDevice* device;
  const MlaAttentionArgs* args;
  int32_t row_step, head_step, head_blocks;
  int32_t shared_rows = 0;  // of all sequences that are absorbed and projected together
  int32_t most_shared = kSharedRows;

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

  static void absorb_task(void* context, int index, int worker);
  static void attend_task(void* context, int index, int worker);
  static void project_task(void* context, int index, int worker);
  AttentionScratch scratch_of(int worker) const {
    return {args->shape, device->micro_->native,
            device->workers_[static_cast<size_t>(worker)].attention.get()};
  }
  void attend(const Block& block, int worker) const;
  void split(const Block& block, AttentionScratch& s, int64_t begin, int worker) const;
  void join(const Block& block, AttentionScratch& s, int32_t first, bool only) const;
  // queries = (W_UK q_nope, q_rope) of a head and `rows` rows, rounded. row_of(r) is a row of the
  // batch, query_of(r) where its query goes.
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
    micro.pack(micro.activation[static_cast<size_t>(w.dtype)], q, w.k, even(w.k), input);
    s.input_rows[r] = input;
    micro.pack(micro.native, q + shape.qk_nope_head_dim, shape.qk_rope_head_dim, rope_padded,
               query_of(r) + static_cast<size_t>(shape.kv_lora_rank) * size);
  }
  const auto keep = [&](int32_t r, int32_t column, int32_t count, const float* v) {
    micro.pack(micro.native, v, count, count, query_of(r) + static_cast<size_t>(column) * size);
  };
  multiply(args->w_uk, head, s, rows, worker, keep);
}

// part, max and sum of the keys [begin, begin + kKeySplit) that the block has.
void AttentionJob::split(const Block& b, AttentionScratch& s, int64_t begin, int worker) const {
  const Micro& micro = *device->micro_;
  const int32_t pairs = even(args->shape.latent_dim()) / 2;
  const int64_t end = std::min(begin + kKeySplit, b.keys());
  const int32_t split_first = first_query(b, begin);
  std::fill(s.max + split_first, s.max + b.queries(), -std::numeric_limits<float>::infinity());
  std::fill(s.sum + split_first, s.sum + b.queries(), 0.0f);
  PanelArgs p;
  p.scratch = device->workers_[static_cast<size_t>(worker)].gemm.get();
  for (int64_t key = begin; key < end; key += kKeyBlock) {
    const int32_t first = first_query(b, key);
    const int32_t queries = b.queries() - first;
    const int32_t pages = key + kPageKeys < b.keys() ? 2 : 1;
    for (int32_t i = 0; i < pages; ++i) {
      const int64_t page_key = key + i * kPageKeys;
      p.w = page(b, page_key);
      p.pairs = pairs;
      p.rows = queries;
      p.x = s.query_rows + first;
      p.out = s.scores + int64_t{first} * kKeyBlock + i * kPageKeys;
      p.out_stride = kKeyBlock;
      p.keep = nullptr;
      micro.panel(p);
    }
    for (int32_t q = first; q < b.queries(); ++q) {
      const int64_t last = b.first_position() + q / b.heads;
      const auto from =
          static_cast<int32_t>(std::clamp<int64_t>(args->first_key - key, 0, kKeyBlock));
      const auto to = static_cast<int32_t>(std::min<int64_t>(last + 1 - key, kKeyBlock));
      std::byte* weights = s.weights + static_cast<size_t>(q) * s.weight_bytes;
      s.keep[q] = micro.softmax(s.scores + int64_t{q} * kKeyBlock, from, to, args->softmax_scale,
                                s.max + q, s.sum + q, weights);
      s.weight_rows[q] = weights;
    }
    p.pairs = pages * kPageKeys / 2;
    p.x = s.weight_rows + first;
    p.out_stride = s.value_columns;
    p.keep = key == begin ? nullptr : s.keep + first;
    // 64 columns at a time, so that what is rearranged is still in L1 when it is multiplied: all
    // at once took twice the time.
    p.w = reinterpret_cast<const uint8_t*>(s.values);
    for (int32_t column = 0; column < s.value_columns; column += 64) {
      for (int32_t i = 0; i < pages; ++i) {
        const int64_t page_key = key + i * kPageKeys;
        const auto in_page = [&](int64_t k) {
          return static_cast<int32_t>(std::clamp<int64_t>(k - page_key, 0, kPageKeys));
        };
        micro.values(page(b, page_key) + int64_t{column} * kPageKeys * 2,
                     std::min(64, args->shape.kv_lora_rank - column), in_page(args->first_key),
                     in_page(b.keys()), i * kPageKeys / 2, kKeyBlock / 2,
                     reinterpret_cast<uint8_t*>(s.values));
      }
      p.out = s.part + first * s.value_columns + column;
      micro.panel(p);
    }
  }
}

// Joins the current split to the total of those before it. only: there are none.
void AttentionJob::join(const Block& b, AttentionScratch& s, int32_t first, bool only) const {
  for (int32_t q = first; q < b.queries(); ++q) {
    float* total = s.total + q * s.value_columns;
    const float* part = s.part + q * s.value_columns;
    if (only) {
      std::copy_n(part, s.value_columns, total);
      s.total_max[q] = s.max[q];
      s.total_sum[q] = s.sum[q];
      continue;
    }
    const float max = std::max(s.total_max[q], s.max[q]);
    const float a = std::exp(s.total_max[q] - max);
    const float c = std::exp(s.max[q] - max);
    device->micro_->merge(total, a, part, c, static_cast<int32_t>(s.value_columns));
    s.total_sum[q] = s.total_sum[q] * a + s.sum[q] * c;
    s.total_max[q] = max;
  }
}

void AttentionJob::normalise(int32_t head, int32_t q, AttentionScratch& s, std::byte* input) const {
  const Micro& micro = *device->micro_;
  const Matrix& w = args->w_uv[static_cast<size_t>(head)];
  float* total = s.total + q * s.value_columns;
  const float norm = s.total_sum[q] == 0 ? 0.0f : 1.0f / s.total_sum[q];
  for (int32_t i = 0; i < args->shape.kv_lora_rank; ++i) total[i] *= norm;
  micro.pack(micro.activation[static_cast<size_t>(w.dtype)], total, w.k, even(w.k), input);
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

void AttentionJob::attend(const Block& block, int worker) const {
  if (block.rows() > 1 && rows_must_part(block)) {
    for (int32_t row = block.begin; row < block.end; ++row) {
      attend({block.seq, row, row + 1, block.first_head, block.heads, block.shared}, worker);
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
  const int64_t first_split = args->first_key / kKeySplit * kKeySplit;
  for (int64_t key = first_split; key < block.keys(); key += kKeySplit) {
    split(block, s, key, worker);
    join(block, s, first_query(block, key), key == first_split);
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
  for (int32_t r = 0; r < rows; ++r) s.input_rows[r] = job.shared_input(first + r, head);
  job.project(
      head, rows, [&](int32_t r) { return job.shared_row(first + r); }, s, worker);
}

void AttentionJob::attend_task(void* context, int index, int worker) {
  const AttentionJob& job = *static_cast<AttentionJob*>(context);
  int32_t block = index / job.head_blocks;
  int32_t shared = 0;
  for (const SequenceRows& seq : job.args->sequences) {
    const int32_t blocks = (seq.rows + job.row_step - 1) / job.row_step;
    const bool shares = job.shares(seq, shared);
    if (block >= blocks) {
      block -= blocks;
      shared += shares ? seq.rows : 0;
      continue;
    }
    // Later rows have more keys: they come first, so that the last tasks are short.
    const int32_t begin = (blocks - 1 - block) * job.row_step;
    const int32_t head = index % job.head_blocks * job.head_step;
    job.attend({&seq, begin, std::min(seq.rows, begin + job.row_step), head,
                std::min(job.head_step, job.args->shape.heads - head), shares ? shared : -1},
               worker);
    return;
  }
}

void CpuDevice::mla_attention(const MlaAttentionArgs& args) {
  const auto expanded = [&](const SequenceRows& seq) { return expands(args.shape, seq); };
  MlaAttentionArgs rest = args;
  for (auto at = args.sequences.begin(); at != args.sequences.end();) {
    if (expanded(*at)) {
      expanded_attention(args, *at++);
      continue;
    }
    const auto end = std::find_if(at, args.sequences.end(), expanded);
    rest.sequences = {at, end};
    latent_attention(rest);
    at = end;
  }
}

void CpuDevice::latent_attention(const MlaAttentionArgs& args) {
  const MlaShape& s = args.shape;
  int32_t most_rows = 1;
  double ns = 0;
  for (const SequenceRows& seq : args.sequences) {
    most_rows = std::max(most_rows, seq.rows);
    ns += attention_work(s, seq, false) / 50;
  }
  AttentionJob job{this, &args, std::min(most_rows, kQueryRows), 1, 1};
  int64_t row_blocks = 0;
  size_t sharing = 0;  // sequences
  for (const SequenceRows& seq : args.sequences) {
    row_blocks += (seq.rows + job.row_step - 1) / job.row_step;
    if (!job.shares(seq, job.shared_rows)) continue;
    ++sharing;
    for (int32_t r = 0; r < seq.rows; ++r) {
      attention_rows_[static_cast<size_t>(job.shared_rows++)] = seq.row_begin + r;
    }
  }
  // Two barriers: worth it where they save reading enough weights again.
  const size_t weights =
      static_cast<size_t>(s.heads) * (bytes_of(args.w_uk[0]) + bytes_of(args.w_uv[0]));
  if (sharing < 2 || (sharing - 1) * weights < kWorthSharing) {
    job.shared_rows = job.most_shared = 0;
  }
  job.head_step = std::clamp(kMaxQueries / job.row_step, 1, s.heads);
  const auto blocks = [&](int32_t step) { return (s.heads + step - 1) / step; };
  while (job.head_step > 1 && row_blocks * blocks(job.head_step) < threads()) {
    job.head_step = (job.head_step + 1) / 2;
  }
  job.head_blocks = blocks(job.head_step);
  const auto attend_tasks = static_cast<int>(row_blocks * job.head_blocks);
  const int head_tasks = s.heads * ((job.shared_rows + kQueryRows - 1) / kQueryRows);
  const Pool::Phase phases[] = {{AttentionJob::absorb_task, &job, head_tasks},
                                {AttentionJob::attend_task, &job, attend_tasks},
                                {AttentionJob::project_task, &job, head_tasks}};
  if (job.shared_rows == 0) return run({&phases[1], 1}, ns);
  run(phases, ns);
}

}  // namespace dsv3::kernels
