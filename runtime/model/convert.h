// From a Hugging Face checkpoint folder to one .dsv3 file.
#pragma once

#include <string>

#include "runtime/base/status.h"
#include "runtime/model/model.h"
#include "runtime/model/schema.h"

namespace dsv3 {

enum class WeightsMode : uint8_t {
  kKeep = 0,   // every matrix in the checkpoint's own type
  kFp8 = 1,    // BF16/F16/F32 matrices become E4M3 with 128x128 block scales
  kMxfp4 = 2,  // all become E2M1 with an E8M0 scale for each 32 inputs
};

// What the matrices become, by what they belong to. Router, norms and eh_proj stay. What a
// checkpoint already stores in a smaller type is never made larger.
struct WeightModes {
  WeightsMode weights = WeightsMode::kKeep;  // attention and feed-forward: kKeep or kFp8
  WeightsMode ffn = WeightsMode::kKeep;      // feed-forward layers; kKeep: as `weights` says
  WeightsMode experts = WeightsMode::kKeep;  // routed experts; kKeep: as `ffn` says
  WeightsMode head = WeightsMode::kKeep;     // embedding and head: kKeep or kFp8

  WeightsMode of(RecordKind kind) const;
};

struct ConvertOptions : WeightModes {
  Progress progress;
  bool overwrite = false;  // false: an existing output file is refused
};

// Streams: resident memory stays bounded whatever the model's size. Writes to a temporary name
// beside `output` and renames it at the end; on error or cancel (kCancelled) nothing is left
// behind.
Status convert_checkpoint(const std::string& checkpoint_dir, const std::string& output,
                          const ConvertOptions& options);

}  // namespace dsv3
