#include "tests/kernels/ptx/arithmetic.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

namespace larder::kernels::ptx {
namespace {

// A binary floating-point format that is at most as wide as a double.
struct Format {
  int exponent_bits;
  int mantissa_bits;
  bool finite;  // e4m3: no infinity, and NaN is all ones
};

constexpr Format kHalf = {5, 10, false};
constexpr Format kBrain = {8, 7, false};
constexpr Format kSmall4 = {4, 3, true};
constexpr Format kSmall5 = {5, 2, false};

double Decode(uint64_t bits, Format format) {
  const int exponent_max = (1 << format.exponent_bits) - 1;
  const int bias = exponent_max >> 1;
  const uint64_t mantissa = Mask(bits, format.mantissa_bits);
  const int exponent =
      static_cast<int>(bits >> format.mantissa_bits) & exponent_max;
  const bool negative =
      bits >> (format.exponent_bits + format.mantissa_bits) & 1;
  double value;
  if (exponent == exponent_max &&
      (!format.finite || mantissa == Mask(~0ull, format.mantissa_bits))) {
    value = mantissa == 0 ? std::numeric_limits<double>::infinity()
                          : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<double>(mantissa),
                       1 - bias - format.mantissa_bits);
  } else {
    value =
        std::ldexp(static_cast<double>(mantissa | 1ull << format.mantissa_bits),
                   exponent - bias - format.mantissa_bits);
  }
  return negative ? -value : value;
}

// To nearest, ties to even. `saturate`: too large is the largest number, else
// infinity (or NaN, where there is none).
uint64_t Encode(double value, Format format, bool saturate) {
  const int exponent_max = (1 << format.exponent_bits) - 1;
  const int bias = exponent_max >> 1;
  const uint64_t sign =
      std::signbit(value)
          ? 1ull << (format.exponent_bits + format.mantissa_bits)
          : 0;
  const uint64_t all = Mask(~0ull, format.exponent_bits + format.mantissa_bits);
  // The canonical NaN of PTX has no sign and every bit.
  if (std::isnan(value)) return all;
  const uint64_t infinity = static_cast<uint64_t>(exponent_max)
                            << format.mantissa_bits;
  const uint64_t largest = format.finite ? all - 1 : infinity - 1;
  const uint64_t overflow = saturate ? largest : format.finite ? all : infinity;
  const double magnitude = std::fabs(value);
  if (std::isinf(magnitude)) return sign | overflow;
  if (magnitude == 0) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);  // in [2^(exponent-1), 2^exponent)
  const int ulp = std::max(exponent - 1, 1 - bias) - format.mantissa_bits;
  const auto steps =
      static_cast<uint64_t>(std::nearbyint(std::ldexp(magnitude, -ulp)));
  // Steps past the hidden bit carry into the exponent by themselves.
  const uint64_t result =
      ulp + format.mantissa_bits == 1 - bias
          ? steps
          : (static_cast<uint64_t>(ulp + format.mantissa_bits + bias - 1)
             << format.mantissa_bits) +
                steps;
  return sign | (result > largest ? overflow : result);
}

Format FormatOf(Type type) {
  switch (type.kind) {
    case Kind::kBfloat:
      return kBrain;
    case Kind::kE4m3:
      return kSmall4;
    case Kind::kE5m2:
      return kSmall5;
    default:
      return kHalf;
  }
}

bool IsFloat(Type type) {
  return type.kind == Kind::kFloat || type.kind == Kind::kBfloat ||
         type.kind == Kind::kE4m3 || type.kind == Kind::kE5m2;
}

float Flushed(float value, bool flush) {
  return flush && std::fpclassify(value) == FP_SUBNORMAL
             ? std::copysign(0.0f, value)
             : value;
}

float ToFloat(uint64_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits));
}

