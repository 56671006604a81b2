// Every call about files that fails, one after another, in everything that reads or writes them:
// one clear error or none, nothing is lost, nothing is left behind, and the next call works.
#include <doctest/doctest.h>
#include <errno.h>

#include <algorithm>
#include <filesystem>
#include <functional>

#include "tests/api/outcome_support.h"
#include "tests/api/request_support.h"
#include "tests/support/failing_calls.h"

using namespace dsv3::test;            // NOLINT
using namespace dsv3::test::requests;  // NOLINT

namespace {

int open_descriptors() {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    (void)entry;
    ++count;
  }
  return count;
}

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  return names;
}

struct Act {
  std::function<void()> prepare;
  std::function<dsv3_status(dsv3_error**)> call;  // with failing calls
  std::function<void(bool ok)> check;             // what must hold after it
};

// `runs`: of each function, at most so many of its calls fail, the first ones and some of the
// others.
void fail_each(const Act& act, int runs) {
  for (const std::string& function : failing_calls()) {
    int calls = 1;
    // -1: none fails, to count them. 0: half of the bytes.
    for (const int error : {-1, EIO, EINTR, 0}) {
      if (error == 0 && function.find("read") == std::string::npos &&
          function.find("write") == std::string::npos) {
        continue;
      }
      if (error == 0 && function == "readdir") continue;
      const int stride = std::max(1, calls / runs);
      for (int which = 0; which < calls; which += which < runs / 2 ? 1 : stride) {
        CAPTURE(function);
        CAPTURE(which);
        CAPTURE(error);
        act.prepare();
        const int descriptors = open_descriptors();
        Error e;
        fail_call(function, error < 0 ? -1 : which, error);
        const dsv3_status status = act.call(e.out());
        const int made = stop_failing();
        INFO(e.message());
        CHECK(e.status() == status);
        CHECK(open_descriptors() == descriptors);
        if (error < 0) {
          REQUIRE(status == DSV3_OK);
          calls = made;
          act.check(true);
          break;
        }
        if (status != DSV3_OK) {
          CHECK(status == DSV3_E_IO);
          CHECK(e.message().find('/') != std::string::npos);  // names the file
          CHECK(e.message().find(error == EIO ? "Input/output error" : "Interrupted") !=
                std::string::npos);
        }
        // A signal of the host's costs nothing, and neither does a system that does less at once.
        // Directories and what is asked about files do not wait for anything.
        const bool asks = function == "readdir" || function.find("stat") != std::string::npos ||
                          function.starts_with("rename") || function == "unlinkat";
        if (error != EIO && !asks) CHECK(status == DSV3_OK);
        act.check(status == DSV3_OK);
      }
    }
  }
}

}  // namespace

TEST_CASE("a conversion") {
  const TemporaryFolder folder;
  const std::string checkpoint = source_path("examples/models/tiny-coder");
  const std::string path = folder.file("model.dsv3"), good = read_bytes(tiny_coder());
  for (const int overwrite : {0, 1}) {
    CAPTURE(overwrite);
    dsv3_convert_options options;
    dsv3_convert_options_init(&options, sizeof options);
    options.overwrite = overwrite;
    Act act;
    act.prepare = [&] {
      std::filesystem::remove(path);
      if (overwrite == 1) write_bytes(path, "old");
    };
    act.call = [&](dsv3_error** e) {
      return dsv3_convert(checkpoint.c_str(), path.c_str(), &options, e);
    };
    act.check = [&](bool ok) {
      const bool there = ok || overwrite == 1;
      CHECK(names_in(folder.path()).size() == (there ? 1 : 0));
      if (there) CHECK((read_bytes(path) == (ok ? good : "old")));
    };
    fail_each(act, 4);
  }
}

TEST_CASE("a file of a checkpoint that is a link to nowhere is not one that is not there") {
  const TemporaryFolder folder;
  const std::string checkpoint = folder.file("checkpoint");
  std::filesystem::copy(source_path("examples/models/tiny-coder"), checkpoint);
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}) {
    const std::string path = checkpoint + "/" + name, kept = read_bytes(path);
    std::filesystem::remove(path);
    std::filesystem::create_symlink("nowhere", path);
    Error error;
    CHECK(dsv3_convert(checkpoint.c_str(), folder.file("out").c_str(), nullptr, error.out()) ==
          DSV3_E_NOT_FOUND);
    CHECK_MESSAGE(error.message().find(path) != std::string::npos, error.message());
    std::filesystem::remove(path);
    write_bytes(path, kept);
  }
  CHECK(dsv3_convert(checkpoint.c_str(), folder.file("out").c_str(), nullptr, nullptr) == DSV3_OK);
}

