// What the tests share: where their data lies, temporary folders, reading golden safetensors files
// (independently of the library's own reader, so that a bug in one cannot hide in the other).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace dsv3::test {

std::string source_path(const std::string& relative);  // a file of the repository
std::string read_bytes(const std::string& path);       // throws std::runtime_error
void write_bytes(const std::string& path, const std::string& bytes);
// The Jinja text of a published chat template, by dsv3's name of it; throws for others.
std::string published_template(const std::string& name);

// tiny-coder's checkpoint in a new folder, without the last tokens of its vocabulary: 4093 to 4095
// are padding, the last one ends a sequence.
void copy_padded_checkpoint(const std::string& folder);

// A folder that is removed with its contents when the object goes.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::string& path() const { return path_; }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

struct GoldenTensor {
  std::vector<int64_t> shape;
  std::vector<float> f32;    // F32 tensors
  std::vector<int32_t> i32;  // I32 tensors
};
std::map<std::string, GoldenTensor> read_golden(const std::string& path);

// norm(a - b) / norm(b); NaN counts as infinite.
double relative_error(const float* a, const float* b, size_t count);
double median(std::vector<double> values);

}  // namespace dsv3::test