// One number of a register, of f16, bf16, f32 or f64.
double Widen(uint64_t bits, Type type, bool flush) {
  const int width = type.bits / type.lanes;
  if (width == 64) return std::bit_cast<double>(bits);
  if (width == 32) return Flushed(ToFloat(bits), flush);
  return Decode(Mask(bits, width), FormatOf(type));
}

uint64_t FromFloat(float value, bool flush) {
  if (std::isnan(value)) return 0x7fffffff;
  return std::bit_cast<uint32_t>(Flushed(value, flush));
}

uint64_t Narrow(double value, Type type, bool flush, bool saturate) {
  const int width = type.bits / type.lanes;
  if (width == 64) return std::bit_cast<uint64_t>(value);
  if (width == 32) return FromFloat(static_cast<float>(value), flush);
  return Encode(value, FormatOf(type), saturate);
}

template <typename T>
std::optional<T> FloatOperation(const Instruction& i, T a, T b, T c) {
  switch (i.op) {
    case Op::kAdd:
      return a + b;
    case Op::kSub:
      return a - b;
    case Op::kMul:
      return a * b;
    case Op::kFma:
      return std::fma(a, b, c);
    case Op::kMad:
      return std::fma(a, b, c);
    case Op::kDiv:
      return a / b;
    case Op::kMin:
      return std::fmin(a, b);
    case Op::kMax:
      return std::fmax(a, b);
    case Op::kNeg:
      return -a;
    case Op::kAbs:
      return std::fabs(a);
    case Op::kSqrt:
      return std::sqrt(a);
    case Op::kRcp:
      return T{1} / a;
    case Op::kRsqrt:
      return T{1} / std::sqrt(a);
    case Op::kEx2:
      return std::exp2(a);
    case Op::kLg2:
      return std::log2(a);
    case Op::kSin:
      return std::sin(a);
    case Op::kCos:
      return std::cos(a);
    case Op::kTanh:
      return std::tanh(a);
    default:
      return std::nullopt;
  }
}

template <typename T>
T Saturated(const Instruction& i, T value) {
  if (i.relu) value = std::isnan(value) ? value : std::max(value, T{0});
  if (!i.saturate) return value;
  return std::isnan(value) ? T{0} : std::clamp(value, T{0}, T{1});
}

std::optional<uint64_t> ComputeFloat(const Instruction& i, const Sources& s) {
  if (i.rounding != Rounding::kNearest || i.wide || i.high) return std::nullopt;
  const int width = i.type.bits / i.type.lanes;
  if (i.op == Op::kNeg || i.op == Op::kAbs) {
    // Of the sign, whatever the number.
    if (i.flush) return std::nullopt;
    uint64_t signs = 0;
    for (int lane = 0; lane < i.type.lanes; ++lane) {
      signs |= 1ull << (width * (lane + 1) - 1);
    }
    return i.op == Op::kNeg ? s[0] ^ signs : s[0] & ~signs;
  }
  if (width == 32) {
    const std::optional<float> result = FloatOperation<float>(
        i, Flushed(ToFloat(s[0]), i.flush), Flushed(ToFloat(s[1]), i.flush),
        Flushed(ToFloat(s[2]), i.flush));
    if (!result) return std::nullopt;
    return FromFloat(Saturated(i, *result), i.flush);
  }
  if (width == 64) {
    const std::optional<double> result = FloatOperation<double>(
        i, std::bit_cast<double>(s[0]), std::bit_cast<double>(s[1]),
        std::bit_cast<double>(s[2]));
    if (!result) return std::nullopt;
    return std::bit_cast<uint64_t>(*result);
  }
  // Sums and products of two halves, and their sum with a third, lose nothing
  // in a double that could turn a tie of halves.
  uint64_t all = 0;
  for (int lane = 0; lane < i.type.lanes; ++lane) {
    const int shift = lane * width;
    const std::optional<double> result = FloatOperation<double>(
        i, Decode(Mask(s[0] >> shift, width), FormatOf(i.type)),
        Decode(Mask(s[1] >> shift, width), FormatOf(i.type)),
        Decode(Mask(s[2] >> shift, width), FormatOf(i.type)));
    if (!result) return std::nullopt;
    all |= Encode(Saturated(i, *result), FormatOf(i.type), false) << shift;
  }
  return all;
}

