// Bytes that earlier builds wrote. They parse for ever; and as long as version
// 1 is what is written, today's code writes them bit for bit.

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <ostream>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "store/record.h"
#include "store/types.h"

namespace larder {
namespace {

using Bytes = std::vector<std::byte>;

struct Golden {
  const char* name;
  GroupDescriptor group;
  PartShape shape;
  uint32_t tokens;
  RecordMeta meta;
};

void PrintTo(const Golden& golden, std::ostream* out) {
  *out << golden.name;
}

std::vector<Golden> Goldens() {
  RecordMeta meta;
  for (uint8_t i = 0; i < 32; ++i) {
    meta.space.bytes[i] = i;
    meta.chunk.bytes[i] = 32 + i;
    meta.parent.bytes[i] = 64 + i;
  }
  meta.tenant = TenantId{1001};
  meta.epoch = Epoch{3};
  meta.generation = 0x1122334455667788;
  meta.token_begin = 512;

  GroupDescriptor heads;
  heads.layer_count = 4;
  heads.kv_head_count = 4;
  heads.k_head_bytes = 12;
  heads.v_head_bytes = 8;
  RecordMeta tail = meta;
  tail.is_tail = true;
  tail.lineage = Lineage::kLossyFinest;

  GroupDescriptor rows = heads;
  rows.layout = SegmentLayout::kTokenMajor;
  rows.interleave_count = 2;
  RecordMeta root = meta;
  root.parent = {};
  root.token_begin = 0;
  root.group = GroupIndex{2};
  for (uint8_t i = 0; i < 32; ++i) root.root_content.bytes[i] = 96 + i;

  GroupDescriptor pages = heads;
  pages.layout = SegmentLayout::kOpaque;
  pages.kv_head_count = 1;
  pages.interleave_count = 3;
  return {{"record_v1_head_major", heads, {1, 2, 2, 2, 0, 1}, 5, tail},
          {"record_v1_token_major", rows, {0, 4, 0, 4, 1, 2}, 5, root},
          {"record_v1_opaque", pages, {0, 1, 0, 1, 2, 3}, 7, meta}};
}

Bytes Write(const Golden& golden, RecordMeta& meta) {
  const auto layout = LayoutRecord(golden.group, golden.shape, golden.tokens);
  EXPECT_TRUE(layout.ok()) << layout.status();
  meta = golden.meta;
  meta.shape = golden.shape;
  meta.token_count = golden.tokens;
  Bytes bytes(layout->record_bytes);
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::byte>(7 * i + i / 256);
  }
  SealRecord(*layout, meta, {}, bytes);
  return bytes;
}

Bytes ReadFile(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  const ByteSpan bytes = std::as_bytes(std::span(text));
  return Bytes(bytes.begin(), bytes.end());
}

class GoldenTest : public testing::TestWithParam<Golden> {};

TEST_P(GoldenTest, Record) {
  const std::string file = std::string(GetParam().name) + ".bin";
  RecordMeta meta;
  const Bytes written = Write(GetParam(), meta);
  const Bytes golden = ReadFile(LARDER_SOURCE_DIR "/tests/golden/" + file);

  if (golden != written) {
    const std::string actual = LARDER_BINARY_DIR "/" + file;
    std::ofstream(actual, std::ios::binary)
        .write(reinterpret_cast<const char*>(written.data()),
               static_cast<std::streamsize>(written.size()));
    ADD_FAILURE() << "the format has changed: what is written now lies in "
                  << actual << "; a new format needs a version of its own";
  }
  const auto view = RecordView::Parse(golden);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_TRUE(view->VerifyPayload().ok()) << view->VerifyPayload();
  EXPECT_EQ(view->meta(), meta);
}

std::string Name(const testing::TestParamInfo<Golden>& golden) {
  return golden.param.name;
}

INSTANTIATE_TEST_SUITE_P(V1, GoldenTest, testing::ValuesIn(Goldens()), Name);

// Later versions come in files of their own; none may be left untested.
TEST(GoldenFolderTest, EveryRecordOfTheFolderParses) {
  int records = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(LARDER_SOURCE_DIR "/tests/golden")) {
    const std::string name = entry.path().filename().string();
    if (name.rfind("record_v", 0) != 0) continue;
    ++records;
    const Bytes bytes = ReadFile(entry.path());
    const auto view = RecordView::Parse(bytes);
    ASSERT_TRUE(view.ok()) << name << ": " << view.status();
    EXPECT_TRUE(view->VerifyPayload().ok()) << name;
  }
  EXPECT_GE(records, 3);
}

}  // namespace
}  // namespace larder
