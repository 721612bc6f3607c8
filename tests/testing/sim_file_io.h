#ifndef LARDER_TESTS_TESTING_SIM_FILE_IO_H_
#define LARDER_TESTS_TESTING_SIM_FILE_IO_H_

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/file_io.h"
#include "tests/testing/manual_clock.h"
#include "tests/testing/manual_executor.h"

namespace larder {

// How often a SimFileIo does wrong; each is a probability per request. Those
// named "now" of blocking calls follow the same numbers.
struct SimFaults {
  double read_error = 0;      // -EIO
  double write_error = 0;     // -EIO; some of the pages may have been written
  double sync_error = 0;      // -EIO; some of the pages are lost for good
  double again = 0;           // -EAGAIN or -EINTR; nothing happened
  double short_transfer = 0;  // some pages fewer than asked for, maybe uneven
  double zero_transfer = 0;
  double late = 0;               // completes a second later
  double twice = 0;              // the completion is delivered again, later
  double misdirected_read = 0;   // bytes of another place
  double misdirected_write = 0;  // lands at another place, reported as done
  double rot = 0;                // a write that leaves one bit wrong
};

// A disk in memory, deterministic for a seed. Requests complete on a
// ManualExecutor, in any order. What was written survives Crash only if a sync
// that was submitted after the write had completed has succeeded; names survive
// only after SyncDirectory. As on Linux, a failed sync drops an arbitrary part
// of what it covered, and no later sync brings it back.
class SimFileIo final : public FileIo {
 public:
  SimFileIo(ManualExecutor& executor, ManualClock& clock, uint64_t seed)
      : executor_(executor), clock_(clock), random_(seed) {}

  void SetFaults(const SimFaults& faults) {
    absl::MutexLock lock(&mu_);
    faults_ = faults;
  }
  // Create fails with ResourceExhausted beyond this.
  void SetSpace(uint64_t bytes) {
    absl::MutexLock lock(&mu_);
    space_bytes_ = bytes;
  }
  // The next `count` requests of a kind answer `result` and do nothing.
  void FailNext(IoRequest::Kind kind, int64_t result, int count = 1) {
    absl::MutexLock lock(&mu_);
    fail_next_[static_cast<size_t>(kind)] = {result, count};
  }
  void SetDelay(absl::Duration max_delay) {
    absl::MutexLock lock(&mu_);
    max_delay_ = max_delay;
  }

  // The power goes: of everything that is not durable an arbitrary part is
  // lost, page by page, and so are requests under way. All files are closed.
  void Crash() {
    absl::MutexLock lock(&mu_);
    DropUnderWayLocked();
    std::map<std::string, std::shared_ptr<Node>> names;
    std::set<std::string> all;
    for (const auto& [name, node] : names_) all.insert(name);
    for (const auto& [name, node] : durable_names_) all.insert(name);
    for (const std::string& name : all) {
      const auto now = names_.find(name);
      const auto before = durable_names_.find(name);
      const bool both = now != names_.end() && before != durable_names_.end() &&
                        now->second == before->second;
      if (both) {
        names[name] = now->second;
      } else if (now != names_.end() && Chance(0.5)) {
        names[name] = now->second;
      } else if (before != durable_names_.end() && Chance(0.5)) {
        names[name] = before->second;
      }
    }
    names_ = durable_names_ = std::move(names);
    for (auto& [name, node] : names_) {
      for (const uint64_t page : node->dirty) {
        if (Chance(0.5)) node->durable[page] = node->PageOf(page);
      }
      node->dirty.clear();
      node->pages = node->durable;
    }
    open_.clear();
  }

  // The process dies: everything written stays, requests under way are done in
  // part. Nothing becomes durable by that.
  void Kill() {
    absl::MutexLock lock(&mu_);
    DropUnderWayLocked();
    open_.clear();
  }

