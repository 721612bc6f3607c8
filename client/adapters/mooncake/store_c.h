/* The calls of Mooncake's C interface (its store_c.h), with Larder behind them:
 * recompile a program against this header, link liblarder_mooncake, and its
 * values lie in the larderd of this host.
 *
 * Codes are Mooncake's: 0 or a size, below 0 an error (-200 full, -600 wrong
 * parameters, -704 not there, -900 the daemon is gone, -901 too late, -1010 not
 * set up, -1011 Larder has nothing like it); -1 for a NULL where there must be
 * none. README.md beside this file says what differs.
 *
 * Every call ends within 5 seconds. Threads: any number, but setup and destroy
 * alone. Nothing that is pointed to is used after the return. */
#ifndef LARDER_CLIENT_ADAPTERS_MOONCAKE_STORE_C_H_
#define LARDER_CLIENT_ADAPTERS_MOONCAKE_STORE_C_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define LARDER_MOONCAKE_API __attribute__((visibility("default")))
#else
#define LARDER_MOONCAKE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef void* mooncake_store_t;

/* Accepted and ignored: a value is kept once, in the daemon's tiers. */
struct mooncake_replicate_config {
  size_t replica_num;
  int with_soft_pin;
  int with_hard_pin;
  const char** preferred_segments;
  size_t preferred_segments_count;
};
typedef struct mooncake_replicate_config mooncake_replicate_config_t;

/* ---- Life ---- */

LARDER_MOONCAKE_API mooncake_store_t mooncake_store_create(void);
LARDER_MOONCAKE_API void mooncake_store_destroy(mooncake_store_t store);
/* An address "larder://PATH", as the master's or the metadata server's, names
 * larderd's socket; without one it is /run/larder/larderd.sock. All else is the
 * daemon's own business. */
LARDER_MOONCAKE_API int mooncake_store_setup(
    mooncake_store_t store, const char* local_hostname,
    const char* metadata_server, uint64_t global_segment_size,
    uint64_t local_buffer_size, const char* protocol, const char* device_name,
    const char* master_server_addr);
LARDER_MOONCAKE_API int mooncake_store_init_all(
    mooncake_store_t store, const char* protocol, const char* device_name,
    uint64_t mount_segment_size); /* -1011 */
LARDER_MOONCAKE_API int mooncake_store_health_check(mooncake_store_t store);
/* 0, or -1 if it does not fit. */
LARDER_MOONCAKE_API int mooncake_store_get_hostname(mooncake_store_t store,
                                                    char* buf_out,
                                                    size_t buf_len);

/* ---- Put: the first value of a key stays ---- */

LARDER_MOONCAKE_API int mooncake_store_put(
    mooncake_store_t store, const char* key, const void* value, size_t size,
    const mooncake_replicate_config_t* config);
LARDER_MOONCAKE_API int mooncake_store_put_from(
    mooncake_store_t store, const char* key, void* buffer, size_t size,
    const mooncake_replicate_config_t* config);
/* 0, with a code for each key in results_out. */
LARDER_MOONCAKE_API int mooncake_store_batch_put_from(
    mooncake_store_t store, const char** keys, void** buffers,
    const size_t* sizes, size_t count,
    const mooncake_replicate_config_t* config, int* results_out);

/* ---- Get: the value's size, or an error ---- */

LARDER_MOONCAKE_API int64_t mooncake_store_get_into(mooncake_store_t store,
                                                    const char* key,
                                                    void* buffer, size_t size);
LARDER_MOONCAKE_API int mooncake_store_batch_get_into(
    mooncake_store_t store, const char** keys, void** buffers,
    const size_t* sizes, size_t count, int64_t* results_out);

/* ---- Presence: 1, 0, or an error ---- */

LARDER_MOONCAKE_API int mooncake_store_is_exist(mooncake_store_t store,
                                                const char* key);
LARDER_MOONCAKE_API int mooncake_store_batch_is_exist(mooncake_store_t store,
                                                      const char** keys,
                                                      size_t count,
                                                      int* results_out);
LARDER_MOONCAKE_API int64_t mooncake_store_get_size(mooncake_store_t store,
                                                    const char* key);

/* ---- Remove. There are no leases that `force` could break ---- */

LARDER_MOONCAKE_API int mooncake_store_remove(mooncake_store_t store,
                                              const char* key, int force);
LARDER_MOONCAKE_API int64_t mooncake_store_remove_by_regex(
    mooncake_store_t store, const char* pattern, int force); /* -1011 */
/* How many there were. */
LARDER_MOONCAKE_API int64_t mooncake_store_remove_all(mooncake_store_t store,
                                                      int force);

/* ---- Buffers: any memory will do, nothing need be registered ---- */

LARDER_MOONCAKE_API int mooncake_store_register_buffer(mooncake_store_t store,
                                                       void* buffer,
                                                       size_t size);
LARDER_MOONCAKE_API int mooncake_store_unregister_buffer(mooncake_store_t store,
                                                         void* buffer);

/* ---- Figures: -1, ask `larder status` ---- */

LARDER_MOONCAKE_API int mooncake_store_calc_cache_stats(mooncake_store_t store,
                                                        char* buf_out,
                                                        size_t buf_len);
LARDER_MOONCAKE_API int mooncake_store_get_client_stats(mooncake_store_t store,
                                                        char* buf_out,
                                                        size_t buf_len);

#ifdef __cplusplus
}
#endif

#endif /* LARDER_CLIENT_ADAPTERS_MOONCAKE_STORE_C_H_ */
