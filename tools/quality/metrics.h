#ifndef LARDER_TOOLS_QUALITY_METRICS_H_
#define LARDER_TOOLS_QUALITY_METRICS_H_

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "tools/quality/kv.h"

namespace larder::quality {

// Next-token distributions of one position, compared.
struct Divergence {
  double kl = 0;          // of the reference from ours, in nats, >= 0
  bool same_top = false;  // the same token is most likely
  double delta_nll = 0;   // ours minus the reference's, of the true token
  int32_t top = 0;        // our most likely token
};

// The reference logits of one position, prepared for many comparisons.
class ReferenceLogits {
 public:
  // `next` is the token that truly follows, or -1 if none does.
  ReferenceLogits(std::span<const float> logits, int32_t next);

  // Exactly 0 where the logits are the same bits.
  Divergence Compare(std::span<const float> logits) const;
  int32_t top() const { return top_; }

 private:
  std::vector<float> logits_;
  std::vector<float> probabilities_;
  double log_sum_ = 0;
  int32_t top_ = 0;
  int32_t next_;
};

// Attention of true queries over a prefix that was replaced and a suffix that
// was not, against the same over the true prefix.
//
// Every `stride`-th query of the suffix is looked at: the error of one layer is
// a sum over heads, dimensions and queries, of which a quarter says as much.
class AttentionError {
 public:
  AttentionError(const KvPrefix& prefix, const Capture& suffix,
                 uint32_t stride);

  // Sum of squared errors over sum of squares, per layer.
  std::vector<double> Relative(const KvPrefix& replaced) const;

  // The outputs over the true prefix: [query head][query][dim].
  const std::vector<float>& reference(uint32_t layer) const {
    return reference_[layer];
  }

 private:
  std::vector<float> Outputs(const KvLayer& prefix, uint32_t layer) const;

  const ModelShape shape_;
  const uint32_t prefix_tokens_;
  const Capture* const suffix_;
  const uint32_t stride_;
  std::vector<std::vector<float>> reference_;
};

// How much the queries of `prefix` attend to each of its tokens, averaged over
// the query heads of `layer` and over those of the last `window` queries that
// see the token at all (0: all queries). REQUIRES: prefix.queries.
std::vector<float> AttentionMass(const KvPrefix& prefix, uint32_t layer,
                                 uint32_t window);

// A mean and where 95 % of the means of texts drawn anew lie. The same input
// gives the same interval.
struct Interval {
  double mean = 0;
  double low = 0;
  double high = 0;
};

// `figure` of texts drawn with replacement: it is called with indexes below
// `texts`. Of draws for which it gives NaN, none counts.
Interval Bootstrap(
    uint32_t texts,
    const std::function<double(std::span<const uint32_t>)>& figure);

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_METRICS_H_
