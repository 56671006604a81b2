// dsv3_status, dsv3_error, version.
#include <cstdlib>

#include "runtime/api/boundary.h"

struct dsv3_error {
  uint32_t magic = kMagic;
  dsv3_status code = DSV3_OK;
  const char* message = "";
  const char* field = "";
  int32_t retryable = 0;
  bool is_static = false;
  dsv3::Status owner;  // of the texts

  static constexpr uint32_t kMagic = 0xD53C0006;
};

namespace dsv3::api {
namespace {

// The codes of base/status.h are those of dsv3.h.
static_assert(static_cast<int>(Code::kOk) == DSV3_OK);
static_assert(static_cast<int>(Code::kInvalidArgument) == DSV3_E_INVALID_ARGUMENT);
static_assert(static_cast<int>(Code::kNotFound) == DSV3_E_NOT_FOUND);
static_assert(static_cast<int>(Code::kIo) == DSV3_E_IO);
static_assert(static_cast<int>(Code::kCorrupt) == DSV3_E_CORRUPT);
static_assert(static_cast<int>(Code::kUnsupported) == DSV3_E_UNSUPPORTED);
static_assert(static_cast<int>(Code::kOutOfMemory) == DSV3_E_OUT_OF_MEMORY);
static_assert(static_cast<int>(Code::kCapacity) == DSV3_E_CAPACITY);
static_assert(static_cast<int>(Code::kBusy) == DSV3_E_BUSY);
static_assert(static_cast<int>(Code::kCancelled) == DSV3_E_CANCELLED);
static_assert(static_cast<int>(Code::kDeadline) == DSV3_E_DEADLINE);
static_assert(static_cast<int>(Code::kNumeric) == DSV3_E_NUMERIC);
static_assert(static_cast<int>(Code::kFileChanged) == DSV3_E_FILE_CHANGED);
static_assert(static_cast<int>(Code::kTimeout) == DSV3_E_TIMEOUT);
static_assert(static_cast<int>(Code::kInternal) == DSV3_E_INTERNAL);
static_assert(static_cast<int>(Code::kBufferTooSmall) == DSV3_E_BUFFER_TOO_SMALL);
static_assert(static_cast<int>(Code::kForked) == DSV3_E_FORKED);

// Never changed and never freed: reporting these needs no memory.
constinit dsv3_error out_of_memory_error = {.code = DSV3_E_OUT_OF_MEMORY,
                                            .message = "out of memory",
                                            .retryable = 1,
                                            .is_static = true,
                                            .owner = {}};
constinit dsv3_error timeout_error = {.code = DSV3_E_TIMEOUT,
                                      .message = "no event within the given time",
                                      .field = "timeout_ms",
                                      .retryable = 1,
                                      .is_static = true,
                                      .owner = {}};

}  // namespace

dsv3_status report_out_of_memory(dsv3_error** error) noexcept {
  if (error != nullptr) *error = &out_of_memory_error;
  return DSV3_E_OUT_OF_MEMORY;
}

dsv3_status report_timeout(dsv3_error** error) noexcept {
  if (error != nullptr) *error = &timeout_error;
  return DSV3_E_TIMEOUT;
}

dsv3_status report(const Status& status, dsv3_error** error) noexcept {
  const auto code = static_cast<dsv3_status>(status.code());
  if (code == DSV3_E_OUT_OF_MEMORY && status.message().empty()) return report_out_of_memory(error);
  if (error == nullptr) return code;
  auto* e = new (std::nothrow) dsv3_error;
  if (e == nullptr) return report_out_of_memory(error);
  e->code = code;
  e->owner = status;
  e->message = e->owner.message().c_str();
  e->field = e->owner.field().c_str();
  e->retryable = status.retryable() ? 1 : 0;
  *error = e;
  return code;
}

Status from_function(dsv3_status status, const char* name) {
  if (status == DSV3_OK) return {};
  const bool known = status > 0 && status <= DSV3_E_FORKED;
  return make_field_error(known ? static_cast<Code>(status) : Code::kIo, name,
                          "the %s function returned status %d", name, status);
}

}  // namespace dsv3::api

namespace {
bool is_error(const dsv3_error* error) {
  return error != nullptr && error->magic == dsv3_error::kMagic;
}
}  // namespace

extern "C" {

uint32_t dsv3_version(void) {
  return DSV3_VERSION_MAJOR * 10000 + DSV3_VERSION_MINOR * 100 + DSV3_VERSION_PATCH;
}

#define DSV3_TEXT_(x) #x
#define DSV3_TEXT(x) DSV3_TEXT_(x)
const char* dsv3_version_string(void) {
  return DSV3_TEXT(DSV3_VERSION_MAJOR) "." DSV3_TEXT(DSV3_VERSION_MINOR) "." DSV3_TEXT(
      DSV3_VERSION_PATCH);
}

const char* dsv3_status_name(dsv3_status status) {
  switch (status) {
    case DSV3_OK:
      return "DSV3_OK";
    case DSV3_E_INVALID_ARGUMENT:
      return "DSV3_E_INVALID_ARGUMENT";
    case DSV3_E_NOT_FOUND:
      return "DSV3_E_NOT_FOUND";
    case DSV3_E_IO:
      return "DSV3_E_IO";
    case DSV3_E_CORRUPT:
      return "DSV3_E_CORRUPT";
    case DSV3_E_UNSUPPORTED:
      return "DSV3_E_UNSUPPORTED";
    case DSV3_E_OUT_OF_MEMORY:
      return "DSV3_E_OUT_OF_MEMORY";
    case DSV3_E_CAPACITY:
      return "DSV3_E_CAPACITY";
    case DSV3_E_BUSY:
      return "DSV3_E_BUSY";
    case DSV3_E_CANCELLED:
      return "DSV3_E_CANCELLED";
    case DSV3_E_DEADLINE:
      return "DSV3_E_DEADLINE";
    case DSV3_E_NUMERIC:
      return "DSV3_E_NUMERIC";
    case DSV3_E_FILE_CHANGED:
      return "DSV3_E_FILE_CHANGED";
    case DSV3_E_TIMEOUT:
      return "DSV3_E_TIMEOUT";
    case DSV3_E_INTERNAL:
      return "DSV3_E_INTERNAL";
    case DSV3_E_BUFFER_TOO_SMALL:
      return "DSV3_E_BUFFER_TOO_SMALL";
    case DSV3_E_FORKED:
      return "DSV3_E_FORKED";
    default:
      return "unknown";
  }
}

dsv3_status dsv3_error_status(const dsv3_error* error) {
  return is_error(error) ? error->code : DSV3_OK;
}
const char* dsv3_error_message(const dsv3_error* error) {
  return is_error(error) ? error->message : "";
}
const char* dsv3_error_field(const dsv3_error* error) {
  return is_error(error) ? error->field : "";
}
int32_t dsv3_error_retryable(const dsv3_error* error) {
  return is_error(error) ? error->retryable : 0;
}
void dsv3_error_free(dsv3_error* error) {
  if (!is_error(error) || error->is_static) return;
  error->magic = dsv3::api::kFreedMagic;
  delete error;
}

void dsv3_string_free(char* text) { std::free(text); }

}  // extern "C"
