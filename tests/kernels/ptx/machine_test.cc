// What the machine finds, and what it counts: every check is shown a program
// that it must refuse, and one beside it that it must not.

#include "tests/kernels/ptx/machine.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include <absl/status/statusor.h>
#include <absl/strings/str_cat.h>

#include "tests/kernels/ptx/program.h"

namespace larder::kernels::ptx {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

struct Params {
  const void* in;
  void* out;
};

class PtxMachineTest : public testing::Test {
 protected:
  PtxMachineTest() {
    for (size_t n = 0; n < kWords; ++n) in_[n] = static_cast<uint32_t>(n * 3);
  }

  absl::StatusOr<Report> Run(const std::string& body, uint32_t threads = 64,
                             uint32_t blocks = 1, uint64_t seed = 1) {
    const auto module =
        Parse(Program(body,
                      ".extern .shared .align 16 .b8 dynamic[];\n"
                      ".const .align 4 .u32 constants[2] = {11, 12};\n"));
    if (!module.ok()) return module.status();
    Machine machine;
    machine.MapReadOnly(in_, sizeof in_, "in");
    machine.Map(out_, sizeof out_, "out");
    const Params params = {in_, out_};
    auto report = machine.Launch(*module, module->kernels[0],
                                 {{blocks, 1, 1}, {threads, 1, 1}, 1024},
                                 &params, sizeof params, {seed, true, 100000});
    // Counts name instructions of a module that ends here.
    if (report.ok()) counts_ = report->counts;
    for (Count& count : counts_) count.instruction = nullptr;
    return report;
  }
  std::string Fault(const std::string& body, uint32_t threads = 64) {
    const auto report = Run(body, threads);
    return report.ok() ? "none" : std::string(report.status().message());
  }
  std::vector<std::string> Races(const std::string& body, uint32_t threads = 64,
                                 uint32_t blocks = 1) {
    const auto report = Run(body, threads, blocks);
    EXPECT_TRUE(report.ok()) << report.status();
    return report.ok() ? report->races : std::vector<std::string>{"failed"};
  }
  // Of the body's n-th instruction.
  const Count& CountOf(size_t n) const { return counts_[3 + n]; }

  static constexpr size_t kWords = 512;
  alignas(256) uint32_t in_[kWords];
  alignas(256) uint32_t gap_[64] = {};  // nobody's
  alignas(256) uint32_t out_[kWords] = {};
  std::vector<Count> counts_;
};

// %d2: this thread's word of out; %d3: of in; %r1: four times the thread.
constexpr char kOwn[] = R"(
  shl.b32 %r1, %r0, 2;
  cvt.u64.u32 %d4, %r1;
  add.u64 %d2, %d1, %d4;
  add.u64 %d3, %d0, %d4;
)";

