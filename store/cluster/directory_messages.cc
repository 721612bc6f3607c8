#include "store/cluster/directory_messages.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace larder {
namespace {

struct Header {
  DirectoryMessageKind kind{};
  uint8_t reserved[3] = {};
  uint32_t sections = 0;
};
static_assert(sizeof(Header) == 8);

struct SectionHeader {  // of questions
  AnchorKey anchor{};
  uint32_t count = 0;
  uint32_t reserved = 0;
};
static_assert(sizeof(SectionHeader) == 16);

struct AnswerHeader {  // of a section of an answer
  uint32_t count = 0;
  uint8_t directories = 1;
  uint8_t reserved[3] = {};
};
static_assert(sizeof(AnswerHeader) == 8);

struct WireVerdict {
  uint8_t held = 0;
  uint8_t holders = 0;
  uint8_t flags = 0;
  uint8_t reserved = 0;
};
static_assert(sizeof(WireVerdict) == 4);
constexpr uint8_t kAct = 1, kHot = 2, kRefused = 4;

template <class T>
void Append(std::string& out, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}
template <class T>
void AppendAll(std::string& out, const std::vector<T>& values) {
  out.append(reinterpret_cast<const char*>(values.data()),
             values.size() * sizeof(T));
}

// What is left of a message. Every read fails from the first on that finds too
// little.
class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  template <class T>
  bool Take(T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    if (bytes_.size() < sizeof value) return false;
    std::memcpy(static_cast<void*>(&value), bytes_.data(), sizeof value);
    bytes_.remove_prefix(sizeof value);
    return true;
  }
  template <class T>
  bool TakeAll(size_t count, std::vector<T>& values) {
    if (bytes_.size() / sizeof(T) < count) return false;
    values.resize(count);
    if (count != 0) {
      std::memcpy(static_cast<void*>(values.data()), bytes_.data(),
                  count * sizeof(T));
    }
    bytes_.remove_prefix(count * sizeof(T));
    return true;
  }
  // The header, if the message is of that kind and can have its sections.
  bool Begin(DirectoryMessageKind kind, size_t section_bytes, Header& header) {
    return Take(header) && header.kind == kind && header.reserved[0] == 0 &&
           header.reserved[1] == 0 && header.reserved[2] == 0 &&
           header.sections <= bytes_.size() / section_bytes;
  }
  bool empty() const { return bytes_.empty(); }

 private:
  std::string_view bytes_;
};

bool Sound(const ChunkFacts& facts, bool may_be_gone) {
  return facts.tier <= CopyTier::kDurable &&
         (may_be_gone || facts.tier != CopyTier::kGone) &&
         facts.copies <= kHomesMax && facts.reserved == 0;
}

bool Sound(const AnswerHeader& header) {
  return header.directories >= 1 && header.directories <= kHomesMax &&
         header.reserved[0] == 0 && header.reserved[1] == 0 &&
         header.reserved[2] == 0;
}

Status Malformed(const char* what) {
  return absl::InvalidArgumentError(
      absl::StrCat("a malformed message between nodes: ", what));
}

bool Parse(Reader& in, Announce& message) {
  Header header;
  if (!in.Begin(DirectoryMessageKind::kAnnounce, sizeof(SectionHeader),
                header) ||
      !in.Take(message.incarnation) || !in.Take(message.sequence)) {
    return false;
  }
  size_t total = 0;
  for (uint32_t s = 0; s < header.sections; ++s) {
    SectionHeader head;
    if (!in.Take(head) || head.reserved != 0) return false;
    total += head.count;
    Announce::Section section;
    section.anchor = head.anchor;
    if (total > kAnnounceRecordsMax || head.count == 0 ||
        !in.TakeAll(head.count, section.records)) {
      return false;
    }
    for (const ChunkRecord& record : section.records) {
      if (!Sound(record.facts, true)) return false;
    }
    message.sections.push_back(std::move(section));
  }
  return in.empty();
}

bool Parse(Reader& in, Announced& message) {
  Header header;
  if (!in.Begin(DirectoryMessageKind::kAnnounced, sizeof(AnswerHeader),
                header) ||
      !in.Take(message.digest)) {
    return false;
  }
  for (uint32_t s = 0; s < header.sections; ++s) {
    AnswerHeader head;
    std::vector<WireVerdict> verdicts;
    if (!in.Take(head) || !Sound(head) || !in.TakeAll(head.count, verdicts)) {
      return false;
    }
    Announced::Section section;
    section.directories = head.directories;
    for (const WireVerdict& v : verdicts) {
      if (v.reserved != 0 || v.held >> kHomesMax != 0 ||
          (v.flags & ~(kAct | kHot | kRefused)) != 0) {
        return false;
      }
      section.verdicts.push_back({v.held, v.holders, (v.flags & kAct) != 0,
                                  (v.flags & kHot) != 0,
                                  (v.flags & kRefused) != 0});
    }
    message.sections.push_back(std::move(section));
  }
  return in.empty();
}

