// Opening: residency, changes to the file afterwards, speed at DeepSeek-V3's size, memory of a
// conversion.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "runtime/base/json.h"
#include "runtime/base/os.h"
#include "tests/unit/container_support.h"

using namespace dsv3;
using namespace dsv3::test;

namespace {

std::shared_ptr<const Model> open(const std::string& path, Residency residency) {
  OpenOptions options;
  options.residency = residency;
  auto model = Model::open(path, options);
  INFO(model.status().message());
  REQUIRE(model.ok());
  return model.value();
}

void wait_for_clock() { usleep(20'000); }  // file times advance in steps of the kernel's tick

// A safetensors checkpoint with zeros for weights, as a sparse file of any size.
void write_sparse_checkpoint(const std::string& folder, const OrderedJson& config,
                             const std::vector<RawTensor>& tensors) {
  OrderedJson header = OrderedJson::object();
  uint64_t at = 0;
  for (const RawTensor& t : tensors) {
    const uint64_t bytes = static_cast<uint64_t>(t.count()) * raw_bytes(t.dtype);
    header[t.name] = {{"dtype", t.dtype}, {"shape", t.shape}, {"data_offsets", {at, at + bytes}}};
    at += bytes;
  }
  const std::string text = header.dump();
  write_bytes(folder + "/model.safetensors", safetensors_file(text, ""));
  REQUIRE(truncate((folder + "/model.safetensors").c_str(),
                   static_cast<off_t>(8 + text.size() + at)) == 0);
  write_bytes(folder + "/config.json", config.dump());
}

}  // namespace

TEST_CASE("27: a mapped file that is cut, changed or replaced afterwards") {
  TemporaryFolder folder;
  const std::string path = folder.file("m.dsv3");
  const std::string bytes = ContainerBytes::of(mini_fp8()).file;
  SUBCASE("cut short") {
    write_bytes(path, bytes);
    const auto mapped = open(path, Residency::kMap);
    const auto copied = open(path, Residency::kCopy);
    CHECK(mapped->check_unchanged().ok());
    REQUIRE(truncate(path.c_str(), 5000) == 0);
    const Status status = mapped->check_unchanged();
    CHECK(status.code() == Code::kFileChanged);
    CHECK(status.message().find("m.dsv3: has 5000 bytes") != std::string::npos);
    CHECK_FALSE(mapped->verify({}).ok());
    // The copy does not notice.
    CHECK(copied->check_unchanged().ok());
    CHECK(copied->verify({}).ok());
  }
  SUBCASE("written to") {
    write_bytes(path, bytes);
    const auto mapped = open(path, Residency::kMap);
    wait_for_clock();
    const int fd = ::open(path.c_str(), O_WRONLY);
    REQUIRE(fd >= 0);
    REQUIRE(pwrite(fd, "x", 1, 6000) == 1);
    close(fd);
    CHECK(mapped->check_unchanged().code() == Code::kFileChanged);
  }
  SUBCASE("replaced, renamed, removed: the mapped file lives on") {
    write_bytes(path, bytes);
    const auto mapped = open(path, Residency::kMap);
    wait_for_clock();
    write_bytes(folder.file("other"), "other");
    std::filesystem::rename(folder.file("other"), path);
    CHECK(mapped->check_unchanged().ok());
    CHECK(mapped->verify({}).ok());
    std::filesystem::remove(path);
    CHECK(mapped->verify({}).ok());
  }
}

TEST_CASE("both residencies give the same weights; progress and cancelling of a copy") {
  TemporaryFolder folder;
  const std::string path = folder.file("m.dsv3");
  REQUIRE(convert_checkpoint(source_path("tests/data/models/v3-micro"), path, {}).ok());
  const auto mapped = open(path, Residency::kMap), copied = open(path, Residency::kCopy);
  CHECK(mapped->fingerprint() == copied->fingerprint());
  const MatrixView& a = mapped->weights().layers[2].experts.experts[5].down;
  const MatrixView& b = copied->weights().layers[2].experts.experts[5].down;
  CHECK(a.data != b.data);
  CHECK(std::memcmp(a.data, b.data, a.bytes) == 0);

  OpenOptions options;
  options.residency = Residency::kCopy;
  uint64_t last = 0;
  options.progress = [&](uint64_t done, uint64_t total) {
    CHECK(done <= total);
    last = done;
    return true;
  };
  REQUIRE(Model::open(path, options).ok());
  CHECK(last >= mapped->weight_bytes());
  CHECK(last < mapped->file_bytes());
  options.verify = true;  // a second pass, of the same progress
  uint64_t whole = 0;
  last = 0;
  options.progress = [&](uint64_t done, uint64_t total) {
    CHECK(done >= last);
    CHECK((whole == 0 || total == whole));
    last = done;
    whole = total;
    return true;
  };
  REQUIRE(Model::open(path, options).ok());
  CHECK(last == whole);
  options.progress = [](uint64_t, uint64_t) { return false; };
  CHECK(Model::open(path, options).status().code() == Code::kCancelled);
  CHECK(mapped->verify([](uint64_t, uint64_t) { return false; }).code() == Code::kCancelled);
}

TEST_CASE("what a model says of itself") {
  TemporaryFolder folder;
  const std::string path = folder.file("m.dsv3");
  mini_fp8().write(folder.path());
  REQUIRE(convert_checkpoint(folder.path(), path, {}).ok());
  const auto model = open(path, Residency::kMap);
  int64_t elements = 0;
  const MiniCheckpoint checkpoint = mini_fp8();
  for (const RawTensor& t : checkpoint.tensors) {
    if (!t.name.ends_with("_scale_inv")) elements += t.count();
  }
  CHECK(model->parameters() == static_cast<uint64_t>(elements));
  CHECK_FALSE(model->has_tokenizer());
  CHECK(model->file_bytes() == std::filesystem::file_size(path));
  CHECK(model->active_bytes_per_token() < model->weight_bytes());
  bool found = false;
  for (const TensorInfo& t : model->tensors()) {
    CHECK(t.offset + t.bytes <= model->file_bytes());
    if (t.name != "model.layers.1.mlp.experts.3.down_proj.weight") continue;
    found = true;
    CHECK(t.dtype == "F8_E4M3");
    CHECK(t.shape == std::vector<int64_t>{32, 24});
    CHECK(t.bytes == 32 * 24 + 4 * 4);
  }
  CHECK(found);
}

#ifndef DSV3_EMULATED  // which keeps an entry for each page that is mapped, and refuses so many
TEST_CASE("a file of DeepSeek-V3's size opens in under 100 ms") {
  const auto json =
      parse_json(R"({"model_type": "deepseek_v3", "num_nextn_predict_layers": 1})", "");
  ContainerHeader header;
  header.config = ModelConfig::from_json(json.value(), "").value();
  REQUIRE(header.config.validate("").ok());
  ModelWeights weights;
  header.records = model_records(header.config, &weights);
  uint64_t experts = 0;
  for (Record& record : header.records) {
    if (record.kind == RecordKind::kExperts) ++experts;
    for (Part& part : record.parts) {
      const bool linear = record.kind != RecordKind::kVector &&
                          record.kind != RecordKind::kEmbedding &&
                          record.kind != RecordKind::kRouter && record.kind != RecordKind::kKept;
      if (linear) {
        part.dtype = kernels::DType::kF8E4M3;
        part.scale_n = part.scale_k = 128;
      } else if (record.kind != RecordKind::kVector) {
        part.dtype = kernels::DType::kBF16;
      }
    }
    record.hashes.assign(record.count, 0);
  }
  CHECK(experts == 59);
  const uint64_t data_bytes = place_records(&header.records);
  const auto bytes = encode_container(header);
  REQUIRE(bytes.ok());
  TemporaryFolder folder;
  const std::string path = folder.file("v3.dsv3");
  write_bytes(path, std::string(bytes.value().begin(), bytes.value().end()));
  REQUIRE(truncate(path.c_str(), static_cast<off_t>(bytes.value().size() + data_bytes)) == 0);

  int64_t best = INT64_MAX;
  for (int i = 0; i < 5; ++i) {
    const int64_t start = monotonic_ns();
    const auto model = Model::open(path, {});
    best = std::min(best, monotonic_ns() - start);
    INFO(model.status().message());
    REQUIRE(model.ok());
    CHECK(model.value()->file_bytes() > 680'000'000'000);
    CHECK(model.value()->parameters() > 680'000'000'000);
    CHECK(model.value()->weights().layers[60].experts.experts.size() == 256);
  }
  MESSAGE("header of " << bytes.value().size() << " bytes, opened in " << best / 1000 << " us");
#ifndef DSV3_SANITIZED
  CHECK(best < 100'000'000);
#endif
  // Into memory it does not go, and says so instead of being killed.
  OpenOptions options;
  options.residency = Residency::kCopy;
  const Status status = Model::open(path, options).status();
  CHECK(status.code() == Code::kOutOfMemory);
  CHECK(status.message().find("residency=map") != std::string::npos);
}
#endif

TEST_CASE("a conversion's memory stays bounded, whatever the model's size") {
  OrderedJson config = mini_config();
  config["vocab_size"] = 65536;
  config["hidden_size"] = 2048;
  config["n_routed_experts"] = 4;
  config["moe_intermediate_size"] = 4096;
  config["num_nextn_predict_layers"] = 0;
  // The shapes of a mini checkpoint of this config, without its bytes.
  OrderedJson small = config;
  small["vocab_size"] = 4;
  small["hidden_size"] = 2;
  small["moe_intermediate_size"] = 6;
  std::vector<RawTensor> tensors = MiniBuilder(small, "BF16").build().tensors;
  uint64_t source_bytes = 0;
  for (RawTensor& t : tensors) {
    t.bytes.clear();
    const bool vocab = t.name.find("embed") != std::string::npos || t.name == "lm_head.weight";
    for (size_t d = 0; d < t.shape.size(); ++d) {
      if (t.shape[d] == 4 && vocab)
        t.shape[d] = 65536;
      else if (t.shape[d] == 2 && t.name.find("kv_b") == std::string::npos)
        t.shape[d] = 2048;
      else if (t.shape[d] == 6)
        t.shape[d] = 4096;
    }
    source_bytes += static_cast<uint64_t>(t.count()) * 2;
  }
  CHECK(source_bytes > 700'000'000);
  TemporaryFolder folder;
  write_sparse_checkpoint(folder.path(), config, tensors);
  for (const WeightsMode mode : {WeightsMode::kKeep, WeightsMode::kFp8}) {
    ConvertOptions options;
    options.weights = mode;
    options.overwrite = true;
    const uint64_t before = resident_anonymous_bytes();
    uint64_t peak = 0;
    options.progress = [&](uint64_t, uint64_t) {
      peak = std::max(peak, resident_anonymous_bytes());
      return true;
    };
    const int64_t start = monotonic_ns();
    const Status status = convert_checkpoint(folder.path(), folder.file("m.dsv3"), options);
    const double seconds = static_cast<double>(monotonic_ns() - start) / 1e9;
    INFO(status.message());
    REQUIRE(status.ok());
    const double more = (static_cast<double>(peak) - static_cast<double>(before)) / (1 << 20);
    MESSAGE("converted " << source_bytes / 1'000'000 << " MB in " << seconds << " s, memory +"
                         << more << " MiB");
#ifndef DSV3_SANITIZED
    CHECK(more < 128);
#endif
    CHECK(Model::open(folder.file("m.dsv3"), {}).ok());
  }
}

TEST_CASE("a disk that is full: an error that names the output, and nothing left") {
  TemporaryFolder folder, output;
  mini_fp8().write(folder.path());
  struct sigaction ignore {
  }, before{};
  ignore.sa_handler = SIG_IGN;
  sigaction(SIGXFSZ, &ignore, &before);
  rlimit old{}, limit{};
  getrlimit(RLIMIT_FSIZE, &old);
  limit = old;
  limit.rlim_cur = 30'000;  // as a stand-in: the file cannot grow beyond this
  REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0);
  const Status status = convert_checkpoint(folder.path(), output.file("m.dsv3"), {});
  setrlimit(RLIMIT_FSIZE, &old);
  sigaction(SIGXFSZ, &before, nullptr);
  CHECK(status.code() == Code::kIo);
  INFO(status.message());
  CHECK(status.message().find("m.dsv3: cannot write") != std::string::npos);
  CHECK(list_directory(output.path()).value().empty());
}
