/* Larder's C ABI: what inference engines link (liblarder.so.0).
 *
 * Larder keeps attention keys and values outside the engine. One chunk's life
 * through this header:
 *
 *   larder_client_open -> larder_space_open -> larder_ids_from_tokens
 *   -> larder_match (scheduler: how much is there?)
 *   -> larder_hold_open (pin what will be loaded) -> larder_load
 *   -> larder_save_begin, fill, larder_save_commit (for what was computed)
 *
 * Rules that hold for every call:
 *
 * Failures. Nothing throws, aborts or calls back. Every failure inside Larder
 * is a miss with a reason, in time; an error status means a caller's mistake
 * or a service that is gone, and an engine treats both as a miss. Outputs are
 * set only when the status is not negative, unless a comment says otherwise.
 * larder_last_error() explains the calling thread's last negative status.
 *
 * Deadlines. Every call that may wait takes deadline_ms, counted from the
 * call: 0 is the client's default (larder_client_opts, never unbounded),
 * LARDER_NO_DEADLINE is explicit. When a load's or a get's deadline passes, or
 * it is cancelled, or misses, the report comes only after the last byte: what
 * was the destination is the caller's again, nothing lands in it later.
 *
 * Ownership. What crosses the boundary is the caller's, before and after;
 * only handles (pointers to incomplete types) are Larder's, each with a close
 * function that accepts NULL. A handle must be closed before what it was
 * opened from. Pointers returned by the library live as long as said beside
 * them.
 *
 * Threads. larder_client and larder_space may be used by any number of threads
 * at once. A hold, load or save handle may be used by several threads, but not
 * closed while another is inside a call on it. A queue has one consumer. The
 * library starts threads only as larder_client_opts allows, blocks all signals
 * in them, and must be opened after fork(): a child process must not use, nor
 * close, what its parent opened.
 *
 * Growth. A struct whose first member is struct_size may grow at its end: set
 * it to sizeof of the struct you compiled with; members past it are zero, and
 * zero is always the default. In an array of such structs, the first element's
 * struct_size is the distance between elements. Enum values are never reused.
 * A library serves every header of the same major version that is not newer.
 */
#ifndef LARDER_CLIENT_LARDER_C_H_
#define LARDER_CLIENT_LARDER_C_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#error "Larder runs on Linux"
#endif

#if defined(__GNUC__)
#define LARDER_API __attribute__((visibility("default")))
#else
#define LARDER_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define LARDER_VERSION_MAJOR 0u
#define LARDER_VERSION_MINOR 1u

/* ---------------------------------------------------------------- words -- */

/* >0 progress, 0 done, <0 not done. */
typedef enum larder_status {
  LARDER_PRESENT = 2, /* save_begin: it is there already, nothing to save */
  LARDER_RETRY = 1,   /* cached calls: not known yet, ask again */
  LARDER_OK = 0,
  LARDER_E_INVALID = -1,       /* the caller's mistake */
  LARDER_E_NOT_FOUND = -2,     /* a miss */
  LARDER_E_MISMATCH = -3,      /* spaces differ; last_error names the field */
  LARDER_E_CORRUPT = -4,       /* a checksum did not match; a miss */
  LARDER_E_EXHAUSTED = -5,     /* full: back off and try again */
  LARDER_E_DEADLINE = -6,      /* the deadline passed */
  LARDER_E_CANCELLED = -7,     /* larder_*_cancel, larder_drain */
  LARDER_E_UNAVAILABLE = -8,   /* the daemon is gone; later calls reconnect */
  LARDER_E_ABORTED = -9,       /* hold revoked, epoch advanced */
  LARDER_E_DENIED = -10,       /* another tenant's */
  LARDER_E_PRECONDITION = -11, /* right call, wrong state */
  LARDER_E_UNSUPPORTED = -12,  /* this version cannot do it */
  LARDER_E_INTERNAL = -13      /* a mistake of Larder's own: please report */
} larder_status;

/* Is a chunk there? One byte each in arrays. */
typedef enum larder_state {
  LARDER_STATE_MISS = 0,
  LARDER_STATE_READY = 1,   /* in memory */
  LARDER_STATE_DURABLE = 2, /* in a slower tier; a hold or prefetch raises it */
  LARDER_STATE_PENDING = 3, /* a save of it is under way */
  LARDER_STATE_UNKNOWN = 4, /* cached calls: not known yet */
  LARDER_STATE_PEER = 5     /* at another node; a hold or prefetch fetches it */
} larder_state;

/* Why a chunk is not served. One byte each in arrays; 0 = it is served. */
typedef enum larder_reason {
  LARDER_REASON_NONE = 0,
  LARDER_REASON_NEVER_SEEN = 1,
  LARDER_REASON_EVICTED = 2,
  LARDER_REASON_SPACE_DIFFERS = 3,
  LARDER_REASON_INCOMPLETE = 4, /* some rank's part is missing */
  LARDER_REASON_LINEAGE = 5,    /* only a copy worse than was asked for */
  LARDER_REASON_DEADLINE = 6,
  LARDER_REASON_CORRUPT = 7,
  LARDER_REASON_EPOCH = 8, /* computed with weights that were replaced */
  LARDER_REASON_BUSY = 9,
  LARDER_REASON_UNAVAILABLE = 10,
  LARDER_REASON_CANCELLED = 11, /* made by the client library */
  LARDER_REASON_NOT_TRIED = 12, /* behind a miss; or does not fit the target */
  /* coded with a profile that the daemon has not (`larder profile add`) */
  LARDER_REASON_PROFILE = 13,
  /* A streaming load left it to the engine: it would have come too late. */
  LARDER_REASON_RECOMPUTE = 14
} larder_reason;

/* Quality of KV, ordered, smaller is better. "The worst that is taken" in
 * requests; 0, the default, takes exact KV only. */
#define LARDER_LINEAGE_EXACT 0u
#define LARDER_LINEAGE_APPROXIMATE 200u
#define LARDER_LINEAGE_ANY 255u

/* Instead of a number of milliseconds. */
#define LARDER_NO_DEADLINE UINT32_MAX

#define LARDER_GROUPS_MAX 16u
#define LARDER_KEY_BYTES_MAX 64u

/* A chunk id, a space id, a digest. */
typedef struct larder_id {
  uint8_t bytes[32];
} larder_id;

