// Every function of dsv3.h with NULL, garbage, wrong sizes and values: an error that names the
// field, and nothing written.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <functional>

#include "tests/api/api_support.h"

using namespace dsv3::test;  // NOLINT

namespace {

struct Fixture {
  ModelHandle model = open_model();
  ContextHandle context = make_context(model.get());
  SessionHandle session = make_session(context.get());
  RequestHandle request;
  Fixture() {
    append(session.get(), {5, 6, 7});
    dsv3_request_options options = request_options();
    options.max_tokens = 3;
    request = start(session.get(), options);
    finish(request.get());
  }
};
Fixture& shared() {
  static Fixture fixture;
  return fixture;
}

void expect(dsv3_status status, const Error& error, dsv3_status code, const std::string& field) {
  CHECK(status == code);
  CHECK(error.status() == code);
  CHECK(error.field() == field);
  CHECK(error.message().size() > 10);
  // The message itself says what it is about.
  CHECK(error.message().find(field) != std::string::npos);
}
void expect_invalid(dsv3_status status, const Error& error, const std::string& field) {
  expect(status, error, DSV3_E_INVALID_ARGUMENT, field);
}

// Every struct of the header through the same mill: sizes that no version has, a newer header's
// with zeros and with something in its tail, an older header's.
template <class T>
void check_struct(void (*init)(T*, uint32_t),
                  const std::function<dsv3_status(const T*, dsv3_error**)>& use,
                  uint32_t older_size) {
  struct Larger {
    T value;
    unsigned char tail[64];
  };
  static_assert(offsetof(Larger, tail) == sizeof(T));
  Error error;
  Larger larger;
  std::memset(&larger, 0xAB, sizeof larger);
  init(&larger.value, sizeof larger);
  CHECK(larger.value.struct_size == sizeof larger);
  for (const unsigned char byte : larger.tail) CHECK(byte == 0);
  CHECK(use(&larger.value, error.out()) == DSV3_OK);
  larger.tail[40] = 1;
  expect(use(&larger.value, error.out()), error, DSV3_E_UNSUPPORTED, "struct_size");
  CHECK(error.message().find("newer header") != std::string::npos);
  larger.tail[40] = 0;
  for (const uint32_t bad :
       {0U, 1U, 4U, 7U, static_cast<uint32_t>(sizeof(T)) + 1, 1U << 20, UINT32_MAX}) {
    larger.value.struct_size = bad;
    expect_invalid(use(&larger.value, error.out()), error, "struct_size");
  }
  // init writes no more than it is told.
  std::memset(&larger, 0xAB, sizeof larger);
  init(&larger.value, older_size);
  CHECK(larger.value.struct_size == older_size);
  const auto* bytes = reinterpret_cast<const unsigned char*>(&larger);
  for (size_t i = older_size; i < sizeof larger; ++i) CHECK(bytes[i] == 0xAB);
  // What an older header does not have takes its default, whatever stands there.
  CHECK(use(&larger.value, error.out()) == DSV3_OK);
  init(nullptr, sizeof(T));
  init(&larger.value, 0);
}

}  // namespace

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