TEST_F(PtxMachineTest, Computes) {
  ASSERT_EQ(Fault(absl::StrCat(kOwn, R"(
  ld.global.u32 %r2, [%d3];
  add.u32 %r2, %r2, 1;
  st.global.u32 [%d2], %r2;
)")),
            "none");
  for (uint32_t n = 0; n < 64; ++n) EXPECT_EQ(out_[n], n * 3 + 1);
  EXPECT_EQ(out_[64], 0u);
}

TEST_F(PtxMachineTest, DivergesAndReconverges) {
  const auto report = Run(absl::StrCat(kOwn, R"(
  setp.lt.u32 %p1, %r0, 10;
  mov.u32 %r2, 5;
  @%p1 bra $small;
  mov.u32 %r2, 6;
  $loop:
  add.u32 %r2, %r2, 1;
  setp.lt.u32 %p2, %r2, %r0;
  @%p2 bra $loop;
  $small:
  vote.sync.ballot.b32 %r3, %p1, -1;
  add.u32 %r2, %r2, %r3;
  st.global.u32 [%d2], %r2;
)"),
                          32);
  ASSERT_TRUE(report.ok()) << report.status();
  for (uint32_t n = 0; n < 32; ++n) {
    EXPECT_EQ(out_[n], (n < 10 ? 5 : std::max(n, 7u)) + 1023) << n;
  }
}

TEST_F(PtxMachineTest, BranchesByTable) {
  ASSERT_EQ(Fault(absl::StrCat(kOwn, R"(
  and.b32 %r2, %r0, 1;
  $table: .branchtargets $even, $odd;
  brx.idx %r2, $table;
  $even:
  mov.u32 %r3, 100;
  bra $end;
  $odd:
  mov.u32 %r3, 200;
  $end:
  st.global.u32 [%d2], %r3;
)")),
            "none");
  EXPECT_THAT(std::vector<uint32_t>(out_, out_ + 3),
              ElementsAre(100, 200, 100));
  EXPECT_THAT(Fault(R"(
  $table: .branchtargets $end;
  brx.idx %r0, $table;
  $end:
)"),
              HasSubstr("past its table"));
}

TEST_F(PtxMachineTest, SpacesAndVariables) {
  ASSERT_EQ(Fault(absl::StrCat(R"(
  .local .align 8 .b8 depot[8];
  .shared .align 4 .b8 tile[256];
)",
                               kOwn, R"(
  mov.u64 %d5, depot;
  cvta.local.u64 %d6, %d5;
  st.u32 [%d6+4], %r0;
  ld.local.u32 %r2, [depot+4];
  mov.u64 %d7, constants;
  ld.const.u32 %r3, [%d7+4];
  add.u32 %r2, %r2, %r3;
  mov.u32 %r4, tile;
  add.u32 %r4, %r4, %r1;
  st.shared.u32 [%r4], %r2;
  mov.u64 %d8, tile;
  cvta.shared.u64 %d8, %d8;
  add.u64 %d8, %d8, %d4;
  ld.u32 %r5, [%d8];
  mov.u32 %r6, dynamic;
  add.u32 %r6, %r6, %r1;
  st.shared.u32 [%r6], %r5;
  ld.shared.u32 %r7, [%r6];
  st.global.u32 [%d2], %r7;
)")),
            "none");
  for (uint32_t n = 0; n < 64; ++n) EXPECT_EQ(out_[n], n + 12);
}

TEST_F(PtxMachineTest, Atomics) {
  const std::string body = R"(
  atom.global.add.u32 %r2, [%d1], 2;
  red.global.max.u32 [%d1+4], %r0;
  atom.global.cas.b32 %r3, [%d1+8], 0, 7;
)";
  EXPECT_THAT(Races(body, 64, 3), IsEmpty());
  EXPECT_THAT(std::vector<uint32_t>(out_, out_ + 3), ElementsAre(384, 63, 7));
  EXPECT_THAT(
      Races("st.global.u32 [%d1], %r0; red.global.add.u32 [%d1], 1;", 2),
      SizeIs(2));
}

TEST_F(PtxMachineTest, Collectives) {
  ASSERT_EQ(Fault(absl::StrCat(kOwn, R"(
  shfl.sync.bfly.b32 %r2|%p1, %r0, 3, 31, -1;
  shfl.sync.up.b32 %r3, %r0, 1, 0, -1;
  shfl.sync.idx.b32 %r4, %r0, 2, 6175, -1;
  redux.sync.add.u32 %r5, %r0, -1;
  shr.u32 %r6, %r0, 3;
  match.any.sync.b32 %r7, %r6, -1;
  match.all.sync.b32 %r8|%p2, %r6, -1;
  activemask.b32 %r9;
  st.global.u32 [%d2], %r2;
  st.global.u32 [%d2+128], %r3;
  st.global.u32 [%d2+256], %r4;
  st.global.u32 [%d2+384], %r5;
  st.global.u32 [%d2+512], %r7;
  st.global.u32 [%d2+640], %r8;
  st.global.u32 [%d2+768], %r9;
)"),
                  32),
            "none");
  for (uint32_t n = 0; n < 32; ++n) {
    EXPECT_EQ(out_[n], n ^ 3);
    EXPECT_EQ(out_[32 + n], n == 0 ? 0 : n - 1);
    // Segments of 8.
    EXPECT_EQ(out_[64 + n], (n & ~7u) + 2);
    EXPECT_EQ(out_[96 + n], 496u);
    EXPECT_EQ(out_[128 + n], 0xffu << (n & ~7u));
    EXPECT_EQ(out_[160 + n], 0u);
    EXPECT_EQ(out_[192 + n], 0xffffffffu);
  }
}

// One element of A and one of B, by hand from the figures of the PTX ISA: which
// element of C they meet in.
TEST_F(PtxMachineTest, FragmentsOfMatrices) {
  const auto body = [](absl::string_view type) {
    return absl::StrCat(R"(
  mul.wide.u32 %d2, %r0, 16;
  add.u64 %d3, %d0, %d2;
  ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%d3];
  mul.wide.u32 %d4, %r0, 8;
  add.u64 %d5, %d0, %d4;
  ld.global.v2.u32 {%r6, %r7}, [%d5+512];
  mov.f32 %f0, 0f3F000000;
  mma.sync.aligned.m16n8k16.row.col.f32.)",
                        type, ".", type, R"(.f32 {%f1, %f2, %f3, %f4},
    {%r2, %r3, %r4, %r5}, {%r6, %r7}, {%f0, %f0, %f0, %f0};
  add.u64 %d6, %d1, %d2;
  st.global.v4.f32 [%d6], {%f1, %f2, %f3, %f4};
)");
  };
  struct {
    uint32_t a_lane, a_register, a_half;
    uint32_t b_lane, b_register, b_half;
    uint32_t c_lane, c_register;
  } const kCases[] = {
      {0, 0, 0, 4, 0, 0, 0, 1},     // A[0][0] * B[0][1]
      {31, 1, 1, 3, 0, 1, 28, 2},   // A[15][7] * B[7][0]
      {5, 2, 0, 25, 1, 0, 7, 0},    // A[1][10] * B[10][6]
      {14, 3, 1, 30, 1, 1, 15, 3},  // A[11][13] * B[13][7]
  };
  for (const absl::string_view type : {"f16", "bf16"}) {
    const uint32_t three = type == "f16" ? 0x4200 : 0x4040;
    for (const auto& c : kCases) {
      std::fill_n(in_, kWords, 0);
      in_[c.a_lane * 4 + c.a_register] = 0x4000u << c.a_half * 16;  // 2
      in_[128 + c.b_lane * 2 + c.b_register] = three << c.b_half * 16;
      ASSERT_EQ(Fault(body(type), 32), "none");
      for (uint32_t i = 0; i < 128; ++i) {
        const bool met = i == c.c_lane * 4 + c.c_register;
        ASSERT_EQ(out_[i], met ? 0x40d00000 : 0x3f000000) << i;  // 6.5, 0.5
      }
    }
  }
  EXPECT_THAT(Fault(body("f16"), 48), HasSubstr("a warp that is not whole"));
  EXPECT_THAT(Fault(body("f32"), 32), HasSubstr("not modelled"));
}

