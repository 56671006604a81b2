// rope_append() and mla_attention() of every kernel set against ref/, and the promise that a row's
// bits depend on nothing but its own sequence up to itself.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "tests/kernels/kernel_test.h"

namespace dsv3::test {
namespace {

// One sequence's inputs for all of its positions.
struct Sequence {
  std::vector<float> q, kv, cos, sin;
};

struct Model {
  k::MlaShape shape;
  std::vector<TestMatrix> w_uk, w_uv;
  std::vector<k::Matrix> uk, uv;
  std::vector<float> gamma;
  int64_t first_key = 0;

  size_t q_width() const { return static_cast<size_t>(shape.heads * shape.qk_head_dim()); }
  size_t kv_width() const { return static_cast<size_t>(shape.latent_dim()); }
  size_t out_width() const { return static_cast<size_t>(shape.heads * shape.v_head_dim); }
  size_t pairs() const { return static_cast<size_t>(shape.qk_rope_head_dim / 2); }
};

Model random_model(Random& random, k::MlaShape shape, k::DType dtype, int32_t block = 128) {
  Model m;
  m.shape = shape;
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.qk_nope_head_dim));
  for (int32_t h = 0; h < shape.heads; ++h) {
    m.w_uk.push_back(random_matrix(
        random, {dtype, shape.kv_lora_rank, shape.qk_nope_head_dim, block, block, scale}));
    m.w_uv.push_back(
        random_matrix(random, {dtype, shape.v_head_dim, shape.kv_lora_rank, block, block, scale}));
    m.uk.push_back(m.w_uk.back().m);
    m.uv.push_back(m.w_uv.back().m);
  }
  m.gamma = random.vector(static_cast<size_t>(shape.kv_lora_rank));
  return m;
}

Sequence random_sequence(Random& random, const Model& m, int64_t length) {
  const auto n = static_cast<size_t>(length);
  Sequence s;
  s.q = random.bf16_vector(n * m.q_width(), 2);
  s.kv = random.vector(n * m.kv_width(), 2);
  for (size_t i = 0; i < n * m.pairs(); ++i) {
    const float angle = random.uniform() * 3;
    s.cos.push_back(std::cos(angle));
    s.sin.push_back(std::sin(angle));
  }
  return s;
}

// Pages of one sequence on a device, filled with 0xff (NaN) before use.
struct Pages {
  Pages(k::Device* d, const Model& m, int64_t positions, size_t offset = 0)
      : page_offset(offset), device(d) {
    const size_t bytes = d->latent_page_bytes(m.shape) + offset;
    for (int64_t i = 0; i < (positions + 63) / 64; ++i) {
      memory.push_back(d->alloc(bytes));
      std::memset(memory.back().get(), 0xff, bytes);
    }
  }
  ~Pages() {
    for (auto p : memory) device->free(p);
  }
  Pages(const Pages&) = delete;
  size_t page_offset;
  k::Device* device;
  std::vector<k::Dev<std::byte>> memory;
};

// A step: rows [begin, end) of some sequences together.
struct Part {
  const Sequence* sequence;
  Pages* pages;
  int64_t begin, end;
  bool may_expand = false;
};

k::Limits limits_for(const Model& m, int32_t rows) {
  k::Limits l;
  l.rows = rows;
  l.linear_k = l.hidden = 16;
  l.mla = m.shape;
  l.expand = true;
  return l;
}

