#include "tests/support/support.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>

namespace dsv3::test {

std::string source_path(const std::string& relative) {
  return std::string(DSV3_SOURCE_DIR) + "/" + relative;
}

std::string read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!out) throw std::runtime_error("cannot write " + path);
}

void copy_padded_checkpoint(const std::string& folder) {
  std::filesystem::copy(source_path("examples/models/tiny-coder"), folder);
  const std::string tokenizer = folder + "/tokenizer.json", config = folder + "/config.json";
  auto tokens = nlohmann::ordered_json::parse(read_bytes(tokenizer));
  auto& added = tokens.at("added_tokens");
  added.erase(added.end() - 3, added.end());
  write_bytes(tokenizer, tokens.dump());
  auto model = nlohmann::ordered_json::parse(read_bytes(config));
  model["eos_token_id"] = 4095;
  write_bytes(config, model.dump());
  std::filesystem::remove(folder + "/generation_config.json");  // names an end as well
}

std::string published_template(const std::string& name) {
  std::istringstream lines(read_bytes(source_path("tests/data/templates/jinja.jsonl")));
  for (std::string line; std::getline(lines, line);) {
    const nlohmann::json entry = nlohmann::json::parse(line);
    if (entry["template"] == name) return entry["jinja"];
  }
  throw std::runtime_error("jinja.jsonl has no template " + name);
}

TemporaryFolder::TemporaryFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "dsv3-test-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
  path_ = name;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::map<std::string, GoldenTensor> read_golden(const std::string& path) {
  const std::string bytes = read_bytes(path);
  uint64_t header_size = 0;
  std::memcpy(&header_size, bytes.data(), 8);
  const auto header = nlohmann::json::parse(bytes.substr(8, header_size));
  std::map<std::string, GoldenTensor> out;
  for (const auto& [name, info] : header.items()) {
    if (name == "__metadata__") continue;
    GoldenTensor tensor;
    tensor.shape = info["shape"].get<std::vector<int64_t>>();
    const size_t begin = 8 + header_size + info["data_offsets"][0].get<size_t>();
    const size_t count = (8 + header_size + info["data_offsets"][1].get<size_t>() - begin) / 4;
    if (info["dtype"] == "F32") {
      tensor.f32.resize(count);
      if (count > 0) std::memcpy(tensor.f32.data(), bytes.data() + begin, count * 4);
    } else if (info["dtype"] == "I32") {
      tensor.i32.resize(count);
      if (count > 0) std::memcpy(tensor.i32.data(), bytes.data() + begin, count * 4);
    } else {
      throw std::runtime_error(path + ": unexpected dtype of " + name);
    }
    out.emplace(name, std::move(tensor));
  }
  return out;
}

double relative_error(const float* a, const float* b, size_t count) {
  double diff = 0, norm = 0;
  for (size_t i = 0; i < count; ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    diff += d * d;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  const double error = std::sqrt(diff) / std::max(std::sqrt(norm), 1e-30);
  return std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

}  // namespace dsv3::test
