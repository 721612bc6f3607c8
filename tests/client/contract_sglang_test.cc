// Larder as SGLang's HiCache storage backend: blocking batch calls from daemon
// threads that an exception would kill, K and V as two pieces per page, counts
// of consecutive hits, lists of bools.

#include <atomic>
#include <chrono>
#include <thread>

#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/client/kv_samples.h"
#include "tests/testing/await.h"
#include "tests/testing/daemon_fixture.h"

namespace larder {
namespace {

using namespace samples;  // NOLINT

constexpr size_t kPageHalf = 3072;  // K, and V, of one page_first page

// page_first: (2, size, L, H, D); a page is two pieces.
struct HostPool {
  explicit HostPool(size_t pages)
      : k(pages * kPageHalf, 0xee), v(pages * kPageHalf, 0xee) {}
  void Fill(size_t page, uint32_t content) {
    for (uint32_t i = 0; i < kPageHalf; ++i) {
      k[page * kPageHalf + i] = ByteOf(content, 0, 0, false, i, 1);
      v[page * kPageHalf + i] = ByteOf(content, 0, 0, true, i, 1);
    }
  }
  bool Holds(size_t page, uint32_t content) const {
    for (uint32_t i = 0; i < kPageHalf; ++i) {
      if (k[page * kPageHalf + i] != ByteOf(content, 0, 0, false, i, 1) ||
          v[page * kPageHalf + i] != ByteOf(content, 0, 0, true, i, 1)) {
        return false;
      }
    }
    return true;
  }
  bool Untouched(size_t page) const {
    return k[page * kPageHalf] == 0xee && v[page * kPageHalf] == 0xee;
  }
  std::vector<uint8_t> k, v;
};

std::string PageKey(uint32_t page) {  // 64 hexadecimal digits
  char key[65];
  std::snprintf(key, sizeof key, "%064x", page * 2654435761u);
  return key;
}

class HiCacheBackend {
 public:
  HiCacheBackend(const std::string& path, HostPool& pool) : pool_(pool) {
    ClientOptions options;
    options.socket_path = path;
    options.default_deadline = std::chrono::seconds(20);
    client_ = *Client::Open(options);
    SpaceOptions space = SmallSpaceOptions();
    space.groups.clear();
    space.block_tokens = space.chunk_tokens = 0;
    space.value_bytes_max = 2 * kPageHalf;
    space.engine_layout = "sglang page_first rank 0/1";
    space.hash_scheme = "sglang:sha256:ps=64";
    space_ = *client_.OpenSpace(space);
  }
  uint32_t BatchExists(const std::vector<std::string>& keys) {
    std::vector<Id> ids;
    for (const auto& key : keys) ids.push_back(*space_.IdFromHash(key));
    std::vector<uint8_t> states(ids.size());
    uint32_t row = 0;
    return larder_lookup(space_.get(), ids.data(), ids.size(), 0, states.data(),
                         &row) == LARDER_OK
               ? row
               : 0;
  }
  std::vector<bool> BatchGetV1(const std::vector<std::string>& keys,
                               const std::vector<size_t>& pages,
                               uint32_t deadline_ms = 0) {
    auto opts = internal::Sized<larder_value_opts>();
    opts.deadline_ms = deadline_ms;
    return Batch(keys, pages, [&](auto* named, auto* pieces, auto* reasons) {
      larder_get(space_.get(), named, pieces, 2, &opts, reasons, nullptr);
    });
  }
  std::vector<bool> BatchSetV1(const std::vector<std::string>& keys,
                               const std::vector<size_t>& pages) {
    return Batch(keys, pages, [&](auto* named, auto* pieces, auto* reasons) {
      larder_put(space_.get(), named, pieces, 2, nullptr, reasons);
    });
  }

 private:
  template <class Call>
  std::vector<bool> Batch(const std::vector<std::string>& keys,
                          const std::vector<size_t>& pages, Call call) {
    std::string data;
    std::vector<larder_piece> pieces;
    for (size_t i = 0; i < keys.size(); ++i) {
      data += keys[i];
      pieces.push_back({pool_.k.data() + pages[i] * kPageHalf, kPageHalf});
      pieces.push_back({pool_.v.data() + pages[i] * kPageHalf, kPageHalf});
    }
    const larder_keys named{data.data(), 64, 0,
                            static_cast<uint32_t>(keys.size()), 0};
    // Whatever the status, what is not said to be there is not.
    std::vector<uint8_t> reasons(keys.size(), LARDER_REASON_UNAVAILABLE);
    call(&named, pieces.data(), reasons.data());
    std::vector<bool> good;
    for (const uint8_t reason : reasons) {
      good.push_back(reason == LARDER_REASON_NONE);
    }
    return good;
  }

  HostPool& pool_;
  Client client_;
  Space space_;
};

TEST(SglangBackend, BackupAndPrefetchFromTheirThreads) {
  DaemonFixture daemon;
  HostPool pool(256);
  HiCacheBackend backend(daemon.socket_path(), pool);
  std::vector<std::string> keys;
  std::vector<size_t> pages;
  for (uint32_t i = 0; i < 128; ++i) {  // at most so many per call
    keys.push_back(PageKey(i));
    pages.push_back(i);
    pool.Fill(i, i);
  }
  EXPECT_EQ(backend.BatchExists(keys), 0u);
  std::thread backup([&] {
    EXPECT_EQ(backend.BatchSetV1(keys, pages), std::vector<bool>(128, true));
  });
  std::thread prefetch([&] {
    for (int i = 0; i < 20; ++i) backend.BatchExists(keys);
  });
  backup.join();
  prefetch.join();
  EXPECT_EQ(backend.BatchExists(keys), 128u);

  // A hole: the count stops, single pages behind it are served.
  std::vector<std::string> holed = {keys[5], PageKey(9999), keys[7]};
  EXPECT_EQ(backend.BatchExists(holed), 1u);
  EXPECT_EQ(backend.BatchGetV1(holed, {200, 201, 202}),
            (std::vector<bool>{true, false, true}));
  EXPECT_TRUE(pool.Holds(200, 5));
  EXPECT_TRUE(pool.Untouched(201));
  EXPECT_TRUE(pool.Holds(202, 7));
}

TEST(SglangBackend, EverythingThatCanFailIsFalse) {
  DaemonFixture daemon;
  HostPool pool(4);
  HiCacheBackend backend(daemon.socket_path(), pool);
  pool.Fill(0, 0);
  EXPECT_EQ(backend.BatchSetV1({PageKey(0)}, {0}), std::vector<bool>{true});
  daemon.Stop();
  EXPECT_EQ(backend.BatchExists({PageKey(0)}), 0u);
  EXPECT_EQ(backend.BatchGetV1({PageKey(0)}, {1}), std::vector<bool>{false});
  EXPECT_EQ(backend.BatchSetV1({PageKey(1)}, {0}), std::vector<bool>{false});
  EXPECT_TRUE(pool.Untouched(1));
  daemon.Start();
  AwaitThat([&] { return bool{backend.BatchSetV1({PageKey(1)}, {0})[0]}; });
}

}  // namespace
}  // namespace larder
