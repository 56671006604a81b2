// Sessions that survive: saved to files and through functions, loaded again, and what is damaged or
// of somebody else refused without a trace.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <thread>
#include <utility>

#include "tests/api/outcome_support.h"
#include "tests/api/request_support.h"

using namespace dsv3::test;            // NOLINT
using namespace dsv3::test::requests;  // NOLINT

namespace {

struct Bytes {
  std::string data;
  size_t at = 0;
  size_t limit = SIZE_MAX;  // after so many bytes the function fails
};

dsv3_status write_bytes_fn(void* user, const void* bytes, uint64_t size) {
  auto* out = static_cast<Bytes*>(user);
  if (out->data.size() + size > out->limit) return DSV3_E_IO;
  out->data.append(static_cast<const char*>(bytes), size);
  return DSV3_OK;
}
dsv3_status read_bytes_fn(void* user, void* bytes, uint64_t size) {
  auto* in = static_cast<Bytes*>(user);
  if (size > in->data.size() - in->at) return DSV3_E_CORRUPT;
  std::memcpy(bytes, in->data.data() + in->at, size);
  in->at += size;
  return DSV3_OK;
}

dsv3_session_io io_for(Bytes* bytes) {
  dsv3_session_io io;
  dsv3_session_io_init(&io, sizeof io);
  io.write = write_bytes_fn;
  io.read = read_bytes_fn;
  io.user = bytes;
  return io;
}
dsv3_session_io saving(Bytes* bytes) {
  dsv3_session_io io = io_for(bytes);
  io.read = nullptr;
  return io;
}
dsv3_session_io loading(Bytes* bytes) {
  dsv3_session_io io = io_for(bytes);
  io.write = nullptr;
  return io;
}

SessionHandle load(dsv3_context* context, const dsv3_session_io& io, Error* error) {
  dsv3_session* session = nullptr;
  dsv3_session_load(context, &io, &session, error->out());
  return SessionHandle(session);
}

uint64_t pages_used(dsv3_context* context) {
  dsv3_context_info info;
  info.struct_size = sizeof info;
  REQUIRE(dsv3_context_get_info(context, &info, nullptr) == DSV3_OK);
  return info.pages_used;
}

// Room for so many pages of latents, and no prefix is kept.
ContextHandle context_of_pages(dsv3_model* model, uint64_t pages) {
  dsv3_context_info info;
  info.struct_size = sizeof info;
  REQUIRE(dsv3_context_get_info(shared().context.get(), &info, nullptr) == DSV3_OK);
  return make_context(model, {.cache_bytes = pages * info.page_bytes, .prefix_cache = 0});
}

dsv3_request_options sampled(int32_t tokens) {
  dsv3_request_options options = request_options();
  options.max_tokens = static_cast<uint64_t>(tokens);
  options.temperature = 0.9f;
  options.seed = 77;
  options.ignore_eos = 1;
  options.logprobs = 0;
  options.presence_penalty = 0.3f;
  return options;
}

// A session that has generated, saved; and what it would generate next.
struct Saved {
  Bytes bytes;
  Outcome next;
  std::vector<int32_t> tokens;
  uint64_t computed = 0;
};
Saved saved_session(size_t prompt) {
  Saved s;
  const SessionHandle session = session_with(prompt);
  (void)generate(session.get(), sampled(10));
  const dsv3_session_io io = saving(&s.bytes);
  Error error;
  REQUIRE_MESSAGE(dsv3_session_save(session.get(), &io, error.out()) == DSV3_OK, error.message());
  s.tokens = tokens_of(session.get());
  s.computed = dsv3_session_computed(session.get());
  s.next = generate(session.get(), sampled(20));
  return s;
}

}  // namespace

TEST_CASE("a loaded session continues bit for bit, in this context and in a new one") {
  for (const size_t prompt : {5, 64, 200}) {
    CAPTURE(prompt);
    Saved s = saved_session(prompt);
    const ModelHandle model = open_model();
    const ContextHandle fresh = make_context(model.get(), {.threads = 2, .prefill_chunk = 32});
    for (dsv3_context* context : {shared().context.get(), fresh.get()}) {
      s.bytes.at = 0;
      Error error;
      const SessionHandle session = load(context, loading(&s.bytes), &error);
      REQUIRE_MESSAGE(session != nullptr, error.message());
      CHECK(tokens_of(session.get()) == s.tokens);
      CHECK(dsv3_session_computed(session.get()) == s.computed);
      const Outcome next = generate(session.get(), sampled(20));
      check_same(next, s.next);
      CHECK(next.statistics.cached_tokens >= s.computed - 1);
    }
  }
}

