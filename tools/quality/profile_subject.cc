#include "tools/quality/profile_subject.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"

#include "codec/kvc1/kvc1.h"
#include "tools/calibrate/calibrate.h"
#include "tools/quality/measurements.h"
#include "tools/quality/record_subject.h"

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

class ProfileSubject final : public RecordSubject {
 public:
  ProfileSubject(std::string name, std::shared_ptr<SharedProfile> shared,
                 int level, int planes, SpaceDescriptor space)
      : RecordSubject(Kvc1Codec(), std::move(space)),
        name_(std::move(name)),
        shared_(std::move(shared)),
        level_(level),
        planes_(planes),
        calibrated_(shared_->profile == nullptr) {}

  std::string name() const override { return name_; }
  std::string parameters() const override {
    return absl::StrCat("level ", level_);
  }
  bool needs_calibration() const override { return calibrated_; }
  Status Calibrate(std::span<const Capture> captures) override {
    return shared_->Calibrate(captures);
  }
  uint64_t profile_bytes() const override {
    return shared_->profile->bytes().size();
  }
  const Profile* profile() const override { return shared_->profile.get(); }

 private:
  StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                                MutableByteSpan encoded) const override {
    return kvc1::Encode(layer, plain, {.level = level_, .planes = planes_},
                        encoded);
  }

  const std::string name_;
  const std::shared_ptr<SharedProfile> shared_;
  const int level_, planes_;
  const bool calibrated_;
};

// A curve for each number of planes.
Subjects MakeLevels(const std::string& name,
                    const std::shared_ptr<SharedProfile>& shared, int levels,
                    const SpaceDescriptor& space, std::span<const int> planes) {
  Subjects subjects;
  for (const int count : planes) {
    for (int level = 1; level <= levels; ++level) {
      subjects.push_back(std::make_unique<ProfileSubject>(
          PlanesName(name, count), shared, level, count, space));
    }
  }
  return subjects;
}

}  // namespace

std::string PlanesName(const std::string& name, int planes) {
  return planes == 1 ? name : absl::StrCat(name, "/", planes, "-planes");
}

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
  return {"kvc1-scalar", "kvc1-predicted", "kvc1-trellis", "kvc1-klt"};
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