TEST_CASE("structs of other versions") {
  Fixture& f = shared();
  check_struct<dsv3_model_options>(
      dsv3_model_options_init,
      [](const dsv3_model_options* o, dsv3_error** e) {
        dsv3_model* model = nullptr;
        const dsv3_status status = dsv3_model_open(tiny_coder().c_str(), o, &model, e);
        dsv3_model_free(model);
        return status;
      },
      offsetof(dsv3_model_options, progress));
  check_struct<dsv3_context_options>(
      dsv3_context_options_init,
      [&](const dsv3_context_options* o, dsv3_error** e) {
        dsv3_context* context = nullptr;
        const dsv3_status status = dsv3_context_create(f.model.get(), o, &context, e);
        dsv3_context_free(context);
        return status;
      },
      offsetof(dsv3_context_options, kernels));
  check_struct<dsv3_request_options>(
      dsv3_request_options_init,
      [&](const dsv3_request_options* o, dsv3_error** e) {
        dsv3_request* request = nullptr;
        const SessionHandle session = fork_session(f.session.get());
        const dsv3_status status = dsv3_request_start(session.get(), o, &request, e);
        dsv3_request_free(request);
        return status;
      },
      offsetof(dsv3_request_options, temperature));
  check_struct<dsv3_evaluation>(
      dsv3_evaluation_init,
      [&](const dsv3_evaluation* o, dsv3_error** e) {
        const SessionHandle session = make_session(f.context.get());
        const int32_t token = 5;
        return dsv3_session_evaluate(session.get(), &token, 1, o, e);
      },
      offsetof(dsv3_evaluation, logits));
  check_struct<dsv3_convert_options>(
      dsv3_convert_options_init,
      [&](const dsv3_convert_options* o, dsv3_error** e) {
        const std::string out = scratch_folder().file("again.dsv3");
        std::remove(out.c_str());
        return dsv3_convert(source_path("examples/models/tiny-coder").c_str(), out.c_str(), o, e);
      },
      offsetof(dsv3_convert_options, progress));
}

TEST_CASE("structs that are filled: only up to the caller's size") {
  Fixture& f = shared();
  Error error;
  struct {
    dsv3_context_info info;
    unsigned char tail[32];
  } larger;
  std::memset(&larger, 0xAB, sizeof larger);
  larger.info.struct_size = sizeof larger;
  REQUIRE(dsv3_context_get_info(f.context.get(), &larger.info, error.out()) == DSV3_OK);
  CHECK(larger.info.struct_size == sizeof larger);
  CHECK(larger.info.page_tokens == 64);
  for (const unsigned char byte : larger.tail) CHECK(byte == 0);
  std::memset(&larger, 0xAB, sizeof larger);
  larger.info.struct_size = offsetof(dsv3_context_info, kernels);
  REQUIRE(dsv3_context_get_info(f.context.get(), &larger.info, error.out()) == DSV3_OK);
  CHECK(larger.info.page_tokens == 64);
  const auto* bytes = reinterpret_cast<const unsigned char*>(&larger);
  for (size_t i = larger.info.struct_size; i < sizeof larger; ++i) CHECK(bytes[i] == 0xAB);
  larger.info.struct_size = 3;
  expect_invalid(dsv3_context_get_info(f.context.get(), &larger.info, error.out()), error,
                 "struct_size");
  dsv3_event event;
  std::memset(&event, 0, sizeof event);
  expect_invalid(dsv3_request_next(f.request.get(), 0, &event, error.out()), error, "struct_size");
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
  const int32_t bad_token = -3;
  CHECK(request_field([&](auto& o) {
          o.stop_tokens = &bad_token;
          o.stop_token_count = 1;
        }) == "stop_tokens");
  const SessionHandle empty = make_session(f.context.get());
  dsv3_request* request = nullptr;
  expect_invalid(dsv3_request_start(empty.get(), nullptr, &request, error.out()), error, "session");
}

