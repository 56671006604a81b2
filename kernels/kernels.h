// The table of operations that the forward pass is written in, and the memory they work on.
//
// A Device is one such table: ref/ (scalar float32, the executable specification), cpu/ (one
// function table per instruction set), later cuda/. kernels/ knows tensors and shapes and no model
// names; runtime/forward/ calls this table and does not know which device answers.
//
// Rules that hold for every operation
//  * Memory. Dev<T> points to device memory: only table calls may touch it. Plain pointers are host
//    memory. A CPU device's memory happens to be host memory; a test device protects it between
//    calls.
//  * Activations are float32, row-major, with a row stride in elements. How an implementation
//  rounds
//    them inside an operation is its own business. "ref" never does; "avx512bf16" and "neonbf16"
//    round the inputs of linear layers and the latents to BF16; every set but ref rounds the inputs
//    of MXFP4 layers to INT8 with a scale for each 32. "avx2" takes inputs of FP8 layers below
//    2^-61 for zero and those of 2^64 and more for infinite; "avx2i16" rounds them to 13 bits with
//    a scale for each 64 (all of them below 2^-100 are zero), and such weights by 1/32 of their
//    block's scale at most.
//  * Batch invariance. Every output row depends on its own inputs only, and its bits are the same
//    whatever other rows are in the call, wherever the row stands, and however many threads work.
//    Masked keys, padding and other rows contribute nothing, not even a changed sign of zero.
//  * Calls are made by one thread at a time and are complete when a later call reads their results
//  or
//    synchronize() returns. They never throw and never allocate: reserve() sized all scratch.
//  * Shapes were checked when the model was loaded. Operations assert.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "runtime/base/status.h"

namespace dsv3::kernels {

// A pointer into device memory. It has no operator*: host code cannot touch what it points to by
// accident. Implementations of the table unwrap it with get().
template <class T>
class Dev {
 public:
  constexpr Dev() = default;
  constexpr explicit Dev(T* p) : p_(p) {}
  template <class U>
  requires std::is_convertible_v<U*, T*>
  constexpr Dev(Dev<U> other) : p_(other.get()) {}  // NOLINT: T* converts, so does Dev<T>
  constexpr T* get() const { return p_; }
  constexpr explicit operator bool() const { return p_ != nullptr; }
  // `count` elements (bytes for Dev<std::byte>) further on.
  constexpr Dev operator+(size_t count) const { return Dev(p_ + count); }