// Runs both operations for the parts as one batch; returns the attention's outputs row by row.
// attend: false only appends.
std::vector<float> step(k::Device& d, const Model& m, const std::vector<Part>& parts,
                        bool attend = true) {
  std::vector<float> q, kv, cos, sin;
  std::vector<k::SequenceRows> rows;
  int32_t total = 0;
  const auto append = [](std::vector<float>& to, const std::vector<float>& from, int64_t begin,
                         int64_t end, size_t width) {
    const auto w = static_cast<int64_t>(width);
    to.insert(to.end(), from.begin() + begin * w, from.begin() + end * w);
  };
  for (const Part& p : parts) {
    append(q, p.sequence->q, p.begin, p.end, m.q_width());
    append(kv, p.sequence->kv, p.begin, p.end, m.kv_width());
    append(cos, p.sequence->cos, p.begin, p.end, m.pairs());
    append(sin, p.sequence->sin, p.begin, p.end, m.pairs());
    const auto count = static_cast<int32_t>(p.end - p.begin);
    rows.push_back({total, count, p.begin, p.pages->memory.data(), p.may_expand});
    total += count;
  }
  REQUIRE(d.reserve(limits_for(m, total)).ok());
  k::RopeAppendArgs r;
  r.shape = m.shape;
  r.sequences = rows;
  r.page_offset = parts[0].pages->page_offset;
  r.q = mdev(q);
  r.kv = cdev(kv);
  r.gamma = cdev(m.gamma);
  r.cos = cdev(cos);
  r.sin = cdev(sin);
  d.rope_append(r);
  if (!attend) return {};
  std::vector<float> out(static_cast<size_t>(total) * m.out_width(), -7.0f);
  k::MlaAttentionArgs a;
  a.shape = m.shape;
  a.sequences = rows;
  a.page_offset = r.page_offset;
  a.first_key = m.first_key;
  a.softmax_scale = 1.0f / std::sqrt(static_cast<float>(m.shape.qk_head_dim()));
  a.q = cdev(q);
  a.w_uk = m.uk;
  a.w_uv = m.uv;
  a.out = mdev(out);
  d.mla_attention(a);
  return out;
}

// The whole sequence in steps of `chunk` rows.
std::vector<float> in_chunks(k::Device& d, const Model& m, const Sequence& s, int64_t length,
                             int64_t chunk, size_t page_offset = 0, bool may_expand = false) {
  Pages pages(&d, m, length, page_offset);
  std::vector<float> out;
  for (int64_t begin = 0; begin < length; begin += chunk) {
    const int64_t end = std::min(length, begin + chunk);
    const auto part = step(d, m, {{&s, &pages, begin, end, may_expand}});
    out.insert(out.end(), part.begin(), part.end());
  }
  return out;
}

void check_rows(const std::string& what, const std::vector<float>& got,
                const std::vector<float>& want, size_t width, double similarity) {
  for (size_t r = 0; r < got.size() / width; ++r) {
    double xy = 0, xx = 0, yy = 0;
    for (size_t i = r * width; i < (r + 1) * width; ++i) {
      xy += static_cast<double>(got[i]) * static_cast<double>(want[i]);
      xx += static_cast<double>(got[i]) * static_cast<double>(got[i]);
      yy += static_cast<double>(want[i]) * static_cast<double>(want[i]);
    }
    const double dissimilarity = xx + yy > 0 ? 1 - 2 * xy / (xx + yy) : 0;
    const bool ok = dissimilarity < similarity;
    CHECK_MESSAGE(ok, what, " row ", r, ": 1 - 2xy/(xx+yy) is ", dissimilarity);
    if (!ok) return;
  }
}

// Latents and, under the sets named after BF16, queries and probabilities are BF16: errors of 2^-9
// each.
constexpr double kSimilarity = 1e-4;
// Expanded keys and values, and under those sets their weights, are BF16 too: about as many errors
// again, and the square of twice the error.
constexpr double kExpandedSimilarity = 4 * kSimilarity;

const k::MlaShape kShapes[] = {
    {4, 128, 64, 32, 64}, {3, 64, 32, 16, 24},   {1, 16, 8, 2, 8},        {5, 100, 20, 10, 30},
    {2, 7, 5, 4, 3},      {17, 192, 32, 16, 32}, {16, 512, 128, 64, 128},
};

const k::MlaShape kUsual =
    kEmulated ? k::MlaShape{2, 66, 16, 8, 16} : k::MlaShape{4, 128, 64, 32, 64};

}  // namespace

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
  const int64_t length = kEmulated ? 2100 : 3000;  // beyond the second split
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
    const int64_t length = kEmulated ? 1100 : 1200;  // beyond the first split
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
    const int64_t length = kEmulated ? 1100 : 2300;
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

// --- keys and values expanded

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
      // Six values of a row may happen to cancel: narrow ones are compared several together.
      const size_t together = (63 + m.out_width()) / m.out_width();
      for (const std::string& set : fast_sets()) {
        const auto got = in_chunks(*device(set, 2), m, s, length, length, 64, true);
        check_rows(set + " " + k::dtype_name(dtype) + " rank " + std::to_string(shape.kv_lora_rank),
                   got, want, m.out_width() * together, kExpandedSimilarity);
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
    check_rows(set, whole, want, m.out_width() * 6, kExpandedSimilarity);
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
