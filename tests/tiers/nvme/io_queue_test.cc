// The queue that believes no completion, against a medium that answers as the
// test says.

#include "tiers/nvme/io_queue.h"

#include <cerrno>
#include <deque>
#include <vector>

#include "gtest/gtest.h"

#include "tests/testing/page_buffer.h"

namespace larder {
namespace {

// Keeps what was submitted; the test completes it.
class ScriptedIo final : public FileIo {
 public:
  StatusOr<std::vector<FileInfo>> List() override {
    return std::vector<FileInfo>();
  }
  StatusOr<FileId> Create(const std::string&, uint64_t) override {
    return FileId{1};
  }
  StatusOr<FileId> Open(const std::string&) override { return FileId{1}; }
  void Close(FileId) override {}
  Status Delete(const std::string&) override { return absl::OkStatus(); }
  Status SyncDirectory() override { return absl::OkStatus(); }
  int64_t ReadNow(FileId, uint64_t, MutableByteSpan) override { return Next(); }
  int64_t WriteNow(FileId, uint64_t, ByteSpan) override { return Next(); }
  int64_t SyncNow(FileId) override { return Next(); }
  void Submit(std::span<const IoRequest> requests) override {
    submitted.insert(submitted.end(), requests.begin(), requests.end());
  }
  void SetSink(IoSink* sink) override { sink_ = sink; }
  void RegisterMemory(MutableByteSpan) override {}
  void UnregisterMemory(MutableByteSpan) override {}
  std::string Describe() const override { return "scripted"; }

  // Completes the oldest.
  IoRequest Answer(int64_t result) {
    const IoRequest request = submitted.front();
    submitted.pop_front();
    sink_->Complete(request.identity, result);
    return request;
  }
  IoRequest AnswerInFull() {
    return Answer(static_cast<int64_t>(submitted.front().bytes()));
  }
  void Complete(uint64_t identity, int64_t result) {
    sink_->Complete(identity, result);
  }
  int64_t Next() {
    const int64_t result = now.empty() ? -EIO : now.front();
    if (!now.empty()) now.pop_front();
    return result;
  }

  std::deque<IoRequest> submitted;
  std::deque<int64_t> now;

 private:
  IoSink* sink_ = nullptr;
};

struct TestTransfer final : Transfer {
  void Finish(const Status& status) override {
    ++finished;
    result = status;
  }
  int finished = 0;
  Status result = absl::UnknownError("not finished");
};

class IoQueueTest : public testing::Test {
 protected:
  TestTransfer Make(IoRequest::Kind kind, uint64_t offset, uint64_t bytes) {
    TestTransfer transfer;
    transfer.kind = kind;
    transfer.turn = kind == IoRequest::Kind::kRead    ? Transfer::Class::kRead
                    : kind == IoRequest::Kind::kWrite ? Transfer::Class::kWrite
                                                      : Transfer::Class::kSync;
    transfer.file_id = FileId{1};
    transfer.offset = offset;
    transfer.body = memory_.span().first(bytes);
    return transfer;
  }
  TestTransfer Read(uint64_t bytes) {
    return Make(IoRequest::Kind::kRead, 64_KiB, bytes);
  }