TEST_CASE("tokens, lengths and flags") {
  Fixture& f = shared();
  Error error;
  const SessionHandle session = make_session(f.context.get());
  const uint64_t huge[] = {uint64_t{1} << 31, uint64_t{1} << 40, UINT64_MAX - 1};
  int32_t tokens[3] = {1, 2, 3};
  uint64_t needed = 77;
  for (const uint64_t length : huge) {
    expect_invalid(
        dsv3_session_append_tokens(session.get(), tokens, length, 0, nullptr, nullptr, error.out()),
        error, "count");
    expect_invalid(
        dsv3_session_append_text(session.get(), "abc", length, 0, nullptr, nullptr, error.out()),
        error, "text");
    expect_invalid(
        dsv3_model_tokenize(f.model.get(), "abc", length, 0, tokens, 3, &needed, error.out()),
        error, "text");
    expect_invalid(
        dsv3_model_detokenize(f.model.get(), tokens, length, 0, nullptr, 0, &needed, error.out()),
        error, "count");
    expect_invalid(dsv3_session_evaluate(session.get(), tokens, length, nullptr, error.out()),
                   error, "count");
    expect_invalid(dsv3_session_truncate(session.get(), length, error.out()), error, "length");
    expect_invalid(dsv3_session_get_tokens(session.get(), length, tokens, 3, &needed, error.out()),
                   error, "begin");
  }
  CHECK(dsv3_session_length(session.get()) == 0);
  for (const int32_t bad : {-1, 4096, INT32_MAX, INT32_MIN}) {
    tokens[2] = bad;
    expect_invalid(
        dsv3_session_append_tokens(session.get(), tokens, 3, 0, nullptr, nullptr, error.out()),
        error, "tokens");
    CHECK(error.message().find("tokens[2] is " + std::to_string(bad)) != std::string::npos);
    CHECK(dsv3_session_evaluate(session.get(), tokens, 3, nullptr, error.out()) ==
          DSV3_E_INVALID_ARGUMENT);
    CHECK(dsv3_model_detokenize(f.model.get(), tokens, 3, 0, nullptr, 0, &needed, error.out()) !=
          DSV3_OK);
    CHECK(dsv3_session_length(session.get()) == 0);
  }
  const std::vector<int32_t> many(2049, 5), million(1000000, 5);
  CHECK(dsv3_session_append_tokens(session.get(), many.data(), many.size(), 0, nullptr, nullptr,
                                   error.out()) == DSV3_E_CAPACITY);
  CHECK(dsv3_session_append_tokens(session.get(), million.data(), million.size(), 0, nullptr,
                                   nullptr, error.out()) == DSV3_E_CAPACITY);
  CHECK_FALSE(error.retryable());
  CHECK(error.message().find("2048") != std::string::npos);
  append(session.get(), std::vector<int32_t>(2048, 5));
  CHECK(dsv3_session_append_tokens(session.get(), many.data(), 1, 0, nullptr, nullptr,
                                   error.out()) == DSV3_E_CAPACITY);
  // Flags that a function does not have.
  expect(dsv3_session_append_tokens(session.get(), tokens, 0, DSV3_APPEND_ADD_BOS, nullptr, nullptr,
                                    error.out()),
         error, DSV3_E_UNSUPPORTED, "flags");
  expect(
      dsv3_session_append_text(session.get(), "a", 1, 0x80000000U, nullptr, nullptr, error.out()),
      error, DSV3_E_UNSUPPORTED, "flags");
  expect(dsv3_model_tokenize(f.model.get(), "a", 1, 8, tokens, 3, &needed, error.out()), error,
         DSV3_E_UNSUPPORTED, "flags");
  expect(dsv3_model_detokenize(f.model.get(), tokens, 0, 2, nullptr, 0, &needed, error.out()),
         error, DSV3_E_UNSUPPORTED, "flags");
  // Nothing at all is something.
  const SessionHandle empty = make_session(f.context.get());
  uint64_t length = 9, kept = 9;
  CHECK(dsv3_session_append_tokens(empty.get(), nullptr, 0, 0, &length, &kept, error.out()) ==
        DSV3_OK);
  CHECK(length == 0);
  CHECK(kept == 0);
  CHECK(dsv3_session_append_text(empty.get(), nullptr, 0, 0, &length, &kept, error.out()) ==
        DSV3_OK);
  CHECK(length == 0);
}

