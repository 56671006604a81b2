// mla_attention() with keys and values expanded, of every kernel set against ref/ (which attends in
// latent space): nearly the same numbers, and bits that depend neither on chunks nor on neighbours.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "tests/kernels/attention_support.h"

namespace dsv3::test {
namespace {

// Expanded keys and values, and under those sets their weights, are BF16 too: about as many errors
// again, and the square of twice the error.
constexpr double kExpandedSimilarity = 4 * kSimilarity;

}  // namespace

TEST_CASE("attention, expanded: every shape against ref, whole prompt") {
  Random random(30);
  for (const k::MlaShape& shape : kShapes) {
    for (const k::DType dtype :
         {k::DType::kF8E4M3, k::DType::kBF16, k::DType::kF16, k::DType::kF32}) {
      const bool large = shape.kv_lora_rank == 512;
      if ((large || kEmulated) && dtype != k::DType::kF8E4M3) continue;
      if (large && kEmulated) continue;
      // The last group of rows has one key of its block's second page.
      const int64_t length = 193;
      // Blocks of 20 end within a tile of 16 outputs.
      Model m = random_model(random, shape, dtype, shape.heads % 2 == 0 ? 32 : 20);
      m.first_key = shape.heads % 2;
      const Sequence s = random_sequence(random, m, length);
      const auto want = in_chunks(*device("ref"), m, s, length, length);
      const k::SequenceRows rows{0, static_cast<int32_t>(length), 0, nullptr, true};
      REQUIRE(k::expands(shape, rows));
      for (const std::string& set : fast_sets()) {
        const auto got = in_chunks(*device(set, 2), m, s, length, length, 64, true);
        check_rows(set + " " + k::dtype_name(dtype) + " rank " + std::to_string(shape.kv_lora_rank),
                   got, want, m.out_width(), kExpandedSimilarity);
      }
    }
  }
}

// Short chunks beside many keys are not expanded: these are long enough.
TEST_CASE("attention, expanded: bits do not depend on chunks, threads or neighbours in the batch") {
  Random random(31);
  Model m = random_model(random, {3, 400, 12, 6, 10}, k::DType::kF8E4M3, 64);
  for (const int64_t first_key : {0, 1}) {
    m.first_key = first_key;
    const int64_t length = kEmulated ? 330 : 700;
    const Sequence s = random_sequence(random, m, length);
    const Sequence other = random_sequence(random, m, 50);
    for (const std::string& set : fast_sets()) {
      auto one = device(set, 1);
      const auto whole = in_chunks(*one, m, s, length, length, 0, true);
      const auto latent = in_chunks(*one, m, s, length, length);
      CHECK_MESSAGE(!same_bits(latent.data(), whole.data(), whole.size()), set,
                    " expanded nothing");
      for (const int64_t chunk : {110, 165, 330}) {
        for (const int threads : {1, 7}) {  // seven split a chunk of 330 rows
          auto d = device(set, threads);
          const auto got = in_chunks(*d, m, s, length / chunk * chunk, chunk, 128, true);
          CHECK_MESSAGE(same_bits(got.data(), whole.data(), got.size()), set, " chunk ", chunk,
                        " threads ", threads);
        }
      }
      // Between rows of another sequence, which are not expanded, and one that is.
      auto d = device(set, 7);
      Pages pages(d.get(), m, length), other_pages(d.get(), m, length), third(d.get(), m, length);
      Pages fourth(d.get(), m, length);
      const auto out = step(*d, m,
                            {{&other, &other_pages, first_key, 50},
                             {&s, &pages, 0, length, true},
                             {&other, &third, first_key, 50},
                             {&s, &fourth, 0, 110, true}});
      Pages alone(d.get(), m, length);
      const auto of_other = step(*d, m, {{&other, &alone, first_key, 50}});
      const size_t before = of_other.size();
      CHECK_MESSAGE(same_bits(out.data(), of_other.data(), before), set);
      CHECK_MESSAGE(same_bits(&out[before], whole.data(), whole.size()), set);
      CHECK_MESSAGE(same_bits(&out[before + whole.size()], of_other.data(), before), set);
      CHECK_MESSAGE(same_bits(&out[2 * before + whole.size()], whole.data(), 110 * m.out_width()),
                    set);
    }
  }
}

TEST_CASE(
    "attention, expanded: more rows than a task takes, and keys that begin in a later block") {
  Random random(33);
  Model m = random_model(random, {2, 40, 8, 4, 6}, k::DType::kBF16);
  const int64_t length = kEmulated ? 300 : 2100;
  const Sequence s = random_sequence(random, m, length);
  m.first_key = 130;
  const auto run = [&](k::Device& d, int64_t chunk, bool may_expand) {
    Pages pages(&d, m, length);
    std::vector<float> out;
    for (int64_t begin = m.first_key; begin < length; begin += chunk) {
      const auto part =
          step(d, m, {{&s, &pages, begin, std::min(length, begin + chunk), may_expand}});
      out.insert(out.end(), part.begin(), part.end());
    }
    return out;
  };
  const auto want = run(*device("ref"), length, false);
  for (const std::string& set : fast_sets()) {
    const auto whole = run(*device(set, 1), length, true);
    check_rows(set, whole, want, m.out_width(), kExpandedSimilarity);
    const auto parts = run(*device(set, 3), 1000, true);
    const size_t first = std::min<size_t>(parts.size(), 1000 * m.out_width());
    CHECK_MESSAGE(same_bits(parts.data(), whole.data(), first), set);
    const auto latent = run(*device(set, 1), length, false);
    CHECK_MESSAGE(!same_bits(latent.data(), whole.data(), whole.size()), set, " expanded nothing");
  }
}

TEST_CASE("attention, expanded: what is no key of a row does not matter to it") {
  Random random(32);
  Model m = random_model(random, {4, 64, 16, 8, 16}, k::DType::kBF16);
  m.first_key = 1;
  const int64_t length = 200;
  const Sequence s = random_sequence(random, m, length);
  Sequence bad = s;
  bad.kv[150 * m.kv_width() + 3] = std::numeric_limits<float>::quiet_NaN();
  Sequence bad_query = s;
  bad_query.q[50 * m.q_width() + 1] = std::numeric_limits<float>::infinity();
  const size_t width = m.out_width();
  for (const std::string& set : fast_sets()) {
    auto d = device(set, 2);
    const auto run = [&](const Sequence& sequence, int fill) {
      Pages pages(d.get(), m, length);
      for (auto p : pages.memory) std::memset(p.get(), fill, d->latent_page_bytes(m.shape));
      return step(*d, m, {{&sequence, &pages, 1, length, true}});
    };
    const auto clean = run(s, 0);
    for (const float v : clean) REQUIRE(std::isfinite(v));
    // The page's first slot and what comes after the last row.
    for (const int fill : {0x41, 0xff, 0x7f}) {
      const auto got = run(s, fill);
      CHECK_MESSAGE(same_bits(got.data(), clean.data(), clean.size()), set, " pages of ", fill);
    }
    // A latent of NaN spoils its row and what comes after, a query of infinity its row alone.
    const auto got = run(bad, 0);
    CHECK_MESSAGE(same_bits(got.data(), clean.data(), 149 * width), set);
    for (size_t r = 149; r < 199; ++r) CHECK_MESSAGE(std::isnan(got[r * width]), set, " row ", r);
    const auto query = run(bad_query, 0);
    for (size_t r = 0; r < 199; ++r) {
      const bool same = same_bits(&query[r * width], &clean[r * width], width);
      CHECK_MESSAGE(same == (r != 49), set, " row ", r);
    }
  }
}

}  // namespace dsv3::test