TEST_F(PtxMachineTest, Bounds) {
  EXPECT_THAT(Fault("ld.global.u32 %r1, [%d0+2048];"),
              HasSubstr("4 bytes out of bounds, at in + 2048 of 2048"));
  EXPECT_THAT(Fault("ld.global.u32 %r1, [%d1+-4];"),
              HasSubstr("out of bounds"));
  EXPECT_THAT(Fault("mov.u64 %d2, 8; ld.global.u32 %r1, [%d2];"),
              HasSubstr("out of bounds"));
  EXPECT_THAT(Fault("mov.u64 %d2, -4; ld.global.u32 %r1, [%d2];"),
              HasSubstr("out of bounds"));
  EXPECT_THAT(Fault("st.global.u32 [%d0], %r1;"), HasSubstr("which is input"));
  EXPECT_THAT(Fault("ld.shared.u32 %r1, [1024];"),
              HasSubstr("of shared memory, at 1024 of 1024"));
  EXPECT_THAT(Fault("ld.local.u32 %r1, [0];"), HasSubstr("of local memory"));
  EXPECT_THAT(Fault("ld.param.u32 %r1, [in+16];"), HasSubstr("of parameters"));
  EXPECT_THAT(Fault("mov.u64 %d2, constants; st.global.u32 [%d2], 1;"),
              HasSubstr("which is input"));
  // Names the line (the body is in 18 and below), block and thread.
  EXPECT_THAT(Fault("setp.ne.u32 %p1, %r0, 33;\n@%p1 ret;\n"
                    "ld.global.u32 %r1, [%d0+8192];"),
              HasSubstr("k, PTX line 20, block (0,0,0) thread 33: "));
}

