#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <set>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>

#include "store/chunk_id.h"
#include "tests/tools/fake_engine.h"
#include "transport/admin/admin.grpc.pb.h"
#include "transport/admin/admin_client.h"
#include "transport/admin/admin_server.h"

namespace larder {
namespace {

namespace v1 = admin::v1;
using ::testing::HasSubstr;

class AdminTest : public ::testing::Test {
 protected:
  AdminTest() {
    char path[] = "/tmp/larder_admin_XXXXXX";
    folder_ = mkdtemp(path);
    options_.socket_path = absl::StrCat(folder_, "/admin.sock");
    options_.version = "1.2.3";
    hooks_.tenant_name = [](TenantId tenant) {
      return Raw(tenant) == 1000 ? std::string("alice") : std::string();
    };
    hooks_.tenant_of_name = [](std::string_view name) -> StatusOr<TenantId> {
      if (name == "alice") return TenantId{1000};
      return absl::NotFoundError("no such tenant");
    };
    hooks_.health = [] {
      return std::vector<HealthCheck>{{"listener", true, true, ""},
                                      {"nvme", false, false, "full"}};
    };
    engine_.AddChain(5);
    engine_.stats.chunks = 5;
    engine_.stats.dram.capacity_bytes = 1_GiB;
  }
  ~AdminTest() override {
    server_.reset();
    unlink(options_.socket_path.c_str());
    unlink((options_.socket_path + ".lock").c_str());
    rmdir(folder_.c_str());
  }

  void Start() {
    StatusOr<std::unique_ptr<AdminServer>> server =
        AdminServer::Start(options_, hooks_, engine_);
    ASSERT_EQ(server.status(), absl::OkStatus());
    server_ = *std::move(server);
    StatusOr<std::unique_ptr<AdminClient>> client =
        AdminClient::Connect(options_.socket_path, absl::Seconds(60));
    ASSERT_EQ(client.status(), absl::OkStatus());
    client_ = *std::move(client);
  }