uint64_t SaturatedInteger(__int128 value, Type type) {
  const bool is_signed = type.kind == Kind::kSigned;
  const __int128 one = 1;
  const __int128 low = is_signed ? -(one << (type.bits - 1)) : 0;
  const __int128 high = (one << (is_signed ? type.bits - 1 : type.bits)) - 1;
  return Mask(static_cast<uint64_t>(std::clamp(value, low, high)), type.bits);
}

__int128 Integer(uint64_t bits, Type type) {
  if (type.kind == Kind::kSigned) {
    return static_cast<int64_t>(SignExtend(bits, type.bits));
  }
  return Mask(bits, type.bits);
}

double Rounded(double value, Rounding rounding) {
  switch (rounding) {
    case Rounding::kZero:
    case Rounding::kIntegerZero:
      return std::trunc(value);
    case Rounding::kDown:
    case Rounding::kIntegerDown:
      return std::floor(value);
    case Rounding::kUp:
    case Rounding::kIntegerUp:
      return std::ceil(value);
    default:
      return std::nearbyint(value);
  }
}

bool ToInteger(Rounding rounding) {
  return rounding >= Rounding::kIntegerNearest;
}

uint64_t FloatToInteger(double value, Type type) {
  if (std::isnan(value)) {
    // 0 in results of at most 32 bits, and the lowest number of 64.
    return type.bits == 64 ? 1ull << 63 : 0;
  }
  const bool is_signed = type.kind == Kind::kSigned;
  const double limit = std::ldexp(1.0, is_signed ? type.bits - 1 : type.bits);
  if (value >= limit) {
    return Mask(~0ull, is_signed ? type.bits - 1 : type.bits);
  }
  if (value < (is_signed ? -limit : 0)) {
    return is_signed ? 1ull << (type.bits - 1) : 0;
  }
  if (!is_signed) return static_cast<uint64_t>(value);
  return Mask(static_cast<uint64_t>(static_cast<int64_t>(value)), type.bits);
}

std::optional<uint64_t> Convert(const Instruction& i, const Sources& s) {
  const Type to = i.type;
  const Type from = i.source_type;
  const int to_width = to.bits / to.lanes;
  const int from_width = from.bits / from.lanes;
  if (IsFloat(to) && IsFloat(from)) {
    const bool narrows = to_width < from_width;
    const bool same = to.kind == from.kind && to_width == from_width;
    if (ToInteger(i.rounding) ? !same : i.rounding != Rounding::kNearest) {
      return std::nullopt;
    }
    if (to.lanes == 2 && from.lanes == 1) {
      // The first source is the high half.
      if (!narrows) return std::nullopt;
      uint64_t all = 0;
      for (int lane = 0; lane < 2; ++lane) {
        const double value = Widen(s[1 - lane], from, i.flush);
        all |=
            Narrow(i.relu ? Saturated(i, value) : value, to, false, i.saturate)
            << (lane * to_width);
      }
      return all;
    }
    if (to.lanes != from.lanes) return std::nullopt;
    uint64_t all = 0;
    for (int lane = 0; lane < to.lanes; ++lane) {
      double value = Widen(s[0] >> (lane * from_width), from, i.flush);
      if (ToInteger(i.rounding)) value = Rounded(value, i.rounding);
      value = Saturated(i, value);
      all |= Narrow(value, to, i.flush, i.saturate) << (lane * to_width);
    }
    return all;
  }
  if (to.lanes != 1 || from.lanes != 1 || i.relu) return std::nullopt;
  if (IsFloat(from)) {
    if (!ToInteger(i.rounding)) return std::nullopt;
    // Out of range is the nearest number anyway.
    return FloatToInteger(Rounded(Widen(s[0], from, i.flush), i.rounding), to);
  }
  const __int128 value = Integer(s[0], from);
  if (IsFloat(to)) {
    if (i.rounding != Rounding::kNearest || i.saturate) return std::nullopt;
    const bool is_signed = from.kind == Kind::kSigned;
    const auto as_signed = static_cast<int64_t>(value);
    const auto as_unsigned = static_cast<uint64_t>(value);
    if (to_width == 64) {
      return std::bit_cast<uint64_t>(is_signed
                                         ? static_cast<double>(as_signed)
                                         : static_cast<double>(as_unsigned));
    }
    if (to_width == 32) {
      return std::bit_cast<uint32_t>(is_signed
                                         ? static_cast<float>(as_signed)
                                         : static_cast<float>(as_unsigned));
    }
    // Through a double: exact up to 53 bits, and larger numbers are infinity.
    return Encode(static_cast<double>(value), FormatOf(to), false);
  }
  if (i.saturate) return SaturatedInteger(value, to);
  return Mask(static_cast<uint64_t>(value), to.bits);
}

