/* dsv3.h: the one public header of libdsv3, an embeddable inference runtime for models of the
 * DeepSeek-V3 family (V2-Lite, Coder-V2, V3, V3.1, R1 and others of the same architecture).
 *
 * The shortest use: dsv3_model_open, dsv3_context_create, dsv3_complete, three frees; see
 * examples/c/complete.c. The nouns, from simple to advanced:
 *
 *   dsv3_model     an opened .dsv3 file: config, tokenizer, weights          (immutable, shareable)
 *   dsv3_context   an engine over one model: threads, memory budget, kernels (any thread)
 *   dsv3_session   a token sequence and its cached latents                   (one thread at a time)
 *   dsv3_request   a generation in progress on a session                     (one thread at a time)
 *   dsv3_cancel    a token that cancels what it was given to                 (any thread, any time)
 *   dsv3_error     why a call failed                                         (owned by its receiver)
 *
 * Below, each under a line with its name: version, status and error, cancel, model, text and token,
 * context (its statistics, disk cache and trace too), session (append, truncate, fork, save, load),
 * request (options, events, log-probabilities), one call for all of it, convert, benchmark.
 *
 * Rules that hold for every function
 *   Ownership   Handles are reference-counted inside: a child keeps its parent's memory alive, so
 *               handles may be freed in any order and on any thread. What is freed does no more work:
 *               a freed context cancels its requests and starts no others, and a call that runs on it
 *               ends. Every ..._free accepts NULL.
 *               There is no global set-up or shutdown.
 *   Errors      A fallible function returns a dsv3_status and takes a last `dsv3_error **error`,
 *               which may be NULL. On failure *error (if given) receives an error to be freed with
 *               dsv3_error_free, and no other output is touched unless the comment says so; on
 *               success *error is set to NULL. Nothing is printed, no exception, signal or abort
 *               leaves the library, and running out of memory fails that one call.
 *   Threads     Arguments of type `const T *` may be used by several threads at once, `T *` by one at
 *               a time, unless the comment says more. dsv3_model, dsv3_context and dsv3_cancel may be
 *               used by any number of threads.
 *   Structs     Begin with `uint32_t struct_size`. Call the struct's init function (it writes
 *               defaults and struct_size), change fields, pass the pointer; those that are only filled
 *               have none, set their struct_size. A larger struct of a newer header is accepted as long
 *               as the part this library does not know is zero. Arrays of structs carry a stride in
 *               bytes (0: the struct's own size in this library). Plain pairs and records without a
 *               struct_size (dsv3_logit_bias, dsv3_token, dsv3_top_token) stay as they are.
 *   Text        UTF-8; bytes that are not become U+FFFD where a text is tokenized. Lengths are in
 *               bytes, at most INT32_MAX; DSV3_NUL_TERMINATED as a length means: up to the NUL.
 *               Text given by a user is never read as special tokens unless a flag says so.
 *   Buffers     Functions that fill a caller's buffer take its capacity and report the needed size
 *               (without a terminating NUL, which is written too if there is room). capacity 0 asks
 *               for the size alone; a short buffer is DSV3_E_BUFFER_TOO_SMALL, with the needed size
 *               reported and nothing written.
 *   Fork        Handles made before a fork() must not be used in the child: calls that need a thread
 *               of the context return DSV3_E_FORKED there.
 */
#ifndef DSV3_H
#define DSV3_H

#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

#if defined(_WIN32)
#define DSV3_API __declspec(dllimport)
#else
#define DSV3_API __attribute__((visibility("default")))
#endif

#define DSV3_VERSION_MAJOR 0
#define DSV3_VERSION_MINOR 1
#define DSV3_VERSION_PATCH 0
#define DSV3_NUL_TERMINATED UINT64_MAX

/* ---------------------------------------------------------------------------------------- version */

/* The library's version, major * 10000 + minor * 100 + patch. */
DSV3_API uint32_t dsv3_version(void);
/* The same as text, "0.1.0". Static. */
DSV3_API const char *dsv3_version_string(void);

/* ------------------------------------------------------------------------------- status and error */

typedef int32_t dsv3_status;

#define DSV3_OK 0
#define DSV3_E_INVALID_ARGUMENT 1 /* the caller's argument is wrong; the error names the field */
#define DSV3_E_NOT_FOUND 2        /* no such file, tensor or token */
#define DSV3_E_IO 3               /* the operating system said no */
#define DSV3_E_CORRUPT 4          /* a file does not hold what its format promises */
#define DSV3_E_UNSUPPORTED 5      /* well-formed, but this build cannot do it */
#define DSV3_E_OUT_OF_MEMORY 6    /* of this one call; the library goes on */
#define DSV3_E_CAPACITY 7         /* a budget (cache, context length) is exhausted */
#define DSV3_E_BUSY 8             /* a request runs on this session */
#define DSV3_E_CANCELLED 9
#define DSV3_E_DEADLINE 10
#define DSV3_E_NUMERIC 11      /* NaN or infinity in the logits */
#define DSV3_E_FILE_CHANGED 12 /* the mapped model file was changed after it was opened */
#define DSV3_E_TIMEOUT 13      /* nothing happened within the given time */
#define DSV3_E_INTERNAL 14     /* a bug of the library: please report it */
#define DSV3_E_BUFFER_TOO_SMALL 15
#define DSV3_E_FORKED 16 /* the handle was made before fork() */

/* "DSV3_E_CORRUPT" for 4, and so on; "unknown" for others. Static. */
DSV3_API const char *dsv3_status_name(dsv3_status status);

typedef struct dsv3_error dsv3_error;

/* All of these accept NULL (DSV3_OK, "", "", 0). Texts live as long as the error. */
DSV3_API dsv3_status dsv3_error_status(const dsv3_error *error);
/* One sentence: the file, tensor or field, what was found, what was expected. */
DSV3_API const char *dsv3_error_message(const dsv3_error *error);
/* The struct field, config key or tensor it is about, or "". */
DSV3_API const char *dsv3_error_field(const dsv3_error *error);
/* 1 when the same call may succeed later without a change. */
DSV3_API int32_t dsv3_error_retryable(const dsv3_error *error);
DSV3_API void dsv3_error_free(dsv3_error *error);

