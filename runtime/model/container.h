// The outer form of a .dsv3 file: a preamble, the FlatBuffers header, the data.
//
//   offset  bytes
//        0      8  magic "DSV3\r\n\x1a\n" (a transfer that rewrites line ends breaks it)
//        8      4  version, 1
//       12      4  zero
//       16      8  bytes of the header, H
//       24      8  offset of the data: 64 + H rounded up to 4096
//       32      8  bytes of the file
//       40     16  XXH3-128 of the header (canonical, big-endian): the model's fingerprint
//       56      8  zero
//       64      H  header, format.fbs
//
// Everything here works on memory, so that tests and fuzzers can call it with any bytes.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "runtime/base/status.h"
#include "runtime/model/config.h"
#include "runtime/model/schema.h"

namespace dsv3 {

inline constexpr size_t kPreambleBytes = 64;
inline constexpr uint32_t kContainerVersion = 1;

struct Preamble {
  uint64_t header_bytes = 0, data_offset = 0, file_bytes = 0;
  std::array<uint8_t, 16> fingerprint{};
};

struct ContainerHeader {
  ModelConfig config;
  bool has_tokenizer = false;
  std::span<const uint8_t> tokenizer;  // decoded: points into the header's bytes
  uint8_t chat_template = 0;
  std::vector<Record> records;
};

// Preamble and header as they stand at the start of a file, padded to the data's offset. The
// records are placed.
Result<std::vector<uint8_t>> encode_container(const ContainerHeader& header);

// The first kPreambleBytes bytes of a file that has `file_bytes`.
Result<Preamble> decode_preamble(std::span<const uint8_t> bytes, uint64_t file_bytes,
                                 const std::string& where);
// The header's bytes (aligned to 8, alive as long as the result is used): checksum, FlatBuffers
// verifier, then every cross-reference: config rules, names, shapes, types, offsets, sizes. Points
// the records into `weights` (bind_records() completes it).
Result<ContainerHeader> decode_header(const Preamble& preamble, std::span<const uint8_t> bytes,
                                      const std::string& where, ModelWeights* weights);

}  // namespace dsv3
