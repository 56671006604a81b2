#include "runtime/engine/engine.h"

#include <algorithm>
#include <cinttypes>
#include <new>
#include <utility>

#include "runtime/base/alloc.h"
#include "runtime/base/checked.h"
#include "runtime/forward/activations.h"

namespace dsv3 {
namespace {

// What a context that is freed still takes to write prefixes to the disk cache.
constexpr int64_t kDiskGraceNs = 1'000'000'000;
constexpr int64_t kPageTokens = kernels::kLatentPageTokens;
constexpr int64_t kDefaultSequences = 4;

int32_t chunk_of(const EngineOptions& o) {
  if (o.prefill_chunk > 0) return o.prefill_chunk;
  return o.expand_prompts ? kDefaultExpandedChunk : kDefaultPrefillChunk;
}

// How many pages the budget holds.
Result<int64_t> page_budget(const ModelConfig& config, const EngineOptions& options,
                            size_t page_bytes) {
  const auto page = static_cast<uint64_t>(page_bytes);
  const uint64_t memory = total_memory();
  if (options.cache_bytes > 0) {
    if (options.cache_bytes < page) {
      return make_field_error(Code::kInvalidArgument, "cache_bytes",
                              "cache_bytes is %" PRIu64 ", expected at least %" PRIu64
                              ": one page of %lld tokens",
                              options.cache_bytes, page, static_cast<long long>(kPageTokens));
    }
    // More than the machine has is as good as all of it, and the lists of pages stay small.
    const uint64_t bytes = std::min(options.cache_bytes, memory == 0 ? UINT64_MAX : memory);
    return static_cast<int64_t>(std::clamp<uint64_t>(bytes / page, 1, INT32_MAX));
  }
  const int64_t wanted = kDefaultSequences * ceil_div(config.max_position_embeddings, kPageTokens);
  const int64_t limit =
      memory == 0 ? wanted : static_cast<int64_t>(std::min<uint64_t>(memory / 4 / page, INT32_MAX));
  return std::max<int64_t>(1, std::min(wanted, limit));
}

kernels::DeviceOptions device_options(const EngineOptions& options) {
  kernels::DeviceOptions d;
  d.kernels = options.kernels;
  d.threads = options.threads;
  d.pin_threads = options.pin_threads;
  return d;
}

// Whose arithmetic made the latents.
std::string arithmetic_name(const kernels::Device& device, const EngineOptions& options) {
  return std::string(device.name()) + (options.expand_prompts ? "+expanded" : "");
}

// What latents depend on beside the tokens.
uint64_t prefix_seed(const Model& model, const std::string& arithmetic, size_t page_bytes) {
  uint64_t seed = static_cast<uint64_t>(page_bytes);
  for (const uint8_t byte : model.fingerprint().bytes) seed = seed * 1099511628211u ^ byte;
  for (const char c : arithmetic) seed = seed * 1099511628211u ^ static_cast<uint8_t>(c);
  return seed;
}

}  // namespace

Status EngineOptions::validate() const {
  if (threads < 0 || threads > 1024) {
    return make_field_error(Code::kInvalidArgument, "threads",
                            "threads is %d, expected 0 (all CPUs) to 1024", threads);
  }
  if (prefill_chunk < 0 || prefill_chunk > 65536) {
    return make_field_error(Code::kInvalidArgument, "prefill_chunk",
                            "prefill_chunk is %d, expected 0 (default) to 65536", prefill_chunk);
  }
  if (!disk_cache_dir.empty() && !prefix_cache) {
    return make_field_error(Code::kInvalidArgument, "disk_cache_dir",
                            "disk_cache_dir is \"%s\" but prefix_cache is 0, expected 1: the disk "
                            "keeps what the prefix cache finds",
                            disk_cache_dir.c_str());
  }
  return {};
}

Engine::Engine(std::shared_ptr<const Model> model, const EngineOptions& options)
    : model_(std::move(model)),
      options_(options),
      process_(process_id()),
      out_of_memory_(Code::kOutOfMemory, "out of memory", "", /*retryable=*/true),
      internal_(Code::kInternal, "an unexpected exception inside a step"),
      cancelled_(Code::kCancelled, "the request was cancelled"),
      deadline_(Code::kDeadline, "the request's deadline passed", "deadline_ms") {}

Result<std::shared_ptr<Engine>> Engine::create(std::shared_ptr<const Model> model,
                                               const EngineOptions& options,
                                               std::unique_ptr<kernels::Device> device) {
  DSV3_TRY(options.validate());
  std::shared_ptr<Engine> engine(new Engine(std::move(model), options));
  engine->device_ = std::move(device);
  DSV3_TRY(engine->start());
  return engine;
}

Status Engine::start() {
  const ModelConfig& config = model_->config();
  if (device_ == nullptr) {
    DSV3_ASSIGN(device_, kernels::make_device(device_options(options_)));
  }
  const int32_t chunk = chunk_of(options_);
  DSV3_ASSIGN(forward_, ForwardModel::create(model_, device_.get(), std::max(chunk, kMaxBatch),
                                             kMaxBatch, options_.expand_prompts));
  DSV3_ASSIGN(const int64_t pages, page_budget(config, options_, forward_->page_bytes()));
  cache_ = std::make_unique<LatentCache>(
      device_.get(), forward_->page_bytes(), pages, options_.prefix_cache,
      prefix_seed(*model_, arithmetic_name(*device_, options_), forward_->page_bytes()));
  const int32_t rows = std::max(chunk, kMaxBatch);
  scheduler_ = std::make_unique<Scheduler>(SchedulerLimits{
      .rows = rows,
      .tasks = kMaxStepTasks,
      .prefill = chunk,
      .draft = kMaxDraft,
      .sequence = config.max_position_embeddings,
  });
  sampler_ = std::make_unique<Sampler>(device_.get(), config.vocab_size);
  expert_load_ = forward_->expert_load();
  step_logits_ = std::make_unique<StepLogits>(forward_.get(), config.vocab_size, rows);
  if (config.num_nextn_predict_layers > 0) {
    mtp_drafter_ = std::make_unique<MtpDrafter>(forward_.get(), kMaxStepTasks);
    mtp_shares_.reserve(kMaxStepTasks);
    mtp_guesses_.resize(kMaxStepTasks);
  }
  plan_.parts.reserve(kMaxStepTasks);
  step_tokens_.reserve(static_cast<size_t>(rows));
  step_sequences_.reserve(kMaxStepTasks);
  // Its thread holds the engine: whatever fails from there on has to end it.
  struct StopDisk {
    DiskCache* disk = nullptr;
    ~StopDisk() {
      if (disk != nullptr) disk->stop(0, /*may_wait=*/true);
    }
  } stop_disk;
  if (!options_.disk_cache_dir.empty()) {
    const uint64_t bytes =
        options_.disk_cache_bytes == 0 ? kDefaultDiskCacheBytes : options_.disk_cache_bytes;
    const uint64_t page = latent_identity().page_bytes;
    if (bytes < page) {
      return make_field_error(Code::kInvalidArgument, "disk_cache_bytes",
                              "disk_cache_bytes is %" PRIu64 ", expected at least %" PRIu64
                              ": one page of %lld tokens",
                              bytes, page, static_cast<long long>(kPageTokens));
    }
    auto disk = DiskCache::open(options_.disk_cache_dir, bytes, latent_identity());
    if (!disk.ok()) {
      const Status& status = disk.status();
      return Status(status.code(), status.message(), "disk_cache_dir", status.retryable());
    }
    disk_ = std::move(*disk);
    DSV3_TRY(disk_->start(shared_from_this()));
    stop_disk.disk = disk_.get();
  }
  log(LogLevel::kInfo, format("kernels %s, %d threads, %lld pages of %zu bytes, allocator %s",
                              device_->name(), device_->threads(), static_cast<long long>(pages),
                              forward_->page_bytes(), host_allocator_name())
                           .c_str());
  DSV3_ASSIGN(Thread thread, Thread::start("dsv3-engine", thread_main, this));
  // The thread looks at these when it ends, which is not before shutdown().
  const std::lock_guard lock(mutex_);
  self_ = shared_from_this();
  thread_.emplace(std::move(thread));
  stop_disk.disk = nullptr;
  return {};
}

Engine::~Engine() = default;

Result<MemoryEstimate> Engine::estimate(const Model& model, const EngineOptions& options) {
  DSV3_TRY(options.validate());
  const ModelConfig& config = model.config();
  kernels::DeviceOptions d = device_options(options);
  d.threads = 1;  // only asked for sizes
  DSV3_ASSIGN(const std::unique_ptr<kernels::Device> device, kernels::make_device(d));
  const size_t page_bytes =
      device->latent_page_bytes(mla_shape(config)) * static_cast<size_t>(config.cache_layers());
  DSV3_ASSIGN(const int64_t pages, page_budget(config, options, page_bytes));
  MemoryEstimate e;
  e.weight_bytes = model.weight_bytes();
  e.cache_bytes = static_cast<uint64_t>(pages) * page_bytes;
  e.cache_tokens = static_cast<uint64_t>(pages * kPageTokens);
  const int threads = options.threads > 0 ? options.threads : available_cpus();
  e.scratch_bytes =
      ForwardModel::scratch_bytes(config, *device, threads, std::max(chunk_of(options), kMaxBatch),
                                  kMaxBatch, options.expand_prompts) +
      static_cast<uint64_t>(kMaxBatch) * static_cast<uint64_t>(config.vocab_size) * sizeof(float);
  e.machine_bytes = total_memory();
  return e;
}

void Engine::shutdown() noexcept {
  const bool may_wait = !on_engine_thread() && !CallbackScope::active();
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    for (const auto& task : tasks_) task->cancel();
    wake_ = true;
    work_.notify_all();
  }
  // It needs the engine's thread to copy pages.
  if (disk_ != nullptr) disk_->stop(kDiskGraceNs, may_wait);
  {
    const std::lock_guard lock(mutex_);
    stop_.store(true, std::memory_order_relaxed);
    detach_ = detach_ || !may_wait;
    work_.notify_all();
  }
  if (!may_wait || !thread_) return;
  thread_->join();
  finish_trace();
}

