#ifndef LARDER_TESTS_TRANSPORT_KV_EVENTS_SUBSCRIBER_H_
#define LARDER_TESTS_TRANSPORT_KV_EVENTS_SUBSCRIBER_H_

// A router's side of vLLM's KV events, written on the schema (FORMAT.md of
// transport/kv_events) with a reader of MessagePack of its own.

#include <zmq.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace larder::kv_events {

// ---- MessagePack ----

struct Value {
  enum class Kind { kNil, kBool, kInt, kUint, kDouble, kText, kArray, kMap };
  Kind kind = Kind::kNil;
  int64_t number = 0;  // kInt; kUint bit for bit
  double real = 0;
  std::string text;
  std::vector<Value> items;  // of a map: key, value, key, value ...

  const Value* Find(std::string_view key) const {
    for (size_t i = 0; i + 1 < items.size(); i += 2) {
      if (items[i].text == key) return &items[i + 1];
    }
    return nullptr;
  }
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_(bytes) {}

  Value Next() {
    const uint8_t first = Byte();
    if (first < 0x80) return Number(Value::Kind::kUint, first);
    if (first < 0x90) return Items(Value::Kind::kMap, 2 * (first & 0x0f));
    if (first < 0xa0) return Items(Value::Kind::kArray, first & 0x0f);
    if (first < 0xc0) return Text(first & 0x1f);
    if (first >= 0xe0) {
      return Number(Value::Kind::kInt, static_cast<int8_t>(first));
    }
    switch (first) {
      case 0xc0:
        return {};
      case 0xcb: {
        Value value;
        value.kind = Value::Kind::kDouble;
        const uint64_t bits = Big(8);
        std::memcpy(&value.real, &bits, 8);
        return value;
      }
      case 0xcc:
      case 0xcd:
      case 0xce:
      case 0xcf:
        return Number(Value::Kind::kUint,
                      static_cast<int64_t>(Big(1u << (first - 0xcc))));
      case 0xd0:
        return Number(Value::Kind::kInt, static_cast<int8_t>(Big(1)));
      case 0xd1:
        return Number(Value::Kind::kInt, static_cast<int16_t>(Big(2)));
      case 0xd2:
        return Number(Value::Kind::kInt, static_cast<int32_t>(Big(4)));
      case 0xd3:
        return Number(Value::Kind::kInt, static_cast<int64_t>(Big(8)));
      case 0xd9:
        return Text(Big(1));
      case 0xda:
        return Text(Big(2));
      case 0xdc:
        return Items(Value::Kind::kArray, Big(2));
      case 0xdd:
        return Items(Value::Kind::kArray, Big(4));
      case 0xde:
        return Items(Value::Kind::kMap, 2 * Big(2));
      default:
        throw std::runtime_error("a kind that the schema does not use");
    }
  }
  bool done() const { return rest_.empty(); }

 private:
  uint8_t Byte() {
    if (rest_.empty()) throw std::runtime_error("ends early");
    const auto byte = static_cast<uint8_t>(rest_[0]);
    rest_.remove_prefix(1);
    return byte;
  }
  uint64_t Big(int bytes) {
    uint64_t value = 0;
    while (bytes-- > 0) value = value << 8 | Byte();
    return value;
  }
  static Value Number(Value::Kind kind, int64_t number) {
    Value value;
    value.kind = kind;
    value.number = number;
    return value;
  }
  Value Text(uint64_t size) {
    Value value;
    value.kind = Value::Kind::kText;
    if (size > rest_.size()) throw std::runtime_error("ends early");
    value.text = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return value;
  }
  Value Items(Value::Kind kind, uint64_t count) {
    Value value;
    value.kind = kind;
    for (uint64_t i = 0; i < count; ++i) value.items.push_back(Next());
    return value;
  }

  std::string_view rest_;
};

// ---- The schema ----

struct RouterEvent {
  std::string type;
  std::vector<int64_t> hashes;  // bit for bit
  bool signed_hashes = false;   // some hash was negative
  std::optional<int64_t> parent;
  std::vector<uint32_t> tokens;
  int64_t block_size = 0;
  std::string medium;
};

struct RouterBatch {
  double time = 0;
  std::vector<RouterEvent> events;
  int64_t rank = -1;
};

inline void Require(bool sound, const char* what) {
  if (!sound) throw std::runtime_error(what);
}

