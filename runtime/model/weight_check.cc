#include "runtime/model/weight_check.h"

#include <algorithm>

#include "runtime/base/checked.h"
#include "runtime/model/repack.h"

namespace dsv3 {
namespace {

using kernels::DType;
using kernels::kTileK;
using kernels::kTileN;
using kernels::Layout;

constexpr uint8_t kMxNan = 255;

struct Place {
  uint64_t row = 0, column = 0;
};

// Where the element with this index in memory stands in the matrix. Not for MXFP4.
Place place_of(const Part& part, uint64_t index) {
  if (part.layout == Layout::kRowMajor) {
    const auto k = static_cast<uint64_t>(part.k);
    return {index / k, index % k};
  }
  const uint64_t pairs = ceil_div<uint64_t>(static_cast<uint64_t>(part.k), kTileK);
  const uint64_t pair = index / (kTileN * kTileK), inside = index % (kTileN * kTileK);
  return {pair / pairs * kTileN + inside / kTileK, pair % pairs * kTileK + inside % kTileK};
}

std::string at_place(const RecordKind kind, const char* what, Place place) {
  const auto row = static_cast<unsigned long long>(place.row);
  if (kind == RecordKind::kVector) return format("%s at [%llu]", what, row);
  return format("%s at [%llu, %llu]", what, row, static_cast<unsigned long long>(place.column));
}

// The bytes of a stretch of the item, [begin, end), that were given: a part of those.
struct Window {
  uint64_t at = 0;  // of bytes, in the item
  std::span<const uint8_t> bytes;

  std::span<const uint8_t> of(uint64_t begin, uint64_t end) const {
    const uint64_t from = std::clamp<uint64_t>(begin, at, at + bytes.size());
    const uint64_t to = std::clamp<uint64_t>(end, from, at + bytes.size());
    return bytes.subspan(from - at, to - from);
  }
  uint64_t offset(std::span<const uint8_t> some) const {
    return at + static_cast<uint64_t>(some.data() - bytes.data());
  }
};

// The scales of MXFP4 stand among the elements: 64 bytes of every 128 inputs of 16 rows.
std::optional<Place> bad_mx_scale(const Part& part, const Window& window) {
  constexpr int64_t kGroup = 4 * kernels::kMxBlock;
  for (int64_t row = 0; row < part.n; row += kTileN) {
    // 16 rows with all their columns are one piece.
    const uint64_t tile = part.data + kernels::mx_place(row, 0, part.k).scale;
    const uint64_t tile_bytes = kernels::matrix_bytes(part.dtype, part.layout, kTileN, part.k);
    if (window.of(tile, tile + tile_bytes).empty()) continue;
    for (int64_t column = 0; column < part.k; column += kGroup) {
      const uint64_t begin = part.data + kernels::mx_place(row, column, part.k).scale;
      const std::span<const uint8_t> scales = window.of(begin, begin + 4 * kTileN);
      const auto bad = std::find(scales.begin(), scales.end(), kMxNan);
      if (bad == scales.end()) continue;
      const auto index = static_cast<uint64_t>(bad - scales.begin());
      return Place{static_cast<uint64_t>(row) + index % kTileN,
                   static_cast<uint64_t>(column) + index / kTileN * kernels::kMxBlock};
    }
  }
  return {};
}

std::optional<std::string> bad_in(RecordKind kind, const Part& part, const Window& window) {
  if (part.dtype == DType::kMXFP4) {
    const std::optional<Place> place = bad_mx_scale(part, window);
    if (!place) return {};
    return at_place(kind, "a scale that is NaN", *place);
  }
  const size_t element = kernels::dtype_size(part.dtype);
  const std::span<const uint8_t> data = window.of(part.data, part.data + part.data_bytes());
  const int64_t bad = first_non_finite(data.data(), part.dtype, data.size() / element);
  if (bad >= 0) {
    const uint64_t before = (window.offset(data) - part.data) / element;
    return at_place(kind, part.dtype == DType::kF8E4M3 ? "NaN" : "NaN or infinity",
                    place_of(part, before + static_cast<uint64_t>(bad)));
  }
  const uint64_t scales_end = part.scales + part.scale_count() * sizeof(float);
  const std::span<const uint8_t> scales = window.of(part.scales, scales_end);
  const int64_t scale = first_non_finite(scales.data(), DType::kF32, scales.size() / sizeof(float));
  if (scale < 0) return {};
  const uint64_t index =
      (window.offset(scales) - part.scales) / sizeof(float) + static_cast<uint64_t>(scale);
  const uint64_t columns = ceil_div<uint64_t>(static_cast<uint64_t>(part.k), part.scale_k);
  return at_place(kind, "a scale that is NaN or infinity",
                  {index / columns * part.scale_n, index % columns * part.scale_k});
}

}  // namespace

std::optional<BadWeight> first_bad_weight(const Record& record, uint64_t at,
                                          std::span<const uint8_t> bytes) {
  for (size_t p = 0; p < record.parts.size(); ++p) {
    std::optional<std::string> what = bad_in(record.kind, record.parts[p], {at, bytes});
    if (what) return BadWeight{p, std::move(*what)};
  }
  return {};
}

}  // namespace dsv3