 private:
  T* p_ = nullptr;
};

enum class DType : uint8_t {
  kF32 = 0,
  kBF16 = 1,
  kF16 = 2,
  kF8E4M3 = 3,
  kMXFP4 = 4,  // OCP microscaling: E2M1 elements, one E8M0 scale for 32 inputs of an output row
};
// Bytes of one element; 0 for MXFP4, whose elements share bytes (matrix_bytes() knows).
constexpr size_t dtype_size(DType t) {
  return t == DType::kF32 ? 4 : t == DType::kF8E4M3 ? 1 : t == DType::kMXFP4 ? 0 : 2;
}
const char* dtype_name(DType t);  // "F32", "BF16", "F16", "F8_E4M3", "MXFP4"

enum class Layout : uint8_t {
  kRowMajor = 0,  // [n][k]; embedding tables only
  // [ceil(n/16)][ceil(k/2)][16][2]: 16 output rows and 2 inputs interleaved, padded with zeros. One
  // 32-byte load of FP8 weights feeds one 512-bit BF16 dot product against a broadcast pair of
  // inputs.
  kTile16x2 = 1,
  // MXFP4 only. Of every 16 output rows, for every 128 inputs (the last may be fewer, in whole
  // blocks of 32), 64 bytes of scales [4 blocks][16 rows] (unused ones are zero) and 256 bytes for
  // each block: [4][16 rows][4], a byte holding inputs 8g + j (low half) and 8g + 4 + j (high
  // half). 64 bytes widen to two vectors of four inputs for an INT8 dot product, and a tile is one
  // stream of whole cache lines. Beyond n and k elements are zero and scales 1. See mx_place().
  kTileMx = 2,
};
inline constexpr int kTileN = 16;
inline constexpr int kTileK = 2;
inline constexpr int kMxBlock = 32;         // inputs that share a scale
inline constexpr size_t kWeightAlign = 64;  // of Matrix::data

// Bytes of the data of an [n, k] matrix. No overflow check: dimensions were checked before.
size_t matrix_bytes(DType dtype, Layout layout, int64_t n, int64_t k);

// Where element [row][column] of an MXFP4 matrix with k columns stands.
struct MxPlace {
  size_t byte = 0;   // offset of the byte that holds it
  int shift = 0;     // 0: its low half, 4: its high half
  size_t scale = 0;  // offset of its scale
};
MxPlace mx_place(int64_t row, int64_t column, int64_t k);

// The weight of a linear layer y = W x, W: [n, k] (n outputs, k inputs), or an embedding table (n
// rows). MXFP4 only where an operation's comment does not exclude it.
struct Matrix {
  DType dtype = DType::kF32;
  Layout layout = Layout::kTile16x2;
  int32_t n = 0;
  int32_t k = 0;
  Dev<const std::byte> data;
  // FP8 only: W[i][j] = fp8[i][j] * scales[i / scale_n][j / scale_k],
  // [ceil(n/scale_n), ceil(k/scale_k)] F32, row-major. scale_k is even. Usually 128 x 128; smaller
  // where a matrix was cut out of a larger one (a head of kv_b_proj) off the block grid. Codes 0x7f
  // and 0xff, NaN, are not among them (the converter refuses them, Model::verify finds
  // them): some sets read them as 480.
  Dev<const float> scales;
  int32_t scale_n = 128;
  int32_t scale_k = 128;
  bool empty() const { return n == 0; }
};

// y[r, 0..n) = W x[r, 0..k), or += with accumulate.
struct LinearArgs {
  Matrix w;
  Dev<const float> x;  // [rows, k]
  int64_t x_stride = 0;
  Dev<float> y;  // [rows, n]
  int64_t y_stride = 0;
  int32_t rows = 0;
  bool accumulate = false;
};

// Latent pages hold kLatentPageTokens consecutive positions of one layer. Their inner layout and
// element type (F32 under ref, BF16 under fast kernels) belong to the device; a page of all zero
// bytes holds zero latents.
inline constexpr int kLatentPageTokens = 64;

// Raised with every change that lets any set compute other bits for the same inputs, so that saved
// latents of an older library are not continued with a newer one's.
inline constexpr uint32_t kNumericRevision = 4;

// Consecutive rows of a batch that belong to one sequence, at consecutive positions.
struct SequenceRows {
  int32_t row_begin = 0;
  int32_t rows = 0;
  int64_t first_position = 0;
  // Host array; page i holds positions [64 i, 64 i + 64). Pages 0..last position of the rows / 64.
  const Dev<std::byte>* pages = nullptr;
  // Attention may expand keys and values for these rows where that is less work (expands()). Their
  // results are then as near to the exact ones, but not the bits that they have otherwise.
  bool may_expand = false;
};

struct MlaShape {
  int32_t heads = 0;
  int32_t kv_lora_rank = 0;
  int32_t qk_nope_head_dim = 0;
  int32_t qk_rope_head_dim = 0;  // even
  int32_t v_head_dim = 0;
  int32_t latent_dim() const { return kv_lora_rank + qk_rope_head_dim; }
  int32_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
};

// Multiply-adds of attention for these rows. In latent space: W_UK and W_UV for every row, scores
// and sums over latents; expanded: W_UK and W_UV for every key, scores and sums over a head's own
// keys and values.
inline double attention_work(const MlaShape& s, const SequenceRows& r, bool expanded) {
  const double rows = r.rows;
  const double keys = static_cast<double>(r.first_position) + rows;
  const double pairs = rows * (static_cast<double>(r.first_position) + (rows + 1) / 2);
  const double projections = double{1} * s.kv_lora_rank * (s.qk_nope_head_dim + s.v_head_dim);
  return s.heads * (expanded ? keys * projections + pairs * (s.qk_head_dim() + s.v_head_dim)
                             : rows * projections + pairs * (s.latent_dim() + s.kv_lora_rank));
}
// Are these rows' keys and values expanded? A function of the arguments alone. W_UK and W_UV have
// to be unpacked first, which takes about as long as multiplying them with some rows.
inline bool expands(const MlaShape& s, const SequenceRows& r) {
  constexpr int32_t kLeastRows = 32, kUnpackingRows = 24;
  const double unpacking =
      double{kUnpackingRows} * s.heads * s.kv_lora_rank * (s.qk_nope_head_dim + s.v_head_dim);
  return r.may_expand && r.rows >= kLeastRows &&
         attention_work(s, r, true) + unpacking < attention_work(s, r, false);
}

// For every row: rotates the last qk_rope_head_dim values of each head of q in place; stores at the
// row's position the latent rms_norm(kv[0..kv_lora_rank)) * gamma and the rotated
// kv[kv_lora_rank..). Pairs are interleaved: (2i, 2i+1) turns by the angle whose cosine and sine
// are cos[row][i], sin[row][i].
struct RopeAppendArgs {
  MlaShape shape;
  std::span<const SequenceRows> sequences;
  size_t page_offset = 0;  // bytes from a page's start to this layer's part of it
  Dev<float> q;            // [rows, heads, qk_nope_head_dim + qk_rope_head_dim], in place
  Dev<const float> kv;     // [rows, kv_lora_rank + qk_rope_head_dim]
  Dev<const float> gamma;  // [kv_lora_rank]
  float eps = 1e-6f;
  Dev<const float> cos;  // [rows, qk_rope_head_dim / 2]
  Dev<const float> sin;  // [rows, qk_rope_head_dim / 2]
};

// Multi-head latent attention in latent space (DeepSeek-V2, arXiv 2405.04434, section 2.1, with
// W_UK absorbed into the query and W_UV applied to the attended latent):
//   ql[h]  = W_UK[h] q_nope[h]                                   [kv_lora_rank]
//   s[p]   = softmax_scale * (ql[h] . latent[p] + q_rope[h] . k_rope[p])   p in [first_key,
//   position] out[h] = W_UV[h] (sum_p softmax(s)[p] latent[p])             [v_head_dim]
// Keys are split at fixed positions (the device's) and combined in order. Where
// expands() says so, a device may compute the same from a head's own keys W_UK[h]^T latent[p] and
// values W_UV[h] latent[p] (ref does not).
struct MlaAttentionArgs {
  MlaShape shape;
  std::span<const SequenceRows> sequences;
  size_t page_offset = 0;
  int64_t first_key = 0;  // 1 for the MTP module, whose slot 0 stays empty
  float softmax_scale = 1;
  Dev<const float> q;            // [rows, heads, qk_nope_head_dim + qk_rope_head_dim], rotated
  std::span<const Matrix> w_uk;  // per head [kv_lora_rank, qk_nope_head_dim], not MXFP4
  std::span<const Matrix> w_uv;  // per head [v_head_dim, kv_lora_rank], not MXFP4
  Dev<float> out;                // [rows, heads, v_head_dim]
};

enum class Scoring : uint8_t { kSigmoid, kSoftmax };
enum class GroupScore : uint8_t {
  kNone,     // "greedy": no groups
  kMax,      // "group_limited_greedy" (V2): a group counts by its best score
  kTop2Sum,  // "noaux_tc" (V3): by the sum of its two best biased scores
};

// Scores = scoring(gate x) in float32. Choice: scores + bias, groups not among the topk_group best
// are minus infinity, then the top_k best, best first; ties take the lower index. Weights: the
// unbiased scores of the chosen, divided by (their sum + 1e-20) with normalise, times scaling.
struct RouteArgs {
  Matrix gate;            // [experts, hidden], BF16 or F32
  Dev<const float> bias;  // [experts] or null
  Scoring scoring = Scoring::kSigmoid;
  GroupScore group_score = GroupScore::kNone;
  int32_t groups = 1;
  int32_t topk_group = 1;
  int32_t top_k = 1;
  bool normalise = false;
  float scaling = 1;
  Dev<const float> x;  // [rows, hidden]
  int32_t rows = 0;
  int32_t* expert_ids = nullptr;    // host [rows, top_k]; valid when the call returns
  float* expert_weights = nullptr;  // host [rows, top_k]; valid when the call returns
};

// One feed-forward network: down(silu(gate x) * (up x)).
struct FfnWeights {
  Matrix gate;  // [width, hidden]
  Matrix up;    // [width, hidden]
  Matrix down;  // [hidden, width]
};
// The rows one expert works on. Token t's contribution stands in its slot (the expert's rank among
// the token's choices; shared experts come after the routed ones).
struct FfnGroup {
  const FfnWeights* weights = nullptr;
  const int32_t* tokens = nullptr;  // host [count]
  const int32_t* slots = nullptr;   // host [count]
  int32_t count = 0;
};
// y[t] += sum over the slots s that a group covers, in ascending order, of
//         slot_weights[t, s] * group's network(x[t]).
// The slots' sum is formed from zero and then added to y[t] once. A dense layer is one group with
// one slot of weight 1. The groups may be a subset of a plan (the rest runs elsewhere).
struct FfnArgs {
  int32_t rows = 0;
  int32_t hidden = 0;
  int32_t slots = 1;
  std::span<const FfnGroup> groups;
  const float* slot_weights = nullptr;  // host [rows, slots]
  Dev<const float> x;                   // [rows, hidden]
  Dev<float> y;                         // [rows, hidden]
};

struct RowStats {
  int32_t argmax = 0;  // the lowest index of the greatest value
  float max = 0;       //
  double sum_exp = 0;  // sum of exp(x - max)
  bool finite = true;  // no NaN, no infinity in the row
};

// Weights of this many tokens make one of Device::weigh's sums.
inline constexpr int32_t kWeighBlock = 64;

// What reserve() sizes scratch for: the largest values any later call will have.
struct Limits {
  int32_t rows = 0;
  int32_t hidden = 0;
  int32_t linear_k = 0;        // largest k of any linear layer
  int32_t linear_n = 0;        // largest n of any linear layer (the head included)
  int32_t ffn_width = 0;       // largest width of one FfnGroup
  int32_t ffn_slots = 0;       // largest FfnArgs::slots
  int64_t ffn_slot_width = 0;  // largest sum over a token's slots of their widths
  int32_t experts = 0;
  MlaShape mla;
  bool expand = false;  // SequenceRows::may_expand will be used
};

class Device {
 public:
  virtual ~Device() = default;
  virtual const char* name() const = 0;  // "ref", "portable", "avx2", "avx2i16", "avx512bf16", ...
  virtual int threads() const = 0;
  // Fewer while the machine is busy with something else.
  virtual int threads_in_use() const { return threads(); }