/* Frees a text that a function returned for the caller to own. */
DSV3_API void dsv3_string_free(char *text);

/* ----------------------------------------------------------------------------------------- cancel */

/* A token given to requests, opening, conversion and evaluation: setting it cancels them all. It
 * cannot be reset. What it was given to keeps it alive, so it may be freed at any time. */
typedef struct dsv3_cancel dsv3_cancel;

DSV3_API dsv3_status dsv3_cancel_create(dsv3_cancel **out, dsv3_error **error);
/* Any thread, any time, wait-free; safe in a signal handler. Accepts NULL. */
DSV3_API void dsv3_cancel_set(dsv3_cancel *cancel);
DSV3_API int32_t dsv3_cancel_is_set(const dsv3_cancel *cancel);
DSV3_API void dsv3_cancel_free(dsv3_cancel *cancel);

/* Progress of a long call, made on the calling thread: how much is done, and of how much (bytes, unless
 * the call says otherwise). Of the library only dsv3_cancel_set and the ..._free functions may be called
 * (a free made here is carried out when the callback has returned). */
typedef void (*dsv3_progress_fn)(void *user, uint64_t done, uint64_t total);

/* Writes all of `size` bytes / fills all of `size` bytes, or returns another status than DSV3_OK,
 * which ends the call with that status (DSV3_E_IO: one that is none of the above). They may call what a
 * dsv3_progress_fn may. */
typedef dsv3_status (*dsv3_write_fn)(void *user, const void *bytes, uint64_t size);
typedef dsv3_status (*dsv3_read_fn)(void *user, void *bytes, uint64_t size);

/* ------------------------------------------------------------------------------------------ model */

typedef struct dsv3_model dsv3_model;

#define DSV3_RESIDENCY_MAP 0  /* mapped: nobody may change the file (checked before each step) */
#define DSV3_RESIDENCY_COPY 1 /* read into memory: immune to what happens to the file later */

typedef struct dsv3_model_options {
  uint32_t struct_size;
  int32_t residency; /* DSV3_RESIDENCY_..., default MAP */
  int32_t verify;    /* 1: as dsv3_model_verify while opening (reads the whole file); default 0 */
  int32_t reserved;  /* 0 */
  dsv3_progress_fn progress; /* for COPY and verify; may be NULL */
  void *progress_user;
  dsv3_cancel *cancel; /* may be NULL */
} dsv3_model_options;

DSV3_API void dsv3_model_options_init(dsv3_model_options *options, uint32_t struct_size);

/* Opens a .dsv3 file (made by dsv3_convert). options may be NULL. Any bytes are safe to open. */
DSV3_API dsv3_status dsv3_model_open(const char *path, const dsv3_model_options *options,
                                     dsv3_model **out, dsv3_error **error);
DSV3_API void dsv3_model_free(dsv3_model *model);

typedef struct dsv3_model_info {
  uint32_t struct_size;
  int32_t vocab_size;
  int32_t hidden_size;
  int32_t num_hidden_layers;
  int32_t num_nextn_predict_layers; /* MTP modules */
  int32_t n_routed_experts;         /* 0: dense */
  int32_t num_experts_per_tok;
  int32_t kv_lora_rank;
  int32_t qk_rope_head_dim;
  int32_t bos_token_id;  /* -1: none */
  int32_t eos_token_id;  /* the first of them; -1: none */
  int32_t has_tokenizer; /* 0: calls that need one are refused */
  int32_t has_fim;       /* 1: the vocabulary has the fill-in-the-middle tokens */
  int32_t reserved;
  int64_t max_position_embeddings; /* the longest sequence */
  uint64_t parameters;
  uint64_t file_bytes;
  uint64_t weight_bytes;
  uint64_t active_bytes_per_token; /* weights that one token reads */
  const char *model_type; /* "deepseek_v3"; lives as long as the model, as do the next two */
  /* "none", "deepseek-v2", "deepseek-v3", "deepseek-r1", ...; "unknown": the checkpoint has another
   * one, and calls that render a chat are refused. */
  const char *chat_template;
  const char *path;
  uint8_t fingerprint[16]; /* equal for equal models */
} dsv3_model_info;

/* Fills *info up to info->struct_size, which the caller sets. */
DSV3_API dsv3_status dsv3_model_get_info(const dsv3_model *model, dsv3_model_info *info,
                                         dsv3_error **error);
/* Everything about the model as one JSON text: config, tokenizer, every tensor's name, type, shape,
 * offset, size and checksum. See "Buffers". */
DSV3_API dsv3_status dsv3_model_get_json(const dsv3_model *model, char *buffer, uint64_t capacity,
                                         uint64_t *needed, dsv3_error **error);
/* Reads the whole file, compares checksums and looks for weights that are not finite. DSV3_E_CORRUPT
 * names the first tensor that is wrong. */
DSV3_API dsv3_status dsv3_model_verify(const dsv3_model *model, dsv3_progress_fn progress,
                                       void *progress_user, dsv3_cancel *cancel,
                                       dsv3_error **error);

/* ---------------------------------------------------------------------------------- text and token */

#define DSV3_TOKENIZE_PARSE_SPECIAL 1u /* match added tokens' texts such as <｜User｜> */
#define DSV3_TOKENIZE_ADD_BOS 2u       /* begin with the begin-of-sentence token */

/* Text to tokens: tokens has room for `capacity`, *needed receives the count. */
DSV3_API dsv3_status dsv3_model_tokenize(const dsv3_model *model, const char *text,
                                         uint64_t text_length, uint32_t flags, int32_t *tokens,
                                         uint64_t capacity, uint64_t *needed, dsv3_error **error);

#define DSV3_DETOKENIZE_SKIP_SPECIAL 1u

/* Tokens to text, byte for byte (a partial character at an end stays partial). Ids of the model's
 * vocabulary that the tokenizer has no token for (padding) have no text; others are refused. */
DSV3_API dsv3_status dsv3_model_detokenize(const dsv3_model *model, const int32_t *tokens,
                                           uint64_t count, uint32_t flags, char *buffer,
                                           uint64_t capacity, uint64_t *needed, dsv3_error **error);