typedef struct larder_client larder_client; /* a connection to larderd */
typedef struct larder_space larder_space;   /* an opened space */
typedef struct larder_hold larder_hold;     /* the right to read chunks */
typedef struct larder_load larder_load;     /* a load under way */
typedef struct larder_save larder_save;     /* one part of one chunk */
typedef struct larder_find larder_find;     /* a question under way */
typedef struct larder_queue larder_queue;   /* completions, with an eventfd */
typedef struct larder_region larder_region; /* memory imported by descriptor */

/* An asynchronous operation, unique within the client, never 0. */
typedef uint64_t larder_job;

/* LARDER_VERSION_MAJOR << 16 | LARDER_VERSION_MINOR of the library. */
LARDER_API uint32_t larder_version(void);
/* Never NULL, static. */
LARDER_API const char* larder_status_name(int32_t status);
LARDER_API const char* larder_reason_name(uint32_t reason);
/* What the calling thread's last negative status was about; "" if none yet.
 * Valid until that thread's next call into the library. */
LARDER_API const char* larder_last_error(void);

/* --------------------------------------------------------------- client -- */

typedef struct larder_client_opts {
  uint32_t struct_size;
  uint32_t default_deadline_ms; /* 0 = 1000 */
  /* NULL = "/run/larder/larderd.sock". Without ':', but for a daemon of another
   * host: "tls://HOST:PORT?ca=FILE&certificate=FILE&key=FILE[&server=NAME]"
   * (NAME in the daemon's certificate; HOST if left out) or "ucx://HOST:PORT"
   * (loopback, or with "?insecure=1"). README.md says what is different. */
  const char* socket_path;
  const char* token;      /* tenant token, at most 64 bytes; NULL = by uid */
  const char* name;       /* for people, at most 63 bytes; NULL = none */
  uint64_t staging_bytes; /* memory to save from; 0 = 256 MiB, on first use */
  /* Threads for submitted and started operations, made on first use; 0 = 1.
   * Blocking calls run on their caller's thread alone, unless they ask. */
  uint32_t worker_threads;
  uint32_t cached_age_ms; /* cached answers older are refreshed; 0 = 50 */
  /* Bytes held ahead of the copying of a load, so that slow tiers overlap
   * with it; 0 = 256 MiB. */
  uint64_t ahead_bytes;
  uint32_t queued_jobs_max; /* submitted, not started; 0 = 4096 */
  uint32_t reserved;
} larder_client_opts;

/* Never waits longer than deadline_ms (0 = 1000 here). `opts` may be NULL.
 * LARDER_E_UNAVAILABLE if nobody listens; LARDER_E_DENIED for a wrong token;
 * LARDER_E_UNSUPPORTED if the daemon speaks another major version. */
LARDER_API larder_status larder_client_open(const larder_client_opts* opts,
                                            uint32_t deadline_ms,
                                            larder_client** out);
/* Cancels what is under way, waits until none of it touches the caller's
 * memory any more, frees. Spaces, holds, loads, saves, queues and regions must
 * have been closed. */
LARDER_API void larder_client_close(larder_client* client);

/* Never blocks: LARDER_OK if connected (or not yet tried since), else
 * LARDER_E_UNAVAILABLE. After a daemon's restart the next call that needs it
 * reconnects, within its own deadline and with growing pauses; spaces are
 * opened again; holds are gone (LARDER_E_ABORTED). */
LARDER_API larder_status larder_health(larder_client* client);
/* A round trip. */
LARDER_API larder_status larder_ping(larder_client* client,
                                     uint32_t deadline_ms);

typedef struct larder_usage {
  uint32_t struct_size;
  uint32_t reserved;
  uint64_t memory_used, memory_capacity;   /* bytes, this daemon, all tenants */
  uint64_t durable_used, durable_capacity; /* 0 if there is no durable tier */
  uint64_t durable_backlog;                /* bytes accepted, not durable yet */
  uint64_t chunks, matched, missed, commits, corrupt;
  uint64_t saved_bytes, promoted_bytes;
  /* This client's own counts. */
  uint64_t client_loaded_bytes, client_saved_bytes;
  uint64_t client_missed_chunks, client_corrupt_chunks, client_reconnects;
} larder_usage;
LARDER_API larder_status larder_get_usage(larder_client* client,
                                          uint32_t deadline_ms,
                                          larder_usage* out);

/* ---------------------------------------------------------------- space -- */

typedef enum larder_group_kind {
  LARDER_FULL_ATTENTION = 1,
  LARDER_SLIDING_WINDOW = 2,
  LARDER_RECURRENT_STATE = 3,
  LARDER_LATENT = 4,
  LARDER_INDEXER = 5
} larder_group_kind;

/* How a segment (one layer of one part) is kept. */
typedef enum larder_layout {
  LARDER_HEAD_MAJOR = 1,  /* [K|V][head][token][dim] */
  LARDER_TOKEN_MAJOR = 2, /* [K|V][token][head*dim] */
  LARDER_OPAQUE = 3       /* the engine's own; read back in the same shape */
} larder_layout;

typedef struct larder_group_desc {
  uint32_t struct_size;
  uint8_t kind;              /* larder_group_kind */
  uint8_t layout;            /* larder_layout */
  uint16_t layer_count;      /* layers of this group */
  uint16_t kv_head_count;    /* over all ranks; 1 for latent and opaque */
  uint16_t interleave_count; /* 0 = 1; opaque: pieces that make up a chunk */
  uint32_t k_head_bytes;     /* per token and head (opaque: per token) */
  uint32_t v_head_bytes;     /* 0 where keys hold all */
  uint32_t window_tokens;    /* LARDER_SLIDING_WINDOW only */
  uint16_t joint;            /* equal and not 0: visible only together */
  uint16_t reserved;
  const char* layers; /* which layers, e.g. "0-29" */
} larder_group_desc;

/* Everything that must agree for KV bytes to be interchangeable. A field left
 * empty is refused: guessing here is how caches serve wrong KV. */
typedef struct larder_space_desc {
  uint32_t struct_size;
  uint32_t block_tokens; /* the engine's page */
  uint32_t chunk_tokens; /* a multiple of it; 256 is a good choice */
  uint32_t group_count;
  const char* model_name;    /* for people; enters the id all the same */
  const larder_id* weights;  /* SHA-256 of the weights, never of a name */
  const char* cache_dtype;   /* "bf16", "fp8_e4m3", "q8_0" ... */
  const char* kv_scales;     /* digest of KV scales, or "none" */
  const char* rope;          /* every RoPE parameter, or "none" */
  const char* engine_layout; /* engine, version, layout (and rank, if pages
                                of different ranks have equal keys) */
  const char* hash_scheme;   /* "larder", "vllm:sha256_cbor:seed=0" ... */
  const larder_group_desc* groups;
  /* Not 0: a space of values for larder_put and larder_get, of at most so many
   * bytes each; then block_tokens, chunk_tokens and groups must be 0. */
  uint64_t value_bytes_max;
  /* If given: what larder_space_encoding said in another process. The open is
   * refused with LARDER_E_MISMATCH if it is not the same space. */
  const void* expect;
  uint64_t expect_bytes;
} larder_space_desc;