uint64_t Permute(uint64_t a, uint64_t b, uint64_t selector) {
  const uint64_t bytes = Mask(a, 32) | b << 32;
  uint64_t result = 0;
  for (int n = 0; n < 4; ++n) {
    const uint64_t select = selector >> (4 * n) & 15;
    uint64_t byte = bytes >> (8 * (select & 7)) & 255;
    if (select & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * n);
  }
  return result;
}

uint64_t BitFieldExtract(uint64_t a, uint64_t position, uint64_t length,
                         Type type) {
  position &= 255;
  length &= 255;
  const bool is_signed = type.kind == Kind::kSigned;
  const uint64_t sign_at =
      std::min<uint64_t>(position + length - 1, type.bits - 1);
  const bool fill = is_signed && length != 0 && (a >> sign_at & 1);
  uint64_t result = 0;
  for (uint64_t n = 0; n < type.bits; ++n) {
    const bool bit =
        n < length && position + n < type.bits ? a >> (position + n) & 1 : fill;
    result |= static_cast<uint64_t>(bit) << n;
  }
  return result;
}

uint64_t BitFieldInsert(uint64_t a, uint64_t b, uint64_t position,
                        uint64_t length, int bits) {
  position &= 255;
  length &= 255;
  for (uint64_t n = 0; n < length && position + n < uint64_t(bits); ++n) {
    const uint64_t bit = 1ull << (position + n);
    b = (b & ~bit) | (a >> n & 1 ? bit : 0);
  }
  return b;
}

