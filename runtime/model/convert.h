// From a Hugging Face checkpoint folder to one .dsv3 file.
#pragma once

#include <string>

#include "runtime/base/status.h"
#include "runtime/model/model.h"

namespace dsv3 {

enum class WeightsMode : uint8_t {
  kKeep = 0,  // every matrix in the checkpoint's own type
  kFp8 = 1,   // BF16/F16/F32 matrices of attention and feed-forward layers become E4M3 with 128x128
              // block scales; embedding, head, router, norms and eh_proj stay
};

struct ConvertOptions {
  WeightsMode weights = WeightsMode::kKeep;
  Progress progress;
  bool overwrite = false;  // false: an existing output file is refused
};

// Streams: resident memory stays bounded whatever the model's size. Writes to a temporary name
// beside `output` and renames it at the end; on error or cancel (kCancelled) nothing is left
// behind.
Status convert_checkpoint(const std::string& checkpoint_dir, const std::string& output,
                          const ConvertOptions& options);

}  // namespace dsv3
