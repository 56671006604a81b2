// dsv3.h means the same to C11 and to C++, has nothing in it that other languages cannot call, and
// the library that is linked is the header's.
#include <doctest/doctest.h>

#include <cstddef>
#include <iterator>
#include <regex>
#include <string>

#include "include/dsv3.h"
#include "tests/support/support.h"

extern "C" {
extern const size_t dsv3_c11_sizes[18];
extern const size_t dsv3_c11_offsets[4];
}

namespace dsv3::test {
namespace {

TEST_CASE("structs have the same shape in C11 and C++") {
  const size_t sizes[] = {
      sizeof(dsv3_model_options),
      sizeof(dsv3_model_info),
      sizeof(dsv3_tool_call),
      sizeof(dsv3_message),
      sizeof(dsv3_chat),
      sizeof(dsv3_context_options),
      sizeof(dsv3_context_info),
      sizeof(dsv3_memory_estimate),
      sizeof(dsv3_context_statistics),
      sizeof(dsv3_evaluation),
      sizeof(dsv3_logit_bias),
      sizeof(dsv3_request_options),
      sizeof(dsv3_top_token),
      sizeof(dsv3_token),
      sizeof(dsv3_request_statistics),
      sizeof(dsv3_event),
      sizeof(dsv3_convert_options),
      sizeof(dsv3_benchmark_options),
      sizeof(dsv3_session_io),
  };
  for (size_t i = 0; i < std::size(sizes); ++i) CHECK(sizes[i] == dsv3_c11_sizes[i]);
  CHECK(offsetof(dsv3_model_info, fingerprint) == dsv3_c11_offsets[0]);
  CHECK(offsetof(dsv3_request_options, notify_user) == dsv3_c11_offsets[1]);
  CHECK(offsetof(dsv3_event, prompt_total) == dsv3_c11_offsets[2]);
  CHECK(offsetof(dsv3_evaluation, cancel) == dsv3_c11_offsets[3]);
}

TEST_CASE("the shared library is the header's version") {
  CHECK(dsv3_version() ==
        DSV3_VERSION_MAJOR * 10000 + DSV3_VERSION_MINOR * 100 + DSV3_VERSION_PATCH);
  CHECK(std::string(dsv3_version_string()) == "0.1.0");
}

std::string without_comments(std::string text) {
  for (size_t at = 0; (at = text.find("/*", at)) != std::string::npos;) {
    text.erase(at, text.find("*/", at) + 2 - at);
  }
  return text;
}

TEST_CASE("nothing that a foreign function interface cannot express") {
  const std::string text = without_comments(read_bytes(source_path("include/dsv3.h")));
  for (const char* word :
       {"\\benum\\b", "\\bbool\\b", "\\b_Bool\\b", "\\bsize_t\\b", "\\binline\\b", "\\blong\\b",
        "\\bint\\b", "\\bunsigned\\b", "\\.\\.\\.", "\\bva_list\\b", "\\w\\s*:\\s*[0-9]+\\s*;",
        "\\bunion\\b", "#ifdef DSV3_", "#if DSV3_", "\\bdouble\\b"}) {
    CHECK_MESSAGE(!std::regex_search(text, std::regex(word)), word);
  }
  // The only conditions: the include guard, C++ and Windows.
  size_t conditions = 0;
  for (size_t at = 0; (at = text.find("\n#if", at)) != std::string::npos; ++at) ++conditions;
  CHECK(conditions == 4);
}

}  // namespace
}  // namespace dsv3::test