/* The id of the added token with exactly this text ("<｜fim▁hole｜>"); DSV3_E_NOT_FOUND without one. */
DSV3_API dsv3_status dsv3_model_token_id(const dsv3_model *model, const char *text,
                                         uint64_t text_length, int32_t *id, dsv3_error **error);

typedef struct dsv3_tool_call {
  uint32_t struct_size;
  uint32_t reserved;
  const char *id;        /* NUL-terminated, may be NULL */
  const char *type;      /* "function" when NULL */
  const char *name;      /* required */
  const char *arguments; /* JSON text, inserted as it is; required */
} dsv3_tool_call;

typedef struct dsv3_message {
  uint32_t struct_size;
  uint32_t tool_call_count;
  const char *role;        /* "system", "user", "assistant", "tool"; NUL-terminated */
  const char *content;     /* NULL: none (an assistant's message of tool calls alone) */
  uint64_t content_length; /* bytes, or DSV3_NUL_TERMINATED */
  const dsv3_tool_call *tool_calls;
  uint32_t tool_call_stride;
  uint32_t reserved;
} dsv3_message;

typedef struct dsv3_chat {
  uint32_t struct_size;
  uint32_t message_count;
  const dsv3_message *messages;
  uint32_t message_stride;
  int32_t thinking;              /* 1: ask for reasoning where the template can (V3.1); default 0 */
  int32_t add_generation_prompt; /* 1 (default): end where the assistant's answer begins */
  int32_t reserved;
} dsv3_chat;

DSV3_API void dsv3_tool_call_init(dsv3_tool_call *call, uint32_t struct_size);
DSV3_API void dsv3_message_init(dsv3_message *message, uint32_t struct_size);
DSV3_API void dsv3_chat_init(dsv3_chat *chat, uint32_t struct_size);

/* The conversation as the checkpoint's chat template renders it, as text. */
DSV3_API dsv3_status dsv3_model_render_chat(const dsv3_model *model, const dsv3_chat *chat,
                                            char *buffer, uint64_t capacity, uint64_t *needed,
                                            dsv3_error **error);

/* ---------------------------------------------------------------------------------------- context */

typedef struct dsv3_context dsv3_context;

#define DSV3_LOG_ERROR 1
#define DSV3_LOG_WARNING 2
#define DSV3_LOG_INFO 3
#define DSV3_LOG_DEBUG 4

/* Called from any thread of the context, and from those that create and free it. Must not call back into
 * the library. DSV3_LOG_DEBUG is not used yet. */
typedef void (*dsv3_log_fn)(void *user, int32_t level, const char *message);

/* How a prompt's tokens attend to those before them: */
#define DSV3_PROMPT_LATENT 0   /* in latent space, as generated tokens do: bit-identical results */
#define DSV3_PROMPT_EXPANDED 1 /* by keys and values made from latents, where that is less work */

typedef struct dsv3_context_options {
  uint32_t struct_size;
  /* Compute threads; 0 (default): the CPUs this process may use. Fewer work while other programs
   * leave too few CPUs for them. */
  int32_t threads; /* at most 1,024 */
  /* Kernel set: "ref", "portable", "avx2", "avx2i16", "avx512", "avx512bf16", "neon", "neonbf16"; NULL
   * (default): the environment variable DSV3_KERNELS, else the best this machine runs: without AVX-512
   * "avx2i16" where the process may use four CPUs or more, else "avx2". */
  const char *kernels;
  /* Hard budget of the latent cache; 0 (default): enough for four sequences of
   * max_position_embeddings, at most a quarter of the memory. When it is spent, these give way, in this
   * order: pages kept for later (least recently used first), pages of sessions without a request,
   * running requests of a lower priority or that began later (they wait, compute their latents again
   * and, but for prompt_attention, give the same tokens). A new request that finds no room then ends
   * with DSV3_E_CAPACITY (retryable). More than the machine's memory counts as that. */
  uint64_t cache_bytes;
  /* Most tokens in one step, at most 65,536; 0 (default): 256, where prompts expand 512. */
  int32_t prefill_chunk;
  /* 1: pin each compute thread to a CPU of its own (threads that a callback starts inherit it);
   * default 0. */
  int32_t pin_threads;
  dsv3_log_fn log; /* may be NULL: nothing is logged */
  void *log_user;
  /* 1 (default): what one session has computed is found again by every session of the context that
   * begins with the same tokens (whole pages; see dsv3_context_info.page_tokens). 0: sessions share by
   * dsv3_session_fork only. */
  int32_t prefix_cache;
  /* DSV3_PROMPT_LATENT (default) or DSV3_PROMPT_EXPANDED: long prompts are computed faster (the longer,
   * and the larger prefill_chunk, the more) and as accurately, but no longer to the same bits every
   * time, and so not always to the same tokens. Results then depend on how prompts were cut into chunks
   * (other requests have a say in that, and beside some that decode a chunk is a quarter of
   * prefill_chunk, too short to gain much below 1,024), on what was cached, on where the session's last
   * request ended, and on whether this one had to give way: dsv3_context_info.bit_identical is 0. The
   * number of threads and, within an answer, its own speculation still change nothing. Sessions saved
   * and prefixes kept on disk are continued by contexts of the same setting only. The kernel set "ref"
   * computes as ever. */
  int32_t prompt_attention;
  /* A directory in which prefixes outlive the process: whole pages are written when requests end and
   * read when a request begins. NULL (default): none. It is made with mode 0700 where it is missing,
   * may be shared by processes and models, and holds the users' text in another form:
   * dsv3_disk_cache_purge empties it. DSV3_E_BUSY (retryable) when another process keeps it locked for
   * five seconds. Trouble with the disk later on is logged, never an error. */
  const char *disk_cache_dir;
  uint64_t disk_cache_bytes; /* its hard budget, at least a page (page_bytes); 0 (default): 1 GiB */
} dsv3_context_options;

DSV3_API void dsv3_context_options_init(dsv3_context_options *options, uint32_t struct_size);

/* options may be NULL. */
DSV3_API dsv3_status dsv3_context_create(dsv3_model *model, const dsv3_context_options *options,
                                         dsv3_context **out, dsv3_error **error);
