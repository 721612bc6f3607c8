// Shows which folder includes which, and keeps the arrows pointing one way.
//
// When this test surprises you, the usual cure is to move the *contract* you
// need into store/ and to let tools/ put the two classes together, not to add
// an arrow here.

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace larder {
namespace {

namespace fs = std::filesystem;

// Whom a folder may include, besides itself. Folders that are not named here
// (tools, tests) may include everything, and nothing may include them.
const std::map<std::string, std::set<std::string>>& AllowedArrows() {
  static const auto* const kArrows =
      new std::map<std::string, std::set<std::string>>{
          {"kernels", {}},
          {"store", {}},
          {"codec", {"store", "kernels"}},
          {"tiers", {"store", "kernels"}},
          {"transport", {"store"}},
          {"client", {"store", "codec", "kernels", "transport"}},
      };
  return *kArrows;
}

struct Foreign {
  const char* what;
  std::vector<std::string> headers;  // beginnings of what is included
  std::vector<std::string> homes;    // beginnings of paths that may
};

// Each foreign library is touched in one place, so that it can be replaced
// there and its types and errors are translated once.
const std::vector<Foreign>& ForeignLibraries() {
  static const auto* const kForeign = new std::vector<Foreign>{
      {"RocksDB", {"rocksdb/"}, {"tiers/"}},
      {"liburing", {"liburing"}, {"tiers/"}},
      {"gRPC", {"grpc/", "grpcpp/", "grpc++/"}, {"transport/", "tools/"}},
      {"OpenSSL's TLS", {"openssl/ssl.h"}, {"transport/"}},
      {"UCX",
       {"ucp/", "uct/", "ucs/", "ucm/"},
       {"transport/", "tools/bench/bare_ucx"}},  // what links are measured by
      {"ZeroMQ", {"zmq.h", "zmq.hpp", "zmq_addon.hpp"}, {"transport/"}},
      {"MessagePack", {"msgpack"}, {"transport/"}},
      {"zstd", {"zstd", "zdict.h"}, {"codec/"}},
      {"llama.cpp",
       {"llama.h", "llama-", "ggml"},
       {"client/adapters/", "client/examples/", "tools/llama_demo",
        "tools/quality/"}},
      {"nanobind", {"nanobind/"}, {"client/python/"}},
      {"xxHash", {"xxhash.h", "xxh3.h"}, {"store/"}},
  };
  return *kForeign;
}

bool StartsWith(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

bool IsSource(const fs::path& path) {
  static const std::set<std::string> kEndings = {".h", ".hpp", ".cuh", ".inc",
                                                 ".c", ".cc",  ".cpp", ".cu"};
  return kEndings.count(path.extension().string()) != 0;
}

// What an include line names, without its quotes or brackets.
std::optional<std::string> Included(const std::string& line) {
  size_t at = line.find_first_not_of(" \t");
  if (at == std::string::npos || line[at] != '#') return std::nullopt;
  at = line.find_first_not_of(" \t", at + 1);
  if (at == std::string::npos || line.compare(at, 7, "include") != 0) {
    return std::nullopt;
  }
  at = line.find_first_of("\"<", at + 7);
  if (at == std::string::npos) return std::nullopt;
  const size_t end = line.find_first_of("\">", at + 1);
  if (end == std::string::npos) return std::nullopt;
  return line.substr(at + 1, end - at - 1);
}

struct Include {
  std::string file;    // from the root of the sources
  std::string folder;  // the file's
  std::string target;
};

// Of all sources of the folders that have arrows, and of tools/.
std::vector<Include> AllIncludes() {
  std::vector<Include> includes;
  std::vector<std::string> folders = {"tools"};
  for (const auto& [folder, allowed] : AllowedArrows()) {
    folders.push_back(folder);
  }
  const fs::path root = LARDER_SOURCE_DIR;
  for (const std::string& folder : folders) {
    if (!fs::exists(root / folder)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(
             root / folder, fs::directory_options::skip_permission_denied)) {
      if (!entry.is_regular_file() || !IsSource(entry.path())) continue;
      const std::string file =
          entry.path().lexically_relative(root).generic_string();
      std::ifstream in(entry.path());
      for (std::string line; std::getline(in, line);) {
        if (const auto target = Included(line)) {
          includes.push_back({file, folder, *target});
        }
      }
    }
  }
  return includes;
}

TEST(Layering, ArrowsPointOneWay) {
  struct Arrow {
    int includes = 0;
    std::string example;
  };
  std::map<std::pair<std::string, std::string>, Arrow> seen;
  for (const Include& include : AllIncludes()) {
    // A way around: what is not named from the root cannot be seen here.
    EXPECT_EQ(include.target.find("../"), std::string::npos)
        << include.file << " includes " << include.target
        << "; name headers from the root of the repository";
    const size_t slash = include.target.find('/');
    if (slash == std::string::npos) continue;
    const std::string target = include.target.substr(0, slash);
    const bool ours = AllowedArrows().count(target) != 0 || target == "tools" ||
                      target == "tests";
    if (!ours || target == include.folder) continue;
    Arrow& arrow = seen[{include.folder, target}];
    ++arrow.includes;
    if (arrow.example.empty()) {
      arrow.example = include.file + " includes " + include.target;
    }
    const auto allowed = AllowedArrows().find(include.folder);
    const bool fine = allowed == AllowedArrows().end()
                          ? target != "tests"
                          : allowed->second.count(target) != 0;
    EXPECT_TRUE(fine) << include.file << " includes " << include.target << ": "
                      << include.folder << " must not know " << target
                      << ".\nThe cure: state the contract that "
                      << include.folder
                      << " needs as an interface in store/, implement it in "
                      << target << ", and join the two in tools/.";
  }
  std::printf("who includes whom:\n");
  for (const auto& [ends, arrow] : seen) {
    std::printf("  %-10s -> %-10s %4d  %s\n", ends.first.c_str(),
                ends.second.c_str(), arrow.includes, arrow.example.c_str());
  }
}

TEST(Layering, ForeignLibrariesHaveOneHome) {
  std::map<std::string, std::set<std::string>> seen;
  for (const Include& include : AllIncludes()) {
    for (const Foreign& library : ForeignLibraries()) {
      bool touches = false;
      for (const std::string& header : library.headers) {
        touches = touches || StartsWith(include.target, header);
      }
      if (!touches) continue;
      seen[library.what].insert(include.folder);
      bool at_home = false;
      std::string homes;
      for (const std::string& home : library.homes) {
        at_home = at_home || StartsWith(include.file, home);
        homes += " " + home;
      }
      EXPECT_TRUE(at_home)
          << include.file << " includes " << include.target << ": "
          << library.what << " is touched only in" << homes
          << ".\nThe cure: use what that folder offers, or add to its door "
             "what you miss.";
    }
  }
  std::printf("who touches what is not ours:\n");
  for (const auto& [library, folders] : seen) {
    std::printf("  %-10s", library.c_str());
    for (const std::string& folder : folders) {
      std::printf(" %s", folder.c_str());
    }
    std::printf("\n");
  }
}

TEST(Layering, OnlyTheFoldersOfTheMap) {
  static const std::set<std::string> kFolders = {
      "client", "codec", "kernels", "store",
      "tests",  "tiers", "tools",   "transport"};
  for (const auto& entry : fs::directory_iterator(LARDER_SOURCE_DIR)) {
    const std::string name = entry.path().filename().string();
    if (!entry.is_directory() || name[0] == '.') continue;
    // Whatever people call the folders they build in.
    if (StartsWith(name, "build") || StartsWith(name, "cmake-build")) continue;
    EXPECT_EQ(kFolders.count(name), 1u)
        << name << " is a new folder at the top: does it not belong into one "
        << "that there is?";
  }
}

}  // namespace
}  // namespace larder