  // Memory. alloc returns null when there is none; memory is 4 KiB-aligned and zeroed.
  virtual Dev<std::byte> alloc(size_t bytes) = 0;
  virtual void free(Dev<std::byte> p) = 0;
  virtual void upload(Dev<std::byte> dst, const void* src, size_t bytes) = 0;
  virtual void download(void* dst, Dev<const std::byte> src, size_t bytes) = 0;
  virtual void copy(Dev<std::byte> dst, Dev<const std::byte> src, size_t bytes) = 0;
  virtual void zero(Dev<std::byte> dst, size_t bytes) = 0;
  // Makes host weights (of a mapped or loaded file) readable by the device: the same memory on a
  // CPU, a copy elsewhere; null when there is no memory. The host range must outlive the binding.
  virtual Dev<const std::byte> bind(const void* host, size_t bytes) = 0;
  virtual void unbind(Dev<const std::byte> p) = 0;

  // Sizes scratch; called before the first operation and again for larger limits.
  virtual Status reserve(const Limits& limits) = 0;
  // Bytes that a device of this kind with so many threads would reserve.
  virtual uint64_t scratch_bytes(const Limits& limits, int threads) const = 0;
  // Waits for all calls made so far. A device error is sticky and reported here.
  virtual Status synchronize() = 0;

