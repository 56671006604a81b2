// The handles' contents. Each keeps alive what it needs through shared_ptr, so that handles may be
// freed in any order.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "runtime/api/boundary.h"
#include "runtime/engine/complete.h"
#include "runtime/engine/engine.h"
#include "runtime/engine/request.h"
#include "runtime/engine/session.h"
#include "runtime/model/model.h"

struct dsv3_cancel final : dsv3::api::HandleBase {
  static constexpr uint32_t kMagic = 0xD53C0001;
  dsv3_cancel() : HandleBase(kMagic), token(std::make_shared<dsv3::CancelToken>()) {}
  const std::shared_ptr<dsv3::CancelToken> token;
};

struct dsv3_model final : dsv3::api::HandleBase {
  static constexpr uint32_t kMagic = 0xD53C0002;
  dsv3_model() : HandleBase(kMagic) {}
  std::shared_ptr<const dsv3::Model> model;
};

struct dsv3_context final : dsv3::api::HandleBase {
  static constexpr uint32_t kMagic = 0xD53C0003;
  dsv3_context() : HandleBase(kMagic) {}
  ~dsv3_context() override;
  bool close() noexcept override;
  std::shared_ptr<dsv3::Engine> engine;
  std::shared_ptr<dsv3::Completer> completer;
};

struct dsv3_session final : dsv3::api::HandleBase {
  static constexpr uint32_t kMagic = 0xD53C0004;
  dsv3_session() : HandleBase(kMagic) {}
  bool close() noexcept override;
  std::shared_ptr<dsv3::Session> session;
};

struct dsv3_request final : dsv3::api::HandleBase {
  static constexpr uint32_t kMagic = 0xD53C0005;
  dsv3_request() : HandleBase(kMagic) {}
  bool close() noexcept override;
  std::shared_ptr<dsv3::Request> request;
  // What the last event points to.
  dsv3::Event event;
  std::vector<dsv3_token> tokens;
  std::vector<dsv3_top_token> top;
  dsv3_request_statistics statistics = {};
};

namespace dsv3::api {

// Null stays null.
Status read_cancel(const dsv3_cancel* cancel, std::shared_ptr<CancelToken>* out);
Status read_request_options(const dsv3_request_options* options, RequestOptions* out);
Status read_context_options(const dsv3_context_options* options, EngineOptions* out);
Status read_chat(const dsv3_chat* chat, std::vector<ChatMessage>* messages, ChatOptions* options);
dsv3_request_statistics translate(const RequestStatistics& s);

}  // namespace dsv3::api
