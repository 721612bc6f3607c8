// What Larder relies on of a CUDA driver, held by the stand-in on every run and
// by the real one wherever there is a device (ctest -L gpu).

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "tests/client/child_process.h"
#include "tests/testing/cuda_device.h"

namespace larder {
namespace {

constexpr size_t kBytes = 64 << 10;

std::vector<uint32_t> Numbers(uint32_t first, size_t count = kBytes / 4) {
  std::vector<uint32_t> numbers(count);
  for (size_t i = 0; i < count; ++i) {
    numbers[i] = first + static_cast<uint32_t>(i) * 2654435761u;
  }
  return numbers;
}

// Pinned host memory, for the time of a test.
class Pinned {
 public:
  Pinned(const cuda::Driver& driver, size_t bytes) : driver_(driver) {
    LARDER_EXPECT_CUDA(driver.mem_host_alloc(&memory_, bytes, 0));
  }
  ~Pinned() { LARDER_EXPECT_CUDA(driver_.mem_free_host(memory_)); }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  uint32_t* words() const { return static_cast<uint32_t*>(memory_); }
  void* memory() const { return memory_; }

 private:
  const cuda::Driver& driver_;
  void* memory_ = nullptr;
};

class DriverTest : public DeviceTest {
 protected:
  cuda::DevicePtr Alloc(size_t bytes) {
    cuda::DevicePtr memory_dev = 0;
    LARDER_EXPECT_CUDA(driver().mem_alloc(&memory_dev, bytes));
    return memory_dev;
  }
  cuda::Stream NewStream() {
    cuda::Stream stream = nullptr;
    LARDER_EXPECT_CUDA(
        driver().stream_create(&stream, cuda::kStreamNonBlocking));
    return stream;
  }
  cuda::Event NewEvent(unsigned flags = cuda::kEventDisableTiming) {
    cuda::Event event = nullptr;
    LARDER_EXPECT_CUDA(driver().event_create(&event, flags));
    return event;
  }
  std::vector<uint32_t> ReadBack(cuda::DevicePtr memory_dev,
                                 size_t count = kBytes / 4) {
    std::vector<uint32_t> words(count);
    const cuda::Stream stream = NewStream();
    LARDER_EXPECT_CUDA(
        driver().memcpy_d2h_async(words.data(), memory_dev, count * 4, stream));
    LARDER_EXPECT_CUDA(driver().stream_synchronize(stream));
    LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
    return words;
  }
  cuda::MemAllocationProp Prop() {
    cuda::MemAllocationProp prop = {};
    prop.type = cuda::AllocationType::kPinned;
    prop.requested_handle_types = cuda::HandleType::kPosixFileDescriptor;
    prop.location = {cuda::LocationType::kDevice, context().device()};
    return prop;
  }
  cuda::MemAccessDesc Access() {
    return {{cuda::LocationType::kDevice, context().device()},
            cuda::AccessFlags::kReadWrite};
  }
};

TEST_F(DriverTest, SaysWhatTheDeviceIs) {
  const cuda::DeviceInfo& info = context().info();
  EXPECT_GE(driver().version(), cuda::Driver::kVersionMin);
  EXPECT_FALSE(info.name.empty());
  EXPECT_EQ(info.uuid.size(), 40u);
  EXPECT_EQ(info.uuid.substr(0, 4), "GPU-");
  EXPECT_GE(info.compute_major, 7);
  EXPECT_GT(info.multiprocessors, 0);
  EXPECT_GE(info.shared_bytes_max, uint64_t{48} << 10);
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  LARDER_ASSERT_CUDA(driver().mem_get_info(&free_bytes, &total_bytes));
  EXPECT_LE(free_bytes, total_bytes);
  EXPECT_EQ(total_bytes, info.memory_bytes);
  cuda::DeviceInfo none;
  EXPECT_EQ(GetDeviceInfo(driver(), driver().device_count(), &none).code,
            cuda::Result::kInvalidDevice);
}

TEST_F(DriverTest, CopiesThereAndBack) {
  ForSeeds(5, [&] {
    const std::vector<uint32_t> numbers = Numbers(7);
    const cuda::DevicePtr first = Alloc(kBytes);
    const cuda::DevicePtr second = Alloc(kBytes);
    const cuda::Stream stream = NewStream();
    {
      const Pinned from(driver(), kBytes);
      const Pinned to(driver(), kBytes);
      std::memcpy(from.memory(), numbers.data(), kBytes);
      LARDER_ASSERT_CUDA(
          driver().memcpy_h2d_async(first, from.memory(), kBytes, stream));
      LARDER_ASSERT_CUDA(
          driver().memcpy_d2d_async(second, first, kBytes, stream));
      LARDER_ASSERT_CUDA(
          driver().memset_d8_async(second + 16, 0xab, 3, stream));
      LARDER_ASSERT_CUDA(
          driver().memset_d32_async(second + 32, 0x01020304, 2, stream));
      LARDER_ASSERT_CUDA(
          driver().memcpy_d2h_async(to.memory(), second, kBytes, stream));
      LARDER_ASSERT_CUDA(driver().stream_synchronize(stream));
      std::vector<uint32_t> expected = numbers;
      std::memset(&expected[4], 0xab, 3);
      expected[8] = expected[9] = 0x01020304;
      EXPECT_EQ(std::memcmp(to.memory(), expected.data(), kBytes), 0);
    }
    LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
    LARDER_EXPECT_CUDA(driver().mem_free(first));
    LARDER_EXPECT_CUDA(driver().mem_free(second));
  });
}

TEST_F(DriverTest, PageableMemoryMayChangeAfterTheCall) {
  ForSeeds(5, [&] {
    std::vector<uint32_t> numbers = Numbers(1);
    const cuda::DevicePtr memory_dev = Alloc(kBytes);
    const cuda::Stream stream = NewStream();
    LARDER_ASSERT_CUDA(
        driver().memcpy_h2d_async(memory_dev, numbers.data(), kBytes, stream));
    std::fill(numbers.begin(), numbers.end(), 0u);
    LARDER_ASSERT_CUDA(driver().stream_synchronize(stream));
    EXPECT_EQ(ReadBack(memory_dev), Numbers(1));
    LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
    LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
  });
}

TEST_F(DriverTest, EventsOrderStreams) {
  ForSeeds(20, [&] {
    const cuda::DevicePtr memory_dev = Alloc(kBytes);
    const cuda::Stream producer = NewStream();
    const cuda::Stream consumer = NewStream();
    const cuda::Event written = NewEvent();
    const cuda::Event read = NewEvent();
    const Pinned from(driver(), kBytes);
    const Pinned to(driver(), kBytes);
    for (uint32_t round = 1; round <= 4; ++round) {
      LARDER_ASSERT_CUDA(
          driver().memset_d32_async(memory_dev, round, kBytes / 4, producer));
      LARDER_ASSERT_CUDA(driver().event_record(written, producer));
      LARDER_ASSERT_CUDA(driver().stream_wait_event(consumer, written, 0));
      LARDER_ASSERT_CUDA(
          driver().memcpy_d2h_async(to.memory(), memory_dev, kBytes, consumer));
      LARDER_ASSERT_CUDA(driver().event_record(read, consumer));
      // The next round's writes come after this one's reads.
      LARDER_ASSERT_CUDA(driver().stream_wait_event(producer, read, 0));
      LARDER_ASSERT_CUDA(
          driver().memset_d32_async(memory_dev, 0, kBytes / 4, producer));
      LARDER_ASSERT_CUDA(driver().event_synchronize(read));
      for (size_t i = 0; i < kBytes / 4; ++i) {
        ASSERT_EQ(to.words()[i], round) << "word " << i;
      }
      // Polling comes to an end, too.
      cuda::Error error;
      do {
        error = driver().stream_query(producer);
      } while (error.code == cuda::Result::kNotReady);
      LARDER_EXPECT_CUDA(error);
      LARDER_EXPECT_CUDA(driver().event_query(read));
    }
    LARDER_EXPECT_CUDA(driver().event_destroy(written));
    LARDER_EXPECT_CUDA(driver().event_destroy(read));
    LARDER_EXPECT_CUDA(driver().stream_destroy(producer));
    LARDER_EXPECT_CUDA(driver().stream_destroy(consumer));
    LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
  });
}

TEST_F(DriverTest, TimesBetweenEvents) {
  const cuda::Stream stream = NewStream();
  const cuda::Event begin = NewEvent(cuda::kEventDefault);
  const cuda::Event end = NewEvent(cuda::kEventDefault);
  LARDER_ASSERT_CUDA(driver().event_record(begin, stream));
  LARDER_ASSERT_CUDA(driver().event_record(end, stream));
  LARDER_ASSERT_CUDA(driver().event_synchronize(end));
  float milliseconds = -1;
  LARDER_ASSERT_CUDA(driver().event_elapsed_time(&milliseconds, begin, end));
  EXPECT_GE(milliseconds, 0.F);
  LARDER_EXPECT_CUDA(driver().event_destroy(begin));
  LARDER_EXPECT_CUDA(driver().event_destroy(end));
  LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
}

TEST_F(DriverTest, HostFunctionsRunInOrderAndMayNotCallTheDriver) {
  ForSeeds(5, [&] {
    struct Seen {
      const cuda::Driver* driver;
      uint32_t* word;
      uint32_t value = 0;
      cuda::Result answer = cuda::Result::kSuccess;
    };
    const Pinned to(driver(), 4);
    to.words()[0] = 0;
    Seen seen{&driver(), to.words()};
    const cuda::DevicePtr memory_dev = Alloc(4);
    const cuda::Stream stream = NewStream();
    LARDER_ASSERT_CUDA(driver().memset_d32_async(memory_dev, 99, 1, stream));
    LARDER_ASSERT_CUDA(
        driver().memcpy_d2h_async(to.memory(), memory_dev, 4, stream));
    LARDER_ASSERT_CUDA(driver().launch_host_func(
        stream,
        [](void* data) {
          auto* const s = static_cast<Seen*>(data);
          s->value = *s->word;
          cuda::DevicePtr unused = 0;
          s->answer = s->driver->mem_alloc(&unused, 4).code;
        },
        &seen));
    LARDER_ASSERT_CUDA(driver().stream_synchronize(stream));
    EXPECT_EQ(seen.value, 99u);
    EXPECT_EQ(seen.answer, cuda::Result::kNotPermitted);
    LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
    LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
  });
}

TEST_F(DriverTest, ValuesInMemoryHoldStreamsBack) {
  ForSeeds(10, [&] {
    const Pinned word(driver(), 4);
    std::atomic_ref<uint32_t> host_word(word.words()[0]);
    host_word = 0;
    cuda::DevicePtr word_dev = 0;
    LARDER_ASSERT_CUDA(
        driver().mem_host_get_device_pointer(&word_dev, word.memory(), 0));
    const cuda::DevicePtr flag_dev = Alloc(4);
    const cuda::Stream waiter = NewStream();
    const cuda::Stream writer = NewStream();
    LARDER_ASSERT_CUDA(driver().memset_d32_async(flag_dev, 0, 1, writer));
    LARDER_ASSERT_CUDA(driver().stream_synchronize(writer));
    LARDER_ASSERT_CUDA(
        driver().stream_wait_value32(waiter, flag_dev, 5, cuda::kWaitValueGeq));
    LARDER_ASSERT_CUDA(driver().stream_write_value32(waiter, word_dev, 1, 0));
    EXPECT_EQ(driver().stream_query(waiter).code, cuda::Result::kNotReady);
    EXPECT_EQ(host_word.load(), 0u);
    LARDER_ASSERT_CUDA(driver().stream_write_value32(writer, flag_dev, 6, 0));
    LARDER_ASSERT_CUDA(driver().stream_synchronize(waiter));
    EXPECT_EQ(host_word.load(), 1u);
    // And one that the host writes.
    LARDER_ASSERT_CUDA(
        driver().stream_wait_value32(waiter, word_dev, 8, cuda::kWaitValueEq));
    EXPECT_EQ(driver().stream_query(waiter).code, cuda::Result::kNotReady);
    host_word = 8;
    LARDER_ASSERT_CUDA(driver().stream_synchronize(waiter));
    LARDER_EXPECT_CUDA(driver().stream_destroy(waiter));
    LARDER_EXPECT_CUDA(driver().stream_destroy(writer));
    LARDER_EXPECT_CUDA(driver().mem_free(flag_dev));
  });
}

TEST_F(DriverTest, MapsPhysicalMemoryAtWill) {
  const cuda::MemAllocationProp prop = Prop();
  size_t granularity = 0;
  LARDER_ASSERT_CUDA(driver().mem_get_allocation_granularity(
      &granularity, &prop, cuda::Granularity::kMinimum));
  ASSERT_GT(granularity, 0u);
  const size_t room = 4 * granularity;
  cuda::DevicePtr base = 0;
  LARDER_ASSERT_CUDA(driver().mem_address_reserve(&base, room, 0, 0, 0));
  const cuda::Stream stream = NewStream();
  const cuda::MemAccessDesc access = Access();

  cuda::MemHandle handles[2] = {};
  for (size_t i = 0; i < 2; ++i) {
    const cuda::DevicePtr at = base + (2 * i + 1) * granularity;
    LARDER_ASSERT_CUDA(driver().mem_create(&handles[i], granularity, &prop, 0));
    LARDER_ASSERT_CUDA(driver().mem_map(at, granularity, 0, handles[i], 0));
    LARDER_ASSERT_CUDA(driver().mem_set_access(at, granularity, &access, 1));
    LARDER_ASSERT_CUDA(driver().memset_d32_async(
        at, static_cast<uint32_t>(i) + 1, granularity / 4, stream));
  }
  LARDER_ASSERT_CUDA(driver().stream_synchronize(stream));
  EXPECT_EQ(ReadBack(base + granularity, 4), std::vector<uint32_t>(4, 1));
  EXPECT_EQ(ReadBack(base + 3 * granularity, 4), std::vector<uint32_t>(4, 2));

  // The same memory at another address has the same bytes.
  LARDER_ASSERT_CUDA(driver().mem_unmap(base + granularity, granularity));
  LARDER_ASSERT_CUDA(driver().mem_map(base, granularity, 0, handles[0], 0));
  LARDER_ASSERT_CUDA(driver().mem_set_access(base, granularity, &access, 1));
  EXPECT_EQ(ReadBack(base, 4), std::vector<uint32_t>(4, 1));

  // A handle may go while its mapping stays.
  LARDER_EXPECT_CUDA(driver().mem_release(handles[0]));
  EXPECT_EQ(ReadBack(base, 4), std::vector<uint32_t>(4, 1));
  LARDER_EXPECT_CUDA(driver().mem_unmap(base, granularity));
  LARDER_EXPECT_CUDA(driver().mem_unmap(base + 3 * granularity, granularity));
  LARDER_EXPECT_CUDA(driver().mem_release(handles[1]));
  LARDER_EXPECT_CUDA(driver().mem_address_free(base, room));
  LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
  EXPECT_TRUE(driver().mem_create(&handles[0], granularity + 1, &prop, 0));
}

TEST_F(DriverTest, RegistersMemoryThatMayOnlyBeRead) {
  // As a client has the daemon's slabs: sealed, and mapped to read.
  const int fd = memfd_create("slab", MFD_CLOEXEC);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(ftruncate(fd, kBytes), 0);
  void* const writable =
      mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ASSERT_NE(writable, MAP_FAILED);
  const std::vector<uint32_t> numbers = Numbers(3);
  std::memcpy(writable, numbers.data(), kBytes);
  munmap(writable, kBytes);
  void* const slab = mmap(nullptr, kBytes, PROT_READ, MAP_SHARED, fd, 0);
  ASSERT_NE(slab, MAP_FAILED);

  EXPECT_TRUE(
      driver().mem_host_register(slab, kBytes, cuda::kHostRegisterPortable));
  const cuda::Error error = driver().mem_host_register(
      slab, kBytes, cuda::kHostRegisterPortable | cuda::kHostRegisterReadOnly);
  const bool pinned = !error;
  if (context().info().registers_read_only_memory) {
    EXPECT_TRUE(pinned) << error.ToString();
  } else {
    EXPECT_FALSE(pinned);
  }
  // Pinned or not, its bytes arrive.
  const cuda::DevicePtr memory_dev = Alloc(kBytes);
  const cuda::Stream stream = NewStream();
  LARDER_EXPECT_CUDA(
      driver().memcpy_h2d_async(memory_dev, slab, kBytes, stream));
  LARDER_EXPECT_CUDA(driver().stream_synchronize(stream));
  EXPECT_EQ(ReadBack(memory_dev), numbers);
  if (pinned) LARDER_EXPECT_CUDA(driver().mem_host_unregister(slab));
  EXPECT_EQ(driver().mem_host_unregister(slab).code,
            cuda::Result::kHostMemoryNotRegistered);
  LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
  LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
  munmap(slab, kBytes);
  close(fd);
}

TEST_F(DriverTest, RefusesToRegisterTwice) {
  std::vector<std::byte> memory(kBytes);
  LARDER_ASSERT_CUDA(driver().mem_host_register(memory.data(), kBytes, 0));
  EXPECT_EQ(driver().mem_host_register(memory.data(), kBytes, 0).code,
            cuda::Result::kHostMemoryAlreadyRegistered);
  LARDER_EXPECT_CUDA(driver().mem_host_unregister(memory.data()));
}

TEST_F(DriverTest, GraphsReplayWhatWasCaptured) {
  ForSeeds(5, [&] {
    const cuda::DevicePtr counter_dev = Alloc(8);
    const Pinned source(driver(), 8);
    const Pinned word(driver(), 8);
    std::atomic_ref<uint32_t> ready(word.words()[0]);
    std::atomic_ref<uint32_t> seen(word.words()[1]);
    cuda::DevicePtr word_dev = 0;
    LARDER_ASSERT_CUDA(
        driver().mem_host_get_device_pointer(&word_dev, word.memory(), 0));
    const cuda::Stream stream = NewStream();
    const cuda::Stream side = NewStream();
    const cuda::Event fork = NewEvent();
    const cuda::Event join = NewEvent();
    LARDER_ASSERT_CUDA(
        driver().stream_begin_capture(stream, cuda::CaptureMode::kGlobal));
    LARDER_ASSERT_CUDA(
        driver().stream_wait_value32(stream, word_dev, 1, cuda::kWaitValueEq));
    LARDER_ASSERT_CUDA(
        driver().memcpy_h2d_async(counter_dev, source.memory(), 4, stream));
    LARDER_ASSERT_CUDA(driver().event_record(fork, stream));
    LARDER_ASSERT_CUDA(driver().stream_wait_event(side, fork, 0));
    LARDER_ASSERT_CUDA(
        driver().memcpy_d2d_async(counter_dev + 4, counter_dev, 4, side));
    LARDER_ASSERT_CUDA(driver().event_record(join, side));
    LARDER_ASSERT_CUDA(driver().stream_wait_event(stream, join, 0));
    LARDER_ASSERT_CUDA(driver().memcpy_d2h_async(&word.words()[1],
                                                 counter_dev + 4, 4, stream));
    LARDER_ASSERT_CUDA(driver().stream_write_value32(stream, word_dev, 0, 0));
    cuda::CaptureStatus status = cuda::CaptureStatus::kNone;
    LARDER_ASSERT_CUDA(driver().stream_is_capturing(side, &status));
    EXPECT_EQ(status, cuda::CaptureStatus::kActive);
    cuda::Graph graph = nullptr;
    LARDER_ASSERT_CUDA(driver().stream_end_capture(stream, &graph));
    cuda::GraphExec exec = nullptr;
    LARDER_ASSERT_CUDA(driver().graph_instantiate(&exec, graph, 0));
    seen = 0;
    for (uint32_t round = 1; round <= 100; ++round) {
      source.words()[0] = round;
      ready = 0;
      LARDER_ASSERT_CUDA(driver().graph_launch(exec, stream));
      EXPECT_EQ(seen.load(), round - 1) << "ran before the word was written";
      ready = 1;
      LARDER_ASSERT_CUDA(driver().stream_synchronize(stream));
      ASSERT_EQ(seen.load(), round);
      EXPECT_EQ(ready.load(), 0u);
    }
    LARDER_EXPECT_CUDA(driver().graph_exec_destroy(exec));
    LARDER_EXPECT_CUDA(driver().graph_destroy(graph));
    LARDER_EXPECT_CUDA(driver().event_destroy(fork));
    LARDER_EXPECT_CUDA(driver().event_destroy(join));
    LARDER_EXPECT_CUDA(driver().stream_destroy(side));
    LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
    LARDER_EXPECT_CUDA(driver().mem_free(counter_dev));
  });
}

TEST_F(DriverTest, CapturesThatAreBrokenSaySo) {
  const cuda::Stream stream = NewStream();
  const cuda::Stream side = NewStream();
  const cuda::Event fork = NewEvent();
  cuda::Graph graph = nullptr;
  // A side branch that nobody came back from.
  LARDER_ASSERT_CUDA(
      driver().stream_begin_capture(stream, cuda::CaptureMode::kRelaxed));
  const cuda::DevicePtr memory_dev = Alloc(4);
  LARDER_ASSERT_CUDA(driver().event_record(fork, stream));
  LARDER_ASSERT_CUDA(driver().stream_wait_event(side, fork, 0));
  LARDER_ASSERT_CUDA(driver().memset_d32_async(memory_dev, 1, 1, side));
  EXPECT_EQ(driver().stream_end_capture(stream, &graph).code,
            cuda::Result::kStreamCaptureUnjoined);
  // Waiting for what will only run later.
  LARDER_ASSERT_CUDA(
      driver().stream_begin_capture(stream, cuda::CaptureMode::kRelaxed));
  EXPECT_EQ(driver().stream_synchronize(stream).code,
            cuda::Result::kStreamCaptureUnsupported);
  EXPECT_EQ(driver().stream_end_capture(stream, &graph).code,
            cuda::Result::kStreamCaptureInvalidated);
  EXPECT_EQ(driver().stream_end_capture(stream, &graph).code,
            cuda::Result::kIllegalState);
  LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
  LARDER_EXPECT_CUDA(driver().event_destroy(fork));
  LARDER_EXPECT_CUDA(driver().stream_destroy(side));
  LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
}

TEST_F(DriverTest, ThreadsWithoutAContextAreTold) {
  cuda::ContextHandle popped = nullptr;
  LARDER_ASSERT_CUDA(driver().ctx_pop_current(&popped));
  cuda::DevicePtr memory_dev = 0;
  EXPECT_EQ(driver().mem_alloc(&memory_dev, 4).code,
            cuda::Result::kInvalidContext);
  {
    const cuda::Context::Scope scope(context());
    LARDER_ASSERT_CUDA(driver().mem_alloc(&memory_dev, 4));
    LARDER_ASSERT_CUDA(driver().mem_free(memory_dev));
  }
  cuda::ContextHandle current = popped;
  LARDER_ASSERT_CUDA(driver().ctx_get_current(&current));
  EXPECT_EQ(current, nullptr);
  LARDER_ASSERT_CUDA(driver().ctx_push_current(popped));
}

// Between processes

std::string Hex(const void* data, size_t size) {
  std::string text;
  for (size_t i = 0; i < size; ++i) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x",
                  static_cast<const unsigned char*>(data)[i]);
    text += digits;
  }
  return text;
}

