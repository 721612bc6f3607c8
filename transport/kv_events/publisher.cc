#include "transport/kv_events/publisher.h"

#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <zmq.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <span>
#include <thread>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

#include "transport/kv_events/block_ledger.h"
#include "transport/kv_events/replay_ring.h"

namespace larder {
namespace {

using kv_events::BatchEncoder;
using kv_events::BlockLedger;
using kv_events::ReplayRing;

constexpr size_t kEventsPerRead = 128;  // the log is locked while they are read
constexpr size_t kChunksPerPage = 4096;
constexpr int kRequestsPerTurn = 16;
constexpr size_t kFramesMax = 16;  // of what peers send; the rest is dropped
constexpr char kIpc[] = "ipc://";
constexpr char kIpcDomain[] = "larder-ipc";
constexpr char kTcpDomain[] = "larder-tcp";

struct CloseSocket {
  void operator()(void* socket) const { zmq_close(socket); }
};
using Socket = std::unique_ptr<void, CloseSocket>;
struct EndContext {
  void operator()(void* context) const { zmq_ctx_term(context); }
};
using Context = std::unique_ptr<void, EndContext>;

std::array<char, 8> BigEndian(uint64_t value) {
  std::array<char, 8> bytes;
  for (int i = 7; i >= 0; --i, value >>= 8) bytes[i] = static_cast<char>(value);
  return bytes;
}

std::string_view View(std::span<const char> bytes) {
  return {bytes.data(), bytes.size()};
}

// All frames of one message that has arrived; empty if none has.
std::vector<std::string> Receive(void* socket) {
  std::vector<std::string> frames;
  for (bool more = true; more;) {
    zmq_msg_t message;
    zmq_msg_init(&message);
    if (zmq_msg_recv(&message, socket, ZMQ_DONTWAIT) < 0) return {};
    if (frames.size() < kFramesMax) {
      frames.emplace_back(static_cast<const char*>(zmq_msg_data(&message)),
                          zmq_msg_size(&message));
    }
    more = zmq_msg_more(&message) != 0;
    zmq_msg_close(&message);
  }
  return frames;
}

// False: there is no room, or the peer is gone. A message whose first frame
// went is sent whole.
bool Send(void* socket, std::string_view frame, bool more) {
  return zmq_send(socket, frame.data(), frame.size(),
                  ZMQ_DONTWAIT | (more ? ZMQ_SNDMORE : 0)) >= 0;
}

// The last frame, without copying it.
bool SendPayload(void* socket, const ReplayRing::Payload& payload) {
  zmq_msg_t message;
  auto* owner = new ReplayRing::Payload(payload);
  zmq_msg_init_data(
      &message, const_cast<char*>(payload->data()), payload->size(),
      [](void*, void* hint) { delete static_cast<ReplayRing::Payload*>(hint); },
      owner);
  if (zmq_msg_send(&message, socket, ZMQ_DONTWAIT) >= 0) return true;
  zmq_msg_close(&message);
  return false;
}

Status Set(void* socket, int option, const void* value, size_t size,
           absl::string_view what) {
  if (zmq_setsockopt(socket, option, value, size) == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("kv events: ", what, ": ", zmq_strerror(zmq_errno())));
}
Status Set(void* socket, int option, int value) {
  return Set(socket, option, &value, sizeof value, "an option of ZeroMQ");
}

// "host:uid:gid:pid", as ZeroMQ writes the address of an ipc peer.
std::optional<uid_t> UidOf(const std::string& address) {
  const std::vector<std::string> words = absl::StrSplit(address, ':');
  uint32_t uid = 0;
  if (words.size() < 4 || !absl::SimpleAtoi(words[words.size() - 3], &uid)) {
    return std::nullopt;
  }
  return uid;
}

class PublisherImpl final : public KvEventPublisher {
 public:
  PublisherImpl(Options options, Engine& engine, Clock& clock)
      : options_(std::move(options)),
        engine_(engine),
        clock_(clock),
        batch_(options_.encoding),
        ledger_(
            {.memory = options_.blocks_bytes,
             .keyed_tokens = options_.keyed_tokens,
             .block_tokens =
                 [this](const SpaceId& space) { return BlockTokens(space); }}),
        ring_(options_.replay_batches, options_.replay_bytes) {}

