#include "runtime/engine/session_io.h"

#include <algorithm>
#include <utility>

#include "kernels/kernels.h"
#include "runtime/base/os.h"

namespace dsv3 {
namespace {

// What one errand to the engine's thread copies: little, so that steps of others wait little and
// memory stays small; but a page per errand would wait for a step of theirs each.
constexpr uint64_t kCopyBytes = 4 << 20;

uint64_t pages_at_once(const LatentIdentity& identity) {
  return std::max<uint64_t>(1, kCopyBytes / identity.page_bytes);
}

Status cancelled() { return Status(Code::kCancelled, "cancelled by its cancel token", "cancel"); }

Status check_cancel(const SessionIoOptions& options) {
  if (options.cancel == nullptr || !options.cancel->cancelled.load(std::memory_order_relaxed)) {
    return {};
  }
  return cancelled();
}

Status report(const SessionIoOptions& options, uint64_t done, uint64_t total) {
  return !options.progress || options.progress(done, total) ? Status() : cancelled();
}

}  // namespace

Status save_session(const Session& session, const WriteBytes& write,
                    const SessionIoOptions& options) {
  Engine& engine = *session.engine();
  DSV3_ASSIGN(const std::shared_ptr<Session> copy, session.fork());
  const Session::Pin pin(copy.get());
  Session::State& state = copy->state();
  const LatentIdentity identity = engine.latent_identity();
  SnapshotContent content;
  content.tokens = state.tokens;
  content.computed = static_cast<uint64_t>(state.computed);
  content.reasoning = copy->reasoning();

  const uint64_t pages = snapshot_pages(identity, content);
  const uint64_t batch = std::min(pages, pages_at_once(identity));
  std::vector<std::byte> buffer(static_cast<size_t>(batch * identity.page_bytes));
  uint64_t begin = 0, end = 0;  // pages in the buffer
  const auto next_page = [&](uint64_t index) -> Result<std::span<const std::byte>> {
    DSV3_TRY(check_cancel(options));
    if (index >= end) {
      begin = index;
      end = std::min(pages, index + batch);
      DSV3_TRY(engine.between_steps([&](kernels::Device* device) -> Status {
        for (uint64_t i = begin; i < end; ++i) {
          device->download(buffer.data() + (i - begin) * identity.page_bytes, state.table.data()[i],
                           static_cast<size_t>(identity.page_bytes));
        }
        return device->synchronize();
      }));
    }
    DSV3_TRY(report(options, index + 1, pages));
    return std::span<const std::byte>(buffer).subspan(
        static_cast<size_t>((index - begin) * identity.page_bytes),
        static_cast<size_t>(identity.page_bytes));
  };
  return write_snapshot(identity, content, write, next_page);
}

Status save_session_file(const Session& session, const std::string& path,
                         const SessionIoOptions& options) {
  DSV3_ASSIGN(AtomicFile file, AtomicFile::create(path, 0600));
  uint64_t offset = 0;
  const WriteBytes write = [&](const void* bytes, size_t size) -> Status {
    DSV3_TRY(file.write_at(offset, bytes, size));
    offset += size;
    return {};
  };
  DSV3_TRY(save_session(session, write, options));
  return file.commit();
}

Result<std::shared_ptr<Session>> load_session(const std::shared_ptr<Engine>& engine,
                                              const std::string& name, const ReadBytes& read,
                                              const SessionIoOptions& options,
                                              const std::function<Status()>& at_end) {
  DSV3_TRY(engine->check_process());
  const LatentIdentity identity = engine->latent_identity();
  const auto longest = static_cast<uint64_t>(engine->model().config().max_position_embeddings);
  SnapshotContent content;
  DSV3_TRY(read_snapshot(identity, name, longest, options.recompute_foreign, read, &content));
  if (const Status status = engine->check_tokens(content.tokens, 0); !status.ok()) {
    return make_field_error(Code::kCorrupt, "tokens", "%s: %s", name.c_str(),
                            status.message().c_str());
  }
  DSV3_TRY(engine->check_fits(static_cast<int64_t>(content.computed)));
  DSV3_ASSIGN(std::shared_ptr<Session> session, engine->create_session());
  const Session::Pin pin(session.get());

  if (!content.tokens_only) {
    const uint64_t pages = snapshot_pages(identity, content);
    const uint64_t batch = std::min(pages, pages_at_once(identity));
    std::vector<std::byte> buffer(static_cast<size_t>(batch * identity.page_bytes));
    const auto store = [&](uint64_t begin, uint64_t end) -> Status {
      const auto upload = [&](kernels::Device* device) -> Status {
        DSV3_TRY(engine->reserve_positions(session.get(),
                                           static_cast<int64_t>(begin) * identity.page_tokens,
                                           static_cast<int64_t>(end) * identity.page_tokens));
        for (uint64_t i = begin; i < end; ++i) {
          device->upload(session->state().table.data()[i],
                         buffer.data() + (i - begin) * identity.page_bytes,
                         static_cast<size_t>(identity.page_bytes));
        }
        return device->synchronize();
      };
      DSV3_TRY(engine->between_steps(upload));
      return report(options, end, pages);
    };
    const ReadBytes checked_read = [&](void* bytes, size_t size) -> Status {
      DSV3_TRY(check_cancel(options));
      return read(bytes, size);
    };
    DSV3_TRY(read_snapshot_pages(identity, name, content, checked_read, buffer, store));
    if (at_end) DSV3_TRY(at_end());
  }

  const std::lock_guard lock(engine->mutex());
  session->state().tokens = std::move(content.tokens);
  session->state().computed = static_cast<int64_t>(content.computed);
  session->set_reasoning(content.reasoning);
  session->publish();
  engine->session_loaded(session.get());
  return session;
}

Result<std::shared_ptr<Session>> load_session_file(const std::shared_ptr<Engine>& engine,
                                                   const std::string& path,
                                                   const SessionIoOptions& options) {
  DSV3_ASSIGN(const File file, File::open(path));
  uint64_t offset = 0;
  const ReadBytes read = [&](void* bytes, size_t size) -> Status {
    if (size > file.size() - offset) {
      return make_error(
          Code::kCorrupt,
          "%s: ends at byte %llu, expected at least %llu: the saved session is cut off",
          path.c_str(), static_cast<unsigned long long>(file.size()),
          static_cast<unsigned long long>(offset + size));
    }
    DSV3_TRY(file.read_at(offset, bytes, size));
    offset += size;
    return {};
  };
  const auto at_end = [&]() -> Status {
    if (offset == file.size()) return {};
    return make_error(Code::kCorrupt, "%s: has %llu bytes after its end", path.c_str(),
                      static_cast<unsigned long long>(file.size() - offset));
  };
  // Once for its checksums alone: others give pages up for what is whole, and for nothing else.
  DSV3_TRY(engine->check_process());
  const LatentIdentity identity = engine->latent_identity();
  const auto longest = static_cast<uint64_t>(engine->model().config().max_position_embeddings);
  SnapshotContent content;
  DSV3_TRY(read_snapshot(identity, path, longest, options.recompute_foreign, read, &content));
  if (!content.tokens_only) {
    std::vector<std::byte> page(static_cast<size_t>(identity.page_bytes));
    const auto look = [&](uint64_t, uint64_t) { return check_cancel(options); };
    DSV3_TRY(read_snapshot_pages(identity, path, content, read, page, look));
    DSV3_TRY(at_end());
  }
  offset = 0;
  return load_session(engine, path, read, options, at_end);
}

}  // namespace dsv3
