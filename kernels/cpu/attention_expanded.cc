// Attention of a prompt's rows with keys and values expanded: for each head, W_UK and W_UV are
// multiplied with the latents of 128 positions at a time, and all rows of the chunk attend to the
// head's own keys and values, which are a third as wide as the latents. More work than attention in
// latent space (attention.cc) for few rows, less for many: expands() in kernels.h counts.
//
// A task takes one head through all keys for some rows of one sequence. What it expands has the
// layout of latent pages, BF16 [dim pair][64 keys][2 dims], and so the same micro-kernels do the
// rest. A row's bits depend neither on the other rows nor on where the chunk begins, but they are
// not the bits of attention in latent space.
#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/numeric.h"

namespace dsv3::kernels {
namespace {

// Rows that go through a block of keys together: a multiple of what the micro-kernels take at a
// time (6, 8 or 4), and their scores stay in L1.
constexpr int32_t kGroupRows = 48;
// Fewer rows than this are not split among tasks: each would expand all keys for itself.
constexpr int32_t kLeastPart = 128;

// Where the parts of a worker's scratch lie; `rows` of one task at most.
struct ExpandedScratch {
  std::byte* weights;        // [nope + v][kv_lora_rank, even] native: W_UK transposed, then W_UV
  const void** weight_rows;  // [nope + v]
  std::byte* queries;        // [rows][qk_head_dim, even] native
  const void** query_rows;   // [rows]
  float* sums;               // [rows][v, padded]: of weighted values
  float *max, *sum;          // [rows]: of the softmax
  float* raw;                // [kGroupRows][64 keys]: expanded, not yet rounded
  uint8_t* keys[2];          // BF16 [pairs of qk_head_dim][64 keys][2]: two pages
  uint8_t* values[2];        // BF16 [pairs of v][64 keys][2]
  uint8_t* columns;          // BF16 [v / 64][64 key pairs][64][2]: values of both, rearranged
  float* scores;             // [kGroupRows][kKeyBlock]
  std::byte* shares;         // [kGroupRows][kKeyBlock] native: the softmax of the scores
  const void** share_rows;   // [kGroupRows]
  float* keep;               // [kGroupRows]
  size_t weight_bytes, query_bytes, share_bytes;  // of one row
  int64_t value_columns;                          // v_head_dim, padded
  size_t bytes = 0;

  ExpandedScratch(const MlaShape& s, Activation native, int32_t rows, std::byte* base) {
    value_columns = round64(s.v_head_dim);
    weight_bytes = static_cast<size_t>(even(s.kv_lora_rank)) * native_bytes(native);
    query_bytes = static_cast<size_t>(even(s.qk_head_dim())) * native_bytes(native);
    share_bytes = kKeyBlock * native_bytes(native);
    const ScratchCutter take{base, &bytes};
    const auto count = static_cast<size_t>(rows);
    const auto weight_count = static_cast<size_t>(s.qk_nope_head_dim + s.v_head_dim);
    const auto columns_count = static_cast<size_t>(value_columns);
    const auto page = [](int32_t dims) {
      return static_cast<size_t>(even(dims)) * kPageKeys * sizeof(uint16_t);
    };
    take(&weights, weight_count * weight_bytes);
    take(&weight_rows, weight_count);
    take(&queries, count * query_bytes);
    take(&query_rows, count);
    take(&sums, count * columns_count);
    take(&max, count);
    take(&sum, count);
    take(&raw, size_t{kGroupRows} * kPageKeys);
    for (uint8_t*& p : keys) take(&p, page(s.qk_head_dim()));
    for (uint8_t*& p : values) take(&p, page(s.v_head_dim));
    take(&columns, columns_count * kKeyBlock * sizeof(uint16_t));
    take(&scores, size_t{kGroupRows} * kKeyBlock);
    take(&shares, kGroupRows * share_bytes);
    take(&share_rows, kGroupRows);
    take(&keep, kGroupRows);
  }
};

struct Native16 {
  using Type = uint16_t;
  static uint16_t from(float f) { return bf16_from_float(f); }
};
struct Native32 {
  using Type = float;
  static float from(float f) { return f; }
};

// The weights of a matrix in tiles, scaled and rounded to the native type.
template <class N>
class Unpacker {
 public:
  using T = typename N::Type;
  explicit Unpacker(const Matrix& w) : w_(w), scale_columns_((w.k + w.scale_k - 1) / w.scale_k) {}

