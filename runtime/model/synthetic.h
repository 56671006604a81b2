// Random weights for a model that has only a shape: quick to make (memory speed), finite
// everywhere, of a size that keeps activations near one and routing spread over the experts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/base/status.h"
#include "runtime/model/model.h"
#include "runtime/model/schema.h"

namespace dsv3 {

// Shapes by name: "tiny" (the shipped model's), "v2-lite", "v3". `layers` > 0 keeps only so many
// layers (a V3 of 61 does not fit into most machines).
Result<ModelConfig> synthetic_config(const std::string& shape, int64_t layers);

// Sets every record's types; place_records() comes next.
void choose_synthetic_types(std::vector<Record>* records, const SyntheticOptions& options);
// Writes all weights into `data`, on several threads.
Status fill_synthetic(const std::vector<Record>& records, const SyntheticOptions& options,
                      uint8_t* data);

}  // namespace dsv3
