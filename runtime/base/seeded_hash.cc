#include "runtime/base/seeded_hash.h"

#include <xxhash.h>

#include "runtime/base/os.h"

namespace dsv3 {
namespace {

uint64_t seed() {
#ifdef DSV3_FUZZED  // the same inputs take the same paths
  return 0;
#else
  static const uint64_t value = unpredictable_number();
  return value;
#endif
}

}  // namespace

size_t SeededHash::operator()(std::string_view key) const {
  return XXH3_64bits_withSeed(key.data(), key.size(), seed());
}
size_t SeededHash::operator()(uint64_t key) const {
  return XXH3_64bits_withSeed(&key, sizeof key, seed());
}

}  // namespace dsv3