TEST_CASE("buffers: the size alone, too small, exact, with room for the NUL") {
  Fixture& f = shared();
  Error error;
  const std::string text = "def add(a, b):\n    return a + b\n";
  const std::vector<int32_t> tokens = tokenize(f.model.get(), text);
  uint64_t needed = 0;
  std::string buffer(text.size() + 8, 'x');
  const auto detokenize = [&](uint64_t capacity) {
    return dsv3_model_detokenize(f.model.get(), tokens.data(), tokens.size(), 0,
                                 capacity == 0 ? nullptr : buffer.data(), capacity, &needed,
                                 error.out());
  };
  CHECK(detokenize(0) == DSV3_OK);
  CHECK(needed == text.size());
  needed = 0;
  CHECK(detokenize(text.size() - 1) == DSV3_E_BUFFER_TOO_SMALL);
  CHECK(needed == text.size());
  CHECK(buffer == std::string(text.size() + 8, 'x'));
  CHECK(error.field() == "capacity");
  CHECK(detokenize(text.size()) == DSV3_OK);
  CHECK(buffer == text + "xxxxxxxx");
  CHECK(detokenize(text.size() + 1) == DSV3_OK);
  CHECK(buffer == text + '\0' + "xxxxxxx");
  std::vector<int32_t> ids(tokens.size() + 1, -7);
  CHECK(dsv3_model_tokenize(f.model.get(), text.data(), text.size(), 0, ids.data(),
                            tokens.size() - 1, &needed, error.out()) == DSV3_E_BUFFER_TOO_SMALL);
  CHECK(needed == tokens.size());
  CHECK(ids == std::vector<int32_t>(tokens.size() + 1, -7));
  CHECK(dsv3_model_tokenize(f.model.get(), text.data(), text.size(), 0, ids.data(), UINT64_MAX,
                            nullptr, error.out()) == DSV3_OK);
  CHECK(ids.back() == -7);
  const SessionHandle session = make_session(f.context.get());
  append(session.get(), {9, 8, 7});
  int32_t out[4] = {-1, -1, -1, -1};
  CHECK(dsv3_session_get_tokens(session.get(), 1, out, 1, &needed, error.out()) ==
        DSV3_E_BUFFER_TOO_SMALL);
  CHECK(needed == 2);
  CHECK(out[0] == -1);
  CHECK(dsv3_session_get_tokens(session.get(), 1, out, UINT64_MAX, &needed, error.out()) ==
        DSV3_OK);
  CHECK(out[0] == 8);
  CHECK(out[1] == 7);
  CHECK(out[2] == -1);
  CHECK(dsv3_session_get_tokens(session.get(), 3, out, 4, &needed, error.out()) == DSV3_OK);
  CHECK(needed == 0);
}

TEST_CASE("text of special tokens is plain text unless asked for") {
  Fixture& f = shared();
  Error error;
  const std::string special = "<｜fim▁hole｜>";
  int32_t id = -1;
  REQUIRE(dsv3_model_token_id(f.model.get(), special.data(), special.size(), &id, error.out()) ==
          DSV3_OK);
  CHECK(tokenize(f.model.get(), special).size() > 1);
  int32_t out[2] = {-1, -1};
  uint64_t needed = 0;
  REQUIRE(dsv3_model_tokenize(f.model.get(), special.data(), special.size(),
                              DSV3_TOKENIZE_PARSE_SPECIAL, out, 2, &needed,
                              error.out()) == DSV3_OK);
  CHECK(needed == 1);
  CHECK(out[0] == id);
  expect(dsv3_model_token_id(f.model.get(), "nonsense", DSV3_NUL_TERMINATED, &id, error.out()),
         error, DSV3_E_NOT_FOUND, "text");
  // In a session as well.
  const SessionHandle session = make_session(f.context.get());
  append_text(session.get(), special);
  CHECK(dsv3_session_length(session.get()) > 1);
  uint64_t length = 0;
  REQUIRE(dsv3_session_append_text(
              session.get(), special.data(), special.size(),
              DSV3_APPEND_PARSE_SPECIAL | DSV3_APPEND_REPLACE | DSV3_APPEND_ADD_BOS, &length,
              nullptr, error.out()) == DSV3_OK);
  CHECK(length == 2);
}

