// Structs of older and newer headers, in and out.
#include <doctest/doctest.h>

#include <cstddef>
#include <cstring>
#include <functional>

#include "tests/api/arguments_support.h"

using namespace dsv3::test;             // NOLINT
using namespace dsv3::test::arguments;  // NOLINT

namespace {

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

TEST_CASE("a latent cache is no larger than the machine's memory") {
  const ModelHandle model = open_model();
  dsv3_context_options options;
  dsv3_context_options_init(&options, sizeof options);
  options.cache_bytes = UINT64_MAX;
  Error error;
  dsv3_memory_estimate estimate = {};
  estimate.struct_size = sizeof estimate;
  REQUIRE(dsv3_estimate_memory(tiny_coder().c_str(), &options, &estimate, error.out()) == DSV3_OK);
  CHECK(estimate.cache_bytes <= estimate.machine_bytes);
  CHECK(estimate.cache_bytes > estimate.machine_bytes / 2);
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
