#ifndef LARDER_CODEC_PROFILE_H_
#define LARDER_CODEC_PROFILE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder {

// Which tables of KVC1's bank the coefficients of a tensor are coded with (ids
// of kvc1::BankTable and BankRefinement). Coefficients in steps three times as
// wide, and three times again, are those of the coarser planes.
struct CoefficientTables {
  std::vector<uint8_t> base;        // [level][0..2 times coarser][coefficient]
  std::vector<uint8_t> refinement;  // [level][0..1 times coarser][coefficient]
};

// What keys or values of one layer look like, and how finely each channel of
// them is to be coded. Channels count over all heads of the space, in their
// order. A channel's step is the level's times the channel's weight.
struct TensorProfile {
  std::vector<float> mean;    // of each channel, subtracted before coding
  std::vector<float> weight;  // of each channel, > 0: how coarse it may be
  std::vector<float> step;    // for each level, > 0
  CoefficientTables tables;   // each channel is a coefficient

  // A linear transform of the channels of one block of heads (KLT): decoding
  // multiplies the integers of all coefficients with an integer matrix,
  // exactly. x[c] = weight[c] * step * sum over k of matrix[c][k] * integer[k]
  // + mean[c]
  struct Transform {
    uint32_t channel_begin = 0, channel_count = 0;
    std::vector<int8_t> matrix;  // [channel][coefficient]
    std::vector<float> weight;   // of each channel
    CoefficientTables tables;

    // Derived by Profile, not stored: the inverse,
    // coefficient[k] = sum over c of forward[k][c] * (x - mean)[c];
    // the matrix as kernels take it; how large integers may be.
    std::vector<float> forward;  // [coefficient][channel]; only for encoding
    std::vector<int16_t> wide_matrix;
    int integer_max = 0;
  };
  std::vector<Transform> transforms;  // none, or one for each block of heads

  // What the integers of a block's channels say of each other: each is coded
  // as its difference to a prediction from a few that are coded before it.
  //   integer[c] = coded[c] + (sum over p of factor * integer[parent] + 2048)
  //                >> 12
  // Nothing changes but the rate: differences are of integers.
  struct Prediction {
    uint32_t channel_begin = 0, channel_count = 0;
    std::vector<uint16_t> order;   // of the channels: a permutation
    std::vector<uint8_t> parents;  // how many, of each channel of the order
    std::vector<uint16_t> parent;  // all of them; earlier in the order
    std::vector<int16_t> factor;   // in 4096ths
    CoefficientTables tables;      // of the differences
    // Of the differences along a trellis, [level][channel]; empty: there is no
    // trellis, in this prediction and in all others of the profile.
    std::vector<uint8_t> trellis_tables;
    // Of the same in two planes, [level][triples, cells, numbers][channel];
    // empty likewise.
    std::vector<uint8_t> nested_tables;
  };
  std::vector<Prediction> predictions;  // none, or one for each block of heads
};

// What is known of one model's KV beforehand, so that records need not carry
// it: `larder calibrate` makes one from captured keys, values and queries
// (codec/FORMAT.md, "Profiles"). Immutable; shared by threads.
class Profile {
 public:
  struct Group {
    uint16_t layer_count = 0, kv_head_count = 0, key_dim = 0, value_dim = 0;
    std::vector<TensorProfile> keys, values;  // one for each layer
  };
  struct Contents {
    std::string model_name;         // for people
    std::string made_by;            // for people: what it was calibrated on
    Sha256Digest weights;           // zeros: of no model in particular
    bool unrotated_keys = true;     // keys were looked at before RoPE
    uint8_t level_count = 0;        // levels 1..level_count, finest first
    std::vector<float> divergence;  // for each level: what it costs (mean KL)
    std::vector<Group> groups;
  };

  // How the bytes are laid out; the version of the format (FORMAT.md). On disk.
  enum class Format : uint8_t { kPlain = 1, kCompressed = 2 };

  // InvalidArgument names what is missing, not finite or of the wrong size; or
  // says which transform cannot be inverted. Another version of zstd may make
  // other compressed bytes, and so another id, of the same contents.
  static StatusOr<std::shared_ptr<const Profile>> Make(
      Contents contents, Format format = Format::kCompressed);
  // What a profile is read for. Decoding needs no inverses of transforms, which
  // take seconds for a large model; who encodes with a profile that was read
  // for decoding has one without transforms.
  enum class Use : uint8_t { kEncoding, kDecoding };
  // Untrusted bytes, of any format. DataLoss; InvalidArgument as above.
  static StatusOr<std::shared_ptr<const Profile>> Parse(
      ByteSpan bytes, Use use = Use::kEncoding);

  const ProfileId& id() const { return id_; }  // SHA-256 of bytes()
  // What was read, or what is to be stored.
  const std::string& bytes() const { return bytes_; }
  const Contents& contents() const { return contents_; }
  Format format() const;

  // Whether layers of so many planes are coded along a trellis. Where those of
  // one plane are and those of two are not (profiles from before there were
  // tables for it), two planes are steps: a fifth to a quarter more bytes than
  // one. Only calibrating again gives these tables.
  bool HasTrellis(int planes) const;
  bool PlanesAreSteps() const { return HasTrellis(1) && !HasTrellis(2); }

 private:
  Profile(Contents contents, std::string bytes);
  Contents contents_;
  std::string bytes_;
  ProfileId id_;
};

// Of its bytes, and of what they hold when they are not compressed.
inline constexpr uint64_t kMaxProfileBytes = 256_MiB;
inline constexpr uint8_t kMaxProfileLevels = 9;

}  // namespace larder

#endif  // LARDER_CODEC_PROFILE_H_
