#include "runtime/engine/request.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "runtime/engine/engine.h"
#include "runtime/text/utf8.h"

namespace dsv3 {

Status RequestOptions::validate(const Model& model) const {
  const int64_t vocab = model.config().vocab_size;
  DSV3_TRY(sampling.validate(vocab));
  if (max_tokens > INT32_MAX) {
    return make_field_error(Code::kInvalidArgument, "max_tokens",
                            "max_tokens is %llu, expected 0 to %d",
                            static_cast<unsigned long long>(max_tokens), INT32_MAX);
  }
  if (stop_strings.size() > kMaxStopStrings) {
    return make_field_error(Code::kInvalidArgument, "stop_string_count",
                            "stop_string_count is %zu, expected at most %zu", stop_strings.size(),
                            kMaxStopStrings);
  }
  for (size_t i = 0; i < stop_strings.size(); ++i) {
    if (stop_strings[i].empty() || stop_strings[i].size() > kMaxStopStringBytes) {
      return make_field_error(Code::kInvalidArgument, "stop_strings",
                              "stop_strings[%zu] has %zu bytes, expected 1 to %zu", i,
                              stop_strings[i].size(), kMaxStopStringBytes);
    }
    if (!is_valid_utf8(stop_strings[i])) {
      return make_field_error(Code::kInvalidArgument, "stop_strings",
                              "stop_strings[%zu] is not valid UTF-8: no text could contain it", i);
    }
  }
  if (!stop_strings.empty() && !model.has_tokenizer()) {
    return make_field_error(Code::kUnsupported, "stop_strings",
                            "%s has no tokenizer: stop_strings cannot be used",
                            model.path().c_str());
  }
  for (const int32_t t : stop_tokens) {
    if (t < 0 || t >= vocab) {
      return make_field_error(Code::kInvalidArgument, "stop_tokens",
                              "stop_tokens names token %d, expected 0 to %lld", t,
                              static_cast<long long>(vocab - 1));
    }
  }
  if (speculation.max_draft < 0 || speculation.max_draft > kMaxDraft) {
    return make_field_error(Code::kInvalidArgument, "max_draft_tokens",
                            "max_draft_tokens is %d, expected 0 (as many as pay) to %d",
                            speculation.max_draft, kMaxDraft);
  }
  for (const int32_t t : speculation.reference) {
    if (t < 0 || t >= vocab) {
      return make_field_error(Code::kInvalidArgument, "reference_tokens",
                              "reference_tokens names token %d, expected 0 to %lld", t,
                              static_cast<long long>(vocab - 1));
    }
  }
  if (speculation.require_mtp && model.config().num_nextn_predict_layers == 0) {
    return make_field_error(Code::kUnsupported, "drafters",
                            "drafters names DSV3_DRAFT_MTP and %s has no MTP module",
                            model.path().c_str());
  }
  if (!reference_text.empty() && !model.has_tokenizer()) {
    return make_field_error(Code::kUnsupported, "reference_text",
                            "%s has no tokenizer: reference_text cannot be used",
                            model.path().c_str());
  }
  if (reasoning < -1 || reasoning > 1) {
    return make_field_error(Code::kInvalidArgument, "reasoning",
                            "reasoning is %d, expected -1, 0 or 1", reasoning);
  }
  if (max_queued_events == 0) {
    return make_field_error(Code::kInvalidArgument, "max_queued_events",
                            "max_queued_events is 0, expected at least 1");
  }
  return {};
}

int64_t deadline_after(uint64_t ms, int64_t start_ns) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  if (ms == 0) return kNone;
  const auto left = static_cast<uint64_t>(kNone - start_ns);
  return ms > left / 1'000'000 ? kNone : start_ns + static_cast<int64_t>(ms * 1'000'000);
}

namespace {

uint64_t elapsed(int64_t from, int64_t to) {
  return to > from ? static_cast<uint64_t>(to - from) : 0;
}

}  // namespace

