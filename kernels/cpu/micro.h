// The micro-kernels of one instruction set: what differs between the CPU kernel sets. Everything
// else (partitioning, the expert plan, attention over pages) is shared and written on top of this
// table.
//
// The files that implement it are compiled for their instruction set alone. So that no function
// compiled for AVX-512 can be picked by the linker for a machine without it, they include nothing
// but this header and the other micro_*.h, whose functions are all templates over a type local to
// the file.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsv3::kernels {

// The same numbers as DType.
enum class WeightType : uint8_t { kF32 = 0, kBF16 = 1, kF16 = 2, kF8E4M3 = 3, kMXFP4 = 4 };
inline constexpr int kWeightTypes = 5;
// What the rows of activations are stored as when a kernel reads them.
// kRaisedF32: float32 times a power of two, for weights that are widened to a fraction of theirs.
enum class Activation : uint8_t { kF32 = 0, kBF16 = 1, kI8 = 2, kRaisedF32 = 3, kI16 = 4 };
inline constexpr int kActivationTypes = 5;

// 32 activations as INT8, for MXFP4 weights: E2M1 values times two are small integers, so that the
// sum of 32 products is exact.
struct I8Block {
  // An activation is q * 2 * scale: half of it, for the weights' factor of two. NaN when any of the
  // 32 was not finite, so that their rows' results are not finite either.
  float scale;
  int32_t offset;  // -12 * sum of q: where weights are stored as 0..24, this makes up for it
  int8_t q[32];    // zeros beyond k
};

// 64 activations as INT16, for FP8 weights that are multiplied as integers.
inline constexpr int kFixedBlock = 64;
struct I16Block {
  float scale;             // an activation is q * scale; NaN as in I8Block
  int16_t q[kFixedBlock];  // zeros beyond k
};

// A matrix in tile layout [ceil(n/16)][ceil(k/2)][16][2], or kTileMx (kernels.h) for MXFP4.
struct TiledWeights {
  WeightType type = WeightType::kF32;
  int32_t k = 0;
  int32_t block_k = 128;  // inputs summed before they join the total; divides scale_k
  const uint8_t* data = nullptr;
  const float* scales = nullptr;  // FP8 only: [ceil(n/scale_n), scale_columns]
  int32_t n = 0;
  int32_t scale_n = 128;
  int32_t scale_k = 128;
  int32_t scale_columns = 0;
};

inline constexpr int kGroupTiles = 4;                   // tiles of one gemm call at most
inline constexpr int kGroupColumns = 16 * kGroupTiles;  // output columns of one gemm call at most
inline constexpr int kBlockK = 128;                     // block_k at most
inline constexpr int kStreamRows = 4;                   // see Micro::streams
// Scratch of one gemm or panel call: a decoded block of kGroupTiles tiles as float32.
inline constexpr size_t kGemmScratch = size_t{kGroupColumns} * kBlockK * sizeof(float);

// out[r][c] = sum over k of W[16 tile + c][k] * x[r][k], c in [0, 16 tiles). Sums run over blocks
// of block_k inputs, each block in order (how is the set's choice), then total = fma(block, scale,
// total) block by block: the same additions for a row whatever the number of rows.
struct GemmArgs {
  TiledWeights w;
  int32_t tile = 0;
  int32_t tiles = 0;      // 1..kGroupTiles
  int32_t tile_step = 1;  // tile t of the call is tile + t * tile_step; see Micro::streams
  int32_t rows = 0;
  // [rows] pointers to k (rounded up to even, zero-padded) values, to ceil(k/32) I8Blocks or to
  // ceil(k/64) I16Blocks
  const void* const* x = nullptr;
  float* out = nullptr;     // [rows][16 tiles], overwritten
  int64_t out_stride = 0;   // elements
  void* scratch = nullptr;  // kGemmScratch bytes, 64-byte aligned
  // The tile that this thread will probably read next: its beginning is fetched while this call
  // comes to its end. What follows in memory is mostly some other thread's. Null: nothing is.
  const uint8_t* next = nullptr;
};

