// Writes a safetensors file of float32 tensors: what `dsv3 logits` puts out.
#pragma once

#include <string>
#include <vector>

namespace cli {

struct NamedTensor {
  std::string name;
  std::vector<size_t> shape;
  const std::vector<float>* values;  // product of shape, row-major
};

// Throws Failure; a file that could not be written whole is removed.
void write_safetensors(const std::string& path, const std::vector<NamedTensor>& tensors);

}  // namespace cli
