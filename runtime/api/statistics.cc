// What a context and its requests have done, for people and programs that watch them.
#include <algorithm>
#include <memory>
#include <string>

#include "runtime/api/handles.h"
#include "runtime/base/json.h"

using namespace dsv3;       // NOLINT: the C boundary translates between the two
using namespace dsv3::api;  // NOLINT

namespace {

// Name and value of each counter: the one list that a struct and its JSON text share.
template <class Fn>
void for_each_counter(const EngineStatistics& s, dsv3_context_statistics* out, Fn fn) {
  const auto put = [&](const char* name, uint64_t* field, uint64_t value) {
    *field = value;
    fn(name, value);
  };
  put("steps", &out->steps, s.steps);
  put("steps_abandoned", &out->steps_abandoned, s.steps_abandoned);
  put("rows", &out->rows, s.rows);
  put("step_ns", &out->step_ns, s.step_ns);
  put("requests_finished", &out->requests_finished, s.requests_finished);
  put("prompt_tokens", &out->prompt_tokens, s.prompt_tokens);
  put("cached_tokens", &out->cached_tokens, s.cached_tokens);
  put("generated_tokens", &out->generated_tokens, s.generated_tokens);
  put("drafted_tokens", &out->drafted_tokens, s.drafted_tokens);
  put("accepted_tokens", &out->accepted_tokens, s.accepted_tokens);
  put("pages", &out->pages, s.pages);
  put("pages_used", &out->pages_used, s.pages_used);
  put("pages_cached", &out->pages_cached, s.pages_cached);
  put("pages_high_water", &out->pages_high_water, s.pages_high_water);
  put("prefix_hits", &out->prefix_hits, s.cache.prefix_hits);
  put("evictions", &out->evictions, s.cache.evictions);
  put("sessions_dropped", &out->sessions_dropped, s.cache.dropped);
  put("preemptions", &out->preemptions, s.cache.preemptions);
  put("refusals", &out->refusals, s.cache.refusals);
  put("queue_ns", &out->queue_ns, s.queue_ns);
  put("prefill_ns", &out->prefill_ns, s.prefill_ns);
  put("decode_ns", &out->decode_ns, s.decode_ns);
}

template <class Fn>
void for_each_counter(const RequestStatistics& s, dsv3_request_statistics* out, Fn fn) {
  const auto put = [&](const char* name, auto* field, auto value) {
    *field = value;
    fn(name, value);
  };
  put("prompt_tokens", &out->prompt_tokens, s.prompt_tokens);
  put("cached_tokens", &out->cached_tokens, s.cached_tokens);
  put("generated_tokens", &out->generated_tokens, s.generated_tokens);
  put("drafted_tokens", &out->drafted_tokens, s.drafted_tokens);
  put("accepted_tokens", &out->accepted_tokens, s.accepted_tokens);
  put("queue_ns", &out->queue_ns, s.queue_ns);
  put("prefill_ns", &out->prefill_ns, s.prefill_ns);
  put("decode_ns", &out->decode_ns, s.decode_ns);
  put("first_token_ns", &out->first_token_ns, s.first_token_ns);
  put("total_ns", &out->total_ns, s.total_ns);
  put("decode_steps", &out->decode_steps, s.decode_steps);
  put("speculation_saved_ns", &out->speculation_saved_ns, s.speculation_saved_ns);
  put("pages", &out->pages, s.pages);
  put("preemptions", &out->preemptions, s.preemptions);
}

template <class Struct, class Statistics>
Struct struct_of(const Statistics& s) {
  Struct out = {};
  for_each_counter(s, &out, [](const char*, auto) {});
  return out;
}

template <class Struct, class Statistics>
void write_counters(const Statistics& s, JsonWriter* out) {
  Struct unused = {};
  for_each_counter(s, &unused, [&](const char* name, auto value) { out->field(name, value); });
}

std::string request_json(const RequestStatistics& s) {
  JsonWriter out;
  out.open('{');
  write_counters<dsv3_request_statistics>(s, &out);
  out.close('}');
  return out.take();
}

std::string context_json(const EngineStatistics& s, const std::vector<uint64_t>& load,
                         int64_t experts) {
  JsonWriter out;
  out.open('{');
  write_counters<dsv3_context_statistics>(s, &out);
  out.open_field("expert_load", '[');
  for (size_t at = 0; experts > 0 && at < load.size(); at += static_cast<size_t>(experts)) {
    out.open('[');
    for (const uint64_t count : std::span(load).subspan(at, static_cast<size_t>(experts))) {
      out.value(count);
    }
    out.close(']');
  }
  out.close(']');
  out.close('}');
  return out.take();
}

}  // namespace

