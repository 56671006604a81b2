// The profiling device: results pass through untouched, and what it counts is what was asked for.
#include "kernels/profile.h"

#include <doctest/doctest.h>

#include "kernels/machine.h"
#include "tests/kernels/kernel_test.h"

namespace dsv3::test {

TEST_CASE("profile: linear layers are counted by their sizes") {
  Random random(50);
  const TestMatrix small = random_matrix(random, {k::DType::kF8E4M3, 64, 256});
  const TestMatrix large = random_matrix(random, {k::DType::kBF16, 128, 256});
  const auto x = random.vector(3 * 256);
  auto inner = device("", 1);
  k::ProfilingDevice d(inner.get());
  REQUIRE(d.reserve(small_limits(3, 256, 128)).ok());
  const auto multiply = [&](k::Device& on, const k::Matrix& w) {
    std::vector<float> y(3 * static_cast<size_t>(w.n));
    const k::LinearArgs a{w, cdev(x), 256, mdev(y), w.n, 3, false};
    on.linear({&a, 1});
    return y;
  };
  const auto y = multiply(d, small.m);
  CHECK(y == multiply(*inner, small.m));
  multiply(d, small.m);
  multiply(d, large.m);

  const auto profile = d.profile();
  REQUIRE(profile.size() == 2);
  CHECK(profile[0].seconds >= profile[1].seconds);
  for (const k::OperationProfile& p : profile) {
    const bool f8 = p.name == "linear 64x256 F8_E4M3";
    CHECK((f8 || p.name == "linear 128x256 BF16"));
    CHECK(p.calls == (f8 ? 2 : 1));
    // Two calls of 64 x 256 codes and 1 x 2 scales; one of 128 x 256 BF16 weights.
    CHECK(p.bytes == (f8 ? 2 * (64 * 256 + 8) : 128 * 256 * 2));
    CHECK(p.flops == 2.0 * 3 * 256 * 128);
    CHECK(p.seconds > 0);
  }
  d.clear();
  CHECK(d.profile().empty());
}

TEST_CASE("machine limits: medians, every figure there") {
  CHECK(k::median({3, 1, 2}) == 2);
  CHECK(k::median({7}) == 7);
  k::DeviceOptions options;
  options.kernels = kEmulated ? "portable" : "";  // an emulator does less than 1e8 dot products
  auto device = k::make_device(options);
  REQUIRE(device.ok());
  auto probe = k::MachineProbe::create(device->get());
  REQUIRE(probe.ok());
  const k::MachineLimits limits = (*probe)->measure();
  CHECK(limits.read_bytes_per_second > 1e8);
  CHECK(limits.cache_bytes_per_second > 1e8);
  CHECK(limits.dot_flops_per_second > 1e8);
  CHECK(limits.int8_ops_per_second > 1e8);
  CHECK(std::string(limits.dot) != "");
  CHECK((*probe)->read_pass() > 1e8);
  CHECK((*probe)->dot_pass() > 1e8);
}

}  // namespace dsv3::test
