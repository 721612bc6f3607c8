// The NIXL backend as an agent calls it, in this process, with a daemon that
// dies on demand. The agent itself: tests/python/nixl.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

#include "client/adapters/nixl/backend.h"
#include "client/adapters/nixl/options.h"
#include "client/adapters/nixl/plan.h"
#include "tests/testing/await.h"
#include "tests/testing/daemon_fixture.h"

namespace larder::nixl {
namespace {

constexpr size_t kObjectBytes = 20000;

using Bytes = std::vector<uint8_t>;

// Different for every key and place, so that nothing can be mistaken.
Bytes BytesOf(const std::string& key, size_t bytes = kObjectBytes,
              uint32_t version = 0) {
  Bytes out(bytes);
  uint32_t state = version + 1;
  for (const char c : key) state = state * 31 + static_cast<uint8_t>(c);
  for (auto& byte : out) {
    state = state * 1664525 + 1013904223;
    byte = static_cast<uint8_t>(state >> 24);
  }
  return out;
}

// As much of an agent as a backend sees. One thread each.
class Agent {
 public:
  struct Part {
    std::string key;
    uint64_t offset;
    uint8_t* memory;
    size_t bytes;
    size_t registered_bytes = kObjectBytes;
  };

  explicit Agent(Parameters parameters) {
    InitParameters init{};
    init.agent = "agent";
    init.backend = "LARDER";
    init.parameters = &parameters;
    backend_.reset(GetPlugin()->create(&init));
  }

  Backend& backend() { return *backend_; }

  Status Move(Operation operation, std::vector<Part> parts) {
    Started started(*this, operation, std::move(parts));
    return started.Await();
  }
  Status Write(const std::string& key, Bytes bytes) {
    return Move(kWrite, {{key, 0, bytes.data(), bytes.size(), bytes.size()}});
  }
  // What is there; nothing if the read failed.
  std::optional<Bytes> Read(const std::string& key,
                            size_t bytes = kObjectBytes) {
    Bytes out(bytes, 0xee);
    if (Move(kRead, {{key, 0, out.data(), bytes, bytes}}) != kSuccess) {
      return std::nullopt;
    }
    return out;
  }
  Status Query(const std::vector<std::string>& keys, std::vector<bool>& found) {
    RegisteredRanges ranges;
    ranges.memory = kObject;
    for (const std::string& key : keys) ranges.ranges.push_back({{}, key});
    std::vector<std::optional<Parameters>> answers;
    const Status status = backend_->Query(ranges, answers);
    found.clear();
    for (const auto& answer : answers) found.push_back(answer.has_value());
    return status;
  }

  // A request from registration to release.
  class Started {
   public:
    Started(Agent& agent, Operation operation, std::vector<Part> parts)
        : backend_(*agent.backend_), operation_(operation) {
      local_.memory = kDram;
      remote_.memory = kObject;
      uint64_t device = 0;
      for (const Part& part : parts) {
        Registration* object = nullptr;
        Registration* loaded = nullptr;
        EXPECT_EQ(
            backend_.Register({{0, part.registered_bytes, device}, part.key},
                              kObject, object),
            kSuccess);
        EXPECT_EQ(backend_.LoadLocal(object, loaded), kSuccess);
        objects_.push_back(object);
        local_.ranges.push_back(
            {{reinterpret_cast<uintptr_t>(part.memory), part.bytes, 0},
             nullptr});
        remote_.ranges.push_back({{part.offset, part.bytes, device}, loaded});
        ++device;
      }
      status_ = backend_.Prepare(operation_, local_, remote_, "agent", request_,
                                 nullptr);
      if (status_ == kSuccess) Post();
    }
    ~Started() {
      if (request_ != nullptr) EXPECT_EQ(backend_.Release(request_), kSuccess);
      for (Registration* object : objects_) backend_.Deregister(object);
    }
    void Post() {
      status_ = backend_.Post(operation_, local_, remote_, "agent", request_,
                              nullptr);
    }
    Status Await() {
      AwaitThat([&] {
        if (status_ == kInProgress) status_ = backend_.Check(request_);
        return status_ != kInProgress;
      });
      return status_;
    }

