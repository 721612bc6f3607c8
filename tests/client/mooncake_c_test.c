/* Mooncake's C calls, in C99: mooncake_c_test larder://SOCKET */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "store_c.h"

#define CHECK(condition)                                      \
  do {                                                        \
    if (!(condition)) {                                       \
      fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
      exit(1);                                                \
    }                                                         \
  } while (0)

static void WithoutSetup(void) {
  mooncake_store_t store = mooncake_store_create();
  char buffer[4];
  CHECK(store != NULL);
  CHECK(mooncake_store_put(store, "a", "v", 1, NULL) == -1010);
  CHECK(mooncake_store_get_into(store, "a", buffer, 4) == -1010);
  CHECK(mooncake_store_is_exist(store, "a") == -1010);
  CHECK(mooncake_store_get_size(store, "a") == -1010);
  CHECK(mooncake_store_remove(store, "a", 0) == -1010);
  CHECK(mooncake_store_health_check(store) == -1010);
  CHECK(mooncake_store_setup(store, "host", "", 0, 0, "tcp", "",
                             "larder:///nobody/here") == -900);
  CHECK(mooncake_store_put(NULL, "a", "v", 1, NULL) == -1);
  CHECK(mooncake_store_put(store, NULL, "v", 1, NULL) == -1);
  CHECK(mooncake_store_put(store, "a", NULL, 1, NULL) == -1);
  mooncake_store_destroy(store);
  mooncake_store_destroy(NULL);
}

int main(int argc, char** argv) {
  mooncake_replicate_config_t config = {1, 0, 0, NULL, 0};
  mooncake_store_t store = mooncake_store_create();
  char buffer[64];
  WithoutSetup();
  CHECK(argc == 2);
  CHECK(mooncake_store_setup(store, "host", "ignored", 64 << 20, 32 << 20,
                             "tcp", "", argv[1]) == 0);
  CHECK(mooncake_store_health_check(store) == 0);
  CHECK(mooncake_store_get_hostname(store, buffer, sizeof buffer) == 0);
  CHECK(strcmp(buffer, "host") == 0);
  CHECK(mooncake_store_get_hostname(store, buffer, 4) == -1);

  CHECK(mooncake_store_put(store, "c a", "hello", 5, &config) == 0);
  CHECK(mooncake_store_put(store, "c a", "other", 5, NULL) == 0);
  CHECK(mooncake_store_put(store, "c e", "", 0, NULL) == -600);
  CHECK(mooncake_store_put(store, "", "x", 1, NULL) == -600);
  CHECK(mooncake_store_get_size(store, "c a") == 5);
  CHECK(mooncake_store_get_size(store, "c none") == -704);
  CHECK(mooncake_store_is_exist(store, "c a") == 1);
  CHECK(mooncake_store_is_exist(store, "c none") == 0);
  CHECK(mooncake_store_register_buffer(store, buffer, sizeof buffer) == 0);
  CHECK(mooncake_store_get_into(store, "c a", buffer, sizeof buffer) == 5);
  CHECK(memcmp(buffer, "hello", 5) == 0); /* the first value stays */
  CHECK(mooncake_store_get_into(store, "c a", buffer, 4) == -600);
  CHECK(mooncake_store_get_into(store, "c none", buffer, 4) == -704);

  {
    const char* keys[4] = {"c 1", "", "c 2", "c 3"};
    void* from[4] = {"one", "none", "twotwo", "three"};
    const size_t sizes[4] = {3, 4, 6, 5};
    int codes[4];
    CHECK(mooncake_store_batch_put_from(store, keys, from, sizes, 4, &config,
                                        codes) == 0);
    CHECK(codes[0] == 0 && codes[1] == -600 && codes[2] == 0 && codes[3] == 0);
    CHECK(mooncake_store_batch_put_from(store, keys, from, sizes, 4, NULL,
                                        NULL) == -1);
  }
  {
    const char* keys[4] = {"c 2", "c none", "c 1", "c 3"};
    void* into[4] = {buffer, buffer + 10, buffer + 20, buffer + 30};
    const size_t sizes[4] = {10, 10, 3, 2};
    int64_t got[4];
    int there[4];
    memset(buffer, '.', sizeof buffer);
    CHECK(mooncake_store_batch_get_into(store, keys, into, sizes, 4, got) == 0);
    CHECK(got[0] == 6 && got[1] == -704 && got[2] == 3 && got[3] == -600);
    CHECK(memcmp(buffer, "twotwo", 6) == 0);
    CHECK(memcmp(buffer + 10, "....", 4) == 0);
    CHECK(memcmp(buffer + 20, "one.", 4) == 0);
    CHECK(memcmp(buffer + 30, "..", 2) == 0);
    CHECK(mooncake_store_batch_is_exist(store, keys, 4, there) == 0);
    CHECK(there[0] == 1 && there[1] == 0 && there[2] == 1 && there[3] == 1);
    CHECK(mooncake_store_batch_is_exist(store, keys, 0, there) == 0);
  }
  {
    const size_t bytes = 20 << 20;
    char* large = malloc(bytes);
    char* back = malloc(bytes);
    size_t i;
    for (i = 0; i < bytes; ++i) large[i] = (char)(i * 7 + i / 4096);
    CHECK(mooncake_store_put_from(store, "c large", large, bytes, NULL) == 0);
    CHECK(mooncake_store_get_into(store, "c large", back, bytes) ==
          (int64_t)bytes);
    CHECK(memcmp(large, back, bytes) == 0);
    free(large);
    free(back);
  }
  CHECK(mooncake_store_remove(store, "c a", 1) == 0);
  CHECK(mooncake_store_remove(store, "c a", 1) == -704);
  CHECK(mooncake_store_is_exist(store, "c a") == 0);
  CHECK(mooncake_store_remove_by_regex(store, ".*", 1) == -1011);
  CHECK(mooncake_store_init_all(store, "tcp", "", 0) == -1011);
  CHECK(mooncake_store_calc_cache_stats(store, buffer, sizeof buffer) == -1);
  CHECK(mooncake_store_remove_all(store, 1) == 4);
  CHECK(mooncake_store_remove_all(store, 1) == 0);
  CHECK(mooncake_store_put(store, "c left", "for Python", 10, NULL) == 0);
  CHECK(mooncake_store_unregister_buffer(store, buffer) == 0);
  mooncake_store_destroy(store);
  puts("ok");
  return 0;
}