TEST_F(PtxMachineTest, Alignment) {
  EXPECT_THAT(Fault("ld.global.u32 %r1, [%d0+2];"),
              HasSubstr("misaligned access of 4 bytes"));
  EXPECT_THAT(Fault("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d0+8];"),
              HasSubstr("misaligned access of 16 bytes"));
  EXPECT_EQ(Fault("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d0+16];"), "none");
}

TEST_F(PtxMachineTest, MemoryBeginsPoisoned) {
  ASSERT_EQ(Fault(absl::StrCat(kOwn, R"(
  ld.shared.u32 %r2, [%r1];
  st.global.u32 [%d2], %r2;
  st.global.u32 [%d2+256], %r20;
)")),
            "none");
  EXPECT_EQ(out_[5], 0xcbcbcbcbu);
  EXPECT_EQ(out_[64 + 5], 0xcbcbcbcbu);
}

// Thread n writes its word of shared memory, and reads that of n ^ `other`.
std::string Exchange(const std::string& between, int other) {
  return absl::StrCat(kOwn, "st.shared.u32 [%r1], %r0;\n", between,
                      "\nxor.b32 %r2, %r1, ", other * 4,
                      ";\nld.shared.u32 %r3, [%r2];\n"
                      "st.global.u32 [%d2], %r3;\n");
}

TEST_F(PtxMachineTest, SharedRaces) {
  // Within a warp: a barrier of the warp is enough, a vote is not.
  EXPECT_THAT(Races(Exchange("", 1), 32), SizeIs(1));
  EXPECT_THAT(Races(Exchange("vote.sync.ballot.b32 %r9, %p1, -1;", 1), 32),
              SizeIs(1));
  EXPECT_THAT(Races(Exchange("bar.warp.sync -1;", 1), 32), IsEmpty());
  EXPECT_THAT(Races(Exchange("bar.sync 0;", 1), 32), IsEmpty());
  EXPECT_EQ(out_[4], 5u);
  // Between warps it is not.
  EXPECT_THAT(Races(Exchange("bar.warp.sync -1;", 32)), SizeIs(1));
  EXPECT_THAT(Races(Exchange("bar.sync 0;", 32)), IsEmpty());
  // Nobody races with itself.
  EXPECT_THAT(Races(Exchange("", 0)), IsEmpty());
  EXPECT_THAT(Races(Exchange("", 1), 32)[0],
              AllOf(HasSubstr("k: shared memory, block 0 thread "),
                    HasSubstr("what another thread writes")));
}

TEST_F(PtxMachineTest, WritesAfterReadsRace) {
  // Each reads its neighbour's word, and overwrites its own.
  const std::string body =
      absl::StrCat(kOwn, "xor.b32 %r2, %r1, 128;\nld.shared.u32 %r3, [%r2];\n");
  EXPECT_THAT(Races(absl::StrCat(body, "st.shared.u32 [%r1], %r3;")),
              SizeIs(1));
  EXPECT_THAT(
      Races(absl::StrCat(body, "bar.sync 0;\nst.shared.u32 [%r1], %r3;")),
      IsEmpty());
  // All threads read one word; a barrier of one warp orders no other.
  const std::string one =
      "ld.shared.u32 %r1, [0];\nbar.warp.sync -1;\n"
      "setp.ne.u32 %p1, %r0, 0;\n@%p1 ret;\n"
      "st.shared.u32 [0], %r0;";
  EXPECT_THAT(Races(one, 32), IsEmpty());
  EXPECT_THAT(Races(one, 64), SizeIs(1));
}

TEST_F(PtxMachineTest, GlobalRaces) {
  EXPECT_THAT(Races("st.global.u32 [%d1], %r0;"), SizeIs(1));
  EXPECT_THAT(Races(absl::StrCat(kOwn, "st.global.u32 [%d2], %r0;")),
              IsEmpty());
  // Two blocks write the same words.
  EXPECT_THAT(Races(absl::StrCat(kOwn, "st.global.u32 [%d2], %r0;"), 64, 2),
              ElementsAre(HasSubstr("global memory")));
  // Parts of a word are different memory.
  EXPECT_THAT(Races(R"(
  cvt.u64.u32 %d4, %r0;
  add.u64 %d2, %d1, %d4;
  st.global.u8 [%d2], %r0;
)"),
              IsEmpty());
}

TEST_F(PtxMachineTest, BarriersThatThreadsMiss) {
  EXPECT_THAT(Fault("setp.lt.u32 %p1, %r0, 32;\n@%p1 ret;\nbar.sync 0;"),
              HasSubstr("32 threads have left without"));
  EXPECT_THAT(Fault("setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $a;\nbar.sync 0;\n"
                    "bra $b;\n$a: bar.sync 0;\n$b:"),
              HasSubstr("waits at another barrier"));
  EXPECT_THAT(Fault("setp.lt.u32 %p1, %r0, 1;\n@%p1 bar.warp.sync -1;\n"
                    "@!%p1 bar.sync 0;"),
              HasSubstr("deadlock"));
}

TEST_F(PtxMachineTest, CollectivesThatThreadsMiss) {
  EXPECT_THAT(Fault("setp.eq.u32 %p1, %r0, 3;\n@%p1 ret;\n"
                    "vote.sync.ballot.b32 %r1, %p1, -1;"),
              HasSubstr("threads that have ended: 0x8"));
  EXPECT_THAT(Fault("vote.sync.ballot.b32 %r1, %p1, 1;"),
              HasSubstr("does not name itself"));
  EXPECT_THAT(Fault("setp.lt.u32 %p1, %r0, 16;\nselp.u32 %r2, -1, 65535, %p1;\n"
                    "@%p1 bra $a;\nmov.u32 %r2, -65536;\n"
                    "$a: vote.sync.any.pred %p2, %p1, %r2;",
                    32),
              HasSubstr("masks differ"));
  // Two halves of a warp, each by itself.
  EXPECT_EQ(Fault("setp.lt.u32 %p1, %r0, 16;\n"
                  "selp.u32 %r2, 65535, -65536, %p1;\n"
                  "vote.sync.any.pred %p2, %p1, %r2;",
                  32),
            "none");
  EXPECT_THAT(Fault("setp.lt.u32 %p1, %r0, 16;\n@!%p1 bra $a;\n"
                    "shfl.sync.idx.b32 %r1, %r0, 20, 31, 65535;\n$a:",
                    32),
              HasSubstr("does not name"));
}

constexpr char kCopy[] = R"(
  shl.b32 %r2, %r0, 4;
  cvt.u64.u32 %d5, %r2;
  add.u64 %d5, %d0, %d5;
  cp.async.cg.shared.global [%r2], [%d5], 16;
  cp.async.commit_group;
)";

