#include "runtime/model/repack.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "kernels/numeric.h"
#include "runtime/base/checked.h"

namespace dsv3 {
namespace {

using kernels::DType;

template <class T>
T load(const uint8_t* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Whether any value has all bits of `mask` set. In blocks without early exit, so that the compiler
// can use vectors: this runs over every weight.
template <class T>
int64_t first_with_bits(const uint8_t* data, size_t count, T mask) {
  constexpr size_t kBlock = 4096;
  for (size_t begin = 0; begin < count; begin += kBlock) {
    const size_t end = std::min(count, begin + kBlock);
    T hits = 0;
    for (size_t i = begin; i < end; ++i) {
      const T v = load<T>(data + i * sizeof(T));
      hits = static_cast<T>(hits | static_cast<T>((v & mask) == mask));
    }
    if (hits == 0) continue;
    for (size_t i = begin; i < end; ++i) {
      if ((load<T>(data + i * sizeof(T)) & mask) == mask) return static_cast<int64_t>(i);
    }
  }
  return -1;
}

// One panel of up to 16 rows. Pair is an unsigned integer as wide as two elements; Element one.
// Where rows are missing, `zeros` (k elements) stands in.
template <class Element, class Pair>
void tile_panel(const uint8_t* const rows[kernels::kTileN], int64_t k, uint8_t* out) {
  const int64_t pairs = k / 2;
  for (int64_t p = 0; p < pairs; ++p) {
    for (int r = 0; r < kernels::kTileN; ++r) {
      const Pair v = load<Pair>(rows[r] + static_cast<size_t>(p) * sizeof(Pair));
      std::memcpy(out + static_cast<size_t>(r) * sizeof(Pair), &v, sizeof v);
    }
    out += kernels::kTileN * sizeof(Pair);
  }
  if (k % 2 == 0) return;
  for (int r = 0; r < kernels::kTileN; ++r) {
    const Element v = load<Element>(rows[r] + static_cast<size_t>(k - 1) * sizeof(Element));
    const Pair pair = v;  // little-endian: the first of the two
    std::memcpy(out + static_cast<size_t>(r) * sizeof(Pair), &pair, sizeof pair);
  }
}

template <class Element, class Pair>
void tile(const uint8_t* rows, int64_t n, int64_t k, uint8_t* out) {
  const size_t row_bytes = static_cast<size_t>(k) * sizeof(Element);
  const size_t panel_bytes = static_cast<size_t>(ceil_div<int64_t>(k, 2)) * 16 * sizeof(Pair);
  std::vector<uint8_t> zeros;
  if (n % kernels::kTileN != 0) zeros.assign(row_bytes, 0);
  for (int64_t first = 0; first < n; first += kernels::kTileN) {
    const uint8_t* row[kernels::kTileN];
    for (int r = 0; r < kernels::kTileN; ++r) {
      row[r] = first + r < n ? rows + static_cast<size_t>(first + r) * row_bytes : zeros.data();
    }
    tile_panel<Element, Pair>(row, k, out);
    out += panel_bytes;
  }
}

template <class Element>
void transpose_elements(const uint8_t* rows, int64_t n, int64_t k, uint8_t* out) {
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t i = 0; i < n; ++i) {
      std::memcpy(out + static_cast<size_t>(j * n + i) * sizeof(Element),
                  rows + static_cast<size_t>(i * k + j) * sizeof(Element), sizeof(Element));
    }
  }
}

// The largest magnitude of a block, n x k of rows that are `stride` apart.
float largest(const float* rows, int64_t stride, int64_t n, int64_t k) {
  float amax = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) amax = std::max(amax, std::fabs(rows[i * stride + j]));
  }
  return amax;
}

}  // namespace

