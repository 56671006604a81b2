#include <doctest/doctest.h>

#include <array>

#include "runtime/forward/lanes.h"

namespace dsv3 {
namespace {

constexpr int kFirst = FasterWay::kFirst, kSecond = FasterWay::kSecond;

// How often each way is taken in so many steps of 16 rows that take it `ns`.
std::array<int, 2> steps(FasterWay* choice, int count, std::array<int64_t, 2> ns) {
  std::array<int, 2> taken = {};
  for (int i = 0; i < count; ++i) {
    const int way = choice->choose(16);
    ++taken[static_cast<size_t>(way)];
    choice->record(16, way, ns[static_cast<size_t>(way)]);
  }
  return taken;
}

TEST_CASE("each way is tried, then the faster one is taken") {
  FasterWay choice;
  CHECK(choice.choose(16) == kSecond);
  choice.record(16, kSecond, 1000);
  CHECK(choice.choose(16) == kFirst);
  choice.record(16, kFirst, 2000);
  CHECK(choice.choose(16) == kSecond);
  // 17 rows are about as many, one row is not.
  CHECK(choice.choose(17) == kSecond);
  CHECK(choice.choose(1) == kSecond);
  choice.record(1, kSecond, 2000);
  CHECK(choice.choose(1) == kFirst);
  choice.record(1, kFirst, 1000);
  CHECK(choice.choose(1) == kFirst);
  CHECK(choice.choose(16) == kSecond);
}

TEST_CASE("the other way is looked at from time to time, and taken once it is faster") {
  FasterWay choice;
  steps(&choice, 2, {2000, 1000});
  CHECK(steps(&choice, 10 * FasterWay::kLookEvery, {2000, 1000})[kFirst] == 10);
  // The other one became faster: seen at the next looks.
  CHECK(steps(&choice, 4 * FasterWay::kLookEvery, {500, 1000})[kFirst] > FasterWay::kLookEvery);
  CHECK(steps(&choice, FasterWay::kLookEvery, {500, 1000})[kSecond] == 1);
  // The one that is taken became slower: seen within some steps.
  CHECK(steps(&choice, 100, {4000, 1000})[kSecond] > 70);
}

TEST_CASE("one disturbed step, and ways that take about the same, change nothing") {
  FasterWay choice;
  steps(&choice, 100, {1500, 1000});
  choice.record(16, kSecond, 1'000'000);
  CHECK(steps(&choice, 100, {1500, 1000})[kFirst] <= 1);
  FasterWay alike;
  CHECK(steps(&alike, 200, {1000, 980})[kSecond] == 1);
}

}  // namespace
}  // namespace dsv3
