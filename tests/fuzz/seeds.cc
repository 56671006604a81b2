// fuzz_seeds FOLDER: small valid inputs for the targets of the model floor.
#include <cstdio>
#include <filesystem>

#include "tests/unit/container_support.h"

using namespace dsv3::test;

namespace {

void write_seed(const std::string& root, const std::string& target, const std::string& name,
                const std::string& bytes) {
  std::filesystem::create_directories(root + "/" + target);
  write_bytes(root + "/" + target + "/" + name, bytes);
}

void model_seeds(const std::string& root) {
  for (const char* model : {"tests/data/models/v3-micro", "tests/data/models/v2-lite-micro",
                            "examples/models/tiny-coder"}) {
    const std::string name = std::filesystem::path(model).filename();
    write_seed(root, "config", name, read_bytes(source_path(std::string(model) + "/config.json")));
  }
  const MiniCheckpoint mini = mini_fp8();
  write_seed(root, "config", "mini", mini.config.dump());
  // A few tensors: a whole header of hundreds lets few inputs through per second.
  const std::vector<RawTensor> some(mini.tensors.begin(), mini.tensors.begin() + 6);
  write_seed(root, "safetensors", "mini", safetensors_file(some));
  write_seed(root, "safetensors", "two",
             safetensors_file({{"a", "F32", {2, 1}, std::string(8, '\0')},
                               {"b", "F8_E4M3", {3}, std::string(3, '\0')}}));
  write_seed(root, "safetensors_index", "mini",
             R"({"metadata":{"total_size":8},"weight_map":{"a":"model-1.safetensors"}})");
  OrderedJson plain = mini_config();
  plain["num_nextn_predict_layers"] = 0;
  plain["num_hidden_layers"] = 1;
  plain["tie_word_embeddings"] = true;
  for (const MiniCheckpoint& checkpoint : {mini, MiniBuilder(plain, "BF16").build()}) {
    const ContainerBytes bytes = ContainerBytes::of(checkpoint);
    write_seed(root, "container", std::to_string(bytes.header_bytes()),
               bytes.file.substr(0, dsv3::kPreambleBytes + bytes.header_bytes()));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: fuzz_seeds FOLDER\n");
    return 2;
  }
  model_seeds(argv[1]);
  return 0;
}