Request::Request(const std::shared_ptr<Session>& s, RequestOptions options, int64_t start_ns,
                 int64_t deadline_ns)
    : Task(s, options.priority, options.cancel, deadline_ns),
      options_(std::move(options)),
      stop_tokens_(options_.stop_tokens),
      max_length_(s->engine()->model().config().max_position_embeddings),
      start_ns_(start_ns),
      speculator_(options_.speculation,
                  std::min(max_length_, static_cast<int64_t>(s->length() + options_.max_tokens)),
                  s->engine()->model().config().num_nextn_predict_layers > 0),
      queue_(options_.max_queued_events,
             static_cast<size_t>(std::max(options_.sampling.logprobs, 0))) {
  const Model& model = s->engine()->model();
  if (!options_.ignore_eos) {
    const auto& eos = model.config().eos_token_ids;
    stop_tokens_.insert(stop_tokens_.end(), eos.begin(), eos.end());
    if (model.has_tokenizer() && model.tokenizer().eos_id()) {
      stop_tokens_.push_back(*model.tokenizer().eos_id());
    }
  }
  std::sort(stop_tokens_.begin(), stop_tokens_.end());
  if (model.has_tokenizer()) {
    const bool reasoning = options_.reasoning < 0 ? s->reasoning() : options_.reasoning == 1;
    decoder_.emplace(&model.tokenizer(), options_.stop_strings, reasoning);
  }
  // What every token needs, so that decoding does not allocate.
  sampled_.top.reserve(static_cast<size_t>(std::max(options_.sampling.logprobs, 0)));
  segments_.reserve(4, kTokenTextBytes);
  scratch_.reserve(sampled_.top.capacity());
}

Result<std::shared_ptr<Request>> Request::start(const std::shared_ptr<Session>& session,
                                                RequestOptions options, int64_t deadline_ns) {
  const std::shared_ptr<Engine> engine = session->engine();
  DSV3_TRY(options.validate(engine->model()));
  if (!options.reference_text.empty()) {
    std::vector<int32_t>& reference = options.speculation.reference;
    DSV3_TRY(engine->model().tokenizer().encode(options.reference_text, {}, &reference));
    options.reference_text.clear();
  }
  const int64_t now = monotonic_ns();
  const int64_t deadline = deadline_ns > 0 ? deadline_ns : deadline_after(options.deadline_ms, now);
  auto request = std::make_shared<Request>(session, std::move(options), now, deadline);
  const auto prepare = [&](Session::State& s) -> Status {
    const auto length = static_cast<int64_t>(s.tokens.size());
    if (length == 0) {
      return Status(Code::kInvalidArgument,
                    "the session is empty: append a prompt before starting a request", "session");
    }
    if (Status fits = engine->check_fits(length); !fits.ok()) return fits;
    const auto most = static_cast<int64_t>(request->options_.max_tokens);
    s.tokens.reserve(static_cast<size_t>(std::min(request->max_length_, length + most)));
    // The last token's hidden state is not kept: it is computed again when everything was cached.
    s.computed = std::min(s.computed, length - 1);
    request->speculator_.begin(static_cast<size_t>(length));
    request->statistics_.prompt_tokens = static_cast<uint64_t>(length);
    request->statistics_.cached_tokens = static_cast<uint64_t>(s.computed);
    return {};
  };
  DSV3_TRY(engine->submit(request, prepare));
  return request;
}

EventQueue::Outcome Request::next(int64_t deadline_ns, Event* event) {
  bool made_room = false;
  const EventQueue::Outcome outcome = queue_.next(deadline_ns, event, &made_room);
  if (made_room) session().engine()->wake_for(priority());
  return outcome;
}

RequestStatistics Request::statistics() const {
  const std::lock_guard lock(statistics_mutex_);
  RequestStatistics s = statistics_;
  if (s.total_ns == 0) s.total_ns = elapsed(start_ns_, monotonic_ns());  // still running
  if (!began_) s.queue_ns = s.total_ns;                                  // still waiting
  return s;
}

void Request::cancel_now() noexcept {
  cancel();
  session().engine()->wake_to_end();
}

void Request::release() noexcept {
  {
    // Under the mutex that append() holds: once this returns, the session's length stays.
    const std::lock_guard lock(session().engine()->mutex());
    abandon();
  }
  {
    const std::lock_guard lock(callback_mutex_);
    detached_ = true;
  }
  session().engine()->wake_to_end();
}

// --- The engine's thread from here on.

bool Request::is_stop_token(int32_t id) const {
  return std::binary_search(stop_tokens_.begin(), stop_tokens_.end(), id);
}

int64_t Request::first_logits() const {
  const auto length = static_cast<int64_t>(session().state().tokens.size());
  const bool generates = options_.max_tokens > 0 && length < max_length_;
  return generates ? length - 1 : std::numeric_limits<int64_t>::max();
}

// The last token's hidden state is in no cache.
int64_t Request::reusable() const {
  return static_cast<int64_t>(session().state().tokens.size()) - 1;
}

void Request::found_cached(int64_t tokens) {
  if (prompt_done_ || preemptions > 0) return;  // what was computed already and is found again
  const std::lock_guard lock(statistics_mutex_);
  statistics_.cached_tokens += static_cast<uint64_t>(tokens);
}

