// What the tests of attention share: models of one layer, sequences, and steps over them.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "tests/kernels/kernel_test.h"

namespace dsv3::test {

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

inline Model random_model(Random& random, k::MlaShape shape, k::DType dtype, int32_t block = 128) {
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

inline Sequence random_sequence(Random& random, const Model& m, int64_t length) {
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

inline k::Limits limits_for(const Model& m, int32_t rows) {
  k::Limits l;
  l.rows = rows;
  l.linear_k = l.hidden = 16;
  l.mla = m.shape;
  l.expand = true;
  return l;
}

// Runs both operations for the parts as one batch; returns the attention's outputs row by row.
// attend: false only appends.
inline std::vector<float> step(k::Device& d, const Model& m, const std::vector<Part>& parts,
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
inline std::vector<float> in_chunks(k::Device& d, const Model& m, const Sequence& s, int64_t length,
                                    int64_t chunk, size_t page_offset = 0,
                                    bool may_expand = false) {
  Pages pages(&d, m, length, page_offset);
  std::vector<float> out;
  for (int64_t begin = 0; begin < length; begin += chunk) {
    const int64_t end = std::min(length, begin + chunk);
    const auto part = step(d, m, {{&s, &pages, begin, end, may_expand}});
    out.insert(out.end(), part.begin(), part.end());
  }
  return out;
}

// 64 outputs at least are compared at a time, narrow rows several together: the few of one row may
// happen to cancel.
inline void check_rows(const std::string& what, const std::vector<float>& got,
                       const std::vector<float>& want, size_t width, double similarity) {
  REQUIRE(got.size() == want.size());
  const size_t together = (63 + width) / width * width;
  for (size_t begin = 0; begin < got.size(); begin += together) {
    double xy = 0, xx = 0, yy = 0;
    for (size_t i = begin; i < std::min(begin + together, got.size()); ++i) {
      xy += static_cast<double>(got[i]) * static_cast<double>(want[i]);
      xx += static_cast<double>(got[i]) * static_cast<double>(got[i]);
      yy += static_cast<double>(want[i]) * static_cast<double>(want[i]);
    }
    const double dissimilarity = xx + yy > 0 ? 1 - 2 * xy / (xx + yy) : 0;
    const bool ok = dissimilarity < similarity;
    CHECK_MESSAGE(ok, what, " row ", begin / width, ": 1 - 2xy/(xx+yy) is ", dissimilarity);
    if (!ok) return;
  }
}

// Latents and, under the sets named after BF16, queries and probabilities are BF16: errors of 2^-9
// each. Scores must be of a few units for this: the softmax makes an error of 2^-9 in a score of 30
// one of 6 % in a probability.
inline constexpr double kSimilarity = 1e-4;

inline const k::MlaShape kShapes[] = {
    {4, 128, 64, 32, 64}, {3, 64, 32, 16, 24},   {1, 16, 8, 2, 8},        {5, 100, 20, 10, 30},
    {2, 7, 5, 4, 3},      {17, 192, 32, 16, 32}, {16, 512, 128, 64, 128},
};

inline const k::MlaShape kUsual =
    kEmulated ? k::MlaShape{2, 66, 16, 8, 16} : k::MlaShape{4, 128, 64, 32, 64};

}  // namespace dsv3::test
