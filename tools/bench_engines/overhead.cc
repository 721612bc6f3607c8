// What a call costs from C++: the other half of overhead.py. Reads lines "CALL
// COUNT" from standard input, makes so many calls, answers with their median in
// nanoseconds; so both languages are measured in turns, against one daemon.
//
//   larder_bench_calls SOCKET   then lines of: get | lookup | put, a number

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include "client/larder_c.h"

namespace {

constexpr uint32_t kKeys = 32;
constexpr uint64_t kValueBytes = 4096;
constexpr uint32_t kIds = 512;
// Not timed, before each block: whoever comes from the pipe finds cold caches.
constexpr int kWarmUp = 2;

void Must(int32_t status) {
  if (status >= 0) return;
  std::fprintf(stderr, "%s\n", larder_last_error());
  std::exit(1);
}

int64_t MedianNs(int calls, const std::function<void()>& call) {
  for (int i = 0; i < kWarmUp; ++i) call();
  std::vector<int64_t> times;
  for (int i = 0; i < calls; ++i) {
    const auto start = std::chrono::steady_clock::now();
    call();
    times.push_back((std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + calls / 2, times.end());
  return times[calls / 2];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  larder_client_opts options = {};
  options.struct_size = sizeof options;
  options.socket_path = argv[1];
  larder_client* client = nullptr;
  Must(larder_client_open(&options, 10'000, &client));
  // The same space, keys and values as overhead.py.
  const larder_id weights = {{1}};
  larder_space_desc about = {};
  about.struct_size = sizeof about;
  about.model_name = "overhead";
  about.weights = &weights;
  about.cache_dtype = "u8";
  about.kv_scales = "none";
  about.rope = "none";
  about.engine_layout = "overhead";
  about.hash_scheme = "overhead";
  about.value_bytes_max = kValueBytes;
  larder_space* space = nullptr;
  Must(larder_space_open(client, &about, 10'000, &space));

  std::vector<std::array<uint8_t, 32>> names(kIds);
  for (uint32_t i = 0; i < kIds; ++i) {
    names[i] = {};
    std::memcpy(names[i].data(), &i, sizeof i);
  }
  larder_keys keys = {};
  keys.data = names.data();
  keys.key_bytes = 32;
  keys.count = kKeys;
  std::vector<uint8_t> memory(kKeys * kValueBytes);
  std::vector<larder_piece> pieces(kKeys);
  for (uint32_t i = 0; i < kKeys; ++i) {
    pieces[i] = {memory.data() + i * kValueBytes, kValueBytes};
  }
  std::vector<larder_id> ids(kIds);
  Must(larder_ids_from_hashes(space, names.data(), 32, 0, kIds, ids.data()));
  std::vector<uint8_t> answer(kIds);
  std::vector<uint64_t> sizes(kKeys);

  std::string what;
  int calls = 0;
  while (std::cin >> what >> calls && calls > 0) {
    std::function<void()> call;
    if (what == "put") {
      call = [&] {
        Must(
            larder_put(space, &keys, pieces.data(), 1, nullptr, answer.data()));
      };
    } else if (what == "get") {
      call = [&] {
        Must(larder_get(space, &keys, pieces.data(), 1, nullptr, answer.data(),
                        sizes.data()));
      };
    } else if (what == "lookup") {
      call = [&] {
        Must(larder_lookup_cached(space, ids.data(), kIds, answer.data(),
                                  nullptr));
      };
    } else {
      return 2;
    }
    std::cout << MedianNs(calls, call) << std::endl;
  }
  larder_space_close(space);
  larder_client_close(client);
}
