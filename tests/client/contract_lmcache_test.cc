// Larder as LMCache's native plug-in uses it: six methods, one eventfd, a store
// thread and a prefetch thread, completions told apart by future id.

#include <poll.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <thread>

#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/client/kv_samples.h"
#include "tests/testing/await.h"
#include "tests/testing/daemon_fixture.h"

namespace larder {
namespace {

using namespace samples;  // NOLINT

constexpr size_t kObject = 20000;

// csrc/storage_backends/connector_interface.h, by duck type. Strings of more
// than 64 bytes are hashed by the plug-in (here: folded, which is enough).
class Connector {
 public:
  struct Completion {
    uint64_t future_id = 0;
    bool ok = false;
    std::vector<bool> result;
  };

  Connector(const std::string& path) {
    ClientOptions options;
    options.socket_path = path;
    options.default_deadline = std::chrono::seconds(20);
    options.worker_threads = 2;
    client_ = *Client::Open(options);
    SpaceOptions space = SmallSpaceOptions();
    space.groups.clear();
    space.block_tokens = space.chunk_tokens = 0;
    space.value_bytes_max = 64 * 1024;
    space.engine_layout = "lmcache KV_2LTD";
    space_ = *client_.OpenSpace(space);
    queue_ = *client_.OpenQueue();
  }
  ~Connector() { Close(); }

  int event_fd() const { return queue_.fd(); }
  uint64_t SubmitBatchSet(const std::vector<std::string>& keys,
                          const std::vector<void*>& buffers, size_t bytes) {
    return SubmitValues(larder_submit_put, keys, buffers, bytes);
  }
  uint64_t SubmitBatchGet(const std::vector<std::string>& keys,
                          const std::vector<void*>& buffers, size_t bytes) {
    return SubmitValues(larder_submit_get, keys, buffers, bytes);
  }
  uint64_t SubmitBatchExists(const std::vector<std::string>& keys) {
    const std::vector<Id> ids = Ids(keys);
    larder_job job = 0;
    EXPECT_EQ(larder_submit_lookup(space_.get(), queue_.get(), ids.data(),
                                   ids.size(), 0, 0, &job),
              LARDER_OK);
    return job;
  }
  uint64_t SubmitBatchDelete(const std::vector<std::string>& keys) {
    const std::vector<Id> ids = Ids(keys);
    larder_job job = 0;
    EXPECT_EQ(larder_submit_delete(space_.get(), queue_.get(), ids.data(),
                                   ids.size(), 0, 0, &job),
              LARDER_OK);
    return job;
  }
  std::vector<Completion> DrainCompletions() {
    std::vector<Completion> out;
    for (const larder_completion& done : *queue_.Poll(256)) {
      Completion completion;
      completion.future_id = done.job;
      completion.ok = done.status == LARDER_OK;
      for (uint32_t i = 0; i < done.count && done.per_key != nullptr; ++i) {
        completion.result.push_back(
            done.op == LARDER_OP_LOOKUP
                ? done.per_key[i] == LARDER_STATE_READY ||
                      done.per_key[i] == LARDER_STATE_DURABLE
                : done.per_key[i] == LARDER_REASON_NONE);
      }
      out.push_back(std::move(completion));
    }
    return out;
  }
  void Close() {
    if (!client_) return;
    client_.Drain(std::chrono::seconds(20)).ok();
    queue_ = Queue();
    space_ = Space();
    client_ = Client();
  }

 private:
  static std::string Fold(const std::string& key) {
    std::string folded = key.substr(0, 64);
    folded.resize(64, '\0');
    for (size_t i = 64; i < key.size(); ++i) folded[i % 64] ^= key[i];
    return folded;
  }
  std::vector<Id> Ids(const std::vector<std::string>& keys) {
    std::vector<Id> ids;
    for (const auto& key : keys) ids.push_back(*space_.IdFromHash(Fold(key)));
    return ids;
  }
  template <class Call>
  uint64_t SubmitValues(Call call, const std::vector<std::string>& keys,
                        const std::vector<void*>& buffers, size_t bytes) {
    std::string data;
    for (const auto& key : keys) data += Fold(key);
    std::vector<larder_piece> pieces;
    for (void* buffer : buffers) pieces.push_back({buffer, bytes});
    const larder_keys named{data.data(), 64, 0,
                            static_cast<uint32_t>(keys.size()), 0};
    larder_job job = 0;
    EXPECT_EQ(call(space_.get(), queue_.get(), &named, pieces.data(), 1,
                   nullptr, 0, &job),
              LARDER_OK)
        << larder_last_error();
    return job;
  }

