// Carries out a ConvertPlan: several threads make chunks (read, check, convert, tile), each chunk
// is hashed in the order of the file and written at its place. Memory is a few chunks per thread.
#pragma once

#include <xxhash.h>

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "runtime/base/os.h"
#include "runtime/model/convert_plan.h"

namespace dsv3 {

class ConvertPipeline {
 public:
  // Fills the hashes of plan->records. Data begins at `data_offset` of `file`.
  ConvertPipeline(ConvertPlan* plan, AtomicFile* file, uint64_t data_offset);
  Status run(const Progress& progress);

 private:
  struct Scratch {
    std::vector<uint8_t> in, other, fp8, out;
    std::vector<float> f32, scales;
  };
  class ScratchLease;
  class Turn;

  Status do_chunk(size_t index);
  Status make_rows(const Chunk& chunk, Scratch* s);
  Status make_scales(const Chunk& chunk, Scratch* s);
  Status make_head(const Chunk& chunk, Scratch* s);
  Status compare(const Chunk& chunk, Scratch* s);

  Status read_rows(const SourceMatrix& source, uint64_t begin, uint64_t end,
                   std::vector<uint8_t>* out);
  Status read_scales(const SourceMatrix& source, std::vector<float>* out);
  // The chunk's rows as MXFP4 tiles in s->out.
  Status make_mx(const Chunk& chunk, Scratch* s);
  // Rows [*begin, *end) of an FP8 or to-be-quantised matrix as FP8 codes in s->fp8, with the scales
  // of their blocks in s->scales; widens the range to whole blocks where it quantises.
  Status fp8_rows(const SourceMatrix& source, uint64_t* begin, uint64_t* end, Scratch* s);

  void hash(const Chunk& chunk, const uint8_t* bytes);
  Status write(const Chunk& chunk, const uint8_t* bytes);
  void prefetch(size_t index);
  std::vector<float>* pending_scales(const Chunk& chunk);

  ConvertPlan& plan_;
  AtomicFile& file_;
  const uint64_t data_offset_;
  const bool drop_cache_;  // a model that would push everything else out of the page cache
  std::atomic<uint64_t> done_bytes_{0};

  std::mutex mutex_;  // of everything below
  std::condition_variable turn_changed_;
  size_t turn_ = 0;
  size_t failed_ = SIZE_MAX;  // the first chunk that failed; those behind it give up
  std::vector<std::unique_ptr<Scratch>> idle_;
  // Scales made while the rows of a matrix are quantised, by record, item and part.
  std::map<std::tuple<uint32_t, uint32_t, uint8_t>, std::vector<float>> pending_;
  uint64_t flushed_ = 0;  // bytes of the file whose write-back was asked for

  XXH3_state_t hash_state_;  // touched by whoever has the turn
};

}  // namespace dsv3
