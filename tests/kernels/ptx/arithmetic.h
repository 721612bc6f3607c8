#ifndef LARDER_TESTS_KERNELS_PTX_ARITHMETIC_H_
#define LARDER_TESTS_KERNELS_PTX_ARITHMETIC_H_

// What one thread computes from register values, without memory or other
// threads. Numbers are in the low bits of 64, and what is above the type's
// width is ignored in operands and zero in results.

#include <array>
#include <cstdint>
#include <optional>

#include "tests/kernels/ptx/module.h"

namespace larder::kernels::ptx {

using Sources = std::array<uint64_t, 4>;

// Nullopt where the instruction is not of this sort, or not with these types
// and modifiers: which depends on the instruction alone, never on the sources.
//
// f32, f64, f16 and bf16 are rounded as IEEE 754 has it, and so as the hardware
// does; division and square root likewise, also where PTX says approx. ex2,
// lg2, sin, cos, tanh and rsqrt are the C library's: hardware differs in the
// last bits.
std::optional<uint64_t> Compute(const Instruction& instruction,
                                const Sources& sources);

// setp without the combination with another predicate.
std::optional<bool> Compare(const Instruction& instruction, uint64_t a,
                            uint64_t b);

// What an atomic operation leaves in memory.
std::optional<uint64_t> ComputeAtomic(const Instruction& instruction,
                                      uint64_t old, uint64_t b, uint64_t c);

// A number of a floating-point type of at most 32 bits.
double ToDouble(Type type, uint64_t bits);

uint64_t Mask(uint64_t value, int bits);
uint64_t SignExtend(uint64_t value, int bits);

}  // namespace larder::kernels::ptx

#endif  // LARDER_TESTS_KERNELS_PTX_ARITHMETIC_H_