TEST_F(PtxMachineTest, CopiesArriveWhenTheyAreWaitedFor) {
  const std::string read =
      "ld.shared.u32 %r3, [%r2];\nst.global.u32 [%d2], %r3;";
  EXPECT_EQ(Fault(absl::StrCat(kOwn, kCopy, "cp.async.wait_group 0;\n", read)),
            "none");
  EXPECT_EQ(out_[7], 7u * 4 * 3);
  EXPECT_EQ(Fault(absl::StrCat(kOwn, kCopy, "cp.async.wait_all;\n", read)),
            "none");
  EXPECT_THAT(
      Fault(absl::StrCat(kOwn, kCopy, "cp.async.wait_group 1;\n", read)),
      HasSubstr("that a cp.async still writes"));
  EXPECT_THAT(Fault(absl::StrCat(kOwn, kCopy)), HasSubstr("never waited for"));
  // Of two groups, the earlier one.
  const std::string second = R"(
  cp.async.ca.shared.global [%r2+1024], [%d5], 4, 0;
  cp.async.commit_group;
  cp.async.wait_group 1;
)";
  const std::string both =
      absl::StrCat(".shared .align 16 .b8 tile[1024];\n", kOwn, kCopy, second);
  EXPECT_EQ(Fault(absl::StrCat(both, read, "\ncp.async.wait_all;")), "none");
  // What is not given of a copy is zeros.
  EXPECT_EQ(Fault(absl::StrCat(both, "cp.async.wait_all;\n",
                               "ld.shared.u32 %r3, [%r2+1024];\n"
                               "st.global.u32 [%d2], %r3;")),
            "none");
  EXPECT_EQ(out_[7], 0u);
  // Two copies to one place.
  EXPECT_THAT(Fault(absl::StrCat(
                  kOwn, kCopy, "cp.async.cg.shared.global [%r2], [%d5], 16;")),
              HasSubstr("that a cp.async still writes"));
  // Others see it after a barrier, and not before.
  const std::string other =
      "cp.async.wait_all;\n$mid\nxor.b32 %r4, %r2, 16;\n"
      "ld.shared.u32 %r3, [%r4];";
  const auto with = [&](const std::string& middle) {
    std::string text = absl::StrCat(kOwn, kCopy, other);
    return text.replace(text.find("$mid"), 4, middle);
  };
  EXPECT_THAT(Races(with("")), SizeIs(1));
  EXPECT_THAT(Races(with("bar.sync 0;")), IsEmpty());
}