std::optional<uint64_t> ComputeInteger(const Instruction& i, const Sources& s) {
  const int width = i.type.bits;
  if (i.type.lanes != 1 || i.rounding != Rounding::kNearest || i.flush ||
      i.relu) {
    return std::nullopt;
  }
  if (i.saturate && i.op != Op::kAdd && i.op != Op::kSub) return std::nullopt;
  const bool is_signed = i.type.kind == Kind::kSigned;
  const uint64_t a = Mask(s[0], width);
  const uint64_t b = Mask(s[1], width);
  const uint64_t c = Mask(s[2], width);
  const __int128 wide_a = Integer(s[0], i.type);
  const __int128 wide_b = Integer(s[1], i.type);
  const uint64_t shift = std::min<uint64_t>(Mask(s[1], 32), 64);
  switch (i.op) {
    case Op::kAdd:
      return i.saturate ? SaturatedInteger(wide_a + wide_b, i.type) : a + b;
    case Op::kSub:
      return i.saturate ? SaturatedInteger(wide_a - wide_b, i.type) : a - b;
    case Op::kMul:
    case Op::kMad: {
      const auto product = static_cast<unsigned __int128>(wide_a) *
                           static_cast<unsigned __int128>(wide_b);
      uint64_t result = i.high ? static_cast<uint64_t>(product >> width)
                               : static_cast<uint64_t>(product);
      if (i.wide && width > 32) return std::nullopt;
      if (i.op == Op::kMad) result += i.wide ? s[2] : c;
      return Mask(result, i.wide ? 2 * width : width);
    }
    case Op::kDiv:
      if (b == 0) return Mask(~0ull, width);
      return static_cast<uint64_t>(wide_a / wide_b);
    case Op::kRem:
      if (b == 0) return a;
      return static_cast<uint64_t>(wide_a % wide_b);
    case Op::kMin:
      return wide_a < wide_b ? a : b;
    case Op::kMax:
      return wide_a > wide_b ? a : b;
    case Op::kNeg:
      return -a;
    case Op::kAbs:
      return wide_a < 0 ? -a : a;
    case Op::kSad:
      return c + static_cast<uint64_t>(wide_a < wide_b ? wide_b - wide_a
                                                       : wide_a - wide_b);
    case Op::kAnd:
      return a & b;
    case Op::kOr:
      return a | b;
    case Op::kXor:
      return a ^ b;
    case Op::kNot:
      return ~a;
    case Op::kShl:
      return shift >= uint64_t(width) ? 0 : a << shift;
    case Op::kShr:
      if (is_signed) {
        return static_cast<uint64_t>(static_cast<int64_t>(wide_a) >>
                                     std::min<uint64_t>(shift, width - 1));
      }
      return shift >= uint64_t(width) ? 0 : a >> shift;
    case Op::kPopc:
      return std::popcount(a);
    case Op::kClz:
      return std::countl_zero(a) - (64 - width);
    case Op::kBfind: {
      const uint64_t looked = is_signed && wide_a < 0 ? Mask(~a, width) : a;
      if (looked == 0) return 0xffffffff;
      const int bit = 63 - std::countl_zero(looked);
      return i.variant == Variant::kShiftAmount ? width - 1 - bit : bit;
    }
    case Op::kBrev: {
      uint64_t result = 0;
      for (int n = 0; n < width; ++n) result |= (a >> n & 1) << (width - 1 - n);
      return result;
    }
    case Op::kBfe:
      return BitFieldExtract(a, s[1], s[2], i.type);
    case Op::kBfi:
      return BitFieldInsert(a, b, s[2], s[3], width);
    case Op::kPrmt: {
      if (i.variant == Variant::kForward4) {
        const uint64_t n = s[2] & 3;
        return Mask((Mask(s[0], 32) | s[1] << 32) >> (8 * n), 32);
      }
      return Permute(s[0], s[1], s[2]);
    }
    case Op::kShf: {
      const uint64_t both = Mask(s[0], 32) | s[1] << 32;
      const uint64_t n =
          i.clamp ? std::min<uint64_t>(Mask(s[2], 32), 32) : s[2] & 31;
      if (i.variant == Variant::kRight) return both >> n;
      return n == 32 ? s[0] : both << n >> 32;
    }
    case Op::kLop3: {
      uint64_t result = 0;
      for (int row = 0; row < 8; ++row) {
        if (!(s[3] >> row & 1)) continue;
        result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
      }
      return result;
    }
    case Op::kDp4a:
    case Op::kDp2a: {
      const bool four = i.op == Op::kDp4a;
      const Type bytes_a = {i.type.kind, static_cast<uint8_t>(four ? 8 : 16)};
      const Type bytes_b = {i.source_type.kind, 8};
      uint64_t sum = s[2];
      for (int n = 0; n < (four ? 4 : 2); ++n) {
        const int at = four ? n : i.variant == Variant::kHighHalf ? n + 2 : n;
        sum +=
            static_cast<uint64_t>(Integer(s[0] >> (n * bytes_a.bits), bytes_a) *
                                  Integer(s[1] >> (8 * at), bytes_b));
      }
      return sum;
    }
    default:
      return std::nullopt;
  }
}

int ResultBits(const Instruction& i) {
  switch (i.op) {
    case Op::kPopc:
    case Op::kClz:
    case Op::kBfind:
      return 32;
    default:
      return i.wide ? 2 * i.type.bits : i.type.bits;
  }
}

}  // namespace