  Client client_;
  Space space_;
  Queue queue_;
};

// LMCache's demultiplexer: polls the fd, hands completions to who waits.
class Demux {
 public:
  explicit Demux(Connector& connector)
      : connector_(connector), thread_([this] { Run(); }) {}
  ~Demux() {
    stop_ = true;
    thread_.join();
  }
  Connector::Completion Await(uint64_t future) {
    Connector::Completion completion;
    AwaitThat([&] {
      std::lock_guard<std::mutex> lock(mu_);
      auto found = done_.extract(future);
      if (found.empty()) return false;
      completion = std::move(found.mapped());
      return true;
    });
    return completion;
  }

 private:
  void Run() {
    while (!stop_) {
      pollfd fd{connector_.event_fd(), POLLIN, 0};
      if (poll(&fd, 1, 20) <= 0) continue;
      for (auto& completion : connector_.DrainCompletions()) {
        std::lock_guard<std::mutex> lock(mu_);
        done_[completion.future_id] = std::move(completion);
      }
    }
  }
  Connector& connector_;
  std::atomic<bool> stop_{false};
  std::mutex mu_;
  std::map<uint64_t, Connector::Completion> done_;
  std::thread thread_;
};

std::string ObjectKey(uint32_t hash) {
  char key[128];
  std::snprintf(key, sizeof key,
                "meta-llama/Llama-3.1-8B-Instruct@01000108@%064x@salt", hash);
  return key;
}
std::vector<uint8_t> ObjectOf(uint32_t hash) {
  std::vector<uint8_t> bytes(kObject);
  for (uint32_t i = 0; i < kObject; ++i) {
    bytes[i] = ByteOf(hash, 1, 1, true, i, 9);
  }
  return bytes;
}

TEST(LmcachePlugin, TwoThreadsStoreAndPrefetch) {
  DaemonFixture daemon;
  Connector connector(daemon.socket_path());
  Demux demux(connector);

  std::thread store([&] {
    for (uint32_t batch = 0; batch < 10; ++batch) {
      std::vector<std::string> keys;
      std::vector<std::vector<uint8_t>> objects;
      std::vector<void*> buffers;
      for (uint32_t i = 0; i < 8; ++i) {
        keys.push_back(ObjectKey(batch * 8 + i));
        objects.push_back(ObjectOf(batch * 8 + i));
      }
      for (auto& object : objects) buffers.push_back(object.data());
      const auto done =
          demux.Await(connector.SubmitBatchSet(keys, buffers, kObject));
      EXPECT_TRUE(done.ok);
      EXPECT_EQ(done.result, std::vector<bool>(8, true));
    }
  });
  std::thread prefetch([&] {
    for (uint32_t round = 0; round < 30; ++round) {
      std::vector<std::string> keys;
      std::vector<std::vector<uint8_t>> into(
          4, std::vector<uint8_t>(kObject, 0xee));
      std::vector<void*> buffers;
      for (uint32_t i = 0; i < 4; ++i) {
        keys.push_back(ObjectKey((round * 7 + i * 20) % 100));
        buffers.push_back(into[i].data());
      }
      const auto done =
          demux.Await(connector.SubmitBatchGet(keys, buffers, kObject));
      EXPECT_TRUE(done.ok);  // whatever single keys did
      ASSERT_EQ(done.result.size(), 4u);
      for (uint32_t i = 0; i < 4; ++i) {
        EXPECT_EQ(into[i], done.result[i]
                               ? ObjectOf((round * 7 + i * 20) % 100)
                               : std::vector<uint8_t>(kObject, 0xee));
      }
    }
  });
  store.join();
  prefetch.join();

  std::vector<std::string> keys = {ObjectKey(3), ObjectKey(1000),
                                   ObjectKey(79)};
  EXPECT_EQ(demux.Await(connector.SubmitBatchExists(keys)).result,
            (std::vector<bool>{true, false, true}));
  EXPECT_TRUE(demux.Await(connector.SubmitBatchDelete({keys[0]})).ok);
  EXPECT_EQ(demux.Await(connector.SubmitBatchExists(keys)).result,
            (std::vector<bool>{false, false, true}));
}

TEST(LmcachePlugin, CloseIsIdempotentAndEndsEverything) {
  DaemonFixture daemon;
  Connector connector(daemon.socket_path());
  auto object = ObjectOf(1);
  for (int i = 0; i < 20; ++i) {
    connector.SubmitBatchSet({ObjectKey(i)}, {object.data()}, kObject);
  }
  connector.Close();
  connector.Close();
  std::fill(object.begin(), object.end(), 0);
}

TEST(LmcachePlugin, ADaemonThatDiesIsACompletionNotAHang) {
  DaemonFixture daemon;
  Connector connector(daemon.socket_path());
  Demux demux(connector);
  daemon.Stop();
  auto object = ObjectOf(1);
  const auto done = demux.Await(
      connector.SubmitBatchGet({ObjectKey(1)}, {object.data()}, kObject));
  EXPECT_EQ(done.result, std::vector<bool>{false});
  EXPECT_EQ(object, ObjectOf(1));  // untouched
}

}  // namespace
}  // namespace larder