  // One pair of inputs of a tile, out [16 outputs][2].
  void read(int64_t tile, int32_t pair, T* out) {
    const size_t index = static_cast<size_t>((tile * (even(w_.k) / 2) + pair) * 32);
    const std::byte* data = w_.data.get() + index * dtype_size(w_.dtype);
    switch (w_.dtype) {
      case DType::kF8E4M3:
        return read_f8(tile, pair, data, out);
      case DType::kBF16:
        return read_as<uint16_t>(data, bf16_to_float, out);
      case DType::kF16:
        return read_as<uint16_t>(data, f16_to_float, out);
      default:
        return read_as<float>(
            data, [](float f) { return f; }, out);
    }
  }

 private:
  template <class Code, class Value>
  static void read_as(const std::byte* data, Value value, T* out) {
    Code code[32];
    std::memcpy(code, data, sizeof code);
    for (int i = 0; i < 32; ++i) out[i] = N::from(value(code[i]));
  }

  // A block of weights shares its scale, and there are 256 codes: a table has what they become.
  void read_f8(int64_t tile, int32_t pair, const std::byte* data, T* out) {
    uint8_t code[32];
    std::memcpy(code, data, sizeof code);
    const int64_t output = tile * kTileN;
    const int64_t column = 2 * pair / w_.scale_k;
    const auto scale_of = [&](int64_t i) {
      return w_.scales.get()[std::min<int64_t>(i, w_.n - 1) / w_.scale_n * scale_columns_ + column];
    };
    if (output / w_.scale_n != (output + kTileN - 1) / w_.scale_n) {
      for (int i = 0; i < 32; ++i) {
        out[i] = N::from(kF8E4M3Table[code[i]] * scale_of(output + i / 2));
      }
      return;
    }
    const float scale = scale_of(output);
    if (!has_table_ || scale != table_scale_) {
      for (size_t i = 0; i < 256; ++i) table_[i] = N::from(kF8E4M3Table[i] * scale);
      table_scale_ = scale;
      has_table_ = true;
    }
    for (int i = 0; i < 32; ++i) out[i] = table_[code[i]];
  }