// An event as an array or as a map.
inline RouterEvent ParseEvent(const Value& value) {
  const bool map = value.kind == Value::Kind::kMap;
  Require(map || value.kind == Value::Kind::kArray, "an event of neither form");
  const auto field = [&](size_t place, std::string_view name) -> const Value& {
    const Value* found = map                          ? value.Find(name)
                         : place < value.items.size() ? &value.items[place]
                                                      : nullptr;
    Require(found != nullptr, "a field that is required is missing");
    return *found;
  };
  const auto is_number = [](const Value& v) {
    return v.kind == Value::Kind::kInt || v.kind == Value::Kind::kUint;
  };
  RouterEvent event;
  event.type = field(0, "type").text;
  if (event.type == "AllBlocksCleared") return event;
  const bool stored = event.type == "BlockStored";
  Require(stored || event.type == "BlockRemoved", "an unknown type");
  for (const Value& hash : field(1, "block_hashes").items) {
    Require(is_number(hash), "a hash that is no number");
    event.signed_hashes |= hash.kind == Value::Kind::kInt;
    event.hashes.push_back(hash.number);
  }
  event.medium = field(stored ? 6 : 2, "medium").text;
  if (!stored) return event;
  const Value& parent = field(2, "parent_block_hash");
  if (parent.kind != Value::Kind::kNil) {
    Require(is_number(parent), "a parent that is no number");
    event.parent = parent.number;
  }
  for (const Value& token : field(3, "token_ids").items) {
    event.tokens.push_back(static_cast<uint32_t>(token.number));
  }
  event.block_size = field(4, "block_size").number;
  Require(field(5, "lora_id").kind == Value::Kind::kNil, "an adapter");
  Require(field(7, "lora_name").kind == Value::Kind::kNil, "an adapter");
  Require(event.tokens.empty() ||
              event.tokens.size() == event.hashes.size() * event.block_size,
          "blocks are not of the block's size");
  return event;
}

inline RouterBatch ParseBatch(std::string_view payload) {
  Reader reader(payload);
  const Value value = reader.Next();
  Require(reader.done(), "bytes after the batch");
  Require(value.kind == Value::Kind::kArray && value.items.size() == 3,
          "a batch that is no array of three");
  RouterBatch batch;
  Require(value.items[0].kind == Value::Kind::kDouble, "a time that is none");
  batch.time = value.items[0].real;
  for (const Value& event : value.items[1].items) {
    batch.events.push_back(ParseEvent(event));
  }
  batch.rank = value.items[2].number;
  return batch;
}

// What a router believes: which blocks are in which medium.
struct RouterView {
  std::map<std::string, std::set<int64_t>> blocks;

  void Apply(const RouterEvent& event) {
    if (event.type == "AllBlocksCleared") blocks.clear();
    for (const int64_t hash : event.hashes) {
      if (event.type == "BlockStored") blocks[event.medium].insert(hash);
      if (event.type == "BlockRemoved") blocks[event.medium].erase(hash);
    }
  }
  bool Has(const std::string& medium, int64_t hash) const {
    const auto it = blocks.find(medium);
    return it != blocks.end() && it->second.contains(hash);
  }
  size_t Count(const std::string& medium) const {
    const auto it = blocks.find(medium);
    return it == blocks.end() ? 0 : it->second.size();
  }
};

// ---- The sockets ----

struct CurveClient {
  std::string server_public, own_public, own_secret;
};

// Follows a publisher: fills gaps from the replay, and begins anew where the
// numbers do.
class Subscriber {
 public:
  // `queue`: batches that ZeroMQ may keep for it; 0 = no limit.
  explicit Subscriber(const std::string& publish,
                      const std::string& replay = "",
                      const std::string& only = "",
                      const CurveClient* curve = nullptr, int queue = 0)
      : context_(zmq_ctx_new()) {
    sub_ = zmq_socket(context_, ZMQ_SUB);
    zmq_setsockopt(sub_, ZMQ_RCVHWM, &queue, sizeof queue);
    zmq_setsockopt(sub_, ZMQ_SUBSCRIBE, only.data(), only.size());
    Connect(sub_, publish, curve);
    if (replay.empty()) return;
    replay_ = zmq_socket(context_, ZMQ_DEALER);
    const int unlimited = 0;
    zmq_setsockopt(replay_, ZMQ_RCVHWM, &unlimited, sizeof unlimited);
    Connect(replay_, replay, curve);
  }
  ~Subscriber() {
    zmq_close(sub_);
    if (replay_ != nullptr) zmq_close(replay_);
    zmq_ctx_term(context_);
  }
  Subscriber(const Subscriber&) = delete;
  Subscriber& operator=(const Subscriber&) = delete;