int64_t first_non_finite(const uint8_t* data, DType dtype, size_t count) {
  switch (dtype) {
    case DType::kF32:
      return first_with_bits<uint32_t>(data, count, 0x7f800000u);
    case DType::kBF16:
      return first_with_bits<uint16_t>(data, count, uint16_t{0x7f80});
    case DType::kF16:
      return first_with_bits<uint16_t>(data, count, uint16_t{0x7c00});
    case DType::kF8E4M3:
      return first_with_bits<uint8_t>(data, count, uint8_t{0x7f});
    case DType::kMXFP4:
      break;  // every code is finite
  }
  return -1;
}

void convert_to_f32(const uint8_t* data, DType dtype, size_t count, float* out) {
  if (dtype == DType::kF32) {
    std::memcpy(out, data, count * sizeof(float));
  } else if (dtype == DType::kBF16) {
    for (size_t i = 0; i < count; ++i)
      out[i] = kernels::bf16_to_float(load<uint16_t>(data + 2 * i));
  } else {
    for (size_t i = 0; i < count; ++i) out[i] = kernels::f16_to_float(load<uint16_t>(data + 2 * i));
  }
}

void tile_rows(const uint8_t* rows, size_t element, int64_t n, int64_t k, uint8_t* out) {
  if (element == 1) return tile<uint8_t, uint16_t>(rows, n, k, out);
  if (element == 2) return tile<uint16_t, uint32_t>(rows, n, k, out);
  tile<uint32_t, uint64_t>(rows, n, k, out);
}

void transpose(const uint8_t* rows, size_t element, int64_t n, int64_t k, uint8_t* out) {
  if (element == 1) return transpose_elements<uint8_t>(rows, n, k, out);
  if (element == 2) return transpose_elements<uint16_t>(rows, n, k, out);
  transpose_elements<uint32_t>(rows, n, k, out);
}

void quantise_rows(const float* rows, int64_t n, int64_t k, uint8_t* fp8, float* scales) {
  const int64_t columns = ceil_div(k, kQuantBlock);
  for (int64_t i0 = 0; i0 < n; i0 += kQuantBlock) {
    const int64_t block_n = std::min(kQuantBlock, n - i0);
    for (int64_t j0 = 0; j0 < k; j0 += kQuantBlock) {
      const int64_t block_k = std::min(kQuantBlock, k - j0);
      const float amax = largest(rows + i0 * k + j0, k, block_n, block_k);
      // Not below the smallest normal number: a block of subnormals must not divide by zero.
      const float scale = amax == 0 ? 1.0f : std::max(amax / 448.0f, FLT_MIN);
      scales[i0 / kQuantBlock * columns + j0 / kQuantBlock] = scale;
      for (int64_t i = i0; i < i0 + block_n; ++i) {
        for (int64_t j = j0; j < j0 + block_k; ++j) {
          fp8[i * k + j] = kernels::f8e4m3_from_float(rows[i * k + j] / scale);
        }
      }
    }
  }
}

void dequantise_rows(const uint8_t* fp8, int64_t row0, int64_t n, int64_t k, const float* scales,
                     int64_t block_n, int64_t block_k, float* out) {
  const int64_t columns = ceil_div(k, block_k);
  for (int64_t i = 0; i < n; ++i) {
    const float* row_scales = scales + ((row0 + i) / block_n - row0 / block_n) * columns;
    for (int64_t j = 0; j < k; ++j) {
      out[i * k + j] = kernels::kF8E4M3Table[fp8[i * k + j]] * row_scales[j / block_k];
    }
  }
}

// --- MXFP4

namespace {

// The place of one block of one row in its tile: where its 16 bytes of codes and its scale go.
class MxTile {
 public:
  MxTile(uint8_t* out, int64_t k) : out_(out), k_(k) {}

  // codes: [32]
  void put(int64_t row, int64_t block, const uint8_t* codes, uint8_t scale) {
    const kernels::MxPlace place = kernels::mx_place(row, block * kernels::kMxBlock, k_);
    out_[place.scale] = scale;
    uint8_t* bytes = out_ + place.byte;
    for (int group = 0; group < 4; ++group, bytes += 64) {
      for (int j = 0; j < 4; ++j) {
        const uint8_t* pair = codes + 8 * group + j;
        bytes[j] = static_cast<uint8_t>(pair[0] | pair[4] << 4);
      }
    }
  }

