// Linear layers: rounds the rows once, then multiplies groups of tiles with panels of rows.
#include <algorithm>
#include <array>
#include <cassert>

#include "kernels/cpu/cpu_device.h"

namespace dsv3::kernels {
namespace {

constexpr size_t kMaxLayers = 16;          // of one job; more run in turn
constexpr double kTaskBytes = 128 * 1024;  // weights of one task with few rows
constexpr int32_t kRunTiles = 8;  // that one stream of such a task reads, where there are some

}  // namespace

struct LinearJob {
  struct Input {  // rows to pack
    const float* x;
    int64_t stride;
    int32_t rows, k;
    Activation type;
    size_t first_row;   // in packed_rows_
    std::byte* packed;  // null: the caller's rows are read as they are
  };
  struct Layer {
    const LinearArgs* args;
    TiledWeights w;
    int32_t chunk_tiles, panels, first_task;
    size_t first_row;  // in packed_rows_
    bool streams;      // a task's tiles are read as kGroupTiles streams side by side
  };

  CpuDevice* device = nullptr;
  std::array<Input, kMaxLayers> inputs;
  std::array<Layer, kMaxLayers> layers;
  size_t input_count = 0, layer_count = 0;
  size_t rows_used = 0, bytes_used = 0;
  int32_t tasks = 0, pack_tasks = 0;
  double ns = 0;

  // What a task multiplies: from the layer's tile `tile` on, panel by panel.
  struct Part {
    const Layer* layer;
    int32_t tile, first_row;
  };

