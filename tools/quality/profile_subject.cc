#include "tools/quality/profile_subject.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"

#include "codec/kvc1/kvc1.h"
#include "store/record.h"
#include "store/units.h"
#include "tools/calibrate/calibrate.h"
#include "tools/quality/measurements.h"

namespace larder::quality {
namespace {

constexpr int kCalibratedLevels = 5;

// A profile that several subjects share, and how it is made if it is not there.
struct SharedProfile {
  std::shared_ptr<const Profile> profile;
  calibrate::Options options;
  std::string measurements;

  Status Calibrate(std::span<const Capture> captures) {
    if (profile != nullptr) return absl::OkStatus();
    calibrate::Samples samples;
    for (const Capture& capture : captures) {
      LARDER_RETURN_IF_ERROR(samples.Add(capture));
    }
    Measurements read;
    if (!measurements.empty()) {
      LARDER_ASSIGN_OR_RETURN(read, ReadMeasurements(measurements));
    }
    LARDER_ASSIGN_OR_RETURN(
        profile, calibrate::Calibrate(
                     samples, measurements.empty() ? nullptr : &read, options));
    return absl::OkStatus();
  }
};

class ProfileSubject final : public QualitySubject {
 public:
  ProfileSubject(std::string name, std::shared_ptr<SharedProfile> shared,
                 int level, int planes, SpaceDescriptor space)
      : name_(std::move(name)),
        shared_(std::move(shared)),
        level_(level),
        planes_(planes),
        calibrated_(shared_->profile == nullptr),
        space_(std::move(space)) {}

  std::string name() const override { return name_; }
  std::string parameters() const override {
    return planes_ == 1 ? absl::StrCat("level ", level_)
                        : absl::StrCat("level ", level_, ", planes ", planes_);
  }
  bool needs_calibration() const override { return calibrated_; }
  Status Calibrate(std::span<const Capture> captures) override {
    return shared_->Calibrate(captures);
  }
  uint64_t profile_bytes() const override {
    return shared_->profile->bytes().size();
  }

  StatusOr<Rate> Apply(KvPrefix& prefix) const override {
    const ModelShape& shape = prefix.shape;
    Rate sum;
    for (uint32_t begin = 0; begin < prefix.tokens; begin += kChunkTokens) {
      const uint32_t tokens = std::min(kChunkTokens, prefix.tokens - begin);
      LARDER_ASSIGN_OR_RETURN(const RecordLayout layout,
                              LayoutRecord(space_.groups[0], Part(), tokens));
      uint64_t record = layout.payload_offset;
      for (uint32_t layer = 0; layer < shape.layers; ++layer) {
        LARDER_ASSIGN_OR_RETURN(const uint64_t bytes,
                                ApplyTo(prefix, layer, begin, tokens));
        record = RoundUp(record, kSegmentAlign) + bytes;
      }
      // Chunks that are not full count only if there is no full one.
      if (tokens == kChunkTokens || prefix.tokens < kChunkTokens) {
        sum +=
            Rate{8 * record, uint64_t{tokens} * 2 * shape.row() * shape.layers};
      }
    }
    return sum;
  }

 private:
  PartShape Part() const {
    return {.layer_begin = 0,
            .layer_count = space_.groups[0].layer_count,
            .head_begin = 0,
            .head_count = space_.groups[0].kv_head_count};
  }

  StatusOr<uint64_t> ApplyTo(KvPrefix& prefix, uint32_t index, uint32_t begin,
                             uint32_t tokens) const {
    const CodedLayer layer{.space = &space_,
                           .group = GroupIndex{0},
                           .shape = Part(),
                           .layer = index,
                           .token_begin = begin,
                           .token_count = tokens,
                           .profile = shared_->profile.get()};
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, {}));
    LARDER_RETURN_IF_ERROR(Kvc1Codec().Supports(layer));
    const size_t row = prefix.shape.row();
    const size_t half = tokens * row * sizeof(uint16_t);
    uint16_t* const keys = prefix.layers[index].keys.data() + begin * row;
    uint16_t* const values = prefix.layers[index].values.data() + begin * row;
    std::vector<std::byte> plain(2 * half);
    std::memcpy(plain.data(), keys, half);
    std::memcpy(plain.data() + half, values, half);
    std::vector<std::byte> encoded(Kvc1Codec().EncodedBytesMax(layer));
    LARDER_ASSIGN_OR_RETURN(
        const EncodedLayer result,
        kvc1::Encode(layer, plain, {.level = level_, .planes = planes_},
                     encoded));
    LARDER_RETURN_IF_ERROR(Kvc1Codec().Decode(
        layer, {}, ByteSpan(encoded).first(result.bytes), plain));
    std::memcpy(keys, plain.data(), half);
    std::memcpy(values, plain.data() + half, half);
    return result.bytes;
  }

  const std::string name_;
  const std::shared_ptr<SharedProfile> shared_;
  const int level_, planes_;
  const bool calibrated_;
  const SpaceDescriptor space_;
};

Subjects MakeLevels(const std::string& name,
                    const std::shared_ptr<SharedProfile>& shared, int levels,
                    const SpaceDescriptor& space, int planes) {
  Subjects subjects;
  for (int level = 1; level <= levels; ++level) {
    subjects.push_back(
        std::make_unique<ProfileSubject>(name, shared, level, planes, space));
  }
  return subjects;
}

}  // namespace

StatusOr<std::shared_ptr<const Profile>> ReadProfile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError("cannot read " + path);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  StatusOr<std::shared_ptr<const Profile>> profile =
      Profile::Parse(std::as_bytes(std::span(bytes)));
  if (!profile.ok()) return Annotate(profile.status(), path);
  return profile;
}

Subjects MakeProfileSubjects(const std::string& name,
                             std::shared_ptr<const Profile> profile,
                             const SpaceDescriptor& space,
                             const ProfileSubjectOptions& options) {
  auto shared = std::make_shared<SharedProfile>();
  shared->profile = std::move(profile);
  return MakeLevels(name, shared, shared->profile->contents().level_count,
                    space, options.planes);
}

std::vector<std::string> ProfileSubjectNames() {
  return {"kvc1-scalar", "kvc1-predicted", "kvc1-klt"};
}

StatusOr<Subjects> MakeCalibratedSubjects(
    const std::string& name, const SpaceDescriptor& space,
    const ProfileSubjectOptions& options) {
  const std::vector<std::string> names = ProfileSubjectNames();
  if (std::find(names.begin(), names.end(), name) == names.end()) {
    return absl::NotFoundError(absl::StrCat("no subject is called ", name));
  }
  auto shared = std::make_shared<SharedProfile>();
  LARDER_ASSIGN_OR_RETURN(
      shared->options.mode,
      calibrate::ParseMode(name.substr(std::string("kvc1-").size())));
  shared->options.parents = options.parents;
  shared->options.threads = options.threads;
  shared->options.made_by = "larder_quality";
  shared->measurements = options.measurements;
  return MakeLevels(name, shared, kCalibratedLevels, space, options.planes);
}

}  // namespace larder::quality
