// Saving a session's tokens and latents, and loading them into a context of the same model: to a
// file, or through the caller's functions. Bounded memory: a few pages at a time. Blocking; the
// engine's thread only copies pages between its steps.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "runtime/base/status.h"
#include "runtime/cache/snapshot.h"
#include "runtime/engine/callback.h"
#include "runtime/engine/engine.h"
#include "runtime/engine/session.h"

namespace dsv3 {

struct SessionIoOptions {
  // Loading: latents of another kernel set, revision or page layout are left out and computed again
  // when they are needed, instead of being refused.
  bool recompute_foreign = false;
  Progress progress;  // in pages, on the calling thread; false ends the call as cancelled
  std::shared_ptr<CancelToken> cancel;
};

// What was committed when the call began; the session may be used meanwhile.
Status save_session(const Session& session, const WriteBytes& write,
                    const SessionIoOptions& options);
// Atomically (a temporary file that is renamed), mode 0600, replacing what is there.
Status save_session_file(const Session& session, const std::string& path,
                         const SessionIoOptions& options);

// `name` is what errors call the source. `at_end` (may be empty) is asked when everything was read,
// before anyone can find what was loaded.
Result<std::shared_ptr<Session>> load_session(const std::shared_ptr<Engine>& engine,
                                              const std::string& name, const ReadBytes& read,
                                              const SessionIoOptions& options,
                                              const std::function<Status()>& at_end = {});
Result<std::shared_ptr<Session>> load_session_file(const std::shared_ptr<Engine>& engine,
                                                   const std::string& path,
                                                   const SessionIoOptions& options);

}  // namespace dsv3
