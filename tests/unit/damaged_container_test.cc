// The damaged corpus, part three: .dsv3 files. Every error names the file and the field or tensor.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>

#include "runtime/base/os.h"
#include "tests/unit/container_support.h"

using namespace dsv3;
using namespace dsv3::test;

namespace {

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

const ContainerBytes& good() {
  static const ContainerBytes bytes = ContainerBytes::of(mini_fp8());
  return bytes;
}

void refused(const Status& status, const std::string& field, const std::string& part = "") {
  INFO(field << ": " << status.message());
  REQUIRE_FALSE(status.ok());
  CHECK(contains(status.message(), "m.dsv3"));
  CHECK(contains(status.field() + "|" + status.message(), field));
  CHECK(contains(status.message(), part));
}

// The error after a change behind a right checksum.
Status damaged(const std::function<void(ContainerBytes*)>& change) {
  ContainerBytes bytes = good();
  change(&bytes);
  bytes.rehash();
  return bytes.decode();
}

const char* const kExperts = "model.layers.1.mlp.experts";
const char* const kGate = "model.layers.0.mlp.gate_proj.weight";

}  // namespace

TEST_CASE("the undamaged file is read") { CHECK(good().decode().ok()); }

TEST_CASE("1: the file cut at every byte of preamble and header, and at every tensor") {
  TemporaryFolder folder;
  const std::string path = folder.file("m.dsv3");
  write_bytes(path, good().file);
  std::vector<uint64_t> sizes;
  ContainerBytes bytes = good();
  for (const auto* record : *bytes.header()->records()) {
    sizes.push_back(bytes.data_offset() + record->offset());
    sizes.push_back(bytes.data_offset() + record->offset() + record->bytes());
  }
  sizes.push_back(good().file.size() - 1);
  std::sort(sizes.rbegin(), sizes.rend());
  for (uint64_t size = bytes.data_offset(); size-- > 0;) sizes.push_back(size);
  int opened = 0;
  for (const uint64_t size : sizes) {  // descending: the file only shrinks
    if (size >= good().file.size()) continue;
    REQUIRE(truncate(path.c_str(), static_cast<off_t>(size)) == 0);
    const auto model = Model::open(path, {});
    opened += model.ok() ? 1 : 0;
    if (!contains(model.status().message(), "m.dsv3")) FAIL(model.status().message());
  }
  CHECK(opened == 0);
}
TEST_CASE("1: a header cut at every byte behind a right checksum") {
  int accepted = 0;
  // Up to the last eight bytes, which may be the FlatBuffer's padding.
  for (uint64_t size = 0; size + 8 <= good().header_bytes(); ++size) {
    ContainerBytes bytes = good();
    bytes.set_u64(16, size);
    const uint64_t data = (kPreambleBytes + size + 4095) / 4096 * 4096;
    const uint64_t all = data + good().file.size() - good().data_offset();
    bytes.set_u64(24, data);
    bytes.set_u64(32, all);
    bytes.file.resize(all);
    bytes.rehash();
    accepted += bytes.decode().ok() ? 1 : 0;
  }
  CHECK(accepted == 0);
}
TEST_CASE("1: every flipped bit of preamble and header is noticed") {
  ContainerBytes bytes = good();
  int accepted = 0;
  for (size_t bit = 0; bit < (kPreambleBytes + bytes.header_bytes()) * 8; ++bit) {
    char& byte = bytes.file[bit / 8];
    byte = static_cast<char>(byte ^ (1 << bit % 8));
    accepted += bytes.decode().ok() ? 1 : 0;
    byte = static_cast<char>(byte ^ (1 << bit % 8));
  }
  CHECK(accepted == 0);
}
TEST_CASE("24 and 25: every flipped byte of the header behind a right checksum") {
  // The verifier and the semantic pass stand alone here. Accepted may only be what changes no place
  // or shape: checksums, and numbers of the config within their rules.
  const size_t end = kPreambleBytes + good().header_bytes();
  for (const int mask : {0x01, 0x80, 0xff}) {
    for (size_t at = kPreambleBytes; at < end; ++at) {
      ContainerBytes bytes = good();
      bytes.file[at] = static_cast<char>(bytes.file[at] ^ mask);
      bytes.rehash();
      const auto preamble =
          decode_preamble({reinterpret_cast<const uint8_t*>(bytes.file.data()), kPreambleBytes},
                          bytes.file.size(), "m.dsv3");
      REQUIRE(preamble.ok());
      const auto size = preamble.value().header_bytes;
      const auto copy = std::make_unique<uint8_t[]>(size);
      std::memcpy(copy.get(), &bytes.file[kPreambleBytes], size);
      ModelWeights weights;
      const auto header = decode_header(preamble.value(), {copy.get(), size}, "m.dsv3", &weights);
      if (!header.ok()) continue;
      uint64_t last = 0;
      for (const Record& record : header.value().records) {
        if (record.offset < last) FAIL("records overlap");
        last = record.offset + record.stride * record.count;
      }
      if (last + good().data_offset() != good().file.size()) FAIL("records leave the file");
    }
  }
}
TEST_CASE("2 and 3: empty and short files, sizes near 2^64") {
  ContainerBytes bytes;
  refused(bytes.decode(), "not a .dsv3 file");
  bytes.file = good().file.substr(0, 7);
  refused(bytes.decode(), "not a .dsv3 file");
  bytes.file = good().file.substr(0, 63);
  refused(bytes.decode(), "file size", "file size is 63, expected at least 64");
  bytes.file = std::string(5000, '\0');
  refused(bytes.decode(), "not a .dsv3 file");
  const std::pair<size_t, const char*> fields[] = {
      {16, "header size"}, {24, "data offset"}, {32, "file size"}};
  for (const auto& [at, name] : fields) {
    for (const uint64_t v : {UINT64_MAX, UINT64_MAX - 63, UINT64_MAX - 4095, uint64_t{1} << 63,
                             uint64_t{1} << 32, good().u64(at) * 4096}) {
      ContainerBytes changed = good();
      changed.set_u64(at, v);
      refused(changed.decode(), name, at == 16 ? "expected at most " : "expected ");
    }
  }
  ContainerBytes version = good();
  version.file[8] = 2;
  refused(version.decode(), "version", "reads version 1");
  CHECK(version.decode().code() == Code::kUnsupported);
}
TEST_CASE("7 to 11, 21: records that overlap, leave holes, lie outside or unaligned") {
  const uint64_t size = good().file.size();
  for (const uint64_t offset : {uint64_t{0}, uint64_t{13}, uint64_t{64}, uint64_t{1} << 31, size,
                                UINT64_MAX, UINT64_MAX - 4095}) {
    refused(damaged([&](ContainerBytes* b) { b->record(kExperts)->mutate_offset(offset); }),
            kExperts, "offset");
    refused(damaged([&](ContainerBytes* b) { b->record(kExperts)->mutate_stride(offset); }),
            kExperts, "stride");
    refused(damaged([&](ContainerBytes* b) { b->record(kGate)->mutate_bytes(offset); }), kGate,
            "bytes");
    refused(damaged([&](ContainerBytes* b) {
              ContainerBytes::part(b->record(kExperts), 1)->mutate_data(offset);
            }),
            kExperts, "offset of the weights");
    refused(damaged([&](ContainerBytes* b) {
              ContainerBytes::part(b->record(kExperts), 1)->mutate_scales(offset);
            }),
            kExperts, "offset of the scales");
  }
  // A file that is longer or shorter than its index, both saying so.
  for (const int64_t more : {int64_t{4096}, int64_t{-4096}}) {
    ContainerBytes bytes = good();
    bytes.file.resize(size + static_cast<uint64_t>(more));
    bytes.set_u64(32, bytes.file.size());
    refused(bytes.decode(), "bytes of data");
  }
}
TEST_CASE("12 to 18: shapes, types and blocks that the config does not call for") {
  const auto with_part = [](const char* name, const std::function<void(fb::Part*)>& change) {
    return damaged([&](ContainerBytes* b) { change(ContainerBytes::part(b->record(name), 0)); });
  };
  for (const int32_t v : {0, -1, 47, INT32_MAX, INT32_MIN}) {
    refused(with_part(kGate, [&](fb::Part* p) { p->mutate_n(v); }), kGate, "config needs [48, 32]");
    refused(with_part(kGate, [&](fb::Part* p) { p->mutate_k(v); }), kGate, "config needs [48, 32]");
  }
  refused(with_part(kGate, [](fb::Part* p) { p->mutate_layout(0); }), kGate, "layout");
  refused(with_part(kGate, [](fb::Part* p) { p->mutate_reserved(1); }), kGate, "reserved");
  refused(with_part(kGate, [](fb::Part* p) { p->mutate_dtype(5); }), kGate, "type number 5");
  refused(with_part(kGate, [](fb::Part* p) { p->mutate_dtype(4); }), kGate, "expected 2");
  refused(with_part("model.norm.weight", [](fb::Part* p) { p->mutate_dtype(1); }),
          "model.norm.weight", "expected F32");
  refused(with_part("model.layers.1.mlp.gate.weight", [](fb::Part* p) { p->mutate_dtype(3); }),
          "model.layers.1.mlp.gate.weight", "BF16 or F32");
  refused(with_part("model.embed_tokens.weight", [](fb::Part* p) { p->mutate_dtype(4); }),
          "model.embed_tokens.weight", "type number 4");
  refused(with_part("lm_head.weight", [](fb::Part* p) { p->mutate_scale_n(16); }), "lm_head.weight",
          "expected none");
  for (const uint32_t v : {0u, 1u, 15u, UINT32_MAX}) {
    refused(with_part(kGate, [&](fb::Part* p) { p->mutate_scale_k(v); }), kGate, "scale blocks");
  }
  for (const uint32_t v : {0u, UINT32_MAX}) {
    refused(with_part(kGate, [&](fb::Part* p) { p->mutate_scale_n(v); }), kGate, "scale blocks");
  }
  // A finer grid is legal, but then the scales would take more room than the file has.
  refused(with_part(kGate, [](fb::Part* p) { p->mutate_scale_n(8); }), kGate, "bytes");
}
TEST_CASE("19, 20, 26: records missing, twice, renamed; counts beyond the buffer") {
  const auto rename = [](fb::Record* r) { r->mutable_name()->Mutate(0, 'M'); };
  refused(damaged([&](ContainerBytes* b) { rename(b->record(kGate)); }), kGate, "is called");
  refused(damaged([](ContainerBytes* b) { b->record(kExperts)->mutate_count(5); }), kExperts,
          "count 5, expected 4");
  refused(damaged([](ContainerBytes* b) { b->record(kExperts)->mutate_count(1'000'000'000); }),
          kExperts, "expected 4");
  // The length of a vector stands in its first four bytes.
  const auto set_length = [](const void* vector, uint32_t length) {
    std::memcpy(const_cast<void*>(vector), &length, 4);
  };
  for (const uint32_t length : {0u, 1u, 1'000'000u, UINT32_MAX}) {
    refused(damaged([&](ContainerBytes* b) { set_length(b->header()->records(), length); }),
            "m.dsv3");
    refused(damaged([&](ContainerBytes* b) { set_length(b->record(kExperts)->hashes(), length); }),
            "m.dsv3");
    refused(damaged([&](ContainerBytes* b) { set_length(b->record(kExperts)->parts(), length); }),
            "m.dsv3");
  }
  for (const uint32_t length : {1'000'000u, UINT32_MAX}) {
    refused(damaged([&](ContainerBytes* b) {
              set_length(b->header()->config()->eos_token_ids(), length);
            }),
            "header");
    refused(damaged([&](ContainerBytes* b) { set_length(b->record(kGate)->name(), length); }),
            "header");
  }
  // Two records whose places are exchanged.
  refused(damaged([](ContainerBytes* b) {
            auto* records =
                reinterpret_cast<uint32_t*>(const_cast<uint8_t*>(b->header()->records()->Data()));
            std::swap(records[2], records[3]);
            records[2] += 4;
            records[3] -= 4;
          }),
          "is called");
  refused(damaged([](ContainerBytes* b) {
            auto* records =
                reinterpret_cast<uint32_t*>(const_cast<uint8_t*>(b->header()->records()->Data()));
            records[3] = records[2] - 4;
          }),
          "is called");
}
TEST_CASE("21: parts and checksums at addresses that are no multiple of 8") {
  // A copy of the vector behind the header, with its elements four bytes from where they may lie.
  const auto moved = [](flatbuffers::voffset_t field, size_t element) {
    ContainerBytes bytes = good();
    const auto* begin = reinterpret_cast<const uint8_t*>(&bytes.file[kPreambleBytes]);
    const auto* record = reinterpret_cast<const flatbuffers::Table*>(bytes.record(kGate));
    const size_t slot = static_cast<size_t>(record->GetAddressOf(field) - begin);
    uint32_t offset;
    std::memcpy(&offset, begin + slot, 4);
    const size_t from = slot + offset;
    uint32_t count;
    std::memcpy(&count, begin + from, 4);
    const size_t size = 4 + count * element;
    const std::string vector = bytes.file.substr(kPreambleBytes + from, size);
    const size_t to = (bytes.header_bytes() + 7) / 8 * 8;
    REQUIRE(kPreambleBytes + to + size <= bytes.data_offset());
    bytes.file.replace(kPreambleBytes + to, size, vector);
    offset = static_cast<uint32_t>(to - slot);
    std::memcpy(&bytes.file[kPreambleBytes + slot], &offset, 4);
    bytes.set_u64(16, to + size);
    bytes.rehash();
    return bytes.decode();
  };
  refused(moved(fb::Record::VT_PARTS, sizeof(fb::Part)), kGate, "aligned");
  refused(moved(fb::Record::VT_HASHES, sizeof(uint64_t)), kGate, "aligned");
}
TEST_CASE("24: wrong identifier and root, garbage, vtable loops") {
  const auto at = [](ContainerBytes* b, size_t offset) {
    return &b->file[kPreambleBytes + offset];
  };
  refused(damaged([&](ContainerBytes* b) { std::memcpy(at(b, 4), "GGUF", 4); }), "header");
  for (const uint32_t root : {0u, 1u, 3u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
    refused(damaged([&](ContainerBytes* b) { std::memcpy(at(b, 0), &root, 4); }), "header");
  }
  for (const char fill : {'\0', '\x01', '\x7f', '\xff'}) {
    refused(damaged([&](ContainerBytes* b) { std::fill_n(at(b, 8), b->header_bytes() - 8, fill); }),
            "m.dsv3");
  }
  // The root table as its own vtable, and pointing before the buffer.
  for (const int32_t vtable : {0, 4, INT32_MAX, INT32_MIN}) {
    refused(damaged([&](ContainerBytes* b) {
              uint32_t root;
              std::memcpy(&root, at(b, 0), 4);
              std::memcpy(at(b, root), &vtable, 4);
            }),
            "m.dsv3");
  }
  Random random;
  for (int i = 0; i < 2000; ++i) {
    const Status status = damaged([&](ContainerBytes* b) {
      const size_t size = 8 + random.next() % 200;
      for (size_t k = 8; k < size; ++k) *at(b, k) = static_cast<char>(random.next());
    });
    if (!status.ok() && !contains(status.message(), "m.dsv3")) FAIL(status.message());
  }
}
TEST_CASE("31 to 40: a header's config passes the rules of config.json") {
  const auto with_config = [](const std::function<bool(fb::Config*)>& change) {
    return damaged([&](ContainerBytes* b) { REQUIRE(change(b->header()->mutable_config())); });
  };
  for (const int64_t v : {int64_t{-1}, int64_t{1} << 31, INT64_MAX, INT64_MIN}) {
    refused(with_config([&](fb::Config* c) { return c->mutate_vocab_size(v); }), "vocab_size");
    refused(with_config([&](fb::Config* c) { return c->mutate_hidden_size(v); }), "hidden_size");
    refused(with_config([&](fb::Config* c) { return c->mutate_num_hidden_layers(v); }),
            "num_hidden_layers");
    refused(with_config([&](fb::Config* c) { return c->mutate_num_nextn_predict_layers(v); }),
            "num_nextn_predict_layers");
    refused(with_config([&](fb::Config* c) { return c->mutate_num_attention_heads(v); }),
            "num_attention_heads");
    refused(with_config([&](fb::Config* c) { return c->mutate_kv_lora_rank(v); }), "kv_lora_rank");
    refused(with_config([&](fb::Config* c) { return c->mutate_n_routed_experts(v); }),
            "n_routed_experts");
    refused(with_config([&](fb::Config* c) { return c->mutate_n_group(v); }), "n_group");
    refused(with_config([&](fb::Config* c) { return c->mutate_weight_block_rows(v); }),
            "weight_block_size");
  }
  refused(with_config([](fb::Config* c) { return c->mutate_vocab_size(41); }),
          "model.embed_tokens.weight", "config needs [41, 32]");
  refused(with_config([](fb::Config* c) { return c->mutate_num_hidden_layers(1); }), "records");
  refused(with_config([](fb::Config* c) { return c->mutate_num_hidden_layers(1000); }), "records",
          "index has");
  refused(with_config([](fb::Config* c) { return c->mutate_n_group(3); }), "n_routed_experts");
  refused(with_config([](fb::Config* c) { return c->mutate_num_experts_per_tok(3); }),
          "num_experts_per_tok");
  refused(with_config([](fb::Config* c) { return c->mutate_topk_method(3); }), "topk_method");
  refused(with_config([](fb::Config* c) { return c->mutate_rope_theta(NAN); }), "rope_theta");
  refused(with_config([](fb::Config* c) { return c->mutate_rms_norm_eps(-INFINITY); }),
          "rms_norm_eps");
  refused(with_config([](fb::Config* c) {
            c->mutable_model_type()->Mutate(0, 'D');
            return true;
          }),
          "model_type");
  refused(with_config([](fb::Config* c) {
            c->mutable_eos_token_ids()->Mutate(0, 40);
            return true;
          }),
          "eos_token_id");
}
TEST_CASE("damaged data: opening does not look, verify names the tensor") {
  TemporaryFolder folder;
  const std::string path = folder.file("m.dsv3");
  ContainerBytes bytes = good();
  for (const auto* record : *bytes.header()->records()) {
    const uint32_t item = record->count() - 1;
    const uint64_t at =
        bytes.data_offset() + record->offset() + item * record->stride() + record->bytes() - 1;
    ContainerBytes flipped = good();
    flipped.file[at] = static_cast<char>(flipped.file[at] ^ 0x10);
    write_bytes(path, flipped.file);
    const std::string name = record->name()->str();
    for (const Residency residency : {Residency::kMap, Residency::kCopy}) {
      OpenOptions options;
      options.residency = residency;
      const auto model = Model::open(path, options);
      REQUIRE(model.ok());
      const Status status = model.value()->verify({});
      CHECK(status.code() == Code::kCorrupt);
      refused(status, name, "checksum");
      if (record->count() > 1) CHECK(status.field() == name + "." + std::to_string(item));
      options.verify = true;
      refused(Model::open(path, options).status(), name, "checksum");
    }
  }
}
TEST_CASE("28: FIFO, directory, device and nothing in place of a model") {
  TemporaryFolder folder;
  const std::string path = folder.file("m.dsv3");
  CHECK(Model::open(path, {}).status().code() == Code::kNotFound);
  CHECK(Model::open("", {}).status().code() == Code::kInvalidArgument);
  REQUIRE(mkfifo(path.c_str(), 0600) == 0);
  refused(Model::open(path, {}).status(), "is a FIFO");
  std::filesystem::remove(path);
  std::filesystem::create_directory(path);
  refused(Model::open(path, {}).status(), "is a directory");
  CHECK(contains(Model::open("/dev/zero", {}).status().message(), "is a device"));
}
TEST_CASE("a damaged tokenizer image and an unknown chat template") {
  const ContainerBytes coder = ContainerBytes::of(source_path("examples/models/tiny-coder"));
  TemporaryFolder folder;
  const std::string path = folder.file("m.dsv3");
  const auto open = [&](const std::function<void(ContainerBytes*)>& change) {
    ContainerBytes bytes = coder;
    change(&bytes);
    bytes.rehash();
    write_bytes(path, bytes.file);
    return Model::open(path, {}).status();
  };
  CHECK(open([](ContainerBytes*) {}).ok());
  const auto image = [](ContainerBytes* b) {
    return const_cast<uint8_t*>(b->header()->tokenizer()->Data());
  };
  refused(open([&](ContainerBytes* b) { std::fill_n(image(b), 64, uint8_t{0xff}); }), "tokenizer");
  refused(open([&](ContainerBytes* b) {
            const uint32_t half = b->header()->tokenizer()->size() / 2;
            std::memcpy(image(b) - 4, &half, 4);
          }),
          "tokenizer");
  const Status chat = open([](ContainerBytes* b) { b->header()->mutate_chat_template(200); });
  if (!chat.ok()) refused(chat, "chat_template");
}
