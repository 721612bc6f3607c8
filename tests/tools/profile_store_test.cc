#include "tools/profile_store.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/testing/some_profile.h"
#include "tests/tools/process.h"

namespace larder {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

ByteSpan Bytes(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

void Write(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

class ProfileStoreTest : public ::testing::Test {
 protected:
  std::unique_ptr<ProfileStore> Open() {
    ProfileStore::Options options = options_;
    options.directory = folder_ / "profiles";
    options.log = [this](const std::string& line) { log_.push_back(line); };
    auto store = ProfileStore::Open(std::move(options));
    EXPECT_EQ(store.status(), absl::OkStatus());
    return store.ok() ? *std::move(store) : nullptr;
  }
  std::vector<std::string> Files() const {
    std::vector<std::string> names;
    for (const auto& entry :
         std::filesystem::directory_iterator(folder_ / "profiles")) {
      names.push_back(entry.path().filename());
    }
    std::sort(names.begin(), names.end());
    return names;
  }
  std::string File(const std::string& name) const {
    return folder_ / ("profiles/" + name);
  }
  static std::string Name(const Profile& profile, const char* suffix) {
    return ToHex(profile.id()) + suffix;
  }

  const TestFolder folder_;
  ProfileStore::Options options_;
  std::vector<std::string> log_;
  const std::shared_ptr<const Profile> one_ = SomeProfile{}.Make();
  const std::shared_ptr<const Profile> two_ = SomeProfile{.seed = 2}.Make();
};

TEST_F(ProfileStoreTest, KeepsWhatWasAddedOverARestart) {
  auto store = Open();
  auto added = store->Add(Bytes(one_->bytes()));
  ASSERT_EQ(added.status(), absl::OkStatus());
  EXPECT_TRUE(added->added);
  EXPECT_EQ(added->profile->id(), one_->id());
  added = store->Add(Bytes(one_->bytes()));
  ASSERT_EQ(added.status(), absl::OkStatus());
  EXPECT_FALSE(added->added);
  ASSERT_TRUE(store->Add(Bytes(two_->bytes())).ok());
  EXPECT_EQ(ReadWholeFile(File(Name(*one_, ".profile"))), one_->bytes());
  struct stat info {};
  ASSERT_EQ(stat(File(Name(*one_, ".profile")).c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);

  store = Open();
  ASSERT_EQ(store->List().size(), 2u);
  ASSERT_NE(store->Get(one_->id()), nullptr);
  EXPECT_EQ(store->Get(one_->id())->bytes(), one_->bytes());
  EXPECT_EQ(store->Get(two_->id())->bytes(), two_->bytes());
  EXPECT_EQ(store->Get(ProfileId{}), nullptr);
  EXPECT_THAT(log_, IsEmpty());
}

TEST_F(ProfileStoreTest, FindsByDigits) {
  auto store = Open();
  ASSERT_TRUE(store->Add(Bytes(one_->bytes())).ok());
  const std::string name = ToHex(one_->id());
  for (const size_t digits : {8, 20, 64}) {
    const auto found = store->Find(name.substr(0, digits));
    ASSERT_EQ(found.status(), absl::OkStatus());
    EXPECT_EQ(found->profile->id(), one_->id());
    EXPECT_FALSE(found->used);
  }
  for (const std::string& wrong :
       {std::string(), name.substr(0, 7), name + "0", std::string("../../etc"),
        std::string("ABCDEF0123")}) {
    EXPECT_EQ(store->Find(wrong).status().code(),
              absl::StatusCode::kInvalidArgument)
        << wrong;
  }
  const auto none = store->Find(ToHex(two_->id()));
  EXPECT_EQ(none.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(none.status().message()),
              HasSubstr("larder profile add"));
}

TEST_F(ProfileStoreTest, RefusesWhatIsNoProfile) {
  auto store = Open();
  const std::string good = one_->bytes();
  for (const std::string& wrong :
       {std::string(), std::string("LARDPRF1"), std::string(100, 'x'),
        good.substr(0, good.size() - 1), good + "x"}) {
    EXPECT_FALSE(store->Add(Bytes(wrong)).ok()) << wrong.size();
  }
  EXPECT_THAT(Files(), IsEmpty());
  EXPECT_THAT(store->List(), IsEmpty());
}

TEST_F(ProfileStoreTest, AddsFiles) {
  auto store = Open();
  Write(folder_ / "good", one_->bytes());
  const auto added = store->AddFile(folder_ / "good");
  ASSERT_EQ(added.status(), absl::OkStatus());
  EXPECT_EQ(added->profile->id(), one_->id());
  EXPECT_EQ(store->AddFile(folder_ / "none").status().code(),
            absl::StatusCode::kNotFound);
  Write(folder_ / "bad", "bad");
  EXPECT_THAT(std::string(store->AddFile(folder_ / "bad").status().message()),
              HasSubstr(folder_ / "bad"));
  EXPECT_EQ(store->AddFile(folder_.path()).status().code(),
            absl::StatusCode::kInvalidArgument);
  // Not waited for, and not read into memory.
  ASSERT_EQ(mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  EXPECT_FALSE(store->AddFile(folder_ / "pipe").ok());
  Write(folder_ / "huge", "LARDPRF1");
  std::filesystem::resize_file(folder_ / "huge", uint64_t{1} << 40);
  EXPECT_THAT(std::string(store->AddFile(folder_ / "huge").status().message()),
              HasSubstr("at most"));
}

// Whatever lies there after a crash or a rotten disk: what is not the profile
// that its name says is set aside, and all else is served.
TEST_F(ProfileStoreTest, SetsDamagedOnesAside) {
  {
    auto store = Open();
    ASSERT_TRUE(store->Add(Bytes(one_->bytes())).ok());
    ASSERT_TRUE(store->Add(Bytes(two_->bytes())).ok());
  }
  const std::string file = File(Name(*one_, ".profile"));
  const std::string bytes = one_->bytes();
  std::string flipped = bytes;
  flipped[flipped.size() / 2] ^= 1;
  for (const std::string& damaged :
       {std::string(), bytes.substr(0, 100), bytes.substr(0, bytes.size() - 1),
        bytes + "x", flipped, two_->bytes()}) {
    SCOPED_TRACE(damaged.size());
    log_.clear();
    Write(file, damaged);
    const auto store = Open();
    EXPECT_EQ(store->Get(one_->id()), nullptr);
    ASSERT_NE(store->Get(two_->id()), nullptr);
    ASSERT_EQ(log_.size(), 1u);
    EXPECT_THAT(log_[0], HasSubstr("set aside"));
    EXPECT_EQ(ReadWholeFile(File(Name(*one_, ".bad"))), damaged);
    EXPECT_FALSE(std::filesystem::exists(file));
    // It can be added again.
    ASSERT_TRUE(store->Add(Bytes(bytes)).ok());
  }
}

TEST_F(ProfileStoreTest, IgnoresWhatIsNotItsOwn) {
  {
    auto store = Open();
    ASSERT_TRUE(store->Add(Bytes(one_->bytes())).ok());
  }
  const std::string huge = Name(*two_, ".profile");
  Write(File(huge), "LARDPRF1");
  std::filesystem::resize_file(File(huge), uint64_t{1} << 40);
  Write(File(Name(*two_, ".new")), "half of a pro");
  Write(File("README"), "hello");
  Write(File("abcd.profile"), "hello");
  std::filesystem::create_directory(File(std::string(64, 'a') + ".profile"));
  std::filesystem::create_symlink("/etc/passwd",
                                  File(std::string(64, 'b') + ".profile"));
  const auto store = Open();
  ASSERT_EQ(store->List().size(), 1u);
  EXPECT_EQ(store->List()[0].profile->id(), one_->id());
  ASSERT_EQ(log_.size(), 1u);
  EXPECT_THAT(log_[0], HasSubstr("more than may be kept"));
  EXPECT_FALSE(std::filesystem::exists(File(Name(*two_, ".new"))));
  EXPECT_TRUE(std::filesystem::exists(File("README")));
}

// The disk fails at every step of adding: it is an error, nothing is kept that
// was not made durable, what was there stays, and it can be tried again.
TEST_F(ProfileStoreTest, SurvivesADiskThatFails) {
  struct Fault {
    const char* what;
    int write_error = 0, sync_error = 0, rename_error = 0;
    int at_sync = 1;
    absl::StatusCode code{};
  };
  for (const Fault& fault :
       {Fault{"full", ENOSPC, 0, 0, 1, absl::StatusCode::kResourceExhausted},
        Fault{"write", EIO, 0, 0, 1, absl::StatusCode::kUnavailable},
        Fault{"sync", 0, EIO, 0, 1, absl::StatusCode::kUnavailable},
        Fault{"rename", 0, 0, EACCES, 1, absl::StatusCode::kPermissionDenied},
        Fault{"folder", 0, EIO, 0, 2, absl::StatusCode::kUnavailable}}) {
    SCOPED_TRACE(fault.what);
    std::filesystem::remove_all(folder_ / "profiles");
    options_ = {};
    {
      auto store = Open();
      ASSERT_TRUE(store->Add(Bytes(one_->bytes())).ok());
    }
    bool failing = true;
    int syncs = 0;
    options_.calls.write = [&](int fd, const void* from, size_t size) {
      if (!failing || fault.write_error == 0) return write(fd, from, size);
      // Some of it arrives first.
      if (lseek(fd, 0, SEEK_CUR) == 0) return write(fd, from, size / 2);
      errno = fault.write_error;
      return ssize_t{-1};
    };
    options_.calls.sync = [&](int fd) {
      if (!failing || ++syncs != fault.at_sync || fault.sync_error == 0) {
        return fsync(fd);
      }
      errno = fault.sync_error;
      return -1;
    };
    options_.calls.rename = [&](const char* from, const char* to) {
      if (!failing || fault.rename_error == 0) return rename(from, to);
      errno = fault.rename_error;
      return -1;
    };
    auto store = Open();
    EXPECT_EQ(store->Add(Bytes(two_->bytes())).status().code(), fault.code);
    EXPECT_EQ(store->Get(two_->id()), nullptr);
    ASSERT_NE(store->Get(one_->id()), nullptr);
    for (const std::string& file : Files()) {
      EXPECT_THAT(file, testing::Not(testing::EndsWith(".new")));
    }
    failing = false;
    const auto again = store->Add(Bytes(two_->bytes()));
    ASSERT_EQ(again.status(), absl::OkStatus());
    EXPECT_TRUE(again->added);
    EXPECT_EQ(ReadWholeFile(File(Name(*two_, ".profile"))), two_->bytes());
    EXPECT_EQ(Open()->List().size(), 2u);
  }
}

// A short write is no error, and an interrupted one is none either.
TEST_F(ProfileStoreTest, WritesInPieces) {
  int calls = 0;
  options_.calls.write = [&](int fd, const void* from, size_t size) {
    if (++calls % 2 == 0) {
      errno = EINTR;
      return ssize_t{-1};
    }
    return write(fd, from, std::min<size_t>(size, 1000));
  };
  ASSERT_TRUE(Open()->Add(Bytes(one_->bytes())).ok());
  EXPECT_GT(calls, 2);
  EXPECT_EQ(ReadWholeFile(File(Name(*one_, ".profile"))), one_->bytes());
}

TEST_F(ProfileStoreTest, WhatCopiesMayNeedGoesByForceOnly) {
  auto store = Open();
  ASSERT_TRUE(store->Add(Bytes(one_->bytes())).ok());
  ASSERT_TRUE(store->Add(Bytes(two_->bytes())).ok());
  EXPECT_EQ(store->MarkUsed(ProfileId{}).code(), absl::StatusCode::kNotFound);
  ASSERT_EQ(store->MarkUsed(one_->id()), absl::OkStatus());
  ASSERT_EQ(store->MarkUsed(one_->id()), absl::OkStatus());
  store = Open();
  EXPECT_TRUE(store->Find(ToHex(one_->id()))->used);
  EXPECT_FALSE(store->Find(ToHex(two_->id()))->used);

  EXPECT_EQ(store->Remove(two_->id(), false), absl::OkStatus());
  EXPECT_EQ(store->Remove(two_->id(), true).code(),
            absl::StatusCode::kNotFound);
  const Status refused = store->Remove(one_->id(), false);
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("--force"));
  ASSERT_NE(store->Get(one_->id()), nullptr);
  EXPECT_EQ(store->Remove(one_->id(), true), absl::OkStatus());
  EXPECT_EQ(store->Get(one_->id()), nullptr);
  EXPECT_THAT(Files(), ElementsAre(Name(*one_, ".used")));
  // Copies that need it may still be there, whatever became of it.
  store = Open();
  EXPECT_THAT(store->List(), IsEmpty());
  ASSERT_TRUE(store->Add(Bytes(one_->bytes())).ok());
  EXPECT_TRUE(store->Find(ToHex(one_->id()))->used);
  EXPECT_FALSE(store->Remove(one_->id(), false).ok());
}

// A profile is not used before it is known, for ever, that it was.
TEST_F(ProfileStoreTest, IsNotUsedIfThatCannotBeWritten) {
  auto store = Open();
  ASSERT_TRUE(store->Add(Bytes(one_->bytes())).ok());
  options_.calls.sync = [](int) {
    errno = EIO;
    return -1;
  };
  store = Open();
  EXPECT_EQ(store->MarkUsed(one_->id()).code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(store->Find(ToHex(one_->id()))->used);
}

TEST_F(ProfileStoreTest, Bounds) {
  options_.profiles_max = 1;
  auto store = Open();
  ASSERT_TRUE(store->Add(Bytes(one_->bytes())).ok());
  EXPECT_EQ(store->Add(Bytes(two_->bytes())).status().code(),
            absl::StatusCode::kResourceExhausted);
  ASSERT_EQ(store->Remove(one_->id(), false), absl::OkStatus());
  EXPECT_TRUE(store->Add(Bytes(two_->bytes())).ok());
  options_ = {};
  options_.bytes_max = two_->bytes().size() + one_->bytes().size() - 1;
  store = Open();
  EXPECT_EQ(store->Add(Bytes(one_->bytes())).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(store->List().size(), 1u);
}

TEST_F(ProfileStoreTest, WithoutAFolderItForgets) {
  auto store = ProfileStore::Open({});
  ASSERT_TRUE(store.ok());
  ASSERT_TRUE((*store)->Add(Bytes(one_->bytes())).ok());
  ASSERT_EQ((*store)->MarkUsed(one_->id()), absl::OkStatus());
  ASSERT_NE((*store)->Get(one_->id()), nullptr);
  ASSERT_EQ((*store)->Remove(one_->id(), true), absl::OkStatus());
  EXPECT_EQ((*store)->Get(one_->id()), nullptr);
}

TEST_F(ProfileStoreTest, NoFolder) {
  ProfileStore::Options options;
  options.directory = folder_ / "none/profiles";
  EXPECT_EQ(ProfileStore::Open(options).status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace larder
