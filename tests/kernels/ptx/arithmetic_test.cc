// What single instructions compute, against numbers that were worked out apart.

#include "tests/kernels/ptx/arithmetic.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "gtest/gtest.h"
#include <absl/strings/str_cat.h>
#include <absl/strings/string_view.h>

#include "tests/kernels/ptx/module.h"

namespace larder::kernels::ptx {
namespace {

// The instruction `name` with as many sources as given.
uint64_t Value(absl::string_view name, Sources sources, int count) {
  const auto module = Parse(
      absl::StrCat(".visible .entry k() { .reg .b64 %x<9>; ", name, " %x1",
                   count > 0 ? ", %x2" : "", count > 1 ? ", %x3" : "",
                   count > 2 ? ", %x4" : "", count > 3 ? ", %x5" : "", "; }"));
  EXPECT_TRUE(module.ok()) << module.status();
  if (!module.ok()) return 0;
  return Compute(module->kernels[0].code[0], sources).value_or(0);
}
uint64_t Value(absl::string_view name, uint64_t a) {
  return Value(name, {a, 0, 0, 0}, 1);
}
uint64_t Value(absl::string_view name, uint64_t a, uint64_t b) {
  return Value(name, {a, b, 0, 0}, 2);
}
uint64_t Value(absl::string_view name, uint64_t a, uint64_t b, uint64_t c) {
  return Value(name, {a, b, c, 0}, 3);
}

uint32_t Bits(float value) {
  return std::bit_cast<uint32_t>(value);
}

TEST(PtxArithmeticTest, Integers) {
  EXPECT_EQ(Value("add.s32", 0xffffffff, 2), 1u);
  EXPECT_EQ(Value("add.sat.s32", 0x7fffffff, 2), 0x7fffffffu);
  EXPECT_EQ(Value("sub.u64", 1, 2), ~0ull);
  EXPECT_EQ(Value("mul.lo.u32", 0x10001, 0x10001), 0x20001u);
  EXPECT_EQ(Value("mul.hi.u32", 0xffffffff, 0xffffffff), 0xfffffffeu);
  EXPECT_EQ(Value("mul.hi.s32", 0xffffffff, 0xffffffff), 0u);
  EXPECT_EQ(Value("mul.hi.u64", ~0ull, ~0ull), ~0ull - 1);
  EXPECT_EQ(Value("mul.wide.s32", 0xffffffff, 2), ~0ull - 1);
  EXPECT_EQ(Value("mul.wide.u16", 0xffff, 0xffff), 0xfffe0001u);
  EXPECT_EQ(Value("mad.wide.u32", 0xffffffff, 0xffffffff, 1ull << 40),
            0xfffffffe00000001u + (1ull << 40));
  EXPECT_EQ(Value("mad.lo.s32", 3, 0xfffffffe, 10), 4u);
  EXPECT_EQ(Value("div.s32", 0xfffffff9, 2), 0xfffffffdu);
  EXPECT_EQ(Value("rem.s32", 0xfffffff9, 2), 0xffffffffu);
  EXPECT_EQ(Value("div.s32", 0x80000000, 0xffffffff), 0x80000000u);
  EXPECT_EQ(Value("div.u32", 7, 0), 0xffffffffu);
  EXPECT_EQ(Value("min.s32", 0xffffffff, 1), 0xffffffffu);
  EXPECT_EQ(Value("min.u32", 0xffffffff, 1), 1u);
  EXPECT_EQ(Value("abs.s32", 0xfffffffe), 2u);
  EXPECT_EQ(Value("neg.s16", 1), 0xffffu);
  EXPECT_EQ(Value("sad.s32", 0xffffffff, 5, 10), 16u);
}

TEST(PtxArithmeticTest, Bits) {
  EXPECT_EQ(Value("shl.b32", 1, 31), 0x80000000u);
  EXPECT_EQ(Value("shl.b32", 1, 32), 0u);
  EXPECT_EQ(Value("shr.s32", 0x80000000, 40), 0xffffffffu);
  EXPECT_EQ(Value("shr.u64", ~0ull, 63), 1u);
  EXPECT_EQ(Value("shf.l.wrap.b32", 0x80000000, 1, 1), 3u);
  EXPECT_EQ(Value("shf.r.wrap.b32", 0, 1, 33), 0x80000000u);
  EXPECT_EQ(Value("shf.r.clamp.b32", 0, 0xabcd, 40), 0xabcdu);
  EXPECT_EQ(Value("shf.l.clamp.b32", 0xabcd, 0, 32), 0xabcdu);
  EXPECT_EQ(Value("not.b16", 0), 0xffffu);
  EXPECT_EQ(Value("not.pred", 1), 0u);
  EXPECT_EQ(Value("popc.b64", ~0ull), 64u);
  EXPECT_EQ(Value("clz.b32", 1), 31u);
  EXPECT_EQ(Value("clz.b64", 0), 64u);
  EXPECT_EQ(Value("bfind.u32", 0x40), 6u);
  EXPECT_EQ(Value("bfind.s32", 0xffffffff), 0xffffffffu);
  EXPECT_EQ(Value("bfind.shiftamt.u32", 0x40), 25u);
  EXPECT_EQ(Value("brev.b32", 1), 0x80000000u);
  EXPECT_EQ(Value("bfe.u32", 0xabcd, 4, 8), 0xbcu);
  EXPECT_EQ(Value("bfe.s32", 0xabcd, 4, 8), 0xffffffbcu);
  EXPECT_EQ(Value("bfe.s32", 0x80000000, 28, 8), 0xfffffff8u);
  EXPECT_EQ(Value("bfe.u32", 0xabcd, 4, 0), 0u);
  EXPECT_EQ(Value("bfi.b32", {0xf, 0, 4, 8}, 4), 0xf0u);
  EXPECT_EQ(Value("bfi.b32", {0, 0xffff, 28, 8}, 4), 0xffffu);
  EXPECT_EQ(Value("prmt.b32", 0x33221100, 0x77665544, 0x7250), 0x77225500u);
  EXPECT_EQ(Value("prmt.b32", 0x80, 0, 0x0008), 0x808080ffu);
  // (a & b) | c and a ^ b ^ c.
  EXPECT_EQ(Value("lop3.b32", {0xcc, 0xaa, 0x01, 0xea}, 4), 0x89u);
  EXPECT_EQ(Value("lop3.b32", {0xcc, 0xaa, 0x01, 0x96}, 4), 0x67u);
  EXPECT_EQ(Value("dp4a.u32.u32", 0x01020304, 0x05060708, 1), 71u);
  EXPECT_EQ(Value("dp4a.s32.u32", 0x000000ff, 3, 1), 0xfffffffeu);
  EXPECT_EQ(Value("dp2a.hi.s32.s32", 0x0001ffff, 0x02030000, 0), 0xffffffffu);
  EXPECT_EQ(Value("selp.b32", 1, 2, 0), 2u);
}

TEST(PtxArithmeticTest, Floats) {
  EXPECT_EQ(Value("add.f32", Bits(1), Bits(0x1p-24f)), Bits(1));
  EXPECT_EQ(
      Value("fma.rn.f32", Bits(1 + 0x1p-23f), Bits(1 - 0x1p-23f), Bits(-1)),
      Bits(-0x1p-46f));
  EXPECT_EQ(Value("mul.f32", Bits(0x1p-100f), Bits(0x1p-30f)), Bits(0x1p-130f));
  EXPECT_EQ(Value("mul.ftz.f32", Bits(0x1p-100f), Bits(-0x1p-30f)),
            Bits(-0.0f));
  EXPECT_EQ(Value("add.ftz.f32", Bits(0x1p-130f), Bits(0)), Bits(0));
  EXPECT_EQ(Value("add.sat.f32", Bits(0.75f), Bits(0.75f)), Bits(1));
  EXPECT_EQ(Value("neg.f32", Bits(0)), Bits(-0.0f));
  EXPECT_EQ(Value("max.f32", Bits(1), 0x7fc00000), Bits(1));
  EXPECT_EQ(Value("ex2.approx.ftz.f32", Bits(-3)), Bits(0.125f));
  EXPECT_EQ(Value("ex2.approx.ftz.f32",
                  Bits(-std::numeric_limits<float>::infinity())),
            0u);
  EXPECT_EQ(Value("rcp.rn.f32", Bits(3)), Bits(1 / 3.0f));
  EXPECT_EQ(Value("sqrt.rn.f32", Bits(2)), Bits(std::sqrt(2.0f)));
  EXPECT_EQ(Value("add.f64", std::bit_cast<uint64_t>(0.5),
                  std::bit_cast<uint64_t>(0.25)),
            std::bit_cast<uint64_t>(0.75));
  // 1 + 2^-11 is a tie of halves, and goes to even.
  EXPECT_EQ(Value("add.f16", 0x3c00, 0x1000), 0x3c00u);
  EXPECT_EQ(Value("add.f16", 0x3c01, 0x1000), 0x3c02u);
  EXPECT_EQ(Value("fma.rn.f16x2", 0x40003c00, 0x42003c00, 0x3c000000),
            0x47003c00u);
  EXPECT_EQ(Value("mul.bf16x2", 0x40003f80, 0x40403f80), 0x40c03f80u);
}

TEST(PtxArithmeticTest, Conversions) {
  EXPECT_EQ(Value("cvt.rn.f16.f32", Bits(65519.99f)), 0x7bffu);
  EXPECT_EQ(Value("cvt.rn.f16.f32", Bits(65520)), 0x7c00u);
  EXPECT_EQ(Value("cvt.rn.f16.f32", Bits(0x1p-25f)), 0u);
  EXPECT_EQ(Value("cvt.rn.f16.f32", Bits(0x1.8p-25f)), 1u);
  EXPECT_EQ(Value("cvt.rn.f16.f32", Bits(-0x1p-14f)), 0x8400u);
  EXPECT_EQ(Value("cvt.f32.f16", 0x0001), Bits(0x1p-24f));
  EXPECT_EQ(Value("cvt.f32.f16", 0xfc00),
            Bits(-std::numeric_limits<float>::infinity()));
  EXPECT_EQ(Value("cvt.rn.f16x2.f32", Bits(2), Bits(1)), 0x40003c00u);
  EXPECT_EQ(Value("cvt.rn.bf16x2.f32", Bits(2), Bits(1)), 0x40003f80u);
  EXPECT_EQ(Value("cvt.rn.relu.f16x2.f32", Bits(-2), Bits(1)), 0x00003c00u);
  EXPECT_EQ(Value("cvt.rn.bf16.f32", 0x3f808000), 0x3f80u);
  EXPECT_EQ(Value("cvt.rn.bf16.f32", 0x3f818000), 0x3f82u);
  EXPECT_EQ(Value("cvt.rn.satfinite.e4m3x2.f32", Bits(1000), Bits(-1.5f)),
            0x7ebcu);
  EXPECT_EQ(Value("cvt.rn.f16x2.e4m3x2", 0x7ebc), 0x5f00be00u);
  EXPECT_EQ(Value("cvt.rni.s32.f32", Bits(2.5f)), 2u);
  EXPECT_EQ(Value("cvt.rzi.s32.f32", Bits(-2.5f)), 0xfffffffeu);
  EXPECT_EQ(Value("cvt.rzi.u32.f32", Bits(-2.5f)), 0u);
  EXPECT_EQ(Value("cvt.rzi.s32.f32", Bits(1e20f)), 0x7fffffffu);
  EXPECT_EQ(Value("cvt.rzi.s32.f32", 0x7fc00000), 0u);
  EXPECT_EQ(Value("cvt.rmi.f32.f32", Bits(-0.5f)), Bits(-1));
  EXPECT_EQ(Value("cvt.rn.f32.s32", 0xffffffff), Bits(-1));
  EXPECT_EQ(Value("cvt.rn.f32.u32", 0xffffffff), Bits(0x1p32f));
  EXPECT_EQ(Value("cvt.rn.f32.s8", 0x80), Bits(-128));
  EXPECT_EQ(Value("cvt.s32.s8", 0x80), 0xffffff80u);
  EXPECT_EQ(Value("cvt.u64.u32", ~0ull), 0xffffffffu);
  EXPECT_EQ(Value("cvt.sat.u8.s32", 0xffffffff), 0u);
  EXPECT_EQ(Value("cvt.sat.s8.s32", 1000), 127u);
  EXPECT_EQ(Value("cvt.pack.sat.s8.s32.b32", 300, 0xffffff00, 0xabcd),
            0xabcd7f80u);
}

// Every half to a float and back, through both directions of every format.
TEST(PtxArithmeticTest, EveryNumberOf16BitsSurvives) {
  for (const auto& [up, down, infinity] :
       {std::tuple("cvt.f32.f16", "cvt.rn.f16.f32", 0x7c00u),
        std::tuple("cvt.f32.bf16", "cvt.rn.bf16.f32", 0x7f80u)}) {
    const auto module =
        Parse(absl::StrCat(".visible .entry k() { .reg .b64 %x<3>; ", up,
                           " %x1, %x2; ", down, " %x1, %x2; }"));
    ASSERT_TRUE(module.ok()) << module.status();
    const auto& code = module->kernels[0].code;
    for (uint32_t half = 0; half < 0x10000; ++half) {
      const uint64_t wide = *Compute(code[0], {half, 0, 0, 0});
      const uint64_t back = *Compute(code[1], {wide, 0, 0, 0});
      ASSERT_EQ(back, (half & 0x7fff) > infinity ? 0x7fffu : half) << up;
    }
  }
}

TEST(PtxArithmeticTest, Comparisons) {
  const auto compare = [](absl::string_view name, uint64_t a, uint64_t b) {
    const auto module =
        Parse(absl::StrCat(".visible .entry k() { .reg .b64 %x<4>; setp.", name,
                           " %x1, %x2, %x3; }"));
    EXPECT_TRUE(module.ok()) << module.status();
    return Compare(module->kernels[0].code[0], a, b).value();
  };
  const uint64_t nan = 0x7fc00000;
  EXPECT_TRUE(compare("lt.s32", 0xffffffff, 0));
  EXPECT_FALSE(compare("lt.u32", 0xffffffff, 0));
  EXPECT_FALSE(compare("lo.u32", 0xffffffff, 0));
  EXPECT_TRUE(compare("hs.u32", 5, 5));
  EXPECT_FALSE(compare("lt.f32", nan, 0));
  EXPECT_TRUE(compare("ltu.f32", nan, 0));
  EXPECT_TRUE(compare("ltu.ftz.f32", nan, 0));
  EXPECT_FALSE(compare("ne.f32", nan, 0));
  EXPECT_TRUE(compare("neu.f32", nan, nan));
  EXPECT_TRUE(compare("nan.f32", 0, nan));
  EXPECT_FALSE(compare("num.f32", 0, nan));
  EXPECT_TRUE(compare("eq.f16", 0x8000, 0));
  EXPECT_TRUE(compare("gt.f32", 1, 0));
  EXPECT_FALSE(compare("gt.ftz.f32", 1, 0));
}

}  // namespace
}  // namespace larder::kernels::ptx