TEST_CASE("opening a model") {
  for (const int residency : {DSV3_RESIDENCY_MAP, DSV3_RESIDENCY_COPY}) {
    CAPTURE(residency);
    dsv3_model_options options;
    dsv3_model_options_init(&options, sizeof options);
    options.residency = residency;
    options.verify = 1;
    const std::string& path = tiny_coder();
    Act act;
    act.prepare = [] {};
    act.call = [&](dsv3_error** e) {
      dsv3_model* model = nullptr;
      const dsv3_status status = dsv3_model_open(path.c_str(), &options, &model, e);
      dsv3_model_free(model);
      return status;
    };
    act.check = [](bool) {};
    fail_each(act, 6);
  }
}

TEST_CASE("saving and loading a session, and a trace") {
  const TemporaryFolder folder;
  const ContextHandle context = make_context(shared().model.get());
  const SessionHandle session = session_with(200, context.get());
  dsv3_request_options options = request_options();
  options.max_tokens = 4;
  (void)generate(session.get(), options);
  const std::string saved = folder.file("session"), trace = folder.file("trace");
  const dsv3_session_io io = io_for(saved);
  Act act;
  act.prepare = [&] { write_bytes(saved, "old"); };
  act.call = [&](dsv3_error** e) { return dsv3_session_save(session.get(), &io, e); };
  act.check = [&](bool ok) {
    CHECK(names_in(folder.path()) == std::vector<std::string>{"session"});
    CHECK((read_bytes(saved) == "old") == !ok);
  };
  fail_each(act, 6);

  REQUIRE(dsv3_session_save(session.get(), &io, nullptr) == DSV3_OK);
  act.prepare = [] {};
  act.call = [&](dsv3_error** e) {
    dsv3_session* loaded = nullptr;
    const dsv3_status status = dsv3_session_load(context.get(), &io, &loaded, e);
    const SessionHandle owned(loaded);
    if (status == DSV3_OK) CHECK(tokens_of(loaded) == tokens_of(session.get()));
    return status;
  };
  act.check = [](bool) {};
  fail_each(act, 6);

  act.prepare = [&] { write_bytes(trace, "old"); };
  act.call = [&](dsv3_error** e) {
    const dsv3_status status = dsv3_context_trace_start(context.get(), trace.c_str(), 1 << 16, e);
    if (status != DSV3_OK) return status;
    dsv3_error_free(*e);
    return dsv3_context_trace_stop(context.get(), e);
  };
  act.check = [&](bool ok) {
    CHECK(names_in(folder.path()) == std::vector<std::string>{"session", "trace"});
    CHECK((read_bytes(trace) == "old") == !ok);
  };
  fail_each(act, 6);
}

TEST_CASE("a context with a disk cache, which is purged") {
  const TemporaryFolder folder;
  const std::string path = folder.file("cache");
  dsv3_request_options options = request_options();
  options.max_tokens = 4;
  const auto live = [&](dsv3_error** e) {
    dsv3_context_options made;
    dsv3_context_options_init(&made, sizeof made);
    made.threads = 1;
    made.disk_cache_dir = path.c_str();
    dsv3_context* context = nullptr;
    const dsv3_status status = dsv3_context_create(shared().model.get(), &made, &context, e);
    const ContextHandle owned(context);
    if (status != DSV3_OK) return status;
    const SessionHandle session = session_with(200, context);
    // The first step may find that nothing can be learnt about the model's file.
    const Outcome outcome = generate(session.get(), options);
    CHECK((outcome.status == DSV3_OK || outcome.status == DSV3_E_IO));
    return status;
  };
  const auto pages = [&] {
    size_t count = 0;
    for (const std::string& name : names_in(path)) {
      CHECK(name.find(".tmp") == std::string::npos);
      count += name.ends_with(".page") ? 1 : 0;
    }
    return count;
  };
  Act act;
  act.prepare = [] {};
  act.call = live;
  act.check = [&](bool) { (void)pages(); };
  fail_each(act, 4);

  act.prepare = [&] {
    if (pages() < 3) REQUIRE(live(nullptr) == DSV3_OK);
    REQUIRE(pages() >= 3);
  };
  act.call = [&](dsv3_error** e) { return dsv3_disk_cache_purge(path.c_str(), nullptr, e); };
  act.check = [&](bool ok) {
    if (ok) CHECK(pages() == 0);
  };
  fail_each(act, 12);
}
