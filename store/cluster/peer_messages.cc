#include "store/cluster/peer_messages.h"

#include <cstring>
#include <type_traits>

namespace larder {
namespace {

constexpr char kMagic[4] = {'L', 'R', 'D', 'C'};
constexpr uint16_t kVersion = 2;

class Writer {
 public:
  template <class T>
  void Put(T value) {
    static_assert(std::has_unique_object_representations_v<T>);
    out_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void Append(std::string_view bytes) { out_.append(bytes); }
  size_t size() const { return out_.size(); }
  std::string Take() { return std::move(out_); }

 private:
  std::string out_;
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  template <class T>
  T Get() {
    static_assert(std::has_unique_object_representations_v<T>);
    T value{};
    const std::string_view bytes = Take(sizeof value);
    if (!bytes.empty()) std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }
  std::string_view Take(size_t size) {
    if (size > bytes_.size()) {
      short_ = true;
      return {};
    }
    const std::string_view taken = bytes_.substr(0, size);
    bytes_.remove_prefix(size);
    return taken;
  }
  void Want(bool right) { wrong_ |= !right; }
  size_t left() const { return bytes_.size(); }
  bool ok() const { return !short_ && !wrong_; }
  // All was read, and was what it should be.
  Status End() const {
    if (ok() && bytes_.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError("a message between nodes is malformed");
  }

 private:
  std::string_view bytes_;
  bool short_ = false;
  bool wrong_ = false;
};

}  // namespace

std::string Encode(const PeerGreeting& greeting) {
  Writer out;
  out.Append({kMagic, sizeof kMagic});
  out.Put(kVersion);
  out.Put(uint16_t{0});
  out.Put(greeting.cluster);
  out.Put(greeting.node);
  out.Put(greeting.incarnation);
  out.Put(greeting.secret_check);
  return out.Take();
}

StatusOr<PeerGreeting> ParsePeerGreeting(std::string_view bytes) {
  Reader in(bytes);
  if (in.Take(sizeof kMagic) != std::string_view(kMagic, sizeof kMagic)) {
    return absl::InvalidArgumentError("this is no node of Larder");
  }
  if (const auto version = in.Get<uint16_t>(); version != kVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("a node speaks version ", version, " between nodes, not ",
                     kVersion, ": upgrade the older one"));
  }
  PeerGreeting greeting;
  in.Want(in.Get<uint16_t>() == 0);
  greeting.cluster = in.Get<uint64_t>();
  greeting.node = in.Get<NodeId>();
  greeting.incarnation = in.Get<uint64_t>();
  greeting.secret_check = in.Get<uint64_t>();
  LARDER_RETURN_IF_ERROR(in.End());
  return greeting;
}

std::string Encode(const RecordsQuery& query) {
  Writer out;
  out.Put(PeerMessageKind::kRecords);
  out.Put(uint8_t{0});
  out.Put(static_cast<uint16_t>(query.ids.size()));
  out.Put(query.tenant);
  out.Put(query.space.bytes);
  for (const ChunkId& id : query.ids) out.Put(id.bytes);
  return out.Take();
}

StatusOr<RecordsQuery> ParseRecordsQuery(std::string_view bytes) {
  Reader in(bytes);
  RecordsQuery query;
  in.Want(in.Get<PeerMessageKind>() == PeerMessageKind::kRecords);
  in.Want(in.Get<uint8_t>() == 0);
  const auto count = in.Get<uint16_t>();
  in.Want(count >= 1 && count <= kRecordsIdsMax);
  query.tenant = in.Get<TenantId>();
  query.space.bytes = in.Get<std::array<uint8_t, 32>>();
  in.Want(in.left() == count * sizeof(ChunkId));
  if (!in.ok()) return in.End();
  query.ids.resize(count);
  for (ChunkId& id : query.ids) id.bytes = in.Get<std::array<uint8_t, 32>>();
  LARDER_RETURN_IF_ERROR(in.End());
  return query;
}

namespace {

void Put(const RecordMeta& meta, Writer& out) {
  std::byte encoded[kEncodedMetaBytes];
  EncodeMeta(meta, encoded);
  out.Append({reinterpret_cast<const char*>(encoded), sizeof encoded});
}

StatusOr<RecordMeta> TakeMeta(Reader& in) {
  const std::string_view encoded = in.Take(kEncodedMetaBytes);
  LARDER_RETURN_IF_ERROR(in.ok() ? absl::OkStatus() : in.End());
  return DecodeMeta(std::as_bytes(std::span(encoded.data(), encoded.size())));
}

}  // namespace

std::string Encode(const RecordsAnswer& answer) {
  Writer out;
  out.Put(PeerMessageKind::kRecords);
  out.Put(uint8_t{0});
  uint16_t count = 0;
  out.Put(count);
  for (const Engine::StoredRecords& chunk : answer.chunks) {
    const size_t bytes = 4 + chunk.parts.size() * kEncodedMetaBytes;
    if (out.size() + bytes > kRecordsAnswerBytesMax) break;
    out.Put(chunk.groups);
    out.Put(static_cast<uint16_t>(chunk.parts.size()));
    for (const RecordMeta& meta : chunk.parts) Put(meta, out);
    ++count;
  }
  std::string bytes = out.Take();
  std::memcpy(&bytes[2], &count, sizeof count);
  return bytes;
}

StatusOr<RecordsAnswer> ParseRecordsAnswer(std::string_view bytes) {
  Reader in(bytes);
  RecordsAnswer answer;
  in.Want(in.Get<PeerMessageKind>() == PeerMessageKind::kRecords);
  in.Want(in.Get<uint8_t>() == 0);
  const auto count = in.Get<uint16_t>();
  in.Want(count <= kRecordsIdsMax);
  for (uint32_t i = 0; i < count && in.ok(); ++i) {
    Engine::StoredRecords& chunk = answer.chunks.emplace_back();
    chunk.groups = in.Get<GroupMask>();
    const auto parts = in.Get<uint16_t>();
    in.Want((chunk.groups == 0) == (parts == 0));
    for (uint32_t p = 0; p < parts && in.ok(); ++p) {
      LARDER_ASSIGN_OR_RETURN(const RecordMeta meta, TakeMeta(in));
      chunk.parts.push_back(meta);
    }
  }
  LARDER_RETURN_IF_ERROR(in.End());
  return answer;
}

ReadQuery ReadOf(const RecordMeta& meta) {
  ReadQuery query;
  query.tenant = meta.tenant;
  query.space = meta.space;
  query.chunk = meta.chunk;
  query.group = meta.group;
  query.shape = meta.shape;
  query.checksum = meta.checksum;
  return query;
}

std::string Encode(const ReadQuery& query) {
  Writer out;
  out.Put(PeerMessageKind::kRead);
  out.Put(query.urgency);
  out.Put(query.group);
  out.Put(query.tenant);
  out.Put(query.space.bytes);
  out.Put(query.chunk.bytes);
  out.Put(query.shape);
  out.Put(uint32_t{0});
  out.Put(query.checksum);
  out.Put(query.offset);
  out.Put(query.bytes);
  out.Put(query.landing);
  return out.Take();
}

StatusOr<ReadQuery> ParseReadQuery(std::string_view bytes) {
  Reader in(bytes);
  ReadQuery query;
  in.Want(in.Get<PeerMessageKind>() == PeerMessageKind::kRead);
  query.urgency = in.Get<Urgency>();
  in.Want(static_cast<uint8_t>(query.urgency) < kUrgencies);
  query.group = in.Get<GroupIndex>();
  query.tenant = in.Get<TenantId>();
  query.space.bytes = in.Get<std::array<uint8_t, 32>>();
  query.chunk.bytes = in.Get<std::array<uint8_t, 32>>();
  query.shape = in.Get<PartShape>();
  in.Want(in.Get<uint32_t>() == 0);
  query.checksum = in.Get<Checksum>();
  query.offset = in.Get<uint64_t>();
  query.bytes = in.Get<uint64_t>();
  in.Want(query.bytes > 0 && query.bytes <= kMaxRecordBytes &&
          query.offset <= kMaxRecordBytes);
  query.landing = in.Get<LandingId>();
  LARDER_RETURN_IF_ERROR(in.End());
  return query;
}

std::string Encode(const Offer& offer) {
  Writer out;
  out.Put(PeerMessageKind::kOffer);
  out.Put(offer.urgency);
  out.Put(static_cast<uint16_t>(offer.records.size()));
  out.Put(offer.tenant);
  out.Put(static_cast<uint32_t>(offer.space.size()));
  out.Append(offer.space);
  for (const RecordMeta& meta : offer.records) Put(meta, out);
  return out.Take();
}

StatusOr<Offer> ParseOffer(std::string_view bytes) {
  Reader in(bytes);
  Offer offer;
  in.Want(in.Get<PeerMessageKind>() == PeerMessageKind::kOffer);
  offer.urgency = in.Get<Urgency>();
  in.Want(static_cast<uint8_t>(offer.urgency) < kUrgencies);
  const auto count = in.Get<uint16_t>();
  in.Want(count >= 1 && count <= kOfferRecordsMax);
  offer.tenant = in.Get<TenantId>();
  offer.space = in.Take(in.Get<uint32_t>());
  in.Want(in.left() == count * kEncodedMetaBytes);
  if (!in.ok()) return in.End();
  for (uint32_t i = 0; i < count; ++i) {
    LARDER_ASSIGN_OR_RETURN(offer.records.emplace_back(), TakeMeta(in));
  }
  LARDER_RETURN_IF_ERROR(in.End());
  return offer;
}

}  // namespace larder