  std::string folder_;
  FakeEngine engine_;
  AdminServerOptions options_;
  AdminHooks hooks_;
  std::unique_ptr<AdminServer> server_;
  std::unique_ptr<AdminClient> client_;
};

TEST(AdminRules, CoverEveryMethodOfTheService) {
  const auto* service =
      google::protobuf::DescriptorPool::generated_pool()->FindServiceByName(
          "larder.admin.v1.Admin");
  ASSERT_NE(service, nullptr);
  std::set<std::string> methods;
  for (int i = 0; i < service->method_count(); ++i) {
    methods.insert(service->method(i)->name());
  }
  std::set<std::string> rules;
  for (const AdminRule& rule : AdminRules()) {
    EXPECT_TRUE(rules.insert(std::string(rule.method)).second) << rule.method;
  }
  EXPECT_EQ(rules, methods);
}

// Every method, called for real by somebody who is no operator.
TEST_F(AdminTest, OthersAreRefusedEverythingButTheVersion) {
  options_.is_operator = [](uid_t) { return false; };
  Start();
  const auto channel =
      grpc::CreateChannel(absl::StrCat("unix:", options_.socket_path),
                          grpc::InsecureChannelCredentials());
  grpc::GenericStub stub(channel);
  for (const AdminRule& rule : AdminRules()) {
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    const auto call = stub.PrepareUnaryCall(
        &context, absl::StrCat("/larder.admin.v1.Admin/", rule.method.data()),
        grpc::ByteBuffer(nullptr, 0), &queue);
    call->StartCall();
    grpc::ByteBuffer reply;
    grpc::Status status;
    call->Finish(&reply, &status, nullptr);
    void* tag = nullptr;
    bool ok = false;
    ASSERT_TRUE(queue.Next(&tag, &ok));
    EXPECT_EQ(status.error_code(), rule.access == AdminAccess::kAnyone
                                       ? grpc::StatusCode::OK
                                       : grpc::StatusCode::PERMISSION_DENIED)
        << rule.method << ": " << status.error_message();
    queue.Shutdown();
    while (queue.Next(&tag, &ok)) {
    }
  }
  EXPECT_EQ(engine_.chunks.size(), 5u);
}

TEST_F(AdminTest, SocketIsPrivate) {
  Start();
  struct stat info;
  ASSERT_EQ(stat(options_.socket_path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST_F(AdminTest, StatusShowsHealthAndTiers) {
  Start();
  StatusOr<v1::DaemonStatus> status = client_->GetStatus({});
  ASSERT_EQ(status.status(), absl::OkStatus());
  EXPECT_TRUE(status->ready());  // nvme is not required
  EXPECT_EQ(status->checks_size(), 2);
  EXPECT_EQ(status->chunks(), 5u);
  EXPECT_EQ(status->version().version(), "1.2.3");
  ASSERT_EQ(status->tiers_size(), 1);
  EXPECT_EQ(status->tiers(0).capacity_bytes(), 1_GiB);
  EXPECT_EQ(status->pid(), static_cast<uint32_t>(getpid()));
}

TEST_F(AdminTest, ListsInPages) {
  Start();
  v1::ListChunksRequest request;
  request.set_limit(2);
  std::vector<std::string> ids;
  for (;;) {
    StatusOr<v1::ChunkList> page = client_->ListChunks(request);
    ASSERT_EQ(page.status(), absl::OkStatus());
    for (const v1::Chunk& chunk : page->chunks()) {
      EXPECT_EQ(chunk.tenant(), "alice");
      ids.push_back(chunk.id());
    }
    if (!page->more()) break;
    request.set_after(ids.back());
  }
  EXPECT_EQ(ids.size(), 5u);
  request.set_tenant("bob");
  EXPECT_EQ(client_->ListChunks(request).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(AdminTest, FindsChunksByPrefix) {
  Start();
  const std::string id = ToHex(OracleChunkId(3));
  v1::ChunkRequest request;
  for (const std::string& name : {id, id.substr(0, 8), id.substr(0, 20)}) {
    request.set_id(name);
    StatusOr<v1::Chunk> chunk = client_->StatChunk(request);
    ASSERT_EQ(chunk.status(), absl::OkStatus()) << name;
    EXPECT_EQ(chunk->id(), id);
  }
  request.set_id("ffffffffffff");
  EXPECT_EQ(client_->StatChunk(request).status().code(),
            absl::StatusCode::kNotFound);
  for (const char* bad : {"", "123", "zzzzzzzzz", "../../etc"}) {
    request.set_id(bad);
    EXPECT_EQ(client_->StatChunk(request).status().code(),
              absl::StatusCode::kInvalidArgument)
        << bad;
  }
}

TEST_F(AdminTest, PinsAndEvicts) {
  Start();
  v1::PinChunkRequest pin;
  pin.set_id(ToHex(OracleChunkId(2)));
  pin.set_pinned(true);
  ASSERT_TRUE(client_->PinChunk(pin).ok());
  EXPECT_TRUE(engine_.chunks[1].pinned);

  v1::EvictChunkRequest evict;
  evict.set_id(ToHex(OracleChunkId(2)));
  evict.set_subtree(true);
  evict.set_dry_run(true);
  StatusOr<v1::EvictReply> reply = client_->EvictChunk(evict);
  ASSERT_EQ(reply.status(), absl::OkStatus());
  EXPECT_EQ(reply->chunks(), 4u);  // 2, 3, 4, 5
  EXPECT_EQ(reply->bytes(), 4_MiB);
  EXPECT_EQ(engine_.chunks.size(), 5u);
  evict.set_dry_run(false);
  evict.set_subtree(false);
  reply = client_->EvictChunk(evict);
  ASSERT_EQ(reply.status(), absl::OkStatus());
  EXPECT_EQ(reply->chunks(), 1u);
  EXPECT_EQ(engine_.chunks.size(), 4u);

  v1::EvictSpaceRequest space;
  space.set_space(ToHex(OracleSpaceId(1)).substr(0, 8));
  space.set_dry_run(true);
  reply = client_->EvictSpace(space);
  ASSERT_EQ(reply.status(), absl::OkStatus());
  EXPECT_EQ(reply->chunks(), 4u);
  EXPECT_EQ(engine_.chunks.size(), 4u);
  space.set_dry_run(false);
  ASSERT_TRUE(client_->EvictSpace(space).ok());
  EXPECT_TRUE(engine_.chunks.empty());
}

TEST_F(AdminTest, VerifyStreamsToTheEnd) {
  Start();
  v1::VerifyRequest request;
  request.set_tier("dram");
  v1::VerifyProgress last;
  ASSERT_EQ(client_->Verify(request,
                            [&](const v1::VerifyProgress& progress) {
                              last = progress;
                              return true;
                            }),
            absl::OkStatus());
  EXPECT_TRUE(last.finished());
  EXPECT_EQ(last.chunks_done(), 3u);
  request.set_tier("nvme");
  EXPECT_EQ(client_->Verify(request, [](const auto&) { return true; }).code(),
            absl::StatusCode::kNotFound);
  request.set_tier("tape");
  EXPECT_EQ(client_->Verify(request, [](const auto&) { return true; }).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(AdminTest, ALimitIsSetWhereThereIsSuchATier) {
  Start();
  v1::SetTierLimitRequest request;
  request.set_tier("hbm");
  request.set_bytes(5_MiB);
  EXPECT_EQ(client_->SetTierLimit(request).status().code(),
            absl::StatusCode::kNotFound);
  engine_.stats.has_device = true;
  engine_.stats.device.used_bytes = 1_MiB;
  const StatusOr<v1::Tier> tier = client_->SetTierLimit(request);
  ASSERT_TRUE(tier.ok()) << tier.status();
  EXPECT_EQ(tier->kind(), "hbm");
  EXPECT_EQ(tier->capacity_bytes(), 4_MiB);
  EXPECT_EQ(tier->used_bytes(), 1_MiB);
  EXPECT_TRUE(tier->healthy());
  request.set_tier("tape");
  EXPECT_EQ(client_->SetTierLimit(request).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(AdminTest, StopEndsAHangingVerify) {
  engine_.verify_hangs = true;
  Start();
  v1::VerifyRequest request;
  request.set_tier("dram");
  const Status status = client_->Verify(request, [&](const auto&) {
    server_->Stop(absl::Seconds(5));
    return true;
  });
  EXPECT_FALSE(status.ok());
}

TEST_F(AdminTest, EventsFollow) {
  for (int i = 0; i < 3; ++i) {
    Event event;
    event.type = EventType::kChunkStored;
    event.tenant = TenantId{1000};
    event.chunk = OracleChunkId(1);
    event.tier = TierKind::kDram;
    engine_.Events().Publish(event);
  }
  Start();
  v1::FollowEventsRequest request;
  std::vector<uint64_t> sequences;
  const auto collect = [&](const v1::Event& event) {
    EXPECT_EQ(event.type(), "chunk-stored");
    EXPECT_EQ(event.tenant(), "alice");
    sequences.push_back(event.sequence());
    return true;
  };
  ASSERT_EQ(client_->FollowEvents(request, collect), absl::OkStatus());
  EXPECT_EQ(sequences, (std::vector<uint64_t>{1, 2, 3}));

  request.set_follow(true);
  request.set_after(2);
  sequences.clear();
  ASSERT_EQ(client_->FollowEvents(request,
                                  [&](const v1::Event& event) {
                                    sequences.push_back(event.sequence());
                                    Event next;
                                    next.type = EventType::kClientGone;
                                    engine_.Events().Publish(next);
                                    return sequences.size() < 3;
                                  }),
            absl::OkStatus());
  EXPECT_EQ(sequences, (std::vector<uint64_t>{3, 4, 5}));
}

TEST_F(AdminTest, WhyMissByIdAndByTokens) {
  std::vector<uint32_t> tokens(100);
  for (uint32_t i = 0; i < tokens.size(); ++i) tokens[i] = i;
  const PromptIds prompt =
      ComputeChunkIds(OracleSpaceId(1), tokens, 32, 16, {});
  ASSERT_EQ(prompt.ids.size(), 3u);
  engine_.answers[prompt.ids[0]] = {MissReason::kNone, ""};
  engine_.answers[prompt.ids[1]] = {MissReason::kEvicted, "3 s ago"};
  Start();
  v1::WhyMissRequest request;
  request.set_space(ToHex(OracleSpaceId(1)).substr(0, 12));
  for (uint32_t token : tokens) request.add_tokens(token);
  StatusOr<v1::WhyMissReply> reply = client_->WhyMiss(request);
  ASSERT_EQ(reply.status(), absl::OkStatus());
  EXPECT_EQ(reply->chunks(), 3u);
  EXPECT_EQ(reply->served(), 1u);
  ASSERT_EQ(reply->missed_size(), 2);
  EXPECT_EQ(reply->missed(0).index(), 1u);
  EXPECT_EQ(reply->missed(0).reason(), "evicted");
  EXPECT_EQ(reply->missed(0).detail(), "3 s ago");
  EXPECT_EQ(reply->missed(1).reason(), "never seen");

  v1::WhyMissRequest by_id;
  by_id.set_id(ToHex(prompt.ids[1]));
  reply = client_->WhyMiss(by_id);
  ASSERT_EQ(reply.status(), absl::OkStatus());
  EXPECT_EQ(reply->missed(0).reason(), "evicted");
  by_id.set_id(ToHex(OracleChunkId(2)));
  reply = client_->WhyMiss(by_id);
  ASSERT_EQ(reply.status(), absl::OkStatus());
  EXPECT_EQ(reply->served(), 1u);
  by_id.set_id(ToHex(OracleChunkId(777)));
  reply = client_->WhyMiss(by_id);
  ASSERT_EQ(reply.status(), absl::OkStatus());
  EXPECT_EQ(reply->missed(0).reason(), "never seen");
}

TEST_F(AdminTest, SpacesAndEpochs) {
  Start();
  StatusOr<v1::SpaceList> spaces = client_->ListSpaces({});
  ASSERT_EQ(spaces.status(), absl::OkStatus());
  ASSERT_EQ(spaces->spaces_size(), 1);
  EXPECT_EQ(spaces->spaces(0).model(), "test-model");
  EXPECT_EQ(spaces->spaces(0).tenant(), "alice");
  v1::AdvanceEpochRequest request;
  request.set_space(spaces->spaces(0).id());
  StatusOr<v1::AdvanceEpochReply> reply = client_->AdvanceEpoch(request);
  ASSERT_EQ(reply.status(), absl::OkStatus());
  EXPECT_EQ(reply->epoch(), 1u);
  request.set_space("00000000");
  EXPECT_EQ(client_->AdvanceEpoch(request).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(AdminTest, SecondServerIsRefusedAndAStaleSocketReplaced) {
  Start();
  StatusOr<std::unique_ptr<AdminServer>> second =
      AdminServer::Start(options_, hooks_, engine_);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(second.status().message()),
              HasSubstr("another larderd serves"));
  server_.reset();
  // What a killed daemon leaves: a socket file that nobody listens on.
  std::ofstream(options_.socket_path + ".lock").close();
  Start();
  EXPECT_TRUE(client_->GetVersion({}).ok());
}

TEST_F(AdminTest, RefusesToReplaceAFile) {
  std::ofstream(options_.socket_path) << "precious";
  StatusOr<std::unique_ptr<AdminServer>> server =
      AdminServer::Start(options_, hooks_, engine_);
  EXPECT_EQ(server.status().code(), absl::StatusCode::kFailedPrecondition);
  std::ifstream in(options_.socket_path);
  std::string text;
  in >> text;
  EXPECT_EQ(text, "precious");
}

TEST_F(AdminTest, ClientSaysThatThereIsNoDaemon) {
  StatusOr<std::unique_ptr<AdminClient>> client =
      AdminClient::Connect(options_.socket_path, absl::Seconds(5));
  EXPECT_EQ(client.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(client.status().message()),
              HasSubstr(absl::StrCat("no daemon at ", options_.socket_path)));
  EXPECT_THAT(std::string(client.status().message()),
              HasSubstr("start larderd or pass --socket"));
}

class FakeProfiles final : public AdminProfiles {
 public:
  StatusOr<Added> Add(std::string_view bytes) override {
    if (bytes == "bad") return absl::DataLossError("no profile");
    const bool added = kept.insert(std::string(bytes)).second;
    return Added{Show(bytes), added};
  }
  std::vector<AdminProfile> List() override {
    std::vector<AdminProfile> all;
    for (const std::string& bytes : kept) all.push_back(Show(bytes));
    return all;
  }
  StatusOr<AdminProfile> Find(const std::string& id) override {
    for (const std::string& bytes : kept) {
      if (id == absl::StrCat(bytes.size())) return Show(bytes);
    }
    return absl::NotFoundError("no such profile");
  }
  Status Remove(const std::string& id, bool force) override {
    if (!force) return absl::FailedPreconditionError("needed");
    std::erase_if(kept, [&](const std::string& bytes) {
      return id == absl::StrCat(bytes.size());
    });
    return absl::OkStatus();
  }

  std::set<std::string> kept;

 private:
  static AdminProfile Show(std::string_view bytes) {
    AdminProfile out;
    out.id = absl::StrCat(bytes.size());
    out.bytes = bytes.size();
    out.model = "m";
    out.made_by = "b";
    out.weights = "w";
    out.unrotated_keys = true;
    out.divergence = {0.5, 2};
    out.groups = {{1, 2, 3, 4, "klt"}};
    out.rules = {"a rule"};
    out.may_be_needed = true;
    return out;
  }
};

TEST_F(AdminTest, Profiles) {
  const auto profiles = std::make_shared<FakeProfiles>();
  hooks_.profiles = profiles;
  options_.max_profile_bytes = 40'000'000;
  Start();
  // More than one message takes.
  std::string large(35'000'000, 'x');
  for (size_t i = 0; i < large.size(); i += 4096) large[i] = char(i / 4096);
  const auto added = client_->AddProfile(large);
  ASSERT_EQ(added.status(), absl::OkStatus());
  EXPECT_TRUE(added->added());
  EXPECT_TRUE(profiles->kept.contains(large));
  EXPECT_FALSE(client_->AddProfile(large)->added());
  EXPECT_EQ(client_->AddProfile("bad").status().code(),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(client_->AddProfile(std::string(40'000'001, 'x')).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(profiles->kept.size(), 1u);

  v1::GetProfileRequest get;
  get.set_id("35000000");
  const auto shown = client_->GetProfile(get);
  ASSERT_EQ(shown.status(), absl::OkStatus());
  EXPECT_EQ(shown->bytes(), 35'000'000u);
  EXPECT_EQ(shown->model(), "m");
  EXPECT_EQ(shown->made_by(), "b");
  EXPECT_EQ(shown->weights(), "w");
  EXPECT_TRUE(shown->unrotated_keys());
  ASSERT_EQ(shown->divergence_size(), 2);
  EXPECT_EQ(shown->divergence(0), 0.5);
  EXPECT_EQ(shown->divergence(1), 2);
  ASSERT_EQ(shown->groups_size(), 1);
  EXPECT_EQ(shown->groups(0).layers(), 1u);
  EXPECT_EQ(shown->groups(0).kv_heads(), 2u);
  EXPECT_EQ(shown->groups(0).key_dim(), 3u);
  EXPECT_EQ(shown->groups(0).value_dim(), 4u);
  EXPECT_EQ(shown->groups(0).mode(), "klt");
  EXPECT_THAT(shown->rules(), testing::ElementsAre("a rule"));
  EXPECT_TRUE(shown->may_be_needed());
  EXPECT_EQ(client_->ListProfiles({})->profiles_size(), 1);
  get.set_id("1");
  EXPECT_EQ(client_->GetProfile(get).status().code(),
            absl::StatusCode::kNotFound);

  v1::RemoveProfileRequest remove;
  remove.set_id("35000000");
  EXPECT_EQ(client_->RemoveProfile(remove).status().code(),
            absl::StatusCode::kFailedPrecondition);
  remove.set_force(true);
  const auto removed = client_->RemoveProfile(remove);
  ASSERT_EQ(removed.status(), absl::OkStatus());
  EXPECT_EQ(removed->id(), "35000000");
  EXPECT_TRUE(removed->may_be_needed());
  EXPECT_TRUE(profiles->kept.empty());
  EXPECT_EQ(client_->RemoveProfile(remove).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(AdminTest, NoProfilesWithoutATierForThem) {
  Start();
  EXPECT_EQ(client_->AddProfile("x").status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(client_->ListProfiles({}).status().message()),
              HasSubstr("nvme.path"));
}

TEST_F(AdminTest, LongCallsAreBounded) {
  options_.max_streams = 0;
  Start();
  EXPECT_EQ(client_->FollowEvents({}, [](const auto&) { return true; }).code(),
            absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace larder
