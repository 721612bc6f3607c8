#include "store/space.h"

#include <algorithm>
#include <string_view>

#include "store/bytes_internal.h"
#include "store/checksum.h"
#include "store/record.h"

namespace larder {
namespace {

using internal::Append;
using internal::ByteReader;

constexpr std::string_view kMagic = "LSP1";
// The terminating NUL is hashed too: no tag can be the beginning of another.
constexpr char kIdTag[] = "larder.space.1";

constexpr uint32_t kMaxLayers = 4096;
constexpr uint32_t kMaxHeadBytes = uint32_t{1} << 30;
constexpr uint32_t kMaxChunkTokens = uint32_t{1} << 20;

struct TextField {
  const char* name;
  std::string SpaceDescriptor::*member;
};

// In the order of the canonical encoding; `weights` comes after the first.
constexpr TextField kTextFields[] = {
    {"model_name", &SpaceDescriptor::model_name},
    {"cache_dtype", &SpaceDescriptor::cache_dtype},
    {"kv_scales", &SpaceDescriptor::kv_scales},
    {"rope", &SpaceDescriptor::rope},
    {"engine_layout", &SpaceDescriptor::engine_layout},
    {"hash_scheme", &SpaceDescriptor::hash_scheme},
};

Status Refuse(std::string_view field, std::string_view why) {
  return absl::InvalidArgumentError(
      absl::StrCat("space: ", absl::string_view(field.data(), field.size()),
                   " ", absl::string_view(why.data(), why.size())));
}

// What engines write when they do not know or have not decided: two engines
// that both say "auto" may well mean different things.
bool IsEvasive(std::string_view text) {
  for (std::string_view word : {"unknown", "auto", "default", "?"}) {
    if (std::equal(text.begin(), text.end(), word.begin(), word.end(),
                   [](char a, char b) {
                     return (a >= 'A' && a <= 'Z' ? a - 'A' + 'a' : a) == b;
                   })) {
      return true;
    }
  }
  return false;
}

Status ValidateText(std::string_view field, std::string_view text) {
  if (text.empty()) return Refuse(field, "is missing");
  if (text.size() > kMaxSpaceFieldBytes) return Refuse(field, "is too long");
  for (const char c : text) {
    // Names end up in logs and terminals.
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      return Refuse(field, "has a control character");
    }
  }
  if (field != "model_name" && IsEvasive(text)) {
    return Refuse(field, "is left unknown");
  }
  return absl::OkStatus();
}

bool IsKnown(GroupKind kind) {
  switch (kind) {
    case GroupKind::kFullAttention:
    case GroupKind::kSlidingWindow:
    case GroupKind::kRecurrentState:
    case GroupKind::kLatent:
    case GroupKind::kIndexer:
      return true;
  }
  return false;
}

bool IsKnown(SegmentLayout layout) {
  switch (layout) {
    case SegmentLayout::kHeadMajor:
    case SegmentLayout::kTokenMajor:
    case SegmentLayout::kOpaque:
      return true;
  }
  return false;
}

Status ValidateGroup(const SpaceDescriptor& space, size_t index) {
  const GroupDescriptor& group = space.groups[index];
  const std::string prefix = absl::StrCat("groups[", index, "].");
  const auto refuse = [&prefix](const char* field, const char* why) {
    return Refuse(prefix + field, why);
  };
  const bool opaque = group.layout == SegmentLayout::kOpaque;
  if (!IsKnown(group.kind)) return refuse("kind", "is unknown");
  if (!IsKnown(group.layout)) return refuse("layout", "is unknown");
  if (group.layer_count == 0) return refuse("layer_count", "is missing");
  if (group.layer_count > kMaxLayers) {
    return refuse("layer_count", "is over 4096");
  }
  if (group.kv_head_count == 0) return refuse("kv_head_count", "is missing");
  if ((opaque || group.kind == GroupKind::kLatent) &&
      group.kv_head_count != 1) {
    return refuse("kv_head_count", "must be 1 for latent and opaque groups");
  }
  if (group.k_head_bytes == 0) return refuse("k_head_bytes", "is missing");
  if (group.k_head_bytes > kMaxHeadBytes) {
    return refuse("k_head_bytes", "is over 1 GiB");
  }
  if (group.v_head_bytes > kMaxHeadBytes) {
    return refuse("v_head_bytes", "is over 1 GiB");
  }
  if (group.v_head_bytes == 0 && !opaque &&
      (group.kind == GroupKind::kFullAttention ||
       group.kind == GroupKind::kSlidingWindow)) {
    return refuse("v_head_bytes", "is missing");
  }
  const bool sliding = group.kind == GroupKind::kSlidingWindow;
  if (sliding && group.window_tokens == 0) {
    return refuse("window_tokens", "is missing");
  }
  if (!sliding && group.window_tokens != 0) {
    return refuse("window_tokens", "is for sliding windows only");
  }
  if (group.interleave_count == 0) {
    return refuse("interleave_count", "is missing");
  }
  // Otherwise a token's turn would depend on which chunk it is counted from.
  if (!opaque && space.chunk_tokens % group.interleave_count != 0) {
    return refuse("interleave_count", "does not divide chunk_tokens");
  }
  if (!opaque && group.kind == GroupKind::kRecurrentState &&
      group.interleave_count != 1) {
    return refuse("interleave_count", "must be 1: a state has no tokens");
  }
  LARDER_RETURN_IF_ERROR(
      ValidateText(prefix + "layer_digest", group.layer_digest));
  PartShape whole;
  whole.layer_count = group.layer_count;
  whole.head_count = group.kv_head_count;
  if (SegmentBytes(group, whole, space.chunk_tokens) > kMaxRecordBytes) {
    return refuse("k_head_bytes", "makes a chunk's layer absurdly large");
  }
  return absl::OkStatus();
}

void AppendText(std::string& out, std::string_view text) {
  Append<uint16_t>(out, static_cast<uint16_t>(text.size()));
  out.append(text);
}

std::string TakeText(ByteReader& reader) {
  const ByteSpan bytes = reader.TakeBytes(reader.Take<uint16_t>());
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

}  // namespace

Status Validate(const SpaceDescriptor& space) {
  for (const TextField& field : kTextFields) {
    LARDER_RETURN_IF_ERROR(ValidateText(field.name, space.*field.member));
    if (field.member == &SpaceDescriptor::model_name &&
        space.weights.IsZero()) {
      return Refuse("weights", "is missing");
    }
  }
  if (space.block_tokens == 0) return Refuse("block_tokens", "is missing");
  if (space.chunk_tokens == 0) return Refuse("chunk_tokens", "is missing");
  if (space.chunk_tokens > kMaxChunkTokens) {
    return Refuse("chunk_tokens", "is over 1048576");
  }
  if (space.chunk_tokens % space.block_tokens != 0) {
    return Refuse("chunk_tokens", "is not a multiple of block_tokens");
  }
  if (space.groups.empty()) return Refuse("groups", "is missing");
  if (space.groups.size() > kMaxGroups) return Refuse("groups", "is over 16");
  for (size_t i = 0; i < space.groups.size(); ++i) {
    LARDER_RETURN_IF_ERROR(ValidateGroup(space, i));
  }
  return absl::OkStatus();
}

std::string EncodeSpace(const SpaceDescriptor& space) {
  std::string out(kMagic);
  for (const TextField& field : kTextFields) {
    AppendText(out, space.*field.member);
    if (field.member == &SpaceDescriptor::model_name) {
      out.append(reinterpret_cast<const char*>(space.weights.bytes.data()),
                 space.weights.bytes.size());
    }
  }
  Append<uint32_t>(out, space.block_tokens);
  Append<uint32_t>(out, space.chunk_tokens);
  Append<uint16_t>(out, static_cast<uint16_t>(space.groups.size()));
  for (const GroupDescriptor& group : space.groups) {
    Append<uint8_t>(out, Raw(group.kind));
    Append<uint8_t>(out, Raw(group.layout));
    Append<uint16_t>(out, group.layer_count);
    Append<uint16_t>(out, group.kv_head_count);
    Append<uint32_t>(out, group.k_head_bytes);
    Append<uint32_t>(out, group.v_head_bytes);
    Append<uint32_t>(out, group.window_tokens);
    Append<uint16_t>(out, group.interleave_count);
    Append<uint16_t>(out, group.joint);
    AppendText(out, group.layer_digest);
  }
  return out;
}

StatusOr<SpaceDescriptor> DecodeSpace(ByteSpan encoded) {
  if (encoded.size() > kMaxSpaceBytes) {
    return absl::InvalidArgumentError("space: encoding is too long");
  }
  ByteReader reader(encoded);
  const ByteSpan magic = reader.TakeBytes(kMagic.size());
  if (magic.empty() ||
      std::memcmp(magic.data(), kMagic.data(), kMagic.size()) != 0) {
    return absl::InvalidArgumentError("space: not an encoding of version 1");
  }
  SpaceDescriptor space;
  for (const TextField& field : kTextFields) {
    space.*field.member = TakeText(reader);
    if (field.member == &SpaceDescriptor::model_name) {
      const ByteSpan weights = reader.TakeBytes(space.weights.bytes.size());
      std::copy_n(reinterpret_cast<const uint8_t*>(weights.data()),
                  weights.size(), space.weights.bytes.begin());
    }
  }
  space.block_tokens = reader.Take<uint32_t>();
  space.chunk_tokens = reader.Take<uint32_t>();
  const size_t group_count = reader.Take<uint16_t>();
  if (group_count > kMaxGroups) return Refuse("groups", "is over 16");
  space.groups.resize(group_count);
  for (GroupDescriptor& group : space.groups) {
    group.kind = GroupKind{reader.Take<uint8_t>()};
    group.layout = SegmentLayout{reader.Take<uint8_t>()};
    group.layer_count = reader.Take<uint16_t>();
    group.kv_head_count = reader.Take<uint16_t>();
    group.k_head_bytes = reader.Take<uint32_t>();
    group.v_head_bytes = reader.Take<uint32_t>();
    group.window_tokens = reader.Take<uint32_t>();
    group.interleave_count = reader.Take<uint16_t>();
    group.joint = reader.Take<uint16_t>();
    group.layer_digest = TakeText(reader);
  }
  if (!reader.AtEnd()) {
    return absl::InvalidArgumentError(
        "space: encoding is truncated or has trailing bytes");
  }
  LARDER_RETURN_IF_ERROR(Validate(space));
  return space;
}

SpaceId ComputeSpaceId(const SpaceDescriptor& space) {
  const std::string encoded = EncodeSpace(space);
  Sha256 hash;
  hash.Update(kIdTag, sizeof kIdTag);
  hash.Update(encoded.data(), encoded.size());
  SpaceId id;
  hash.Finish(id.bytes.data());
  return id;
}

std::string FirstDifference(const SpaceDescriptor& a,
                            const SpaceDescriptor& b) {
  for (const TextField& field : kTextFields) {
    if (a.*field.member != b.*field.member) return field.name;
    if (field.member == &SpaceDescriptor::model_name &&
        a.weights != b.weights) {
      return "weights";
    }
  }
  if (a.block_tokens != b.block_tokens) return "block_tokens";
  if (a.chunk_tokens != b.chunk_tokens) return "chunk_tokens";
  const size_t common = std::min(a.groups.size(), b.groups.size());
  for (size_t i = 0; i < common; ++i) {
    const GroupDescriptor& x = a.groups[i];
    const GroupDescriptor& y = b.groups[i];
    const char* field = nullptr;
    if (x.kind != y.kind) {
      field = "kind";
    } else if (x.layout != y.layout) {
      field = "layout";
    } else if (x.layer_count != y.layer_count) {
      field = "layer_count";
    } else if (x.kv_head_count != y.kv_head_count) {
      field = "kv_head_count";
    } else if (x.k_head_bytes != y.k_head_bytes) {
      field = "k_head_bytes";
    } else if (x.v_head_bytes != y.v_head_bytes) {
      field = "v_head_bytes";
    } else if (x.window_tokens != y.window_tokens) {
      field = "window_tokens";
    } else if (x.interleave_count != y.interleave_count) {
      field = "interleave_count";
    } else if (x.joint != y.joint) {
      field = "joint";
    } else if (x.layer_digest != y.layer_digest) {
      field = "layer_digest";
    }
    if (field != nullptr) return absl::StrCat("groups[", i, "].", field);
  }
  return a.groups.size() == b.groups.size() ? "" : "groups";
}

uint64_t SegmentBytes(const GroupDescriptor& group, const PartShape& shape,
                      uint32_t tokens) {
  const uint64_t held =
      group.kind == GroupKind::kRecurrentState ? uint64_t{tokens != 0} : tokens;
  const uint64_t per_token = uint64_t{group.k_head_bytes} + group.v_head_bytes;
  const unsigned __int128 bytes =
      static_cast<unsigned __int128>(per_token) * shape.head_count * held;
  // Descriptors that were not validated must not wrap round to a small size.
  return bytes > UINT64_MAX ? UINT64_MAX : static_cast<uint64_t>(bytes);
}

}  // namespace larder