  ~PublisherImpl() override {
    stop_ = true;
    if (thread_.joinable()) thread_.join();
  }

  Status Begin() {
    context_.reset(zmq_ctx_new());
    // Before the others: who connects is asked for at once.
    LARDER_RETURN_IF_ERROR(Open(ZMQ_REP, "inproc://zeromq.zap.01", gate_));
    LARDER_RETURN_IF_ERROR(Open(ZMQ_XPUB, options_.publish, publish_));
    publish_endpoint_ = EndpointOf(publish_.get());
    if (!options_.replay.empty()) {
      LARDER_RETURN_IF_ERROR(Open(ZMQ_ROUTER, options_.replay, replay_));
      replay_endpoint_ = EndpointOf(replay_.get());
    }
    // Signals are others' business.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([this] { Run(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return absl::OkStatus();
  }

  Stats stats() const override {
    Stats stats;
    stats.batches = batches_;
    stats.stored = stored_;
    stats.removed = removed_;
    stats.listings = listings_;
    stats.outrun = outrun_;
    stats.replayed = replayed_;
    stats.refused = refused_;
    stats.untold_chunks = untold_;
    stats.subscriptions = subscriptions_;
    return stats;
  }
  const std::string& publish_endpoint() const override {
    return publish_endpoint_;
  }
  const std::string& replay_endpoint() const override {
    return replay_endpoint_;
  }

 private:
  Status Open(int type, const std::string& endpoint, Socket& out) {
    Socket socket(zmq_socket(context_.get(), type));
    if (socket == nullptr) {
      return absl::UnavailableError(
          absl::StrCat("kv events: ", zmq_strerror(zmq_errno())));
    }
    const bool ipc = endpoint.rfind(kIpc, 0) == 0;
    if (endpoint.find('[') != std::string::npos) {
      LARDER_RETURN_IF_ERROR(Set(socket.get(), ZMQ_IPV6, 1));
    }
    LARDER_RETURN_IF_ERROR(Set(socket.get(), ZMQ_LINGER, 0));
    if (type != ZMQ_REP) {
      const std::string domain = ipc ? kIpcDomain : kTcpDomain;
      LARDER_RETURN_IF_ERROR(Set(socket.get(), ZMQ_ZAP_DOMAIN, domain.data(),
                                 domain.size(), "the domain"));
      if (!ipc && options_.curve.has_value()) {
        LARDER_RETURN_IF_ERROR(Set(socket.get(), ZMQ_CURVE_SERVER, 1));
        LARDER_RETURN_IF_ERROR(Set(socket.get(), ZMQ_CURVE_SECRETKEY,
                                   options_.curve->secret.c_str(),
                                   options_.curve->secret.size() + 1,
                                   "the secret key is not 40 characters of "
                                   "Z85, or this ZeroMQ has no CURVE"));
      }
      // What peers have to say is short.
      const int64_t bytes_max = 1024;
      LARDER_RETURN_IF_ERROR(Set(socket.get(), ZMQ_MAXMSGSIZE, &bytes_max,
                                 sizeof bytes_max, "the size of messages"));
    }
    if (type == ZMQ_XPUB) {
      LARDER_RETURN_IF_ERROR(Set(socket.get(), ZMQ_XPUB_VERBOSER, 1));
      LARDER_RETURN_IF_ERROR(
          Set(socket.get(), ZMQ_SNDHWM,
              static_cast<int>(options_.subscriber_batches)));
    }
    if (type == ZMQ_ROUTER) {
      // Room for one answer; a peer that does not read its first loses others.
      LARDER_RETURN_IF_ERROR(
          Set(socket.get(), ZMQ_SNDHWM,
              static_cast<int>(options_.replay_batches) + kRequestsPerTurn));
      LARDER_RETURN_IF_ERROR(Set(socket.get(), ZMQ_RCVHWM, kRequestsPerTurn));
    }
    if (zmq_bind(socket.get(), endpoint.c_str()) != 0) {
      return absl::UnavailableError(absl::StrCat(
          "kv events cannot listen on ", endpoint, ": ",
          zmq_strerror(zmq_errno()),
          ipc ? "; check that the folder is there" : "; is it in use?"));
    }
    if (ipc) {
      const std::string path = EndpointOf(socket.get()).substr(strlen(kIpc));
      if (chmod(path.c_str(), options_.ipc_mode) != 0) {
        return absl::PermissionDeniedError(absl::StrCat(
            "kv events: chmod of ", path, ": ", strerrordesc_np(errno)));
      }
    }
    out = std::move(socket);
    return absl::OkStatus();
  }

