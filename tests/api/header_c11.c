/* dsv3.h as a C11 host sees it. header_test.cc compares what C++ sees. */
#include <stddef.h>

#include "include/dsv3.h"
#include "include/dsv3.h" /* a second inclusion changes nothing */

#define SIZE(type) sizeof(type)
const size_t dsv3_c11_sizes[] = {SIZE(dsv3_model_options),
                                 SIZE(dsv3_model_info),
                                 SIZE(dsv3_tool_call),
                                 SIZE(dsv3_message),
                                 SIZE(dsv3_chat),
                                 SIZE(dsv3_context_options),
                                 SIZE(dsv3_context_info),
                                 SIZE(dsv3_memory_estimate),
                                 SIZE(dsv3_context_statistics),
                                 SIZE(dsv3_evaluation),
                                 SIZE(dsv3_logit_bias),
                                 SIZE(dsv3_request_options),
                                 SIZE(dsv3_top_token),
                                 SIZE(dsv3_token),
                                 SIZE(dsv3_request_statistics),
                                 SIZE(dsv3_event),
                                 SIZE(dsv3_convert_options),
                                 SIZE(dsv3_benchmark_options),
                                 SIZE(dsv3_session_io)};
const size_t dsv3_c11_offsets[] = {
    offsetof(dsv3_model_info, fingerprint), offsetof(dsv3_request_options, notify_user),
    offsetof(dsv3_event, prompt_total), offsetof(dsv3_evaluation, cancel)};

/* Every struct of the API begins with its size. */
_Static_assert(offsetof(dsv3_model_options, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_model_info, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_tool_call, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_message, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_chat, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_context_options, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_context_info, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_memory_estimate, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_evaluation, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_request_options, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_request_statistics, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_event, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_convert_options, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_benchmark_options, struct_size) == 0, "");
_Static_assert(offsetof(dsv3_session_io, struct_size) == 0, "");