  // Takes what is there, waiting up to `wait_ms` for something; how many
  // batches it took. Numbers that were missed are asked for.
  size_t Take(int wait_ms = 0) {
    size_t taken = 0;
    while (Readable(sub_, taken == 0 ? wait_ms : 0)) {
      const std::vector<std::string> frames = Receive(sub_);
      Require(frames.size() == 3 && frames[1].size() == 8,
              "no message of three");
      topic = frames[0];
      ++taken;
      const uint64_t number = Number(frames[1]);
      if (next_ && number < *next_) {
        if (ParseBatch(frames[2]).time <= time_) continue;  // was replayed
        ++restarts;
      } else if (next_ && number > *next_) {
        ++gaps;
        if (replay_ != nullptr) Replay(*next_, number);
      }
      Apply(number, frames[2]);
    }
    return taken;
  }

  // Asks for all from `from` on, and applies those before `until`; how many
  // came. The end must be told.
  size_t Replay(uint64_t from, uint64_t until = UINT64_MAX) {
    Ask(BigEndian(from));
    size_t count = 0;
    for (;;) {
      const std::vector<std::string> frames = Receive(replay_);
      Require(frames.size() == 3 && frames[0].empty() && frames[1].size() == 8,
              "no answer of the replay");
      const uint64_t number = Number(frames[1]);
      if (number == UINT64_MAX) {
        Require(frames[2].empty(), "an end that is none");
        return count;
      }
      ++count;
      ++replayed;
      if (number < until) Apply(number, frames[2]);
    }
  }
  void Ask(const std::string& request) {
    zmq_send(replay_, "", 0, ZMQ_SNDMORE);
    zmq_send(replay_, request.data(), request.size(), 0);
  }

  static std::string BigEndian(uint64_t value) {
    std::string bytes(8, '\0');
    for (int i = 7; i >= 0; --i, value >>= 8) {
      bytes[static_cast<size_t>(i)] = static_cast<char>(value);
    }
    return bytes;
  }

  RouterView view;
  std::vector<RouterEvent> events;  // all that were applied
  std::string bytes;                // of all payloads
  std::string topic;
  size_t gaps = 0, replayed = 0, restarts = 0;
  std::optional<uint64_t> next() const { return next_; }

 private:
  static void Connect(void* socket, const std::string& endpoint,
                      const CurveClient* curve) {
    const int none = 0, soon = 10;
    zmq_setsockopt(socket, ZMQ_LINGER, &none, sizeof none);
    zmq_setsockopt(socket, ZMQ_RECONNECT_IVL, &soon, sizeof soon);
    if (curve != nullptr) {
      zmq_setsockopt(socket, ZMQ_CURVE_SERVERKEY, curve->server_public.c_str(),
                     41);
      zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, curve->own_public.c_str(),
                     41);
      zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, curve->own_secret.c_str(),
                     41);
    }
    Require(zmq_connect(socket, endpoint.c_str()) == 0, "cannot connect");
  }
  static bool Readable(void* socket, int wait_ms) {
    zmq_pollitem_t item = {socket, 0, ZMQ_POLLIN, 0};
    return zmq_poll(&item, 1, wait_ms) > 0;
  }
  static std::vector<std::string> Receive(void* socket) {
    std::vector<std::string> frames;
    int more = 1;
    while (more != 0) {
      zmq_msg_t message;
      zmq_msg_init(&message);
      Require(zmq_msg_recv(&message, socket, 0) >= 0,
              zmq_strerror(zmq_errno()));
      frames.emplace_back(static_cast<const char*>(zmq_msg_data(&message)),
                          zmq_msg_size(&message));
      more = zmq_msg_more(&message);
      zmq_msg_close(&message);
    }
    return frames;
  }
  static uint64_t Number(const std::string& bytes) {
    uint64_t number = 0;
    for (const char c : bytes) number = number << 8 | static_cast<uint8_t>(c);
    return number;
  }
  void Apply(uint64_t number, const std::string& payload) {
    bytes += payload;
    RouterBatch batch = ParseBatch(payload);
    time_ = batch.time;
    for (RouterEvent& event : batch.events) {
      view.Apply(event);
      events.push_back(std::move(event));
    }
    next_ = number + 1;
  }

  void* context_;
  void* sub_;
  void* replay_ = nullptr;
  std::optional<uint64_t> next_;
  double time_ = 0;
};

}  // namespace larder::kv_events

#endif  // LARDER_TESTS_TRANSPORT_KV_EVENTS_SUBSCRIBER_H_
