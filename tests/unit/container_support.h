// .dsv3 files in memory, to be damaged: a valid one made from a mini checkpoint, and its checksum
// set right again after a change, so that what lies behind the checksum is reached.
#pragma once

#include <xxhash.h>

#include <memory>
#include <string>

#include "runtime/model/container.h"
#include "runtime/model/convert.h"
#include "runtime/model/format_generated.h"
#include "tests/unit/model_support.h"

namespace dsv3::test {

struct ContainerBytes {
  std::string file;

  static ContainerBytes of(const std::string& checkpoint_dir) {
    TemporaryFolder folder;
    const Status status = convert_checkpoint(checkpoint_dir, folder.file("m.dsv3"), {});
    if (!status.ok()) throw std::runtime_error(status.message());
    return {read_bytes(folder.file("m.dsv3"))};
  }
  static ContainerBytes of(const MiniCheckpoint& checkpoint) {
    TemporaryFolder folder;
    checkpoint.write(folder.path());
    return of(folder.path());
  }

  uint64_t u64(size_t at) const {
    uint64_t v;
    std::memcpy(&v, &file[at], 8);
    return v;
  }
  void set_u64(size_t at, uint64_t v) { std::memcpy(&file[at], &v, 8); }
  uint64_t header_bytes() const { return u64(16); }
  uint64_t data_offset() const { return u64(24); }
  fb::Header* header() { return fb::GetMutableHeader(&file[kPreambleBytes]); }
  fb::Record* record(const std::string& name) {
    for (const fb::Record* r : *header()->records()) {
      if (r->name()->str() == name) return const_cast<fb::Record*>(r);
    }
    throw std::runtime_error("no record " + name);
  }
  static fb::Part* part(fb::Record* record, uint32_t i) {
    return const_cast<fb::Part*>(record->mutable_parts()->Get(i));
  }
  void rehash() {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(&file[kPreambleBytes], header_bytes()));
    std::memcpy(&file[40], canonical.digest, 16);
  }

  // What opening does with preamble and header, without a file. The header is copied to memory of
  // exactly its size, so that reading past it is seen.
  Status decode() const {
    const auto* bytes = reinterpret_cast<const uint8_t*>(file.data());
    const auto preamble =
        decode_preamble({bytes, std::min(file.size(), kPreambleBytes)}, file.size(), "m.dsv3");
    if (!preamble.ok()) return preamble.status();
    const size_t size = preamble.value().header_bytes;
    const auto header = std::make_unique<uint8_t[]>(size);
    std::memcpy(header.get(), bytes + kPreambleBytes, size);
    ModelWeights weights;
    return decode_header(preamble.value(), {header.get(), size}, "m.dsv3", &weights).status();
  }
};

}  // namespace dsv3::test
