// The launches of tests/kernels/simt, carried out by the PTX interpreter: the
// executor's tests, linked with this in place of the executor and its kernels,
// run what nvcc made of the same kernels. Environment:
//
//   LARDER_PTX   the file with the kernels
//   LARDER_BULK  kernels, apart by commas, each NAME[/BYTES[/PERCENT]] (16
//   bytes
//                and 80 percent if not given): in all its launches together,
//                accesses to global memory of that many bytes or more touch no
//                more sectors than their bytes fill, and are that much of all
//                sectors
//   LARDER_PTX_COUNTS  set: prints what every access to memory costs
//
// Races fail the launch, as everything else that the interpreter finds.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "gtest/gtest.h"
#include <absl/strings/numbers.h>
#include <absl/strings/str_cat.h>
#include <absl/strings/str_format.h>
#include <absl/strings/str_join.h>
#include <absl/strings/str_split.h>

#include "tests/kernels/ptx/machine.h"
#include "tests/kernels/ptx/module.h"
#include "tests/kernels/simt/launch.h"
#include "tests/kernels/simt/simt.h"

namespace simt {
namespace {

namespace ptx = larder::kernels::ptx;

class Program {
 public:
  // Ends the process where there is no such program: no test could pass.
  static Program& Get() {
    static Program& program = *new Program;
    return program;
  }

  const Kernel* Find(std::string_view name) const {
    const auto it = kernels_.find(std::string(name));
    return it == kernels_.end() ? nullptr : &it->second;
  }

  std::optional<std::string> Run(const Kernel& kernel, Dim3 grid, Dim3 block,
                                 size_t shared_bytes, const void* params,
                                 size_t params_bytes, uint64_t seed) {
    ptx::Machine machine;
    for (const auto& [at, bytes] : DeviceMemory::Get().Arrays()) {
      machine.Map(at, bytes, absl::StrCat("array of ", bytes, " bytes"));
    }
    ptx::LaunchOptions options;
    options.seed = seed;
    const auto report = machine.Launch(module_, *module_.Find(kernel.name),
                                       {{grid.x, grid.y, grid.z},
                                        {block.x, block.y, block.z},
                                        static_cast<uint32_t>(shared_bytes)},
                                       params, params_bytes, options);
    if (!report.ok()) return std::string(report.status().message());
    if (!report->races.empty()) return absl::StrJoin(report->races, "\n");
    Add(kernel.name, *report);
    return std::nullopt;
  }

  // Every access of every kernel that ran.
  void Print() const {
    for (const auto& [name, counts] : counts_) {
      for (const ptx::Count& count : counts) {
        if (count.requests == 0) continue;
        const auto per = [&count](uint64_t n) {
          return static_cast<double>(n) / static_cast<double>(count.requests);
        };
        const char* const what =
            count.instruction->op == ptx::Op::kLd          ? "load"
            : count.instruction->op == ptx::Op::kSt        ? "store"
            : count.instruction->op == ptx::Op::kCopyAsync ? "cp.async"
                                                           : "atomic";
        absl::PrintF("%s line %d: %s of %d bytes, %d requests, ", name,
                     count.instruction->line, what, count.bytes(),
                     count.requests);
        if (count.global()) {
          absl::PrintF("%.2f sectors (ideal %.2f)\n", per(count.sectors),
                       per(count.ideal_sectors));
        } else {
          absl::PrintF("%.2f wavefronts (ideal %.2f)\n", per(count.wavefronts),
                       per(count.ideal_wavefronts));
        }
      }
    }
  }

  void CheckBulk(const std::string& kernel) const {
    const std::vector<std::string> parts = absl::StrSplit(kernel, '/');
    const std::string& name = parts[0];
    uint64_t least = 16;
    uint64_t percent = 80;
    if (parts.size() > 1) ASSERT_TRUE(absl::SimpleAtoi(parts[1], &least));
    if (parts.size() > 2) ASSERT_TRUE(absl::SimpleAtoi(parts[2], &percent));
    const auto it = counts_.find(name);
    ASSERT_NE(it, counts_.end()) << name << " was not launched";
    uint64_t all = 0;
    uint64_t wide = 0;
    for (const ptx::Count& count : it->second) {
      if (!count.global()) continue;
      all += count.sectors;
      if (count.bytes() < least) continue;
      wide += count.sectors;
      EXPECT_EQ(count.sectors, count.ideal_sectors)
          << name << ", PTX line " << count.instruction->line;
    }
    EXPECT_GE(wide * 100, percent * all)
        << name << ": " << wide << " of " << all << " sectors by accesses of "
        << least << " bytes or more";
  }

 private:
  Program() {
    const char* const path = getenv("LARDER_PTX");
    if (path == nullptr) Die("LARDER_PTX is not set");
    std::ifstream file(path);
    if (!file) Die(absl::StrCat("cannot read ", path));
    std::stringstream text;
    text << file.rdbuf();
    auto module = ptx::Parse(text.str());
    if (!module.ok()) {
      Die(absl::StrCat(path, ": ", std::string(module.status().message())));
    }
    module_ = *std::move(module);
    for (const ptx::Kernel& kernel : module_.kernels) {
      kernels_[kernel.name] = {kernel.name.c_str(), nullptr, kernel.param_bytes,
                               kernel.max_threads};
    }
  }

  [[noreturn]] static void Die(const std::string& why) {
    fprintf(stderr, "%s\n", why.c_str());
    _Exit(2);
  }

  void Add(const std::string& name, const ptx::Report& report) {
    std::vector<ptx::Count>& counts = counts_[name];
    counts.resize(report.counts.size());
    for (size_t n = 0; n < counts.size(); ++n) counts[n] += report.counts[n];
  }

  ptx::Module module_;
  std::map<std::string, Kernel> kernels_;
  std::map<std::string, std::vector<ptx::Count>> counts_;
};

class Environment : public testing::Environment {
 public:
  void SetUp() override { Program::Get(); }
  void TearDown() override {
    if (getenv("LARDER_PTX_COUNTS") != nullptr) Program::Get().Print();
    const char* const bulk = getenv("LARDER_BULK");
    if (bulk == nullptr) return;
    for (const std::string& name :
         std::vector<std::string>(absl::StrSplit(bulk, ','))) {
      Program::Get().CheckBulk(name);
    }
  }
};

const testing::Environment* const environment =
    testing::AddGlobalTestEnvironment(new Environment);

}  // namespace

const Kernel* FindKernel(std::string_view name) {
  return Program::Get().Find(name);
}

std::optional<std::string> Launch(const Kernel& kernel, Dim3 grid, Dim3 block,
                                  size_t shared_bytes, const void* params,
                                  size_t params_bytes,
                                  const Schedule& schedule) {
  return Program::Get().Run(kernel, grid, block, shared_bytes, params,
                            params_bytes, schedule.seed);
}

}  // namespace simt