  // For tests that damage things by hand. False if there is no such file.
  bool Corrupt(const std::string& name, uint64_t offset, uint8_t mask = 1) {
    absl::MutexLock lock(&mu_);
    const auto it = names_.find(name);
    if (it == names_.end() || offset >= it->second->bytes) return false;
    Node& node = *it->second;
    const uint64_t page = offset / kPageBytes;
    for (auto* pages : {&node.pages, &node.durable}) {
      auto& bytes = (*pages)[page];
      if (bytes == nullptr) {
        bytes = std::make_shared<Page>();
      } else {
        bytes = std::make_shared<Page>(*bytes);
      }
      (*bytes)[offset % kPageBytes] ^= std::byte{mask};
    }
    return true;
  }
  void ZeroPage(const std::string& name, uint64_t page) {
    absl::MutexLock lock(&mu_);
    const auto it = names_.find(name);
    if (it == names_.end()) return;
    it->second->pages.erase(page);
    it->second->durable.erase(page);
  }
  std::vector<std::byte> Contents(const std::string& name) {
    absl::MutexLock lock(&mu_);
    const auto it = names_.find(name);
    if (it == names_.end()) return {};
    std::vector<std::byte> bytes(it->second->bytes);
    it->second->Read(0, bytes);
    return bytes;
  }
  void Put(const std::string& name, ByteSpan bytes) {
    absl::MutexLock lock(&mu_);
    auto node = std::make_shared<Node>();
    node->bytes = bytes.size();
    node->Write(0, bytes);
    node->durable = node->pages;
    node->dirty.clear();
    names_[name] = durable_names_[name] = std::move(node);
  }
  uint64_t syncs() const {
    absl::MutexLock lock(&mu_);
    return syncs_;
  }

  uint64_t read_bytes() const {
    absl::MutexLock lock(&mu_);
    return read_bytes_;
  }

  // FileIo:
  StatusOr<std::vector<FileInfo>> List() override {
    absl::MutexLock lock(&mu_);
    std::vector<FileInfo> files;
    for (const auto& [name, node] : names_)
      files.push_back({name, node->bytes});
    return files;
  }
  StatusOr<FileId> Create(const std::string& name, uint64_t bytes) override {
    absl::MutexLock lock(&mu_);
    uint64_t used = bytes;
    for (const auto& [other, node] : names_) used += node->bytes;
    if (used > space_bytes_) {
      return absl::ResourceExhaustedError(
          "No space left on device (simulated)");
    }
    if (names_.contains(name)) return absl::UnavailableError("file exists");
    auto node = std::make_shared<Node>();
    node->bytes = bytes;
    names_[name] = node;
    return OpenLocked(node);
  }
  StatusOr<FileId> Open(const std::string& name) override {
    absl::MutexLock lock(&mu_);
    const auto it = names_.find(name);
    if (it == names_.end()) return absl::NotFoundError(name);
    return OpenLocked(it->second);
  }
  void Close(FileId file) override {
    absl::MutexLock lock(&mu_);
    open_.erase(static_cast<uint32_t>(file));
  }
  Status Delete(const std::string& name) override {
    absl::MutexLock lock(&mu_);
    return names_.erase(name) == 1 ? absl::OkStatus()
                                   : absl::NotFoundError(name);
  }
  Status SyncDirectory() override {
    absl::MutexLock lock(&mu_);
    if (Chance(faults_.sync_error)) {
      return absl::UnavailableError("directory sync (simulated)");
    }
    durable_names_ = names_;
    return absl::OkStatus();
  }

  int64_t ReadNow(FileId file, uint64_t offset, MutableByteSpan into) override {
    return Now({.kind = IoRequest::Kind::kRead,
                .file = file,
                .offset = offset,
                .first = into});
  }
  int64_t WriteNow(FileId file, uint64_t offset, ByteSpan from) override {
    return Now({.kind = IoRequest::Kind::kWrite,
                .file = file,
                .offset = offset,
                .first = {const_cast<std::byte*>(from.data()), from.size()}});
  }
  int64_t SyncNow(FileId file) override {
    return Now({.kind = IoRequest::Kind::kSync, .file = file});
  }

  void Submit(std::span<const IoRequest> requests) override {
    absl::MutexLock lock(&mu_);
    for (const IoRequest& request : requests) {
      auto work = std::make_shared<Work>();
      work->request = request;
      if (request.kind == IoRequest::Kind::kSync) {
        if (Node* node = FindLocked(request.file)) Cover(*node, work->covered);
      }
      under_way_.insert(work);
      absl::Time when = clock_.Now() + Delay();
      if (Chance(faults_.late)) when += absl::Seconds(1);
      executor_.PostAt(when, [this, work] { Run(work); });
    }
  }

  void SetSink(IoSink* sink) override {
    absl::MutexLock lock(&mu_);
    if (sink == nullptr) DropUnderWayLocked();
    sink_ = sink;
  }
  void RegisterMemory(MutableByteSpan memory) override {}
  void UnregisterMemory(MutableByteSpan memory) override {}
  std::string Describe() const override { return "simulated"; }