  const Matrix& w_;
  const int64_t scale_columns_;
  T table_[256];
  float table_scale_ = 0;
  bool has_table_ = false;
};

// The rows of W_UK transposed, then those of W_UV: what the latents' dims are multiplied with.
template <class N>
void unpack_weights(const MlaShape& shape, const Matrix& uk, const Matrix& uv, std::byte* out) {
  using T = typename N::Type;
  const int64_t stride = even(shape.kv_lora_rank);
  T* keys = reinterpret_cast<T*>(out);
  T* values = keys + shape.qk_nope_head_dim * stride;
  if (stride != shape.kv_lora_rank) {
    for (int64_t row = 0; row < shape.qk_nope_head_dim; ++row) {
      keys[row * stride + stride - 1] = T{};
    }
  }
  const auto tiles = [](const Matrix& w, auto use) {
    Unpacker<N> unpacker(w);
    T pair_of_tile[32];
    for (int64_t tile = 0; tile < tiles_of(w.n); ++tile) {
      const auto outputs = static_cast<int32_t>(std::min<int64_t>(kTileN, w.n - tile * kTileN));
      for (int32_t pair = 0; pair < even(w.k) / 2; ++pair) {
        unpacker.read(tile, pair, pair_of_tile);
        use(tile * kTileN, outputs, pair, pair_of_tile);
      }
    }
  };
  tiles(uk, [&](int64_t output, int32_t outputs, int32_t pair, const T* w) {
    for (int32_t half = 0; half < std::min(2, uk.k - 2 * pair); ++half) {
      T* row = keys + (2 * pair + half) * stride + output;
      for (int32_t i = 0; i < outputs; ++i) row[i] = w[2 * i + half];
    }
  });
  tiles(uv, [&](int64_t output, int32_t outputs, int32_t pair, const T* w) {
    T* at = values + output * stride + int64_t{2} * pair;
    for (int32_t i = 0; i < outputs; ++i) std::memcpy(at + i * stride, w + 2 * i, 2 * sizeof(T));
  });
}

// Rows of float32 [rows][64] as BF16 pairs [ceil(rows / 2)][64][2].
void to_pairs(const float* x, int32_t rows, uint8_t* out) {
  for (int32_t r = 0; r < rows; r += 2) {
    const float* a = x + int64_t{r} * kPageKeys;
    uint32_t pair[kPageKeys];
    for (int i = 0; i < kPageKeys; ++i) pair[i] = bf16_from_float(a[i]);
    if (r + 1 < rows) {
      const float* b = a + kPageKeys;
      for (int i = 0; i < kPageKeys; ++i) {
        pair[i] |= static_cast<uint32_t>(bf16_from_float(b[i])) << 16;
      }
    }
    std::memcpy(out + int64_t{r} * kPageKeys * 2, pair, sizeof pair);
  }
}

// Dims [from, from + count) of a page become dims [to, to + count) of another.
void copy_dims(const uint8_t* page, int32_t from, int32_t count, int32_t to, uint8_t* out) {
  const auto at = [](int32_t dim) { return int64_t{dim / 2} * kPageKeys * 4; };
  if (from % 2 == 0 && to % 2 == 0 && count % 2 == 0) {
    std::memcpy(out + at(to), page + at(from), static_cast<size_t>(at(count)));
    return;
  }
  for (int32_t d = 0; d < count; ++d) {
    const uint8_t* source = page + at(from + d) + (from + d) % 2 * 2;
    uint8_t* target = out + at(to + d) + (to + d) % 2 * 2;
    for (int32_t key = 0; key < kPageKeys; ++key)
      std::memcpy(target + 4 * key, source + 4 * key, 2);
  }
}

}  // namespace

size_t expanded_scratch_bytes(const MlaShape& shape, Activation native, int32_t rows) {
  return ExpandedScratch(shape, native, std::min(rows, kMostExpandedRows), nullptr).bytes;
}

struct ExpandedJob {
  CpuDevice* device;
  const MlaAttentionArgs* args;
  const SequenceRows* seq;
  int32_t part_rows;

