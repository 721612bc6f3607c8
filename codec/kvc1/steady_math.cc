#include "codec/kvc1/steady_math.h"

#include <bit>
#include <initializer_list>
#include <limits>

namespace larder::kvc1 {
namespace {

// ln 2; the high part has so few bits that products with exponents are exact.
constexpr double kLn2High = 0x1.62e42feep-1;
constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
constexpr double kInvLn2 = 0x1.71547652b82fep0;
constexpr double kSqrt2 = 0x1.6a09e667f3bcdp0;
// 1 / n!
constexpr double kInverseFactorial[] = {
    1.0,
    1.0,
    1.0 / 2,
    1.0 / 6,
    1.0 / 24,
    1.0 / 120,
    1.0 / 720,
    1.0 / 5040,
    1.0 / 40320,
    1.0 / 362880,
    1.0 / 3628800,
    1.0 / 39916800,
    1.0 / 479001600,
    1.0 / 6227020800,
    1.0 / 87178291200,
    1.0 / 1307674368000,
    1.0 / 20922789888000,
    1.0 / 355687428096000,
};
constexpr double kTwoPi = 0x1.921fb54442d18p2;
// 1 / (2 * pi)
constexpr double kInvTwoPi = 0x1.45f306dc9c883p-3;
constexpr double kInvTwoPiLow = -0x1.6b01ec5417056p-57;

// The nearest integer, ties to even.
double Nearest(double x) {
  constexpr double kIntegers = 0x1p52;  // from here on there is nothing else
  const double size = x < 0 ? -x : x;
  if (!(size < kIntegers)) return x;
  const double whole = (size + kIntegers) - kIntegers;
  return x < 0 ? -whole : whole;
}

// 2 ** exponent. REQUIRES: -1022 <= exponent <= 1023.
double PowerOfTwo(int exponent) {
  return std::bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

struct Pair {
  double high = 0;
  double low = 0;
};

// Sum and product without error (Dekker 1971).
Pair Sum(double a, double b) {
  const double sum = a + b;
  const double of_b = sum - a;
  return {sum, (a - (sum - of_b)) + (b - of_b)};
}

Pair Split(double a) {
  constexpr double kHalfOfTheBits = 134217729;  // 2**27 + 1
  const double wide = a * kHalfOfTheBits;
  const double high = wide - (wide - a);
  return {high, a - high};
}

Pair Product(double a, double b) {
  const double product = a * b;
  const Pair x = Split(a);
  const Pair y = Split(b);
  const double error =
      ((x.high * y.high - product) + x.high * y.low + x.low * y.high) +
      x.low * y.low;
  return {product, error};
}

}  // namespace

double SteadyLog(double x) {
  const auto bits = std::bit_cast<uint64_t>(x);
  int exponent = static_cast<int>(bits >> 52 & 0x7FF) - 1023;
  double mantissa =
      std::bit_cast<double>((bits & ((uint64_t{1} << 52) - 1)) | 1023ULL << 52);
  if (mantissa > kSqrt2) {
    mantissa /= 2;
    ++exponent;
  }
  // ln m = 2 artanh s, and |s| <= 0.172.
  const double s = (mantissa - 1) / (mantissa + 1);
  const double square = s * s;
  double series = 0;
  for (int k = 23; k >= 3; k -= 2) series = (series + 1.0 / k) * square;
  const double of_mantissa = 2 * s + 2 * s * series;
  return exponent * kLn2High + (of_mantissa + exponent * kLn2Low);
}

double SteadyExp(double x) {
  if (x < -708) return 0;
  if (x > 709) return std::numeric_limits<double>::infinity();
  const double twos = Nearest(x * kInvLn2);
  const double rest = (x - twos * kLn2High) - twos * kLn2Low;
  // |rest| <= 0.347
  double series = 0;
  for (int k = 15; k >= 2; --k) series = (series + kInverseFactorial[k]) * rest;
  const auto exponent = static_cast<int>(twos);
  const double value = 1 + (rest + rest * series);
  // 2 ** 1024 is no double.
  return exponent > 1023 ? value * 2 * PowerOfTwo(exponent - 1)
                         : value * PowerOfTwo(exponent);
}

double SteadyPower(double base, double exponent) {
  return SteadyExp(exponent * SteadyLog(base));
}

double SteadyFloor(double x) {
  const double nearest = Nearest(x);
  return nearest > x ? nearest - 1 : nearest;
}

Spin::Spin(double frequency) {
  const Pair product = Product(frequency, kInvTwoPi);
  const Pair sum = Sum(product.high, product.low + frequency * kInvTwoPiLow);
  turns_ = sum.high;
  turns_low_ = sum.low;
}

Turn Spin::At(uint64_t position) const {
  // Halves of a position are doubles without error; whole turns are dropped.
  double turns = 0;
  for (const double part : {static_cast<double>(position >> 32) * 0x1p32,
                            static_cast<double>(position & 0xFFFFFFFF)}) {
    if (part == 0) continue;
    const Pair product = Product(part, turns_);
    const double low = product.low + part * turns_low_;
    turns += (product.high - Nearest(product.high)) + (low - Nearest(low));
  }
  turns -= Nearest(turns);

  const double quarters = Nearest(turns * 4);
  const double angle = (turns - quarters / 4) * kTwoPi;
  // |angle| <= pi / 4
  const double square = angle * angle;
  double cos = 0;
  for (int k = 16; k >= 2; k -= 2) cos = (kInverseFactorial[k] - cos) * square;
  cos = 1 - cos;
  double sin = 0;
  for (int k = 17; k >= 3; k -= 2) sin = (kInverseFactorial[k] - sin) * square;
  sin = angle - angle * sin;

  switch (static_cast<int>(quarters)) {
    case 0:
      return {cos, sin};
    case 1:
      return {-sin, cos};
    case -1:
      return {sin, -cos};
    default:  // 2, -2
      return {-cos, -sin};
  }
}

}  // namespace larder::kvc1
