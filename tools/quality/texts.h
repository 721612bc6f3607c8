#ifndef LARDER_TOOLS_QUALITY_TEXTS_H_
#define LARDER_TOOLS_QUALITY_TEXTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "store/status.h"
#include "tools/quality/engine.h"

namespace larder::quality {

// A text that is judged: KV of the prefix is replaced, the suffix is given to
// the model token by token, whatever it would have said.
struct SplitText {
  std::vector<llama_token> prefix;
  std::vector<llama_token> suffix;
  // So many tokens at the suffix's end are an answer that the model finds or
  // does not (pass keys); 0: none.
  uint32_t answer_tokens = 0;
  double depth = 0;  // of the pass key: 0 at the beginning, 1 at the end
};

// Of its tokens and of where it is split; hexadecimal.
std::string TextDigest(const SplitText& text);

// Up to `count` texts out of a file: passages are divided by form feeds, each
// gives its first prefix + suffix tokens, or nothing if it is shorter. A file
// of one passage is cut into texts from its beginning to its end.
StatusOr<std::vector<SplitText>> ReadTexts(const QualityEngine& engine,
                                           const std::string& path,
                                           uint32_t prefix_tokens,
                                           uint32_t suffix_tokens,
                                           uint32_t count);

// `per_depth` pass keys at each of five depths of a prefix of `prefix_tokens`
// tokens, and the question for it as the suffix. The same ones every time.
std::vector<SplitText> MakePassKeys(const QualityEngine& engine,
                                    uint32_t prefix_tokens, uint32_t per_depth);

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_TEXTS_H_