void Engine::finish_trace() noexcept {
  if (trace_ == nullptr) return;
  try {
    const Status status = std::exchange(trace_, nullptr)->finish();
    if (!status.ok()) log(LogLevel::kWarning, status.message().c_str());
  } catch (const std::bad_alloc&) {
    // The file does not appear, as when the disk is full.
  }
}

Status Engine::check_process() const {
  if (!forked()) return {};
  return Status(Code::kForked, "this handle was made before fork() and its threads are not here",
                "context");
}

EngineInfo Engine::info() const {
  EngineInfo info;
  info.threads = device_->threads();
  info.kernels = device_->name();
  info.bit_identical = !options_.expand_prompts;
  info.allocator = host_allocator_name();
  const std::lock_guard lock(mutex_);
  info.page_bytes = cache_->pool().page_bytes();
  info.pages = static_cast<uint64_t>(cache_->pool().capacity());
  info.pages_used = static_cast<uint64_t>(cache_->in_use());
  info.sessions = sessions_;
  for (const auto& task : tasks_) {
    ++(task->last_served != 0 ? info.requests_running : info.requests_waiting);
  }
  return info;
}

EngineStatistics Engine::statistics() const {
  const std::lock_guard lock(mutex_);
  return locked_statistics();
}

EngineStatistics Engine::locked_statistics() const {
  EngineStatistics s = statistics_;
  s.cache = cache_->counters();
  s.pages = static_cast<uint64_t>(cache_->pool().capacity());
  s.pages_used = static_cast<uint64_t>(cache_->in_use());
  s.pages_cached = static_cast<uint64_t>(cache_->pool().used()) - s.pages_used;
  s.pages_high_water = static_cast<uint64_t>(s.cache.high_water);
  return s;
}

