#include <algorithm>
#include <limits>

#include "runtime/api/handles.h"

using namespace dsv3;       // NOLINT: the C boundary translates between the two
using namespace dsv3::api;  // NOLINT

bool dsv3_request::close() noexcept {
  if (request == nullptr) return true;
  if (request->session().engine()->forked()) return false;
  request->release();
  return true;
}

namespace {

constexpr dsv3_request_options kRequestDefaults = {.struct_size = sizeof(dsv3_request_options),
                                                   .priority = DSV3_PRIORITY_INTERACTIVE,
                                                   .max_tokens = 256,
                                                   .temperature = 0,
                                                   .top_p = 1,
                                                   .min_p = 0,
                                                   .top_k = 0,
                                                   .repetition_penalty = 1,
                                                   .presence_penalty = 0,
                                                   .frequency_penalty = 0,
                                                   .penalty_window = 256,
                                                   .seed = 0,
                                                   .logit_bias = nullptr,
                                                   .logit_bias_count = 0,
                                                   .logit_bias_stride = 0,
                                                   .stop_strings = nullptr,
                                                   .stop_tokens = nullptr,
                                                   .stop_string_count = 0,
                                                   .stop_token_count = 0,
                                                   .ignore_eos = 0,
                                                   .logprobs = -1,
                                                   .deadline_ms = 0,
                                                   .reasoning = -1,
                                                   .max_queued_events = 256,
                                                   .cancel = nullptr,
                                                   .logits_hook = nullptr,
                                                   .logits_hook_user = nullptr,
                                                   .notify = nullptr,
                                                   .notify_user = nullptr,
                                                   .speculation = DSV3_SPECULATION_AUTO,
                                                   .drafters = 0,
                                                   .max_draft_tokens = 0,
                                                   .reserved = 0,
                                                   .reference_tokens = nullptr,
                                                   .reference_token_count = 0,
                                                   .reference_text = nullptr,
                                                   .reference_text_length = 0};

constexpr uint32_t kMaxListed = 1 << 20;  // entries of logit_bias and stop_tokens

Status check_count(uint32_t count, const char* name) {
  if (count <= kMaxListed) return {};
  return invalid(name, format("%s is %u, expected at most %u", name, count, kMaxListed));
}

Status read_lists(const dsv3_request_options& o, RequestOptions* out) {
  DSV3_TRY(check_count(o.logit_bias_count, "logit_bias_count"));
  DSV3_TRY(check_array(o.logit_bias, o.logit_bias_count, o.logit_bias_stride,
                       sizeof(dsv3_logit_bias), alignof(dsv3_logit_bias), "logit_bias"));
  for (uint32_t i = 0; i < o.logit_bias_count; ++i) {
    const dsv3_logit_bias* b = element(o.logit_bias, o.logit_bias_stride, i);
    out->sampling.logit_bias.push_back({b->token, b->bias});
  }
  DSV3_TRY(check_array(o.stop_strings, o.stop_string_count, 0, 0, 1, "stop_strings"));
  if (o.stop_string_count > kMaxStopStrings) {
    return invalid("stop_string_count", format("stop_string_count is %u, expected at most %zu",
                                               o.stop_string_count, kMaxStopStrings));
  }
  for (uint32_t i = 0; i < o.stop_string_count; ++i) {
    if (o.stop_strings[i] == nullptr) {
      return invalid("stop_strings", format("stop_strings[%u] is NULL", i));
    }
    out->stop_strings.emplace_back(o.stop_strings[i]);
  }
  DSV3_TRY(check_count(o.stop_token_count, "stop_token_count"));
  DSV3_TRY(check_array(o.stop_tokens, o.stop_token_count, 0, 0, 1, "stop_tokens"));
  if (o.stop_token_count > 0) {
    out->stop_tokens.assign(o.stop_tokens, o.stop_tokens + o.stop_token_count);
  }
  return {};
}

Status read_speculation(const dsv3_request_options& o, RequestOptions* out) {
  if (o.speculation < DSV3_SPECULATION_AUTO || o.speculation > DSV3_SPECULATION_ALWAYS) {
    return invalid("speculation", format("speculation is %d, expected DSV3_SPECULATION_AUTO (0) to "
                                         "DSV3_SPECULATION_ALWAYS (2)",
                                         o.speculation));
  }
  constexpr uint32_t kAll = DSV3_DRAFT_LOOKUP | DSV3_DRAFT_REFERENCE | DSV3_DRAFT_MTP;
  if ((o.drafters & ~kAll) != 0) {
    return Status(
        Code::kUnsupported,
        format("drafters is 0x%x, expected DSV3_DRAFT_... flags (0x%x)", o.drafters, kAll),
        "drafters");
  }
  DSV3_TRY(check_reserved(o, "dsv3_request_options"));
  const uint32_t drafters = o.drafters == 0 ? kAll : o.drafters;
  SpeculationOptions& s = out->speculation;
  s.mode = static_cast<SpeculationMode>(o.speculation);
  s.lookup = (drafters & DSV3_DRAFT_LOOKUP) != 0;
  s.mtp = (drafters & DSV3_DRAFT_MTP) != 0;
  s.require_mtp = (o.drafters & DSV3_DRAFT_MTP) != 0;
  s.max_draft = o.max_draft_tokens;
  if (o.reference_token_count > INT32_MAX) {
    return invalid("reference_token_count",
                   format("reference_token_count is %llu, expected at most %d",
                          static_cast<unsigned long long>(o.reference_token_count), INT32_MAX));
  }
  DSV3_TRY(read_tokens_argument(o.reference_tokens, o.reference_token_count, "reference_tokens"));
  std::string_view text;
  DSV3_TRY(read_text(o.reference_text, o.reference_text_length, "reference_text", &text));
  if (o.reference_tokens != nullptr && o.reference_text != nullptr) {
    return invalid("reference_text", "reference_text and reference_tokens are both given");
  }
  if ((drafters & DSV3_DRAFT_REFERENCE) == 0) return {};
  if (o.reference_token_count > 0) {
    s.reference.assign(o.reference_tokens, o.reference_tokens + o.reference_token_count);
  }
  out->reference_text = text;
  return {};
}

int64_t deadline_of_timeout(uint64_t timeout_ms) {
  if (timeout_ms == 0) return 0;  // not at all
  if (timeout_ms == DSV3_WAIT_FOREVER) return std::numeric_limits<int64_t>::max();
  return deadline_after(timeout_ms, monotonic_ns());
}

// The event as C sees it, pointing into the handle.
dsv3_event translate_event(dsv3_request* r) {
  const Event& e = r->event;
  dsv3_event out = {};
  out.kind = static_cast<int32_t>(e.kind);
  out.text = "";
  out.stop_string = "";
  out.error_message = "";
  out.error_field = "";
  out.stop_token = -1;
  out.token_stride = sizeof(dsv3_token);
  switch (e.kind) {
    case EventKind::kProgress:
      out.prompt_done = e.prompt_done;
      out.prompt_total = e.prompt_total;
      break;
    case EventKind::kText:
    case EventKind::kReasoning:
      out.text = e.text.c_str();
      out.text_length = e.text.size();
      r->top.clear();
      for (const TopToken& t : e.top) r->top.push_back({t.id, t.logprob});
      r->tokens.clear();
      for (const EventToken& t : e.tokens) {
        r->tokens.push_back({t.id, t.logprob, r->top.data() + t.top_begin, t.top_count, 0});
      }
      out.tokens = r->tokens.data();
      out.token_count = r->tokens.size();
      break;
    case EventKind::kFinished:
      out.finish_reason = static_cast<int32_t>(e.reason);
      out.status = static_cast<dsv3_status>(e.status.code());
      out.stop_token = e.stop_token;
      out.stop_string = e.stop_string.c_str();
      if (e.reason == FinishReason::kError) {
        out.error_message = e.status.message().c_str();
        out.error_field = e.status.field().c_str();
        out.error_retryable = e.status.retryable() ? 1 : 0;
      }
      r->statistics = translate(e.statistics);
      r->statistics.struct_size = sizeof(dsv3_request_statistics);
      out.statistics = &r->statistics;
      break;
  }
  return out;
}

}  // namespace

