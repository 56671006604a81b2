#include "runtime/model/convert_pipeline.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/numeric.h"
#include "runtime/base/checked.h"
#include "runtime/model/parallel.h"
#include "runtime/model/repack.h"

namespace dsv3 {
namespace {

using kernels::DType;

// Larger outputs are written back as they grow and leave the page cache, as do the checkpoint's
// pages: a conversion must not evict what the machine works with. Smaller ones stay, because they
// are about to be opened.
constexpr uint64_t kKeepCached = uint64_t{1} << 30;
constexpr uint64_t kFlushStep = uint64_t{64} << 20;
constexpr size_t kPrefetchChunks = 8;

// A buffer of at least `size` elements; grows, never shrinks.
template <class T>
T* room(std::vector<T>* buffer, size_t size) {
  if (buffer->size() < size) buffer->resize(size);
  return buffer->data();
}

unsigned long long ull(uint64_t v) { return v; }

}  // namespace

// A worker's buffers, lent for one chunk and used again: fresh ones would be zeroed pages each
// time.
class ConvertPipeline::ScratchLease {
 public:
  explicit ScratchLease(ConvertPipeline* owner) : owner_(owner) {
    const std::lock_guard lock(owner_->mutex_);
    if (owner_->idle_.empty()) {
      scratch_ = std::make_unique<Scratch>();
    } else {
      scratch_ = std::move(owner_->idle_.back());
      owner_->idle_.pop_back();
    }
  }
  ~ScratchLease() {
    const std::lock_guard lock(owner_->mutex_);
    owner_->idle_.push_back(std::move(scratch_));
  }
  ScratchLease(const ScratchLease&) = delete;
  Scratch* get() { return scratch_.get(); }

 private:
  ConvertPipeline* owner_;
  std::unique_ptr<Scratch> scratch_;
};

// The order in which chunks are hashed. A chunk that fails lets nobody behind it wait for ever.
class ConvertPipeline::Turn {
 public:
  Turn(ConvertPipeline* owner, size_t index) : owner_(owner), index_(index) {}
  ~Turn() {
    if (passed_) return;
    const std::lock_guard lock(owner_->mutex_);
    owner_->failed_ = std::min(owner_->failed_, index_);
    owner_->turn_changed_.notify_all();
  }
  Turn(const Turn&) = delete;
  // False: an earlier chunk failed, so this one is not wanted any more.
  bool wait() {
    std::unique_lock lock(owner_->mutex_);
    owner_->turn_changed_.wait(lock,
                               [&] { return owner_->turn_ == index_ || owner_->failed_ < index_; });
    return owner_->turn_ == index_;
  }
  void pass() {
    const std::lock_guard lock(owner_->mutex_);
    passed_ = true;
    owner_->turn_ = index_ + 1;
    owner_->turn_changed_.notify_all();
  }

