#include "runtime/api/boundary.h"

#include <cstdlib>

namespace dsv3::api {

Status check_struct_size(const char* name, uint32_t size, size_t alignment) {
  // The smallest struct there ever was has struct_size and one more field.
  if (size >= 2 * sizeof(uint32_t) && size <= kMaxStructSize && size % alignment == 0) return {};
  return Status(
      Code::kInvalidArgument,
      format("%s.struct_size is %u, expected sizeof(%s), which the struct's init function "
             "sets where it has one",
             name, size, name),
      "struct_size");
}

Status check_array(const void* array, uint64_t count, uint32_t stride, size_t least_stride,
                   size_t alignment, const char* name) {
  if (count == 0) return {};
  if (array == nullptr) {
    return invalid(name, format("%s is NULL with a count of %llu", name,
                                static_cast<unsigned long long>(count)));
  }
  if (stride != 0 &&
      (stride < least_stride || stride > kMaxStructSize || stride % alignment != 0)) {
    return invalid(name, format("the stride of %s is %u, expected 0 or at least %zu", name, stride,
                                least_stride));
  }
  return {};
}

Status read_text(const char* text, uint64_t length, const char* name, std::string_view* out) {
  if (text == nullptr) {
    if (length != 0) return invalid(name, std::string(name) + " is NULL");
    *out = {};
    return {};
  }
  if (length == DSV3_NUL_TERMINATED) length = std::strlen(text);
  if (length > INT32_MAX) {
    return invalid(name, format("the length of %s is %llu, expected at most %d", name,
                                static_cast<unsigned long long>(length), INT32_MAX));
  }
  *out = std::string_view(text, static_cast<size_t>(length));
  return {};
}

Status read_tokens_argument(const int32_t* tokens, uint64_t count, const char* name) {
  if (count > INT32_MAX) {
    return invalid("count", format("count is %llu, expected at most %d",
                                   static_cast<unsigned long long>(count), INT32_MAX));
  }
  if (tokens == nullptr && count != 0) return invalid(name, std::string(name) + " is NULL");
  return {};
}

Status check_flags(uint32_t flags, uint32_t known) {
  if ((flags & ~known) == 0) return {};
  return Status(Code::kUnsupported,
                format("flags is 0x%x, expected none but 0x%x here", flags, known), "flags");
}

Status check_flag_value(int32_t value, const char* name) {
  if (value == 0 || value == 1) return {};
  return invalid(name, format("%s is %d, expected 0 or 1", name, value));
}

Status read_weights_mode(int32_t value, const char* name, bool mxfp4, WeightsMode* out) {
  if (value < DSV3_WEIGHTS_KEEP || value > (mxfp4 ? DSV3_WEIGHTS_MXFP4 : DSV3_WEIGHTS_FP8)) {
    return invalid(
        name, format("%s is %d, expected DSV3_WEIGHTS_KEEP%s", name, value,
                     mxfp4 ? ", DSV3_WEIGHTS_FP8 or DSV3_WEIGHTS_MXFP4" : " or DSV3_WEIGHTS_FP8"));
  }
  *out = static_cast<WeightsMode>(value);
  return {};
}

Status check_buffer(const void* buffer, uint64_t capacity, const uint64_t* needed) {
  if (buffer == nullptr && capacity != 0) {
    return invalid("buffer", format("buffer is NULL with a capacity of %llu",
                                    static_cast<unsigned long long>(capacity)));
  }
  if (capacity == 0 && needed == nullptr) {
    return invalid("needed", "capacity is 0 and needed is NULL: nothing is asked for");
  }
  return {};
}

Status buffer_too_small(uint64_t needed, uint64_t capacity) {
  return Status(Code::kBufferTooSmall,
                format("capacity is %llu, needed %llu", static_cast<unsigned long long>(capacity),
                       static_cast<unsigned long long>(needed)),
                "capacity");
}

Status fill_text(std::string_view text, char* buffer, uint64_t capacity, uint64_t* needed) {
  if (needed != nullptr) *needed = text.size();
  if (capacity == 0) return {};
  if (capacity < text.size()) return buffer_too_small(text.size(), capacity);
  if (!text.empty()) std::memcpy(buffer, text.data(), text.size());
  if (capacity > text.size()) buffer[text.size()] = '\0';
  return {};
}

char* new_string(std::string_view text) {
  auto* copy = static_cast<char*>(std::malloc(text.size() + 1));
  if (copy == nullptr) throw std::bad_alloc();
  if (!text.empty()) std::memcpy(copy, text.data(), text.size());
  copy[text.size()] = '\0';
  return copy;
}

bool ProgressCall::call(uint64_t done, uint64_t total) noexcept {
  if (fn_ != nullptr) {
    try {
      const CallbackScope scope;
      fn_(user_, done, total);
    } catch (...) {
      threw_ = true;
      return false;
    }
  }
  return cancel_ == nullptr || !cancel_->cancelled.load(std::memory_order_relaxed);
}

Progress ProgressCall::progress() {
  if (fn_ == nullptr && cancel_ == nullptr) return {};
  return [this](uint64_t done, uint64_t total) { return call(done, total); };
}

Status ProgressCall::result(Status status) const {
  if (!threw_) return status;
  return invalid("progress", "the progress callback threw an exception");
}

}  // namespace dsv3::api
