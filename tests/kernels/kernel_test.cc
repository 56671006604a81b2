#include "tests/kernels/kernel_test.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "kernels/numeric.h"

namespace dsv3::test {

uint64_t Random::next() {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return state_ * 0x2545f4914f6cdd1du;
}

float Random::uniform() {
  return static_cast<float>(static_cast<int64_t>(next() >> 40)) * 0x1p-23f - 1.0f;
}

int32_t Random::below(int32_t limit) {
  return static_cast<int32_t>((next() >> 33) % static_cast<uint64_t>(limit));
}

std::vector<float> Random::vector(size_t n, float scale) {
  std::vector<float> v(n);
  for (float& f : v) f = uniform() * scale;
  return v;
}

std::vector<float> Random::bf16_vector(size_t n, float scale) {
  std::vector<float> v = vector(n, scale);
  for (float& f : v) f = k::bf16_to_float(k::bf16_from_float(f));
  return v;
}

namespace {

// Whole numbers up to `largest` of 1/128, which one of every `block` in a row is.
std::vector<float> whole_rows(Random& random, int32_t largest, size_t block, size_t rows, size_t k,
                              size_t stride) {
  std::vector<float> v(rows * stride);
  for (size_t i = 0; i < v.size(); ++i) {
    const size_t column = i % stride;
    const size_t begin = column / block * block;
    const bool is_largest = column < k && column % block == (k - begin < block ? 0 : 7);
    v[i] = static_cast<float>(is_largest ? largest : random.below(255) - 127) / 128;
  }
  return v;
}

}  // namespace

std::vector<float> Random::i8_rows(size_t rows, size_t k, size_t stride) {
  return whole_rows(*this, 127, 32, rows, k, stride);
}

std::vector<float> Random::i16_rows(size_t rows, size_t k, size_t stride) {
  return whole_rows(*this, 128, 64, rows, k, stride);
}

std::vector<float> Random::exact_rows(k::DType weights, size_t rows, size_t k, size_t stride) {
  if (weights == k::DType::kMXFP4) return i8_rows(rows, k, stride);
  if (weights == k::DType::kF8E4M3) return i16_rows(rows, k, stride);
  return bf16_vector(rows * stride);
}

AlignedBytes::AlignedBytes(size_t size) {
  // The vector ends where the data ends; alignment space lies before it.
  storage_ = std::make_shared<std::vector<std::byte>>(size + k::kWeightAlign);
  const auto address = reinterpret_cast<uintptr_t>(storage_->data());
  const size_t shift = (k::kWeightAlign - address % k::kWeightAlign) % k::kWeightAlign;
  storage_->resize(size + shift);  // never reallocates: it shrinks
  data_ = storage_->data() + shift;
}

namespace {

float value_of(k::DType dtype, uint32_t code) {
  switch (dtype) {
    case k::DType::kF32:
      return std::bit_cast<float>(code);
    case k::DType::kBF16:
      return k::bf16_to_float(static_cast<uint16_t>(code));
    case k::DType::kF16:
      return k::f16_to_float(static_cast<uint16_t>(code));
    case k::DType::kF8E4M3:
      return k::f8e4m3_to_float(static_cast<uint8_t>(code));
    case k::DType::kMXFP4:
      return k::e2m1_to_float(static_cast<uint8_t>(code));
  }
  return 0;
}

size_t index_of(const MatrixSpec& s, int32_t row, int32_t column) {
  if (s.layout == k::Layout::kRowMajor) {
    return static_cast<size_t>(row) * static_cast<size_t>(s.k) + static_cast<size_t>(column);
  }
  const size_t pairs = static_cast<size_t>(s.k + 1) / 2;
  return ((static_cast<size_t>(row / 16) * pairs + static_cast<size_t>(column / 2)) * 16 +
          static_cast<size_t>(row % 16)) *
             2 +
         static_cast<size_t>(column % 2);
}

TestMatrix mx_from_codes(const MatrixSpec& s, const std::vector<uint32_t>& codes,
                         const std::vector<float>& scales) {
  TestMatrix t;
  const size_t bytes = k::matrix_bytes(s.dtype, k::Layout::kTileMx, s.n, s.k);
  t.bytes = AlignedBytes(bytes);
  std::memset(t.bytes.data(), 0, bytes);
  t.dense.resize(codes.size());
  const int32_t columns = (s.k + k::kMxBlock - 1) / k::kMxBlock;
  for (int32_t r = 0; r < s.n; ++r) {
    for (int32_t c = 0; c < s.k; ++c) {
      const size_t i = static_cast<size_t>(r) * static_cast<size_t>(s.k) + static_cast<size_t>(c);
      const auto scale =
          static_cast<uint8_t>(scales[static_cast<size_t>(r * columns + c / k::kMxBlock)]);
      const k::MxPlace place = k::mx_place(r, c, s.k);
      REQUIRE(place.byte < bytes);
      REQUIRE(place.scale < bytes);
      t.bytes.data()[place.byte] |= static_cast<std::byte>(codes[i] << place.shift);
      t.bytes.data()[place.scale] = static_cast<std::byte>(scale);
      t.dense[i] = value_of(s.dtype, codes[i]) * k::e8m0_to_float(scale);
    }
  }
  t.m.dtype = s.dtype;
  t.m.layout = k::Layout::kTileMx;
  t.m.n = s.n;
  t.m.k = s.k;
  t.m.data = k::Dev<const std::byte>(t.bytes.data());
  return t;
}

}  // namespace

TestMatrix matrix_from_codes(const MatrixSpec& s, const std::vector<uint32_t>& codes,
                             std::vector<float> scales) {
  if (s.dtype == k::DType::kMXFP4) return mx_from_codes(s, codes, scales);
  TestMatrix t;
  const size_t size = k::dtype_size(s.dtype);
  t.bytes = AlignedBytes(k::matrix_bytes(s.dtype, s.layout, s.n, s.k));
  t.scales = std::make_shared<const std::vector<float>>(std::move(scales));
  t.dense.resize(codes.size());
  const int32_t columns = (s.k + s.scale_k - 1) / s.scale_k;
  for (int32_t r = 0; r < s.n; ++r) {
    for (int32_t c = 0; c < s.k; ++c) {
      const size_t i = static_cast<size_t>(r) * static_cast<size_t>(s.k) + static_cast<size_t>(c);
      std::memcpy(t.bytes.data() + index_of(s, r, c) * size, &codes[i], size);
      t.dense[i] = value_of(s.dtype, codes[i]);
      if (s.dtype == k::DType::kF8E4M3) {
        t.dense[i] *= (*t.scales)[static_cast<size_t>(r / s.scale_n * columns + c / s.scale_k)];
      }
    }
  }
  t.m.dtype = s.dtype;
  t.m.layout = s.layout;
  t.m.n = s.n;
  t.m.k = s.k;
  t.m.data = k::Dev<const std::byte>(t.bytes.data());
  t.m.scales = k::Dev<const float>(t.scales->empty() ? nullptr : t.scales->data());
  t.m.scale_n = s.scale_n;
  t.m.scale_k = s.scale_k;
  return t;
}

TestMatrix random_matrix(Random& random, const MatrixSpec& s) {
  std::vector<uint32_t> codes(static_cast<size_t>(s.n) * static_cast<size_t>(s.k));
  const bool fp8 = s.dtype == k::DType::kF8E4M3;
  const float largest = fp8 && random.below(2) != 0 ? 448.0f : 1.0f;
  float reach = largest;
  for (size_t i = 0; i < codes.size(); ++i) {
    uint32_t& code = codes[i];
    const float v = random.uniform();
    if (largest > 1 && i % (16 * static_cast<size_t>(s.k)) == 0) {
      reach = random.below(4) == 0 ? 7.0f : largest;
    }
    switch (s.dtype) {
      case k::DType::kF32:
        code = std::bit_cast<uint32_t>(v * s.scale);
        break;
      case k::DType::kBF16:
        code = k::bf16_from_float(v * s.scale);
        break;
      case k::DType::kF16:
        code = k::f16_from_float(v * s.scale);
        break;
      case k::DType::kF8E4M3:
        code = reach > 7 && std::abs(v * reach) < 0.5f ? 0 : k::f8e4m3_from_float(v * reach);
        break;
      case k::DType::kMXFP4:
        code = k::e2m1_from_float(v * 6);
        break;
    }
  }
  std::vector<float> scales;
  if (fp8) {
    const int32_t count = ((s.n + s.scale_n - 1) / s.scale_n) * ((s.k + s.scale_k - 1) / s.scale_k);
    for (int32_t i = 0; i < count; ++i) {
      scales.push_back(s.scale / largest * (1.0f + 0.5f * random.uniform()));
    }
  }
  if (s.dtype == k::DType::kMXFP4) {  // about the largest value is s.scale
    const int code = 127 + static_cast<int>(std::lround(std::log2(s.scale / 6)));
    const int32_t count = s.n * ((s.k + k::kMxBlock - 1) / k::kMxBlock);
    for (int32_t i = 0; i < count; ++i) {
      scales.push_back(static_cast<float>(code + random.below(3) - 1));
    }
  }
  return matrix_from_codes(s, codes, std::move(scales));
}

std::unique_ptr<k::Device> device(const std::string& kernels, int threads) {
  k::DeviceOptions options;
  options.kernels = kernels;
  options.threads = threads;
  auto made = k::make_device(options);
  if (!made.ok()) throw std::runtime_error(made.status().message());
  return std::move(*made);
}

k::Limits small_limits(int32_t rows, int32_t width, int32_t n, int32_t experts) {
  k::Limits l;
  l.rows = rows;
  l.hidden = l.linear_k = width;
  l.linear_n = n;
  l.experts = experts;
  return l;
}

std::vector<std::string> fast_sets() {
  std::vector<std::string> sets = k::kernel_sets();
  sets.pop_back();
  return sets;
}

void check_close(const float* got, const float* want, size_t count, double absolute,
                 const std::string& what) {
  double xy = 0, xx = 0, yy = 0, worst = 0;
  for (size_t i = 0; i < count; ++i) {
    const double x = got[i];
    const double y = want[i];
    xy += x * y;
    xx += x * x;
    yy += y * y;
    const double difference = std::abs(x - y);
    worst = difference > worst || std::isnan(difference) ? difference : worst;
    if (std::isnan(worst)) break;
  }
  const double dissimilarity = xx + yy > 0 ? 1 - 2 * xy / (xx + yy) : 0;
  CHECK_MESSAGE(dissimilarity < 1e-9, what, ": 1 - 2xy/(xx+yy) is ", dissimilarity);
  CHECK_MESSAGE(worst <= absolute, what, ": worst difference is ", worst, ", limit ", absolute);
}

bool same_bits(const float* a, const float* b, size_t count) {
  return count == 0 || std::memcmp(a, b, count * sizeof(float)) == 0;
}

}  // namespace dsv3::test