/* Running requests are cancelled; sessions and requests that are still held stay valid to ask and
 * to free. Waits for the callbacks that run (hold no lock that they take), and with a disk cache up to a
 * second for what is being written: then none is called any more. Inside a callback it does not wait:
 * they end soon after. */
DSV3_API void dsv3_context_free(dsv3_context *context);

typedef struct dsv3_context_info {
  uint32_t struct_size;
  int32_t threads;
  /* 1: a request's tokens and log-probabilities are the same bits however it is chunked, cached and
   * batched, and at any thread count. */
  int32_t bit_identical;
  int32_t page_tokens;
  const char *kernels; /* the kernel set in use; lives as long as the context, as does allocator */
  const char *allocator; /* "mimalloc" or "system" */
  uint64_t page_bytes;
  uint64_t pages;      /* the budget */
  uint64_t pages_used; /* held by sessions now; what is only kept for later does not count */
  uint64_t sessions;
  uint64_t requests_running;
  uint64_t requests_waiting;
} dsv3_context_info;

DSV3_API dsv3_status dsv3_context_get_info(const dsv3_context *context, dsv3_context_info *info,
                                           dsv3_error **error);

/* Removes all prefixes from a disk cache (see dsv3_context_options.disk_cache_dir), whoever wrote
 * them; contexts that use it go on. *bytes (may be NULL): how many bytes that were. DSV3_E_BUSY
 * (retryable): another process has kept it locked for five seconds. DSV3_E_IO names one that could not
 * be removed; others are. */
DSV3_API dsv3_status dsv3_disk_cache_purge(const char *path, uint64_t *bytes, dsv3_error **error);

typedef struct dsv3_context_statistics {
  uint32_t struct_size;
  uint32_t reserved;
  /* Since the context was made: */
  uint64_t steps;           /* of the engine */
  uint64_t steps_abandoned; /* of these, ended midway: cancelled, or to make way for others */
  /* Tokens computed in them, repeated and rejected ones included; those of a step that made way for
   * others and went on later once. */
  uint64_t rows;
  uint64_t step_ns;           /* time inside them */
  uint64_t requests_finished; /* for whatever reason; the next five are their sums */
  uint64_t prompt_tokens;
  uint64_t cached_tokens; /* of these, found computed */
  uint64_t generated_tokens;
  uint64_t drafted_tokens;
  uint64_t accepted_tokens;
  /* Pages of the latent cache: */
  uint64_t pages;            /* the budget */
  uint64_t pages_used;       /* held by sessions now */
  uint64_t pages_cached;     /* kept for sessions to come, given up when others need them */
  uint64_t pages_high_water; /* the greatest pages_used */
  uint64_t prefix_hits;      /* pages that were found and not computed */
  uint64_t evictions;        /* kept pages that were given up */
  uint64_t sessions_dropped; /* how often an idle session lost its pages */
  uint64_t preemptions;      /* how often a running request did */
  uint64_t refusals;         /* requests that found no room to begin */
  /* Sums over finished requests, as dsv3_request_statistics has them: */
  uint64_t queue_ns;
  uint64_t prefill_ns;
  uint64_t decode_ns;
} dsv3_context_statistics;

/* Fills *statistics up to its struct_size, which the caller sets. */
DSV3_API dsv3_status dsv3_context_get_statistics(const dsv3_context *context,
                                                 dsv3_context_statistics *statistics,
                                                 dsv3_error **error);
/* The same as one JSON object (*json: free with dsv3_string_free) whose members are called like the
 * fields, with "expert_load": the next function's counts, an array per layer. None of the three waits
 * for the step in flight, which is not counted yet. */
DSV3_API dsv3_status dsv3_context_get_statistics_json(const dsv3_context *context, char **json,
                                                      dsv3_error **error);
/* How often each routed expert was chosen since the context was made: counts [layers, experts], all
 * layers of the model (zeros for those without routed experts), then its MTP modules. capacity and
 * *needed (see "Buffers") are in numbers, layers times experts, and 0 for a model without routed
 * experts; *experts (may be NULL): the length of a row, reported whenever *needed is. */
DSV3_API dsv3_status dsv3_context_get_expert_load(const dsv3_context *context, uint64_t *counts,
                                                  uint64_t capacity, uint64_t *needed,
                                                  uint64_t *experts, dsv3_error **error);
/* Writes what the engine does from now on, steps and finished requests, as Chrome trace events: a JSON
 * file that opens in ui.perfetto.dev. Memory stays small; after max_bytes the rest is left out. The file
 * appears under its name when the trace is stopped or the context freed. Starting and stopping wait for
 * the step that runs. max_bytes is at least 512. DSV3_E_BUSY: one is being written. */
DSV3_API dsv3_status dsv3_context_trace_start(dsv3_context *context, const char *path,
                                              uint64_t max_bytes, dsv3_error **error);
/* The same through a function of the caller's, in order, in pieces of about 64 KiB as the engine goes
 * on: it is called on the engine's thread, so it should be quick, and for the last piece by whoever
 * stops the trace or frees the context. When it fails it is not called again: the error is logged once
 * and returned by dsv3_context_trace_stop, and the engine goes on. `user` must stay valid until then. */
DSV3_API dsv3_status dsv3_context_trace_start_writer(dsv3_context *context, dsv3_write_fn write,
                                                     void *user, uint64_t max_bytes,
                                                     dsv3_error **error);
/* DSV3_E_NOT_FOUND: none is being written. The trace has ended, whatever is returned. */
DSV3_API dsv3_status dsv3_context_trace_stop(dsv3_context *context, dsv3_error **error);

/* What a model and context would need, without opening or allocating either. */
typedef struct dsv3_memory_estimate {
  uint32_t struct_size;
  uint32_t reserved;
  uint64_t weight_bytes;  /* mapped or copied */
  uint64_t cache_bytes;   /* the latent cache at its budget */
  uint64_t cache_tokens;  /* tokens that fit into it */
  uint64_t scratch_bytes; /* activations, logits, kernels' scratch */
  uint64_t total_bytes;
  uint64_t machine_bytes; /* memory this process may use; 0: unknown */
} dsv3_memory_estimate;