/* Idempotent: equal descriptors are the same space, for every process of the
 * tenant. LARDER_E_INVALID names the field that is missing or absurd,
 * LARDER_E_MISMATCH the first one that differs from `expect`. */
LARDER_API larder_status larder_space_open(larder_client* client,
                                           const larder_space_desc* desc,
                                           uint32_t deadline_ms,
                                           larder_space** out);
/* Holds, loads and saves of the space must have been closed. */
LARDER_API void larder_space_close(larder_space* space);
/* SHA-256 of the canonical encoding. */
LARDER_API larder_status larder_space_id(const larder_space* space,
                                         larder_id* out);
/* The canonical encoding, for `expect`. Writes at most `capacity` bytes, sets
 * *bytes to the whole size; LARDER_E_EXHAUSTED if it did not fit. */
LARDER_API larder_status larder_space_encoding(const larder_space* space,
                                               void* out, size_t capacity,
                                               size_t* bytes);
/* The epoch last heard of. */
LARDER_API uint64_t larder_space_epoch(const larder_space* space);
/* Weights were replaced: from the return on, nothing older matches, holds on
 * it are revoked, saves begun before are refused. `epoch` may be NULL. */
LARDER_API larder_status larder_advance_epoch(larder_space* space,
                                              uint32_t deadline_ms,
                                              uint64_t* epoch);

/* ------------------------------------------------------------------ ids -- */

/* What else than tokens a request's KV depends on. */
typedef enum larder_request_key_kind {
  LARDER_KEY_SALT = 1,
  LARDER_KEY_LORA = 2,  /* digest of the adapter's weights */
  LARDER_KEY_IMAGE = 3, /* digest of an item; offset = its first token */
  LARDER_KEY_PROMPT = 4 /* digest of prompt embeddings */
} larder_request_key_kind;

typedef struct larder_request_key {
  uint32_t kind;   /* larder_request_key_kind */
  uint32_t offset; /* in tokens; 0 where it has none */
  const void* value;
  uint64_t value_bytes; /* at most 256 */
} larder_request_key;

/* One id per whole chunk of the prompt and, if at least one whole block is
 * left over, one for the tail; *tail_tokens is its length or 0. Sets *count to
 * the number of ids there are; LARDER_E_EXHAUSTED if `capacity` is smaller. */
LARDER_API larder_status larder_ids_from_tokens(
    const larder_space* space, const uint32_t* tokens, size_t token_count,
    const larder_request_key* keys, size_t key_count, larder_id* ids,
    size_t capacity, size_t* count, uint32_t* tail_tokens);
/* One link of the chain; parent may be NULL. */
LARDER_API larder_status larder_id_from_tokens(const larder_space* space,
                                               const larder_id* parent,
                                               const uint32_t* tokens,
                                               size_t token_count,
                                               const larder_request_key* keys,
                                               size_t key_count, larder_id* id);
/* `count` engine hashes of `hash_bytes` (1..64) each, `stride` bytes apart (0 =
 * hash_bytes): the hash of a chunk's last block, bound to the space. */
LARDER_API larder_status larder_ids_from_hashes(const larder_space* space,
                                                const void* hashes,
                                                size_t hash_bytes,
                                                size_t stride, size_t count,
                                                larder_id* ids);
/* What a prompt's first chunk contains, whatever the space: lets a miss be
 * explained by the field in which another space differs. `tokens` are the
 * tokens of chunk 0. */
LARDER_API larder_status larder_root_content(const uint32_t* tokens,
                                             size_t token_count,
                                             const larder_request_key* keys,
                                             size_t key_count, larder_id* out);

/* ---------------------------------------------------------------- queue -- */

typedef enum larder_op {
  LARDER_OP_MATCH = 1,
  LARDER_OP_LOOKUP = 2,
  LARDER_OP_LOAD = 3,
  LARDER_OP_SAVE = 4, /* one completion per stage that was asked for */
  LARDER_OP_PUT = 5,
  LARDER_OP_GET = 6,
  LARDER_OP_DELETE = 7,
  LARDER_OP_FIND = 8
} larder_op;

/* How far a save got. */
typedef enum larder_stage {
  LARDER_SOURCE_REUSABLE = 1, /* staging (or the caller's source) is free */
  LARDER_VOLATILE = 2, /* visible when complete; survives the writer's death */
  LARDER_DURABLE = 3,  /* survives power loss */
  /* The destination of the commit has it, in memory; or its status says why
   * not, which is not the save's failure. At any time after LARDER_VOLATILE. */
  LARDER_DELIVERED = 4
} larder_stage;

typedef struct larder_completion {
  uint32_t struct_size;
  int32_t status; /* larder_status; of the operation, not of single keys */
  larder_job job;
  uint64_t user_data;
  uint32_t op;    /* larder_op */
  uint32_t stage; /* LARDER_OP_SAVE: larder_stage */
  uint32_t count; /* ids or keys of the operation */
  uint32_t good;  /* usable prefix (match, load), tokens (find), keys served
                     (others) */
  uint64_t bytes; /* moved */
  /* `count` bytes: larder_state (match, lookup) or larder_reason (load, put,
   * get, delete); NULL for saves and finds. Valid until the next poll of this
   * queue. */
  const uint8_t* per_key;
  /* LARDER_OP_GET: `count` sizes of the values; else NULL. As per_key. */
  const uint64_t* per_key_bytes;
  uint32_t lineage; /* LARDER_OP_LOAD: larder_load_result.lineage */
  uint32_t reserved;
} larder_completion;

LARDER_API larder_status larder_queue_open(larder_client* client,
                                           larder_queue** out);
/* Operations that would complete to it must be done (larder_drain). */
LARDER_API void larder_queue_close(larder_queue* queue);
/* An eventfd, readable while a completion waits; owned by the queue. */
LARDER_API int larder_queue_fd(const larder_queue* queue);
/* Takes up to `capacity` completions, in the order in which they finished;
 * waits for the first one up to deadline_ms, but not at all if it is 0 (here 0
 * is not the default). Returns how many, or a negative status.
 * completions[0].struct_size must be set. */
LARDER_API int32_t larder_queue_poll(larder_queue* queue,
                                     larder_completion* completions,
                                     uint32_t capacity, uint32_t deadline_ms);