bool Request::account(RequestStatistics* out) {
  const std::lock_guard lock(statistics_mutex_);
  statistics_.total_ns = std::max<uint64_t>(1, elapsed(start_ns_, monotonic_ns()));
  if (!began_) statistics_.queue_ns = statistics_.total_ns;
  statistics_.pages = most_pages;
  statistics_.preemptions = preemptions;
  *out = statistics_;
  return true;
}

void Request::started(int64_t now_ns) {
  if (service_ns_ != 0) return;
  service_ns_ = now_ns;
  const std::lock_guard lock(statistics_mutex_);
  began_ = true;
  statistics_.queue_ns = elapsed(start_ns_, now_ns);
}

Status Request::run_hook(void* self, std::span<float> logits, std::span<const int32_t> tokens) {
  auto* r = static_cast<Request*>(self);
  const int64_t begin = monotonic_ns();
  const CallbackScope scope;  // outlives the lock: deferred frees may need it
  const std::lock_guard lock(r->callback_mutex_);
  if (r->detached_) return Status(Code::kCancelled, "the request was freed");
  try {
    r->options_.logits_hook(r->options_.logits_hook_user, logits.data(), logits.size(),
                            tokens.data(), tokens.size());
  } catch (...) {
    return make_field_error(Code::kInvalidArgument, "logits_hook",
                            "logits_hook threw an exception");
  }
  r->hook_ns_ += monotonic_ns() - begin;
  return {};
}

// Samples what follows the row at `position`, the last of the session's tokens.
Status Request::sample(const StepRun& run, int64_t position) {
  kernels::RowStats row;
  DSV3_TRY(run.row(position, &row));
  if (options_.logits_hook == nullptr && options_.sampling.takes_best()) {
    sampled_.id = row.argmax;
    return {};
  }
  std::span<float> logits;
  DSV3_TRY(run.logits(position, &logits));
  LogitsHook hook;
  if (options_.logits_hook != nullptr) hook = {run_hook, this};
  Status status = run.sampler->sample(options_.sampling, session().state().tokens, logits, row,
                                      hook, &sampled_);
  run.experience->committed.hook_ns += std::exchange(hook_ns_, 0);
  return status;
}

Status Request::append(int32_t token) {
  {
    const std::lock_guard lock(session().engine()->mutex());
    // Its owner may have read the session's length since: a step that was too far to be stopped
    // adds nothing any more.
    if (abandoned()) return Status(Code::kCancelled, "the request was freed");
    session().state().tokens.push_back(token);
    session().publish();
  }
  const int64_t now = monotonic_ns();
  const std::lock_guard lock(statistics_mutex_);
  if (statistics_.generated_tokens++ == 0) {
    statistics_.first_token_ns = elapsed(start_ns_, now);
    last_token_ns_ = now;
  }
  statistics_.decode_ns += elapsed(last_token_ns_, now);
  last_token_ns_ = now;
  return {};
}

// A token after each row, as long as the next row stood for the very token that was sampled.
Status Request::generate(const StepRun& run, Finish* finish) {
  for (int64_t at = run.draft_begin - 1;; ++at) {
    DSV3_TRY(sample(run, at));
    DSV3_TRY(append(sampled_.id));
    const bool stop = is_stop_token(sampled_.id);
    const bool matched = emit_token(stop);
    if (stop) {
      finish->reason = FinishReason::kStopToken;
      stop_token_ = sampled_.id;
    } else if (matched) {
      finish->reason = FinishReason::kStopString;
      matched_stop_ = decoder_->matched_stop();
    } else if (statistics_.generated_tokens >= options_.max_tokens) {
      finish->reason = FinishReason::kMaxTokens;
    } else if (at + 2 >= max_length_) {
      finish->reason = FinishReason::kContextLength;
    }
    if (finish->reason != FinishReason::kNone || at + 1 == run.end ||
        run.token(at + 1) != sampled_.id) {
      return {};
    }
  }
}

// What the step says about its draft, and the next one.
void Request::speculate(const StepRun& run, int64_t fresh) {
  const std::vector<int32_t>& tokens = session().state().tokens;
  const int64_t drafted = run.end - run.draft_begin;
  if (run.begin + 1 == run.draft_begin) {  // a step of decoding, not the prompt's last
    speculator_.learn(run.experience, tokens, static_cast<int32_t>(fresh),
                      static_cast<int32_t>(drafted), run.others());
  }
  const auto length = static_cast<int64_t>(tokens.size());
  const auto left = static_cast<int64_t>(options_.max_tokens - statistics_.generated_tokens);
  // No token without a place for its event; the one after the draft's comes with it.
  const auto room = options_.collect ? left : static_cast<int64_t>(queue_.room());
  speculator_.propose(run.experience, tokens, run.others(),
                      std::min({left - 1, room - 1, max_length_ - length - 1}));
  const std::lock_guard lock(statistics_mutex_);
  ++statistics_.decode_steps;
  statistics_.drafted_tokens += static_cast<uint64_t>(drafted);
  statistics_.accepted_tokens += static_cast<uint64_t>(fresh - 1);
  statistics_.speculation_saved_ns = static_cast<int64_t>(speculator_.saved_ns());
}

