#include "generation.h"

#include <cmath>

namespace cli {

namespace {

constexpr const char* kDim = "\033[2m";
constexpr const char* kPlain = "\033[0m";

// Switches the terminal between the answer's and the reasoning's look.
class Streamer {
 public:
  Streamer(const OutputOptions& output, bool terminal) : output_(output), terminal_(terminal) {}

  void text(std::string_view piece, bool reasoning) {
    if (output_.machine() || piece.empty()) return;
    std::string out;
    if (reasoning != reasoning_) {
      // Where there is no colour, a line of its own marks where the reasoning begins and ends.
      if (terminal_) {
        out += reasoning ? kDim : kPlain;
      } else {
        out += reasoning ? "<think>\n" : "\n</think>\n";
      }
      reasoning_ = reasoning;
    }
    out += piece;
    write_out(out);
  }

  void finish() {
    if (reasoning_ && !output_.machine()) write_out(terminal_ ? kPlain : "\n</think>\n");
    reasoning_ = false;
  }

 private:
  const OutputOptions& output_;
  bool terminal_;
  bool reasoning_ = false;
};

Json number_or_null(double value) { return std::isfinite(value) ? Json(value) : Json(); }

std::string statistics_json(const dsv3_request* request) {
  char* text = nullptr;
  call([&](dsv3_error** e) { return dsv3_request_get_statistics_json(request, &text, e); });
  return take_text(text);
}

Json token_json(const TokenRecord& token, int32_t logprobs) {
  if (logprobs < 0) return token.id;
  Json out = {{"id", token.id}, {"logprob", number_or_null(token.logprob)}};
  if (logprobs > 0) {
    Json top = Json::array();
    for (const dsv3_top_token& t : token.top) {
      top.push_back({{"id", t.id}, {"logprob", number_or_null(t.logprob)}});
    }
    out["top"] = std::move(top);
  }
  return out;
}

std::vector<TokenRecord> records_of(const dsv3_event& event) {
  std::vector<TokenRecord> out;
  const auto* bytes = reinterpret_cast<const unsigned char*>(event.tokens);
  for (uint64_t i = 0; i < event.token_count; ++i) {
    const auto& token = *reinterpret_cast<const dsv3_token*>(bytes + i * event.token_stride);
    TokenRecord record;
    record.id = token.id;
    record.logprob = token.logprob;
    record.reasoning = event.kind == DSV3_EVENT_REASONING;
    record.top.assign(token.top, token.top + token.top_count);
    out.push_back(std::move(record));
  }
  return out;
}

Json tokens_json(const std::vector<TokenRecord>& tokens, int32_t logprobs) {
  Json out = Json::array();
  for (const TokenRecord& token : tokens) out.push_back(token_json(token, logprobs));
  return out;
}

Json finish_json(const Generation& g) {
  Json out = {{"finish_reason", finish_name(g.finish_reason)},
              {"status", dsv3_status_name(g.status)}};
  if (g.finish_reason == DSV3_FINISH_STOP_TOKEN) out["stop_token"] = g.stop_token;
  if (g.finish_reason == DSV3_FINISH_STOP_STRING) out["stop_string"] = g.stop_string;
  return out;
}

double per_second(uint64_t count, uint64_t ns) {
  return ns == 0 ? NAN : static_cast<double>(count) * 1e9 / static_cast<double>(ns);
}

}  // namespace

const char* finish_name(int32_t reason) {
  static const char* const kNames[] = {"none",           "stop_token", "stop_string", "max_tokens",
                                       "context_length", "cancelled",  "deadline",    "error"};
  return reason >= 0 && reason < static_cast<int32_t>(std::size(kNames)) ? kNames[reason]
                                                                         : "unknown";
}

Generation generate(dsv3_session* session, const dsv3_request_options& options,
                    const OutputOptions& output) {
  dsv3_request* raw = nullptr;
  call([&](dsv3_error** e) { return dsv3_request_start(session, &options, &raw, e); });
  const Request request(raw);
  Generation result;
  Streamer streamer(output, stdout_is_terminal());
  Progress progress("prompt", Progress::Unit::kTokens);
  for (;;) {
    dsv3_event event = {};
    event.struct_size = sizeof event;
    call([&](dsv3_error** e) {
      return dsv3_request_next(request.get(), DSV3_WAIT_FOREVER, &event, e);
    });
    if (event.kind == DSV3_EVENT_PROGRESS) {
      if (!output.quiet) {
        Progress::callback(&progress, event.prompt_done, event.prompt_total);
      }
      if (output.json_events) {
        write_json({{"event", "progress"},
                    {"prompt_done", event.prompt_done},
                    {"prompt_total", event.prompt_total}});
      }
    } else if (event.kind == DSV3_EVENT_TEXT || event.kind == DSV3_EVENT_REASONING) {
      const bool reasoning = event.kind == DSV3_EVENT_REASONING;
      const std::string_view piece(event.text, event.text_length);
      (reasoning ? result.reasoning : result.text) += piece;
      const std::vector<TokenRecord> tokens = records_of(event);
      result.tokens.insert(result.tokens.end(), tokens.begin(), tokens.end());
      streamer.text(piece, reasoning);
      if (output.json_events) {
        write_json({{"event", reasoning ? "reasoning" : "text"},
                    {"text", piece},
                    {"tokens", tokens_json(tokens, options.logprobs)}});
      }
    } else if (event.kind == DSV3_EVENT_FINISHED) {
      streamer.finish();
      result.finish_reason = event.finish_reason;
      result.status = event.status;
      result.stop_token = event.stop_token;
      result.stop_string = event.stop_string;
      if (event.statistics != nullptr) result.statistics = *event.statistics;
      result.statistics_json = statistics_json(request.get());
      if (event.finish_reason == DSV3_FINISH_ERROR) {
        throw Failure(event.error_message, event.status, event.error_field,
                      event.error_retryable == 1);
      }
      if (output.json_events) {
        Json line = {{"event", "finished"}};
        line.update(finish_json(result));
        line["statistics"] = Json::parse(result.statistics_json);
        write_json(line);
      }
      return result;
    }
  }
}

Json to_json(const dsv3_model* model, const Generation& g, int32_t logprobs) {
  Json out = {{"text", g.text}};
  if (!g.reasoning.empty()) out["reasoning"] = g.reasoning;
  out.update(finish_json(g));
  out["tokens"] = tokens_json(g.tokens, logprobs);
  if (logprobs >= 0) {
    for (size_t i = 0; i < g.tokens.size(); ++i) {
      out["tokens"][i]["text"] = detokenize(model, &g.tokens[i].id, 1, 0);
    }
  }
  out["statistics"] = Json::parse(g.statistics_json);
  return out;
}

void report(const dsv3_model* model, const dsv3_context* context, const Generation& g,
            const OutputOptions& output, int32_t logprobs) {
  if (logprobs >= 0 && !output.machine()) {
    std::string table = "token      logprob  text and the best alternatives\n";
    for (const TokenRecord& token : g.tokens) {
      const auto quoted = [&](int32_t id) {
        return Json(detokenize(model, &id, 1, 0))
            .dump(-1, ' ', false, Json::error_handler_t::replace);
      };
      table += format("%7d  %9.4f  %s", token.id, static_cast<double>(token.logprob),
                      quoted(token.id).c_str());
      for (const dsv3_top_token& t : token.top) {
        table += format("  %s %.4f", quoted(t.id).c_str(), static_cast<double>(t.logprob));
      }
      table += "\n";
    }
    write_err(table);
  }
  const dsv3_request_statistics& s = g.statistics;
  const uint64_t computed = s.prompt_tokens - s.cached_tokens;
  const uint64_t decoded = s.generated_tokens == 0 ? 0 : s.generated_tokens - 1;
  if (!output.quiet) {
    write_err(format(
        "prompt: %s tokens at %s tokens/s%s; decode: %s tokens at %s tokens/s; %s\n",
        human_count(s.prompt_tokens).c_str(),
        human_rate(per_second(computed, s.prefill_ns)).c_str(),
        s.cached_tokens == 0 ? ""
                             : format(" (%s cached)", human_count(s.cached_tokens).c_str()).c_str(),
        human_count(s.generated_tokens).c_str(),
        human_rate(per_second(decoded, s.decode_ns)).c_str(), finish_name(g.finish_reason)));
  }
  if (output.stats) {
    dsv3_context_info info = {};
    info.struct_size = sizeof info;
    call([&](dsv3_error** e) { return dsv3_context_get_info(context, &info, e); });
    const auto ms = [](uint64_t ns) { return static_cast<double>(ns) / 1e6; };
    write_err(format(
        "first token %.2f ms, queue %.2f ms, prefill %.2f ms, decode %.2f ms, total %.2f ms\n"
        "steps %s, drafted %s, accepted %s, saved %.2f ms; kernels %s, %d threads, allocator %s, "
        "bit-identical: %s\n"
        "cache: %s of %s pages of %d tokens (%s each)\n",
        ms(s.first_token_ns), ms(s.queue_ns), ms(s.prefill_ns), ms(s.decode_ns), ms(s.total_ns),
        human_count(s.decode_steps).c_str(), human_count(s.drafted_tokens).c_str(),
        human_count(s.accepted_tokens).c_str(), static_cast<double>(s.speculation_saved_ns) / 1e6,
        info.kernels, info.threads, info.allocator, info.bit_identical != 0 ? "yes" : "no",
        human_count(info.pages_used).c_str(), human_count(info.pages).c_str(), info.page_tokens,
        human_bytes(info.page_bytes).c_str()));
  }
}

int exit_code(const Generation& g) {
  return g.finish_reason == DSV3_FINISH_CANCELLED || g.finish_reason == DSV3_FINISH_DEADLINE
             ? kExitFailed
             : kExitDone;
}

}  // namespace cli
