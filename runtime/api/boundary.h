// What every function of dsv3.h does at its edges: check handles, read and fill structs of other
// versions, keep exceptions inside, translate errors. No logic of the library lives in this folder.
#pragma once

#include <cfenv>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <string_view>

#include "include/dsv3.h"
#include "runtime/base/status.h"
#include "runtime/engine/callback.h"
#include "runtime/model/convert.h"
#include "runtime/model/model.h"

namespace dsv3::api {

// ------------------------------------------------------------------------------------------ errors

// Makes the caller's error object (static ones where none can be allocated) and returns the code.
dsv3_status report(const Status& status, dsv3_error** error) noexcept;
dsv3_status report_out_of_memory(dsv3_error** error) noexcept;
dsv3_status report_timeout(dsv3_error** error) noexcept;

// What a function of the caller's (dsv3_write_fn and the like) returned.
Status from_function(dsv3_status status, const char* name);

inline Status invalid(const char* field, std::string message) {
  return Status(Code::kInvalidArgument, std::move(message), field);
}

// Calls one. An exception is its error, not ours.
template <class Call>
Status call_function(Call call, const char* name) {
  const CallbackScope scope;
  try {
    return from_function(call(), name);
  } catch (...) {
    return invalid(name, std::string(name) + " threw an exception");
  }
}

// Runs the body of an API function: a callable that returns Status.
template <class Body>
dsv3_status guarded(dsv3_error** error, Body body) noexcept {
  if (error != nullptr) *error = nullptr;
  try {
    if (CallbackScope::active()) {
      return report(Status(Code::kInvalidArgument,
                           "called from inside a callback of the library, where only "
                           "dsv3_cancel_set and the free functions are allowed",
                           "callback"),
                    error);
    }
    const Status status = body();
    return status.ok() ? DSV3_OK : report(status, error);
  } catch (const std::bad_alloc&) {
    return report_out_of_memory(error);
  } catch (const std::length_error&) {  // a container that could never be that large
    return report_out_of_memory(error);
  } catch (const std::exception& e) {
    try {
      return report(make_error(Code::kInternal, "unexpected exception: %s", e.what()), error);
    } catch (...) {
      return report_out_of_memory(error);
    }
  } catch (...) {
    return report_out_of_memory(error);
  }
}

// ------------------------------------------------------------------------------------------
// handles

inline constexpr uint32_t kFreedMagic = 0xDEADDEAD;

// What all handles begin with. A tag tells a handle of another kind, or a freed one whose memory
// was not used again.
class HandleBase : public Deferred {
 public:
  explicit HandleBase(uint32_t magic) : magic_(magic) {}
  virtual ~HandleBase() { magic_ = kFreedMagic; }
  HandleBase(const HandleBase&) = delete;
  uint32_t magic() const noexcept { return magic_; }
  // Gives up what the handle holds. False: it cannot (a child process after fork, where locks may
  // be held for ever), and the handle's memory is left alone on purpose.
  virtual bool close() noexcept { return true; }
  void run_deferred() noexcept final {
    if (close()) delete this;
  }

 private:
  friend void free_handle(void* handle, uint32_t magic) noexcept;
  uint32_t magic_;
};

// The tag of what a caller says is a handle. Nothing else may be asked of it before: it could be
// one of another kind. (All handles begin with their HandleBase.)
inline uint32_t tag_of(const void* handle) noexcept {
  return handle == nullptr ? 0 : static_cast<const HandleBase*>(handle)->magic();
}
template <class T>
bool is_live(const T* handle) noexcept {
  return tag_of(handle) == T::kMagic;
}

// Frees now, or after the callback that this is called from.
inline void free_handle(void* handle, uint32_t magic) noexcept {
  if (tag_of(handle) != magic) return;
  auto* base = static_cast<HandleBase*>(handle);
  base->magic_ = kFreedMagic;
  if (!CallbackScope::defer(base)) base->run_deferred();
}

template <class T>
Status check_handle(const T* handle, const char* name) {
  if (handle == nullptr) return invalid(name, std::string(name) + " is NULL");
  if (is_live(handle)) return {};
  const bool freed = tag_of(handle) == kFreedMagic;
  return invalid(name,
                 std::string(name) + (freed ? " was freed" : " is not a handle of this kind"));
}

template <class T>
Status check_out(T* out, const char* name) {
  if (out != nullptr) return {};
  return invalid(name, std::string(name) + " is NULL, expected where to store the result");
}

// ------------------------------------------------------------------------------------------
// structs

inline constexpr uint32_t kMaxStructSize = 64 * 1024;

// struct_size must be one that some version of the struct can have.
Status check_struct_size(const char* name, uint32_t size, size_t alignment);

// Copies a caller's struct over *out, which holds defaults: fields that an older header does not
// have keep them; fields that this library does not know must be zero.
template <class T>
Status read_struct(const T* in, const char* name, T* out) {
  if (in == nullptr) return invalid(name, std::string(name) + " is NULL");
  const uint32_t size = in->struct_size;
  DSV3_TRY(check_struct_size(name, size, alignof(T)));
  std::memcpy(out, in, size < sizeof(T) ? size : sizeof(T));
  out->struct_size = sizeof(T);
  const auto* bytes = reinterpret_cast<const unsigned char*>(in);
  for (size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] == 0) continue;
    return Status(Code::kUnsupported,
                  format("%s.struct_size is %u and byte %zu is not zero: a field of a newer header "
                         "than this library's (%zu bytes)",
                         name, size, i, sizeof(T)),
                  "struct_size");
  }
  return {};
}