TEST_F(PtxMachineTest, CountsSectors) {
  const std::string stride = R"(
  mul.lo.u32 %r2, %r0, STRIDE;
  cvt.u64.u32 %d4, %r2;
  add.u64 %d2, %d0, %d4;
)";
  const auto with = [&stride](int bytes) {
    std::string text = stride;
    return text.replace(text.find("STRIDE"), 6, std::to_string(bytes));
  };
  const auto sectors = [&](const std::string& body) {
    EXPECT_EQ(Fault(body, 32), "none");
    const Count& count = CountOf(3);
    return std::array<uint64_t, 3>{count.requests, count.sectors,
                                   count.ideal_sectors};
  };
  EXPECT_THAT(sectors(with(4) + "ld.global.u32 %r3, [%d2];"),
              ElementsAre(1, 4, 4));
  EXPECT_THAT(sectors(with(32) + "ld.global.u32 %r3, [%d2];"),
              ElementsAre(1, 32, 4));
  EXPECT_THAT(sectors(with(0) + "ld.global.u32 %r3, [%d2];"),
              ElementsAre(1, 1, 1));
  EXPECT_THAT(
      sectors(with(16) + "ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%d2];"),
      ElementsAre(1, 16, 16));
  EXPECT_THAT(
      sectors(with(32) + "ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%d2];"),
      ElementsAre(1, 32, 16));
  // Neighbours, but not from the beginning of a sector.
  EXPECT_THAT(sectors(with(4) + "ld.global.u32 %r3, [%d2+16];"),
              ElementsAre(1, 5, 4));
}