EngineStatistics Engine::statistics(std::vector<uint64_t>* load) const {
  load->reserve(expert_load_.size());
  const std::lock_guard lock(mutex_);
  load->assign(expert_load_.begin(), expert_load_.end());
  return locked_statistics();
}

Status Engine::start_trace(const std::string& path, uint64_t max_bytes) {
  DSV3_TRY(check_process());
  DSV3_TRY(Trace::check_bytes(max_bytes));
  DSV3_ASSIGN(std::unique_ptr<Trace> made, Trace::create(path, max_bytes));
  return set_trace(std::move(made));
}

Status Engine::start_trace(WriteBytes write, uint64_t max_bytes) {
  DSV3_TRY(Trace::check_bytes(max_bytes));
  return set_trace(Trace::create(std::move(write), max_bytes));
}

Status Engine::set_trace(std::unique_ptr<Trace> trace) {
  return between_steps([&](kernels::Device*) -> Status {
    if (trace_ != nullptr) {
      return Status(Code::kBusy, "a trace is being written already: stop it first", "context");
    }
    trace_ = std::move(trace);
    return {};
  });
}

Status Engine::stop_trace() {
  std::unique_ptr<Trace> done;
  DSV3_TRY(between_steps([&](kernels::Device*) -> Status {
    done = std::move(trace_);
    return {};
  }));
  if (done == nullptr) return Status(Code::kNotFound, "no trace is being written", "context");
  return done->finish();
}

