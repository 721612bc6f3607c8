#ifndef LARDER_CODEC_KVC1_STEADY_MATH_H_
#define LARDER_CODEC_KVC1_STEADY_MATH_H_

#include <cstdint>

namespace larder::kvc1 {

// Mathematics whose every bit is the same on every machine and with every
// compiler, since records depend on it: +, -, * and / of doubles alone, never
// fused, and nothing of libm, which promises no last bit.

// Of positive normal numbers. Within 4 units of the last place, or 1e-16.
double SteadyLog(double x);

// 0 below, infinite above the range of normal numbers. The relative error is
// under 4e-16 + 2e-16 * |x|.
double SteadyExp(double x);

// base ** exponent. REQUIRES: base is a positive normal number.
double SteadyPower(double base, double exponent);

double SteadyFloor(double x);

struct Turn {
  double cos = 1;
  double sin = 0;
};

// Something that turns by `frequency` radians per position.
class Spin {
 public:
  // REQUIRES: 0 <= frequency <= 2**20.
  explicit Spin(double frequency);

  // Within 2e-15 for frequencies up to 1 and positions below 2**40, within 1e-5
  // everywhere.
  Turn At(uint64_t position) const;

 private:
  // Whole turns per position, as the sum of two doubles.
  double turns_;
  double turns_low_;
};

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_STEADY_MATH_H_