TEST_CASE("files: atomic, private, replaced whole") {
  const TemporaryFolder folder;
  const std::string path = folder.file("a.session");
  const SessionHandle session = session_with(100);
  (void)generate(session.get(), sampled(5));
  Error error;
  dsv3_session_io io = io_for(path);
  dsv3::test::write_bytes(path, "an older one");
  ::chmod(path.c_str(), 0644);
  REQUIRE(dsv3_session_save(session.get(), &io, error.out()) == DSV3_OK);
  struct stat st;
  REQUIRE(::stat(path.c_str(), &st) == 0);
  CHECK((st.st_mode & 0777) == 0600);
  const SessionHandle loaded = load(shared().context.get(), io, &error);
  REQUIRE_MESSAGE(loaded != nullptr, error.message());
  CHECK(tokens_of(loaded.get()) == tokens_of(session.get()));

  // What follows the end, or is missing there, is no snapshot.
  const std::string good = read_bytes(path);
  dsv3::test::write_bytes(path, good.substr(0, good.size() - 1));
  CHECK(load(shared().context.get(), io, &error) == nullptr);
  CHECK(error.status() == DSV3_E_CORRUPT);
  CHECK(error.message().find(path) == 0);
  dsv3::test::write_bytes(path, good + "x");
  const ContextHandle fresh = make_context(shared().model.get());
  CHECK(load(fresh.get(), io, &error) == nullptr);
  CHECK(error.status() == DSV3_E_CORRUPT);
  const SessionHandle same = make_session(fresh.get());
  append(same.get(), tokens_of(session.get()));
  CHECK(generate(same.get(), sampled(1)).statistics.cached_tokens == 0);  // nothing was kept of it

  const std::string nowhere = folder.file("no/such.session");
  io = io_for(nowhere);
  CHECK(dsv3_session_save(session.get(), &io, error.out()) == DSV3_E_NOT_FOUND);
  CHECK(load(shared().context.get(), io, &error) == nullptr);
  CHECK(error.status() == DSV3_E_NOT_FOUND);
}

TEST_CASE("a session without latents survives too, and one that is computed again elsewhere") {
  const TemporaryFolder folder;
  const ModelHandle model = open_model();
  const ContextHandle fresh = make_context(model.get());
  const ContextHandle other = make_context(model.get(), {.kernels = "ref"});
  const std::string path = folder.file("a.session");
  Error error;
  for (const int kind : {0, 1, 2}) {
    CAPTURE(kind);
    // Empty, not computed yet (or its pages were given to others), computed.
    const SessionHandle session = kind == 0 ? make_session(fresh.get()) : session_with(100);
    if (kind == 2) (void)generate(session.get(), sampled(5));
    dsv3_session_io io = io_for(path);
    REQUIRE(dsv3_session_save(session.get(), &io, error.out()) == DSV3_OK);
    for (const uint32_t flags : {0U, DSV3_SESSION_RECOMPUTE_FOREIGN}) {
      io.flags = flags;
      const SessionHandle loaded = load(fresh.get(), io, &error);
      REQUIRE_MESSAGE(loaded != nullptr, error.message());
      CHECK(tokens_of(loaded.get()) == tokens_of(session.get()));
      CHECK(dsv3_session_computed(loaded.get()) == dsv3_session_computed(session.get()));
    }
    const SessionHandle again = load(other.get(), io, &error);
    REQUIRE_MESSAGE(again != nullptr, error.message());
    CHECK(tokens_of(again.get()) == tokens_of(session.get()));
    CHECK(dsv3_session_computed(again.get()) == 0);
    // All that a function is asked for is all that was written.
    Bytes bytes{read_bytes(path)};
    const SessionHandle read = load(fresh.get(), loading(&bytes), &error);
    REQUIRE_MESSAGE(read != nullptr, error.message());
    CHECK(bytes.at == bytes.data.size());
    bytes.data.back() = static_cast<char>(bytes.data.back() ^ 1);
    bytes.at = 0;
    CHECK(load(fresh.get(), loading(&bytes), &error) == nullptr);
    CHECK(error.status() == DSV3_E_CORRUPT);
  }
}

