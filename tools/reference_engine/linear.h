#ifndef LARDER_TOOLS_REFERENCE_ENGINE_LINEAR_H_
#define LARDER_TOOLS_REFERENCE_ENGINE_LINEAR_H_

#include <cstdint>

namespace larder::reference {

// outputs[t][r] = sum over c of matrix[r][c] * inputs[t][c], all row-major.
// Every sum is taken in an order that depends on `columns` alone: a token's
// output is the same bits whatever other tokens are computed with it. Between
// processors with and without AVX2 or AVX-512 bits may differ.
void Multiply(const float* matrix, uint32_t rows, uint32_t columns,
              const float* inputs, uint32_t tokens, float* outputs);

}  // namespace larder::reference

#endif  // LARDER_TOOLS_REFERENCE_ENGINE_LINEAR_H_