   private:
    Backend& backend_;
    const Operation operation_;
    TransferRanges local_;
    TransferRanges remote_;
    std::vector<Registration*> objects_;
    Request* request_ = nullptr;
    Status status_ = kSuccess;
  };

 private:
  struct Destroy {
    void operator()(Backend* backend) { GetPlugin()->destroy(backend); }
  };
  std::unique_ptr<Backend, Destroy> backend_;
};

Parameters Usual(const DaemonFixture& daemon) {
  return {{"socket", daemon.socket_path()},
          {"space", "test"},
          {"deadline_ms", "20000"},
          {"value_bytes_max", "1000000"}};
}

TEST(NixlOptions, RefuseWhatIsNotKnownOrMissing) {
  EXPECT_EQ(ParseOptions({}).code(), Code::kInvalid);
  EXPECT_EQ(ParseOptions({{"space", "s"}, {"sokcet", "/s"}}).code(),
            Code::kInvalid);
  EXPECT_EQ(ParseOptions({{"space", "s"}, {"deadline_ms", "0"}}).code(),
            Code::kInvalid);
  EXPECT_EQ(ParseOptions({{"space", "s"}, {"deadline_ms", "2s"}}).code(),
            Code::kInvalid);
  EXPECT_EQ(ParseOptions({{"space", "s"}, {"overwrite", "maybe"}}).code(),
            Code::kInvalid);
  const std::string token(65, 't');
  const auto refused = ParseOptions({{"space", "s"}, {"token", token}});
  EXPECT_EQ(refused.code(), Code::kInvalid);
  EXPECT_EQ(refused.status().message().find(token), std::string::npos);
}

TEST(NixlOptions, DefaultsAreWhatIsParsedFromThem) {
  Parameters parameters = DefaultParameters();
  parameters["space"] = "s";
  const auto options = ParseOptions(parameters);
  ASSERT_TRUE(options.ok()) << options.status().ToString();
  EXPECT_EQ(options->deadline, Options().deadline);
  EXPECT_EQ(options->value_bytes_max, Options().value_bytes_max);
  EXPECT_TRUE(options->overwrite);
}

TEST(NixlPlan, AWriteIsContiguousFromZero) {
  Bytes memory(100);
  const ObjectName a = NameOf("a");
  const ObjectName b = NameOf("b");
  const auto plan = PlanWrite({{a, 60, 0, &memory[0], 40},
                               {b, 30, 0, &memory[40], 30},
                               {a, 60, 40, &memory[70], 20}},
                              1000);
  ASSERT_TRUE(plan.ok());
  ASSERT_EQ(plan->batches.size(), 2u);  // of one piece, and of two
  EXPECT_EQ(plan->batches[0].objects, std::vector<ObjectName>{b});
  EXPECT_EQ(plan->batches[1].objects, std::vector<ObjectName>{a});
  EXPECT_EQ(plan->batches[1].pieces[1].data, &memory[70]);

  const Portion later{a, 60, 10, &memory[0], 10};
  EXPECT_EQ(PlanWrite({later}, 1000).code(), Code::kUnsupported);
  EXPECT_EQ(PlanWrite({{a, 60, 0, &memory[0], 0}}, 1000).code(),
            Code::kInvalid);
  EXPECT_EQ(PlanWrite({{a, 60, 0, &memory[0], 100}}, 99).code(),
            Code::kInvalid);
  EXPECT_EQ(PlanWrite({{a, 60, UINT64_MAX, &memory[0], 1}}, 99).code(),
            Code::kInvalid);
}

TEST(NixlPlan, AReadSkipsWhatWasNotAskedFor) {
  Bytes memory(100);
  const ObjectName a = NameOf("a");
  const auto whole = PlanRead({{a, 50, 0, &memory[0], 50}}, 1000);
  ASSERT_TRUE(whole.ok());
  EXPECT_EQ(whole->batches[0].pieces_per_object, 1u);
  EXPECT_EQ(whole->sink, nullptr);

  const auto some = PlanRead(
      {{a, 50, 30, &memory[0], 10}, {a, 50, 5, &memory[10], 10}}, 1000);
  ASSERT_TRUE(some.ok());
  ASSERT_EQ(some->batches[0].pieces_per_object, 5u);
  const auto& pieces = some->batches[0].pieces;
  EXPECT_EQ(pieces[0].bytes, 5u);
  EXPECT_EQ(pieces[1].data, &memory[10]);
  EXPECT_EQ(pieces[2].bytes, 15u);
  EXPECT_EQ(pieces[3].data, &memory[0]);
  EXPECT_EQ(pieces[4].bytes, 960u);
  EXPECT_EQ(some->batches[0].bytes_least[0], 40u);

  EXPECT_EQ(
      PlanRead({{a, 50, 0, &memory[0], 10}, {a, 50, 9, &memory[10], 10}}, 1000)
          .code(),
      Code::kUnsupported);
}

TEST(NixlBackend, WhatOneAgentWroteAnotherReads) {
  DaemonFixture daemon;
  Agent writer(Usual(daemon));
  Agent reader(Usual(daemon));
  EXPECT_FALSE(writer.backend().failed());
  std::vector<std::string> keys;
  for (int i = 0; i < 50; ++i) {
    keys.push_back("model@a-key-of-any-length/" + std::string(i * 5, 'x'));
    EXPECT_EQ(writer.Write(keys.back(), BytesOf(keys.back())), kSuccess);
  }
  std::vector<bool> found;
  keys.push_back("missing");
  EXPECT_EQ(reader.Query(keys, found), kSuccess);
  EXPECT_EQ(std::count(found.begin(), found.end(), true), 50);
  EXPECT_FALSE(found.back());
  for (size_t i = 0; i + 1 < keys.size(); ++i) {
    EXPECT_EQ(reader.Read(keys[i]), BytesOf(keys[i]));
  }
  Bytes into(kObjectBytes, 0xee);
  Bytes untouched(kObjectBytes, 0xee);
  EXPECT_EQ(
      reader.Move(kRead, {{keys[0], 0, into.data(), kObjectBytes},
                          {"missing", 0, untouched.data(), kObjectBytes}}),
      kNotFound);
  EXPECT_EQ(untouched, Bytes(kObjectBytes, 0xee));
}

TEST(NixlBackend, SpacesAreApart) {
  DaemonFixture daemon;
  Agent one(Usual(daemon));
  Parameters other = Usual(daemon);
  other["space"] = "another model";
  Agent two(other);
  EXPECT_EQ(one.Write("key", BytesOf("one")), kSuccess);
  EXPECT_EQ(two.Read("key"), std::nullopt);
  EXPECT_EQ(two.Write("key", BytesOf("two")), kSuccess);
  EXPECT_EQ(one.Read("key"), BytesOf("one"));
  EXPECT_EQ(two.Read("key"), BytesOf("two"));
}

TEST(NixlBackend, ObjectsOfPieces) {
  DaemonFixture daemon;
  Agent agent(Usual(daemon));
  Bytes bytes = BytesOf("pieces");
  EXPECT_EQ(agent.Move(kWrite, {{"pieces", 0, bytes.data(), 777},
                                {"pieces", 777, bytes.data() + 777, 10000},
                                {"pieces", 10777, bytes.data() + 10777,
                                 kObjectBytes - 10777}}),
            kSuccess);
  EXPECT_EQ(agent.Read("pieces"), bytes);

  Bytes into(300, 0xee);
  EXPECT_EQ(agent.Move(kRead, {{"pieces", 19900, &into[0], 100},
                               {"pieces", 5000, &into[200], 100}}),
            kSuccess);
  EXPECT_TRUE(std::equal(&into[0], &into[100], &bytes[19900]));
  EXPECT_TRUE(std::equal(&into[200], &into[300], &bytes[5000]));
  EXPECT_EQ(Bytes(&into[100], &into[200]), Bytes(100, 0xee));

  // Longer than it is; shorter than it is, and registered so.
  EXPECT_EQ(agent.Move(kRead, {{"pieces", 19950, &into[0], 100, 30000}}),
            kMismatch);
  EXPECT_EQ(agent.Move(kRead, {{"pieces", 0, &into[0], 100, 100}}), kMismatch);
  // A part of it cannot be written.
  EXPECT_EQ(agent.Move(kWrite, {{"pieces", 100, &into[0], 100}}),
            kNotSupported);
  EXPECT_EQ(agent.Read("pieces"), bytes);
}

TEST(NixlBackend, AnObjectIsReplacedUnlessToldNotTo) {
  DaemonFixture daemon;
  Agent agent(Usual(daemon));
  const size_t longer = kObjectBytes + 5;
  EXPECT_EQ(agent.Write("slot", BytesOf("slot")), kSuccess);
  for (uint32_t version = 1; version < 20; ++version) {
    EXPECT_EQ(agent.Write("slot", BytesOf("slot", longer, version)), kSuccess);
    EXPECT_EQ(agent.Read("slot", longer), BytesOf("slot", longer, version));
  }
  Parameters keep = Usual(daemon);
  keep["overwrite"] = "false";
  Agent keeper(keep);
  EXPECT_EQ(keeper.Write("slot", BytesOf("slot", longer, 99)), kSuccess);
  EXPECT_EQ(keeper.Read("slot", longer), BytesOf("slot", longer, 19));
}

TEST(NixlBackend, ARequestMayBePostedAgain) {
  DaemonFixture daemon;
  Agent agent(Usual(daemon));
  Bytes bytes = BytesOf("again");
  Agent::Started write(agent, kWrite,
                       {{"again", 0, bytes.data(), kObjectBytes}});
  EXPECT_EQ(write.Await(), kSuccess);
  // In place: the request knows where the bytes lie.
  const Bytes second = BytesOf("again", kObjectBytes, 2);
  std::copy(second.begin(), second.end(), bytes.begin());
  write.Post();
  EXPECT_EQ(write.Await(), kSuccess);
  EXPECT_EQ(agent.Read("again"), bytes);
}

TEST(NixlBackend, NothingLandsAfterARelease) {
  DaemonFixture daemon;
  Agent agent(Usual(daemon));
  std::vector<Bytes> objects;
  std::vector<Agent::Part> parts;
  for (int i = 0; i < 100; ++i) {
    objects.push_back(BytesOf(std::to_string(i)));
    parts.push_back(
        {std::to_string(i), 0, objects.back().data(), kObjectBytes});
  }
  EXPECT_EQ(agent.Move(kWrite, parts), kSuccess);
  for (int round = 0; round < 20; ++round) {
    { Agent::Started read(agent, kRead, parts); }
    for (Bytes& object : objects) object.assign(kObjectBytes, 0xee);
    { Agent::Started other(agent, kRead, {parts[0]}); }
    for (size_t i = 1; i < objects.size(); ++i) {
      EXPECT_EQ(objects[i], Bytes(kObjectBytes, 0xee));
    }
  }
}

TEST(NixlBackend, ManyThreads) {
  DaemonFixture daemon;
  Parameters parameters = Usual(daemon);
  parameters["threads"] = "3";
  Agent agent(parameters);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < 20; ++round) {
        std::vector<Bytes> objects;
        std::vector<Agent::Part> parts;
        for (int i = 0; i < 5; ++i) {
          const std::string key =
              std::to_string(t) + "/" + std::to_string(round * 3 + i);
          objects.push_back(BytesOf(key));
          parts.push_back({key, 0, objects.back().data(), kObjectBytes});
        }
        EXPECT_EQ(agent.Move(kWrite, parts), kSuccess);
        for (Bytes& object : objects) object.assign(kObjectBytes, 0xee);
        EXPECT_EQ(agent.Move(kRead, parts), kSuccess);
        for (int i = 0; i < 5; ++i)
          EXPECT_EQ(objects[i], BytesOf(parts[i].key));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(NixlBackend, ADaemonThatDiesIsAnErrorAndItsReturnIsNoticed) {
  DaemonFixture daemon;
  Agent agent(Usual(daemon));
  EXPECT_EQ(agent.Write("before", BytesOf("before")), kSuccess);
  daemon.Stop();
  EXPECT_EQ(agent.Write("during", BytesOf("during")), kBackendError);
  EXPECT_EQ(agent.Read("before"), std::nullopt);
  std::vector<bool> found;
  EXPECT_EQ(agent.Query({"before"}, found), kBackendError);
  daemon.Start();
  AwaitThat([&] { return agent.Write("after", BytesOf("after")) == kSuccess; });
  EXPECT_EQ(agent.Read("after"), BytesOf("after"));
  EXPECT_EQ(agent.Read("before"), std::nullopt);  // it was in memory only
}

TEST(NixlBackend, TheDaemonMayComeLater) {
  DaemonFixture daemon;
  daemon.Stop();
  Agent agent(Usual(daemon));
  EXPECT_FALSE(agent.backend().failed());
  EXPECT_EQ(agent.Write("key", BytesOf("key")), kBackendError);
  daemon.Start();
  AwaitThat([&] { return agent.Write("key", BytesOf("key")) == kSuccess; });
  EXPECT_EQ(agent.Read("key"), BytesOf("key"));
}

TEST(NixlBackend, DamagedBytesAreAMiss) {
  DaemonFixture daemon;
  Agent agent(Usual(daemon));
  EXPECT_EQ(agent.Write("damaged", BytesOf("damaged")), kSuccess);
  auto client = Client::Open({.socket_path = daemon.socket_path()});
  ASSERT_TRUE(client.ok());
  SpaceOptions about;
  about.model_name = "test";
  const ObjectName digest = NameOf("larder nixl space test");
  std::copy(digest.begin(), digest.end(), about.weights.bytes);
  about.cache_dtype = "opaque";
  about.rope = "none";
  about.engine_layout = "nixl objects 1";
  about.hash_scheme = "nixl key sha256";
  about.value_bytes_max = 1000000;
  auto space = client->OpenSpace(about);
  ASSERT_TRUE(space.ok());
  const ObjectName name = NameOf("damaged");
  const auto id = space->IdFromHash(
      {reinterpret_cast<const char*>(name.data()), name.size()});
  ASSERT_EQ(daemon.Damage(&*id), 1);
  EXPECT_EQ(agent.Read("damaged"), std::nullopt);
  EXPECT_EQ(agent.Write("damaged", BytesOf("damaged")), kSuccess);
  EXPECT_EQ(agent.Read("damaged"), BytesOf("damaged"));
}

TEST(NixlBackend, WhatIsNotSupportedIsRefused) {
  DaemonFixture daemon;
  Agent no_space({{"socket", daemon.socket_path()}});
  EXPECT_TRUE(no_space.backend().failed());

  Agent agent(Usual(daemon));
  EXPECT_FALSE(agent.backend().SupportsRemote());
  EXPECT_FALSE(agent.backend().SupportsNotifications());
  Registration* out = nullptr;
  EXPECT_EQ(agent.backend().Register({{0, 1, 0}, ""}, kVram, out),
            kNotSupported);
  EXPECT_EQ(out, nullptr);
  Bytes large(1000001);
  EXPECT_EQ(agent.Write("large", large), kInvalidParameter);
  large.resize(1000000);
  EXPECT_EQ(agent.Write("large", large), kSuccess);
  EXPECT_EQ(agent.Read("large", large.size()), large);
}

}  // namespace
}  // namespace larder::nixl