// 64 columns of BF16 pairs against some rows: w[pair][64][2], as a latent page holds its keys and
// as values are rearranged. out[r][c] = out[r][c] * keep[r] + sum over pairs; keep null: no out.
struct PanelArgs {
  const uint8_t* w = nullptr;  // BF16 [pairs][64][2]
  int32_t pairs = 0;
  int32_t columns = 64;  // those beyond need not be computed
  int32_t rows = 0;
  const void* const* x = nullptr;  // [rows] pointers to 2 * pairs values of the native type
  float* out = nullptr;            // [rows][64]
  int64_t out_stride = 0;
  const float* keep = nullptr;  // [rows]
  void* scratch = nullptr;      // kGemmScratch bytes
  // Cache lines to fetch meanwhile: what this thread will read when it is done with what it has.
  const uint8_t* next = nullptr;
  int32_t next_lines = 0;
};

// Keys are attended in blocks of two pages.
inline constexpr int kPageKeys = 64;
inline constexpr int kKeyBlock = 128;
// The same number as in kernels.h.
inline constexpr int kWeighed = 64;

struct Micro {
  const char* name;
  Activation native;  // type of attention's queries and probabilities
  // Type of activations that gemm wants for each weight type.
  Activation activation[kWeightTypes];

  // Packs k values for gemm or panel; pads with zeros up to `padded` values (kI8: a multiple of
  // 32; kI16: of 64).
  void (*pack)(Activation type, const float* x, int32_t k, int32_t padded, void* out);
  void (*gemm)(const GemmArgs& args);
  // The same with float32 activations for every weight type but MXFP4 (the router).
  void (*gemm_f32)(const GemmArgs& args);
  void (*panel)(const PanelArgs& args);
  // Rearranges dims [0, dims) of a page's keys for panel: out[ceil(dims/64)][pairs_total][64][2],
  // the page's 32 key pairs at [pair_begin, pair_begin + 32). Keys outside [begin, end) become
  // zero.
  void (*values)(const uint8_t* page, int32_t dims, int32_t begin, int32_t end, int32_t pair_begin,
                 int32_t pairs_total, uint8_t* out);
  // One row's scores of one key block: p[i] = exp(scale * s[i] - max) for i in [begin, end), 0 for
  // the others of kKeyBlock, in the native type. Updates the running *max and *sum; returns what
  // earlier sums must be multiplied by.
  float (*softmax)(const float* s, int32_t begin, int32_t end, float scale, float* max, float* sum,
                   void* p);
  // total = total * a + part * b
  void (*merge)(float* total, float a, const float* part, float b, int32_t count);
  // out[i] = x[i] / sqrt(mean(x^2) + eps) * gamma[i]
  void (*rms_norm)(const float* x, const float* gamma, float eps, int32_t dim, float* out);
  // gate[i] = silu(gate[i]) * up[i]
  void (*silu_mul)(float* gate, const float* up, int32_t count);
  // y[i] += x[i]
  void (*add)(float* y, const float* x, int64_t count);
  // y[i] += sum over j of weight[j] * parts[j][i], the sum formed from zero in order of j
  void (*add_weighted)(float* y, const float* const* parts, const float* weights,
                       int32_t parts_count, int32_t count);
  // The lowest index of the greatest value, the value, sum of exp(x - max), all finite.
  void (*reduce)(const float* x, int32_t count, int32_t* argmax, float* max, double* sum_exp,
                 bool* finite);
  // Device::weigh
  void (*weigh)(const float* x, int32_t count, float max, float scale, float* weights,
                double* sums);
  // Does gemm read kGroupTiles tiles of FP8 or BF16 side by side for kStreamRows rows and fewer?
  // Then each of them is best read on where it ended, call after call, so calls with such weights
  // may have a tile_step. Elsewhere that is 1.
  bool streams = false;
};

// Never null. A set is defined where kernels/CMakeLists.txt compiles its file; elsewhere naming it
// does not link, so callers name it under its architecture's #if.
const Micro* micro_portable();
const Micro* micro_avx2();
const Micro* micro_avx2i16();
const Micro* micro_avx512();
const Micro* micro_avx512bf16(size_t l1_bytes);  // data cache of a CPU; 0: not known
const Micro* micro_neon();
const Micro* micro_neonbf16();

}  // namespace dsv3::kernels
