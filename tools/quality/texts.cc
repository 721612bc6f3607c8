#include "tools/quality/texts.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

#include "store/checksum.h"

namespace larder::quality {
namespace {

constexpr double kDepths[] = {0.1, 0.3, 0.5, 0.7, 0.9};

SplitText Split(const std::vector<llama_token>& tokens, size_t begin,
                uint32_t prefix_tokens, uint32_t suffix_tokens) {
  const auto at = tokens.begin() + static_cast<ptrdiff_t>(begin);
  return {.prefix = {at, at + prefix_tokens},
          .suffix = {at + prefix_tokens, at + prefix_tokens + suffix_tokens}};
}

}  // namespace

std::string TextDigest(const SplitText& text) {
  std::vector<llama_token> all = {static_cast<llama_token>(text.prefix.size()),
                                  static_cast<llama_token>(text.suffix.size()),
                                  static_cast<llama_token>(text.answer_tokens)};
  all.insert(all.end(), text.prefix.begin(), text.prefix.end());
  all.insert(all.end(), text.suffix.begin(), text.suffix.end());
  const Checksum sum = ComputeChecksum(std::as_bytes(std::span(all)));
  return absl::StrFormat("%016x%016x", sum.high, sum.low);
}

StatusOr<std::vector<SplitText>> ReadTexts(const QualityEngine& engine,
                                           const std::string& path,
                                           uint32_t prefix_tokens,
                                           uint32_t suffix_tokens,
                                           uint32_t count) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError("cannot read " + path);
  const std::string all{std::istreambuf_iterator<char>(file), {}};
  const size_t wanted = prefix_tokens + suffix_tokens;
  const bool one_passage = all.find('\f') == std::string::npos;
  std::vector<SplitText> texts;
  for (size_t begin = 0; begin < all.size() && texts.size() < count;) {
    const size_t end = std::min(all.find('\f', begin), all.size());
    const std::vector<llama_token> tokens =
        engine.Tokenize(all.substr(begin, end - begin));
    for (size_t at = 0; at + wanted <= tokens.size() && texts.size() < count;
         at += wanted) {
      texts.push_back(Split(tokens, at, prefix_tokens, suffix_tokens));
      if (!one_passage) break;
    }
    begin = end + 1;
  }
  if (texts.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " has no text of ", wanted, " tokens"));
  }
  return texts;
}

std::vector<SplitText> MakePassKeys(const QualityEngine& engine,
                                    uint32_t prefix_tokens,
                                    uint32_t per_depth) {
  const std::vector<llama_token> intro = engine.Tokenize(
      "There is an important fact hidden inside a lot of irrelevant text. Find "
      "it and memorize it. I will ask about it at the end.\n");
  const std::vector<llama_token> filler = engine.Tokenize(
      " The grass is green. The sky is blue. The sun is yellow. Here we go. "
      "There and back again.");
  const std::vector<llama_token> question =
      engine.Tokenize("\nWhat is the pass key? The pass key is");
  std::mt19937 random(1);
  std::vector<SplitText> texts;
  for (const double depth : kDepths) {
    for (uint32_t i = 0; i < per_depth; ++i) {
      const std::string key = absl::StrCat(10000 + random() % 90000);
      const std::vector<llama_token> fact = engine.Tokenize(
          absl::StrCat("\nThe pass key is ", key, ". Remember it. ", key,
                       " is the pass key.\n"));
      const std::vector<llama_token> answer = engine.Tokenize(" " + key);
      SplitText text{.depth = depth};
      text.prefix = intro;
      const size_t room = prefix_tokens - intro.size() - fact.size();
      const auto before =
          static_cast<size_t>(depth * static_cast<double>(room));
      for (size_t t = 0; t < room; ++t) {
        if (t == before) {
          text.prefix.insert(text.prefix.end(), fact.begin(), fact.end());
        }
        text.prefix.push_back(filler[t % filler.size()]);
      }
      text.suffix = question;
      text.suffix.insert(text.suffix.end(), answer.begin(), answer.end());
      text.answer_tokens = static_cast<uint32_t>(answer.size());
      texts.push_back(std::move(text));
    }
  }
  return texts;
}

}  // namespace larder::quality
