#include "runtime/model/convert.h"

#include "runtime/api/handles.h"

using namespace dsv3;       // NOLINT: the C boundary translates between the two
using namespace dsv3::api;  // NOLINT

namespace {
constexpr dsv3_convert_options kConvertDefaults = {.struct_size = sizeof(dsv3_convert_options),
                                                   .weights = DSV3_WEIGHTS_KEEP,
                                                   .overwrite = 0,
                                                   .ffn = DSV3_WEIGHTS_KEEP,
                                                   .progress = nullptr,
                                                   .progress_user = nullptr,
                                                   .cancel = nullptr,
                                                   .experts = DSV3_WEIGHTS_KEEP,
                                                   .head = DSV3_WEIGHTS_KEEP};
}

extern "C" {

void dsv3_convert_options_init(dsv3_convert_options* options, uint32_t struct_size) {
  init_struct(options, struct_size, kConvertDefaults);
}

dsv3_status dsv3_convert(const char* checkpoint_dir, const char* output_path,
                         const dsv3_convert_options* options, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    if (checkpoint_dir == nullptr) return invalid("checkpoint_dir", "checkpoint_dir is NULL");
    if (output_path == nullptr) return invalid("output_path", "output_path is NULL");
    dsv3_convert_options o = kConvertDefaults;
    if (options != nullptr) DSV3_TRY(read_struct(options, "dsv3_convert_options", &o));
    ConvertOptions convert;
    DSV3_TRY(read_weights_mode(o.weights, "weights", false, &convert.weights));
    DSV3_TRY(read_weights_mode(o.ffn, "ffn", true, &convert.ffn));
    DSV3_TRY(read_weights_mode(o.experts, "experts", true, &convert.experts));
    DSV3_TRY(read_weights_mode(o.head, "head", false, &convert.head));
    DSV3_TRY(check_flag_value(o.overwrite, "overwrite"));
    std::shared_ptr<CancelToken> cancel;
    DSV3_TRY(read_cancel(o.cancel, &cancel));
    if (cancel != nullptr && cancel->cancelled.load(std::memory_order_relaxed)) {
      return Status(Code::kCancelled, "the conversion was cancelled before it began", "cancel");
    }
    ProgressCall progress(o.progress, o.progress_user, cancel);
    convert.progress = progress.progress();
    convert.overwrite = o.overwrite == 1;
    const DefaultFloats floats;
    return progress.result(convert_checkpoint(checkpoint_dir, output_path, convert));
  });
}

}  // extern "C"