TEST_CASE("chat: what is missing or wrong in a message is named with its index") {
  Fixture& f = shared();
  Error error;
  dsv3_message messages[2];
  for (dsv3_message& m : messages) dsv3_message_init(&m, sizeof m);
  messages[0].role = "user";
  messages[0].content = "hello";
  dsv3_chat chat;
  dsv3_chat_init(&chat, sizeof chat);
  uint64_t needed = 0;
  const auto render = [&] {
    return dsv3_model_render_chat(f.model.get(), &chat, nullptr, 0, &needed, error.out());
  };
  expect_invalid(render(), error, "message_count");
  chat.message_count = 2;
  expect_invalid(render(), error, "messages");
  chat.messages = messages;
  expect_invalid(render(), error, "role");
  CHECK(error.message().find("messages[1]") != std::string::npos);
  chat.message_count = 1;
  chat.thinking = 3;
  expect_invalid(render(), error, "thinking");
  chat.thinking = 0;
  chat.message_stride = 7;
  expect_invalid(render(), error, "messages");
  chat.message_stride = 0;
  messages[0].tool_call_count = 1;
  expect_invalid(render(), error, "tool_calls");
  dsv3_tool_call call;
  dsv3_tool_call_init(&call, sizeof call);
  messages[0].tool_calls = &call;
  expect_invalid(render(), error, "name");
  call.name = "f";
  expect_invalid(render(), error, "arguments");
  messages[0].tool_call_count = 0;
  messages[0].content_length = uint64_t{1} << 33;
  expect_invalid(render(), error, "content");
  messages[0].struct_size = 0;
  expect_invalid(render(), error, "struct_size");
}

TEST_CASE("model: info, JSON, files that are not there or not models") {
  Fixture& f = shared();
  Error error;
  dsv3_model_info info;
  info.struct_size = sizeof info;
  REQUIRE(dsv3_model_get_info(f.model.get(), &info, error.out()) == DSV3_OK);
  CHECK(info.vocab_size == 4096);
  CHECK(info.hidden_size == 256);
  CHECK(info.num_hidden_layers == 6);
  CHECK(info.num_nextn_predict_layers == 1);
  CHECK(info.n_routed_experts == 16);
  CHECK(info.kv_lora_rank == 128);
  CHECK(info.qk_rope_head_dim == 32);
  CHECK(info.max_position_embeddings == 2048);
  CHECK(info.has_tokenizer == 1);
  CHECK(info.has_fim == 1);
  CHECK(info.parameters > 14000000);
  CHECK(info.parameters < 15000000);
  CHECK(std::string(info.model_type) == "deepseek_v3");
  CHECK(std::string(info.path) == tiny_coder());
  uint64_t needed = 0;
  REQUIRE(dsv3_model_get_json(f.model.get(), nullptr, 0, &needed, error.out()) == DSV3_OK);
  std::string json(needed, '\0');
  REQUIRE(dsv3_model_get_json(f.model.get(), json.data(), json.size(), &needed, error.out()) ==
          DSV3_OK);
  CHECK(json.front() == '{');
  CHECK(json.back() == '}');
  CHECK(json.find("\"kv_lora_rank\":128") != std::string::npos);
  CHECK(json.find("\"tensors\":[{\"name\":") != std::string::npos);
  CHECK(dsv3_model_verify(f.model.get(), nullptr, nullptr, nullptr, error.out()) == DSV3_OK);

  dsv3_model* model = nullptr;
  CHECK(dsv3_model_open("/nonexistent/model.dsv3", nullptr, &model, error.out()) != DSV3_OK);
  CHECK(error.message().find("/nonexistent/model.dsv3") != std::string::npos);
  const std::string config = source_path("examples/models/tiny-coder/config.json");
  CHECK(dsv3_model_open(config.c_str(), nullptr, &model, error.out()) != DSV3_OK);
  CHECK(error.message().find("config.json") != std::string::npos);
  CHECK(model == nullptr);
}