template <class T>
Status check_reserved(const T& value, const char* name) {
  if (value.reserved == 0) return {};
  return Status(
      Code::kUnsupported,
      format("%s.reserved is %lld, expected 0", name, static_cast<long long>(value.reserved)),
      "reserved");
}

template <class T>
Status check_out_struct(const T* out, const char* name) {
  if (out == nullptr) return invalid(name, std::string(name) + " is NULL");
  return check_struct_size(name, out->struct_size, alignof(T));
}

// Copies a filled struct out, up to the caller's struct_size; what the caller has beyond is zeroed.
template <class T>
void fill_struct(T* out, T value) {
  const uint32_t size = out->struct_size;
  value.struct_size = size;
  std::memcpy(out, &value, size < sizeof(T) ? size : sizeof(T));
  if (size > sizeof(T)) {
    std::memset(reinterpret_cast<unsigned char*>(out) + sizeof(T), 0, size - sizeof(T));
  }
}

// The ..._init functions: writes min(size, what is known) bytes of `defaults`, zeroes up to size.
template <class T>
void init_struct(T* out, uint32_t size, T defaults) noexcept {
  if (out == nullptr || size < sizeof(uint32_t)) return;
  if (size > kMaxStructSize) size = sizeof(T);
  defaults.struct_size = size;
  std::memcpy(static_cast<void*>(out), &defaults, size < sizeof(T) ? size : sizeof(T));
  if (size > sizeof(T)) {
    std::memset(reinterpret_cast<unsigned char*>(out) + sizeof(T), 0, size - sizeof(T));
  }
}

// Element i of a caller's array of structs.
template <class T>
const T* element(const T* array, uint32_t stride, size_t i) {
  return reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(array) +
                                    i * (stride == 0 ? sizeof(T) : stride));
}
Status check_array(const void* array, uint64_t count, uint32_t stride, size_t least_stride,
                   size_t alignment, const char* name);

// ------------------------------------------------------------------------------------ text,
// buffers

// A caller's text: `length` bytes, or up to the NUL.
Status read_text(const char* text, uint64_t length, const char* name, std::string_view* out);
Status read_tokens_argument(const int32_t* tokens, uint64_t count, const char* name);
Status check_flags(uint32_t flags, uint32_t known);
Status check_flag_value(int32_t value, const char* name);  // 0 or 1
// DSV3_WEIGHTS_...; MXFP4 only where the field may have it.
Status read_weights_mode(int32_t value, const char* name, bool mxfp4, WeightsMode* out);

// "Buffers" of dsv3.h.
Status check_buffer(const void* buffer, uint64_t capacity, const uint64_t* needed);
Status fill_text(std::string_view text, char* buffer, uint64_t capacity, uint64_t* needed);
Status buffer_too_small(uint64_t needed, uint64_t capacity);
// A text that the caller frees with dsv3_string_free.
char* new_string(std::string_view text);

// Rounding and subnormals as a program begins with, whatever the host has chosen for the calling
// thread: for calls that compute on it. The library's own threads begin so.
class DefaultFloats {
 public:
  DefaultFloats() noexcept {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloats() { std::fesetenv(&before_); }
  DefaultFloats(const DefaultFloats&) = delete;

 private:
  std::fenv_t before_;
};

// A progress callback and a cancel token as the lower floors take them.
class ProgressCall {
 public:
  ProgressCall(dsv3_progress_fn fn, void* user, std::shared_ptr<CancelToken> cancel)
      : fn_(fn), user_(user), cancel_(std::move(cancel)) {}
  Progress progress();
  // The status of the call that used it: a callback that threw is its error.
  Status result(Status status) const;

 private:
  bool call(uint64_t done, uint64_t total) noexcept;
  dsv3_progress_fn fn_;
  void* user_;
  std::shared_ptr<CancelToken> cancel_;
  bool threw_ = false;
};

}  // namespace dsv3::api
