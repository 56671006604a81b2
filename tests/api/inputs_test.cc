// Tokens, text, chats, files and buffers that a host may get wrong.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <functional>

#include "tests/api/arguments_support.h"

using namespace dsv3::test;             // NOLINT
using namespace dsv3::test::arguments;  // NOLINT

TEST_CASE("ids that only the model has: no text, as in a stream") {
  const TemporaryFolder folder;
  copy_padded_checkpoint(folder.file("padded"));
  const std::string path = folder.file("padded.dsv3");
  Error error;
  REQUIRE_MESSAGE(
      dsv3_convert(folder.file("padded").c_str(), path.c_str(), nullptr, error.out()) == DSV3_OK,
      error.message());
  const ModelHandle model = open_model(path);
  std::vector<int32_t> tokens = tokenize(model.get(), "def f(x):");
  tokens.insert(tokens.begin(), 4095);
  tokens.insert(tokens.end(), {4093, 4094});
  for (const uint32_t flags : {0u, DSV3_DETOKENIZE_SKIP_SPECIAL}) {
    std::string text(64, '\0');
    uint64_t needed = 0;
    const dsv3_status status =
        dsv3_model_detokenize(model.get(), tokens.data(), tokens.size(), flags, text.data(),
                              text.size(), &needed, error.out());
    REQUIRE_MESSAGE(status == DSV3_OK, error.message());
    text.resize(needed);
    CHECK(text == "def f(x):");
  }
  tokens.front() = 4096;
  uint64_t needed = 0;
  expect_invalid(dsv3_model_detokenize(model.get(), tokens.data(), tokens.size(), 0, nullptr, 0,
                                       &needed, error.out()),
                 error, "tokens");
  CHECK(error.message() == "tokens[0] is 4096, expected 0 to 4095");
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
    expect_invalid(
        dsv3_model_detokenize(f.model.get(), tokens, 3, 0, nullptr, 0, &needed, error.out()), error,
        "tokens");
    CHECK(error.message() == "tokens[2] is " + std::to_string(bad) + ", expected 0 to 4095");
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
  std::string text = "a";  // its characters begin at odd places; 64 bytes of it are shown
  for (int i = 0; i < 50; ++i) text += "\u00E9";
  CHECK(dsv3_model_token_id(f.model.get(), text.data(), text.size(), &id, error.out()) ==
        DSV3_E_NOT_FOUND);
  CHECK(error.message().find("text is \"" + text.substr(0, 63) + "\", which") != std::string::npos);
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

TEST_CASE("begin-of-sentence stands at a sequence's beginning and nowhere else") {
  dsv3_model_info info;
  info.struct_size = sizeof info;
  REQUIRE(dsv3_model_get_info(shared().model.get(), &info, nullptr) == DSV3_OK);
  REQUIRE(info.bos_token_id >= 0);
  const SessionHandle session = make_session(shared().context.get());
  const auto text = [&](uint32_t flags) {
    REQUIRE(dsv3_session_append_text(session.get(), "a = 1\n", 6, flags, nullptr, nullptr,
                                     nullptr) == DSV3_OK);
  };
  const auto fim = [&](uint32_t flags) {
    REQUIRE(dsv3_session_append_fim(session.get(), "def f(", 6, "):", 2, flags, nullptr, nullptr,
                                    nullptr) == DSV3_OK);
  };
  const auto check = [&](bool begins) {
    const std::vector<int32_t> tokens = tokens_of(session.get());
    CHECK((tokens.front() == info.bos_token_id) == begins);
    CHECK(std::count(tokens.begin(), tokens.end(), info.bos_token_id) == (begins ? 1 : 0));
  };
  text(DSV3_APPEND_ADD_BOS);
  check(true);
  text(DSV3_APPEND_ADD_BOS);
  check(true);
  fim(DSV3_APPEND_ADD_BOS);
  check(true);
  fim(DSV3_APPEND_ADD_BOS | DSV3_APPEND_REPLACE);
  check(true);
  text(DSV3_APPEND_REPLACE);
  check(false);
  fim(0);
  check(false);
  text(DSV3_APPEND_REPLACE | DSV3_APPEND_ADD_BOS);
  check(true);
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
  const auto refused = [&](int32_t dsv3_convert_options::*field, int32_t value, const char* name) {
    dsv3_convert_options_init(&c, sizeof c);
    c.*field = value;
    expect_invalid(dsv3_convert("a", "b", &c, error.out()), error, name);
  };
  refused(&dsv3_convert_options::weights, DSV3_WEIGHTS_MXFP4, "weights");
  refused(&dsv3_convert_options::ffn, 3, "ffn");
  refused(&dsv3_convert_options::experts, -1, "experts");
  refused(&dsv3_convert_options::head, DSV3_WEIGHTS_MXFP4, "head");
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
  // A budget beyond the machine's memory counts as that.
  dsv3_context_options large;
  dsv3_context_options_init(&large, sizeof large);
  large.cache_bytes = uint64_t{1} << 60;
  REQUIRE(dsv3_estimate_memory(tiny_coder().c_str(), &large, &estimate, error.out()) == DSV3_OK);
  if (estimate.machine_bytes > 0) {
    CHECK(estimate.cache_bytes <= estimate.machine_bytes);
    CHECK(estimate.cache_bytes > estimate.machine_bytes / 2);
  }
  // Scratch counts what each thread has, each row of a step, and what expanded prompts need.
  const auto scratch = [&](auto change) {
    dsv3_context_options options;
    dsv3_context_options_init(&options, sizeof options);
    options.threads = 2;
    change(options);
    dsv3_memory_estimate e;
    e.struct_size = sizeof e;
    REQUIRE(dsv3_estimate_memory(tiny_coder().c_str(), &options, &e, error.out()) == DSV3_OK);
    return e.scratch_bytes;
  };
  const uint64_t two = scratch([](auto&) {});
  const uint64_t four = scratch([](auto& o) { o.threads = 4; });
  CHECK(four > two);
  CHECK(scratch([](auto& o) { o.threads = 6; }) - four == four - two);
  CHECK(scratch([](auto& o) { o.prefill_chunk = 512; }) > two);
  CHECK(scratch([](auto& o) {
          o.prefill_chunk = 256;
          o.prompt_attention = DSV3_PROMPT_EXPANDED;
        }) > two);
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
