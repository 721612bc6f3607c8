#ifndef LARDER_TOOLS_QUALITY_PROFILE_SUBJECT_H_
#define LARDER_TOOLS_QUALITY_PROFILE_SUBJECT_H_

#include <memory>
#include <string>
#include <vector>

#include "codec/profile.h"
#include "store/status.h"
#include "tools/quality/subject.h"

namespace larder::quality {

StatusOr<std::shared_ptr<const Profile>> ReadProfile(const std::string& path);

struct ProfileSubjectOptions {
  // Of a subject that calibrates itself: sensitivities, or "" (worse).
  std::string measurements;
  int parents = 8;
  uint32_t threads = 1;
  std::vector<int> planes = {1};  // that objects are encoded in: a curve each
};

// What the curve of `name` is called with objects in so many planes: `name`
// itself for one.
std::string PlanesName(const std::string& name, int planes);

// kvc1 with a profile that is given: each of its levels. Its bytes count.
Subjects MakeProfileSubjects(const std::string& name,
                             std::shared_ptr<const Profile> profile,
                             const SpaceDescriptor& space,
                             const ProfileSubjectOptions& options);

// "kvc1-scalar", "kvc1-predicted", "kvc1-klt": kvc1 with a profile made from
// the calibration texts. NotFound for other names.
std::vector<std::string> ProfileSubjectNames();
StatusOr<Subjects> MakeCalibratedSubjects(const std::string& name,
                                          const SpaceDescriptor& space,
                                          const ProfileSubjectOptions& options);

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_PROFILE_SUBJECT_H_
