#include "store/chunk_id.h"

#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "store/checksum.h"
#include "store/space.h"

#include "nlohmann/json.hpp"

namespace larder {
namespace {

using nlohmann::json;

json Vectors() {
  std::ifstream in(LARDER_SOURCE_DIR "/tests/golden/chunk_ids.json");
  return json::parse(in);
}

template <class Tag>
void Read(const json& hex, Digest<Tag>& out) {
  ASSERT_TRUE(
      FromHex(hex.get<std::string>(), out.bytes.data(), out.bytes.size()).ok());
}

std::string Unhex(const std::string& hex) {
  std::string bytes(hex.size() / 2, '\0');
  EXPECT_TRUE(FromHex(hex, bytes.data(), bytes.size()).ok());
  return bytes;
}

std::vector<RequestKey> Keys(const json& list) {
  static const std::map<std::string, RequestKeyKind> kKinds = {
      {"salt", RequestKeyKind::kSalt},
      {"lora", RequestKeyKind::kLora},
      {"image", RequestKeyKind::kImage},
      {"prompt", RequestKeyKind::kPrompt}};
  std::vector<RequestKey> keys;
  for (const json& key : list) {
    keys.push_back({kKinds.at(key["kind"]), key["offset"],
                    Unhex(key["value"].get<std::string>())});
  }
  return keys;
}

ByteSpan Bytes(const std::string& text) {
  return std::as_bytes(std::span(text));
}

TEST(Sha256Test, PiecesAndReuse) {
  // FIPS 180-2, appendix B.1.
  const std::string expected =
      "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
  Sha256 hash;
  for (int round = 0; round < 2; ++round) {
    hash.Update("a", 1);
    hash.Update("", 0);
    hash.Update("bc", 2);
    uint8_t out[32];
    hash.Finish(out);
    EXPECT_EQ(ToHex(out, sizeof out), expected);
    hash.Reset();
  }
}

TEST(ChunkIdTest, PublishedSpaces) {
  const json vectors = Vectors();
  ASSERT_EQ(vectors["spaces"].size(), 2u);
  for (const json& v : vectors["spaces"]) {
    SCOPED_TRACE(v["name"].get<std::string>());
    const std::string encoding = Unhex(v["encoding"].get<std::string>());
    const auto space = DecodeSpace(Bytes(encoding));
    ASSERT_TRUE(space.ok()) << space.status();
    EXPECT_EQ(EncodeSpace(*space), encoding);
    EXPECT_EQ(ToHex(ComputeSpaceId(*space)), v["id"].get<std::string>());
    const json& fields = v["fields"];
    EXPECT_EQ(space->model_name, fields["model_name"].get<std::string>());
    EXPECT_EQ(ToHex(space->weights), fields["weights"].get<std::string>());
    EXPECT_EQ(space->cache_dtype, fields["cache_dtype"].get<std::string>());
    EXPECT_EQ(space->kv_scales, fields["kv_scales"].get<std::string>());
    EXPECT_EQ(space->rope, fields["rope"].get<std::string>());
    EXPECT_EQ(space->engine_layout, fields["engine_layout"].get<std::string>());
    EXPECT_EQ(space->hash_scheme, fields["hash_scheme"].get<std::string>());
    EXPECT_EQ(space->block_tokens, fields["block_tokens"]);
    EXPECT_EQ(space->chunk_tokens, fields["chunk_tokens"]);
    ASSERT_EQ(space->groups.size(), fields["groups"].size());
    for (size_t i = 0; i < space->groups.size(); ++i) {
      const GroupDescriptor& group = space->groups[i];
      const json& g = fields["groups"][i];
      EXPECT_EQ(Raw(group.kind), g["kind"]);
      EXPECT_EQ(Raw(group.layout), g["layout"]);
      EXPECT_EQ(group.layer_count, g["layer_count"]);
      EXPECT_EQ(group.kv_head_count, g["kv_head_count"]);
      EXPECT_EQ(group.k_head_bytes, g["k_head_bytes"]);
      EXPECT_EQ(group.v_head_bytes, g["v_head_bytes"]);
      EXPECT_EQ(group.window_tokens, g["window_tokens"]);
      EXPECT_EQ(group.interleave_count, g["interleave_count"]);
      EXPECT_EQ(group.joint, g["joint"]);
      EXPECT_EQ(group.layer_digest, g["layer_digest"].get<std::string>());
    }
  }
}

TEST(ChunkIdTest, PublishedChunks) {
  const json vectors = Vectors();
  ASSERT_GE(vectors["chunks"].size(), 13u);
  for (const json& v : vectors["chunks"]) {
    SCOPED_TRACE(v["name"].get<std::string>());
    SpaceId space;
    Read(v["space"], space);
    std::optional<ChunkId> parent;
    if (!v["parent"].is_null()) Read(v["parent"], parent.emplace());
    const auto tokens = v["tokens"].get<std::vector<uint32_t>>();
    EXPECT_EQ(ToHex(ComputeChunkId(space, parent, tokens, Keys(v["keys"]))),
              v["id"].get<std::string>());
  }
}

TEST(ChunkIdTest, PublishedPrompts) {
  const json vectors = Vectors();
  ASSERT_GE(vectors["prompts"].size(), 6u);
  for (const json& v : vectors["prompts"]) {
    SCOPED_TRACE(v["name"].get<std::string>());
    SpaceId space;
    Read(v["space"], space);
    const auto tokens = v["tokens"].get<std::vector<uint32_t>>();
    const PromptIds prompt = ComputeChunkIds(
        space, tokens, v["chunk_tokens"], v["block_tokens"], Keys(v["keys"]));
    EXPECT_EQ(prompt.tail_tokens, v["tail_tokens"]);
    std::vector<std::string> ids;
    for (const ChunkId& id : prompt.ids) ids.push_back(ToHex(id));
    EXPECT_EQ(ids, v["ids"].get<std::vector<std::string>>());
  }
}

TEST(ChunkIdTest, PublishedEngineHashes) {
  const json vectors = Vectors();
  ASSERT_GE(vectors["engine_hashes"].size(), 3u);
  for (const json& v : vectors["engine_hashes"]) {
    SpaceId space;
    Read(v["space"], space);
    const std::string hash = Unhex(v["hash"].get<std::string>());
    EXPECT_EQ(ToHex(ChunkIdFromEngineHash(space, Bytes(hash))),
              v["id"].get<std::string>());
  }
}

TEST(ChunkIdTest, PublishedRootContents) {
  const json vectors = Vectors();
  ASSERT_GE(vectors["root_contents"].size(), 2u);
  for (const json& v : vectors["root_contents"]) {
    const auto tokens = v["tokens"].get<std::vector<uint32_t>>();
    EXPECT_EQ(ToHex(ComputeRootContent(tokens, Keys(v["keys"]))),
              v["content"].get<std::string>());
  }
}

TEST(ChunkIdTest, ChainEqualsItsLinks) {
  SpaceId space;
  space.bytes[0] = 9;
  std::vector<uint32_t> tokens(3 * 32 + 8);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = 17 * i;
  const RequestKey key{RequestKeyKind::kImage, 40, "picture"};
  const PromptIds prompt = ComputeChunkIds(space, tokens, 32, 4, {&key, 1});
  ASSERT_EQ(prompt.ids.size(), 4u);
  EXPECT_EQ(prompt.tail_tokens, 8u);
  std::optional<ChunkId> parent;
  for (size_t i = 0; i < prompt.ids.size(); ++i) {
    const size_t size = std::min<size_t>(32, tokens.size() - 32 * i);
    const std::span<const RequestKey> keys(&key, i == 1 ? 1 : 0);
    parent = ComputeChunkId(space, parent,
                            std::span(tokens).subspan(32 * i, size), keys);
    EXPECT_EQ(prompt.ids[i], *parent);
  }
}

TEST(ChunkIdTest, NoChunkWithoutTokensOrSize) {
  EXPECT_TRUE(ComputeChunkIds({}, {}, 256, 16, {}).ids.empty());
  const std::vector<uint32_t> tokens(10);
  EXPECT_TRUE(ComputeChunkIds({}, tokens, 0, 16, {}).ids.empty());
  EXPECT_TRUE(ComputeChunkIds({}, tokens, 256, 16, {}).ids.empty());
}

// Inputs that a sloppy encoding would run together must keep ids of their own.
TEST(ChunkIdTest, FieldsDoNotRunIntoEachOther) {
  const SpaceId space{};
  const auto id = [&](std::vector<uint32_t> tokens,
                      std::vector<RequestKey> keys,
                      std::optional<ChunkId> parent = std::nullopt) {
    return ComputeChunkId(space, parent, tokens, keys);
  };
  using K = RequestKeyKind;
  const std::vector<ChunkId> all = {
      id({}, {}),
      id({0}, {}),
      id({0, 0}, {}),
      id({}, {{K::kSalt, 0, ""}}),
      id({}, {{K::kSalt, 0, "ab"}}),
      id({}, {{K::kSalt, 0, "a"}, {K::kSalt, 0, "b"}}),
      id({}, {{K::kLora, 0, "ab"}}),
      id({}, {{K::kImage, 1, "ab"}}),
      id({}, {{K::kImage, 2, "ab"}}),
      id({}, {}, ChunkId{}),
  };
  for (size_t i = 0; i < all.size(); ++i) {
    for (size_t j = 0; j < i; ++j) EXPECT_NE(all[i], all[j]) << i << ' ' << j;
  }
}

}  // namespace
}  // namespace larder