  // Bytes of one latent page of one layer.
  virtual size_t latent_page_bytes(const MlaShape& shape) const = 0;

  // out[r] = table[ids[r]]; table [vocab, dim] in either layout, not MXFP4; ids in host memory.
  virtual void embed(const Matrix& table, std::span<const int32_t> ids, Dev<float> out,
                     int64_t out_stride) = 0;
  // out[r][i] = x[r][i] / sqrt(mean(x[r]^2) + eps) * gamma[i]; x may be out when strides agree.
  virtual void rms_norm(Dev<const float> x, int64_t x_stride, Dev<const float> gamma, float eps,
                        int32_t rows, int32_t dim, Dev<float> out, int64_t out_stride) = 0;
  // Independent linear layers in one call (usually over the same x); outputs must not overlap.
  virtual void linear(std::span<const LinearArgs> layers) = 0;
  virtual void rope_append(const RopeAppendArgs& args) = 0;
  virtual void mla_attention(const MlaAttentionArgs& args) = 0;
  virtual void route(const RouteArgs& args) = 0;
  virtual void moe_ffn(const FfnArgs& args) = 0;
  // y[i] += x[i]
  virtual void add(Dev<float> y, Dev<const float> x, size_t count) = 0;
  // out[i] = x[rows[i]]; rows in host memory.
  virtual void gather_rows(Dev<const float> x, int64_t x_stride, std::span<const int32_t> rows,
                           int32_t dim, Dev<float> out, int64_t out_stride) = 0;
  // stats[r] of logits[r, 0..vocab); stats in host memory, valid when the call returns.
  virtual void reduce_logits(Dev<const float> logits, int64_t stride, int32_t rows, int32_t vocab,
                             RowStats* stats) = 0;
  // What tokens are drawn by: weights[i] = exp((logits[i] - max) * scale), 0 where that is below
  // e^-87, and sums[b] = their sum over [kWeighBlock * b, kWeighBlock * (b + 1)). max: the greatest
  // logit; no NaN. weights: [logits.size()]; sums: [ceil(logits.size() / kWeighBlock)]. All of it
  // in host memory; no other thread is asked to help.
  virtual void weigh(std::span<const float> logits, float max, float scale, float* weights,
                     double* sums) = 0;

  // Another table over the same memory, for one thread beside others: every operation is done by
  // the thread that calls it, at the same time as those of other lanes. Bits are the same as this
  // device's. Has scratch of its own, see reserve(). Null where the device has none.
  virtual Result<std::unique_ptr<Device>> make_lane() const { return std::unique_ptr<Device>(); }

  // No operation of a model: what measures the machine (machine.h) does so with the very threads
  // that the operations run on. Calls body(context, task, worker) once for each task of [0, tasks),
  // worker in [0, threads()), on all threads of a host device, even those that rest because the
  // machine is busy; returns when all are done.
  virtual void run_on_threads(void (*body)(void* context, int task, int worker), void* context,
                              int tasks) = 0;
};

struct DeviceOptions {
  std::string kernels;  // "" chooses the best this machine runs; else a name of kernel_sets()
  int threads = 0;      // 0: the CPUs this process may use
  bool pin_threads = false;
};
// Names of the kernel sets that this machine can run, best first; "ref" is always the last.
std::vector<std::string> kernel_sets();
// An unknown name, or one this machine cannot run, is kUnsupported and says which ones it can.
Result<std::unique_ptr<Device>> make_device(const DeviceOptions& options);

}  // namespace dsv3::kernels