/* ---------------------------------------------------------------- match -- */

typedef struct larder_match_opts {
  uint32_t struct_size;
  uint32_t deadline_ms;
  uint32_t start;         /* chunks before it are the engine's own already */
  uint32_t worst_lineage; /* LARDER_LINEAGE_* */
  const larder_id* root_content; /* optional: explains a miss of chunk 0 */
} larder_match_opts;

typedef struct larder_match_result {
  uint32_t struct_size;
  uint32_t usable;      /* chunks from `start` that every group can serve */
  uint32_t consecutive; /* states READY or DURABLE in a row from `start` */
  uint32_t reason; /* larder_reason of chunk start + usable; 0 if all usable */
  uint64_t load_estimate_us; /* for the usable prefix */
  uint64_t epoch;
  uint32_t group_count;
  uint32_t group_hits[LARDER_GROUPS_MAX]; /* by each group's own rule */
} larder_match_result;

/* How much of a prompt is there. One round trip; pins nothing. `states`, if
 * not NULL, receives count - start bytes of larder_state. `opts` may be NULL.
 * The answer feeds the cache of larder_match_cached. */
LARDER_API larder_status larder_match(larder_space* space, const larder_id* ids,
                                      size_t count,
                                      const larder_match_opts* opts,
                                      uint8_t* states,
                                      larder_match_result* result);
/* For schedulers: never blocks, no round trip, some microseconds. LARDER_RETRY
 * if nothing is known yet; then, and when the answer is older than
 * cached_age_ms, it is refreshed behind the call by one thread of the client.
 * A daemon that is gone is LARDER_E_UNAVAILABLE, a miss. deadline_ms is not
 * used. */
LARDER_API larder_status larder_match_cached(larder_space* space,
                                             const larder_id* ids, size_t count,
                                             const larder_match_opts* opts,
                                             uint8_t* states,
                                             larder_match_result* result);
/* The same as larder_match on a worker thread. */
LARDER_API larder_status larder_submit_match(larder_space* space,
                                             larder_queue* queue,
                                             const larder_id* ids, size_t count,
                                             const larder_match_opts* opts,
                                             uint64_t user_data,
                                             larder_job* job);

/* Presence of unrelated ids, each on its own. `states` receives `count` bytes;
 * *consecutive (may be NULL) the READY or DURABLE ones in a row from 0. */
LARDER_API larder_status larder_lookup(larder_space* space,
                                       const larder_id* ids, size_t count,
                                       uint32_t deadline_ms, uint8_t* states,
                                       uint32_t* consecutive);
/* Never blocks. LARDER_RETRY if at least one is LARDER_STATE_UNKNOWN; those,
 * and old answers, are asked for behind the call in one batch. */
LARDER_API larder_status larder_lookup_cached(larder_space* space,
                                              const larder_id* ids,
                                              size_t count, uint8_t* states,
                                              uint32_t* consecutive);
LARDER_API larder_status larder_submit_lookup(
    larder_space* space, larder_queue* queue, const larder_id* ids,
    size_t count, uint32_t deadline_ms, uint64_t user_data, larder_job* job);

/* Waits until chunks are whole (all groups of the space), which somebody is
 * saving, or sending here (larder_commit_opts.destination): here, or known to
 * be at another node, from which a load brings them.
 * LARDER_E_DEADLINE if not all are; `consecutive` (may be NULL) receives how
 * many in a row from the first are. By layer: LARDER_LOAD_ARRIVING.
 * LARDER_E_UNSUPPORTED: the daemon is too old. */
LARDER_API larder_status larder_await(larder_space* space, const larder_id* ids,
                                      size_t count, uint32_t deadline_ms,
                                      uint32_t* consecutive);

/* 1 for the states of what a hold would have, now or soon; else 0. */
LARDER_API int larder_state_is_there(uint8_t state);

/* Brings chunks up to memory without holding them. Best effort, no answer. */
LARDER_API larder_status larder_prefetch(larder_space* space,
                                         const larder_id* ids, size_t count);

/* Why is this chunk not served? Sets *reason (0 if it would be) and writes a
 * sentence, cut to `capacity` with a final NUL. root_content may be NULL. */
LARDER_API larder_status larder_why_miss(larder_space* space,
                                         const larder_id* id,
                                         const larder_id* root_content,
                                         uint32_t deadline_ms, uint32_t* reason,
                                         char* text, size_t capacity);

/* ----------------------------------------------------------------- hold -- */

/* Try every chunk on its own instead of stopping at the first miss. */
#define LARDER_HOLD_EACH 1u

typedef struct larder_hold_opts {
  uint32_t struct_size;
  uint32_t deadline_ms; /* also for chunks that come from slower tiers */
  uint32_t ttl_ms;      /* 0 = the daemon's default */
  uint32_t worst_lineage;
  uint32_t flags; /* LARDER_HOLD_* */
} larder_hold_opts;

/* Pins chunks, at allocation time, and says what survived: *usable (may be
 * NULL) is the prefix held; `reasons` (may be NULL) receives `count` bytes.
 * Chunks of slower tiers count as held while they are brought up.
 * LARDER_E_NOT_FOUND, with reasons set and *out NULL, if nothing is there. */
LARDER_API larder_status larder_hold_open(larder_space* space,
                                          const larder_id* ids, size_t count,
                                          const larder_hold_opts* opts,
                                          uint8_t* reasons, uint32_t* usable,
                                          larder_hold** out);
/* Unguessable; give it to the workers. It stays valid while any process has
 * the hold open. */
LARDER_API uint64_t larder_hold_token(const larder_hold* hold);
/* The ids that it was opened with, in order, for larder_hold_attach. Sets
 * *count to how many there are; LARDER_E_EXHAUSTED if `capacity` is smaller. */
LARDER_API larder_status larder_hold_ids(const larder_hold* hold,
                                         larder_id* ids, size_t capacity,
                                         size_t* count);
/* Joins a hold of another process of the same tenant. `ids` are those of its
 * open, in order: what is read is checked against them.
 * LARDER_E_ABORTED if it is gone. */
LARDER_API larder_status larder_hold_attach(larder_space* space, uint64_t token,
                                            const larder_id* ids, size_t count,
                                            uint32_t deadline_ms,
                                            larder_hold** out);
/* LARDER_E_ABORTED if it was revoked (expiry, epoch, restart of the daemon):
 * close it. *ttl_left_ms may be NULL. */
LARDER_API larder_status larder_hold_renew(larder_hold* hold, uint32_t ttl_ms,
                                           uint32_t deadline_ms,
                                           uint32_t* ttl_left_ms);