dsv3_request_statistics dsv3::api::translate(const RequestStatistics& s) {
  return struct_of<dsv3_request_statistics>(s);
}

extern "C" {

dsv3_status dsv3_context_get_statistics(const dsv3_context* context,
                                        dsv3_context_statistics* statistics, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(context, "context"));
    DSV3_TRY(check_out_struct(statistics, "dsv3_context_statistics"));
    DSV3_TRY(context->engine->check_process());
    fill_struct(statistics, struct_of<dsv3_context_statistics>(context->engine->statistics()));
    return {};
  });
}

dsv3_status dsv3_context_get_statistics_json(const dsv3_context* context, char** json,
                                             dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(context, "context"));
    DSV3_TRY(check_out(json, "json"));
    DSV3_TRY(context->engine->check_process());
    std::vector<uint64_t> load;
    const EngineStatistics statistics = context->engine->statistics(&load);
    *json = new_string(
        context_json(statistics, load, context->engine->model().config().n_routed_experts));
    return {};
  });
}

dsv3_status dsv3_context_get_expert_load(const dsv3_context* context, uint64_t* counts,
                                         uint64_t capacity, uint64_t* needed, uint64_t* experts,
                                         dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(context, "context"));
    DSV3_TRY(check_buffer(counts, capacity, needed));
    DSV3_TRY(context->engine->check_process());
    std::vector<uint64_t> load;
    context->engine->statistics(&load);
    if (needed != nullptr) *needed = load.size();
    if (experts != nullptr) {
      *experts = static_cast<uint64_t>(context->engine->model().config().n_routed_experts);
    }
    if (capacity == 0) return {};
    if (capacity < load.size()) return buffer_too_small(load.size(), capacity);
    std::copy(load.begin(), load.end(), counts);
    return {};
  });
}

dsv3_status dsv3_request_get_statistics(const dsv3_request* request, dsv3_request_statistics* out,
                                        dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(request, "request"));
    DSV3_TRY(check_out_struct(out, "dsv3_request_statistics"));
    DSV3_TRY(request->request->session().engine()->check_process());
    fill_struct(out, translate(request->request->statistics()));
    return {};
  });
}

dsv3_status dsv3_request_get_statistics_json(const dsv3_request* request, char** json,
                                             dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(request, "request"));
    DSV3_TRY(check_out(json, "json"));
    DSV3_TRY(request->request->session().engine()->check_process());
    *json = new_string(request_json(request->request->statistics()));
    return {};
  });
}

dsv3_status dsv3_context_trace_start(dsv3_context* context, const char* path, uint64_t max_bytes,
                                     dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(context, "context"));
    const std::shared_ptr<Engine> engine = context->engine;  // another thread may free the handle
    if (path == nullptr) return invalid("path", "path is NULL");
    return engine->start_trace(path, max_bytes);
  });
}

dsv3_status dsv3_context_trace_start_writer(dsv3_context* context, dsv3_write_fn write, void* user,
                                            uint64_t max_bytes, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(context, "context"));
    const std::shared_ptr<Engine> engine = context->engine;  // another thread may free the handle
    if (write == nullptr) return invalid("write", "write is NULL");
    return engine->start_trace(
        [write, user](const void* bytes, size_t size) -> Status {
          return call_function([&] { return write(user, bytes, size); }, "write");
        },
        max_bytes);
  });
}

dsv3_status dsv3_context_trace_stop(dsv3_context* context, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(context, "context"));
    const std::shared_ptr<Engine> engine = context->engine;  // another thread may free the handle
    return engine->stop_trace();
  });
}

}  // extern "C"