DSV3_API dsv3_status dsv3_estimate_memory(const char *model_path,
                                          const dsv3_context_options *options,
                                          dsv3_memory_estimate *out, dsv3_error **error);

/* ---------------------------------------------------------------------------------------- session */

typedef struct dsv3_session dsv3_session;

/* An empty session. Changing a session while a request runs on it returns DSV3_E_BUSY. */
DSV3_API dsv3_status dsv3_session_create(dsv3_context *context, dsv3_session **out,
                                         dsv3_error **error);
/* A request that still runs on it is cancelled. */
DSV3_API void dsv3_session_free(dsv3_session *session);

#define DSV3_APPEND_PARSE_SPECIAL 1u /* text: match added tokens' texts */
#define DSV3_APPEND_ADD_BOS 2u /* text: begin with begin-of-sentence if the session is empty */
/* The session becomes exactly this sequence; what it has in common with the old one at the beginning
 * stays computed (*kept tokens). */
#define DSV3_APPEND_REPLACE 4u

/* All of these add to the sequence at once and compute nothing: a request or an evaluation does.
 * *length (may be NULL) receives the sequence's new length, *kept (may be NULL) how many of the old
 * tokens stayed. A sequence that would exceed max_position_embeddings is DSV3_E_CAPACITY, an id outside
 * the vocabulary DSV3_E_INVALID_ARGUMENT; the session is unchanged then. Each text is tokenized by
 * itself: one that is appended in pieces becomes other tokens than the whole, mostly at the seams, and a
 * character that was cut becomes U+FFFD. */
DSV3_API dsv3_status dsv3_session_append_tokens(dsv3_session *session, const int32_t *tokens,
                                                uint64_t count, uint32_t flags, uint64_t *length,
                                                uint64_t *kept, dsv3_error **error);
DSV3_API dsv3_status dsv3_session_append_text(dsv3_session *session, const char *text,
                                              uint64_t text_length, uint32_t flags,
                                              uint64_t *length, uint64_t *kept, dsv3_error **error);
/* DeepSeek's fill-in-the-middle form: what is generated next goes between prefix and suffix. */
DSV3_API dsv3_status dsv3_session_append_fim(dsv3_session *session, const char *prefix,
                                             uint64_t prefix_length, const char *suffix,
                                             uint64_t suffix_length, uint32_t flags,
                                             uint64_t *length, uint64_t *kept, dsv3_error **error);
/* A whole conversation (usually with DSV3_APPEND_REPLACE, which makes every next turn cheap). */
DSV3_API dsv3_status dsv3_session_append_chat(dsv3_session *session, const dsv3_chat *chat,
                                              uint32_t flags, uint64_t *length, uint64_t *kept,
                                              dsv3_error **error);

/* Shortens the sequence to `length` tokens. */
DSV3_API dsv3_status dsv3_session_truncate(dsv3_session *session, uint64_t length,
                                           dsv3_error **error);
/* A second session with the same sequence; pages are shared until one of the two writes to them. */
DSV3_API dsv3_status dsv3_session_fork(const dsv3_session *session, dsv3_session **out,
                                       dsv3_error **error);
DSV3_API uint64_t dsv3_session_length(const dsv3_session *session);
/* How many tokens at the beginning have their latents computed. Grows by requests; shrinks when other
 * requests need the pages of a session without one (the next request computes them again). */
DSV3_API uint64_t dsv3_session_computed(const dsv3_session *session);
/* The sequence's tokens from `begin` on, see "Buffers". */
DSV3_API dsv3_status dsv3_session_get_tokens(const dsv3_session *session, uint64_t begin,
                                             int32_t *tokens, uint64_t capacity, uint64_t *needed,
                                             dsv3_error **error);

/* Loading: latents that another kernel set, or a library with other arithmetic, computed are left
 * out and computed again when they are needed. Without it they are DSV3_E_UNSUPPORTED. */
#define DSV3_SESSION_RECOMPUTE_FOREIGN 1u

/* Where a session is saved to or loaded from: a file, or the caller's functions. */
typedef struct dsv3_session_io {
  uint32_t struct_size;
  uint32_t flags;      /* DSV3_SESSION_..., loading only */
  const char *path;    /* a file; NULL: the functions */
  dsv3_write_fn write; /* saving without a path */
  dsv3_read_fn read;   /* loading without a path */
  void *user;
  dsv3_progress_fn progress; /* in pages of latents; may be NULL */
  void *progress_user;
  dsv3_cancel *cancel; /* may be NULL */
} dsv3_session_io;

DSV3_API void dsv3_session_io_init(dsv3_session_io *io, uint32_t struct_size);

/* Saves the sequence and its computed latents, blocking, a few pages of memory at a time. A file is
 * replaced at once or not at all, is readable by its user only (mode 0600), and holds the text in
 * another form: keep it as private as the text. Allowed while a request runs (what it committed by
 * then is saved). Sampling has no other state: a request's seed and the positions say everything. */
DSV3_API dsv3_status dsv3_session_save(const dsv3_session *session, const dsv3_session_io *io,
                                       dsv3_error **error);
/* A session that continues, bit for bit, where the saved one stood. Refused when it is damaged
 * (DSV3_E_CORRUPT; latents that are left out are not looked at), of another model, kernel set (with
 * "+expanded" where prompts expand, see dsv3_context_options.prompt_attention) or arithmetic
 * (DSV3_E_UNSUPPORTED), or larger than the context's latent cache (DSV3_E_CAPACITY). A file is checked
 * whole before it is given room; what a function delivers is checked a few pages at a time, and idle
 * sessions and kept prefixes may have made room for it by then. Checksums find damage, not malice: the
 * latents of a file are believed, and serve other sessions of the context that begin with its tokens.
 * Load only what you saved. */
DSV3_API dsv3_status dsv3_session_load(dsv3_context *context, const dsv3_session_io *io,
                                       dsv3_session **out, dsv3_error **error);

/* What dsv3_session_evaluate stores: each pointer may be NULL. Row i belongs to the i-th token given. */
typedef struct dsv3_evaluation {
  uint32_t struct_size;
  uint32_t reserved;
  float *logits;     /* [count, vocab_size] */
  float *hidden;     /* [count, hidden_size], after the final norm */
  float *mtp_logits; /* [count - 1, vocab_size]: row i predicts token i + 2 from the hidden state of
                        token i and token i + 1; the session must be empty before */
  float *logprobs;   /* [count - 1]: natural log-probability of token i + 1 after token i */
  dsv3_progress_fn progress; /* in tokens */
  void *progress_user;
  dsv3_cancel *cancel;
} dsv3_evaluation;