/* Never blocks: LARDER_OK, or LARDER_E_ABORTED once it was revoked. Memory is
 * not reused before the close, so what was read up to then was right. */
LARDER_API larder_status larder_hold_check(const larder_hold* hold);
/* Releases, and invalidates what larder_hold_map returned. The daemon hears of
 * it with the next message, or within milliseconds. NULL is allowed. */
LARDER_API void larder_hold_close(larder_hold* hold);

/* A segment in read-only shared memory: [K|V] of `head_count` heads. */
typedef struct larder_mapped {
  uint32_t struct_size;
  uint16_t layer_begin; /* of the part that contains it */
  uint16_t layer_count;
  uint16_t head_begin;
  uint16_t head_count;
  uint16_t interleave_index;
  uint16_t interleave_count;
  uint32_t token_count; /* of the chunk */
  uint32_t lineage;
  const void* k;
  uint64_t k_bytes;
  const void* v;
  uint64_t v_bytes;
} larder_mapped;

/* Reading in place: the segments of (chunk `index` of the hold, group, layer),
 * one per part, verified once by this call. Valid until the hold is closed;
 * check the hold afterwards. *count is how many there are;
 * LARDER_E_EXHAUSTED if `capacity` is smaller. LARDER_E_UNSUPPORTED if a copy
 * is coded: such bytes mean nothing where they lie; load the chunk. */
LARDER_API larder_status larder_hold_map(larder_hold* hold, uint32_t index,
                                         uint32_t group, uint32_t layer,
                                         uint32_t deadline_ms,
                                         larder_mapped* mapped, size_t capacity,
                                         size_t* count);

/* ----------------------------------------------------------------- find -- */

typedef struct larder_prompt {
  uint32_t struct_size;
  uint32_t key_count; /* at most 64 */
  const uint32_t* tokens;
  uint64_t token_count;
  const larder_request_key* keys;
  /* No more than so many tokens are of use (an engine computes the last one
   * itself, for its logits); 0 = all. */
  uint64_t tokens_max;
} larder_prompt;

typedef struct larder_found {
  uint32_t struct_size;
  uint32_t reason; /* larder_reason: why no more; 0 = all that is of use */
  uint64_t tokens; /* from the first on, there and held; whole blocks */
} larder_found;

/* A scheduler's whole question, behind its back: how much of a prompt is there,
 * in whole chunks and the longest tail behind them that anybody saved? Does on
 * a worker thread what larder_ids_from_tokens, larder_match, larder_lookup and
 * larder_hold_open do; the call itself copies the prompt and never waits.
 * opts->flags must be 0. `queue` may be NULL: then larder_find_wait tells.
 * LARDER_E_EXHAUSTED if queued_jobs_max are waiting. */
LARDER_API larder_status larder_find_start(larder_space* space,
                                           const larder_prompt* prompt,
                                           const larder_hold_opts* opts,
                                           larder_queue* queue,
                                           uint64_t user_data,
                                           larder_find** out);
/* Never blocks: LARDER_RETRY while it is under way, LARDER_OK once it ended. */
LARDER_API larder_status larder_find_check(larder_find* find);
/* Waits for the end; LARDER_E_DEADLINE if *this wait* was too short. A miss is
 * LARDER_OK with 0 tokens; otherwise what went wrong, with the reason set.
 * `hold` (may be NULL) receives a handle on the hold of what was found, or
 * NULL; the caller closes it. The hold lives as long as it or `find` does. */
LARDER_API larder_status larder_find_wait(larder_find* find,
                                          uint32_t deadline_ms,
                                          larder_found* found,
                                          larder_hold** hold);
LARDER_API larder_job larder_find_job(const larder_find* find);
/* Cancels if it is under way, without waiting. */
LARDER_API void larder_find_close(larder_find* find);

/* ----------------------------------------------------------------- view -- */

/* Where tokens of one layer lie: token t of block b, head h at
 *   base + b * block_stride + t * token_stride + h * head_stride
 * for the dim bytes of one head. Covers [B,N,H,D], [B,H,N,D], K and V in one
 * page or in two tensors. Nothing outside [base, base + bytes) is touched. */
typedef struct larder_plane {
  void* base;
  uint64_t bytes;
  uint64_t block_stride;
  uint64_t token_stride;
  uint64_t head_stride;
} larder_plane;

typedef enum larder_view_form {
  /* segments[chunk * layer_count + layer]: a buffer of one segment as it is
   * kept (its layout, for the heads chosen): K then V. NULL = skip. */
  LARDER_VIEW_SEGMENTS = 1,
  /* blocks[i]: the engine's block for tokens [i * block_tokens, ...) counted
   * from the first chunk named by the call. Negative = skip. */
  LARDER_VIEW_BLOCKS = 2,
  /* slots[t]: block slots[t] / block_tokens, token slots[t] % block_tokens.
   * Negative = skip. */
  LARDER_VIEW_SLOTS = 3
} larder_view_form;

/* One group's KV in the caller's memory: where a load puts it, or where a save
 * takes it from. For LARDER_OPAQUE groups a view is SEGMENTS, or BLOCKS whose
 * k plane says where each block's share of the segment lies (one block per
 * chunk, if block_tokens here is the chunk's). */
typedef struct larder_view {
  uint32_t struct_size;
  uint16_t group;
  uint16_t form; /* larder_view_form */
  /* The box that this rank works on. layer_count 0 = all from layer_begin;
   * head_count and interleave_count likewise. */
  uint16_t layer_begin;
  uint16_t layer_count;
  uint16_t head_begin;
  uint16_t head_count;
  uint16_t interleave_index;
  uint16_t interleave_count;
  uint32_t block_tokens; /* 0 = the space's */
  uint64_t place_count;  /* entries of segments, blocks or slots */
  void* const* segments;
  const int64_t* blocks;
  const int64_t* slots;
  const larder_plane* k_planes; /* layer_count of them; plane 0 = layer_begin */
  const larder_plane* v_planes; /* NULL where keys hold all */
} larder_view;

/* Memory of another process (an engine's slab), mapped here by descriptor. */
typedef struct larder_region_desc {
  uint32_t struct_size;
  int32_t fd; /* borrowed for the call */
  uint64_t offset;
  uint64_t bytes;
} larder_region_desc;
LARDER_API larder_status larder_region_open(larder_client* client,
                                            const larder_region_desc* desc,
                                            larder_region** out);
/* Its first byte, readable and writable; valid until the close. */
LARDER_API void* larder_region_base(const larder_region* region);
LARDER_API void larder_region_close(larder_region* region);

