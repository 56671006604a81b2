// rope_append() and mla_attention() of every kernel set against ref/, and the promise that a row's
// bits depend on nothing but its own sequence up to itself.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "tests/kernels/attention_support.h"

namespace dsv3::test {

TEST_CASE("attention: every shape against ref, whole prompt") {
  Random random(20);
  for (const k::MlaShape& shape : kShapes) {
    for (const k::DType dtype : {k::DType::kF8E4M3, k::DType::kBF16, k::DType::kF32}) {
      if (shape.kv_lora_rank == 512 && dtype != k::DType::kF8E4M3) continue;
      const int64_t length = shape.kv_lora_rank == 512 ? 70 : 150;
      const Model m = random_model(random, shape, dtype, 32);
      const Sequence s = random_sequence(random, m, length);
      const auto want = in_chunks(*device("ref"), m, s, length, length);
      for (const std::string& set : fast_sets()) {
        const auto got = in_chunks(*device(set, 2), m, s, length, length);
        check_rows(set + " " + k::dtype_name(dtype) + " rank " + std::to_string(shape.kv_lora_rank),
                   got, want, m.out_width(), kSimilarity);
      }
    }
  }
}

TEST_CASE("attention: many splits of the keys against ref, decode") {
  Random random(21);
  Model m = random_model(random, {2, 32, 16, 8, 16}, k::DType::kBF16);
  const int64_t length = kEmulated ? 2100 : 5200;  // up to the second of the long splits
  const Sequence s = random_sequence(random, m, length);
  for (const int64_t first_key : {0, 1}) {
    m.first_key = first_key;
    const auto want = in_chunks(*device("ref"), m, s, length, 500);
    for (const std::string& set : fast_sets()) {
      const auto got = in_chunks(*device(set, 2), m, s, length, 500);
      check_rows(set, got, want, m.out_width(), kSimilarity);
    }
  }
}

TEST_CASE("attention: bits do not depend on chunks, threads or neighbours in the batch") {
  Random random(22);
  for (const k::MlaShape& shape : {kUsual, k::MlaShape{kEmulated ? 3 : 5, 20, 12, 6, 10}}) {
    Model m = random_model(random, shape, k::DType::kF8E4M3, 64);
    m.first_key = shape.heads % 2;
    const int64_t length = kEmulated ? 1100 : 1200;  // four splits and some
    const Sequence s = random_sequence(random, m, length);
    const Sequence other = random_sequence(random, m, length);
    for (const std::string& set : fast_sets()) {
      auto one = device(set, 1);
      const auto whole = in_chunks(*one, m, s, length, length);
      for (const int64_t chunk : {1, 7, 64, 333}) {
        auto d = device(set, chunk == 7 ? 5 : 2);
        const auto got = in_chunks(*d, m, s, length, chunk, 128);
        CHECK_MESSAGE(same_bits(got.data(), whole.data(), whole.size()), set, " chunk ", chunk);
      }
      // Both sequences in every step, at different positions and in both orders.
      auto d = device(set, 2);
      Pages pages(d.get(), m, length), other_pages(d.get(), m, length);
      std::vector<float> got;
      const size_t width = m.out_width();
      int64_t at = 0;
      for (int64_t begin = 0; begin < length; begin += 100) {
        const int64_t count = std::min<int64_t>(37, length - at);
        const Part mine{&s, &pages, begin, begin + 100};
        const Part theirs{&other, &other_pages, at, at + count};
        const bool first = begin % 200 == 0;
        const auto out = first ? step(*d, m, {mine, theirs}) : step(*d, m, {theirs, mine});
        const auto from = out.begin() + (first ? 0 : count * static_cast<int64_t>(width));
        got.insert(got.end(), from, from + 100 * static_cast<int64_t>(width));
        at += count;
      }
      CHECK_MESSAGE(same_bits(got.data(), whole.data(), whole.size()), set, " with a neighbour");
    }
  }
}

// Sequences with few rows are taken through W_UK and W_UV together, up to 64 rows of them; what is
// beyond that, and longer ones, go alone.
TEST_CASE("attention: many short sequences in one step, each with the bits it has alone") {
  Random random(27);
  for (const k::MlaShape& shape :
       {kUsual, kEmulated ? k::MlaShape{3, 72, 20, 6, 18} : k::MlaShape{5, 200, 52, 6, 50}}) {
    Model m = random_model(random, shape, k::DType::kF8E4M3, 64);
    m.first_key = shape.heads % 2;
    std::vector<int64_t> rows = {1, 50, 2, 8, 9, 1, 3};
    for (int i = 0; i < 30; ++i) rows.push_back(1 + i % 4);  // 75 more
    const int64_t length = 150;
    std::vector<Sequence> sequences;
    for (size_t i = 0; i < rows.size(); ++i) {
      sequences.push_back(random_sequence(random, m, length));
    }
    // Of the rows of a shared sequence the last is NaN: the rows before it keep their bits.
    sequences[6].kv[(20 + 11 * 6 % 80 + 2) * m.kv_width()] =
        std::numeric_limits<float>::quiet_NaN();
    for (const std::string& set : fast_sets()) {
      const auto position = [](size_t i) { return static_cast<int64_t>(20 + 11 * i % 80); };
      std::vector<std::vector<float>> alone;
      auto one = device(set, 1);
      for (size_t i = 0; i < rows.size(); ++i) {
        Pages pages(one.get(), m, length);
        step(*one, m, {{&sequences[i], &pages, m.first_key, position(i)}});
        alone.push_back(
            step(*one, m, {{&sequences[i], &pages, position(i), position(i) + rows[i]}}));
      }
      for (const int threads : {1, 3}) {
        auto d = device(set, threads);
        std::vector<std::unique_ptr<Pages>> pages;
        std::vector<Part> parts;
        for (size_t i = 0; i < rows.size(); ++i) {
          pages.push_back(std::make_unique<Pages>(d.get(), m, length));
          step(*d, m, {{&sequences[i], pages[i].get(), m.first_key, position(i)}});
          parts.push_back({&sequences[i], pages[i].get(), position(i), position(i) + rows[i]});
        }
        const auto out = step(*d, m, parts);
        size_t at = 0;
        for (size_t i = 0; i < rows.size(); ++i) {
          CHECK_MESSAGE(same_bits(&out[at], alone[i].data(), alone[i].size()), set, " threads ",
                        threads, " sequence ", i);
          at += alone[i].size();
        }
        CHECK(at == out.size());
      }
    }
  }
}

// A few rows after many keys: the keys' splits are shared out among threads, unless there are too
// many of them. One thread takes them one after the other.
TEST_CASE("attention: long sequences, split among threads, with the bits they have on one") {
  Random random(28);
  for (const k::MlaShape& shape : {k::MlaShape{5, 40, 12, 6, 10}, k::MlaShape{40, 8, 4, 2, 4}}) {
    if (kEmulated && shape.heads == 40) continue;
    Model m = random_model(random, shape, k::DType::kF8E4M3, 64);
    m.first_key = shape.heads % 2;
    const int64_t length = kEmulated ? 1100 : 5300;  // up to the second of the long splits
    const Sequence s = random_sequence(random, m, length);
    // Rows before one of NaN in the same step keep their bits, at the end of a split too.
    Sequence bad = s;
    bad.kv[1026 * m.kv_width()] = std::numeric_limits<float>::quiet_NaN();
    struct Rows {
      const Sequence* sequence;
      int64_t begin, end;
    };
    std::vector<Rows> rows = {{&s, 1020, 1028},
                              {&s, length - 1, length},
                              {&s, 200, 203},
                              {&bad, 1020, 1028},
                              {&s, length - 9, length - 1}};
    if (shape.heads == 40) {  // parts of 40 heads and 60 rows: beyond what there is room for
      for (int i = 0; i < 4; ++i) rows.push_back({&s, length - 8 - i, length - i});
    }
    for (const std::string& set : fast_sets()) {
      const auto run = [&](int threads, const std::vector<Rows>& which) {
        auto d = device(set, threads);
        std::vector<std::unique_ptr<Pages>> pages;
        std::vector<Part> parts;
        for (const Rows& r : which) {
          pages.push_back(std::make_unique<Pages>(d.get(), m, length));
          step(*d, m, {{r.sequence, pages.back().get(), m.first_key, r.begin}}, /*attend=*/false);
          parts.push_back({r.sequence, pages.back().get(), r.begin, r.end});
        }
        return step(*d, m, parts);
      };
      std::vector<std::vector<float>> alone;
      for (const Rows& r : rows) alone.push_back(run(1, {r}));
      for (size_t r = 0; r < 8; ++r) {
        CHECK_MESSAGE(std::isnan(alone[3][r * m.out_width()]) == (r >= 6), set, " row ", r);
      }
      for (const int threads : {2, 3, 8}) {
        if (kEmulated && threads != 3) continue;
        for (size_t i = 0; i < 5; ++i) {
          const auto got = run(threads, {rows[i]});
          CHECK_MESSAGE(same_bits(got.data(), alone[i].data(), got.size()), set, " threads ",
                        threads, " sequence ", i, " alone");
        }
        const auto got = run(threads, rows);
        size_t at = 0;
        for (size_t i = 0; i < rows.size(); ++i) {
          CHECK_MESSAGE(same_bits(&got[at], alone[i].data(), alone[i].size()), set, " threads ",
                        threads, " sequence ", i);
          at += alone[i].size();
        }
        CHECK(at == got.size());
      }
    }
  }
}

TEST_CASE("attention: what a page holds beyond the last position does not matter") {
  Random random(23);
  const Model m = random_model(random, {4, 64, 16, 8, 16}, k::DType::kBF16);
  const Sequence s = random_sequence(random, m, 200);
  for (const std::string& set : k::kernel_sets()) {
    auto d = device(set, 2);
    std::vector<std::vector<float>> results;
    for (const int fill : {0x00, 0x41, 0xff, 0x7f}) {
      Pages pages(d.get(), m, 200);
      for (auto p : pages.memory) std::memset(p.get(), fill, d->latent_page_bytes(m.shape));
      results.push_back(step(*d, m, {{&s, &pages, 0, 70}}));
      const auto more = step(*d, m, {{&s, &pages, 70, 71}});
      results.back().insert(results.back().end(), more.begin(), more.end());
    }
    for (const auto& r : results) {
      CHECK_MESSAGE(same_bits(r.data(), results[0].data(), r.size()), set);
    }
  }
}

TEST_CASE("attention: slots before first_key are never read") {
  Random random(26);
  Model m = random_model(random, {4, 64, 16, 8, 16}, k::DType::kBF16);
  m.first_key = 1;
  const Sequence s = random_sequence(random, m, 90);
  for (const std::string& set : k::kernel_sets()) {
    auto d = device(set, 2);
    std::vector<std::vector<float>> results;
    for (const int fill : {0x00, 0x41, 0xff}) {
      Pages pages(d.get(), m, 90);
      for (auto p : pages.memory) std::memset(p.get(), fill, d->latent_page_bytes(m.shape));
      results.push_back(step(*d, m, {{&s, &pages, 1, 50}}));
      const auto more = step(*d, m, {{&s, &pages, 50, 90}});
      results.back().insert(results.back().end(), more.begin(), more.end());
    }
    for (const float v : results[0]) REQUIRE(std::isfinite(v));
    for (const auto& r : results) {
      CHECK_MESSAGE(same_bits(r.data(), results[0].data(), r.size()), set);
    }
  }
}

TEST_CASE("attention: a row of NaN spoils itself and what comes after it, nothing before") {
  Random random(24);
  const Model m = random_model(random, {4, 64, 16, 8, 16}, k::DType::kBF16);
  const int64_t length = 90;
  const Sequence s = random_sequence(random, m, length);
  Sequence bad = s;
  bad.kv[40 * m.kv_width() + 3] = std::numeric_limits<float>::quiet_NaN();
  Sequence bad_query = s;
  bad_query.q[50 * m.q_width() + 1] = std::numeric_limits<float>::infinity();
  const size_t width = m.out_width();
  for (const std::string& set : k::kernel_sets()) {
    auto d = device(set, 2);
    const auto clean = in_chunks(*d, m, s, length, length);
    const auto got = in_chunks(*d, m, bad, length, length);
    CHECK_MESSAGE(same_bits(got.data(), clean.data(), 40 * width), set);
    for (size_t r = 40; r < static_cast<size_t>(length); ++r) CHECK(std::isnan(got[r * width]));
    const auto query = in_chunks(*d, m, bad_query, length, length);
    for (size_t r = 0; r < static_cast<size_t>(length); ++r) {
      const bool same = same_bits(&query[r * width], &clean[r * width], width);
      CHECK_MESSAGE(same == (r != 50), set, " row ", r);
    }
  }
}

TEST_CASE("rope_append: queries turn in place, and only their rotary part") {
  Random random(25);
  const Model m = random_model(random, {3, 16, 6, 4, 8}, k::DType::kF32);
  for (const std::string& set : k::kernel_sets()) {
    auto d = device(set, 2);
    REQUIRE(d->reserve(limits_for(m, 5)).ok());
    const Sequence s = random_sequence(random, m, 5);
    Pages pages(d.get(), m, 64);
    std::vector<float> q = s.q;
    const k::SequenceRows rows{0, 5, 3, pages.memory.data()};
    k::RopeAppendArgs r;
    r.shape = m.shape;
    r.sequences = {&rows, 1};
    r.q = mdev(q);
    r.kv = cdev(s.kv);
    r.gamma = cdev(m.gamma);
    r.cos = cdev(s.cos);
    r.sin = cdev(s.sin);
    d->rope_append(r);
    for (size_t i = 0; i < 15; ++i) {
      const float* before = &s.q[i * 10];
      const float* after = &q[i * 10];
      CHECK(same_bits(before, after, 6));
      for (size_t j = 0; j < 2; ++j) {
        const float c = s.cos[i / 3 * 2 + j], n = s.sin[i / 3 * 2 + j];
        const float a = before[6 + 2 * j], b = before[7 + 2 * j];
        CHECK(after[6 + 2 * j] == doctest::Approx(a * c - b * n).epsilon(1e-6));
        CHECK(after[7 + 2 * j] == doctest::Approx(a * n + b * c).epsilon(1e-6));
      }
    }
  }
}

}  // namespace dsv3::test