 private:
  ConvertPipeline* owner_;
  size_t index_;
  bool passed_ = false;
};

ConvertPipeline::ConvertPipeline(ConvertPlan* plan, AtomicFile* file, uint64_t data_offset)
    : plan_(*plan),
      file_(*file),
      data_offset_(data_offset),
      drop_cache_(plan->data_bytes > kKeepCached),
      flushed_(data_offset) {}

Status ConvertPipeline::run(const Progress& progress) {
  for (Record& record : plan_.records) record.hashes.assign(record.count, 0);
  const int threads = io_threads();
  idle_.reserve(static_cast<size_t>(threads));  // a buffer that comes back finds room
  const auto tick = [&] { return !progress || progress(done_bytes_.load(), plan_.work_bytes); };
  return parallel_for(
      plan_.chunks.size(), threads, [this](size_t i) { return do_chunk(i); }, tick);
}

Status ConvertPipeline::do_chunk(size_t index) {
  const Chunk& chunk = plan_.chunks[index];
  Turn turn(this, index);
  ScratchLease scratch(this);
  Scratch* s = scratch.get();
  prefetch(index + kPrefetchChunks);

  const auto aborted = [] { return Status(Code::kCancelled, "another chunk failed"); };
  bool my_turn = false;
  if (chunk.kind == Chunk::Kind::kCompare) {
    DSV3_TRY(compare(chunk, s));
  } else if (chunk.kind == Chunk::Kind::kScales) {
    my_turn = turn.wait();  // the rows before it make the scales when it quantises
    if (!my_turn) return aborted();
    DSV3_TRY(make_scales(chunk, s));
  } else if (chunk.kind == Chunk::Kind::kHead) {
    DSV3_TRY(make_head(chunk, s));
  } else {
    DSV3_TRY(make_rows(chunk, s));
  }
  if (!my_turn && !turn.wait()) return aborted();
  const bool writes = chunk.kind != Chunk::Kind::kCompare;
  if (writes) hash(chunk, s->out.data());
  turn.pass();
  if (writes) DSV3_TRY(write(chunk, s->out.data()));
  done_bytes_ += writes ? chunk.bytes : chunk.end - chunk.begin;
  return {};
}

// --- reading

Status ConvertPipeline::read_rows(const SourceMatrix& source, uint64_t begin, uint64_t end,
                                  std::vector<uint8_t>* out) {
  const SourceTensor& tensor = *source.weight;
  const size_t bytes = (end - begin) * source.row_bytes();
  const uint64_t offset = tensor.begin + begin * source.row_bytes();
  DSV3_TRY(tensor.file->read_at(offset, room(out, bytes), bytes));
  if (drop_cache_) tensor.file->dont_need(offset, bytes);
  const auto k = static_cast<uint64_t>(source.k);
  if (source.is_mx()) return {};  // every code is finite; the scales are looked at elsewhere
  const int64_t bad = first_non_finite(out->data(), source.dtype, (end - begin) * k);
  if (bad < 0) return {};
  const uint64_t at = begin * k + static_cast<uint64_t>(bad);
  return make_field_error(
      Code::kNumeric, tensor.name.c_str(), "%s has %s at [%llu, %llu], expected finite numbers",
      tensor.where().c_str(), source.dtype == DType::kF8E4M3 ? "NaN" : "NaN or infinity",
      ull(at / k), ull(at % k));
}

Status ConvertPipeline::read_scales(const SourceMatrix& source, std::vector<float>* out) {
  const SourceTensor& tensor = *source.scales;
  const size_t count = (tensor.end - tensor.begin) / tensor.element_bytes;
  out->resize(count);
  if (tensor.type == SourceType::kF8E8M0) {
    std::vector<uint8_t> codes(count);
    DSV3_TRY(tensor.file->read_at(tensor.begin, codes.data(), count));
    for (size_t i = 0; i < count; ++i) {  // 2^(code - 127); 255 is NaN
      (*out)[i] = codes[i] == 255 ? NAN : std::ldexp(1.0f, codes[i] - 127);
    }
  } else {
    DSV3_TRY(tensor.file->read_at(tensor.begin, out->data(), count * sizeof(float)));
  }
  for (size_t i = 0; i < count; ++i) {
    if (std::isfinite((*out)[i]) && (*out)[i] > 0) continue;
    const size_t columns = static_cast<size_t>(ceil_div(source.k, source.block_k));
    return make_field_error(Code::kNumeric, tensor.name.c_str(),
                            "%s has %g at [%zu, %zu], expected a positive finite scale",
                            tensor.where().c_str(), static_cast<double>((*out)[i]), i / columns,
                            i % columns);
  }
  return {};
}

Status ConvertPipeline::fp8_rows(const SourceMatrix& source, uint64_t* begin, uint64_t* end,
                                 Scratch* s) {
  const auto block = static_cast<uint64_t>(source.block_n);
  const auto columns = static_cast<size_t>(ceil_div(source.k, source.block_k));
  const uint64_t first_block = *begin / block;
  if (!source.quantise) {
    DSV3_TRY(read_rows(source, *begin, *end, &s->fp8));
    DSV3_TRY(read_scales(source, &s->scales));
    s->scales.erase(s->scales.begin(),
                    s->scales.begin() + static_cast<ptrdiff_t>(first_block * columns));
    return {};
  }
  *begin = first_block * block;
  *end = std::min(round_up(*end, block), static_cast<uint64_t>(source.n));
  const size_t count = (*end - *begin) * static_cast<size_t>(source.k);
  DSV3_TRY(read_rows(source, *begin, *end, &s->in));
  convert_to_f32(s->in.data(), source.dtype, count, room(&s->f32, count));
  s->scales.resize(ceil_div(*end - *begin, block) * columns);
  quantise_rows(s->f32.data(), static_cast<int64_t>(*end - *begin), source.k, room(&s->fp8, count),
                s->scales.data());
  return {};
}

// --- making chunks

Status ConvertPipeline::make_rows(const Chunk& chunk, Scratch* s) {
  const Part& part = plan_.records[chunk.record].parts[chunk.part];
  const SourceMatrix& source = plan_.source(chunk);
  const auto rows = static_cast<int64_t>(chunk.end - chunk.begin);
  const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(source.k);
  const uint8_t* bytes = nullptr;
  if (part.dtype == DType::kMXFP4) return make_mx(chunk, s);
  if (source.quantise) {
    uint64_t begin = chunk.begin, end = chunk.end;  // whole blocks already
    DSV3_TRY(fp8_rows(source, &begin, &end, s));
    bytes = s->fp8.data();
    const std::lock_guard lock(mutex_);
    std::vector<float>& scales = *pending_scales(chunk);
    scales.resize(part.scale_count());
    const uint64_t columns = ceil_div<uint64_t>(static_cast<uint64_t>(part.k), part.scale_k);
    std::copy(s->scales.begin(), s->scales.end(),
              scales.begin() + static_cast<ptrdiff_t>(chunk.begin / part.scale_n * columns));
  } else {
    DSV3_TRY(read_rows(source, chunk.begin, chunk.end, &s->in));
    bytes = s->in.data();
    if (part.dtype != source.dtype) {  // norms, biases, routers: exact
      convert_to_f32(bytes, source.dtype, count, room(&s->f32, count));
      bytes = reinterpret_cast<const uint8_t*>(s->f32.data());
    }
  }
  Part band = part;
  band.n = static_cast<int32_t>(rows);
  const uint64_t made = band.data_bytes();
  uint8_t* out = room(&s->out, chunk.bytes);
  if (part.layout == kernels::Layout::kTile16x2) {
    tile_rows(bytes, kernels::dtype_size(part.dtype), rows, source.k, out);
  } else {
    std::memcpy(out, bytes, made);
  }
  std::memset(out + made, 0, chunk.bytes - made);
  return {};
}

Status ConvertPipeline::make_mx(const Chunk& chunk, Scratch* s) {
  const SourceMatrix& source = plan_.source(chunk);
  const SourceTensor& tensor = *source.weight;
  const auto rows = static_cast<int64_t>(chunk.end - chunk.begin);
  const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(source.k);
  uint8_t* out = room(&s->out, chunk.bytes);
  Part band = plan_.records[chunk.record].parts[chunk.part];
  band.n = static_cast<int32_t>(rows);
  std::memset(out + band.data_bytes(), 0, chunk.bytes - band.data_bytes());
  DSV3_TRY(read_rows(source, chunk.begin, chunk.end, &s->in));
  if (source.is_mx()) {
    const auto columns = static_cast<uint64_t>(source.k / kernels::kMxBlock);
    const SourceTensor& scales = *source.scales;
    const size_t bytes = (chunk.end - chunk.begin) * columns;
    DSV3_TRY(
        scales.file->read_at(scales.begin + chunk.begin * columns, room(&s->other, bytes), bytes));
    const auto* bad = static_cast<const uint8_t*>(std::memchr(s->other.data(), 255, bytes));
    if (bad != nullptr) {
      const uint64_t at = chunk.begin * columns + static_cast<uint64_t>(bad - s->other.data());
      return make_field_error(Code::kNumeric, scales.name.c_str(),
                              "%s has NaN at [%llu, %llu], expected powers of two",
                              scales.where().c_str(), ull(at / columns), ull(at % columns));
    }
    tile_mx(s->in.data(), s->other.data(), rows, source.k, out);
    return {};
  }
  float* values = room(&s->f32, count);
  if (source.dtype == DType::kF8E4M3) {
    DSV3_TRY(read_scales(source, &s->scales));
    const auto columns = static_cast<size_t>(ceil_div(source.k, source.block_k));
    const size_t first = chunk.begin / static_cast<uint64_t>(source.block_n) * columns;
    dequantise_rows(s->in.data(), static_cast<int64_t>(chunk.begin), rows, source.k,
                    s->scales.data() + first, source.block_n, source.block_k, values);
    // Codes and scales are finite; their product may not be.
    const int64_t bad =
        first_non_finite(reinterpret_cast<const uint8_t*>(values), DType::kF32, count);
    if (bad >= 0) {
      const uint64_t at =
          chunk.begin * static_cast<uint64_t>(source.k) + static_cast<uint64_t>(bad);
      const auto k = static_cast<uint64_t>(source.k);
      return make_field_error(Code::kNumeric, tensor.name.c_str(),
                              "%s times its scale is infinite at [%llu, %llu], expected finite "
                              "numbers",
                              tensor.where().c_str(), ull(at / k), ull(at % k));
    }
  } else {
    convert_to_f32(s->in.data(), source.dtype, count, values);
  }
  quantise_mx(values, rows, source.k, out);
  return {};
}

Status ConvertPipeline::make_scales(const Chunk& chunk, Scratch* s) {
  const SourceMatrix& source = plan_.source(chunk);
  if (source.quantise) {
    const std::lock_guard lock(mutex_);
    s->scales = std::move(*pending_scales(chunk));
    pending_.erase({chunk.record, chunk.item, chunk.part});
  } else {
    DSV3_TRY(read_scales(source, &s->scales));
  }
  const size_t made = s->scales.size() * sizeof(float);
  uint8_t* out = room(&s->out, chunk.bytes);
  std::memcpy(out, s->scales.data(), made);
  std::memset(out + made, 0, chunk.bytes - made);
  return {};
}

// One head of kv_b_proj: W_UK transposed, or W_UV as it is. See Planner::resolve_heads for the
// scales' blocks.
Status ConvertPipeline::make_head(const Chunk& chunk, Scratch* s) {
  const ModelConfig& c = plan_.config;
  const Record& record = plan_.records[chunk.record];
  const Part& part = record.parts[0];
  const SourceMatrix& source = plan_.source(chunk);
  const bool uk = record.kind == RecordKind::kHeadsUk;
  const auto nope = static_cast<uint64_t>(c.qk_nope_head_dim);
  const auto rows = uk ? nope : static_cast<uint64_t>(c.v_head_dim);
  const uint64_t first =
      chunk.item * (nope + static_cast<uint64_t>(c.v_head_dim)) + (uk ? 0 : nope);
  const auto k = static_cast<size_t>(source.k);
  uint8_t* out = room(&s->out, chunk.bytes);
  std::memset(out, 0, chunk.bytes);

  const uint8_t* bytes = nullptr;
  if (source.to_fp8()) {
    uint64_t begin = first, end = first + rows;
    DSV3_TRY(fp8_rows(source, &begin, &end, s));
    bytes = s->fp8.data() + (first - begin) * k;
    const auto block_n = static_cast<uint64_t>(source.block_n);
    const uint64_t columns = ceil_div(k, static_cast<size_t>(source.block_k));
    const auto scale_at = [&](uint64_t row, uint64_t column) {
      return s->scales[((first + row) / block_n - begin / block_n) * columns + column];
    };
    if (part.dtype == DType::kF32) {
      const float* scales = s->scales.data() + (first / block_n - begin / block_n) * columns;
      dequantise_rows(bytes, static_cast<int64_t>(first), static_cast<int64_t>(rows), source.k,
                      scales, source.block_n, source.block_k, room(&s->f32, rows * k));
      bytes = reinterpret_cast<const uint8_t*>(s->f32.data());
    } else {
      auto* scales = reinterpret_cast<float*>(out + part.scales);
      const uint64_t step = uk ? part.scale_k : part.scale_n;
      const uint64_t steps = ceil_div(rows, step);
      for (uint64_t i = 0; i < steps; ++i) {
        for (uint64_t j = 0; j < columns; ++j) {
          scales[uk ? j * steps + i : i * columns + j] = scale_at(i * step, j);
        }
      }
    }
  } else {
    DSV3_TRY(read_rows(source, first, first + rows, &s->in));
    bytes = s->in.data();
  }
  const size_t element = kernels::dtype_size(part.dtype);
  if (uk) {
    uint8_t* turned = room(&s->other, rows * k * element);
    transpose(bytes, element, static_cast<int64_t>(rows), source.k, turned);
    bytes = turned;
  }
  tile_rows(bytes, element, part.n, part.k, out);
  return {};
}

Status ConvertPipeline::compare(const Chunk& chunk, Scratch* s) {
  const SourceCopy& pair = plan_.copies[chunk.record];
  const size_t bytes = chunk.end - chunk.begin;
  DSV3_TRY(pair.copy->file->read_at(pair.copy->begin + chunk.begin, room(&s->in, bytes), bytes));
  DSV3_TRY(pair.original->file->read_at(pair.original->begin + chunk.begin, room(&s->other, bytes),
                                        bytes));
  if (std::memcmp(s->in.data(), s->other.data(), bytes) == 0) return {};
  return make_field_error(Code::kUnsupported, pair.copy->name.c_str(),
                          "%s differs from %s, expected a copy of it", pair.copy->where().c_str(),
                          pair.original->name.c_str());
}

std::vector<float>* ConvertPipeline::pending_scales(const Chunk& chunk) {
  return &pending_[{chunk.record, chunk.item, chunk.part}];
}

// --- writing

void ConvertPipeline::hash(const Chunk& chunk, const uint8_t* bytes) {
  if (chunk.offset == 0) XXH3_64bits_reset(&hash_state_);
  XXH3_64bits_update(&hash_state_, bytes, chunk.bytes);
  if (chunk.last_of_item) {
    plan_.records[chunk.record].hashes[chunk.item] = XXH3_64bits_digest(&hash_state_);
  }
}

Status ConvertPipeline::write(const Chunk& chunk, const uint8_t* bytes) {
  const uint64_t offset =
      data_offset_ + plan_.records[chunk.record].item_offset(chunk.item) + chunk.offset;
  DSV3_TRY(file_.write_at(offset, bytes, chunk.bytes));
  if (!drop_cache_) return {};
  uint64_t begin = 0, end = 0;
  {
    // What lies half a step behind has been written by now; a straggler is written back later.
    const std::lock_guard lock(mutex_);
    if (offset < flushed_ + kFlushStep) return {};
    begin = flushed_;
    end = flushed_ = offset - kFlushStep / 2;
  }
  file_.flush_range(begin, end - begin);
  return {};
}

void ConvertPipeline::prefetch(size_t index) {
  if (index >= plan_.chunks.size()) return;
  const Chunk& chunk = plan_.chunks[index];
  if (chunk.kind != Chunk::Kind::kRows) return;
  const SourceMatrix& source = plan_.source(chunk);
  source.weight->file->will_need(source.weight->begin + chunk.begin * source.row_bytes(),
                                 (chunk.end - chunk.begin) * source.row_bytes());
}

}  // namespace dsv3
