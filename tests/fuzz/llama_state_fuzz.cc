// Arbitrary bytes as a llama.cpp state: parsed against each sample shape and
// with its shape learned from itself. Whatever is accepted must cut and join
// back to the very same rows.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "client/adapters/llama_cpp/state.h"
#include "tests/client/llama_state_samples.h"

namespace larder {
namespace {

void Check(bool condition) {
  if (!condition) std::abort();
}

void CutAndJoin(const LlamaStateShape& shape, ByteSpan blob) {
  StatusOr<LlamaStateView> view = LlamaStateView::Parse(shape, blob);
  if (!view.ok()) return;
  const uint32_t tokens = view->token_count();
  std::vector<std::byte> joined(blob.size());
  StatusOr<LlamaStateBuilder> builder =
      LlamaStateBuilder::Start(shape, tokens, view->stream(), joined);
  Check(builder.ok());
  const uint32_t half = tokens / 2;
  for (size_t l = 0; l < shape.layers.size(); ++l) {
    for (const auto& [first, count] :
         {std::pair{0u, half}, std::pair{half, tokens - half}}) {
      if (count == 0) continue;
      std::vector<std::byte> segment(LlamaSegmentBytes(shape.layers[l], count));
      Check(view->Cut(l, view->position_begin() + first, count, segment).ok());
      Check(builder->Put(l, first, count, segment).ok());
    }
  }
  StatusOr<LlamaStateView> again = LlamaStateView::Parse(shape, joined);
  Check(again.ok() && again->in_order() && again->position_begin() == 0);
  if (view->in_order()) {
    const LlamaStateLayout layout(shape, tokens, view->stream());
    Check(std::memcmp(joined.data() + layout.counts_offset,
                      blob.data() + layout.counts_offset,
                      blob.size() - layout.counts_offset) == 0);
  }
  const uint32_t keep = half == 0 ? 1 : half;
  Check(builder->Shorten(keep).ok());
  Check(LlamaStateView::Parse(shape, builder->blob()).ok());
}

}  // namespace
}  // namespace larder

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder;
  // A copy of exactly the input's size: reading beyond it is seen.
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  const std::vector<std::byte> blob(bytes, bytes + size);
  static const auto* const kShapes =
      new std::vector<NamedLlamaShape>(LlamaSampleShapes());
  for (const NamedLlamaShape& sample : *kShapes) {
    CutAndJoin(sample.shape, blob);
  }
  (void)LearnLlamaStreams(blob);
  StatusOr<LlamaStateShape> learned = LearnLlamaShape(blob);
  if (learned.ok()) CutAndJoin(*learned, blob);
  return 0;
}