DSV3_API void dsv3_evaluation_init(dsv3_evaluation *evaluation, uint32_t struct_size);

/* Appends the tokens and runs the model over them, blocking. On failure or cancel the session keeps
 * the length it had before; some rows may have been stored by then. */
DSV3_API dsv3_status dsv3_session_evaluate(dsv3_session *session, const int32_t *tokens,
                                           uint64_t count, const dsv3_evaluation *evaluation,
                                           dsv3_error **error);

/* ---------------------------------------------------------------------------------------- request */

typedef struct dsv3_request dsv3_request;

typedef struct dsv3_logit_bias {
  int32_t token;
  float bias; /* added to the logit; -INFINITY forbids the token */
} dsv3_logit_bias;

#define DSV3_PRIORITY_INTERACTIVE 0
#define DSV3_PRIORITY_BACKGROUND 1
#define DSV3_PRIORITY_IDLE 2

/* Sees, and may change, the logits of a step before sampling (grammars, external samplers). Runs on the
 * engine's thread: be quick; it may call what a dsv3_notify_fn may. `tokens` is the whole sequence so
 * far. */
typedef void (*dsv3_logits_fn)(void *user, float *logits, uint64_t vocab_size,
                               const int32_t *tokens, uint64_t count);
/* Wakes an event loop: called from the engine's thread when events become available. Only
 * dsv3_cancel_set and the ..._free functions may be called (a free made here is carried out later). */
typedef void (*dsv3_notify_fn)(void *user);

/* Speculation: several tokens are guessed (drafted) and verified in one step. It never changes what is
 * generated: a drafted token is taken if and only if it is the very token that decoding one by one would
 * have given, sampled or not. Drafts come from repetitions in the session's own text, from a
 * reference text that the caller expects the answer to follow (a file that is being edited), and
 * from the model's MTP module. */
#define DSV3_SPECULATION_AUTO 0 /* as much as pays, by measured acceptance and step times */
#define DSV3_SPECULATION_OFF 1  /* one token per step */
/* Whatever can be drafted, whether it pays or not: for measurements. Each step verifies up to 64 tokens
 * then; where they are wrong, decoding takes several times as long. */
#define DSV3_SPECULATION_ALWAYS 2
#define DSV3_DRAFT_LOOKUP 1u    /* what came after the same tokens before */
#define DSV3_DRAFT_REFERENCE 2u /* along reference_tokens or reference_text */
#define DSV3_DRAFT_MTP 4u       /* the model's multi-token prediction module, if it has one */

typedef struct dsv3_request_options {
  uint32_t struct_size;
  int32_t priority;    /* DSV3_PRIORITY_..., default INTERACTIVE */
  uint64_t max_tokens; /* generated at most, below 2^31; default 256; 0: prompt only (warm-up) */
  /* Sampling. The default is greedy. The order: bias, penalties, logits hook, temperature, top_k,
   * top_p, min_p. */
  float temperature; /* 0 (default): greedy */
  float top_p;       /* 0 < top_p <= 1; default 1: off */
  float min_p;       /* 0 <= min_p < 1; default 0: off. Tokens below min_p * the best are dropped */
  int32_t top_k;     /* 0 (default): off */
  /* > 0; default 1: off. Divides positive logits, multiplies negative ones. */
  float repetition_penalty;
  float presence_penalty;  /* default 0 */
  float frequency_penalty; /* default 0 */
  /* How many last tokens (prompt included) penalties look at; default 256; -1: all. */
  int32_t penalty_window;
  uint64_t seed; /* the random numbers of a position are a function of seed and position */
  /* Read while starting; at most 2^20, as stop_tokens. */
  const dsv3_logit_bias *logit_bias;
  uint32_t logit_bias_count;
  uint32_t logit_bias_stride;
  /* NUL-terminated, valid UTF-8, at most 64 of 1 to 1,024 bytes; looked for in the answer, not
   * in reasoning, and never part of the text that is reported. */
  const char *const *stop_strings;
  const int32_t *stop_tokens; /* beside the model's end-of-sentence tokens */
  uint32_t stop_string_count;
  uint32_t stop_token_count;
  int32_t ignore_eos; /* 1: the model's end-of-sentence tokens do not end the generation */
  /* -1 (default): none; 0: of the chosen tokens; n <= 64: of the n best as well. */
  int32_t logprobs;
  uint64_t deadline_ms; /* from the start of the request; 0 (default): none */
  /* 1: the answer begins inside a reasoning block; 0: outside; -1 (default): as the chat that was
   * appended last left it (outside once text was appended, or the session was replaced or emptied). */
  int32_t reasoning;
  uint32_t max_queued_events; /* a consumer this far behind pauses its request; default 256 */
  dsv3_cancel *cancel;        /* may be NULL */
  dsv3_logits_fn logits_hook;
  void *logits_hook_user;
  dsv3_notify_fn notify;
  void *notify_user;
  int32_t speculation; /* DSV3_SPECULATION_..., default AUTO */
  /* DSV3_DRAFT_... flags; 0 (default): LOOKUP and REFERENCE, and in AUTO also MTP once its guesses were
   * measured to make decoding at least a tenth faster on this machine (large models; a small one pays
   * more for the second row than the guess brings). Named, it drafts wherever it may pay. */
  uint32_t drafters;
  int32_t max_draft_tokens; /* of one draft, at most 64; 0 (default): no other limit */
  int32_t reserved;         /* 0 */
  /* What the answer mostly copies, for DSV3_DRAFT_REFERENCE: tokens or text, not both; read while
   * starting. It is followed through insertions, deletions, replacements and moves, however long it
   * is, and is no part of the prompt. It takes up to 24 bytes a token until the request is freed. NULL
   * (default): none. */
  const int32_t *reference_tokens;
  uint64_t reference_token_count;
  const char *reference_text;
  uint64_t reference_text_length; /* bytes, or DSV3_NUL_TERMINATED */
} dsv3_request_options;

