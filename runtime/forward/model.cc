#include "runtime/forward/model.h"

#include <cassert>
#include <cstring>
#include <utility>

#include "runtime/base/os.h"
#include "runtime/forward/model_impl.h"

namespace dsv3 {
namespace {

kernels::Dev<std::byte> bytes_of(kernels::Dev<float> p) {
  return kernels::Dev<std::byte>(reinterpret_cast<std::byte*>(p.get()));
}

kernels::Limits limits_of(const ModelConfig& config, int32_t max_rows, int32_t max_head_rows,
                          bool expand) {
  kernels::Limits limits = device_limits(config, std::max(max_rows, max_head_rows));
  limits.expand = expand;
  return limits;
}

// A file may ask for more than any machine has: no allocator's word is taken for it, for some grant
// what touching it will not find.
Status check_memory(const Model& model, uint64_t scratch, uint64_t page, int32_t rows) {
  const uint64_t memory = total_memory();
  if (memory == 0 || (scratch <= memory && page <= memory - scratch)) return {};
  return make_error(Code::kOutOfMemory,
                    "%s: steps of %d rows need %llu bytes of scratch memory, a page of latents "
                    "%llu, and the machine has %llu: a smaller prefill_chunk needs less",
                    model.path().c_str(), rows, static_cast<unsigned long long>(scratch),
                    static_cast<unsigned long long>(page), static_cast<unsigned long long>(memory));
}

}  // namespace

ForwardModel::ForwardModel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ForwardModel::~ForwardModel() = default;

Result<std::unique_ptr<ForwardModel>> ForwardModel::create(std::shared_ptr<const Model> model,
                                                           kernels::Device* device,
                                                           int32_t max_rows, int32_t max_head_rows,
                                                           bool expand) {
  auto impl = std::make_unique<Impl>(std::move(model), device);
  const ModelConfig& config = impl->config();
  impl->max_rows = max_rows;
  impl->max_head_rows = max_head_rows;
  impl->shape = mla_shape(config);
  impl->layer_page_bytes = device->latent_page_bytes(impl->shape);
  const uint64_t scratch =
      scratch_bytes(config, *device, device->threads(), max_rows, max_head_rows, expand);
  const uint64_t page =
      uint64_t{impl->layer_page_bytes} * static_cast<uint64_t>(config.cache_layers());
  DSV3_TRY(check_memory(*impl->model, scratch, page, max_rows));
  DSV3_TRY(impl->weights.bind(impl->model->weights()));
  DSV3_TRY(impl->a.allocate(device, config, max_rows, max_head_rows));
  DSV3_TRY(device->reserve(limits_of(config, max_rows, max_head_rows, expand)));
  DSV3_TRY(impl->lanes.create(device, config, max_rows));
  impl->plan.reserve(max_rows, static_cast<int32_t>(config.num_experts_per_tok),
                     static_cast<int32_t>(config.n_routed_experts));
  const auto angles = static_cast<size_t>(max_rows) * static_cast<size_t>(impl->rope.pairs());
  impl->cos.resize(angles);
  impl->sin.resize(angles);
  impl->stats.resize(static_cast<size_t>(max_head_rows));
  impl->mtp_rows.reserve(static_cast<size_t>(max_head_rows));
  impl->load.resize(static_cast<size_t>(config.cache_layers() * config.n_routed_experts));
  return std::unique_ptr<ForwardModel>(new ForwardModel(std::move(impl)));
}

size_t ForwardModel::page_bytes() const {
  return impl_->page_offset(impl_->config().cache_layers());
}
int32_t ForwardModel::max_rows() const { return impl_->max_rows; }
int32_t ForwardModel::max_head_rows() const { return impl_->max_head_rows; }
const std::vector<uint64_t>& ForwardModel::expert_load() const { return impl_->load; }

uint64_t ForwardModel::scratch_bytes(const ModelConfig& config, const kernels::Device& device,
                                     int threads, int32_t max_rows, int32_t max_head_rows,
                                     bool expand) {
  return Activations::bytes(config, max_rows, max_head_rows) +
         device.scratch_bytes(limits_of(config, max_rows, max_head_rows, expand), threads) +
         Lanes::bytes(device, config, std::min(threads, max_rows));
}

LayerContext ForwardModel::Impl::layer_context(int32_t rows,
                                               std::span<const kernels::SequenceRows> sequences) {
  LayerContext c;
  c.device = device;
  c.config = &config();
  c.shape = shape;
  c.softmax_scale = rope.softmax_scale();
  c.a = &a;
  c.plan = &plan;
  c.rows = rows;
  c.sequences = sequences;
  return c;
}

void ForwardModel::Impl::upload_rope(int32_t rows,
                                     std::span<const kernels::SequenceRows> sequences) {
  rope.fill(sequences, cos.data(), sin.data());
  const size_t size = static_cast<size_t>(rows) * static_cast<size_t>(rope.pairs()) * sizeof(float);
  device->upload(bytes_of(a.cos.at()), cos.data(), size);
  device->upload(bytes_of(a.sin.at()), sin.data(), size);
}

// A token's way through the model: its embedding row becomes the residual stream x; every layer
// adds what attention finds in the latents of the tokens before it, then what its experts make of
// it; the final norm leaves the hidden state that head() turns into logits.
Status ForwardModel::run(const Step& step) {
  Impl& m = *impl_;
  const auto rows = static_cast<int32_t>(step.tokens.size());
  const auto hidden = static_cast<int32_t>(m.config().hidden_size);
  assert(rows > 0 && rows <= m.max_rows);

  if (step.first_layer == 0) {
    m.device->embed(m.weights.embed, step.tokens, m.a.x.at(), hidden);
  } else {
    const size_t values = step.tokens.size() * static_cast<size_t>(hidden);
    m.device->upload(bytes_of(m.a.x.at()), step.residual, values * sizeof(float));
  }
  m.upload_rope(rows, step.sequences);

  // Every thread has a part of each operation or, where that is faster, some of the sequences.
  const bool has_lanes = m.lanes.cut(step, m.a);
  const int way = has_lanes ? m.lanes.choice().choose(rows) : FasterWay::kFirst;
  m.last_lanes = way == FasterWay::kSecond ? static_cast<int>(m.lanes.lanes().size()) : 0;
  const int64_t begin = has_lanes ? monotonic_ns() : 0;
  DSV3_TRY(way == FasterWay::kSecond ? m.run_lanes(step) : m.run_layers(step));
  if (has_lanes) m.lanes.choice().record(rows, way, monotonic_ns() - begin);
  return m.device->synchronize();
}

Status ForwardModel::Impl::stop_before(const Step& step, int64_t layer) {
  if (step.should_stop == nullptr || !step.should_stop(step.should_stop_user)) return {};
  stopped_before = layer;
  return make_error(Code::kCancelled, "cancelled before layer %lld of %lld",
                    static_cast<long long>(layer),
                    static_cast<long long>(config().num_hidden_layers));
}

void ForwardModel::Impl::run_layer(const LayerContext& c, int64_t layer, uint64_t* all_load) {
  const BoundLayer& w = weights.layers[static_cast<size_t>(layer)];
  mla_block(c, w, page_offset(layer), /*first_keys=*/{});
  ffn_block(c, w, all_load + load_offset(layer));
}

void ForwardModel::Impl::final_norm(const LayerContext& c) {
  const auto hidden = static_cast<int32_t>(config().hidden_size);
  c.device->rms_norm(c.a->x.at(), hidden, weights.final_norm, config().rms_norm_eps, c.rows, hidden,
                     c.a->hidden.at(), hidden);
}

Status ForwardModel::Impl::run_layers(const Step& step) {
  const auto rows = static_cast<int32_t>(step.tokens.size());
  const LayerContext context = layer_context(rows, step.sequences);
  for (int64_t i = step.first_layer; i < config().num_hidden_layers; ++i) {
    DSV3_TRY(stop_before(step, i));
    run_layer(context, i, load.data());
  }
  final_norm(context);
  return {};
}

// Stops before the first layer only: the step is no longer than one layer of a whole chunk.
Status ForwardModel::Impl::run_lanes(const Step& step) {
  DSV3_TRY(stop_before(step, 0));
  const auto run = [](void* impl, int index, int) {
    Impl& m = *static_cast<Impl*>(impl);
    Lanes::Lane& lane = m.lanes.lanes()[static_cast<size_t>(index)];
    LayerContext context = m.layer_context(lane.rows, lane.sequences);
    context.device = lane.device.get();
    context.a = &lane.a;
    context.plan = &lane.plan;
    for (int64_t i = 0; i < m.config().num_hidden_layers; ++i) {
      m.run_layer(context, i, lane.load.data());
    }
    m.final_norm(context);
  };
  device->run_on_threads(run, this, static_cast<int>(lanes.lanes().size()));
  for (Lanes::Lane& lane : lanes.lanes()) {
    for (size_t i = 0; i < load.size(); ++i) load[i] += std::exchange(lane.load[i], 0);
  }
  return {};
}

int ForwardModel::lanes() const { return impl_->last_lanes; }

int64_t ForwardModel::stopped_before() const { return impl_->stopped_before; }

void ForwardModel::copy_residual(int32_t rows, float* out) {
  const size_t values =
      static_cast<size_t>(rows) * static_cast<size_t>(impl_->config().hidden_size);
  impl_->device->download(out, bytes_of(impl_->a.x.at()), values * sizeof(float));
}

void ForwardModel::copy_hidden(int32_t begin, int32_t count, float* out) {
  const auto hidden = static_cast<size_t>(impl_->config().hidden_size);
  impl_->device->download(out, bytes_of(impl_->a.hidden.at(static_cast<size_t>(begin) * hidden)),
                          static_cast<size_t>(count) * hidden * sizeof(float));
}

Status ForwardModel::head(std::span<const int32_t> rows, float* out) {
  return impl_->head(impl_->a.hidden, rows, out);
}

Status ForwardModel::compute_head(std::span<const int32_t> rows) {
  return impl_->compute_logits(impl_->a.hidden, rows);
}

const kernels::RowStats& ForwardModel::logits_row(int32_t index) const {
  return impl_->stats[static_cast<size_t>(index)];
}

void ForwardModel::copy_logits(int32_t index, float* out) {
  const auto vocab = static_cast<size_t>(impl_->config().vocab_size);
  impl_->device->download(out, bytes_of(impl_->a.logits.at(static_cast<size_t>(index) * vocab)),
                          vocab * sizeof(float));
}

Status ForwardModel::Impl::compute_logits(const DeviceFloats& hidden_states,
                                          std::span<const int32_t> rows) {
  const auto hidden = static_cast<int32_t>(config().hidden_size);
  const auto vocab = static_cast<int32_t>(config().vocab_size);
  const auto count = static_cast<int32_t>(rows.size());
  assert(count > 0 && count <= max_head_rows);
  device->gather_rows(hidden_states.at(), hidden, rows, hidden, a.head_in.at(), hidden);
  const kernels::LinearArgs head[] = {
      {weights.head, a.head_in.at(), hidden, a.logits.at(), vocab, count, false}};
  device->linear(head);
  device->reduce_logits(a.logits.at(), vocab, count, vocab, stats.data());
  DSV3_TRY(device->synchronize());
  for (int32_t r = 0; r < count; ++r) {
    if (!stats[static_cast<size_t>(r)].finite) {
      return make_error(
          Code::kNumeric,
          "logits of row %d hold NaN or infinity: the weights or an earlier latent do",
          rows[static_cast<size_t>(r)]);
    }
  }
  return {};
}

Status ForwardModel::Impl::head(const DeviceFloats& hidden_states, std::span<const int32_t> rows,
                                float* out) {
  DSV3_TRY(compute_logits(hidden_states, rows));
  const auto vocab = static_cast<size_t>(config().vocab_size);
  device->download(out, bytes_of(a.logits.at()), rows.size() * vocab * sizeof(float));
  return {};
}

}  // namespace dsv3