namespace dsv3::api {

Status read_request_options(const dsv3_request_options* options, RequestOptions* out) {
  dsv3_request_options o = kRequestDefaults;
  if (options != nullptr) DSV3_TRY(read_struct(options, "dsv3_request_options", &o));
  if (o.priority < DSV3_PRIORITY_INTERACTIVE || o.priority > DSV3_PRIORITY_IDLE) {
    return invalid("priority", format("priority is %d, expected DSV3_PRIORITY_INTERACTIVE (0) to "
                                      "DSV3_PRIORITY_IDLE (2)",
                                      o.priority));
  }
  DSV3_TRY(check_flag_value(o.ignore_eos, "ignore_eos"));
  out->priority = static_cast<Priority>(o.priority);
  out->max_tokens = o.max_tokens;
  SamplingOptions& s = out->sampling;
  s.temperature = o.temperature;
  s.top_p = o.top_p;
  s.min_p = o.min_p;
  s.top_k = o.top_k;
  s.repetition_penalty = o.repetition_penalty;
  s.presence_penalty = o.presence_penalty;
  s.frequency_penalty = o.frequency_penalty;
  s.penalty_window = o.penalty_window;
  s.seed = o.seed;
  s.logprobs = o.logprobs;
  DSV3_TRY(read_lists(o, out));
  DSV3_TRY(read_speculation(o, out));
  out->ignore_eos = o.ignore_eos == 1;
  out->deadline_ms = o.deadline_ms;
  out->reasoning = o.reasoning;
  out->max_queued_events = o.max_queued_events;
  DSV3_TRY(read_cancel(o.cancel, &out->cancel));
  out->logits_hook = o.logits_hook;
  out->logits_hook_user = o.logits_hook_user;
  out->notify = o.notify;
  out->notify_user = o.notify_user;
  return {};
}

}  // namespace dsv3::api