DSV3_API void dsv3_request_options_init(dsv3_request_options *options, uint32_t struct_size);

/* Starts generating after the session's sequence, which must not be empty. options may be NULL. The
 * generated tokens (an end token included) become part of the session as they are made. */
DSV3_API dsv3_status dsv3_request_start(dsv3_session *session, const dsv3_request_options *options,
                                        dsv3_request **out, dsv3_error **error);

#define DSV3_EVENT_PROGRESS 1  /* prompt_done of prompt_total tokens are computed */
#define DSV3_EVENT_TEXT 2      /* text of the answer and the tokens it came from */
#define DSV3_EVENT_REASONING 3 /* the same, inside a reasoning block */
#define DSV3_EVENT_FINISHED 4  /* exactly one, the last */

#define DSV3_FINISH_STOP_TOKEN 1
#define DSV3_FINISH_STOP_STRING 2
#define DSV3_FINISH_MAX_TOKENS 3
#define DSV3_FINISH_CONTEXT_LENGTH 4 /* the sequence reached max_position_embeddings */
#define DSV3_FINISH_CANCELLED 5
#define DSV3_FINISH_DEADLINE 6
#define DSV3_FINISH_ERROR 7 /* the event's status, error_message, _field and _retryable say why */

typedef struct dsv3_top_token {
  int32_t id;
  float logprob;
} dsv3_top_token;

typedef struct dsv3_token {
  int32_t id;
  /* Natural log of the model's own probability (before sampling's changes); NaN unless asked for. */
  float logprob;
  const dsv3_top_token *top; /* the n best, best first */
  uint32_t top_count;
  uint32_t reserved;
} dsv3_token;

typedef struct dsv3_request_statistics {
  uint32_t struct_size;
  uint32_t reserved;
  uint64_t prompt_tokens;    /* the sequence's length at the start */
  uint64_t cached_tokens;    /* of those, already computed: by this session or found in the cache */
  uint64_t generated_tokens; /* so far */
  uint64_t drafted_tokens;   /* proposed by speculation */
  uint64_t accepted_tokens;  /* of those, accepted */
  uint64_t queue_ns;         /* waiting for the engine */
  uint64_t prefill_ns;       /* computing the prompt */
  uint64_t decode_ns;        /* from the first generated token to the last */
  uint64_t first_token_ns;   /* from the start to the first generated token; 0: none yet */
  uint64_t total_ns;
  uint64_t decode_steps; /* steps that generated tokens; without speculation as many as tokens */
  /* What speculation saved of the decoding time, by measured step times; negative: what it cost. */
  int64_t speculation_saved_ns;
  uint64_t pages;       /* of the latent cache, the most at once; set at the end, as is the next */
  uint64_t preemptions; /* how often it gave them up for others and computed them again */
} dsv3_request_statistics;

typedef struct dsv3_event {
  uint32_t struct_size;
  int32_t kind; /* DSV3_EVENT_... */
  /* TEXT, REASONING: whole UTF-8 characters, NUL-terminated; may be empty while a character or a stop
   * string is still undecided. Every generated token is in exactly one event, in order. */
  const char *text;
  uint64_t text_length;
  const dsv3_token *tokens;
  uint64_t token_count;
  uint32_t token_stride;
  /* FINISHED */
  int32_t finish_reason;     /* DSV3_FINISH_... */
  dsv3_status status;        /* DSV3_OK unless the reason is ERROR, CANCELLED or DEADLINE */
  int32_t stop_token;        /* with STOP_TOKEN: which; else -1 */
  const char *stop_string;   /* with STOP_STRING: which; else "" */
  const char *error_message; /* with ERROR; else "" */
  const char *error_field;
  const dsv3_request_statistics *statistics;
  /* PROGRESS */
  uint64_t prompt_done;
  uint64_t prompt_total;
  /* FINISHED, with ERROR: 1 when the same request may succeed later, as one that found no room in the
   * latent cache beside others; else 0. */
  int32_t error_retryable;
  int32_t reserved;
} dsv3_event;

#define DSV3_WAIT_FOREVER UINT64_MAX

/* Waits up to timeout_ms (0: not at all) for the next event and fills *event up to its struct_size.
 * What the event points to lives until the next call on this request. DSV3_E_TIMEOUT: none yet.
 * After FINISHED every further call returns DSV3_E_NOT_FOUND. */
DSV3_API dsv3_status dsv3_request_next(dsv3_request *request, uint64_t timeout_ms,
                                       dsv3_event *event, dsv3_error **error);
/* A descriptor that is readable while events are waiting (level-triggered; owned by the library, lives
 * as long as the request): for poll, epoll, an editor's loop. -1 when the system has none left. */
DSV3_API intptr_t dsv3_request_wait_descriptor(const dsv3_request *request);
/* Any thread, any time. The FINISHED event follows within one layer of one step. */
DSV3_API void dsv3_request_cancel(const dsv3_request *request);
/* What is known by now, while the request runs and after it. Fills *out up to its struct_size, which the
 * caller sets. */
DSV3_API dsv3_status dsv3_request_get_statistics(const dsv3_request *request,
                                                 dsv3_request_statistics *out, dsv3_error **error);
/* The same as one JSON object (*json: free with dsv3_string_free) whose members are called like the
 * fields. */
DSV3_API dsv3_status dsv3_request_get_statistics_json(const dsv3_request *request, char **json,
                                                      dsv3_error **error);
/* Cancels the request if it still runs. The session then has a valid, reported length. When this returns,
 * none of the request's callbacks runs or will run (inside a callback: when that has returned). */
DSV3_API void dsv3_request_free(dsv3_request *request);

/* -------------------------------------------------------------------------- one call for all of it */

/* Completes at a cursor, blocking: fill-in-the-middle between prefix and suffix, or plain continuation
 * of prefix when suffix is NULL. *text (free with dsv3_string_free) receives the answer, *length (may
 * be NULL) its bytes. options may be NULL. A deadline or cancel that hits returns DSV3_E_DEADLINE or
 * DSV3_E_CANCELLED and no text. Any thread; calls run one after another. Reasoning is left out; logprobs
 * and max_queued_events do nothing here, and notify is called once, at the end. */
