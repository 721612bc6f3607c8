#include "tools/bench/demo_engine.h"

#include <nlohmann/json.hpp>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <filesystem>

namespace larder::bench {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

// The folder of the source tree in which this program was built.
fs::path SourceTree() {
  std::error_code error;
  return fs::read_symlink("/proc/self/exe", error)
      .parent_path()
      .parent_path()
      .parent_path()
      .parent_path();
}

}  // namespace

StatusOr<DemoProgram> FindDemoEngine(const BenchOptions& options) {
  const fs::path tree = SourceTree();
  DemoProgram engine;
  std::error_code error;
  engine.program = fs::read_symlink("/proc/self/exe", error).parent_path() /
                   "larder_demo_engine";
  engine.model =
      options.model.empty()
          ? (tree / ".deps/model/SmolLM2-135M-Instruct.Q4_1.gguf").string()
          : options.model;
  engine.text = options.text.empty()
                    ? (tree / "tools/llama_demo/prose.txt").string()
                    : options.text;
  for (const std::string& file : {engine.program, engine.model, engine.text}) {
    if (!fs::exists(file)) {
      return absl::NotFoundError(
          absl::StrCat(file,
                       " is not there; run tools/build, or pass --model "
                       "and --text"));
    }
  }
  return engine;
}

StatusOr<json> RunDemoEngine(const DemoProgram& engine,
                             const std::string& socket,
                             const std::string& arguments) {
  const std::string command = absl::StrCat(
      "'", engine.program, "' --model '", engine.model, "' --text '",
      engine.text, "' --socket '", socket, "' ", arguments);
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return absl::InternalError("cannot start a shell");
  std::string output;
  std::array<char, 4096> piece;
  for (size_t n; (n = fread(piece.data(), 1, piece.size(), pipe)) > 0;) {
    output.append(piece.data(), n);
  }
  const int status = pclose(pipe);
  json result = json::parse(output, nullptr, false);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0 || result.is_discarded()) {
    return absl::InternalError(absl::StrCat("the engine failed: ", command));
  }
  return result;
}

Status WithDemoAnswers(absl::FunctionRef<Status()> run) {
  try {
    return run();
  } catch (const nlohmann::json::exception& error) {
    return absl::InternalError(
        absl::StrCat("larder_demo_engine answered something else than this "
                     "program expects: ",
                     error.what()));
  }
}

}  // namespace larder::bench