 private:
  uint8_t* out_;
  int64_t k_;
};

// Zeros everywhere, and scales of one for the rows that pad the last tile.
void clear_mx(int64_t n, int64_t k, uint8_t* out) {
  std::memset(out, 0, kernels::matrix_bytes(DType::kMXFP4, kernels::Layout::kTileMx, n, k));
  for (int64_t row = n; row % kernels::kTileN != 0; ++row) {
    for (int64_t column = 0; column < k; column += kernels::kMxBlock) {
      out[kernels::mx_place(row, column, k).scale] = 127;
    }
  }
}

// The sum of squared errors of rounding 32 values to E2M1 times 2^exponent, in units of
// 4^exponent. Branch-free: this runs three times over every weight. See e2m1_from_float.
float mx_error(const float* values, float inverse) {
  float sums[8] = {};
  for (int i = 0; i < kernels::kMxBlock; ++i) {
    const float a = std::fabs(values[i]) * inverse;
    const float small = (a > 0.25f ? 0.5f : 0.0f) + (a >= 0.75f ? 0.5f : 0.0f) +
                        (a > 1.25f ? 0.5f : 0.0f) + (a >= 1.75f ? 0.5f : 0.0f);
    const float large =
        (a > 2.5f ? 1.0f : 0.0f) + (a >= 3.5f ? 1.0f : 0.0f) + (a > 5.0f ? 2.0f : 0.0f);
    const float error = a - (small + large);
    sums[i % 8] += error * error;
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// The exponent for 32 finite values that are not all zero.
int mx_exponent(const float* values, float amax) {
  const int own = std::ilogb(amax) - 2;  // the format's rule
  int best = 0;
  double least = 0;
  for (const int candidate : {own, own + 1, own - 1}) {  // of equals, the format's own
    const int exponent = std::clamp(candidate, -127, 127);
    const double error = std::ldexp(
        static_cast<double>(mx_error(values, std::ldexp(1.0f, -exponent))), 2 * (exponent - own));
    if (candidate == own || error < least) {
      best = exponent;
      least = error;
    }
  }
  return best;
}

}  // namespace

void quantise_mx(const float* rows, int64_t n, int64_t k, uint8_t* out) {
  clear_mx(n, k, out);
  MxTile tile(out, k);
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t begin = 0; begin < k; begin += kernels::kMxBlock) {
      const int64_t count = std::min<int64_t>(kernels::kMxBlock, k - begin);
      float values[kernels::kMxBlock] = {};
      std::copy_n(rows + row * k + begin, count, values);
      const float amax = largest(values, 0, 1, count);
      const int exponent = amax == 0 ? 0 : mx_exponent(values, amax);
      const float inverse = std::ldexp(1.0f, -exponent);
      uint8_t codes[kernels::kMxBlock];
      for (int i = 0; i < kernels::kMxBlock; ++i) {
        codes[i] = kernels::e2m1_from_float(values[i] * inverse);
      }
      tile.put(row, begin / kernels::kMxBlock, codes, static_cast<uint8_t>(exponent + 127));
    }
  }
}

void tile_mx(const uint8_t* packed, const uint8_t* scales, int64_t n, int64_t k, uint8_t* out) {
  clear_mx(n, k, out);
  MxTile tile(out, k);
  const int64_t blocks = k / kernels::kMxBlock;
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      const uint8_t* from = packed + (row * blocks + block) * (kernels::kMxBlock / 2);
      uint8_t codes[kernels::kMxBlock];
      for (int i = 0; i < kernels::kMxBlock; ++i) {
        codes[i] = static_cast<uint8_t>(i % 2 == 0 ? from[i / 2] & 15 : from[i / 2] >> 4);
      }
      tile.put(row, block, codes, scales[row * blocks + block]);
    }
  }
}

}  // namespace dsv3