DSV3_API dsv3_status dsv3_complete(dsv3_context *context, const char *prefix,
                                   uint64_t prefix_length, const char *suffix,
                                   uint64_t suffix_length, const dsv3_request_options *options,
                                   char **text, uint64_t *length, dsv3_error **error);

/* ----------------------------------------------------------------------------------------- convert */

#define DSV3_WEIGHTS_KEEP 0 /* every matrix in the checkpoint's own type */
/* BF16, F16 and F32 matrices become E4M3 with 128x128 block scales. */
#define DSV3_WEIGHTS_FP8 1
/* BF16, F16, F32 and FP8 matrices become MXFP4 (OCP Microscaling v1.0): 4-bit E2M1 elements with an
 * E8M0 scale for each 32 inputs, chosen by error. 4.25 bits a weight. */
#define DSV3_WEIGHTS_MXFP4 2

/* What matrices become, by what they belong to. The router, norms and the MTP modules' eh_proj stay
 * as they are, and nothing becomes larger than the checkpoint has it: experts that are stored as MXFP4
 * already (compressed-tensors or Quark) stay so. */
typedef struct dsv3_convert_options {
  uint32_t struct_size;
  int32_t weights;   /* attention and feed-forward layers: KEEP (default) or FP8 */
  int32_t overwrite; /* 1: replace an existing output file; default 0 */
  int32_t ffn;       /* feed-forward layers: FP8, MXFP4, or KEEP (default): as `weights` says */
  dsv3_progress_fn progress;
  void *progress_user;
  dsv3_cancel *cancel;
  int32_t experts; /* routed experts alone: FP8, MXFP4, or KEEP (default): as `ffn` says */
  int32_t head;    /* embedding and head: KEEP (default) or FP8 */
} dsv3_convert_options;

DSV3_API void dsv3_convert_options_init(dsv3_convert_options *options, uint32_t struct_size);

/* Converts a Hugging Face checkpoint folder into one .dsv3 file, blocking, in bounded memory. The
 * output appears under its name when it is whole; on failure or cancel nothing is left behind. */
DSV3_API dsv3_status dsv3_convert(const char *checkpoint_dir, const char *output_path,
                                  const dsv3_convert_options *options, dsv3_error **error);

/* --------------------------------------------------------------------------------------- benchmark */

typedef struct dsv3_benchmark_options {
  uint32_t struct_size;
  int32_t repeats;        /* of every line, at least; the median counts; 1 to 100, default 5 */
  const char *model_path; /* a .dsv3 file; NULL: a synthetic model of `shape` */
  const char *shape;      /* "tiny", "v2-lite", "v3": random weights made in memory, no file */
  int32_t layers;         /* of a synthetic model alone; 0 (default): all of the shape's */
  /* Types of a synthetic model's weights, as in dsv3_convert_options; it has FP8 matrices and a BF16
   * embedding and head otherwise. */
  int32_t ffn;
  int32_t experts;
  int32_t head;
  int32_t quick;   /* 1: the short lines only; default 0 */
  int32_t profile; /* 1: each line's time by operations as well; default 0 */
  int32_t scaling; /* 1: some lines on one thread as well; default 0 */
  /* threads, pin_threads and kernels of it count; may be NULL. Prompts are computed in steps of up to
   * 2,048 tokens, and expanded where `invariance` asks for it. */
  const dsv3_context_options *context;
  dsv3_progress_fn progress; /* in lines of the result */
  void *progress_user;
  dsv3_cancel *cancel; /* looked at between layers; may be NULL */
  int32_t invariance;  /* 1: prompts with DSV3_PROMPT_EXPANDED as well; default 0 */
  int32_t reserved;    /* 0 */
  /* A part of the labels of the lines to measure, such as "prefill 512" or "batch 16", UTF-8; the first
   * token is measured as well. NULL (default): all. One that is in no label is refused. */
  const char *only;
} dsv3_benchmark_options;

DSV3_API void dsv3_benchmark_options_init(dsv3_benchmark_options *options, uint32_t struct_size);

/* Measures the machine's limits (read bandwidth, multiply-adds) and, in turns with them, decoding
 * and prefill of a model, blocking. *json (free with dsv3_string_free) receives the result:
 * "machine", "model" and "lines": the first token, decoding of 1, 4 and 16 sequences without context
 * and after 4,096 and 16,384 tokens each, prompts of 128, 512 and 2,048 tokens (`quick`: 1 and 4
 * sequences, 1 after 1,024 tokens, a prompt of 128). Lines that need more positions than the model
 * has, or whose latents find no room in the machine's memory, are in "left_out" (an array, mostly
 * empty) instead, each with its label, name, batch, context, tokens and reason. A line has its label
 * ("decode, batch 16, context 4096"), seconds, tokens_per_second, bytes, weight_flops,
 * attention_flops and percent_of_limit: of all its bytes at the read bandwidth or all its operations
 * at the multiply-add peak (those of MXFP4 weights at the one of INT8), whichever takes longer;
 * percent_by_operation is that taken for attention, dense layers, head and each expert apart, one
 * after the other. With `profile` also "profile", the time, bytes and flops of each kind of
 * operation in one more repeat. The line "first token" is the first step after opening, measured
 * once, with its page_faults. With `scaling` the first decoding line and the longest prompt's are
 * measured for one thread too, and "scaling" says how many times the figures of one thread all
 * threads reach: read bandwidth, multiply-adds, decode, prefill. With `invariance` every prompt, and
 * one of 512 tokens after 16,384 others (not with `quick`), is computed in turns with
 * DSV3_PROMPT_LATENT and with DSV3_PROMPT_EXPANDED: a line of its own, with "prompt_attention"
 * ("expanded") and "times_as_fast", what bit-identical results cost there. A line's limits are
 * measured between its repeats: on a machine that others use they wander as the line does. Unless
 * `quick`, lines are repeated for two seconds at least. */
DSV3_API dsv3_status dsv3_benchmark(const dsv3_benchmark_options *options, char **json,
                                    dsv3_error **error);

#if defined(__cplusplus)
}
#endif

#endif /* DSV3_H */
