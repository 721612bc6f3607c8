// Bugs put into the kernels on purpose (LARDER_INJECT_...), and by whom each is
// found: a way of testing that no longer finds one of them fails here.

#include "kernels/cuda/paged_copy_types.h"
#include "tests/kernels/simt/attention_case.h"
#include "tests/kernels/simt/coded_attention_case.h"
#include "tests/kernels/simt/kvc1_case.h"
#include "tests/kernels/simt/kvc1_encode_case.h"

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define LARDER_WITH_TSAN
extern "C" const char* __tsan_default_options() {
  return "halt_on_error=1";
}
#elif __has_feature(address_sanitizer)
#define LARDER_WITH_ASAN
#endif
#endif

namespace larder::kernels::cuda {
namespace {

enum class Found {
  kNot,
  kWrong,  // the result
  kError,  // by the executor
};
void PrintTo(Found found, std::ostream* out) {
  *out << (found == Found::kNot     ? "not found"
           : found == Found::kWrong ? "wrong result"
                                    : "error of the executor");
}

Found Judge(const std::optional<std::string>& error, bool right) {
  return error.has_value() ? Found::kError
         : right           ? Found::kNot
                           : Found::kWrong;
}

// --- What is run -------------------------------------------------------------

Found Gather(const simt::Schedule& schedule, const std::string& suffix) {
  constexpr uint32_t kTokens = 37, kRow = 64;
  std::vector<int64_t> places(kTokens);
  for (uint32_t t = 0; t < kTokens; ++t)
    places[t] = t % 5 == 0 ? -1 : 40 - int64_t{t};
  const simt::DeviceArray<int64_t> device_places(places);
  const simt::DeviceArray<uint8_t> paged(48 * kRow), dense(kTokens * kRow);
  for (size_t i = 0; i < paged.size(); ++i) {
    paged[i] = static_cast<uint8_t>(i % 251);
  }
  PagedCopies copies = {};
  copies.count = 1;
  PagedCopy& c = copies.planes[0];
  c.paged = {paged.data(), 16 * kRow, kRow, kRow};
  c.dense = {dense.data(), kRow, kRow};
  c.places = {device_places.data(), 16, 1};
  c.tokens = kTokens;
  c.heads = 1;
  c.row_bytes = kRow;
  const auto error = simt::Launch(PlanGather(copies), copies, schedule, suffix);
  std::vector<uint8_t> want(dense.size(), 0xee);
  for (uint32_t t = 0; t < kTokens; ++t) {
    if (places[t] < 0) continue;
    memcpy(want.data() + t * kRow,
           &paged[static_cast<size_t>(places[t]) * kRow], kRow);
  }
  return Judge(error, dense.Copy() == want);
}

Found Decode(const simt::Schedule& schedule, const std::string& suffix) {
  Kvc1Case c({.tokens = 40, .heads = 1, .rotary_dim = 16, .spread = 12});
  const Kvc1Case::Got got = c.Run(schedule, suffix);
  return Judge(got.error, got.rows == c.want() && got.results[0].ok == 1 &&
                              got.results[1].ok == 1);
}

Found DecodePlanes(const simt::Schedule& schedule, const std::string& suffix) {
  Kvc1Case c({.tokens = 40, .heads = 1, .refined = true, .fine = true});
  const Kvc1Case::Got got = c.Run(schedule, suffix);
  return Judge(got.error, got.rows == c.want());
}

Found DecodeNested(const simt::Schedule& schedule, const std::string& suffix) {
  Kvc1Case c({.tokens = 40,
              .heads = 1,
              .refined = true,
              .predicted = true,
              .trellis = true,
              .nested = true});
  const Kvc1Case::Got got = c.Run(schedule, suffix);
  return Judge(got.error, got.rows == c.want());
}

Found DecodeFixed(const simt::Schedule& schedule, const std::string& suffix) {
  Kvc1Case c({.content = Kvc1Content::kFixedInt4,
              .tokens = 40,
              .heads = 3,
              .head_dim = 24});
  const Kvc1Case::Got got = c.Run(schedule, suffix);
  return Judge(got.error, got.rows == c.want());
}

Found DecodeWithTooFewEscapes(const simt::Schedule& schedule,
                              const std::string& suffix) {
  Kvc1Case c({.tiles = 1, .tokens = 40, .heads = 1, .spread = 12});
  // So many that what lies behind them is not the array's any more.
  const uint32_t count = c.tile(0).escape_count;
  const simt::DeviceArray<int16_t> one(1);
  c.tile(0).escapes = one.data();
  c.tile(0).escape_count = 1;
  const Kvc1Case::Got got = c.Run(schedule, suffix);
  EXPECT_GT(count, 1u);
  return Judge(got.error, got.results[0].ok == 0);
}

Found EncodeTiles(const simt::Schedule& schedule, const std::string& suffix) {
  Kvc1EncodeCase c({.tokens = 40, .rotary_dim = 16, .spread = 12});
  const Kvc1EncodeCase::Got got = c.Run(schedule, suffix);
  return Judge(got.error, c.IsWanted(got, 0) && c.IsWanted(got, 1));
}

Found EncodeIntoSmallRoom(const simt::Schedule& schedule,
                          const std::string& suffix) {
  Kvc1EncodeCase c({.tiles = 1, .tokens = 40, .spread = 12});
  c.tile(0).word_room = 32;
  const Kvc1EncodeCase::Got got = c.Run(schedule, suffix);
  return Judge(got.error, got.results[0].ok == 0);
}

Found AttendGroup(uint32_t group, const simt::Schedule& schedule,
                  const std::string& suffix) {
  AttentionCase c({.group = group, .lengths = {100}});
  const AttentionCase::Got got = c.Run(schedule, suffix);
  if (got.error.has_value()) return Found::kError;
  const AttentionCase::Got want = c.Run();
  return Judge(got.error, got.outputs == want.outputs &&
                              got.maxima == want.maxima &&
                              got.sums == want.sums);
}

Found Attend(const simt::Schedule& schedule, const std::string& suffix) {
  return AttendGroup(3, schedule, suffix);
}
Found AttendMma(const simt::Schedule& schedule, const std::string& suffix) {
  return AttendGroup(4, schedule, suffix);
}

Found Merge(const simt::Schedule& schedule, const std::string& suffix) {
  const simt::DeviceArray<float> outputs(std::vector<float>(2 * 3 * 64, 1)),
      maxima(std::vector<float>{1, 2, 3, 3, 2, 1}),
      sums(std::vector<float>(6, 1));
  PartialsMerge merge = {};
  merge.outputs = merge.output = outputs.data();
  merge.maxima = merge.max = maxima.data();
  merge.sums = merge.sum = sums.data();
  merge.parts = 2;
  merge.items = 3;
  merge.dim = 64;
  const auto error =
      simt::Launch(PlanMergePartials(merge), merge, schedule, suffix);
  bool right = maxima[0] == 3 && maxima[1] == 2 && maxima[2] == 3;
  for (int i = 0; i < 3 * 64; ++i) right &= std::abs(outputs[i] - 1) < 1e-6f;
  return Judge(error, right);
}

const DeviceShape kCodedShape = {
    .shape = {.kv_heads = 1, .block_heads = 1, .tokens = {{70}}},
    .keys = {.rotary_dim = 64}};

Found AttendCoded(const simt::Schedule& schedule, const std::string& suffix) {
  CodedDeviceCase c(kCodedShape);
  const CodedDeviceCase::Got got = c.Run(schedule, suffix);
  if (got.error.has_value()) return Found::kError;
  const CodedDeviceCase::Got want = c.Run();
  return Judge(got.error, got.results.outputs == want.results.outputs &&
                              got.results.maxima == want.results.maxima &&
                              got.results.sums == want.results.sums);
}

Found AttendBadPiece(const simt::Schedule& schedule,
                     const std::string& suffix) {
  CodedDeviceCase c(kCodedShape);
  --c.values(0).coded.word_count;
  const CodedDeviceCase::Got got = c.Run(schedule, suffix);
  return Judge(got.error,
               got.decoded[0] == 0 && std::isnan(got.results.outputs[0]));
}

// --- The bugs ----------------------------------------------------------------

struct Bug {
  const char* name;
  Found (*run)(const simt::Schedule& schedule, const std::string& suffix);
  // By the fixed schedule, and by one of ten random ones, without sanitizers.
  Found fixed, random;
  // In their builds, whatever the schedule.
  bool asan, tsan;
};
void PrintTo(const Bug& bug, std::ostream* out) {
  *out << bug.name;
}

constexpr Found kNot = Found::kNot, kWrong = Found::kWrong,
                kError = Found::kError;
const Bug kBugs[] = {
    {"SKIPPED_PLACE", Gather, kWrong, kWrong, false, false},
    {"OUT_OF_BOUNDS", Gather, kNot, kNot, true, false},
    {"MISALIGNED", Gather, kError, kError, false, false},
    {"WORD_RANK", Decode, kWrong, kWrong, false, false},
    {"SHUFFLE_IN_BRANCH", Decode, kError, kError, false, false},
    {"ESCAPE_BOUND", DecodeWithTooFewEscapes, kNot, kNot, true, false},
    {"NO_TRELLIS", DecodeNested, kWrong, kWrong, false, false},
    {"NO_SYNCWARP_BEFORE_STORE", Decode, kNot, kNot, false, true},
    {"NO_SYNCWARP_BEFORE_TABLES", Decode, kNot, kNot, false, true},
    {"NO_SYNCWARP_AFTER_LOAD", DecodePlanes, kNot, kWrong, false, true},
    {"FIXED_TAIL", DecodeFixed, kNot, kNot, true, false},
    {"FIXED_HALVES", DecodeFixed, kWrong, kWrong, false, false},
    {"WORD_ORDER", EncodeTiles, kWrong, kWrong, false, false},
    {"WORD_ROOM", EncodeIntoSmallRoom, kNot, kNot, true, false},
    {"NO_SYNCWARP_AFTER_ROWS", EncodeTiles, kWrong, kWrong, false, true},
    {"NO_SYNCWARP_BEFORE_LEAVING", EncodeTiles, kWrong, kWrong, false, true},
    {"NARROW_MASK", Attend, kError, kError, false, false},
    {"EARLY_EXIT", Attend, kError, kError, false, false},
    {"CP_ASYNC_WAIT", Attend, kWrong, kWrong, false, false},
    {"NO_SYNCTHREADS_BEFORE_READ", Attend, kNot, kWrong, false, true},
    {"NO_SYNCTHREADS_AFTER_READ", Attend, kWrong, kWrong, false, true},
    {"NO_SYNCWARP_BEFORE_MMA", AttendMma, kWrong, kWrong, false, true},
    {"NO_SYNCTHREADS_BEFORE_MERGE", AttendMma, kNot, kWrong, false, true},
    {"NO_SYNCWARP_IN_MERGE", Merge, kNot, kNot, false, true},
    {"CODED_NO_SYNCTHREADS_BEFORE_READ", AttendCoded, kWrong, kWrong, false,
     true},
    {"CODED_NO_SYNCTHREADS_AFTER_READ", AttendCoded, kWrong, kWrong, false,
     true},
    {"CODED_TAIL", AttendCoded, kNot, kNot, true, false},
    {"CODED_BAD_PIECE", AttendBadPiece, kWrong, kWrong, false, false},
};

class InjectedTest : public testing::TestWithParam<Bug> {};
INSTANTIATE_TEST_SUITE_P(Bugs, InjectedTest, testing::ValuesIn(kBugs),
                         [](const auto& parameter) {
                           return parameter.param.name;
                         });

TEST_P(InjectedTest, NothingIsFoundWithoutIt) {
  for (const simt::Schedule& schedule : simt::SomeSchedules(2)) {
    EXPECT_EQ(GetParam().run(schedule, ""), Found::kNot);
  }
}

#if defined(LARDER_WITH_TSAN)
TEST_P(InjectedTest, ThreadSanitizerFindsIt) {
  const Bug& bug = GetParam();
  if (!bug.tsan) GTEST_SKIP() << "it is no race";
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(bug.run({}, std::string("@") + bug.name), "data race");
}
#elif defined(LARDER_WITH_ASAN)
TEST_P(InjectedTest, AddressSanitizerFindsIt) {
  const Bug& bug = GetParam();
  if (!bug.asan) GTEST_SKIP() << "it is within bounds";
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(bug.run({}, std::string("@") + bug.name), "AddressSanitizer");
}
#else
TEST_P(InjectedTest, SchedulesFindIt) {
  const Bug& bug = GetParam();
  if (bug.asan) GTEST_SKIP() << "it writes or reads out of bounds";
  const std::string suffix = std::string("@") + bug.name;
  EXPECT_EQ(bug.run({}, suffix), bug.fixed);
  Found found = Found::kNot;
  for (uint64_t seed = 0; seed < 10 && found == Found::kNot; ++seed) {
    found = bug.run({true, seed}, suffix);
  }
  EXPECT_EQ(found, bug.random);
}
#endif

}  // namespace
}  // namespace larder::kernels::cuda
