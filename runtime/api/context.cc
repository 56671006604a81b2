#include "runtime/api/handles.h"
#include "runtime/engine/prompt.h"

using namespace dsv3;       // NOLINT: the C boundary translates between the two
using namespace dsv3::api;  // NOLINT

// An engine whose handle could not be made must not keep its thread.
dsv3_context::~dsv3_context() {
  if (engine != nullptr && !engine->forked()) engine->shutdown();
}

bool dsv3_context::close() noexcept { return engine == nullptr || !engine->forked(); }

namespace {

constexpr dsv3_context_options kContextDefaults = {.struct_size = sizeof(dsv3_context_options),
                                                   .threads = 0,
                                                   .kernels = nullptr,
                                                   .cache_bytes = 0,
                                                   .prefill_chunk = 0,
                                                   .pin_threads = 0,
                                                   .log = nullptr,
                                                   .log_user = nullptr,
                                                   .prefix_cache = 1,
                                                   .prompt_attention = DSV3_PROMPT_LATENT,
                                                   .disk_cache_dir = nullptr,
                                                   .disk_cache_bytes = 0};

}  // namespace

namespace dsv3::api {

Status read_context_options(const dsv3_context_options* options, EngineOptions* out) {
  dsv3_context_options o = kContextDefaults;
  if (options != nullptr) DSV3_TRY(read_struct(options, "dsv3_context_options", &o));
  DSV3_TRY(check_flag_value(o.pin_threads, "pin_threads"));
  DSV3_TRY(check_flag_value(o.prefix_cache, "prefix_cache"));
  if (o.prompt_attention != DSV3_PROMPT_LATENT && o.prompt_attention != DSV3_PROMPT_EXPANDED) {
    return invalid("prompt_attention",
                   format("prompt_attention is %d, expected DSV3_PROMPT_LATENT (0) or "
                          "DSV3_PROMPT_EXPANDED (1)",
                          o.prompt_attention));
  }
  out->expand_prompts = o.prompt_attention == DSV3_PROMPT_EXPANDED;
  out->threads = o.threads;
  if (o.kernels != nullptr) {
    out->kernels = o.kernels;
  } else if (const char* environment = std::getenv("DSV3_KERNELS")) {
    out->kernels = environment;
  }
  out->cache_bytes = o.cache_bytes;
  out->prefill_chunk = o.prefill_chunk;
  out->pin_threads = o.pin_threads == 1;
  out->prefix_cache = o.prefix_cache == 1;
  if (o.disk_cache_dir != nullptr) {
    if (*o.disk_cache_dir == 0) {
      return invalid("disk_cache_dir", "disk_cache_dir is \"\", expected a path or NULL");
    }
    out->disk_cache_dir = o.disk_cache_dir;
  }
  out->disk_cache_bytes = o.disk_cache_bytes;
  out->log = o.log;
  out->log_user = o.log_user;
  return out->validate();
}

}  // namespace dsv3::api

extern "C" {

void dsv3_context_options_init(dsv3_context_options* options, uint32_t struct_size) {
  init_struct(options, struct_size, kContextDefaults);
}

dsv3_status dsv3_context_create(dsv3_model* model, const dsv3_context_options* options,
                                dsv3_context** out, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(model, "model"));
    DSV3_TRY(check_out(out, "out"));
    EngineOptions o;
    DSV3_TRY(read_context_options(options, &o));
    auto handle = std::make_unique<dsv3_context>();
    const DefaultFloats floats;  // the angles of rotary embeddings
    DSV3_ASSIGN(handle->engine, Engine::create(model->model, o));
    handle->completer = std::make_shared<Completer>(handle->engine);
    *out = handle.release();
    return {};
  });
}

void dsv3_context_free(dsv3_context* context) { free_handle(context, dsv3_context::kMagic); }

dsv3_status dsv3_context_get_info(const dsv3_context* context, dsv3_context_info* info,
                                  dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(context, "context"));
    DSV3_TRY(check_out_struct(info, "dsv3_context_info"));
    DSV3_TRY(context->engine->check_process());
    const EngineInfo e = context->engine->info();
    dsv3_context_info i = {};
    i.threads = e.threads;
    i.bit_identical = e.bit_identical ? 1 : 0;
    i.page_tokens = kernels::kLatentPageTokens;
    i.kernels = e.kernels;
    i.allocator = e.allocator;
    i.page_bytes = e.page_bytes;
    i.pages = e.pages;
    i.pages_used = e.pages_used;
    i.sessions = e.sessions;
    i.requests_running = e.requests_running;
    i.requests_waiting = e.requests_waiting;
    fill_struct(info, i);
    return {};
  });
}

dsv3_status dsv3_disk_cache_purge(const char* path, uint64_t* bytes, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    if (path == nullptr) return invalid("path", "path is NULL");
    return DiskTier::purge(path, bytes);
  });
}

dsv3_status dsv3_estimate_memory(const char* model_path, const dsv3_context_options* options,
                                 dsv3_memory_estimate* out, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    if (model_path == nullptr) return invalid("model_path", "model_path is NULL");
    DSV3_TRY(check_out_struct(out, "dsv3_memory_estimate"));
    EngineOptions o;
    DSV3_TRY(read_context_options(options, &o));
    // Mapping reads the header alone.
    DSV3_ASSIGN(const std::shared_ptr<const Model> model, Model::open(model_path, OpenOptions()));
    DSV3_ASSIGN(const MemoryEstimate m, Engine::estimate(*model, o));
    dsv3_memory_estimate e = {};
    e.weight_bytes = m.weight_bytes;
    e.cache_bytes = m.cache_bytes;
    e.cache_tokens = m.cache_tokens;
    e.scratch_bytes = m.scratch_bytes;
    e.total_bytes = m.weight_bytes + m.cache_bytes + m.scratch_bytes;
    e.machine_bytes = m.machine_bytes;
    fill_struct(out, e);
    return {};
  });
}

dsv3_status dsv3_complete(dsv3_context* context, const char* prefix, uint64_t prefix_length,
                          const char* suffix, uint64_t suffix_length,
                          const dsv3_request_options* options, char** text, uint64_t* length,
                          dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(context, "context"));
    DSV3_TRY(check_out(text, "text"));
    // A callback, or another thread, may free the context while this runs.
    const std::shared_ptr<Engine> engine = context->engine;
    const std::shared_ptr<Completer> completer = context->completer;
    std::string_view before, after;
    DSV3_TRY(read_text(prefix, prefix_length, "prefix", &before));
    // A NULL suffix is none, whatever its length.
    if (suffix != nullptr) DSV3_TRY(read_text(suffix, suffix_length, "suffix", &after));
    RequestOptions o;
    DSV3_TRY(read_request_options(options, &o));
    std::vector<int32_t> tokens;
    DSV3_TRY(encode_completion(engine->model(), before,
                               suffix == nullptr ? std::nullopt : std::optional(after), &tokens));
    std::string answer;
    DSV3_TRY(completer->run(tokens, std::move(o), &answer));
    *text = new_string(answer);
    if (length != nullptr) *length = answer.size();
    return {};
  });
}

}  // extern "C"
