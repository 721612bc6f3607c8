#ifndef LARDER_TESTS_CLIENT_PROMPT_SAMPLES_H_
#define LARDER_TESTS_CLIENT_PROMPT_SAMPLES_H_

// Whole prompts of sample chunks, by number: saved, matched, loaded, and
// compared byte by byte.

#include <cstdint>
#include <vector>

#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/client/kv_samples.h"

namespace larder::samples {

inline constexpr uint32_t kPromptChunks = 10;

inline std::vector<Id> PromptIds(Space& space, uint32_t prompt) {
  return space.Ids(PromptOf(kPromptChunks * kChunk, prompt))->ids;
}

inline void SavePrompt(Space& space, uint32_t prompt,
                       larder_stage stage = LARDER_VOLATILE) {
  const std::vector<Id> ids = PromptIds(space, prompt);
  for (uint32_t i = 0; i < kPromptChunks; ++i) {
    CommitOptions commit;
    if (i > 0) commit.parent = ids[i - 1];
    const Outcome saved =
        SaveChunk(space, ids[i], prompt * kPromptChunks + i, {}, commit, stage);
    ASSERT_TRUE(saved.ok()) << saved.ToString();
  }
}

// How much of a prompt a match promises.
inline uint32_t MatchPrompt(Space& space, uint32_t prompt) {
  const auto match = space.Match(PromptIds(space, prompt));
  EXPECT_TRUE(match.ok()) << match.status().ToString();
  return match.ok() ? match->usable : 0;
}

// How much of it comes; each byte of that is compared.
inline uint32_t LoadPrompt(Space& space, uint32_t prompt) {
  Plain plain(kPromptChunks);
  const LoadAnswer loaded =
      space.Load(PromptIds(space, prompt), {plain.View()});
  for (uint32_t i = 0; i < loaded.usable; ++i) {
    EXPECT_TRUE(plain.Holds(i, prompt * kPromptChunks + i)) << prompt;
  }
  return loaded.usable;
}

}  // namespace larder::samples

#endif  // LARDER_TESTS_CLIENT_PROMPT_SAMPLES_H_