bool Parse(Reader& in, FindQuery& message) {
  Header header;
  if (!in.Begin(DirectoryMessageKind::kFind, sizeof(SectionHeader), header)) {
    return false;
  }
  size_t total = 0;
  for (uint32_t s = 0; s < header.sections; ++s) {
    SectionHeader head;
    if (!in.Take(head) || head.reserved != 0) return false;
    total += head.count;
    FindQuery::Section section;
    section.anchor = head.anchor;
    if (total > kFindKeysMax || head.count == 0 ||
        !in.TakeAll(head.count, section.keys)) {
      return false;
    }
    message.sections.push_back(std::move(section));
  }
  return in.empty();
}

bool Parse(Reader& in, FindAnswer& message) {
  Header header;
  if (!in.Begin(DirectoryMessageKind::kFound, sizeof(AnswerHeader), header)) {
    return false;
  }
  for (uint32_t s = 0; s < header.sections; ++s) {
    AnswerHeader head;
    std::vector<uint8_t> counts;
    if (!in.Take(head) || !Sound(head) || !in.TakeAll(head.count, counts)) {
      return false;
    }
    FindAnswer::Section section;
    section.directories = head.directories;
    section.holders.resize(counts.size());
    for (size_t i = 0; i < counts.size(); ++i) {
      if (counts[i] > kHoldersToldMax ||
          !in.TakeAll(counts[i], section.holders[i])) {
        return false;
      }
      for (const Holder& holder : section.holders[i]) {
        if (!Sound(holder.facts, false)) return false;
      }
    }
    message.sections.push_back(std::move(section));
  }
  return in.empty();
}

template <class Message>
StatusOr<Message> ParseAs(std::string_view bytes, const char* what) {
  Reader in(bytes);
  Message message;
  if (!Parse(in, message)) return Malformed(what);
  return message;
}

template <class Message>
Header HeaderOf(DirectoryMessageKind kind, const Message& message) {
  Header header;
  header.kind = kind;
  header.sections = static_cast<uint32_t>(message.sections.size());
  return header;
}

}  // namespace

std::string Encode(const Announce& message) {
  std::string out;
  Append(out, HeaderOf(DirectoryMessageKind::kAnnounce, message));
  Append(out, message.incarnation);
  Append(out, message.sequence);
  for (const Announce::Section& section : message.sections) {
    Append(out,
           SectionHeader{section.anchor,
                         static_cast<uint32_t>(section.records.size()), 0});
    AppendAll(out, section.records);
  }
  return out;
}

std::string Encode(const Announced& message) {
  std::string out;
  Append(out, HeaderOf(DirectoryMessageKind::kAnnounced, message));
  Append(out, message.digest);
  for (const Announced::Section& section : message.sections) {
    Append(out, AnswerHeader{static_cast<uint32_t>(section.verdicts.size()),
                             section.directories,
                             {}});
    for (const RecordVerdict& v : section.verdicts) {
      Append(out, WireVerdict{v.held, v.holders,
                              static_cast<uint8_t>((v.act ? kAct : 0) |
                                                   (v.hot ? kHot : 0) |
                                                   (v.refused ? kRefused : 0)),
                              0});
    }
  }
  return out;
}

std::string Encode(const FindQuery& message) {
  std::string out;
  Append(out, HeaderOf(DirectoryMessageKind::kFind, message));
  for (const FindQuery::Section& section : message.sections) {
    Append(out, SectionHeader{section.anchor,
                              static_cast<uint32_t>(section.keys.size()), 0});
    AppendAll(out, section.keys);
  }
  return out;
}

std::string Encode(const FindAnswer& message) {
  std::string out;
  Append(out, HeaderOf(DirectoryMessageKind::kFound, message));
  for (const FindAnswer::Section& section : message.sections) {
    Append(out, AnswerHeader{static_cast<uint32_t>(section.holders.size()),
                             section.directories,
                             {}});
    for (const auto& holders : section.holders) {
      Append(out, static_cast<uint8_t>(holders.size()));
    }
    for (const auto& holders : section.holders) AppendAll(out, holders);
  }
  return out;
}

StatusOr<Announce> ParseAnnounce(std::string_view bytes) {
  return ParseAs<Announce>(bytes, "announce");
}
StatusOr<Announced> ParseAnnounced(std::string_view bytes) {
  return ParseAs<Announced>(bytes, "announced");
}
StatusOr<FindQuery> ParseFind(std::string_view bytes) {
  return ParseAs<FindQuery>(bytes, "find");
}
StatusOr<FindAnswer> ParseFound(std::string_view bytes) {
  return ParseAs<FindAnswer>(bytes, "found");
}

}  // namespace larder
