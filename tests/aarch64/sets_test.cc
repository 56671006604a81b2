// Which kernel sets a processor is offered, and that what is chosen runs on it. qemu stands in for
// the processors; the environment says what is expected of the one it plays.
#include <doctest/doctest.h>

#include <cstdlib>

#include "kernels/cpu/peak.h"
#include "runtime/base/os.h"
#include "tests/kernels/kernel_test.h"

namespace dsv3::test {

TEST_CASE("a processor gets the sets it can run, and the best of them works") {
  const char* expected = std::getenv("DSV3_EXPECTED_SETS");
  REQUIRE(expected != nullptr);
  std::string sets;
  for (const std::string& set : k::kernel_sets()) sets += (sets.empty() ? "" : " ") + set;
  CHECK(sets == expected);

  Random random(70);
  for (const k::DType dtype : {k::DType::kBF16, k::DType::kF8E4M3, k::DType::kMXFP4}) {
    const TestMatrix w = random_matrix(random, {dtype, 48, 96});
    const auto x = random.i8_rows(5, 96, 96);
    std::vector<std::vector<float>> y;
    for (const char* set : {"", "ref"}) {
      auto d = device(set);
      if (*set == 0) CHECK(d->name() == k::kernel_sets().front());
      REQUIRE(d->reserve(small_limits(5, 96, 48)).ok());
      y.emplace_back(5 * 48);
      k::LinearArgs a;
      a.w = w.m;
      a.x = cdev(x);
      a.x_stride = 96;
      a.y = mdev(y.back());
      a.y_stride = 48;
      a.rows = 5;
      d->linear({&a, 1});
    }
    check_close(y[0].data(), y[1].data(), y[0].size(), 2e-5, k::dtype_name(dtype));
  }
}

TEST_CASE("the loops that measure a processor's limits run where they are chosen") {
  const ArmFeatures features = arm_features();
  CHECK(k::peak_neon()->dot(10) == 10 * 16 * 4 * 2);
  CHECK(k::peak_neon()->int8(10) == 10 * 16 * 8 * 16 * 2);
  if (!features.bf16 || !features.dot) return;
  CHECK(k::peak_neonbf16()->dot(10) == 10 * 16 * 4 * 4);
  CHECK(k::peak_neonbf16()->int8(10) == 10 * 16 * 4 * 8);
}

}  // namespace dsv3::test
