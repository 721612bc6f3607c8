#ifndef LARDER_TOOLS_QUALITY_CAPTURE_FILE_H_
#define LARDER_TOOLS_QUALITY_CAPTURE_FILE_H_

#include <string>
#include <string_view>
#include <vector>

#include "store/status.h"
#include "tools/quality/kv.h"

namespace larder::quality {

// Capture files (FORMAT.md). libllama is not needed to read them.

// REQUIRES: every layer has the same tensors, of the sizes the shape says; a
// tensor that is empty in the first layer is left out.
std::string EncodeCapture(const Capture& capture);
// InvalidArgument for what is no capture; DataLoss for one that is damaged.
StatusOr<Capture> DecodeCapture(std::string_view bytes);

Status WriteCapture(const Capture& capture, const std::string& path);
StatusOr<Capture> ReadCapture(const std::string& path);
// Every *.lkvq file of a folder, by name. NotFound if there is none.
StatusOr<std::vector<Capture>> ReadCaptures(const std::string& directory);

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_CAPTURE_FILE_H_
