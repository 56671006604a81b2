// The feed-forward networks of a plan in two phases. Phase 1 computes gate and up of some columns
// together and stores silu(gate) * up for phase 2. A task of phase 2 owns some columns of the
// output: it computes them for every group, and then sums each token's slots in order, so that no
// third phase is needed.
#include <algorithm>
#include <cassert>

#include "kernels/cpu/cpu_device.h"

namespace dsv3::kernels {

struct FfnJob {
  CpuDevice* device;
  const FfnArgs* args;
  int32_t up_tiles;          // of one task of phase 1
  int32_t down_tiles;        // of one task of phase 2
  int32_t shared_tasks = 0;  // of phase 1, when they are spread among the others
  bool runs = false;         // few rows take a task of phase 1 in one run, see activate_run()
  int32_t down_calls =
      1;              // of gemm for a task of phase 2, whose streams go on from one to the next
  int32_t cells = 0;  // results of phase 2, for each of these calls

  static void up_task(void* context, int position, int worker);
  static void down_task(void* context, int task, int worker);

  GemmArgs gemm_args(const Matrix& w, const void* const* rows, int32_t count, int worker) const;
  // What a task of phase 1 computes: columns from tile `tile` on, of rows [first_row, ...) of a
  // group.
  struct UpPart {
    size_t group;
    int32_t tile, first_row;
  };
  UpPart up_part(int position) const;
  void activate(const UpPart& part, int32_t tile, int32_t tiles, const uint8_t* next,
                int worker) const;
  void activate_run(const UpPart& part, int32_t tiles, const uint8_t* next, int worker) const;
  void keep_hidden(const UpPart& part, int32_t row, int32_t column, int32_t count,
                   const float* values) const;
  void sum_slots(int32_t column, int32_t count, int64_t at, int worker) const;
  // The shared experts are the last group and have every row: in a step of some rows they wait for
  // arithmetic, the others for memory, so they are spread among them. In a step of many rows
  // everything waits for arithmetic, and they go first, so that the last tasks are short.
  bool spreads() const { return args->groups.size() > 1 && args->rows <= kSpreadRows; }
  int32_t up_task_at(int32_t position) const;
  // Every other task of phase 2 begins with the shared experts.
  size_t first_down_group(int task) const {
    return shared_tasks > 0 && task % 2 == 1 ? args->groups.size() - 1 : 0;
  }
};

namespace {

// Of a task of phase 1 with few rows whose tiles are read as several streams.
constexpr int32_t kRunTiles = 4 * kGroupTiles;

int32_t panels_of(int32_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

}  // namespace

GemmArgs FfnJob::gemm_args(const Matrix& w, const void* const* rows, int32_t count,
                           int worker) const {
  auto& scratch = device->workers_[static_cast<size_t>(worker)];
  GemmArgs g;
  g.w = tiled(w);
  g.rows = count;
  g.x = rows;
  g.out = scratch.panel.get();
  g.out_stride = kGroupColumns;
  g.scratch = scratch.gemm.get();
  return g;
}

// Some columns of a row of the part, rounded for `down`.
void FfnJob::keep_hidden(const UpPart& part, int32_t row, int32_t column, int32_t count,
                         const float* values) const {
  const FfnWeights& w = *args->groups[part.group].weights;
  const Activation type = activation_for(*device->micro_, w.down);
  // The last column's row gets its padding.
  const int32_t padded =
      column + count == w.gate.n ? packed_values(type, w.gate.n) - column : count;
  const int32_t cell = device->ffn_first_cell_[part.group] + part.first_row + row;
  const void* to = device->ffn_hidden_[static_cast<size_t>(cell)];
  device->micro_->pack(
      type, values, count, padded,
      static_cast<std::byte*>(const_cast<void*>(to)) + packed_offset(type, column));
}

// silu(gate x) * (up x) of some columns and rows of a group, rounded for `down`.
void FfnJob::activate(const UpPart& part, int32_t tile, int32_t tiles, const uint8_t* next,
                      int worker) const {
  const FfnGroup& group = args->groups[part.group];
  const int32_t first_cell = device->ffn_first_cell_[part.group];
  const int32_t first = part.first_row;
  const int32_t rows = std::min(kPanelRows, group.count - first);
  const FfnWeights& w = *group.weights;
  const Micro& micro = *device->micro_;
  const auto inputs = [&](const Matrix& m) {
    return device->ffn_inputs_[static_cast<size_t>(activation_for(micro, m))].get() + first_cell +
           first;
  };
  GemmArgs gate = gemm_args(w.gate, inputs(w.gate), rows, worker);
  GemmArgs up = gemm_args(w.up, inputs(w.up), rows, worker);
  gate.tile = up.tile = tile;
  gate.tiles = up.tiles = tiles;
  up.out += kPanelRows * kGroupColumns;
  gate.next = tile_data(w.up, tile);
  up.next = next;
  micro.gemm(gate);
  micro.gemm(up);
  const int32_t column = tile * kTileN;
  const int32_t count = std::min(tiles * kTileN, w.gate.n - column);
  for (int32_t r = 0; r < rows; ++r) {
    float* values = gate.out + r * gate.out_stride;
    micro.silu_mul(values, up.out + r * up.out_stride, count);
    keep_hidden(part, r, column, count, values);
  }
}

// The same of `tiles` tiles from the part's on, whole groups of them, for kStreamRows rows and
// fewer: of gate, then of up, each as kGroupTiles streams that go on where they ended.
void FfnJob::activate_run(const UpPart& part, int32_t tiles, const uint8_t* next,
                          int worker) const {
  const FfnGroup& group = args->groups[part.group];
  const FfnWeights& w = *group.weights;
  const Micro& micro = *device->micro_;
  const int32_t calls = tiles / kGroupTiles;
  constexpr int64_t kCallFloats = int64_t{kStreamRows} * kGroupColumns;
  float* const gate = device->workers_[static_cast<size_t>(worker)].panel.get();
  float* const up = gate + int64_t{kPanelRows} * kGroupColumns;
  const auto multiply = [&](const Matrix& m, float* out, const uint8_t* then) {
    const auto type = static_cast<size_t>(activation_for(micro, m));
    const int32_t cell = device->ffn_first_cell_[part.group];
    GemmArgs g = gemm_args(m, device->ffn_inputs_[type].get() + cell, group.count, worker);
    g.tiles = kGroupTiles;
    g.tile_step = calls;
    for (int32_t i = 0; i < calls; ++i) {
      g.out = out + i * kCallFloats;
      g.tile = part.tile + i;
      g.next = i + 1 < calls ? tile_data(m, g.tile + 1) : then;
      micro.gemm(g);
    }
  };
  multiply(w.gate, gate, tile_data(w.up, part.tile));
  multiply(w.up, up, next);
  for (int32_t i = 0; i < calls; ++i) {
    for (int32_t r = 0; r < group.count; ++r) {
      const int64_t at = i * kCallFloats + int64_t{r} * kGroupColumns;
      micro.silu_mul(gate + at, up + at, kGroupColumns);
      for (int32_t t = 0; t < kGroupTiles; ++t) {
        const int32_t column = (part.tile + i + t * calls) * kTileN;
        keep_hidden(part, r, column, std::min(kTileN, w.gate.n - column), gate + at + t * kTileN);
      }
    }
  }
}

// The task that phase 1 hands out at a position.
int32_t FfnJob::up_task_at(int32_t position) const {
  const int64_t all = device->ffn_first_task_[args->groups.size()];
  if (shared_tasks == 0) return static_cast<int32_t>(all) - 1 - position;
  const auto shared_before = [&](int64_t p) {
    return static_cast<int32_t>((p * shared_tasks + all - 1) / all);
  };
  const int32_t before = shared_before(position);
  const auto routed = static_cast<int32_t>(all) - shared_tasks;
  return shared_before(position + 1) > before ? routed + before : position - before;
}

FfnJob::UpPart FfnJob::up_part(int position) const {
  const auto& first_task = device->ffn_first_task_;
  const auto groups = args->groups;
  const int32_t task = up_task_at(position);
  const auto end = first_task.begin() + static_cast<int64_t>(groups.size());
  const auto index =
      static_cast<size_t>(std::upper_bound(first_task.begin(), end, task) - first_task.begin() - 1);
  const int32_t panels = panels_of(groups[index].count);
  const int32_t local = task - first_task[index];
  return {index, local / panels * up_tiles, local % panels * kPanelRows};
}

void FfnJob::up_task(void* context, int position, int worker) {
  const FfnJob& job = *static_cast<FfnJob*>(context);
  const UpPart part = job.up_part(position);
  const Matrix& gate = job.args->groups[part.group].weights->gate;
  const int32_t end = std::min(static_cast<int32_t>(tiles_of(gate.n)), part.tile + job.up_tiles);
  // Threads that are as fast as each other take turns.
  const uint8_t* after = nullptr;
  if (const int next = position + job.device->threads();
      next < job.device->ffn_first_task_[job.args->groups.size()]) {
    const UpPart then = job.up_part(next);
    after = tile_data(job.args->groups[then.group].weights->gate, then.tile);
  }
  const FfnGroup& group = job.args->groups[part.group];
  int32_t tile = part.tile;
  if (const int32_t whole = (end - tile) / kGroupTiles * kGroupTiles;
      job.runs && whole > kGroupTiles && group.count <= kStreamRows) {
    tile += whole;
    job.activate_run(part, whole, tile < end ? tile_data(gate, tile) : after, worker);
  }
  for (; tile < end; tile += kGroupTiles) {
    const int32_t count = std::min(kGroupTiles, end - tile);
    job.activate(part, tile, count, tile + count < end ? tile_data(gate, tile + count) : after,
                 worker);
  }
}

// at: where the first cell's values of these columns lie.
void FfnJob::sum_slots(int32_t column, int32_t count, int64_t at, int worker) const {
  auto& scratch = device->workers_[static_cast<size_t>(worker)];
  const float** parts = scratch.slot_parts.get();
  float* weights = scratch.slot_weights.get();
  for (int64_t t = 0; t < args->rows; ++t) {
    int32_t used = 0;
    for (int64_t s = 0; s < args->slots; ++s) {
      const int32_t cell = device->ffn_cell_[static_cast<size_t>(t * args->slots + s)];
      if (cell < 0) continue;
      parts[used] = scratch.ffn_cells.get() + at + int64_t{cell} * kGroupColumns;
      weights[used++] = args->slot_weights[t * args->slots + s];
    }
    if (used == 0) continue;
    device->micro_->add_weighted(args->y.get() + t * args->hidden + column, parts, weights, used,
                                 count);
  }
}

void FfnJob::down_task(void* context, int task, int worker) {
  const FfnJob& job = *static_cast<FfnJob*>(context);
  auto& scratch = job.device->workers_[static_cast<size_t>(worker)];
  const auto tiles = static_cast<int32_t>(tiles_of(job.args->hidden));
  const int32_t tile = task * job.down_tiles;
  const int32_t tile_count = std::min(job.down_tiles, tiles - tile);
  const size_t groups = job.args->groups.size();
  const int32_t threads = job.device->threads();
  for (size_t j = 0; j < groups; ++j) {
    const size_t i = (job.first_down_group(task) + j) % groups;
    const FfnGroup& group = job.args->groups[i];
    const int32_t cell = job.device->ffn_first_cell_[i];
    // Then the same columns of the next group; after the last, another task's of the first.
    const bool last = j + 1 == groups;
    const size_t then = last ? job.first_down_group(task + threads) : (i + 1) % groups;
    const int32_t then_tile = last ? tile + threads * job.down_tiles : tile;
    const uint8_t* next = nullptr;
    if (then_tile < tiles) next = tile_data(job.args->groups[then].weights->down, then_tile);
    for (int32_t call = 0; call < job.down_calls; ++call) {
      for (int32_t first = 0; first < group.count; first += kPanelRows) {
        GemmArgs g =
            job.gemm_args(group.weights->down, job.device->ffn_hidden_.get() + cell + first,
                          std::min(kPanelRows, group.count - first), worker);
        g.tile = tile + call;
        g.tiles = tile_count / job.down_calls;
        g.tile_step = job.down_calls;
        g.next = call + 1 < job.down_calls ? tile_data(group.weights->down, g.tile + 1) : next;
        g.out = scratch.ffn_cells.get() + int64_t{call * job.cells + cell + first} * kGroupColumns;
        job.device->micro_->gemm(g);
      }
    }
  }
  const auto sum = [&](int32_t first, int32_t count, int64_t at) {
    const int32_t column = first * kTileN;
    job.sum_slots(column, std::min(count * kTileN, job.args->hidden - column), at, worker);
  };
  if (job.down_calls == 1) return sum(tile, tile_count, 0);
  for (int32_t i = 0; i < tile_count; ++i) {  // tile t of call c
    const int32_t c = i % job.down_calls, t = i / job.down_calls;
    sum(tile + i, 1, int64_t{c} * job.cells * kGroupColumns + t * kTileN);
  }
}

void CpuDevice::moe_ffn(const FfnArgs& args) {
  if (args.groups.empty()) return;
  assert(args.groups.size() < ffn_first_task_.size());
  FfnJob job{this, &args, kGroupTiles, kGroupTiles};

  // Rounded rows of x, once for each type that some group's weights want.
  const int32_t k = args.hidden;
  constexpr Activation kTypes[kActivationTypes] = {Activation::kF32, Activation::kBF16,
                                                   Activation::kI8, Activation::kRaisedF32,
                                                   Activation::kI16};
  bool wanted[kActivationTypes] = {};
  // Tasks of phase 1 make whole blocks of what phase 2 reads.
  int32_t least_up_tiles = 1;
  double ns = 0;
  int64_t width_tiles = 0;
  for (const FfnGroup& group : args.groups) {
    wanted[static_cast<size_t>(activation_for(*micro_, group.weights->gate))] = true;
    wanted[static_cast<size_t>(activation_for(*micro_, group.weights->up))] = true;
    ns += 2 * gemm_ns(group.weights->gate, group.count) + gemm_ns(group.weights->down, group.count);
    width_tiles += tiles_of(group.weights->gate.n) * panels_of(group.count);
    const Activation down = activation_for(*micro_, group.weights->down);
    least_up_tiles = std::max(least_up_tiles, packed_block(down) / kTileN);
  }
  size_t row_bytes[kActivationTypes];
  std::byte* packed[kActivationTypes];
  std::byte* end = packed_.get();
  for (const Activation type : kTypes) {
    const auto t = static_cast<size_t>(type);
    row_bytes[t] = packed_stride(type, k);
    packed[t] = end;
    if (wanted[t]) end += static_cast<size_t>(args.rows) * row_bytes[t];
  }
  for_rows(args.rows, k * 0.1, [&](int32_t r, int) {
    for (const Activation type : kTypes) {
      const auto t = static_cast<size_t>(type);
      if (!wanted[t]) continue;
      micro_->pack(type, args.x.get() + int64_t{r} * k, k, packed_values(type, k),
                   packed[t] + static_cast<size_t>(r) * row_bytes[t]);
    }
  });

  // Every (token, slot) that a group covers is a cell; a group's cells are consecutive.
  std::fill_n(ffn_cell_.get(), int64_t{args.rows} * args.slots, -1);
  // Small experts are cut finer so that every thread has work in both phases.
  const int64_t threads_wanted = int64_t{2} * threads();
  job.runs = least_up_tiles == 1 && args.rows <= kSpreadRows &&
             std::all_of(args.groups.begin(), args.groups.end(), [&](const FfnGroup& g) {
               return streams(*micro_, g.weights->gate, 1) && streams(*micro_, g.weights->up, 1);
             });
  if (job.runs) job.up_tiles = kRunTiles;
  if (job.runs && tiles_of(args.hidden) % (kDownCalls * kGroupTiles) == 0 &&
      tiles_of(args.hidden) / (kDownCalls * kGroupTiles) >= threads_wanted &&
      std::all_of(args.groups.begin(), args.groups.end(),
                  [&](const FfnGroup& g) { return streams(*micro_, g.weights->down, 1); })) {
    job.down_calls = kDownCalls;
    job.down_tiles = kDownCalls * kGroupTiles;
  }
  while (job.up_tiles > least_up_tiles && width_tiles / job.up_tiles < threads_wanted)
    job.up_tiles /= 2;
  while (job.down_tiles > 1 && tiles_of(args.hidden) / job.down_tiles < threads_wanted) {
    job.down_tiles /= 2;
  }
  int32_t cell = 0, task = 0;
  std::byte* hidden = ffn_activations_.get();
  for (size_t i = 0; i < args.groups.size(); ++i) {
    const FfnGroup& group = args.groups[i];
    const int32_t width = group.weights->gate.n;
    const Activation down = activation_for(*micro_, group.weights->down);
    const size_t hidden_bytes = packed_stride(down, width);
    ffn_first_cell_[i] = cell;
    ffn_first_task_[i] = task;
    for (int32_t j = 0; j < group.count; ++j, ++cell, hidden += hidden_bytes) {
      ffn_cell_[static_cast<size_t>(int64_t{group.tokens[j]} * args.slots + group.slots[j])] = cell;
      for (size_t t = 0; t < kActivationTypes; ++t) {
        ffn_inputs_[t][static_cast<size_t>(cell)] =
            packed[t] + static_cast<size_t>(group.tokens[j]) * row_bytes[t];
      }
      ffn_hidden_[static_cast<size_t>(cell)] = hidden;
    }
    const auto tiles = static_cast<int32_t>(tiles_of(width));
    task += (tiles + job.up_tiles - 1) / job.up_tiles * panels_of(group.count);
  }
  ffn_first_task_[args.groups.size()] = task;
  job.cells = cell;
  if (job.spreads()) job.shared_tasks = task - ffn_first_task_[args.groups.size() - 1];
  const auto down_tasks =
      static_cast<int>((tiles_of(args.hidden) + job.down_tiles - 1) / job.down_tiles);
  const Pool::Phase phases[] = {{FfnJob::up_task, &job, task},
                                {FfnJob::down_task, &job, down_tasks}};
  run(phases, ns);
}

}  // namespace dsv3::kernels