extern "C" {

void dsv3_request_options_init(dsv3_request_options* options, uint32_t struct_size) {
  init_struct(options, struct_size, kRequestDefaults);
}

dsv3_status dsv3_request_start(dsv3_session* session, const dsv3_request_options* options,
                               dsv3_request** out, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(session, "session"));
    DSV3_TRY(check_out(out, "out"));
    RequestOptions o;
    DSV3_TRY(read_request_options(options, &o));
    DSV3_TRY(session->session->engine()->check_process());
    auto handle = std::make_unique<dsv3_request>();
    const auto top = static_cast<size_t>(std::max(o.sampling.logprobs, 0));
    handle->event.reserve(top);
    handle->tokens.reserve(1);
    handle->top.reserve(top);
    DSV3_ASSIGN(handle->request, Request::start(session->session, std::move(o)));
    *out = handle.release();
    return {};
  });
}

dsv3_status dsv3_request_next(dsv3_request* request, uint64_t timeout_ms, dsv3_event* event,
                              dsv3_error** error) {
  bool timed_out = false;
  const dsv3_status status = guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(request, "request"));
    DSV3_TRY(check_out_struct(event, "dsv3_event"));
    DSV3_TRY(request->request->session().engine()->check_process());
    switch (request->request->next(deadline_of_timeout(timeout_ms), &request->event)) {
      case EventQueue::Outcome::kEvent:
        fill_struct(event, translate_event(request));
        return {};
      case EventQueue::Outcome::kTimeout:
        timed_out = true;
        return {};
      case EventQueue::Outcome::kEnd:
        break;
    }
    return Status(Code::kNotFound, "the request is finished: there are no more events", "request");
  });
  return timed_out ? report_timeout(error) : status;
}

intptr_t dsv3_request_wait_descriptor(const dsv3_request* request) {
  if (!is_live(request)) return -1;
  if (request->request->session().engine()->forked()) return -1;
  try {
    return request->request->descriptor();
  } catch (...) {
    return -1;
  }
}

void dsv3_request_cancel(const dsv3_request* request) {
  if (!is_live(request)) return;
  if (request->request->session().engine()->forked()) return;
  request->request->cancel_now();
}

void dsv3_request_free(dsv3_request* request) { free_handle(request, dsv3_request::kMagic); }

}  // extern "C"
