#ifndef LARDER_TOOLS_FORMAT_H_
#define LARDER_TOOLS_FORMAT_H_

#include <cstdint>
#include <string>

#include "absl/time/time.h"

namespace larder {

// For people: "0 B", "512 B", "1.5 KiB", "12 MiB", "3.2 GiB".
std::string FormatBytes(uint64_t bytes);
// "now", "12s", "3m", "5h", "2d": one unit, rounded down.
std::string FormatAge(absl::Duration age);
// "12.3 %", "-" where there is nothing to divide by.
std::string FormatRatio(uint64_t part, uint64_t whole);

}  // namespace larder

#endif  // LARDER_TOOLS_FORMAT_H_