  static void task(void* context, int index, int worker);
  void attend(int32_t head, int32_t begin, int32_t end, int worker) const;
  // Keys and values of a head at the positions of the page that holds `key`.
  void expand(ExpandedScratch& s, int64_t key, int32_t page, int worker) const;
  // s.columns of the pages from `key` on, positions before `end`.
  void arrange(ExpandedScratch& s, int64_t key, int32_t pages, int64_t end) const;
  // Rows [begin, begin + rows) of the task, whose first is row `first` of the sequence, attend to
  // the block of keys at `key`.
  void attend_block(ExpandedScratch& s, int32_t first, int32_t begin, int32_t rows, int64_t key,
                    bool is_first, int worker) const;
};

void ExpandedJob::expand(ExpandedScratch& s, int64_t key, int32_t page, int worker) const {
  const MlaShape& shape = args->shape;
  const Micro& micro = *device->micro_;
  const auto* latents =
      reinterpret_cast<const uint8_t*>(seq->pages[key / kPageKeys].get()) + args->page_offset;
  PanelArgs p;
  p.scratch = device->workers_[static_cast<size_t>(worker)].gemm.get();
  p.w = latents;
  p.pairs = even(shape.kv_lora_rank) / 2;
  p.out = s.raw;
  p.out_stride = kPageKeys;
  const auto rows = [&](int32_t first, int32_t count, uint8_t* out) {
    for (int32_t row = 0; row < count; row += kGroupRows) {
      p.x = s.weight_rows + first + row;
      p.rows = std::min(kGroupRows, count - row);
      micro.panel(p);
      to_pairs(s.raw, p.rows, out + int64_t{row} * kPageKeys * 2);
    }
  };
  rows(0, shape.qk_nope_head_dim, s.keys[page]);
  rows(shape.qk_nope_head_dim, shape.v_head_dim, s.values[page]);
  copy_dims(latents, shape.kv_lora_rank, shape.qk_rope_head_dim, shape.qk_nope_head_dim,
            s.keys[page]);
}

void ExpandedJob::arrange(ExpandedScratch& s, int64_t key, int32_t pages, int64_t end) const {
  for (int32_t i = 0; i < pages; ++i) {
    const int64_t page_key = key + i * kPageKeys;
    const auto in_page = [&](int64_t k) {
      return static_cast<int32_t>(std::clamp<int64_t>(k - page_key, 0, kPageKeys));
    };
    device->micro_->values(s.values[i], args->shape.v_head_dim, in_page(args->first_key),
                           in_page(end), i * kPageKeys / 2, kKeyBlock / 2, s.columns);
  }
}

void ExpandedJob::attend_block(ExpandedScratch& s, int32_t first, int32_t begin, int32_t rows,
                               int64_t key, bool is_first, int worker) const {
  const Micro& micro = *device->micro_;
  const int64_t position = seq->first_position + first + begin;
  const int32_t pages = position + rows > key + kPageKeys ? 2 : 1;
  PanelArgs p;
  p.scratch = device->workers_[static_cast<size_t>(worker)].gemm.get();
  p.rows = rows;
  p.pairs = even(args->shape.qk_head_dim()) / 2;
  p.x = s.query_rows + begin;
  p.out_stride = kKeyBlock;
  for (int32_t i = 0; i < pages; ++i) {
    p.w = s.keys[i];
    p.out = s.scores + i * kPageKeys;
    micro.panel(p);
  }
  const auto from = static_cast<int32_t>(std::clamp<int64_t>(args->first_key - key, 0, kKeyBlock));
  for (int32_t r = 0; r < rows; ++r) {
    const auto to = static_cast<int32_t>(std::min<int64_t>(position + r + 1 - key, kKeyBlock));
    s.keep[r] =
        micro.softmax(s.scores + r * kKeyBlock, from, to, args->softmax_scale, s.max + begin + r,
                      s.sum + begin + r, s.shares + static_cast<size_t>(r) * s.share_bytes);
  }
  p.pairs = pages * kPageKeys / 2;
  p.x = s.share_rows;
  p.out_stride = s.value_columns;
  p.keep = is_first ? nullptr : s.keep;
  for (int64_t column = 0; column < s.value_columns; column += 64) {
    p.w = s.columns + column * kKeyBlock * 2;
    p.out = s.sums + begin * s.value_columns + column;
    micro.panel(p);
  }
}

// Rows [begin, end) of the sequence.
void ExpandedJob::attend(int32_t head, int32_t begin, int32_t end, int worker) const {
  const MlaShape& shape = args->shape;
  const Micro& micro = *device->micro_;
  const int32_t rows = end - begin;
  ExpandedScratch s(shape, micro.native, part_rows,
                    device->workers_[static_cast<size_t>(worker)].expanded.get());
  const auto h = static_cast<size_t>(head);
  const auto unpack =
      micro.native == Activation::kF32 ? unpack_weights<Native32> : unpack_weights<Native16>;
  unpack(shape, args->w_uk[h], args->w_uv[h], s.weights);
  for (int32_t i = 0; i < shape.qk_nope_head_dim + shape.v_head_dim; ++i) {
    s.weight_rows[i] = s.weights + static_cast<size_t>(i) * s.weight_bytes;
  }
  const auto row_of = [&](int32_t r) -> int64_t {
    return int64_t{seq->row_begin + begin + r} * shape.heads + head;
  };
  const int32_t width = shape.qk_head_dim();
  for (int32_t r = 0; r < rows; ++r) {
    std::byte* query = s.queries + static_cast<size_t>(r) * s.query_bytes;
    micro.pack(micro.native, args->q.get() + row_of(r) * width, width, even(width), query);
    s.query_rows[r] = query;
  }
  for (int32_t r = 0; r < kGroupRows; ++r) {
    s.share_rows[r] = s.shares + static_cast<size_t>(r) * s.share_bytes;
  }
  std::fill_n(s.max, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(s.sum, rows, 0.0f);
  // The other half of an odd last pair: whatever it holds is multiplied with zero.
  for (uint8_t* page : s.keys) {
    std::memset(page + (even(width) - 2) * kPageKeys * 2, 0, size_t{2} * kPageKeys * 2);
  }
  const int64_t first_position = seq->first_position + begin;
  const int64_t keys = seq->first_position + end;
  const int64_t first_block = args->first_key / kKeyBlock * kKeyBlock;
  for (int64_t key = first_block; key < keys; key += kKeyBlock) {
    const int32_t pages = key + kPageKeys < keys ? 2 : 1;
    bool apart = false;
    for (int32_t i = 0; i < pages; ++i) {
      const int64_t page_key = key + i * kPageKeys;
      expand(s, page_key, i, worker);
      // A later row's values weigh nothing in an earlier row, but zero times NaN or infinity is
      // NaN: then the rows go one by one.
      apart |= any_not_finite(s.values[i], even(shape.v_head_dim) / 2,
                              std::clamp<int64_t>(first_position + 1 - page_key, 0, kPageKeys),
                              std::min<int64_t>(keys - page_key, kPageKeys));
    }
    if (!apart) arrange(s, key, pages, keys);
    const auto first = static_cast<int32_t>(std::max<int64_t>(0, key - first_position));
    const int32_t step = apart ? 1 : kGroupRows;
    for (int32_t r = first; r < rows; r += step) {
      if (apart) arrange(s, key, pages, first_position + r + 1);
      attend_block(s, begin, r, std::min(step, rows - r), key, key == first_block, worker);
    }
  }
  for (int32_t r = 0; r < rows; ++r) {
    const float norm = s.sum[r] == 0 ? 0.0f : 1.0f / s.sum[r];
    const float* sums = s.sums + r * s.value_columns;
    float* out = args->out.get() + row_of(r) * shape.v_head_dim;
    for (int32_t i = 0; i < shape.v_head_dim; ++i) out[i] = sums[i] * norm;
  }
}

void ExpandedJob::task(void* context, int index, int worker) {
  const ExpandedJob& job = *static_cast<ExpandedJob*>(context);
  const int32_t heads = job.args->shape.heads;
  // Later rows have more keys: they come first, so that the last tasks are short.
  const int32_t parts = (job.seq->rows + job.part_rows - 1) / job.part_rows;
  const int32_t begin = (parts - 1 - index / heads) * job.part_rows;
  job.attend(index % heads, begin, std::min(job.seq->rows, begin + job.part_rows), worker);
}

void CpuDevice::expanded_attention(const MlaAttentionArgs& args, const SequenceRows& seq) {
  const int32_t heads = args.shape.heads;
  const double work = attention_work(args.shape, seq, true);
  // Heads are what tasks are made of, and rows where threads would have none: every part expands
  // all keys for itself, so parts cost what they save. What counts is how long the busiest thread
  // is at it.
  const double expanding = double{1} * static_cast<double>(seq.first_position + seq.rows) * heads *
                           args.shape.kv_lora_rank *
                           (args.shape.qk_nope_head_dim + args.shape.v_head_dim);
  const auto longest = [&](int32_t parts) {
    const int32_t tasks = (heads * parts + threads() - 1) / threads();  // of one thread at most
    return tasks * (expanding + (work - expanding) / parts);
  };
  int32_t parts = (seq.rows + kMostExpandedRows - 1) / kMostExpandedRows;
  for (int32_t more = parts + 1; more <= seq.rows / kLeastPart; ++more) {
    if (longest(more) < longest(parts)) parts = more;
  }
  ExpandedJob job{this, &args, &seq, (seq.rows + parts - 1) / parts};
  const Pool::Phase phase{ExpandedJob::task, &job,
                          heads * ((seq.rows + job.part_rows - 1) / job.part_rows)};
  run({&phase, 1}, work / 50);
}

}  // namespace dsv3::kernels