Status Request::commit(const StepRun& run, Finish* finish) {
  pushed_ = false;
  const auto prompt = static_cast<int64_t>(statistics_.prompt_tokens);
  if (!prompt_done_) {
    // Never back: one that gave up its pages computes them again.
    progress_ = std::max(progress_, std::min(run.end, prompt));
    emit_progress(progress_);
    prompt_done_ = run.end >= prompt;
    const std::lock_guard lock(statistics_mutex_);
    statistics_.prefill_ns = elapsed(service_ns_, monotonic_ns());
  }
  // A request that gave up its pages computes its own answer again before it goes on.
  if (prompt_done_ && run.end >= run.draft_begin) {
    if (options_.max_tokens == 0) {
      finish->reason = FinishReason::kMaxTokens;
    } else if (run.draft_begin >= max_length_) {
      finish->reason = FinishReason::kContextLength;
    } else {
      const uint64_t before = statistics_.generated_tokens;
      DSV3_TRY(generate(run, finish));
      speculate(run, static_cast<int64_t>(statistics_.generated_tokens - before));
    }
  }
  // The final event brings its own call.
  if (pushed_ && finish->reason == FinishReason::kNone) notify();
  return {};
}

void Request::emit_progress(int64_t done) {
  scratch_.clear(EventKind::kProgress);
  scratch_.prompt_done = static_cast<uint64_t>(done);
  scratch_.prompt_total = statistics_.prompt_tokens;
  push(scratch_);
}

bool Request::emit_token(bool is_stop_token) {
  segments_.clear();
  bool matched = false;
  if (decoder_) {
    // A stop token's own text is not part of the answer.
    if (is_stop_token) {
      decoder_->finish(&segments_);
    } else {
      matched = decoder_->push(sampled_.id, &segments_);
    }
    flushed_ = is_stop_token || matched;
  }
  emit_segments(/*with_token=*/true);
  return matched;
}

// The token belongs to the first event; a token that produced no text has an event of its own.
void Request::emit_segments(bool with_token) {
  size_t i = 0;
  do {
    const bool has_text = i < segments_.size();
    const bool reasoning = has_text ? segments_[i].kind == SegmentKind::kReasoning
                                    : decoder_ && decoder_->in_reasoning();
    if (!has_text && !with_token) return;
    scratch_.clear(reasoning ? EventKind::kReasoning : EventKind::kText);
    if (has_text) scratch_.text.assign(segments_[i].text);
    if (with_token) {
      scratch_.tokens.push_back(
          {sampled_.id, sampled_.logprob, 0, static_cast<uint32_t>(sampled_.top.size())});
      scratch_.top.assign(sampled_.top.begin(), sampled_.top.end());
      with_token = false;
    }
    push(scratch_);
  } while (++i < segments_.size());
}

void Request::push(const Event& event) {
  if (options_.collect) {
    if (event.kind == EventKind::kText) collected_ += event.text;
    return;
  }
  queue_.push(event);
  pushed_ = true;
}

void Request::notify() noexcept {
  if (options_.notify == nullptr) return;
  const CallbackScope scope;
  const std::lock_guard lock(callback_mutex_);
  if (detached_) return;
  try {
    options_.notify(options_.notify_user);
  } catch (...) {
    session().engine()->log(LogLevel::kError, "a notify callback threw an exception: ignored");
  }
}

void Request::finished(Finish* finish) noexcept {
  try {
    if (decoder_ && !std::exchange(flushed_, true)) {
      segments_.clear();
      decoder_->finish(&segments_);
      emit_segments(/*with_token=*/false);
    }
  } catch (...) {
    finish->reason = FinishReason::kError;
    finish->status = session().engine()->out_of_memory();
  }
  final_.statistics = statistics();
  final_.kind = EventKind::kFinished;
  final_.reason = finish->reason;
  final_.status = finish->status;
  final_.stop_token = stop_token_;
  final_.stop_string.swap(matched_stop_);
  // Who waits for a collected answer returns when the final event is there: its call comes before.
  if (options_.collect) notify();
  queue_.finish(&final_);
  if (!options_.collect) notify();
}

}  // namespace dsv3