TEST_F(PtxMachineTest, CountsWavefronts) {
  const auto wavefronts = [&](int stride, const std::string& load) {
    EXPECT_EQ(
        Fault(absl::StrCat("mul.lo.u32 %r2, %r0, ", stride, ";\n", load), 32),
        "none");
    const Count& count = CountOf(1);
    return std::array<uint64_t, 2>{count.wavefronts, count.ideal_wavefronts};
  };
  EXPECT_THAT(wavefronts(4, "ld.shared.u32 %r3, [%r2];"), ElementsAre(1, 1));
  EXPECT_THAT(wavefronts(0, "ld.shared.u32 %r3, [%r2];"), ElementsAre(1, 1));
  EXPECT_THAT(wavefronts(1, "ld.shared.u8 %r3, [%r2];"), ElementsAre(1, 1));
  EXPECT_THAT(wavefronts(8, "ld.shared.u32 %r3, [%r2];"), ElementsAre(2, 1));
  EXPECT_THAT(wavefronts(32, "ld.shared.u32 %r3, [%r2];"), ElementsAre(8, 1));
  EXPECT_THAT(wavefronts(16, "ld.shared.v4.u32 {%r3,%r4,%r5,%r6}, [%r2];"),
              ElementsAre(4, 4));
  EXPECT_THAT(wavefronts(32, "ld.shared.v4.u32 {%r3,%r4,%r5,%r6}, [%r2];"),
              ElementsAre(8, 4));
}

TEST_F(PtxMachineTest, CountsInstructions) {
  const auto report =
      Run("setp.lt.u32 %p1, %r0, 10;\n@%p1 mov.u32 %r1, 1;", 32);
  ASSERT_TRUE(report.ok()) << report.status();
  // Three before, one after.
  EXPECT_EQ(report->warp_instructions, 6u);
  EXPECT_EQ(report->thread_instructions, 5u * 32 + 10);
  EXPECT_EQ(CountOf(1).executed, 1u);
}

TEST_F(PtxMachineTest, EndlessLoopsEnd) {
  EXPECT_THAT(Fault("$loop: bra $loop;"), HasSubstr("an endless loop?"));
  EXPECT_THAT(Fault("trap;"), HasSubstr("trap"));
}

TEST_F(PtxMachineTest, WrongLaunches) {
  const auto module = Parse(Program(""));
  ASSERT_TRUE(module.ok()) << module.status();
  const Machine machine;
  const Params params = {in_, out_};
  const auto launch = [&](const LaunchShape& shape, size_t bytes) {
    return machine.Launch(*module, module->kernels[0], shape, &params, bytes)
        .ok();
  };
  EXPECT_TRUE(launch({{1, 1, 1}, {64, 1, 1}}, sizeof params));
  EXPECT_FALSE(launch({{1, 1, 1}, {65, 1, 1}}, sizeof params));
  EXPECT_FALSE(launch({{1, 1, 1}, {0, 1, 1}}, sizeof params));
  EXPECT_FALSE(launch({{0, 1, 1}, {64, 1, 1}}, sizeof params));
  EXPECT_FALSE(launch({{1u << 31, 1u << 31, 4}, {64, 1, 1}}, sizeof params));
  EXPECT_FALSE(launch({{1, 1, 1}, {64, 1, 1}}, 8));
  EXPECT_FALSE(launch({{1, 1, 1}, {64, 1, 1}, 1u << 30}, sizeof params));
}

TEST_F(PtxMachineTest, SeedsAreOtherOrders) {
  // The last block to come writes.
  const std::string body = "mov.u32 %r2, %ctaid.x;\nst.global.u32 [%d1], %r2;";
  std::vector<uint32_t> last;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    ASSERT_TRUE(Run(body, 1, 8, seed).ok());
    last.push_back(out_[0]);
  }
  EXPECT_THAT(last, testing::Contains(testing::Ne(last[0])));
  ASSERT_TRUE(Run(body, 1, 8, 0).ok());
  EXPECT_EQ(out_[0], last[0]);
}

}  // namespace
}  // namespace larder::kernels::ptx