Result<std::shared_ptr<Session>> Engine::create_session() {
  return std::make_shared<Session>(shared_from_this(), PageTable(&cache_->pool()));
}

Status Engine::check_tokens(std::span<const int32_t> tokens, int64_t length) const {
  const ModelConfig& config = model_->config();
  const auto room = static_cast<uint64_t>(config.max_position_embeddings - length);
  if (tokens.size() > room) {
    return make_field_error(Code::kCapacity, "count",
                            "%lld + %zu tokens are more than max_position_embeddings, %lld",
                            static_cast<long long>(length), tokens.size(),
                            static_cast<long long>(config.max_position_embeddings));
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= config.vocab_size) {
      return make_field_error(Code::kInvalidArgument, "tokens",
                              "tokens[%zu] is %d, expected 0 to %lld", i, tokens[i],
                              static_cast<long long>(config.vocab_size - 1));
    }
  }
  return {};
}

Status Engine::check_fits(int64_t tokens) const {
  const int64_t pages = cache_->pool().capacity();
  const int64_t room = pages * kPageTokens;
  if (tokens <= room) return {};
  return make_field_error(Code::kCapacity, "cache_bytes",
                          "%lld tokens do not fit into the whole cache of %lld tokens "
                          "(%lld pages): make the context with a greater cache_bytes",
                          static_cast<long long>(tokens), static_cast<long long>(room),
                          static_cast<long long>(pages));
}

Status Engine::lock_idle(const Session& session, std::unique_lock<std::mutex>* lock) {
  DSV3_TRY(check_process());
  *lock = std::unique_lock(mutex_);
  while (const Task* running = session.state().running) {
    // An engine's own thread must not wait for a task's end.
    if (!running->abandoned() || on_engine_thread()) {
      return Status(Code::kBusy, "a request runs on this session", "session", /*retryable=*/true);
    }
    idle_.wait(*lock);
  }
  return {};
}

Status Engine::between_steps(const std::function<Status(kernels::Device*)>& work) {
  DSV3_TRY(check_process());
  std::unique_lock lock(mutex_);
  if (stop_.load(std::memory_order_relaxed)) {
    return Status(Code::kCancelled, "the context was freed", "context");
  }
  Errand errand;
  errand.work = &work;
  errand.next = std::exchange(errands_, &errand);
  errand_waits_.store(true, std::memory_order_relaxed);
  wake_ = true;
  work_.notify_one();
  errand_done_.wait(lock, [&] { return errand.done; });
  return errand.status;
}

Status Engine::reserve_positions(Session* session, int64_t begin, int64_t end) {
  const std::lock_guard lock(mutex_);
  return cache_->reserve(session, begin, end);
}

std::vector<int32_t> Engine::restorable(Task* task) const {
  const std::lock_guard lock(mutex_);
  const std::vector<int32_t>& tokens = task->session().state().tokens;
  const auto whole = static_cast<std::ptrdiff_t>(tokens.size() / kPageTokens * kPageTokens);
  return {tokens.begin(), tokens.begin() + whole};
}