TEST_CASE("opening, verifying and converting report progress and can be cancelled") {
  Error error;
  dsv3_model_options o;
  dsv3_model_options_init(&o, sizeof o);
  o.residency = DSV3_RESIDENCY_COPY;
  o.verify = 1;
  uint64_t last = 0;
  o.progress_user = &last;
  o.progress = [](void* user, uint64_t done, uint64_t total) {
    if (done <= total) *static_cast<uint64_t*>(user) = done;
  };
  dsv3_model* model = nullptr;
  REQUIRE(dsv3_model_open(tiny_coder().c_str(), &o, &model, error.out()) == DSV3_OK);
  CHECK(last > 0);
  const CancelHandle cancel = make_cancel();
  const auto cancelling = [](void* user, uint64_t, uint64_t) {
    dsv3_cancel_set(static_cast<dsv3_cancel*>(user));
  };
  CHECK(dsv3_model_verify(model, cancelling, cancel.get(), cancel.get(), error.out()) ==
        DSV3_E_CANCELLED);
  dsv3_model_free(model);
  model = nullptr;
  o.cancel = cancel.get();
  CHECK(dsv3_model_open(tiny_coder().c_str(), &o, &model, error.out()) == DSV3_E_CANCELLED);
  CHECK(model == nullptr);
  o.cancel = nullptr;
  o.progress = [](void*, uint64_t, uint64_t) { throw 3; };
  expect_invalid(dsv3_model_open(tiny_coder().c_str(), &o, &model, error.out()), error, "progress");

  dsv3_convert_options c;
  dsv3_convert_options_init(&c, sizeof c);
  const CancelHandle during = make_cancel();
  c.progress = cancelling;
  c.progress_user = during.get();
  c.cancel = during.get();
  const std::string out = scratch_folder().file("cancelled.dsv3");
  CHECK(dsv3_convert(source_path("examples/models/tiny-coder").c_str(), out.c_str(), &c,
                     error.out()) == DSV3_E_CANCELLED);
  CHECK(std::fopen(out.c_str(), "rb") == nullptr);
  c = {};
  dsv3_convert_options_init(&c, sizeof c);
  c.weights = 9;
  expect_invalid(dsv3_convert("a", "b", &c, error.out()), error, "weights");
}

TEST_CASE("the estimate is what a context then has") {
  Error error;
  dsv3_memory_estimate estimate;
  estimate.struct_size = sizeof estimate;
  REQUIRE(dsv3_estimate_memory(tiny_coder().c_str(), nullptr, &estimate, error.out()) == DSV3_OK);
  dsv3_context_info info;
  info.struct_size = sizeof info;
  REQUIRE(dsv3_context_get_info(shared().context.get(), &info, error.out()) == DSV3_OK);
  CHECK(estimate.cache_bytes == info.pages * info.page_bytes);
  CHECK(estimate.cache_tokens == info.pages * 64);
  CHECK(estimate.weight_bytes > 14000000);
  CHECK(estimate.scratch_bytes > 0);
  CHECK(estimate.total_bytes ==
        estimate.weight_bytes + estimate.cache_bytes + estimate.scratch_bytes);
  CHECK(info.bit_identical == 1);
  CHECK(info.sessions >= 1);
}

TEST_CASE("an evaluation's demands") {
  Fixture& f = shared();
  Error error;
  dsv3_evaluation e;
  dsv3_evaluation_init(&e, sizeof e);
  const SessionHandle session = make_session(f.context.get());
  append(session.get(), {1, 2});
  float dummy[4096];
  e.mtp_logits = dummy;
  const int32_t tokens[2] = {3, 4};
  expect_invalid(dsv3_session_evaluate(session.get(), tokens, 2, &e, error.out()), error,
                 "mtp_logits");
  CHECK(dsv3_session_length(session.get()) == 2);
}
