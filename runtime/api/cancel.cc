#include "runtime/api/handles.h"

namespace dsv3::api {

Status read_cancel(const dsv3_cancel* cancel, std::shared_ptr<CancelToken>* out) {
  if (cancel == nullptr) return {};
  DSV3_TRY(check_handle(cancel, "cancel"));
  *out = cancel->token;
  return {};
}

}  // namespace dsv3::api

using namespace dsv3;       // NOLINT: the C boundary translates between the two
using namespace dsv3::api;  // NOLINT

extern "C" {

dsv3_status dsv3_cancel_create(dsv3_cancel** out, dsv3_error** error) {
  // Allowed everywhere, but for the sake of one rule: callbacks get none of the fallible functions.
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_out(out, "out"));
    *out = new dsv3_cancel;
    return {};
  });
}

void dsv3_cancel_set(dsv3_cancel* cancel) {
  if (!is_live(cancel)) return;
  cancel->token->cancelled.store(true, std::memory_order_relaxed);
}

int32_t dsv3_cancel_is_set(const dsv3_cancel* cancel) {
  if (!is_live(cancel)) return 0;
  return cancel->token->cancelled.load(std::memory_order_relaxed) ? 1 : 0;
}

void dsv3_cancel_free(dsv3_cancel* cancel) { free_handle(cancel, dsv3_cancel::kMagic); }

}  // extern "C"
