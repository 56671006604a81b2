// Every function of dsv3.h with NULL and values out of range: an error that names the field, and
// nothing written.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <functional>

#include "tests/api/arguments_support.h"

using namespace dsv3::test;             // NOLINT
using namespace dsv3::test::arguments;  // NOLINT

TEST_CASE("version and status names") {
  CHECK(dsv3_version() == 100);
  CHECK(std::string(dsv3_version_string()) == "0.1.0");
  CHECK(std::string(dsv3_status_name(DSV3_E_CORRUPT)) == "DSV3_E_CORRUPT");
  for (int32_t i = 0; i <= DSV3_E_FORKED; ++i) {
    CHECK(std::string(dsv3_status_name(i)).rfind(i == 0 ? "DSV3_OK" : "DSV3_E_", 0) == 0);
  }
  for (const int32_t other : {-1, 17, 1000, INT32_MIN}) {
    CHECK(std::string(dsv3_status_name(other)) == "unknown");
  }
}

TEST_CASE("NULL is accepted where the header says so") {
  CHECK(dsv3_error_status(nullptr) == DSV3_OK);
  CHECK(std::string(dsv3_error_message(nullptr)).empty());
  CHECK(std::string(dsv3_error_field(nullptr)).empty());
  CHECK(dsv3_error_retryable(nullptr) == 0);
  dsv3_error_free(nullptr);
  dsv3_string_free(nullptr);
  dsv3_cancel_set(nullptr);
  CHECK(dsv3_cancel_is_set(nullptr) == 0);
  dsv3_cancel_free(nullptr);
  dsv3_model_free(nullptr);
  dsv3_context_free(nullptr);
  dsv3_session_free(nullptr);
  dsv3_request_free(nullptr);
  dsv3_request_cancel(nullptr);
  CHECK(dsv3_request_wait_descriptor(nullptr) == -1);
  CHECK(dsv3_session_length(nullptr) == 0);
  CHECK(dsv3_session_computed(nullptr) == 0);
}

TEST_CASE("on success the error is set to NULL, on failure without one nothing breaks") {
  auto* garbage = reinterpret_cast<dsv3_error*>(static_cast<uintptr_t>(0x10));
  dsv3_error* error = garbage;
  dsv3_cancel* cancel = nullptr;
  CHECK(dsv3_cancel_create(&cancel, &error) == DSV3_OK);
  CHECK(error == nullptr);
  dsv3_cancel_free(cancel);
  CHECK(dsv3_cancel_create(nullptr, nullptr) == DSV3_E_INVALID_ARGUMENT);
}