TEST_CASE("what was loaded or forked just now is not the first to lose its pages") {
  const ModelHandle model = open_model();
  const ContextHandle small = context_of_pages(model.get(), 12);
  Bytes bytes{saved_session(240).bytes.data};
  dsv3_request_options warm = request_options();
  warm.max_tokens = 0;
  for (const bool forked : {false, true}) {
    CAPTURE(forked);
    const SessionHandle old = session_with(250, small.get());  // four pages
    SessionHandle recent;
    Error error;
    if (forked) {
      SessionHandle parent = session_with(250, small.get());
      (void)generate(parent.get(), warm);
      (void)generate(old.get(), warm);
      recent = fork_session(parent.get());
      parent.reset();
    } else {
      (void)generate(old.get(), warm);
      bytes.at = 0;
      recent = load(small.get(), loading(&bytes), &error);
    }
    REQUIRE_MESSAGE(recent != nullptr, error.message());
    const SessionHandle next = session_with(350, small.get());  // six pages of four that are left
    (void)generate(next.get(), warm);
    CHECK(dsv3_session_computed(old.get()) == 0);
    CHECK(dsv3_session_computed(recent.get()) > 240);
  }
}

TEST_CASE("saving and loading do not wait for whole steps of background work") {
  const ModelHandle model = open_model();
  const ContextHandle context = make_context(model.get(), {.prefix_cache = 0});
  Bytes bytes{saved_session(900).bytes.data};  // 15 pages
  const SessionHandle long_one = session_with(1900, context.get());
  dsv3_request_options options = request_options();
  options.max_tokens = 1;
  options.priority = DSV3_PRIORITY_BACKGROUND;
  const RequestHandle background = start(long_one.get(), options);
  while (dsv3_session_computed(long_one.get()) == 0) std::this_thread::yield();
  // A page at a time. Waiting for a step each time it would be done after the background is, which
  // has seven left.
  Error error;
  const SessionHandle loaded = load(context.get(), loading(&bytes), &error);
  REQUIRE_MESSAGE(loaded != nullptr, error.message());
  CHECK(dsv3_session_computed(long_one.get()) < 1900);
  const SessionHandle alone = session_with(1900);
  CHECK(finish(background.get()).tokens == generate(alone.get(), options).tokens);
}

TEST_CASE("damaged and foreign snapshots are refused and change nothing") {
  const Saved s = saved_session(100);
  const ModelHandle model = open_model();
  const ContextHandle fresh = make_context(model.get());
  Error error;
  for (size_t i = 0; i < s.bytes.data.size(); i += 997) {
    Bytes bad{s.bytes.data};
    bad.data[i] = static_cast<char>(bad.data[i] ^ 16);
    CAPTURE(i);
    CHECK(load(fresh.get(), loading(&bad), &error) == nullptr);
    CHECK((error.status() == DSV3_E_CORRUPT || error.status() == DSV3_E_UNSUPPORTED));
    CHECK(pages_used(fresh.get()) == 0);
  }
  // Another kernel set: refused, or computed again.
  const ContextHandle other = make_context(model.get(), {.kernels = "ref"});
  Bytes bytes{s.bytes.data};
  CHECK(load(other.get(), loading(&bytes), &error) == nullptr);
  CHECK(error.status() == DSV3_E_UNSUPPORTED);
  CHECK(error.field() == "kernels");
  bytes.at = 0;
  dsv3_session_io io = loading(&bytes);
  io.flags = DSV3_SESSION_RECOMPUTE_FOREIGN;
  const SessionHandle session = load(other.get(), io, &error);
  REQUIRE_MESSAGE(session != nullptr, error.message());
  CHECK(dsv3_session_computed(session.get()) == 0);
  CHECK(tokens_of(session.get()) == s.tokens);
}

