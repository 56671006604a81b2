// Decoding in the steady state allocates nothing: every malloc of the process is counted while
// sessions decode, those behind operator new and the consumer's calls of dsv3.h included. (Pages of
// latents come from mimalloc where that is installed, by a name of its own: they are not seen
// then.)
#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "tests/api/api_support.h"

// The sanitizers have a malloc of their own, and debug builds check pages after each step, which
// takes memory.
#if defined(DSV3_SANITIZED) || !defined(NDEBUG) || !defined(__GLIBC__)
constexpr bool kCounts = false;
#else
constexpr bool kCounts = true;
#endif

namespace {

std::atomic<bool> counting{false};
std::atomic<int64_t> made{0};

void count_one() {
  if (counting.load(std::memory_order_relaxed)) made.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

#if !defined(DSV3_SANITIZED) && defined(__GLIBC__)
// The program's own functions stand before the C library's, for the shared libraries it loads too.
extern "C" {
void* __libc_malloc(size_t size);                  // NOLINT: glibc's names
void* __libc_calloc(size_t count, size_t size);    // NOLINT
void* __libc_realloc(void* p, size_t size);        // NOLINT
void* __libc_memalign(size_t align, size_t size);  // NOLINT

void* malloc(size_t size) {
  count_one();
  return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
  count_one();
  return __libc_calloc(count, size);
}
void* realloc(void* p, size_t size) {
  count_one();
  return __libc_realloc(p, size);
}
void* memalign(size_t align, size_t size) {
  count_one();
  return __libc_memalign(align, size);
}
void* aligned_alloc(size_t align, size_t size) {
  count_one();
  return __libc_memalign(align, size);
}
int posix_memalign(void** out, size_t align, size_t size) {
  count_one();
  void* p = __libc_memalign(align, size);
  if (p == nullptr) return ENOMEM;
  *out = p;
  return 0;
}
}
#endif

namespace {

using namespace dsv3::test;  // NOLINT

// Tokens of each request: before anything is counted, and until nothing is counted any more. The
// rest is room for what the engine computes ahead of its reader, so that no request ends meanwhile.
constexpr uint64_t kWarm = 80, kCounted = 480, kMost = 800;
constexpr uint32_t kQueue = 256;  // events

struct Case {
  std::string name, weights;
  size_t sessions;
  int32_t mode = DSV3_SPECULATION_OFF;
  uint32_t drafters = 0;
  bool behind = false;   // the reader lets the queues fill before it goes on
  bool sampled = false;  // top_p, log-probabilities and a stop string instead of greedy
};

// What remains, by its bound for the whole of a case: where pages are taken that were never taken
// before, the pool's four lists and the prefix index's two double now and then (four times between
// three pages and 160, which is what 16 sessions have in the end; the index begins with 64), and
// the pool gets slabs of 8 MiB. Nothing comes once per page or per token.
constexpr int64_t kGrowth = 16;

const std::string& mxfp4_coder() {
  static const std::string path = [] {
    const std::string out = scratch_folder().file("mxfp4.dsv3");
    dsv3_convert_options options;
    dsv3_convert_options_init(&options, sizeof options);
    options.ffn = DSV3_WEIGHTS_MXFP4;
    Error error;
    REQUIRE(dsv3_convert(source_path("examples/models/tiny-coder").c_str(), out.c_str(), &options,
                         error.out()) == DSV3_OK);
    return out;
  }();
  return path;
}

dsv3_request_options options_of(const Case& c) {
  static const char* const kStops[] = {"never to be found"};
  dsv3_request_options options = request_options();
  options.max_tokens = kMost;
  options.ignore_eos = 1;
  options.max_queued_events = kQueue;
  options.speculation = c.mode;
  options.drafters = c.drafters;
  if (c.sampled) {
    options.temperature = 1;
    options.top_p = 0.9F;
    options.repetition_penalty = 1.1F;
    options.logprobs = 5;
    options.stop_strings = kStops;
    options.stop_string_count = 1;
  }
  return options;
}

// Sessions of one case: requests that run, and how many tokens of each were read. Allocates nothing
// after it was made.
class Readers {
 public:
  Readers(dsv3_context* context, const Case& c) {
    const std::string text = python_text();
    for (size_t i = 0; i < c.sessions; ++i) {
      sessions_.push_back(make_session(context));
      append_text(sessions_.back().get(), text.substr(997 * i % (text.size() - 300), 300));
    }
    dsv3_request_options options = options_of(c);
    for (size_t i = 0; i < c.sessions; ++i) {
      options.seed = i;
      requests_.push_back(start(sessions_[i].get(), options));
    }
    read_.resize(c.sessions);
  }

  // One event of each that has fewer tokens, in turns. False: a request ended too soon.
  bool read_until(uint64_t tokens) {
    for (bool more = true; more;) {
      more = false;
      for (size_t i = 0; i < requests_.size(); ++i) {
        if (read_[i] >= tokens) continue;
        more = true;
        dsv3_event event;
        event.struct_size = sizeof event;
        if (dsv3_request_next(requests_[i].get(), DSV3_WAIT_FOREVER, &event, nullptr) != DSV3_OK ||
            event.kind == DSV3_EVENT_FINISHED) {
          return false;
        }
        read_[i] += event.token_count;
      }
    }
    return true;
  }

  uint64_t generated() const {
    uint64_t sum = 0;
    for (const RequestHandle& request : requests_) {
      dsv3_request_statistics s;
      s.struct_size = sizeof s;
      if (dsv3_request_get_statistics(request.get(), &s, nullptr) == DSV3_OK) {
        sum += s.generated_tokens;
      }
    }
    return sum;
  }

  // Until nothing more is generated: every queue is full.
  void wait_until_full() const {
    for (uint64_t before = 0, now = generated(); now != before;) {
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      before = now;
      now = generated();
    }
  }

 private:
  std::vector<SessionHandle> sessions_;
  std::vector<RequestHandle> requests_;
  std::vector<uint64_t> read_;
};

void check_steady(const Case& c) {
  CAPTURE(c.name);
  CAPTURE(c.weights);
  CAPTURE(c.sessions);
  const ModelHandle model = open_model(c.weights == "mxfp4" ? mxfp4_coder() : tiny_coder());
  ContextConfig config;
  config.threads = 2;
  config.cache_bytes = uint64_t{256} << 20;
  const ContextHandle context = make_context(model.get(), config);
  Readers readers(context.get(), c);
  REQUIRE(readers.read_until(kWarm));
  const uint64_t before = readers.generated();
  made = 0;
  counting = true;
  if (c.behind) readers.wait_until_full();
  const bool read = readers.read_until(kCounted);
  counting = false;
  const uint64_t tokens = readers.generated() - before;
  const int64_t allocations = made;
  REQUIRE(read);
  MESSAGE(c.name, ", ", c.weights, ", ", c.sessions, " sessions: ", allocations, " allocations in ",
          tokens, " tokens");
  CHECK(tokens >= c.sessions * (kCounted - kWarm - kQueue));
  CHECK(allocations <= kGrowth);
}

}  // namespace

TEST_CASE("decoding allocates nothing in the steady state" * doctest::skip(!kCounts)) {
  for (const char* weights : {"fp8", "mxfp4"}) {
    for (const size_t sessions : {1, 16}) {
      check_steady({"greedy", weights, sessions});
      check_steady({"sampled", weights, sessions, DSV3_SPECULATION_OFF, 0, false, true});
      check_steady({"drafts as they pay", weights, sessions, DSV3_SPECULATION_AUTO});
      check_steady({"MTP drafts", weights, sessions, DSV3_SPECULATION_ALWAYS, DSV3_DRAFT_MTP});
      check_steady({"reader behind", weights, sessions, DSV3_SPECULATION_OFF, 0, true, true});
    }
  }
  check_steady({"MTP drafts, reader behind", "fp8", 16, DSV3_SPECULATION_ALWAYS, DSV3_DRAFT_MTP,
                true, true});
}

TEST_CASE("an allocation in the loop is counted" * doctest::skip(!kCounts)) {
  made = 0;
  counting = true;
  std::vector<int>* volatile one = new std::vector<int>(3);
  void* volatile other = std::malloc(10);
  counting = false;
  delete one;
  std::free(other);
  CHECK(made == 3);
}