  static std::string EndpointOf(void* socket) {
    char text[256] = {};
    size_t size = sizeof text - 1;
    zmq_getsockopt(socket, ZMQ_LAST_ENDPOINT, text, &size);
    return text;
  }

  // From here on, on the publisher's thread alone.

  void Run() {
    const auto patience =
        static_cast<long>(absl::ToInt64Milliseconds(options_.interval));
    ListAll();
    bool behind = false;
    while (!stop_) {
      zmq_pollitem_t items[] = {{gate_.get(), 0, ZMQ_POLLIN, 0},
                                {publish_.get(), 0, ZMQ_POLLIN, 0},
                                {replay_.get(), 0, ZMQ_POLLIN, 0}};
      zmq_poll(items, replay_ != nullptr ? 3 : 2, behind ? 0 : patience);
      ServePeers();
      behind = PublishNew();
    }
  }

  void ServePeers() {
    for (std::vector<std::string> request;
         !(request = Receive(gate_.get())).empty();) {
      Decide(request);
    }
    for (std::vector<std::string> said;
         !(said = Receive(publish_.get())).empty();) {
      if (said[0].empty()) continue;
      if (said[0][0] == 1) ++subscriptions_;
      if (said[0][0] == 0 && subscriptions_ > 0) --subscriptions_;
    }
    if (replay_ == nullptr) return;
    for (int i = 0; i < kRequestsPerTurn; ++i) {
      const std::vector<std::string> request = Receive(replay_.get());
      if (request.empty()) break;
      Replay(request);
    }
  }

  // ZeroMQ's authentication protocol (RFC 27): version, request, domain,
  // address, identity, mechanism, credentials.
  void Decide(const std::vector<std::string>& request) {
    const bool sound = request.size() >= 6;
    const bool admitted = sound && Admits(request);
    if (!admitted) ++refused_;
    void* const gate = gate_.get();
    Send(gate, "1.0", true);
    Send(gate, sound ? request[1] : "", true);
    Send(gate, admitted ? "200" : "400", true);
    Send(gate, admitted ? "" : "not admitted", true);
    Send(gate, "", true);
    Send(gate, "", false);
  }

  bool Admits(const std::vector<std::string>& request) const {
    if (request[2] == kIpcDomain) {
      if (!options_.admits) return true;
      const std::optional<uid_t> uid = UidOf(request[3]);
      return uid.has_value() && options_.admits(*uid);
    }
    if (!options_.curve.has_value()) return true;
    if (request[5] != "CURVE" || request.size() != 7 ||
        request[6].size() != 32) {
      return false;
    }
    char key[41];
    zmq_z85_encode(key, reinterpret_cast<const uint8_t*>(request[6].data()),
                   32);
    const std::vector<std::string>& clients = options_.curve->clients;
    return std::find(clients.begin(), clients.end(), key) != clients.end();
  }

  void Replay(const std::vector<std::string>& request) {
    if (request.size() != 3 || !request[1].empty() || request[2].size() != 8) {
      return;
    }
    uint64_t from = 0;
    for (const char c : request[2]) from = from << 8 | static_cast<uint8_t>(c);
    const auto answer = [&](uint64_t number, const ReplayRing::Payload& batch) {
      return Send(replay_.get(), request[0], true) &&
             Send(replay_.get(), "", true) &&
             Send(replay_.get(), View(BigEndian(number)), true) &&
             SendPayload(replay_.get(), batch);
    };
    for (uint64_t n = std::max(from, ring_.oldest()); n < ring_.end(); ++n) {
      if (!answer(n, ring_.at(n))) return;
      ++replayed_;
    }
    static const auto* const kNothing =
        new ReplayRing::Payload(std::make_shared<const std::string>());
    answer(UINT64_MAX, *kNothing);
    if (from < ring_.oldest() &&
        clock_.Now() - listed_at_ >= options_.resync_interval) {
      list_wanted_ = true;
    }
  }

