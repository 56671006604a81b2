#include "kernels/ref/ref_weights.h"

#include <algorithm>
#include <cstring>

#include "kernels/numeric.h"
#include "runtime/base/checked.h"

namespace dsv3::kernels::ref {
namespace {

constexpr int64_t kBlock = 128;  // inputs summed before they join the total

template <class T>
T load(const std::byte* data, int64_t index) {
  T value;
  std::memcpy(&value, data + static_cast<size_t>(index) * sizeof(T), sizeof(T));
  return value;
}

float element(const Matrix& w, int64_t index) {
  const std::byte* data = w.data.get();
  switch (w.dtype) {
    case DType::kF32:
      return load<float>(data, index);
    case DType::kBF16:
      return bf16_to_float(load<uint16_t>(data, index));
    case DType::kF16:
      return f16_to_float(load<uint16_t>(data, index));
    case DType::kF8E4M3:
      return kF8E4M3Table[load<uint8_t>(data, index)];
    case DType::kMXFP4:
      break;  // its elements have no index of their own
  }
  return 0;
}

// An element of an MXFP4 matrix without its scale.
float mx_element(const Matrix& w, int64_t row, int64_t column) {
  const MxPlace place = mx_place(row, column, w.k);
  const auto pair = load<uint8_t>(w.data.get(), static_cast<int64_t>(place.byte));
  return e2m1_to_float(static_cast<uint8_t>(pair >> place.shift & 15));
}

// Where W[row][column] stands in the data, in elements.
int64_t index_of(const Matrix& w, int64_t row, int64_t column) {
  if (w.layout == Layout::kRowMajor) return row * w.k + column;
  const int64_t pairs = ceil_div<int64_t>(w.k, kTileK);
  return ((row / kTileN * pairs + column / kTileK) * kTileN + row % kTileN) * kTileK +
         column % kTileK;
}

float scale_of(const Matrix& w, int64_t row, int64_t column) {
  if (w.dtype == DType::kMXFP4) {
    const MxPlace place = mx_place(row, column, w.k);
    return e8m0_to_float(load<uint8_t>(w.data.get(), static_cast<int64_t>(place.scale)));
  }
  if (w.dtype != DType::kF8E4M3) return 1;
  const int64_t columns = ceil_div<int64_t>(w.k, w.scale_k);
  return w.scales.get()[row / w.scale_n * columns + column / w.scale_k];
}

// sum[16] = the products of one block for one row. block: [count][16].
void block_sum(const float* block, const float* x, int64_t count, float* sum) {
  float total[kTileN] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t lane = 0; lane < kTileN; ++lane) total[lane] += block[i * kTileN + lane] * x[i];
  }
  std::copy(total, total + kTileN, sum);
}

}  // namespace

float weight_at(const Matrix& w, int64_t row, int64_t column) {
  const float value =
      w.dtype == DType::kMXFP4 ? mx_element(w, row, column) : element(w, index_of(w, row, column));
  return value * scale_of(w, row, column);
}

void load_tile(const Matrix& w, int64_t tile, int64_t k_begin, int64_t count, float* out) {
  const auto fill = [&](auto convert) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t lane = 0; lane < kTileN; ++lane) {
        const int64_t row = tile * kTileN + lane;
        out[i * kTileN + lane] = row < w.n ? convert(index_of(w, row, k_begin + i)) : 0.0f;
      }
    }
  };
  const std::byte* data = w.data.get();
  switch (w.dtype) {
    case DType::kF32:
      return fill([=](int64_t i) { return load<float>(data, i); });
    case DType::kBF16:
      return fill([=](int64_t i) { return bf16_to_float(load<uint16_t>(data, i)); });
    case DType::kF16:
      return fill([=](int64_t i) { return f16_to_float(load<uint16_t>(data, i)); });
    case DType::kF8E4M3:
      return fill([=](int64_t i) { return kF8E4M3Table[load<uint8_t>(data, i)]; });
    case DType::kMXFP4:
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t lane = 0; lane < kTileN; ++lane) {
          const int64_t row = tile * kTileN + lane;
          out[i * kTileN + lane] = row < w.n ? mx_element(w, row, k_begin + i) : 0.0f;
        }
      }
  }
}

void matmul(const Matrix& w, const float* x, int64_t x_stride, int64_t rows, float* y,
            int64_t y_stride, bool accumulate) {
  float block[kBlock * kTileN];
  float sum[kTileN];
  float scale[kTileN];
  for (int64_t tile = 0; tile < ceil_div<int64_t>(w.n, kTileN); ++tile) {
    const int64_t lanes = std::min<int64_t>(kTileN, w.n - tile * kTileN);
    for (int64_t row = 0; row < rows; ++row) {
      float* out = y + row * y_stride + tile * kTileN;
      if (!accumulate) std::fill(out, out + lanes, 0.0f);
    }
    int64_t count = 0;
    for (int64_t k = 0; k < w.k; k += count) {
      count = std::min<int64_t>(kBlock, w.k - k);
      if (w.dtype == DType::kF8E4M3) count = std::min(count, (k / w.scale_k + 1) * w.scale_k - k);
      if (w.dtype == DType::kMXFP4) count = std::min<int64_t>(count, kMxBlock);
      load_tile(w, tile, k, count, block);
      for (int64_t i = 0; i < lanes; ++i) scale[i] = scale_of(w, tile * kTileN + i, k);
      for (int64_t row = 0; row < rows; ++row) {
        block_sum(block, x + row * x_stride + k, count, sum);
        float* out = y + row * y_stride + tile * kTileN;
        for (int64_t i = 0; i < lanes; ++i) out[i] += sum[i] * scale[i];
      }
    }
  }
}

}  // namespace dsv3::kernels::ref
