// Runs one request and shows it as it comes: text to stdout (reasoning dimmed), or JSON, and the
// speed to stderr. Called by complete, generate and chat.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "common.h"
#include "options.h"

namespace cli {

struct TokenRecord {
  int32_t id = 0;
  float logprob = 0;
  bool reasoning = false;
  std::vector<dsv3_top_token> top;
};

struct Generation {
  std::string text;
  std::string reasoning;
  std::vector<TokenRecord> tokens;
  int32_t finish_reason = 0;
  dsv3_status status = DSV3_OK;
  int32_t stop_token = -1;
  std::string stop_string;
  dsv3_request_statistics statistics = {};
  std::string statistics_json;  // the same as text
};

// Generates after the session's sequence and streams what comes in the form that `output` asks for
// (JSON objects of --json are the caller's, who knows what else belongs in them). Throws Failure
// when the request ends with an error; a cancelled or late one is returned with its partial text.
Generation generate(dsv3_session* session, const dsv3_request_options& options,
                    const OutputOptions& output);

// The result as JSON: text, reasoning, finish_reason, tokens (with log-probabilities if they were
// asked for), statistics.
Json to_json(const dsv3_model* model, const Generation& generation, int32_t logprobs);
const char* finish_name(int32_t reason);

// After the text: log-probabilities, the line with tokens/s, or everything with --stats.
void report(const dsv3_model* model, const dsv3_context* context, const Generation& generation,
            const OutputOptions& output, int32_t logprobs);

// kExitDone, or kExitFailed for a cancelled or late generation.
int exit_code(const Generation& generation);

}  // namespace cli
