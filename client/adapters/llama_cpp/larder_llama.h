/* KV of llama.cpp's sequences, kept in Larder: for programs that own a
 * llama_context and want two calls, whatever language they are written in.
 *
 *   larder_llama_open(context, &opts, &kept);      once, before any decode
 *   n = larder_llama_restore(kept, seq, tokens, count);
 *   ... llama_decode of tokens [n, count), and of the answer ...
 *   larder_llama_save(kept, seq, tokens, count);   prompt and answer
 *
 * Another sequence, another process or, after a restart, the same one restores
 * what was saved: whole chunks, and the end of what one save was given.
 *
 * Larder that is gone, slow or full is a prefix of 0 tokens or a save left out,
 * in time, never a failure; larder_llama_problem() says what happened.
 *
 * Threads: as llama.cpp, one at a time, and no llama_decode meanwhile. Built
 * for the llama.h it was compiled with: another size of llama_context_params is
 * refused. client/adapters/llama_cpp/README.md: which models, and when logits
 * are the same to the last bit. */
#ifndef LARDER_LLAMA_H_
#define LARDER_LLAMA_H_

#include <stddef.h>
#include <stdint.h>

#include "larder_c.h"
#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct larder_llama larder_llama;

typedef struct larder_llama_opts {
  uint32_t struct_size; /* sizeof(larder_llama_opts) */
  /* sizeof(struct llama_context_params), and those the context was made with:
   * libllama does not give them back. */
  uint32_t context_params_bytes;
  const struct llama_context_params* context_params;
  /* The GGUF files of the model. Their digest is kept beside them. */
  const char* const* model_files;
  uint32_t model_file_count;
  uint32_t chunk_tokens; /* 0 = 256 */
  /* A sequence below n_seq_max that the program leaves to Larder, or -1. With
   * it and kv_unified a save costs what it reads, not what the context holds.
   */
  int32_t scratch_sequence;
  uint32_t load_deadline_ms; /* of a restore; 0 = 2000 */
  uint32_t save_deadline_ms; /* of each chunk of a save; 0 = 1000 */
  uint32_t reserved;
  const char* socket_path; /* as in larder_client_opts */
  const char* token;
  const char* name;
} larder_llama_opts;

/* The context and its model must outlive what is opened here. Decodes one token
 * in the scratch sequence (or in sequence 0), which must be empty, and removes
 * it. LARDER_E_INVALID, LARDER_E_UNSUPPORTED (a kind of memory that cannot be
 * cut by tokens), LARDER_E_UNAVAILABLE (no daemon, or no file) or
 * LARDER_E_INTERNAL; larder_llama_open_error() has the sentence. */
LARDER_API larder_status larder_llama_open(struct llama_context* context,
                                           const larder_llama_opts* opts,
                                           larder_llama** kept);
LARDER_API void larder_llama_close(larder_llama* kept);
/* Of the calling thread's last larder_llama_open. */
LARDER_API const char* larder_llama_open_error(void);

/* Replaces what the sequence holds by the longest prefix of `tokens` that
 * Larder has, and returns how many tokens that is, `count` - 1 at most: the
 * last one must be decoded, to have logits. 0: the sequence is empty. */
LARDER_API uint32_t larder_llama_restore(larder_llama* kept, llama_seq_id seq,
                                         const llama_token* tokens,
                                         size_t count);

/* Saves what the sequence holds of `tokens` (those from position 0 on), and
 * returns how many tokens of it are in Larder now. What is there is not sent
 * again. */
LARDER_API uint32_t larder_llama_save(larder_llama* kept, llama_seq_id seq,
                                      const llama_token* tokens, size_t count);

/* Where a batch that begins at token `begin` should end, so that KV is the same
 * to the last bit however much of it was restored: at the latest after
 * `batch_tokens`, and at the end of a chunk. */
LARDER_API uint32_t larder_llama_next_cut(const larder_llama* kept,
                                          uint32_t begin,
                                          uint32_t batch_tokens);

/* What went wrong in the last restore or save, for people; "" if nothing did.
 * Until the next call. */
LARDER_API const char* larder_llama_problem(const larder_llama* kept);

#ifdef __cplusplus
}
#endif

#endif /* LARDER_LLAMA_H_ */