TEST_CASE("NULL where something is required") {
  Fixture& f = shared();
  Error e;
  dsv3_model* model = nullptr;
  dsv3_context* context = nullptr;
  dsv3_session* session = nullptr;
  dsv3_request* request = nullptr;
  dsv3_model_info model_info = {};
  model_info.struct_size = sizeof model_info;
  dsv3_context_info context_info = {};
  context_info.struct_size = sizeof context_info;
  dsv3_memory_estimate estimate = {};
  estimate.struct_size = sizeof estimate;
  dsv3_event event = {};
  event.struct_size = sizeof event;
  dsv3_request_statistics statistics = {};
  statistics.struct_size = sizeof statistics;
  uint64_t needed = 0;
  int32_t id = 0;
  char* text = nullptr;
  const auto invalid = [&](dsv3_status status, const char* field) {
    CAPTURE(field);
    expect_invalid(status, e, field);
  };
  invalid(dsv3_cancel_create(nullptr, e.out()), "out");
  invalid(dsv3_model_open(nullptr, nullptr, &model, e.out()), "path");
  invalid(dsv3_model_open("x", nullptr, nullptr, e.out()), "out");
  invalid(dsv3_model_get_info(nullptr, &model_info, e.out()), "model");
  expect(dsv3_model_get_info(f.model.get(), nullptr, e.out()), e, DSV3_E_INVALID_ARGUMENT,
         "dsv3_model_info");
  invalid(dsv3_model_get_json(nullptr, nullptr, 0, &needed, e.out()), "model");
  invalid(dsv3_model_get_json(f.model.get(), nullptr, 10, &needed, e.out()), "buffer");
  invalid(dsv3_model_get_json(f.model.get(), nullptr, 0, nullptr, e.out()), "needed");
  invalid(dsv3_model_verify(nullptr, nullptr, nullptr, nullptr, e.out()), "model");
  invalid(dsv3_model_tokenize(nullptr, "a", 1, 0, &id, 1, &needed, e.out()), "model");
  invalid(dsv3_model_tokenize(f.model.get(), nullptr, 1, 0, &id, 1, &needed, e.out()), "text");
  invalid(
      dsv3_model_tokenize(f.model.get(), nullptr, DSV3_NUL_TERMINATED, 0, &id, 1, &needed, e.out()),
      "text");
  invalid(dsv3_model_tokenize(f.model.get(), "a", 1, 0, nullptr, 1, &needed, e.out()), "buffer");
  invalid(dsv3_model_tokenize(f.model.get(), "a", 1, 0, nullptr, 0, nullptr, e.out()), "needed");
  invalid(dsv3_model_detokenize(nullptr, &id, 1, 0, nullptr, 0, &needed, e.out()), "model");
  invalid(dsv3_model_detokenize(f.model.get(), nullptr, 1, 0, nullptr, 0, &needed, e.out()),
          "tokens");
  invalid(dsv3_model_token_id(nullptr, "a", 1, &id, e.out()), "model");
  invalid(dsv3_model_token_id(f.model.get(), nullptr, 1, &id, e.out()), "text");
  invalid(dsv3_model_token_id(f.model.get(), "a", 1, nullptr, e.out()), "id");
  invalid(dsv3_model_render_chat(nullptr, nullptr, nullptr, 0, &needed, e.out()), "model");
  invalid(dsv3_model_render_chat(f.model.get(), nullptr, nullptr, 0, &needed, e.out()),
          "dsv3_chat");
  invalid(dsv3_context_create(nullptr, nullptr, &context, e.out()), "model");
  invalid(dsv3_context_create(f.model.get(), nullptr, nullptr, e.out()), "out");
  invalid(dsv3_context_get_info(nullptr, &context_info, e.out()), "context");
  invalid(dsv3_context_get_info(f.context.get(), nullptr, e.out()), "dsv3_context_info");
  invalid(dsv3_context_get_expert_load(nullptr, &needed, 1, &needed, nullptr, e.out()), "context");
  invalid(dsv3_context_get_expert_load(f.context.get(), nullptr, 1, &needed, nullptr, e.out()),
          "buffer");
  invalid(dsv3_context_get_expert_load(f.context.get(), nullptr, 0, nullptr, nullptr, e.out()),
          "needed");
  invalid(dsv3_context_trace_start(nullptr, "x", 1000, e.out()), "context");
  invalid(dsv3_context_trace_start(f.context.get(), nullptr, 1000, e.out()), "path");
  const dsv3_write_fn write = [](void*, const void*, uint64_t) { return DSV3_OK; };
  invalid(dsv3_context_trace_start_writer(nullptr, write, nullptr, 1000, e.out()), "context");
  invalid(dsv3_context_trace_start_writer(f.context.get(), nullptr, nullptr, 1000, e.out()),
          "write");
  invalid(dsv3_context_trace_stop(nullptr, e.out()), "context");
  invalid(dsv3_estimate_memory(nullptr, nullptr, &estimate, e.out()), "model_path");
  invalid(dsv3_estimate_memory("x", nullptr, nullptr, e.out()), "dsv3_memory_estimate");
  invalid(dsv3_session_create(nullptr, &session, e.out()), "context");
  invalid(dsv3_session_create(f.context.get(), nullptr, e.out()), "out");
  invalid(dsv3_session_append_tokens(nullptr, &id, 1, 0, nullptr, nullptr, e.out()), "session");
  invalid(dsv3_session_append_tokens(f.session.get(), nullptr, 1, 0, nullptr, nullptr, e.out()),
          "tokens");
  invalid(dsv3_session_append_text(nullptr, "a", 1, 0, nullptr, nullptr, e.out()), "session");
  invalid(dsv3_session_append_text(f.session.get(), nullptr, 1, 0, nullptr, nullptr, e.out()),
          "text");
  invalid(dsv3_session_append_fim(nullptr, "a", 1, "b", 1, 0, nullptr, nullptr, e.out()),
          "session");
  invalid(
      dsv3_session_append_fim(f.session.get(), nullptr, 1, "b", 1, 0, nullptr, nullptr, e.out()),
      "prefix");
  invalid(
      dsv3_session_append_fim(f.session.get(), "a", 1, nullptr, 1, 0, nullptr, nullptr, e.out()),
      "suffix");
  invalid(dsv3_session_append_chat(nullptr, nullptr, 0, nullptr, nullptr, e.out()), "session");
  invalid(dsv3_session_append_chat(f.session.get(), nullptr, 0, nullptr, nullptr, e.out()),
          "dsv3_chat");
  invalid(dsv3_session_truncate(nullptr, 0, e.out()), "session");
  invalid(dsv3_session_fork(nullptr, &session, e.out()), "session");
  invalid(dsv3_session_fork(f.session.get(), nullptr, e.out()), "out");
  invalid(dsv3_session_get_tokens(nullptr, 0, &id, 1, &needed, e.out()), "session");
  invalid(dsv3_session_get_tokens(f.session.get(), 0, nullptr, 1, &needed, e.out()), "buffer");
  invalid(dsv3_session_evaluate(nullptr, &id, 1, nullptr, e.out()), "session");
  invalid(dsv3_session_evaluate(f.session.get(), nullptr, 1, nullptr, e.out()), "tokens");
  invalid(dsv3_session_evaluate(f.session.get(), &id, 0, nullptr, e.out()), "count");
  invalid(dsv3_request_start(nullptr, nullptr, &request, e.out()), "session");
  invalid(dsv3_request_start(f.session.get(), nullptr, nullptr, e.out()), "out");
  invalid(dsv3_request_next(nullptr, 0, &event, e.out()), "request");
  invalid(dsv3_request_next(f.request.get(), 0, nullptr, e.out()), "dsv3_event");
  invalid(dsv3_request_get_statistics(nullptr, &statistics, e.out()), "request");
  invalid(dsv3_request_get_statistics(f.request.get(), nullptr, e.out()),
          "dsv3_request_statistics");
  invalid(dsv3_request_get_statistics_json(nullptr, &text, e.out()), "request");
  invalid(dsv3_request_get_statistics_json(f.request.get(), nullptr, e.out()), "json");
  invalid(dsv3_complete(nullptr, "a", 1, nullptr, 0, nullptr, &text, nullptr, e.out()), "context");
  invalid(dsv3_complete(f.context.get(), nullptr, 1, nullptr, 0, nullptr, &text, nullptr, e.out()),
          "prefix");
  invalid(dsv3_complete(f.context.get(), "a", 1, nullptr, 0, nullptr, nullptr, nullptr, e.out()),
          "text");
  invalid(dsv3_convert(nullptr, "x", nullptr, e.out()), "checkpoint_dir");
  invalid(dsv3_convert("x", nullptr, nullptr, e.out()), "output_path");
  CHECK(model == nullptr);
  CHECK(context == nullptr);
  CHECK(session == nullptr);
  CHECK(request == nullptr);
  CHECK(text == nullptr);
}