TEST_CASE("a damaged file costs nobody pages; a whole one is worth an idle session's") {
  const TemporaryFolder folder;
  const std::string path = folder.file("s.session");
  const std::string whole = saved_session(240).bytes.data;  // four pages
  const ModelHandle model = open_model();
  const ContextHandle small = context_of_pages(model.get(), 6);
  const SessionHandle idle = session_with(250, small.get());
  dsv3_request_options warm = request_options();
  warm.max_tokens = 0;
  (void)generate(idle.get(), warm);
  const uint64_t computed = dsv3_session_computed(idle.get());
  REQUIRE(computed > 240);
  dsv3_session_io io;
  dsv3_session_io_init(&io, sizeof io);
  io.path = path.c_str();
  std::string damaged = whole;
  damaged[whole.size() - 100] ^= 1;  // in the last page
  for (const std::string& bad : {damaged, whole.substr(0, whole.size() - 4), whole + "x"}) {
    dsv3::test::write_bytes(path, bad);
    Error error;
    CHECK(load(small.get(), io, &error) == nullptr);
    CHECK(error.status() == DSV3_E_CORRUPT);
    CHECK(error.message().find(path) != std::string::npos);
    CHECK(dsv3_session_computed(idle.get()) == computed);
  }
  dsv3::test::write_bytes(path, whole);
  Error error;
  const SessionHandle loaded = load(small.get(), io, &error);
  REQUIRE_MESSAGE(loaded != nullptr, error.message());
  CHECK(dsv3_session_computed(idle.get()) == 0);

  // Nor does one cost anything that a whole cache is too small for.
  const ContextHandle smaller = context_of_pages(model.get(), 3);
  const SessionHandle other = session_with(100, smaller.get());
  (void)generate(other.get(), warm);
  CHECK(load(smaller.get(), io, &error) == nullptr);
  CHECK(error.status() == DSV3_E_CAPACITY);
  CHECK(error.field() == "cache_bytes");
  CHECK_FALSE(error.retryable());
  CHECK(dsv3_session_computed(other.get()) > 90);
}

TEST_CASE("a session that is being saved keeps its pages, whoever needs some") {
  const ModelHandle model = open_model();
  const ContextHandle small = context_of_pages(model.get(), 8);
  const SessionHandle session = session_with(250, small.get());  // four pages
  const SessionHandle other = session_with(350, small.get());    // six
  dsv3_request_options warm = request_options();
  warm.max_tokens = 0;
  (void)generate(session.get(), warm);
  Bytes undisturbed;
  dsv3_session_io io = saving(&undisturbed);
  REQUIRE(dsv3_session_save(session.get(), &io, nullptr) == DSV3_OK);

  struct Host {
    Bytes bytes;
    std::function<void()> meanwhile;
  } host;
  Outcome outcome;
  host.meanwhile = [&] {  // on another thread: a callback may not
    std::thread([&] { outcome = generate(other.get(), warm); }).join();
  };
  io.user = &host;
  io.write = [](void* user, const void* bytes, uint64_t size) {
    auto* h = static_cast<Host*>(user);
    if (h->bytes.data.empty()) h->meanwhile();
    return write_bytes_fn(&h->bytes, bytes, size);
  };
  REQUIRE(dsv3_session_save(session.get(), &io, nullptr) == DSV3_OK);
  CHECK(host.bytes.data == undisturbed.data);
  CHECK(outcome.status == DSV3_E_CAPACITY);
  CHECK(outcome.error_retryable);
  CHECK(generate(other.get(), warm).reason == DSV3_FINISH_MAX_TOKENS);
}

TEST_CASE("a handle that its own callback frees stays until the call is over") {
  const SessionHandle session = session_with(300);
  (void)generate(session.get(), sampled(2));
  struct Host {
    Bytes bytes;
    dsv3_session* session = nullptr;
    dsv3_context* context = nullptr;
  } host;
  dsv3_session_io io;
  dsv3_session_io_init(&io, sizeof io);
  io.user = &host;
  io.write = [](void* user, const void* bytes, uint64_t size) {
    auto* h = static_cast<Host*>(user);
    dsv3_session_free(std::exchange(h->session, nullptr));
    return write_bytes_fn(&h->bytes, bytes, size);
  };
  host.session = fork_session(session.get()).release();
  REQUIRE(dsv3_session_save(host.session, &io, nullptr) == DSV3_OK);
  io.write = nullptr;
  io.read = [](void* user, void* bytes, uint64_t size) {
    auto* h = static_cast<Host*>(user);
    dsv3_context_free(std::exchange(h->context, nullptr));
    return read_bytes_fn(&h->bytes, bytes, size);
  };
  host.context = make_context(shared().model.get()).release();
  dsv3_session* loaded = nullptr;
  CHECK(dsv3_session_load(host.context, &io, &loaded, nullptr) == DSV3_E_CANCELLED);
  CHECK(loaded == nullptr);
}