/* ----------------------------------------------------------------- load -- */

/* Layer 0 of all chunks first, then layer 1 and so on, so that
 * larder_load_wait_layer returns early; else chunk after chunk. */
#define LARDER_LOAD_LAYERWISE 1u
/* Try every chunk on its own instead of stopping at the first miss. */
#define LARDER_LOAD_EACH 2u
/* Waits, until the deadline, for chunks that are still being saved part after
 * part (larder_save_opts.layer_begin), here or at a node that sends them
 * (larder_commit_opts.destination), and takes each layer as its chunks come;
 * larder_load_wait_layer tells when all have it. Needs a deadline; without hold
 * and stream. LARDER_E_UNSUPPORTED: the daemon is too old. */
#define LARDER_LOAD_ARRIVING 4u

/* What became of one chunk of a streaming load. Times count from its start. */
typedef struct larder_stream_chunk {
  uint8_t predicted;        /* 1: to be brought, by the forecast */
  uint8_t brought;          /* 1: it was, and is verified */
  uint8_t planes;           /* of those that its copy has, which are usable */
  uint8_t predicted_planes; /* ... which were to be, by the forecast */
  uint8_t reserved[4];
  uint64_t bytes;        /* that it takes to bring it; 0 = it was in memory */
  uint64_t predicted_us; /* when it would be there; UINT64_MAX = never */
  uint64_t actual_us;    /* when it was; UINT64_MAX = never */
} larder_stream_chunk;

/* The sooner everything is there the better, even where the deadline would
 * leave time to bring more: a longer prefix, or further planes of what is
 * there. Without it a load whose copies are coarse so far uses its time until
 * the deadline to refine them. */
#define LARDER_STREAM_SOONEST 1u

/* A load that watches its link: it measures the goodput it gets and ends early
 * where computing is faster. Chunks from larder_load_result.usable on are then
 * the engine's, with LARDER_REASON_RECOMPUTE, while there is time to compute
 * them: the deadline is that of the whole prefix, loaded and computed. */
typedef struct larder_stream_opts {
  uint32_t struct_size;
  uint32_t flags; /* LARDER_STREAM_* */
  /* Seconds in which the engine computes a chunk: a + b * its tokens + c * its
   * tokens * the position of its middle. All 0: no time is kept for computing;
   * such a load ends early only where nothing more would come in time. */
  double prefill_chunk_s;
  double prefill_token_s;
  double prefill_token_position_s;
  uint64_t first_token; /* position of the first chunk's first token */
  /* NULL, or as many as the load has chunks. Written by larder_load_now, or by
   * larder_load_wait at the load's end. */
  larder_stream_chunk* chunks;
} larder_stream_opts;

/* larder_device_opts.ready_word after a miss: more than any layer. */
#define LARDER_READY_POISON 0x40000000u

/* larder_device_opts.flags */
/* A load decodes on the host what it could have a kernel decode: coded keys and
 * values, into blocks and slots. The same bits. */
#define LARDER_DEVICE_DECODE_ON_HOST 1u

/* KV in the memory of a CUDA device: the bases of a view's planes (and its
 * segments) are addresses there, in the process's primary context, which
 * frameworks use too. The driver is opened by the first call with such options;
 * LARDER_E_UNAVAILABLE says what is missing. Views are blocks or slots of keys
 * and values, or segments. */
typedef struct larder_device_opts {
  uint32_t struct_size;
  int32_t ordinal; /* of the device, as the driver counts */
  /* CUstream. A load with NULL takes one of its own, which waits for nothing of
   * the engine's; a save needs the engine's, behind what writes the KV. */
  void* stream;
  /* Of a load on a stream of its own: the address of a 32-bit word that the
   * device reaches, 0 before the load starts. Becomes the number of layers that
   * have landed, or LARDER_READY_POISON once a chunk will not come, the
   * deadline's end included: what a captured graph can wait for
   * (cuStreamWaitValue32, GEQ) and look at. 0 = none. */
  uint64_t ready_word;
  /* Of a load: layer_event_count CUevents, the i-th recorded behind layer i. A
   * layer is on the stream, and its event recorded, once
   * larder_load_wait_layer says so: work that is put behind the event, or on
   * the same stream, from then on finds it there. A layer that kernels decode
   * is told of (by this, the ready word and larder_load_wait_layer) only after
   * the host saw that all of it could be decoded, so that nobody is ever told
   * of rows that are not there: a piece later than others, and on a stream of
   * the engine's not before the engine's own work on it. What was computed over
   * layers as they came counts once the load has ended well: a later miss voids
   * it, and so does a daemon that let go of memory while it was copied from.
   * NULL = none. */
  void* const* layer_events;
  uint32_t layer_event_count;
  uint32_t flags; /* LARDER_DEVICE_* */
} larder_device_opts;

typedef struct larder_load_opts {
  uint32_t struct_size;
  uint32_t deadline_ms;
  uint32_t flags; /* LARDER_LOAD_* */
  uint32_t worst_lineage;
  uint32_t threads; /* that copy; 0 = 1, the caller's own for larder_load */
  /* Chunk 0 of the load is chunk `hold_first` of the hold. */
  uint32_t hold_first;
  larder_hold* hold; /* NULL: the load holds what it reads, for as long */
  /* NULL: not streaming. Else the load needs a deadline, and takes no flags. A
   * hold has all of its chunks brought at once: without one, those that would
   * come too late are not even read. */
  const larder_stream_opts* stream;
  /* NULL: the views are host memory. Else layers land one after the other, and
   * the load is not streaming. It returns when its last kernel has run: on a
   * stream of the engine's, behind the engine's work. */
  const larder_device_opts* device;
} larder_load_opts;

typedef struct larder_load_result {
  uint32_t struct_size;
  uint32_t usable; /* chunks from the first on that are all there */
  uint32_t reason; /* larder_reason of chunk `usable`; 0 if all are */
  uint32_t tokens; /* of the usable chunks */
  uint64_t bytes;  /* written to the views */
  /* The worst of what was delivered (of the usable chunks; of all that landed
   * with LARDER_LOAD_EACH): what is computed over it must be saved with a
   * larder_commit_opts.lineage no better. */
  uint32_t lineage;
  /* Of a streaming load: 1 = what follows is set (0 = the daemon is too old,
   * and it was not streamed); 3 = and it ended early, in favour of computing.
   */
  uint32_t streamed;
  /* The forecast, as soon as there was something to make it from. */
  uint32_t predicted_usable;
  uint32_t reserved;
  uint64_t predicted_us;    /* until these are there, from the load's start */
  uint64_t predicted_at_us; /* when it was made */
  double predicted_goodput; /* bytes per second; a low estimate */
  /* What came of it. */
  uint64_t actual_us;      /* until the load ended */
  double goodput;          /* mean while something was asked for; 0 = nothing
                              was */
  uint64_t streamed_bytes; /* brought from slower tiers */
  uint64_t unused_bytes;   /* of these, behind the usable chunks */
  uint64_t recompute_us;   /* that the rest takes, by the prefill model */
} larder_load_result;

