#ifndef LARDER_TESTS_TOOLS_DAEMON_UNDER_TEST_H_
#define LARDER_TESTS_TOOLS_DAEMON_UNDER_TEST_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

#include "tests/tools/process.h"

namespace larder {

// A real larderd process in a folder of its own, as small as it goes.
class DaemonUnderTest {
 public:
  explicit DaemonUnderTest(const TestFolder& folder) : folder_(folder) {}

  std::string socket() const { return folder_ / "engine.sock"; }
  std::string admin() const { return folder_ / "admin.sock"; }

  std::vector<std::string> Arguments() const {
    std::vector<std::string> arguments = {
        absl::StrCat("--server.socket=", socket()),
        absl::StrCat("--admin.socket=", admin()),
        "--dram.capacity=32MiB",
        "--dram.slab=8MiB",
        "--dram.huge_pages=never",
        "--engine.copy_workers=2"};
    arguments.insert(arguments.end(), extra.begin(), extra.end());
    return arguments;
  }

  Process& Start(std::vector<std::string> environment = {}) {
    process_ = std::make_unique<Process>(folder_, "larderd", Arguments(),
                                         std::move(environment));
    return *process_;
  }
  // Until it says so in the log, or ended.
  bool WaitReady() {
    return Eventually([this] {
             return absl::StrContains(process_->err(), " ready: serving") ||
                    !process_->Running();
           }) &&
           process_->Running();
  }
  // With a durable tier, as small as it goes.
  void WithNvme() {
    const std::string path = folder_ / "nvme";
    std::filesystem::create_directory(path);
    extra.insert(extra.end(),
                 {absl::StrCat("--nvme.path=", path), "--nvme.capacity=64MiB",
                  "--nvme.segment_file=4MiB"});
  }

  Process& process() { return *process_; }

  std::vector<std::string> extra;

 private:
  const TestFolder& folder_;
  std::unique_ptr<Process> process_;
};

}  // namespace larder

#endif  // LARDER_TESTS_TOOLS_DAEMON_UNDER_TEST_H_
