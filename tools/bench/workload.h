#ifndef LARDER_TOOLS_BENCH_WORKLOAD_H_
#define LARDER_TOOLS_BENCH_WORKLOAD_H_

#include <cstdint>
#include <string>
#include <vector>

#include "client/larder_c.h"

namespace larder::bench {

// A made-up model whose chunks have the sizes that a figure asks for.
struct SpaceShape {
  std::string name;
  uint16_t layers = 32;
  uint16_t heads = 8;         // over all ranks
  uint32_t head_bytes = 256;  // K, and the same again for V
  uint32_t block_tokens = 16;
  uint32_t chunk_tokens = 256;
  bool token_major = false;  // how records keep it

  uint64_t segment_bytes() const {
    return uint64_t{2} * heads * head_bytes * chunk_tokens;
  }
  uint64_t chunk_bytes() const { return layers * segment_bytes(); }
};

larder_space* OpenSpace(larder_client* client, const SpaceShape& shape);

// Chunk ids of `chunks` chunks of pseudo-random tokens.
std::vector<uint32_t> RandomTokens(uint64_t seed, size_t count);
std::vector<larder_id> IdsOf(larder_space* space,
                             const std::vector<uint32_t>& tokens,
                             size_t expected);

// Fills staging with words drawn from (seed, chunk): distinct everywhere, cheap
// enough not to be what is measured.
void FillWords(void* data, uint64_t bytes, uint64_t seed);

struct SaveOptions {
  uint16_t head_begin = 0;  // the box of this rank; 0 heads = all
  uint16_t head_count = 0;
  bool durable = false;
  bool fill = true;  // false: leaves staging as it is
};
// Saves ids[begin, end) as a chain, several in flight, and waits for all.
void SaveChunks(larder_client* client, larder_space* space,
                const SpaceShape& shape, const std::vector<larder_id>& ids,
                size_t begin, size_t end, const SaveOptions& options);

// Loads the chunks into `destination` (contiguous, chunk after chunk) and ends
// the program if one is missing.
void LoadChunks(larder_space* space, const SpaceShape& shape,
                const std::vector<larder_id>& ids, void* destination,
                uint32_t threads, bool each);

// The same into blocks of [block_tokens, heads, head_bytes] that lie in any
// order in a plane of keys and one of values per layer, as vLLM has them, on
// one thread.
void LoadPaged(larder_space* space, const SpaceShape& shape,
               const std::vector<larder_id>& ids, void* destination);

}  // namespace larder::bench

#endif  // LARDER_TOOLS_BENCH_WORKLOAD_H_