 private:
  using Page = std::array<std::byte, kPageBytes>;
  using Pages = std::map<uint64_t, std::shared_ptr<Page>>;

  struct Node {
    uint64_t bytes = 0;
    Pages pages;    // what reads see; absent = zero. Shared pages never change
    Pages durable;  // what a crash leaves
    std::set<uint64_t> dirty;

    std::shared_ptr<Page> PageOf(uint64_t page) {
      const auto it = pages.find(page);
      return it == pages.end() ? std::make_shared<Page>() : it->second;
    }
    void Read(uint64_t offset, MutableByteSpan into) {
      for (uint64_t at = 0; at < into.size(); at += kPageBytes) {
        const auto it = pages.find((offset + at) / kPageBytes);
        if (it == pages.end()) {
          std::memset(into.data() + at, 0, kPageBytes);
        } else {
          std::memcpy(into.data() + at, it->second->data(), kPageBytes);
        }
      }
    }
    void Write(uint64_t offset, ByteSpan from) {
      for (uint64_t at = 0; at < from.size(); at += kPageBytes) {
        auto page = std::make_shared<Page>();
        std::memcpy(page->data(), from.data() + at,
                    std::min<uint64_t>(kPageBytes, from.size() - at));
        pages[(offset + at) / kPageBytes] = std::move(page);
        dirty.insert((offset + at) / kPageBytes);
      }
    }
  };
  struct Work {
    IoRequest request;
    Pages covered;  // of a sync: what it makes durable
    bool dropped = false;
  };