uint64_t Mask(uint64_t value, int bits) {
  return bits >= 64 ? value : value & ((1ull << bits) - 1);
}

uint64_t SignExtend(uint64_t value, int bits) {
  if (bits >= 64) return value;
  const uint64_t sign = 1ull << (bits - 1);
  return (Mask(value, bits) ^ sign) - sign;
}

std::optional<uint64_t> Compute(const Instruction& i, const Sources& s) {
  std::optional<uint64_t> result;
  switch (i.op) {
    case Op::kMov:
      result = s[0];
      break;
    case Op::kSelp:
      result = s[2] & 1 ? s[0] : s[1];
      break;
    case Op::kCvt:
      return Convert(i, s);
    case Op::kCvtPack: {
      // Two numbers to 16 bits, or two to 8 below what was packed before.
      const int width = i.type.bits;
      const __int128 a = Integer(s[0], i.source_type);
      const __int128 b = Integer(s[1], i.source_type);
      if (!i.saturate || (width != 16 && width != 8)) return std::nullopt;
      const uint64_t both =
          SaturatedInteger(a, i.type) << width | SaturatedInteger(b, i.type);
      return width == 16 ? both : Mask(s[2] << 16 | both, 32);
    }
    default:
      result = IsFloat(i.type) ? ComputeFloat(i, s) : ComputeInteger(i, s);
  }
  if (!result) return std::nullopt;
  return Mask(*result, ResultBits(i));
}

std::optional<bool> Compare(const Instruction& i, uint64_t a, uint64_t b) {
  if (i.type.lanes != 1) return std::nullopt;
  const auto compare = [&i](auto x, auto y, bool nan) {
    switch (i.comparison) {
      case Comparison::kEq:
        return x == y || (nan && i.unordered);
      case Comparison::kNe:
        return nan ? i.unordered : x != y;
      case Comparison::kLt:
        return x < y || (nan && i.unordered);
      case Comparison::kLe:
        return x <= y || (nan && i.unordered);
      case Comparison::kGt:
        return x > y || (nan && i.unordered);
      case Comparison::kGe:
        return x >= y || (nan && i.unordered);
      case Comparison::kNumber:
        return !nan;
      case Comparison::kNan:
        return nan;
    }
    return false;
  };
  if (IsFloat(i.type)) {
    const double x = Widen(a, i.type, i.flush);
    const double y = Widen(b, i.type, i.flush);
    return compare(x, y, std::isnan(x) || std::isnan(y));
  }
  return compare(Integer(a, i.type), Integer(b, i.type), false);
}

std::optional<uint64_t> ComputeAtomic(const Instruction& i, uint64_t old,
                                      uint64_t b, uint64_t c) {
  const int bits = i.type.bits;
  Instruction plain;
  plain.type = i.type;
  switch (i.variant) {
    case Variant::kExchange:
      return Mask(b, bits);
    case Variant::kCompareAndSwap:
      return Mask(old == Mask(b, bits) ? c : old, bits);
    case Variant::kIncrement:
      return old >= Mask(b, bits) ? 0 : old + 1;
    case Variant::kDecrement:
      return old == 0 || old > Mask(b, bits) ? Mask(b, bits) : old - 1;
    case Variant::kAdd:
      plain.op = Op::kAdd;
      break;
    case Variant::kMin:
      plain.op = Op::kMin;
      break;
    case Variant::kMax:
      plain.op = Op::kMax;
      break;
    case Variant::kAnd:
      plain.op = Op::kAnd;
      break;
    case Variant::kOr:
      plain.op = Op::kOr;
      break;
    case Variant::kXor:
      plain.op = Op::kXor;
      break;
    default:
      return std::nullopt;
  }
  return Compute(plain, {old, b, 0, 0});
}

double ToDouble(Type type, uint64_t bits) {
  return Widen(bits, type, false);
}

}  // namespace larder::kernels::ptx
