/* The header and the shared library as a C99 program sees them: calls with
 * nothing, with structs of other sizes, and what the answers say. */

#include <stdio.h>
#include <string.h>

#include "larder_c.h"

static int failures = 0;
#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      printf("line %d: %s (%s)\n", __LINE__, #condition, larder_last_error()); \
      ++failures;                                                              \
    }                                                                          \
  } while (0)

int main(void) {
  larder_client* client = NULL;
  larder_client_opts opts;
  size_t count = 0;
  uint32_t reason = 0;
  struct {
    larder_client_opts known;
    uint64_t newer;
  } grown;

  CHECK(larder_version() ==
        (LARDER_VERSION_MAJOR << 16 | LARDER_VERSION_MINOR));
  CHECK(strcmp(larder_last_error(), "") == 0);
  CHECK(strcmp(larder_status_name(LARDER_OK), "ok") == 0);
  CHECK(strcmp(larder_status_name(12345), "unknown status") == 0);
  CHECK(strcmp(larder_reason_name(LARDER_REASON_CORRUPT), "corrupt") == 0);

  /* Nobody listens there. */
  memset(&opts, 0, sizeof opts);
  opts.struct_size = sizeof opts;
  opts.socket_path = "/nonexistent/larder.sock";
  CHECK(larder_client_open(&opts, 100, &client) == LARDER_E_UNAVAILABLE);
  CHECK(client == NULL);
  CHECK(strlen(larder_last_error()) > 0);

  /* A struct without its size; one of a newer header that asks for nothing
   * new; one that does; an older, shorter one. */
  opts.struct_size = 0;
  CHECK(larder_client_open(&opts, 100, &client) == LARDER_E_INVALID);
  opts.struct_size = sizeof opts;
  memset(&grown, 0, sizeof grown);
  grown.known = opts;
  grown.known.struct_size = sizeof grown;
  CHECK(larder_client_open(&grown.known, 100, &client) == LARDER_E_UNAVAILABLE);
  grown.newer = 1;
  CHECK(larder_client_open(&grown.known, 100, &client) == LARDER_E_UNSUPPORTED);
  opts.struct_size = 16;
  CHECK(offsetof(larder_client_opts, name) >= 16);
  CHECK(larder_client_open(&opts, 100, &client) == LARDER_E_UNAVAILABLE);
  opts.struct_size = sizeof opts;
  opts.default_deadline_ms = LARDER_NO_DEADLINE;
  CHECK(larder_client_open(&opts, 100, &client) == LARDER_E_INVALID);

  /* NULL everywhere. */
  CHECK(larder_client_open(NULL, 100, NULL) == LARDER_E_INVALID);
  larder_client_close(NULL);
  larder_space_close(NULL);
  larder_hold_close(NULL);
  larder_load_close(NULL);
  larder_load_cancel(NULL);
  larder_save_close(NULL);
  larder_queue_close(NULL);
  larder_region_close(NULL);
  CHECK(larder_health(NULL) == LARDER_E_INVALID);
  CHECK(larder_ping(NULL, 0) == LARDER_E_INVALID);
  CHECK(larder_get_usage(NULL, 0, NULL) == LARDER_E_INVALID);
  CHECK(larder_space_open(NULL, NULL, 0, NULL) == LARDER_E_INVALID);
  CHECK(larder_space_id(NULL, NULL) == LARDER_E_INVALID);
  CHECK(larder_space_encoding(NULL, NULL, 0, NULL) == LARDER_E_INVALID);
  CHECK(larder_space_epoch(NULL) == 0);
  CHECK(larder_advance_epoch(NULL, 0, NULL) == LARDER_E_INVALID);
  CHECK(larder_ids_from_tokens(NULL, NULL, 0, NULL, 0, NULL, 0, &count, NULL) ==
        LARDER_E_INVALID);
  CHECK(larder_id_from_tokens(NULL, NULL, NULL, 0, NULL, 0, NULL) ==
        LARDER_E_INVALID);
  CHECK(larder_ids_from_hashes(NULL, NULL, 0, 0, 0, NULL) == LARDER_E_INVALID);
  CHECK(larder_root_content(NULL, 0, NULL, 0, NULL) == LARDER_E_INVALID);
  CHECK(larder_queue_open(NULL, NULL) == LARDER_E_INVALID);
  CHECK(larder_queue_fd(NULL) == -1);
  CHECK(larder_queue_poll(NULL, NULL, 0, 0) == LARDER_E_INVALID);
  CHECK(larder_match(NULL, NULL, 0, NULL, NULL, NULL) == LARDER_E_INVALID);
  CHECK(larder_match_cached(NULL, NULL, 0, NULL, NULL, NULL) ==
        LARDER_E_INVALID);
  CHECK(larder_submit_match(NULL, NULL, NULL, 0, NULL, 0, NULL) ==
        LARDER_E_INVALID);
  CHECK(larder_lookup(NULL, NULL, 0, 0, NULL, NULL) == LARDER_E_INVALID);
  CHECK(larder_lookup_cached(NULL, NULL, 0, NULL, NULL) == LARDER_E_INVALID);
  CHECK(larder_submit_lookup(NULL, NULL, NULL, 0, 0, 0, NULL) ==
        LARDER_E_INVALID);
  CHECK(larder_prefetch(NULL, NULL, 0) == LARDER_E_INVALID);
  CHECK(larder_why_miss(NULL, NULL, NULL, 0, &reason, NULL, 0) ==
        LARDER_E_INVALID);
  CHECK(larder_hold_open(NULL, NULL, 0, NULL, NULL, NULL, NULL) ==
        LARDER_E_INVALID);
  CHECK(larder_hold_attach(NULL, 0, NULL, 0, 0, NULL) == LARDER_E_INVALID);
  CHECK(larder_hold_token(NULL) == 0);
  CHECK(larder_hold_check(NULL) == LARDER_E_INVALID);
  CHECK(larder_hold_renew(NULL, 0, 0, NULL) == LARDER_E_INVALID);
  CHECK(larder_hold_map(NULL, 0, 0, 0, 0, NULL, 0, &count) == LARDER_E_INVALID);
  CHECK(larder_region_open(NULL, NULL, NULL) == LARDER_E_INVALID);
  CHECK(larder_region_base(NULL) == NULL);
  CHECK(larder_load_now(NULL, NULL, 0, NULL, 0, NULL, NULL, NULL) ==
        LARDER_E_INVALID);
  CHECK(larder_load_start(NULL, NULL, 0, NULL, 0, NULL, NULL, 0, NULL) ==
        LARDER_E_INVALID);
  CHECK(larder_load_wait(NULL, 0, NULL, NULL) == LARDER_E_INVALID);
  CHECK(larder_load_wait_layer(NULL, 0, 0) == LARDER_E_INVALID);
  CHECK(larder_load_layers_ready(NULL) == 0);
  CHECK(larder_load_fd(NULL) == -1);
  CHECK(larder_load_job(NULL) == 0);
  CHECK(larder_save_begin(NULL, NULL, NULL) == LARDER_E_INVALID);
  CHECK(larder_save_segment(NULL, 0, NULL, NULL) == LARDER_E_INVALID);
  CHECK(larder_save_gather(NULL, NULL, 0, 0) == LARDER_E_INVALID);
  CHECK(larder_save_truncate(NULL, 0) == LARDER_E_INVALID);
  CHECK(larder_save_commit(NULL, NULL) == LARDER_E_INVALID);
  CHECK(larder_save_wait(NULL, LARDER_VOLATILE, 0) == LARDER_E_INVALID);
  CHECK(larder_save_job(NULL) == 0);
  CHECK(larder_put(NULL, NULL, NULL, 0, NULL, NULL) == LARDER_E_INVALID);
  CHECK(larder_get(NULL, NULL, NULL, 0, NULL, NULL, NULL) == LARDER_E_INVALID);
  CHECK(larder_submit_put(NULL, NULL, NULL, NULL, 0, NULL, 0, NULL) ==
        LARDER_E_INVALID);
  CHECK(larder_submit_get(NULL, NULL, NULL, NULL, 0, NULL, 0, NULL) ==
        LARDER_E_INVALID);
  CHECK(larder_delete(NULL, NULL, 0, 0, NULL) == LARDER_E_INVALID);
  CHECK(larder_submit_delete(NULL, NULL, NULL, 0, 0, 0, NULL) ==
        LARDER_E_INVALID);
  CHECK(larder_list(NULL, NULL, NULL, 0, 0, NULL, NULL) == LARDER_E_INVALID);
  CHECK(larder_cancel(NULL, 0) == LARDER_E_INVALID);
  CHECK(larder_drain(NULL, 0) == LARDER_E_INVALID);

  printf("%d failures\n", failures);
  return failures != 0;
}