  // True if there is more.
  bool PublishNew() {
    if (list_wanted_) {
      ListAll();
      return true;
    }
    const std::vector<Event> events =
        engine_.Events().Read(after_, kEventsPerRead, absl::ZeroDuration());
    for (const Event& event : events) {
      if (event.sequence != after_ + 1) {
        ++outrun_;
        ListAll();
        return true;
      }
      after_ = event.sequence;
      if (event.tenant != options_.tenant) continue;
      if (event.type == EventType::kChunkStored) ++stored_;
      if (event.type == EventType::kChunkRemoved) ++removed_;
      ledger_.Apply(event, batch_);
      FlushIfFull();
    }
    untold_ = ledger_.untold();
    if (events.size() == kEventsPerRead) return true;
    Flush();
    return false;
  }

  // What happens meanwhile is told once more afterwards, in order: the end is
  // right, whenever the list saw a chunk.
  void ListAll() {
    list_wanted_ = false;
    listed_at_ = clock_.Now();
    ++listings_;
    after_ = engine_.Events().last_sequence();
    ledger_.BeginListing(batch_);
    std::optional<ChunkId> last;
    for (bool more = true; more && !stop_;) {
      const std::vector<ChunkSummary> page =
          engine_.List(options_.tenant, std::nullopt, last, kChunksPerPage);
      for (const ChunkSummary& chunk : page) {
        stored_ += chunk.tiers.size();
        ledger_.List(chunk, batch_);
        FlushIfFull();
      }
      more = !page.empty();
      if (more) last = page.back().id;
      ServePeers();
    }
    ledger_.EndListing(engine_.Events().last_sequence());
  }

  void FlushIfFull() {
    constexpr size_t kBatchBytes = 256_KiB;
    if (batch_.count() >= options_.batch_events ||
        batch_.bytes() >= kBatchBytes) {
      Flush();
    }
  }

  void Flush() {
    if (batch_.count() == 0) return;
    const auto payload =
        std::make_shared<const std::string>(batch_.Take(clock_.WallNow()));
    const uint64_t number = ring_.Add(payload);
    ++batches_;
    if (Send(publish_.get(), options_.topic, true) &&
        Send(publish_.get(), View(BigEndian(number)), true)) {
      SendPayload(publish_.get(), payload);
    }
  }

  uint32_t BlockTokens(const SpaceId& space) {
    auto it = block_tokens_.find(space);
    if (it == block_tokens_.end()) {
      for (const SpaceInfo& info : engine_.Spaces(options_.tenant)) {
        block_tokens_[info.id] = info.descriptor.block_tokens;
      }
      it = block_tokens_.find(space);
    }
    return it == block_tokens_.end() ? 0 : it->second;
  }

  const Options options_;
  Engine& engine_;
  Clock& clock_;
  // The context ends when its sockets are closed, which are below it.
  Context context_;
  Socket gate_, publish_, replay_;
  std::string publish_endpoint_, replay_endpoint_;

  BatchEncoder batch_;
  BlockLedger ledger_;
  ReplayRing ring_;
  absl::flat_hash_map<SpaceId, uint32_t> block_tokens_;
  uint64_t after_ = 0;  // the last event of the log that was looked at
  bool list_wanted_ = false;
  absl::Time listed_at_;

  std::atomic<uint64_t> batches_{0}, stored_{0}, removed_{0}, listings_{0},
      outrun_{0}, replayed_{0}, refused_{0}, untold_{0}, subscriptions_{0};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace

StatusOr<std::unique_ptr<KvEventPublisher>> KvEventPublisher::Start(
    Options options, Engine& engine, Clock& clock) {
  auto publisher =
      std::make_unique<PublisherImpl>(std::move(options), engine, clock);
  LARDER_RETURN_IF_ERROR(publisher->Begin());
  return std::unique_ptr<KvEventPublisher>(std::move(publisher));
}

}  // namespace larder