/* Copies chunks into the views, verifying every byte where it lands. A miss is
 * no error: LARDER_OK with a shorter usable prefix; destinations behind it may
 * have been written to, but never after the return. `reasons` (may be NULL)
 * receives `count` bytes. LARDER_E_DEADLINE or LARDER_E_UNAVAILABLE say what
 * cut it short; reasons and result are set, and what is usable then is. */
LARDER_API larder_status larder_load_now(
    larder_space* space, const larder_id* ids, size_t count,
    const larder_view* views, size_t view_count, const larder_load_opts* opts,
    uint8_t* reasons, larder_load_result* result);

/* The same on worker threads. ids and views are copied before the return, the
 * arrays that views point to (segments, blocks, slots, planes) too. `queue` may
 * be NULL: then larder_load_wait tells the end. LARDER_E_EXHAUSTED if
 * queued_jobs_max are waiting. */
LARDER_API larder_status larder_load_start(
    larder_space* space, const larder_id* ids, size_t count,
    const larder_view* views, size_t view_count, const larder_load_opts* opts,
    larder_queue* queue, uint64_t user_data, larder_load** out);
/* Waits until layer `layer` (index within its group) of every chunk has
 * landed. LARDER_E_NOT_FOUND as soon as it is known that some chunk will not
 * come, whatever the layer: the request's step is void. */
LARDER_API larder_status larder_load_wait_layer(larder_load* load,
                                                uint32_t layer,
                                                uint32_t deadline_ms);
/* How many layers have landed. Never blocks. */
LARDER_API uint32_t larder_load_layers_ready(const larder_load* load);
/* An eventfd of this load, written to whenever a layer landed or the load
 * ended; owned by the load. Made by the first call; -1 if it cannot be. */
LARDER_API int larder_load_fd(larder_load* load);
/* Waits for the end. LARDER_E_DEADLINE if *this wait* was too short (the load
 * goes on under its own deadline); after any other status nothing lands. */
LARDER_API larder_status larder_load_wait(larder_load* load,
                                          uint32_t deadline_ms,
                                          uint8_t* reasons,
                                          larder_load_result* result);
/* After the return nothing lands. Waits for at most the piece that is being
 * copied. */
LARDER_API void larder_load_cancel(larder_load* load);
/* Cancels if it is under way. */
LARDER_API void larder_load_close(larder_load* load);
LARDER_API larder_job larder_load_job(const larder_load* load);

/* ----------------------------------------------------------------- save -- */

/* At begin: wait for room in staging until the deadline instead of
 * LARDER_E_EXHAUSTED at once. */
#define LARDER_SAVE_WAIT 1u

typedef struct larder_save_opts {
  uint32_t struct_size;
  uint32_t deadline_ms;
  uint32_t flags;       /* LARDER_SAVE_* */
  uint32_t token_count; /* of the chunk; 0 = chunk_tokens */
  uint16_t group;
  /* The box that this rank writes, as in larder_view. */
  uint16_t layer_begin;
  uint16_t layer_count;
  uint16_t head_begin;
  uint16_t head_count;
  uint16_t interleave_index;
  uint16_t interleave_count;
  uint16_t reserved;
  const larder_id* id; /* if known already: LARDER_PRESENT if it is there */
} larder_save_opts;

/* Reserves room for one part of one chunk. LARDER_PRESENT with *out NULL:
 * nothing need be saved. Invisible to everybody until the commit; a writer
 * that dies leaves nothing behind. */
LARDER_API larder_status larder_save_begin(larder_space* space,
                                           const larder_save_opts* opts,
                                           larder_save** out);
/* The staging memory of one layer's segment, K then V as it is kept, to be
 * filled by the caller before the commit. `layer` counts from 0 within the
 * group. Valid until commit, abort or close. */
LARDER_API larder_status larder_save_segment(larder_save* save, uint32_t layer,
                                             void** data, uint64_t* bytes);
/* Fills layers [layer_begin, layer_begin + layer_count) from the caller's
 * paged cache (layer_count 0 = all of the part); blocks or slots of the view
 * count from this chunk's first token. Copies on the calling thread; the
 * source is free at the return. A slot or block below 0 is LARDER_E_INVALID. */
LARDER_API larder_status larder_save_gather(larder_save* save,
                                            const larder_view* view,
                                            uint32_t layer_begin,
                                            uint32_t layer_count);
/* The same from the memory of a device, by kernels on opts->stream, which must
 * be given: returns at once, and the forward pass goes on. What they read must
 * not change before they have run: a stream keeps that order by itself. Commit,
 * truncate, segment and close wait for them; larder_save_gathering says (1)
 * whether they would have to. */
LARDER_API larder_status larder_save_gather_device(
    larder_save* save, const larder_view* view, uint32_t layer_begin,
    uint32_t layer_count, const larder_device_opts* opts);
LARDER_API int larder_save_gathering(const larder_save* save);
/* Drops a suffix of tokens (speculation, preemption): `token_count` are left.
 * May be called after filling; a multiple of block_tokens, not 0. */
LARDER_API larder_status larder_save_truncate(larder_save* save,
                                              uint32_t token_count);

/* The engine's blocks in a chunk, for daemons that publish KV events: told to
 * the tenant's own routers, kept nowhere else, not even sent where nobody asks
 * for it. Without it they learn of the chunk, but not what is in it. */
#define LARDER_BLOCKS_SIGNED 1u /* hashes are int64_t */
/* The KV depends on more than tokens (a salt, an adapter, an image ...), in
 * this chunk or one before: tokens are published only where the operator says
 * so. */
#define LARDER_BLOCKS_KEYED 2u

typedef struct larder_blocks {
  uint32_t struct_size;
  uint32_t flags;         /* LARDER_BLOCKS_* */
  const uint32_t* tokens; /* of the chunk, or NULL; over 8192: none are told */
  const uint64_t* hashes; /* of its blocks, as the engine's own events name
                             them, or NULL; over 2048: none are told */
  uint32_t token_count;
  uint32_t hash_count;
} larder_blocks;

