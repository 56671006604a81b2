/* libdsv3 inside an event loop: poll() waits for the request's descriptor and for the keyboard at
 * once, as an editor's loop would. Text is printed as it comes; Enter, or the time limit, cancels.
 *
 *   ./stream model.dsv3 'class Queue:' [milliseconds]
 */
#define _POSIX_C_SOURCE 200809L
#include <dsv3.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static long now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (long)(t.tv_sec * 1000 + t.tv_nsec / 1000000);
}

static int fail(const char *what, dsv3_error *error) {
  fprintf(stderr, "stream: %s: %s\n", what, dsv3_error_message(error));
  dsv3_error_free(error);
  return 1;
}

/* Takes every event that is waiting. 0: go on, 1: that was the last one, -1: failed. */
static int take_events(dsv3_request *request) {
  for (;;) {
    dsv3_error *error = NULL;
    dsv3_event event;
    memset(&event, 0, sizeof event);
    event.struct_size = sizeof event;
    const dsv3_status status = dsv3_request_next(request, 0, &event, &error);
    if (status == DSV3_E_TIMEOUT) {
      dsv3_error_free(error);
      return 0; /* nothing more for now: back to poll() */
    }
    if (status != DSV3_OK) {
      fail("next event", error);
      return -1;
    }
    if (event.kind == DSV3_EVENT_TEXT || event.kind == DSV3_EVENT_REASONING) {
      fwrite(event.text, 1, event.text_length, stdout);
      fflush(stdout);
    } else if (event.kind == DSV3_EVENT_FINISHED) {
      static const char *const reasons[] = {"",           "end of text",  "stop string",
                                            "max tokens", "context full", "cancelled",
                                            "deadline",   "error"};
      const int32_t reason = event.finish_reason;
      fprintf(stderr, "\n[%s%s%s, %llu tokens]\n", reason > 0 && reason < 8 ? reasons[reason] : "?",
              event.error_message[0] ? ": " : "", event.error_message,
              (unsigned long long)event.statistics->generated_tokens);
      return reason == DSV3_FINISH_ERROR ? -1 : 1;
    }
  }
}

static int run(dsv3_request *request, long limit_ms) {
  const long end = now_ms() + limit_ms;
  struct pollfd fds[2];
  memset(fds, 0, sizeof fds);
  fds[0].fd = (int)dsv3_request_wait_descriptor(request);
  fds[0].events = POLLIN;
  fds[1].fd = STDIN_FILENO;
  fds[1].events = POLLIN;
  if (fds[0].fd < 0) {
    fputs("stream: the system has no descriptor left\n", stderr);
    return 1;
  }
  for (;;) {
    const long left = end - now_ms();
    /* After the cancellation the FINISHED event follows soon: no limit is needed any more. */
    const int ready = poll(fds, 2, limit_ms < 0 ? -1 : left > 0 ? (int)left : 0);
    if (ready == 0) {
      dsv3_request_cancel(request);
      limit_ms = -1;
    }
    if (ready > 0 && fds[1].revents != 0) {
      char key;
      if (read(STDIN_FILENO, &key, 1) == 1) dsv3_request_cancel(request);
      fds[1].fd = -1; /* once is enough; and the end of the input is not a key */
    }
    const int taken = take_events(request);
    if (taken != 0) return taken > 0 ? 0 : 1;
  }
}

int main(int argc, char **argv) {
  if (argc != 3 && argc != 4) {
    fputs("usage: stream MODEL.dsv3 TEXT [MILLISECONDS]\n", stderr);
    return 2;
  }
  dsv3_model *model = NULL;
  dsv3_context *context = NULL;
  dsv3_session *session = NULL;
  dsv3_request *request = NULL;
  dsv3_error *error = NULL;
  dsv3_request_options options;
  dsv3_request_options_init(&options, sizeof options);
  options.max_tokens = 200;

  int result = 1;
  if (dsv3_model_open(argv[1], NULL, &model, &error) != DSV3_OK) {
    fail("open", error);
  } else if (dsv3_context_create(model, NULL, &context, &error) != DSV3_OK ||
             dsv3_session_create(context, &session, &error) != DSV3_OK) {
    fail("create", error);
  } else if (dsv3_session_append_text(session, argv[2], DSV3_NUL_TERMINATED, DSV3_APPEND_ADD_BOS,
                                      NULL, NULL, &error) != DSV3_OK) {
    fail("append", error);
  } else if (dsv3_request_start(session, &options, &request, &error) != DSV3_OK) {
    fail("start", error);
  } else {
    result = run(request, argc == 4 ? strtol(argv[3], NULL, 10) : 60000);
  }
  /* In any order: each keeps alive what it needs. */
  dsv3_model_free(model);
  dsv3_context_free(context);
  dsv3_session_free(session);
  dsv3_request_free(request);
  return result;
}