  bool Chance(double probability) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return probability > 0 &&
           std::uniform_real_distribution<double>(0, 1)(random_) < probability;
  }
  absl::Duration Delay() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const int64_t nanos = absl::ToInt64Nanoseconds(max_delay_);
    return nanos == 0 ? absl::ZeroDuration()
                      : absl::Nanoseconds(random_() % nanos);
  }

  FileId OpenLocked(std::shared_ptr<Node> node)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    open_[++last_id_] = std::move(node);
    return static_cast<FileId>(last_id_);
  }
  Node* FindLocked(FileId file) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const auto it = open_.find(static_cast<uint32_t>(file));
    return it == open_.end() ? nullptr : it->second.get();
  }

  void Cover(Node& node, Pages& covered) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (const uint64_t page : node.dirty) covered[page] = node.PageOf(page);
  }

  // Requests under way end somehow: writes in part.
  void DropUnderWayLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (const std::shared_ptr<Work>& work : under_way_) {
      work->dropped = true;
      Node* node = FindLocked(work->request.file);
      if (node == nullptr || work->request.kind != IoRequest::Kind::kWrite) {
        continue;
      }
      WritePagesLocked(*node, work->request, /*keep=*/0.5);
    }
    under_way_.clear();
  }

  void WritePagesLocked(Node& node, const IoRequest& request, double keep)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    uint64_t offset = request.offset;
    for (const MutableByteSpan part : {request.first, request.second}) {
      for (uint64_t at = 0; at < part.size(); at += kPageBytes) {
        if (offset + at + kPageBytes > node.bytes) return;
        if (keep < 1 && !Chance(keep)) continue;
        node.Write(offset + at, part.subspan(at, kPageBytes));
      }
      offset += part.size();
    }
  }

  void Run(const std::shared_ptr<Work>& work) {
    IoSink* sink = nullptr;
    int64_t result = 0;
    {
      absl::MutexLock lock(&mu_);
      if (work->dropped) return;
      under_way_.erase(work);
      result = PerformLocked(work->request, work->covered);
      sink = sink_;
      if (Chance(faults_.twice)) {
        executor_.PostAt(clock_.Now() + Delay() + Delay(),
                         [this, work, result] {
                           IoSink* again = nullptr;
                           {
                             absl::MutexLock relock(&mu_);
                             if (work->dropped) return;
                             again = sink_;
                           }
                           if (again != nullptr) {
                             again->Complete(work->request.identity, result);
                           }
                         });
      }
    }
    if (sink != nullptr) sink->Complete(work->request.identity, result);
  }

  int64_t Now(const IoRequest& request) {
    absl::MutexLock lock(&mu_);
    Pages covered;
    if (request.kind == IoRequest::Kind::kSync) {
      if (Node* node = FindLocked(request.file)) Cover(*node, covered);
    }
    return PerformLocked(request, covered);
  }

  int64_t PerformLocked(const IoRequest& request, const Pages& covered)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    Node* node = FindLocked(request.file);
    if (node == nullptr) return -EBADF;
    auto& [planned, count] = fail_next_[static_cast<size_t>(request.kind)];
    std::optional<int64_t> fail;
    if (count > 0) {
      --count;
      fail = planned;
    }
    if (request.kind == IoRequest::Kind::kSync) {
      return SyncLocked(*node, covered, fail);
    }
    if (fail.has_value()) return *fail;
    if (Chance(faults_.again)) return Chance(0.5) ? -EAGAIN : -EINTR;
    if (Chance(faults_.zero_transfer)) return 0;
    IoRequest part = request;
    int64_t result = static_cast<int64_t>(request.bytes());
    if (request.offset >= node->bytes) return 0;
    if (Chance(faults_.short_transfer)) {
      result = 1 + static_cast<int64_t>(random_() % request.bytes());
      // Whole pages and something more, as kernels do.
      uint64_t whole = static_cast<uint64_t>(result) & ~(kPageBytes - 1);
      part.first =
          request.first.first(std::min<uint64_t>(whole, request.first.size()));
      whole -= part.first.size();
      part.second = request.second.first(whole);
    }
    if (request.kind == IoRequest::Kind::kRead) {
      if (Chance(faults_.read_error)) return -EIO;
      read_bytes_ += static_cast<uint64_t>(result);
      uint64_t offset = request.offset;
      if (Chance(faults_.misdirected_read)) offset = Elsewhere(*node, part);
      for (const MutableByteSpan into : {part.first, part.second}) {
        if (!into.empty()) node->Read(offset, into);
        offset += into.size();
      }
      return result;
    }
    if (Chance(faults_.write_error)) {
      WritePagesLocked(*node, part, 0.5);
      return -EIO;
    }
    if (Chance(faults_.misdirected_write)) {
      part.offset = Elsewhere(*node, part);
    }
    WritePagesLocked(*node, part, 1);
    if (Chance(faults_.rot) && !part.first.empty()) {
      const uint64_t page = part.offset / kPageBytes;
      auto rotten = std::make_shared<Page>(*node->PageOf(page));
      (*rotten)[random_() % kPageBytes] ^= std::byte{0x10};
      node->pages[page] = std::move(rotten);
    }
    return result;
  }

  uint64_t Elsewhere(Node& node, const IoRequest& request)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const uint64_t pages = (node.bytes - request.bytes()) / kPageBytes;
    return pages == 0 ? 0 : random_() % pages * kPageBytes;
  }

  int64_t SyncLocked(Node& node, const Pages& covered,
                     std::optional<int64_t> fail)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    ++syncs_;
    const bool failed = fail.has_value() || Chance(faults_.sync_error);
    for (const auto& [page, bytes] : covered) {
      if (!failed || Chance(0.5)) node.durable[page] = bytes;
      // After a failure the rest counts as clean: no sync writes it any more.
      if (node.PageOf(page) == bytes) node.dirty.erase(page);
    }
    return failed ? fail.value_or(-EIO) : 0;
  }

  ManualExecutor& executor_;
  ManualClock& clock_;

  mutable absl::Mutex mu_;
  std::mt19937_64 random_ ABSL_GUARDED_BY(mu_);
  SimFaults faults_ ABSL_GUARDED_BY(mu_);
  uint64_t space_bytes_ ABSL_GUARDED_BY(mu_) = ~uint64_t{0};
  absl::Duration max_delay_ ABSL_GUARDED_BY(mu_) = absl::Microseconds(200);
  std::array<std::pair<int64_t, int>, 3> fail_next_ ABSL_GUARDED_BY(mu_){};
  std::map<std::string, std::shared_ptr<Node>> names_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, std::shared_ptr<Node>> durable_names_
      ABSL_GUARDED_BY(mu_);
  std::map<uint32_t, std::shared_ptr<Node>> open_ ABSL_GUARDED_BY(mu_);
  uint32_t last_id_ ABSL_GUARDED_BY(mu_) = 0;
  std::set<std::shared_ptr<Work>> under_way_ ABSL_GUARDED_BY(mu_);
  IoSink* sink_ ABSL_GUARDED_BY(mu_) = nullptr;
  uint64_t syncs_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t read_bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_SIM_FILE_IO_H_