  PageBuffer memory_{256_KiB};
  ScriptedIo io_;
  IoQueue queue_{io_, /*depth=*/4, /*piece_bytes=*/16_KiB};
};

TEST_F(IoQueueTest, SplitsIntoPiecesAndFinishesAfterTheLast) {
  TestTransfer read = Read(40_KiB);
  queue_.Start(&read);
  ASSERT_EQ(io_.submitted.size(), 3u);
  EXPECT_EQ(io_.submitted[0].offset, 64_KiB);
  EXPECT_EQ(io_.submitted[1].offset, 80_KiB);
  EXPECT_EQ(io_.submitted[2].offset, 96_KiB);
  EXPECT_EQ(io_.submitted[2].bytes(), 8_KiB);
  io_.AnswerInFull();
  io_.AnswerInFull();
  EXPECT_EQ(read.finished, 0);
  io_.AnswerInFull();
  EXPECT_EQ(read.finished, 1);
  EXPECT_TRUE(read.result.ok());
}

TEST_F(IoQueueTest, HeaderGoesWithTheFirstPiece) {
  PageBuffer header(kPageBytes);
  TestTransfer write = Make(IoRequest::Kind::kWrite, 0, 20_KiB);
  write.header = header.span();
  queue_.Start(&write);
  ASSERT_EQ(io_.submitted.size(), 2u);
  EXPECT_EQ(io_.submitted[0].first.data(), header.data());
  EXPECT_EQ(io_.submitted[0].second.data(), memory_.data());
  EXPECT_EQ(io_.submitted[0].bytes(), 20_KiB);
  EXPECT_EQ(io_.submitted[1].offset, 20_KiB);
  EXPECT_EQ(io_.submitted[1].bytes(), 4_KiB);
  io_.AnswerInFull();
  io_.AnswerInFull();
  EXPECT_TRUE(write.result.ok());
}

TEST_F(IoQueueTest, KeepsNoMoreThanItsDepthUnderWay) {
  std::vector<TestTransfer> reads(10, Read(4_KiB));
  for (TestTransfer& read : reads) queue_.Start(&read);
  EXPECT_EQ(io_.submitted.size(), 4u);
  for (int i = 0; i < 10; ++i) io_.AnswerInFull();
  for (const TestTransfer& read : reads) EXPECT_TRUE(read.result.ok());
  EXPECT_TRUE(io_.submitted.empty());
}

TEST_F(IoQueueTest, ShortCompletionIsContinuedNotBelieved) {
  TestTransfer read = Read(16_KiB);
  queue_.Start(&read);
  io_.Answer(4096 + 100);  // a page and a bit: the bit is read again
  ASSERT_EQ(io_.submitted.size(), 1u);
  EXPECT_EQ(read.finished, 0);
  EXPECT_EQ(io_.submitted[0].offset, 64_KiB + 4096);
  EXPECT_EQ(io_.submitted[0].bytes(), 12_KiB);
  EXPECT_EQ(io_.submitted[0].first.data(), memory_.data() + 4096);
  io_.AnswerInFull();
  EXPECT_TRUE(read.result.ok());
  EXPECT_EQ(queue_.counters().short_completions, 1u);
}

TEST_F(IoQueueTest, ShortInsideTheHeaderContinuesThere) {
  PageBuffer header(kPageBytes);
  TestTransfer write = Make(IoRequest::Kind::kWrite, 0, 8_KiB);
  write.header = header.span();
  queue_.Start(&write);
  io_.Answer(100);
  EXPECT_EQ(io_.submitted[0].bytes(), 12_KiB);
  io_.Answer(8_KiB);  // header and one page
  EXPECT_EQ(io_.submitted[0].offset, 8_KiB);
  EXPECT_EQ(io_.submitted[0].first.data(), memory_.data() + 4096);
  EXPECT_TRUE(io_.submitted[0].second.empty());
  io_.AnswerInFull();
  EXPECT_TRUE(write.result.ok());
}

TEST_F(IoQueueTest, WithoutProgressItFailsAfterABound) {
  for (const int64_t answer :
       {int64_t{0}, int64_t{1}, int64_t{-EAGAIN}, int64_t{-EINTR}}) {
    TestTransfer read = Read(4_KiB);
    queue_.Start(&read);
    int answers = 0;
    while (read.finished == 0 && answers < 1000) {
      io_.Answer(answer);
      ++answers;
    }
    EXPECT_EQ(read.finished, 1);
    EXPECT_FALSE(read.result.ok()) << answer;
    EXPECT_LE(answers, 34);
    EXPECT_TRUE(io_.submitted.empty());
  }
}

TEST_F(IoQueueTest, MoreThanWasAskedForIsNoSuccess) {
  TestTransfer read = Read(4_KiB);
  queue_.Start(&read);
  io_.Answer(8_KiB);
  EXPECT_TRUE(absl::IsDataLoss(read.result)) << read.result;
}

TEST_F(IoQueueTest, LateAndRepeatedCompletionsAreCountedAndIgnored) {
  TestTransfer first = Read(4_KiB);
  queue_.Start(&first);
  const uint64_t stale = io_.AnswerInFull().identity;
  TestTransfer second = Read(4_KiB);
  queue_.Start(&second);
  io_.Complete(stale, 4096);       // of the first, again, for its old slot
  io_.Complete(0xffff0000, 4096);  // a slot that never was
  io_.Complete(stale + (uint64_t{7} << 32), 4096);
  EXPECT_EQ(second.finished, 0);
  EXPECT_EQ(first.finished, 1);
  io_.AnswerInFull();
  EXPECT_EQ(second.finished, 1);
  EXPECT_EQ(queue_.counters().stale_completions, 3u);
}

TEST_F(IoQueueTest, ACompletionFromBeforeARetryIsStale) {
  TestTransfer read = Read(4_KiB);
  queue_.Start(&read);
  const uint64_t identity = io_.Answer(-EAGAIN).identity;
  io_.Complete(identity, 4096);
  EXPECT_EQ(read.finished, 0);
  io_.AnswerInFull();
  EXPECT_EQ(read.finished, 1);
}

TEST_F(IoQueueTest, AnErrorOfOnePieceFailsTheWhole) {
  TestTransfer read = Read(128_KiB);  // eight pieces, four at a time
  queue_.Start(&read);
  io_.AnswerInFull();
  io_.Answer(-EIO);
  while (!io_.submitted.empty()) io_.AnswerInFull();
  EXPECT_EQ(read.finished, 1);
  EXPECT_TRUE(absl::IsDataLoss(read.result)) << read.result;
}

TEST_F(IoQueueTest, SyncsAreNeverTriedAgain) {
  for (const int64_t answer :
       {int64_t{-EIO}, int64_t{-EINTR}, int64_t{-EAGAIN}, int64_t{-ENOSPC}}) {
    TestTransfer sync = Make(IoRequest::Kind::kSync, 0, 0);
    queue_.Start(&sync);
    ASSERT_EQ(io_.submitted.size(), 1u);
    io_.Answer(answer);
    EXPECT_EQ(sync.finished, 1);
    EXPECT_FALSE(sync.result.ok());
    EXPECT_TRUE(io_.submitted.empty());
  }
  io_.now = {-EINTR};
  EXPECT_FALSE(Sync(io_, FileId{1}).ok());
  EXPECT_TRUE(io_.now.empty());
}

TEST_F(IoQueueTest, SmallReadsDoNotWaitBehindALargeWrite) {
  TestTransfer write = Make(IoRequest::Kind::kWrite, 0, 256_KiB);
  queue_.Start(&write);  // takes all four slots, twelve pieces wait
  TestTransfer read = Read(4_KiB);
  queue_.Start(&read);
  io_.AnswerInFull();
  EXPECT_EQ(io_.submitted.back().kind, IoRequest::Kind::kRead);
  while (!io_.submitted.empty()) io_.AnswerInFull();
  EXPECT_TRUE(write.result.ok());
  EXPECT_TRUE(read.result.ok());
}

TEST_F(IoQueueTest, StopFinishesEverythingWithCancelled) {
  std::vector<TestTransfer> reads(3, Read(64_KiB));
  for (TestTransfer& read : reads) queue_.Start(&read);
  io_.AnswerInFull();
  queue_.Stop();
  for (const TestTransfer& read : reads) {
    EXPECT_EQ(read.finished, 1);
    EXPECT_TRUE(absl::IsCancelled(read.result)) << read.result;
  }
  TestTransfer late = Read(4_KiB);
  queue_.Start(&late);
  EXPECT_TRUE(absl::IsCancelled(late.result));
}

TEST_F(IoQueueTest, BlockingTransfersContinueAndStop) {
  PageBuffer buffer(16_KiB);
  io_.now = {4096 + 5, -EINTR, -EAGAIN, 8192, 4096};
  EXPECT_TRUE(ReadAll(io_, FileId{1}, 0, buffer.span()).ok());
  io_.now = {4096, -EIO};
  EXPECT_TRUE(absl::IsDataLoss(ReadAll(io_, FileId{1}, 0, buffer.span())));
  io_.now = {-ENOSPC};
  EXPECT_TRUE(
      absl::IsResourceExhausted(WriteAll(io_, FileId{1}, 0, buffer.span())));
  io_.now.assign(40, 0);
  EXPECT_TRUE(absl::IsDataLoss(ReadAll(io_, FileId{1}, 0, buffer.span())));
  io_.now = {32768};
  EXPECT_FALSE(ReadAll(io_, FileId{1}, 0, buffer.span()).ok());
}

}  // namespace
}  // namespace larder