TEST_CASE("functions that fail, cancel and progress") {
  const SessionHandle session = session_with(300);
  (void)generate(session.get(), sampled(2));
  Error error;
  Bytes bytes;
  bytes.limit = 2000;
  dsv3_session_io io = saving(&bytes);
  CHECK(dsv3_session_save(session.get(), &io, error.out()) == DSV3_E_IO);
  CHECK(error.field() == "write");
  io.write = [](void*, const void*, uint64_t) -> dsv3_status { throw 5; };
  CHECK(dsv3_session_save(session.get(), &io, error.out()) == DSV3_E_INVALID_ARGUMENT);
  CHECK(error.field() == "write");
  io.write = write_bytes_fn;
  dsv3_session_io bad = loading(&bytes);
  bad.read = [](void*, void*, uint64_t) -> dsv3_status { throw 5; };
  CHECK(load(shared().context.get(), bad, &error) == nullptr);
  CHECK(error.status() == DSV3_E_INVALID_ARGUMENT);
  CHECK(error.field() == "read");

  bytes = {};
  io.progress = [](void*, uint64_t, uint64_t) { throw 5; };
  CHECK(dsv3_session_save(session.get(), &io, error.out()) == DSV3_E_INVALID_ARGUMENT);
  CHECK(error.field() == "progress");
  bytes = {};
  io.progress = nullptr;
  REQUIRE(dsv3_session_save(session.get(), &io, error.out()) == DSV3_OK);
  bad = loading(&bytes);
  bad.progress = [](void*, uint64_t, uint64_t) { throw 5; };
  CHECK(load(shared().context.get(), bad, &error) == nullptr);
  CHECK(error.status() == DSV3_E_INVALID_ARGUMENT);
  CHECK(error.field() == "progress");

  bytes = {};
  struct Progress {
    uint64_t calls = 0, done = 0, total = 0;
    dsv3_cancel* cancel = nullptr;
  } progress;
  io.progress = [](void* user, uint64_t done, uint64_t total) {
    auto* p = static_cast<Progress*>(user);
    ++p->calls;
    p->done = done;
    p->total = total;
    if (p->cancel != nullptr) dsv3_cancel_set(p->cancel);
  };
  io.progress_user = &progress;
  REQUIRE(dsv3_session_save(session.get(), &io, error.out()) == DSV3_OK);
  CHECK(progress.calls == 5);
  CHECK(progress.done == progress.total);

  const CancelHandle cancel = make_cancel();
  progress.cancel = cancel.get();
  io.cancel = cancel.get();
  const TemporaryFolder folder;
  const std::string path = folder.file("s");
  dsv3_session_io file = io_for(path);
  file.cancel = cancel.get();
  file.progress = io.progress;
  file.progress_user = &progress;
  CHECK(dsv3_session_save(session.get(), &file, error.out()) == DSV3_E_CANCELLED);
  CHECK(::access(path.c_str(), F_OK) != 0);
  dsv3_session_io in = loading(&bytes);
  in.cancel = cancel.get();
  CHECK(load(shared().context.get(), in, &error) == nullptr);
  CHECK(error.status() == DSV3_E_CANCELLED);

  bytes.at = 0;
  bytes.data.resize(bytes.data.size() / 2);
  CHECK(load(shared().context.get(), loading(&bytes), &error) == nullptr);
  CHECK(error.status() == DSV3_E_CORRUPT);
  CHECK(error.field() == "read");
}