  bool add(const LinearArgs& a);
  Part part_of(int task) const;
  size_t find_input(const LinearArgs& a, Activation type);
  void pack_rows(const Input& in, int32_t begin, int32_t end) const;
  void store(const LinearArgs& a, int32_t first_row, const GemmArgs& g) const;
  void run();
  static void pack_task(void* context, int task, int worker);
  static void gemm_task(void* context, int task, int worker);
};

constexpr size_t kNone = ~size_t{0};

// The packed rows of a's input, shared with layers before it where they are the same; kNone when
// scratch is used up.
size_t LinearJob::find_input(const LinearArgs& a, Activation type) {
  for (size_t i = 0; i < input_count; ++i) {
    const Input& in = inputs[i];
    if (in.x == a.x.get() && in.stride == a.x_stride && in.rows == a.rows && in.k == a.w.k &&
        in.type == type) {
      return in.first_row;
    }
  }
  const bool as_is = type == Activation::kF32 && a.w.k % 2 == 0;
  const size_t bytes = as_is ? 0 : static_cast<size_t>(a.rows) * packed_stride(type, a.w.k);
  const auto rows = static_cast<size_t>(a.rows);
  if (rows_used + rows > device->packed_rows_count_ || bytes_used + bytes > device->packed_bytes_) {
    return kNone;
  }
  Input in{a.x.get(),
           a.x_stride,
           a.rows,
           a.w.k,
           type,
           rows_used,
           as_is ? nullptr : device->packed_.get() + bytes_used};
  inputs[input_count++] = in;
  rows_used += rows;
  bytes_used += bytes;
  return in.first_row;
}

bool LinearJob::add(const LinearArgs& a) {
  if (layer_count == kMaxLayers) return false;
  const Activation type = activation_for(*device->micro_, a.w);
  const size_t first_row = find_input(a, type);
  if (first_row == kNone) return false;
  Layer& layer = layers[layer_count++];
  layer = {&a,
           tiled(a.w),
           0,
           (a.rows + kPanelRows - 1) / kPanelRows,
           tasks,
           first_row,
           streams(*device->micro_, a.w, a.rows)};
  // Chunks of whole tile groups: enough weights per task to be worth taking, enough tasks to even
  // out.
  const auto tile_bytes = static_cast<double>(matrix_bytes(a.w.dtype, a.w.layout, kTileN, a.w.k));
  const auto tiles = static_cast<int32_t>(tiles_of(a.w.n));
  const int32_t groups = (tiles + kGroupTiles - 1) / kGroupTiles;
  int32_t want = static_cast<int32_t>(kTaskBytes / (tile_bytes * kGroupTiles)) + 1;
  if (layer.streams) want = kRunTiles;
  want = std::min(want, std::max(1, groups / (4 * device->threads())));
  layer.chunk_tiles = want * kGroupTiles;
  // A narrow layer is cut below the group so that every thread has a part.
  if (groups < device->threads()) {
    layer.chunk_tiles = std::max(1, (tiles + device->threads() - 1) / device->threads());
  }
  tasks += (tiles + layer.chunk_tiles - 1) / layer.chunk_tiles * layer.panels;
  ns += gemm_ns(a.w, a.rows);
  return true;
}

void LinearJob::pack_rows(const Input& in, int32_t begin, int32_t end) const {
  const size_t row_bytes = packed_stride(in.type, in.k);
  for (int32_t r = begin; r < end; ++r) {
    const float* x = in.x + r * in.stride;
    const void** row = device->packed_rows_.get() + in.first_row + static_cast<size_t>(r);
    if (in.packed == nullptr) {
      *row = x;
      continue;
    }
    std::byte* packed = in.packed + static_cast<size_t>(r) * row_bytes;
    device->micro_->pack(in.type, x, in.k, packed_values(in.type, in.k), packed);
    *row = packed;
  }
}

constexpr int32_t kPackRows = 16;

void LinearJob::pack_task(void* context, int task, int) {
  const LinearJob& job = *static_cast<LinearJob*>(context);
  for (size_t i = 0; i < job.input_count; ++i) {
    const Input& in = job.inputs[i];
    const int32_t tasks = (in.rows + kPackRows - 1) / kPackRows;
    if (task < tasks) {
      job.pack_rows(in, task * kPackRows, std::min(in.rows, (task + 1) * kPackRows));
      return;
    }
    task -= tasks;
  }
}

LinearJob::Part LinearJob::part_of(int task) const {
  size_t index = 0;
  while (index + 1 < layer_count && task >= layers[index + 1].first_task) ++index;
  const Layer& layer = layers[index];
  task -= layer.first_task;
  return {&layer, task / layer.panels * layer.chunk_tiles, task % layer.panels * kPanelRows};
}

// What a call of gemm made, from the panel to where it belongs.
void LinearJob::store(const LinearArgs& a, int32_t first_row, const GemmArgs& g) const {
  const int32_t pieces = g.tile_step == 1 ? 1 : g.tiles;
  const int32_t width = g.tiles / pieces * kTileN;
  for (int32_t p = 0; p < pieces; ++p) {
    const int32_t column = (g.tile + p * g.tile_step) * kTileN;
    const int32_t count = std::min(width, a.w.n - column);
    for (int32_t r = 0; r < g.rows; ++r) {
      const float* from = g.out + r * g.out_stride + p * width;
      float* y = a.y.get() + (first_row + r) * a.y_stride + column;
      if (a.accumulate) {
        for (int32_t c = 0; c < count; ++c) y[c] += from[c];
      } else {
        std::copy_n(from, count, y);
      }
    }
  }
}

void LinearJob::gemm_task(void* context, int task, int worker) {
  const LinearJob& job = *static_cast<LinearJob*>(context);
  const auto [part_layer, chunk, first] = job.part_of(task);
  const Layer& layer = *part_layer;
  const LinearArgs& a = *layer.args;
  auto& scratch = job.device->workers_[static_cast<size_t>(worker)];
  const auto end =
      static_cast<int32_t>(std::min<int64_t>(tiles_of(a.w.n), chunk + layer.chunk_tiles));
  // Threads that are as fast as each other take turns.
  const uint8_t* after = nullptr;
  if (const int next = task + job.device->threads(); next < job.tasks) {
    const Part part = job.part_of(next);
    after = tile_data(part.layer->args->w, part.tile);
  }
  GemmArgs g;
  g.w = layer.w;
  g.rows = std::min(kPanelRows, a.rows - first);
  g.x = job.device->packed_rows_.get() + layer.first_row + first;
  g.out = scratch.panel.get();
  g.out_stride = kGroupColumns;
  g.scratch = scratch.gemm.get();
  const int32_t groups = layer.streams ? (end - chunk) / kGroupTiles : 0;
  g.tiles = kGroupTiles;
  g.tile_step = std::max(1, groups);
  for (int32_t i = 0; i < groups; ++i) {
    g.tile = chunk + i;
    g.next = i + 1 < groups ? tile_data(a.w, g.tile + 1) : after;
    job.device->micro_->gemm(g);
    job.store(a, first, g);
  }
  g.tile_step = 1;
  for (g.tile = chunk + groups * kGroupTiles; g.tile < end; g.tile += kGroupTiles) {
    g.tiles = std::min(kGroupTiles, end - g.tile);
    g.next = g.tile + g.tiles < end ? tile_data(a.w, g.tile + g.tiles) : after;
    job.device->micro_->gemm(g);
    job.store(a, first, g);
  }
}

void LinearJob::run() {
  int64_t values = 0;
  for (size_t i = 0; i < input_count; ++i) {
    const Input& in = inputs[i];
    values += in.packed != nullptr ? int64_t{in.rows} * in.k : 0;
    pack_tasks += (in.rows + kPackRows - 1) / kPackRows;
  }
  std::array<Pool::Phase, 2> phases{Pool::Phase{pack_task, this, pack_tasks},
                                    Pool::Phase{gemm_task, this, tasks}};
  if (values > 32 * 1024) {
    device->run(phases, ns);
    return;
  }
  for (size_t i = 0; i < input_count; ++i) pack_rows(inputs[i], 0, inputs[i].rows);
  device->run({&phases[1], 1}, ns);
}

void CpuDevice::linear(std::span<const LinearArgs> layers) {
  for (size_t i = 0; i < layers.size();) {
    LinearJob job;
    job.device = this;
    const size_t begin = i;
    for (; i < layers.size(); ++i) {
      if (layers[i].rows > 0 && !job.add(layers[i])) break;
    }
    assert(i > begin && "linear: more rows or inputs than reserve() was told");
    if (i == begin) return;
    job.run();
  }
}

}  // namespace dsv3::kernels