typedef struct larder_commit_opts {
  uint32_t struct_size;
  uint32_t token_begin;          /* position of the chunk's first token */
  const larder_id* id;           /* NULL = that of the begin */
  const larder_id* parent;       /* NULL = not given */
  const larder_id* root_content; /* of a root chunk, or NULL */
  uint8_t lineage;      /* of this part: worst of its own and of what it was
                           computed over (larder_load_result.lineage) */
  uint8_t priority;     /* hint, 0 = usual */
  uint8_t want_durable; /* LARDER_DURABLE will be asked for */
  uint8_t stages;       /* bit larder_stage set: a completion for it */
  uint32_t stop_reason; /* hint */
  larder_queue* queue;  /* NULL = larder_save_wait tells */
  uint64_t user_data;
  const larder_blocks* blocks; /* NULL = not told */
  /* The name of another node of the daemon's cluster (`larder cluster nodes`):
   * the part is sent there at once, for an engine that waits for it
   * (LARDER_LOAD_ARRIVING, larder_await). NULL = none. What is here already
   * (LARDER_PRESENT) is not sent: who waits there finds it here. */
  const char* destination;
} larder_commit_opts;

/* Makes it visible, all or nothing, idempotent. Never waits. On success the
 * staging memory is the library's; the handle is kept for larder_save_wait. An
 * error of the save arrives as the completion of the first stage asked for. */
LARDER_API larder_status larder_save_commit(larder_save* save,
                                            const larder_commit_opts* opts);
LARDER_API larder_status larder_save_wait(larder_save* save, larder_stage stage,
                                          uint32_t deadline_ms);
LARDER_API larder_job larder_save_job(const larder_save* save);
/* Before the commit: aborts. After it: the save goes on. */
LARDER_API void larder_save_close(larder_save* save);

/* --------------------------------------------------------------- values -- */

/* Values under the engine's own keys, in a space with value_bytes_max: one
 * immutable value per key, made of `pieces_per_key` pieces of memory. */
typedef struct larder_keys {
  const void* data;
  uint32_t key_bytes; /* 1..64, the same for all */
  uint32_t stride;    /* 0 = key_bytes */
  uint32_t count;
  uint32_t reserved;
} larder_keys;

typedef struct larder_piece {
  void* data;
  uint64_t bytes;
} larder_piece;

typedef struct larder_value_opts {
  uint32_t struct_size;
  uint32_t deadline_ms;
  uint32_t flags;         /* LARDER_GET_* */
  uint32_t want_durable;  /* put: done only when durable */
  uint32_t worst_lineage; /* get */
  uint32_t priority;      /* put: hint */
} larder_value_opts;

/* get: stop at the first miss. */
#define LARDER_GET_PREFIX 1u
/* get: a value shorter than its pieces is a miss, too (NOT_TRIED): for callers
 * whose buffer's size is part of what they ask for. */
#define LARDER_GET_EXACT 2u
/* get: sizes are told of values, too, that are not the size of their pieces
 * (NOT_TRIED): for callers who do not know how much memory it takes. */
#define LARDER_GET_SIZES 4u

/* pieces[key * pieces_per_key + i]. `reasons` (may be NULL): `count` bytes, 0 =
 * stored (or there already). LARDER_OK whatever single keys did; UNAVAILABLE,
 * DEADLINE and CANCELLED say what cut the batch short, with reasons set. */
LARDER_API larder_status larder_put(
    larder_space* space, const larder_keys* keys, const larder_piece* pieces,
    uint32_t pieces_per_key, const larder_value_opts* opts, uint8_t* reasons);
/* Pieces are filled in order; a value longer than them is a miss
 * (LARDER_REASON_NOT_TRIED), a shorter one fills as far as it goes. `bytes`
 * (may be NULL) receives the size of each value, 0 for a miss. The memory of a
 * key that misses is untouched unless the reason is LARDER_REASON_CORRUPT or
 * LARDER_REASON_DEADLINE. */
LARDER_API larder_status larder_get(larder_space* space,
                                    const larder_keys* keys,
                                    const larder_piece* pieces,
                                    uint32_t pieces_per_key,
                                    const larder_value_opts* opts,
                                    uint8_t* reasons, uint64_t* bytes);
/* The same on worker threads; keys and the array of pieces are copied. */
LARDER_API larder_status larder_submit_put(
    larder_space* space, larder_queue* queue, const larder_keys* keys,
    const larder_piece* pieces, uint32_t pieces_per_key,
    const larder_value_opts* opts, uint64_t user_data, larder_job* job);
LARDER_API larder_status larder_submit_get(
    larder_space* space, larder_queue* queue, const larder_keys* keys,
    const larder_piece* pieces, uint32_t pieces_per_key,
    const larder_value_opts* opts, uint64_t user_data, larder_job* job);

/* -------------------------------------------------------------- control -- */

/* Drops chunks from every tier. *deleted may be NULL. */
LARDER_API larder_status larder_delete(larder_space* space,
                                       const larder_id* ids, size_t count,
                                       uint32_t deadline_ms, uint64_t* deleted);
LARDER_API larder_status larder_submit_delete(
    larder_space* space, larder_queue* queue, const larder_id* ids,
    size_t count, uint32_t deadline_ms, uint64_t user_data, larder_job* job);

typedef struct larder_listed {
  larder_id id;
  uint64_t bytes;
  uint32_t token_count;
  uint8_t tier; /* fastest: 2 DRAM, 4 NVMe */
  uint8_t is_tail;
  uint8_t lineage;
  uint8_t reserved;
} larder_listed;

/* A page of the space's chunks in id order. `cursor` NULL = from the start,
 * else the last id of the page before. *more is set if there are further. */
LARDER_API larder_status larder_list(larder_space* space,
                                     const larder_id* cursor,
                                     larder_listed* entries, size_t capacity,
                                     uint32_t deadline_ms, size_t* count,
                                     uint32_t* more);

/* Takes a job back. One that has not started completes with
 * LARDER_E_CANCELLED; one that runs stops between pieces. Its completion
 * still comes. LARDER_E_NOT_FOUND if it is done. */
LARDER_API larder_status larder_cancel(larder_client* client, larder_job job);
/* Waits until no submitted or started operation is left; those not done at the
 * deadline are cancelled first. After the return (whatever the status) none
 * touches the caller's memory. */
LARDER_API larder_status larder_drain(larder_client* client,
                                      uint32_t deadline_ms);

#ifdef __cplusplus
}
#endif

#endif /* LARDER_CLIENT_LARDER_C_H_ */