TEST_CASE("saving and loading wait for few steps of others") {
  const ContextHandle context = make_context(shared().model.get());
  const SessionHandle session = session_with(1900, context.get());  // 30 pages, 2 MiB
  dsv3_request_options none = sampled(0);
  (void)generate(session.get(), none);
  const SessionHandle other = session_with(10, context.get());
  dsv3_request_options slow = sampled(1000);
  slow.logits_hook = [](void*, float*, uint64_t, const int32_t*, uint64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  };
  const RequestHandle request = start(other.get(), slow);
  const auto steps = [&] {
    dsv3_context_statistics s;
    s.struct_size = sizeof s;
    REQUIRE(dsv3_context_get_statistics(context.get(), &s, nullptr) == DSV3_OK);
    return s.steps;
  };
  Bytes bytes;
  uint64_t before = steps();
  const dsv3_session_io out = saving(&bytes);
  REQUIRE(dsv3_session_save(session.get(), &out, nullptr) == DSV3_OK);
  CHECK(steps() - before < 10);
  before = steps();
  Error error;
  const SessionHandle loaded = load(context.get(), loading(&bytes), &error);
  REQUIRE_MESSAGE(loaded != nullptr, error.message());
  CHECK(steps() - before < 10);
  CHECK(dsv3_session_computed(loaded.get()) == 1900);
}

TEST_CASE("saving while a request runs saves what it has committed") {
  const SessionHandle session = session_with(100);
  dsv3_request_options options = sampled(400);
  options.max_queued_events = 4096;
  const RequestHandle request = start(session.get(), options);
  std::vector<std::string> saves;
  for (int i = 0; i < 5; ++i) {
    Bytes bytes;
    const dsv3_session_io io = saving(&bytes);
    REQUIRE(dsv3_session_save(session.get(), &io, nullptr) == DSV3_OK);
    saves.push_back(bytes.data);
  }
  (void)finish(request.get());
  const std::vector<int32_t> all = tokens_of(session.get());
  for (std::string& save : saves) {
    Bytes bytes{std::move(save)};
    Error error;
    const SessionHandle loaded = load(shared().context.get(), loading(&bytes), &error);
    REQUIRE_MESSAGE(loaded != nullptr, error.message());
    std::vector<int32_t> tokens = tokens_of(loaded.get());
    REQUIRE(tokens.size() <= all.size());
    CHECK(std::equal(tokens.begin(), tokens.end(), all.begin()));
    // Continuing it gives what the request went on to give.
    dsv3_request_options rest = sampled(static_cast<int32_t>(all.size() - tokens.size()));
    if (rest.max_tokens > 0) {
      (void)generate(loaded.get(), rest);
      CHECK(tokens_of(loaded.get()) == all);
    }
  }
}

TEST_CASE("what is wrong with the struct is named") {
  const SessionHandle session = session_with(3);
  Error error;
  const auto field = [&](void (*change)(dsv3_session_io*)) {
    dsv3_session_io io;
    dsv3_session_io_init(&io, sizeof io);
    change(&io);
    CHECK(dsv3_session_save(session.get(), &io, error.out()) != DSV3_OK);
    return error.field();
  };
  CHECK(field([](dsv3_session_io*) {}) == "path");
  CHECK(field([](dsv3_session_io* io) { io->read = read_bytes_fn; }) == "path");
  CHECK(field([](dsv3_session_io* io) {
          io->path = "x";
          io->write = write_bytes_fn;
        }) == "path");
  CHECK(field([](dsv3_session_io* io) {
          io->write = write_bytes_fn;
          io->flags = DSV3_SESSION_RECOMPUTE_FOREIGN;
        }) == "flags");
  CHECK(dsv3_session_save(session.get(), nullptr, error.out()) == DSV3_E_INVALID_ARGUMENT);
  CHECK(dsv3_session_save(nullptr, nullptr, error.out()) == DSV3_E_INVALID_ARGUMENT);
  dsv3_session* out = nullptr;
  CHECK(dsv3_session_load(shared().context.get(), nullptr, &out, error.out()) ==
        DSV3_E_INVALID_ARGUMENT);
  CHECK(out == nullptr);
  // An empty session is a session.
  Bytes bytes;
  const dsv3_session_io io = saving(&bytes);
  const SessionHandle empty = make_session(shared().context.get());
  REQUIRE(dsv3_session_save(empty.get(), &io, error.out()) == DSV3_OK);
  const SessionHandle again = load(shared().context.get(), loading(&bytes), &error);
  REQUIRE(again != nullptr);
  CHECK(dsv3_session_length(again.get()) == 0);
}
