#ifndef LARDER_TOOLS_QUALITY_SUBJECT_H_
#define LARDER_TOOLS_QUALITY_SUBJECT_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "codec/baselines/baseline.h"
#include "codec/codec.h"
#include "codec/profile.h"
#include "store/space.h"
#include "store/status.h"
#include "tools/quality/kv.h"

namespace larder::quality {

// Tokens that one object of Larder holds.
inline constexpr uint32_t kChunkTokens = 256;

// How many bits for how many elements of K and V. Chunks that are not full are
// coded, but counted only if there is no full one: they are rare in a store,
// and what a codec pays once per chunk would weigh too much.
struct Rate {
  uint64_t bits = 0;
  uint64_t elements = 0;

  Rate& operator+=(const Rate& other) {
    bits += other.bits;
    elements += other.elements;
    return *this;
  }
};

uint64_t ElementsPerToken(const ModelShape& shape);
// Does the chunk of tokens from `begin` count?
bool CountsChunk(const KvPrefix& prefix, uint32_t begin);

// What is judged: something that takes a prefix's KV, and gives back another
// and what its storage would cost. Immutable after Calibrate, and then
// thread-safe.
class QualitySubject {
 public:
  virtual ~QualitySubject() = default;

  // Subjects of one name are points of one curve.
  virtual std::string name() const = 0;
  virtual std::string parameters() const = 0;

  // Whether Calibrate is to be called first, with K and V of texts that are
  // not those it will be judged by; and whether with queries too.
  virtual bool needs_calibration() const { return false; }
  virtual bool needs_calibration_queries() const { return false; }
  virtual Status Calibrate(std::span<const Capture> captures);
  // What Calibrate learned, as stored once for a model.
  virtual uint64_t profile_bytes() const { return 0; }
  // The profile of Larder's that it codes with, or null; known after Calibrate.
  virtual const Profile* profile() const { return nullptr; }

  // Whether Apply wants KvPrefix::queries.
  virtual bool needs_queries() const { return false; }

  // Encodes to bytes, decodes these, and puts what came out into `prefix`.
  virtual StatusOr<Rate> Apply(KvPrefix& prefix) const = 0;
};

inline constexpr char kLosslessBf16[] = "lossless-bf16";

// The profile's id in hexadecimal, or "".
std::string ProfileIdOf(const QualitySubject& subject);

using Subjects = std::vector<std::unique_ptr<QualitySubject>>;

// Nothing is changed: 16 bits.
std::unique_ptr<QualitySubject> MakeIdentity();

// A curve of codec/baselines. Objects are chunks of a layer, or the whole
// prefix's where the codec wants that.
std::unique_ptr<QualitySubject> MakeBaselineSubject(
    std::unique_ptr<baselines::Baseline> baseline);

// One of Larder's own codecs at a quality. Rates count the records of chunks as
// they are stored: header, tables, padding.
std::unique_ptr<QualitySubject> MakeCodecSubject(const Codec& codec,
                                                 Lineage quality,
                                                 SpaceDescriptor space);

// The space of a model's KV: one group of token-major layers.
SpaceDescriptor MakeSpace(const ModelShape& shape, const Sha256Digest& weights);

// Every point of the curve of that name: a baseline's, a codec's of this build
// (at exact if it can, and at each of `levels` if it is lossy), or "identity".
// NotFound names those that there are.
StatusOr<Subjects> MakeSubjects(const std::string& name,
                                std::span<const uint8_t> levels,
                                const SpaceDescriptor& space);
// "identity", then the build's codecs, "lossless-bf16", then baselines.
std::vector<std::string> SubjectNames();

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_SUBJECT_H_