void FromHex(const std::string& text, void* data, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    static_cast<unsigned char*>(data)[i] = static_cast<unsigned char>(
        std::stoi(text.substr(2 * i, 2), nullptr, 16));
  }
}

// An abstract socket that only this process's child can guess.
sockaddr_un SocketName(const std::string& name) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "%s",
                name.c_str());
  return address;
}

void SendFd(int socket, int fd) {
  char byte = 0;
  iovec data = {&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  ASSERT_EQ(sendmsg(socket, &message, 0), 1);
}

int ReceiveFd(int socket) {
  char byte = 0;
  iovec data = {&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != 1) return -1;
  const cmsghdr* const header = CMSG_FIRSTHDR(&message);
  if (header == nullptr) return -1;
  int fd = -1;
  std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
  return fd;
}

TEST_F(DriverTest, SharesAllocationsAndEventsWithAProcess) {
  const cuda::DevicePtr memory_dev = Alloc(kBytes);
  const cuda::Stream stream = NewStream();
  const cuda::Event event =
      NewEvent(cuda::kEventInterprocess | cuda::kEventDisableTiming);
  cuda::IpcMemHandle memory_handle = {};
  cuda::IpcEventHandle event_handle = {};
  LARDER_ASSERT_CUDA(driver().ipc_get_mem_handle(&memory_handle, memory_dev));
  LARDER_ASSERT_CUDA(driver().ipc_get_event_handle(&event_handle, event));
  LARDER_ASSERT_CUDA(
      driver().memset_d32_async(memory_dev, 41, kBytes / 4, stream));
  LARDER_ASSERT_CUDA(driver().event_record(event, stream));
  samples::ChildProcess child({"ipc", Hex(&memory_handle, sizeof memory_handle),
                               Hex(&event_handle, sizeof event_handle)});
  EXPECT_EQ(child.ReadLine(), "opened");
  LARDER_ASSERT_CUDA(driver().stream_synchronize(stream));
  EXPECT_EQ(child.ReadLine(), "saw 41");
  // What it wrote is here.
  EXPECT_EQ(child.ReadLine(), "wrote 42");
  EXPECT_EQ(ReadBack(memory_dev, 2), std::vector<uint32_t>(2, 42));
  EXPECT_EQ(child.Wait(), 0);
  LARDER_EXPECT_CUDA(driver().event_destroy(event));
  LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
  LARDER_EXPECT_CUDA(driver().mem_free(memory_dev));
}

TEST_F(DriverTest, SharesPhysicalMemoryByDescriptor) {
  const cuda::MemAllocationProp prop = Prop();
  const cuda::MemAccessDesc access = Access();
  size_t bytes = 0;
  LARDER_ASSERT_CUDA(driver().mem_get_allocation_granularity(
      &bytes, &prop, cuda::Granularity::kMinimum));
  cuda::DevicePtr base = 0;
  cuda::MemHandle handle = 0;
  LARDER_ASSERT_CUDA(driver().mem_address_reserve(&base, bytes, 0, 0, 0));
  LARDER_ASSERT_CUDA(driver().mem_create(&handle, bytes, &prop, 0));
  LARDER_ASSERT_CUDA(driver().mem_map(base, bytes, 0, handle, 0));
  LARDER_ASSERT_CUDA(driver().mem_set_access(base, bytes, &access, 1));
  const cuda::Stream stream = NewStream();
  LARDER_ASSERT_CUDA(driver().memset_d32_async(base, 77, bytes / 4, stream));
  LARDER_ASSERT_CUDA(driver().stream_synchronize(stream));
  int fd = -1;
  LARDER_ASSERT_CUDA(driver().mem_export_to_shareable_handle(
      &fd, handle, cuda::HandleType::kPosixFileDescriptor, 0));
  ASSERT_GE(fd, 0);

  const std::string name = "larder-device-test-" + std::to_string(getpid());
  const sockaddr_un address = SocketName(name);
  const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  ASSERT_EQ(bind(listener, reinterpret_cast<const sockaddr*>(&address),
                 sizeof address),
            0);
  ASSERT_EQ(listen(listener, 1), 0);
  samples::ChildProcess child({"fd", name, std::to_string(bytes)});
  const int connection = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  ASSERT_GE(connection, 0);
  SendFd(connection, fd);
  close(connection);
  close(listener);
  close(fd);
  EXPECT_EQ(child.ReadLine(), "saw 77");
  EXPECT_EQ(child.ReadLine(), "wrote 78");
  EXPECT_EQ(ReadBack(base, 2), std::vector<uint32_t>(2, 78));
  EXPECT_EQ(child.Wait(), 0);

  LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
  LARDER_EXPECT_CUDA(driver().mem_unmap(base, bytes));
  LARDER_EXPECT_CUDA(driver().mem_release(handle));
  LARDER_EXPECT_CUDA(driver().mem_address_free(base, bytes));
}

// The other process. Any failure ends it with a status of its own.
class Child {
 public:
  int Main(int argc, char** argv) {
    std::string why_not;
    driver_ = cuda::Driver::Open(TestDriver(), &why_not);
    if (driver_ == nullptr) return 10;
    cuda::Error error;
    context_ = cuda::Context::Retain(*driver_, 0, &error);
    if (context_ == nullptr) return 11;
    const cuda::Context::Scope scope(*context_);
    if (scope.error()) return 12;
    if (driver_->stream_create(&stream_, cuda::kStreamNonBlocking)) return 13;
    const std::string what = argv[2];
    const int status = what == "ipc" ? Ipc(argv[3], argv[4])
                                     : Fd(argv[3], std::stoul(argv[4]));
    if (driver_->stream_destroy(stream_)) return 14;
    return status;
  }

 private:
  int SeeAndWrite(cuda::DevicePtr memory_dev) {
    uint32_t seen = 0;
    if (driver_->memcpy_d2h_async(&seen, memory_dev, 4, stream_) ||
        driver_->stream_synchronize(stream_)) {
      return 20;
    }
    std::printf("saw %u\n", seen);
    if (driver_->memset_d32_async(memory_dev, seen + 1, 2, stream_) ||
        driver_->stream_synchronize(stream_)) {
      return 21;
    }
    std::printf("wrote %u\n", seen + 1);
    std::fflush(stdout);
    return 0;
  }

  int Ipc(const std::string& memory_hex, const std::string& event_hex) {
    cuda::IpcMemHandle memory_handle = {};
    cuda::IpcEventHandle event_handle = {};
    FromHex(memory_hex, &memory_handle, sizeof memory_handle);
    FromHex(event_hex, &event_handle, sizeof event_handle);
    cuda::DevicePtr memory_dev = 0;
    cuda::Event event = nullptr;
    if (driver_->ipc_open_mem_handle(&memory_dev, memory_handle,
                                     cuda::kIpcMemLazyEnablePeerAccess) ||
        driver_->ipc_open_event_handle(&event, event_handle)) {
      return 30;
    }
    std::printf("opened\n");
    std::fflush(stdout);
    if (driver_->stream_wait_event(stream_, event, 0)) return 31;
    const int status = SeeAndWrite(memory_dev);
    if (driver_->event_destroy(event) ||
        driver_->ipc_close_mem_handle(memory_dev)) {
      return 32;
    }
    return status;
  }

  int Fd(const std::string& name, size_t bytes) {
    const sockaddr_un address = SocketName(name);
    const int connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(connection, reinterpret_cast<const sockaddr*>(&address),
                sizeof address) != 0) {
      return 40;
    }
    const int fd = ReceiveFd(connection);
    close(connection);
    cuda::MemHandle handle = 0;
    if (driver_->mem_import_from_shareable_handle(
            &handle, reinterpret_cast<void*>(static_cast<intptr_t>(fd)),
            cuda::HandleType::kPosixFileDescriptor)) {
      return 41;
    }
    close(fd);
    cuda::DevicePtr base = 0;
    const cuda::MemAccessDesc access = {
        {cuda::LocationType::kDevice, context_->device()},
        cuda::AccessFlags::kReadWrite};
    if (driver_->mem_address_reserve(&base, bytes, 0, 0, 0) ||
        driver_->mem_map(base, bytes, 0, handle, 0) ||
        driver_->mem_set_access(base, bytes, &access, 1)) {
      return 42;
    }
    const int status = SeeAndWrite(base);
    if (driver_->mem_unmap(base, bytes) || driver_->mem_release(handle) ||
        driver_->mem_address_free(base, bytes)) {
      return 43;
    }
    return status;
  }

  std::unique_ptr<const cuda::Driver> driver_;
  std::unique_ptr<cuda::Context> context_;
  cuda::Stream stream_ = nullptr;
};

}  // namespace
}  // namespace larder

int main(int argc, char** argv) {
  if (argc == 5 && std::string(argv[1]) == "--child") {
    return larder::Child().Main(argc, argv);
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
