// What the tests of wrong arguments share: a model, a context and a finished request, and the form
// that every refusal has.
#pragma once

#include <doctest/doctest.h>

#include <string>

#include "tests/api/api_support.h"

namespace dsv3::test::arguments {

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
inline Fixture& shared() {
  static Fixture fixture;
  return fixture;
}

inline void expect(dsv3_status status, const Error& error, dsv3_status code,
                   const std::string& field) {
  CHECK(status == code);
  CHECK(error.status() == code);
  CHECK(error.field() == field);
  CHECK(error.message().size() > 10);
  // The message itself says what it is about.
  CHECK(error.message().find(field) != std::string::npos);
}
inline void expect_invalid(dsv3_status status, const Error& error, const std::string& field) {
  expect(status, error, DSV3_E_INVALID_ARGUMENT, field);
}

}  // namespace dsv3::test::arguments