bool Engine::adopt_page(kernels::Device* device, Task* task, std::span<const int32_t> prefix,
                        const std::byte* bytes) {
  const std::lock_guard lock(mutex_);
  Session& session = task->session();
  const Session::State& s = session.state();
  if (s.running != task || task->stalled) return false;
  const auto at = static_cast<int64_t>(prefix.size()) / kPageTokens - 1;
  const int64_t whole = s.computed / kPageTokens;
  if (whole != at) return whole > at;  // another request computed it meanwhile
  PrefixIndex& index = cache_->prefixes();
  const PageId parent = at == 0 ? kNoPage : s.table.page(at - 1);
  if (at > 0 && !index.contains(parent)) return false;
  const Result<PageId> taken = cache_->take_spare();
  if (!taken.ok() || taken.value() == kNoPage) return false;
  const PageId page = taken.value();
  struct Release {  // the index and the session hold it from now on
    PagePool& pool;
    PageId page;
    ~Release() { pool.release(page); }
  } release{cache_->pool(), page};
  device->upload(cache_->pool().data(page), bytes, cache_->pool().page_bytes());
  if (!device->synchronize().ok()) return false;
  index.insert(parent, PageTokens(prefix.last(kPageTokens)), page);
  const int64_t found = cache_->attach(&session, task->reusable());
  if (found > 0) task->found_cached(found);
  return found > 0;
}

size_t Engine::copy_pages(kernels::Device* device, std::span<const int32_t> tokens, size_t begin,
                          size_t count, std::byte* out) const {
  const std::lock_guard lock(mutex_);
  const size_t bytes = cache_->pool().page_bytes();
  PageId page = kNoPage;
  size_t copied = 0;
  for (size_t at = 0; at < begin + count; ++at) {
    page = cache_->prefixes().find(page, PageTokens(tokens.subspan(at * kPageTokens, kPageTokens)));
    if (page == kNoPage) break;
    if (at >= begin) device->download(out + copied++ * bytes, cache_->pool().data(page), bytes);
  }
  return device->synchronize().ok() ? copied : 0;
}

void Engine::restored(Task* task) {
  const std::lock_guard lock(mutex_);
  task->restoring = false;
  wake_ = true;
  work_.notify_one();
}

LatentIdentity Engine::latent_identity() const {
  LatentIdentity identity;
  identity.fingerprint = model_->fingerprint().bytes;
  identity.kernels = arithmetic_name(*device_, options_);
  identity.numeric_revision = kernels::kNumericRevision;
  identity.page_tokens = kernels::kLatentPageTokens;
  identity.page_bytes = cache_->pool().page_bytes();
  return identity;
}

void Engine::wake() noexcept {
  const std::lock_guard lock(mutex_);
  wake_ = true;
  work_.notify_one();
}

void Engine::wake_to_end() noexcept {
  const std::lock_guard lock(mutex_);
  end_asked_.store(true, std::memory_order_relaxed);
  wake_ = true;
  work_.notify_one();
}

void Engine::wake_for(Priority priority) noexcept {
  const std::lock_guard lock(mutex_);
  announce(priority);
  wake_ = true;
  work_.notify_one();
}

void Engine::announce(Priority priority) {
  const auto value = static_cast<int32_t>(priority);
  if (value >= newcomer_.load(std::memory_order_relaxed)) return;
  newcomer_.store(value, std::memory_order_relaxed);
}

void Engine::cancel_running(const Session& session) noexcept {
  const std::lock_guard lock(mutex_);
  if (session.state().running == nullptr) return;
  session.state().running->cancel();
  end_asked_.store(true, std::memory_order_relaxed);
  wake_ = true;
  work_.notify_one();
}

void Engine::session_made(Session* session) {
  cache_->add(session);
  ++sessions_;
}

void Engine::session_gone(Session* session) noexcept {
  cache_->remove(session);
  --sessions_;
}

// The table of a session with a task never grows beyond this, so that taking pages that are there
// allocates nothing.
void Engine::reserve_table(Session* session) {
  session->state().table.reserve(ceil_div(model_->config().max_position_embeddings, kPageTokens));
}

Status Engine::check_pages() const {
  const std::lock_guard lock(mutex_);
  return cache_->check();
}

void Engine::log(LogLevel level, const char* message) const noexcept {
  if (options_.log == nullptr) return;
  try {
    const CallbackScope scope;
    options_.log(options_.log_user, static_cast<int32_t>(level), message);
  } catch (...) {
    // A log sink that throws loses its message.
  }
}

}  // namespace dsv3
