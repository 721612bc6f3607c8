#ifndef LARDER_TOOLS_QUALITY_RESULTS_H_
#define LARDER_TOOLS_QUALITY_RESULTS_H_

#include <map>
#include <string>
#include <tuple>

#include "store/status.h"
#include "tools/quality/figures.h"

namespace larder::quality {

// What figures of a text depend on beside the text.
struct PointKey {
  std::string weights;  // digest of the model's file
  std::string domain;
  std::string codec, parameters;
  std::string profile;  // PointFigures::profile

  auto operator<=>(const PointKey&) const = default;
};

// What runs measured, of every point and text: the part "measured" of their
// file (FORMAT.md, "Results"). One thread at a time.
class Results {
 public:
  // Of the file that an earlier run wrote; empty if there is none.
  // FailedPrecondition if it is no such file.
  static StatusOr<Results> Read(const std::string& path);
  static StatusOr<Results> Parse(const std::string& contents);

  // Null if it is not there. `text` is its digest. Lives until it is put or
  // forgotten.
  const TextFigures* Find(const PointKey& key, const std::string& text) const;
  void Put(const PointKey& key, const std::string& text,
           const TextFigures& figures);
  void Forget(const PointKey& key);

  // A JSON object: the members of `figures`, which is the text of one without
  // "measured", then what was measured, a line for each text.
  std::string Format(const std::string& figures) const;
  // As it is formatted, into a file that is whole at any time.
  Status Write(const std::string& path, const std::string& figures) const;

 private:
  std::map<PointKey, std::map<std::string, TextFigures>> points_;
};

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_RESULTS_H_
