#include "tiers/nvme/segment_file.h"

#include <cstdio>

#include "absl/strings/numbers.h"
#include "absl/strings/strip.h"

namespace larder {
namespace {

uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

}  // namespace

std::string SegmentFileName(uint32_t number) {
  std::array<char, 32> name;
  std::snprintf(name.data(), name.size(), "seg-%08x.log", number);
  return name.data();
}

uint32_t SegmentFileNumber(const std::string& name) {
  absl::string_view digits = name;
  uint32_t number = 0;
  if (!absl::ConsumePrefix(&digits, "seg-") ||
      !absl::ConsumeSuffix(&digits, ".log") || digits.size() != 8 ||
      !absl::SimpleHexAtoi(digits, &number) ||
      SegmentFileName(number) != name) {
    return 0;
  }
  return number;
}

void RowDigest::Add(uint32_t page) {
  ++rows;
  mix += Mix(page);
}

void RowDigest::Remove(uint32_t page) {
  --rows;
  mix -= Mix(page);
}

bool SegmentFile::Fits(uint64_t record_pages) const {
  const uint64_t footer_pages =
      RoundUp(footer.size() + kFooterEntryBytes, kPageBytes) / kPageBytes;
  return next_page + 1 + record_pages + footer_pages + 1 <= pages();
}

}  // namespace larder
