// What the kernel tests share: random matrices in the layouts kernels read, latent pages, devices,
// and the two limits every comparison against ref/ holds.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "tests/support/emulated.h"

namespace dsv3::test {

namespace k = dsv3::kernels;

// A small fast generator; the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t next();
  float uniform();               // [-1, 1)
  int32_t below(int32_t limit);  // [0, limit)
  std::vector<float> vector(size_t n, float scale = 1);
  // Values that BF16 holds exactly, so that rounding activations costs nothing.
  std::vector<float> bf16_vector(size_t n, float scale = 1);
  // Rows of k values, `stride` apart, that BF16 holds and that INT8 with a scale per 32 of a row
  // holds too: whole numbers up to 127 of 1/128, the largest among every 32.
  std::vector<float> i8_rows(size_t rows, size_t k, size_t stride);
  // The same for INT16 with a scale per 64: whole numbers up to 128 of 1/128.
  std::vector<float> i16_rows(size_t rows, size_t k, size_t stride);
  // Rows that no set rounds where they meet weights of that type.
  std::vector<float> exact_rows(k::DType weights, size_t rows, size_t k, size_t stride);

 private:
  uint64_t state_;
};

// Memory with the alignment that weights have, filled with a pattern beyond its size.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(size_t size);
  std::byte* data() const { return data_; }

 private:
  std::shared_ptr<std::vector<std::byte>> storage_;
  std::byte* data_ = nullptr;
};

// A matrix and what it holds. The bytes end exactly at the end of their allocation, so that
// AddressSanitizer sees a kernel that reads past them.
struct TestMatrix {
  k::Matrix m;
  std::vector<float> dense;  // [n][k], scales applied
  AlignedBytes bytes;
  std::shared_ptr<const std::vector<float>> scales;  // shared, so that copies keep m valid
};

struct MatrixSpec {
  k::DType dtype = k::DType::kBF16;
  int32_t n = 16;
  int32_t k = 16;
  int32_t scale_n = 128;
  int32_t scale_k = 128;
  float scale = 1;                          // about the largest weight of a random matrix
  k::Layout layout = k::Layout::kTile16x2;  // not for MXFP4, which has its own
};
// Values spread evenly within +-scale (FP8 and MXFP4: about). FP8's codes reach either 1 or 448
// (scales are smaller then); of the latter some 16 rows reach 7 only, and the others have none
// between 0 and 1/2, which "avx2i16" rounds where others are large.
TestMatrix random_matrix(Random& random, const MatrixSpec& spec);
// The raw weights (E4M3 or E2M1 codes, BF16 or F16 bits) are given, [n][k]; of MXFP4 the scales'
// E8M0 codes too, [n][ceil(k/32)].
TestMatrix matrix_from_codes(const MatrixSpec& spec, const std::vector<uint32_t>& codes,
                             std::vector<float> scales);

std::unique_ptr<k::Device> device(const std::string& kernels, int threads = 1);
// Kernel sets of this machine without ref.
std::vector<std::string> fast_sets();

// Limits of a device that only multiplies and routes.
k::Limits small_limits(int32_t rows, int32_t width, int32_t n = 0, int32_t experts = 0);

// Both limits of a comparison: similarity (1 - 2xy / (x^2 + y^2)) and every element within
// `absolute`. Fails the test with a message that names `what`.
void check_close(const float* got, const float* want, size_t count, double absolute,
                 const std::string& what);
bool same_bits(const float* a, const float* b, size_t count);

template <class T>
k::Dev<T> dev(T* p) {
  return k::Dev<T>(p);
}
template <class T>
k::Dev<const T> cdev(const std::vector<T>& v, size_t offset = 0) {
  return k::Dev<const T>(v.data() + offset);
}
template <class T>
k::Dev<T> mdev(std::vector<T>& v, size_t offset = 0) {
  return k::Dev<T>(v.data() + offset);
}

}  // namespace dsv3::test