TEST_CASE("values out of range name their field") {
  Fixture& f = shared();
  Error error;
  const auto context_field = [&](const std::function<void(dsv3_context_options&)>& change) {
    dsv3_context_options o;
    dsv3_context_options_init(&o, sizeof o);
    change(o);
    dsv3_context* context = nullptr;
    CHECK(dsv3_context_create(f.model.get(), &o, &context, error.out()) != DSV3_OK);
    CHECK(context == nullptr);
    CHECK(error.message().find(error.field()) != std::string::npos);
    return error.field();
  };
  CHECK(context_field([](auto& o) { o.threads = -1; }) == "threads");
  CHECK(context_field([](auto& o) { o.threads = 100000; }) == "threads");
  CHECK(context_field([](auto& o) { o.kernels = "warp9"; }) == "kernels");
  CHECK(context_field([](auto& o) { o.prefill_chunk = -5; }) == "prefill_chunk");
  CHECK(context_field([](auto& o) { o.prefill_chunk = INT32_MAX; }) == "prefill_chunk");
  CHECK(context_field([](auto& o) { o.cache_bytes = 100; }) == "cache_bytes");
  CHECK(context_field([](auto& o) { o.pin_threads = 2; }) == "pin_threads");
  CHECK(context_field([](auto& o) { o.prompt_attention = 2; }) == "prompt_attention");
  CHECK(context_field([](auto& o) { o.prompt_attention = -1; }) == "prompt_attention");

  const auto model_field = [&](const std::function<void(dsv3_model_options&)>& change) {
    dsv3_model_options o;
    dsv3_model_options_init(&o, sizeof o);
    change(o);
    dsv3_model* model = nullptr;
    CHECK(dsv3_model_open(tiny_coder().c_str(), &o, &model, error.out()) != DSV3_OK);
    CHECK(model == nullptr);
    return error.field();
  };
  CHECK(model_field([](auto& o) { o.residency = 2; }) == "residency");
  CHECK(model_field([](auto& o) { o.verify = -1; }) == "verify");
  CHECK(model_field([](auto& o) { o.reserved = 1; }) == "reserved");

  const auto request_field = [&](const std::function<void(dsv3_request_options&)>& change) {
    dsv3_request_options o = request_options();
    change(o);
    dsv3_request* request = nullptr;
    CHECK(dsv3_request_start(f.session.get(), &o, &request, error.out()) ==
          DSV3_E_INVALID_ARGUMENT);
    CHECK(request == nullptr);
    CHECK(error.message().find(error.field()) != std::string::npos);
    return error.field();
  };
  CHECK(request_field([](auto& o) { o.priority = 3; }) == "priority");
  CHECK(request_field([](auto& o) { o.priority = -1; }) == "priority");
  CHECK(request_field([](auto& o) { o.max_tokens = static_cast<uint64_t>(-1); }) == "max_tokens");
  CHECK(request_field([](auto& o) { o.top_p = NAN; }) == "top_p");
  CHECK(request_field([](auto& o) { o.temperature = -1; }) == "temperature");
  CHECK(request_field([](auto& o) { o.min_p = 1; }) == "min_p");
  CHECK(request_field([](auto& o) { o.top_k = -1; }) == "top_k");
  CHECK(request_field([](auto& o) { o.penalty_window = -2; }) == "penalty_window");
  CHECK(request_field([](auto& o) { o.logprobs = 1000000; }) == "logprobs");
  CHECK(request_field([](auto& o) { o.reasoning = 2; }) == "reasoning");
  CHECK(request_field([](auto& o) { o.ignore_eos = 7; }) == "ignore_eos");
  CHECK(request_field([](auto& o) { o.max_queued_events = 0; }) == "max_queued_events");
  CHECK(request_field([](auto& o) { o.speculation = 3; }) == "speculation");
  CHECK(request_field([](auto& o) { o.speculation = -1; }) == "speculation");
  CHECK(request_field([](auto& o) { o.max_draft_tokens = 65; }) == "max_draft_tokens");
  CHECK(request_field([](auto& o) { o.max_draft_tokens = -1; }) == "max_draft_tokens");
  CHECK(request_field([](auto& o) { o.reference_token_count = 1; }) == "reference_tokens");
  CHECK(request_field([](auto& o) { o.reference_token_count = UINT64_MAX; }) ==
        "reference_token_count");
  CHECK(request_field([](auto& o) { o.reference_text_length = 1; }) == "reference_text");
  // What only a newer library could know is refused as such.
  for (const char* field : {"drafters", "reserved"}) {
    dsv3_request_options o = request_options();
    if (std::string(field) == "drafters") o.drafters = 8;
    if (std::string(field) == "reserved") o.reserved = 1;
    dsv3_request* request = nullptr;
    CHECK(dsv3_request_start(f.session.get(), &o, &request, error.out()) == DSV3_E_UNSUPPORTED);
    CHECK(error.field() == field);
  }
  const int32_t no_token[] = {5, 4096};
  CHECK(request_field([&](auto& o) {
          o.reference_tokens = no_token;
          o.reference_token_count = 2;
        }) == "reference_tokens");
  CHECK(request_field([&](auto& o) {
          o.reference_tokens = no_token;
          o.reference_token_count = 1;
          o.reference_text = "both";
          o.reference_text_length = 4;
        }) == "reference_text");
  CHECK(request_field([](auto& o) { o.logit_bias_count = 1; }) == "logit_bias");
  CHECK(request_field([](auto& o) { o.stop_string_count = 1; }) == "stop_strings");
  CHECK(request_field([](auto& o) { o.stop_token_count = 1; }) == "stop_tokens");
  CHECK(request_field([](auto& o) { o.logit_bias_count = UINT32_MAX; }) == "logit_bias_count");
  CHECK(request_field([](auto& o) { o.stop_token_count = UINT32_MAX; }) == "stop_token_count");
  const dsv3_logit_bias biases[] = {{5, 1}, {4096, 1}};
  CHECK(request_field([&](auto& o) {
          o.logit_bias = biases;
          o.logit_bias_count = 2;
        }) == "logit_bias");
  CHECK(request_field([&](auto& o) {
          o.logit_bias = biases;
          o.logit_bias_count = 1;
          o.logit_bias_stride = 3;
        }) == "logit_bias");
  const char* const strings[] = {"a", nullptr, ""};
  CHECK(request_field([&](auto& o) {
          o.stop_strings = strings;
          o.stop_string_count = 2;
        }) == "stop_strings");
  CHECK(request_field([&](auto& o) {
          o.stop_strings = strings + 2;
          o.stop_string_count = 1;
        }) == "stop_strings");
  CHECK(request_field([&](auto& o) {
          o.stop_strings = strings;
          o.stop_string_count = 65;
        }) == "stop_string_count");
  const char* const half = "\xE2\x82";
  CHECK(request_field([&](auto& o) {
          o.stop_strings = &half;
          o.stop_string_count = 1;
        }) == "stop_strings");
  const int32_t bad_token = -3;
  CHECK(request_field([&](auto& o) {
          o.stop_tokens = &bad_token;
          o.stop_token_count = 1;
        }) == "stop_tokens");
  const SessionHandle empty = make_session(f.context.get());
  dsv3_request* request = nullptr;
  expect_invalid(dsv3_request_start(empty.get(), nullptr, &request, error.out()), error, "session");
}

TEST_CASE("one trace at a time, however it is written") {
  Fixture& f = shared();
  Error e;
  const dsv3_write_fn write = [](void*, const void*, uint64_t) { return DSV3_OK; };
  const auto start = [&] {
    return dsv3_context_trace_start_writer(f.context.get(), write, nullptr, 1000, e.out());
  };
  REQUIRE(start() == DSV3_OK);
  CHECK(start() == DSV3_E_BUSY);
  CHECK(e.field() == "context");
  CHECK(dsv3_context_trace_start(f.context.get(), "unused.json", 1000, e.out()) == DSV3_E_BUSY);
  CHECK(dsv3_context_trace_stop(f.context.get(), e.out()) == DSV3_OK);
  CHECK(dsv3_context_trace_stop(f.context.get(), e.out()) == DSV3_E_NOT_FOUND);
}
