#ifndef LARDER_CLIENT_PYTHON_SRC_COMMON_H_
#define LARDER_CLIENT_PYTHON_SRC_COMMON_H_

// What the bindings share: errors, deadlines, the memory of Python objects, and
// owners of the C ABI's handles in the order in which they must be closed.

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "larder_c.h"

namespace larder::python {

namespace nb = nanobind;

// Seconds. None: the client's default; infinity: no deadline.
using Seconds = std::optional<double>;
uint32_t Milliseconds(const Seconds& seconds);

// Throws larder.Error (or its subclass for `status`) with what the library
// says of the calling thread's last failure.
[[noreturn]] void Raise(int32_t status);
inline int32_t Check(int32_t status) {
  if (status < 0) Raise(status);
  return status;
}

// Runs `call` without the interpreter's lock.
template <class Call>
auto Unlocked(Call&& call) {
  nb::gil_scoped_release unlocked;
  return call();
}

// Closes a handle without the lock: closing may wait for what is under way.
template <class T, void (*Close)(T*)>
struct Closer {
  void operator()(T* handle) const {
    if (handle == nullptr) return;
    nb::gil_scoped_release unlocked;
    Close(handle);
  }
};

// A handle and what it was opened from, which therefore is closed after it.
template <class T, void (*Close)(T*)>
class Owned {
 public:
  Owned(T* handle, std::shared_ptr<void> parent)
      : parent_(std::move(parent)), handle_(handle) {}
  T* get() const { return handle_.get(); }

 private:
  std::shared_ptr<void> parent_;
  std::unique_ptr<T, Closer<T, Close>> handle_;
};

using ClientHandle = Owned<larder_client, larder_client_close>;
using SpaceHandle = Owned<larder_space, larder_space_close>;
using QueueHandle = Owned<larder_queue, larder_queue_close>;
using RegionHandle = Owned<larder_region, larder_region_close>;
using HoldHandle = Owned<larder_hold, larder_hold_close>;
using FindHandle = Owned<larder_find, larder_find_close>;
using LoadHandle = Owned<larder_load, larder_load_close>;
using SaveHandle = Owned<larder_save, larder_save_close>;

// Whole numbers from a list, a tuple, or one dimension of a buffer (NumPy).
std::vector<uint32_t> TokensOf(nb::handle numbers);
std::vector<int64_t> PlacesOf(nb::handle numbers);

// Whether `object` is a pair (address, bytes), for whose life the caller
// answers.
bool AddressAndBytes(nb::handle object, void*& data, uint64_t& bytes);

// The bytes of a Python object, which stays pinned as long as this lives: any
// C-contiguous buffer, a CPU tensor by DLPack, or a pair (address, bytes). Made
// and destroyed under the lock.
class Memory {
 public:
  Memory(nb::handle object, bool writable);
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&&) = delete;
  ~Memory();

  void* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  uint64_t bytes_ = 0;
  Py_buffer buffer_ = {};
  nb::object owner_;
};

// Chunk ids, as the daemon knows them.
struct Ids {
  std::vector<larder_id> ids;
  uint32_t tail_tokens = 0;
};

// Library memory that Python may look at: staging of a save, segments of a
// hold, a region. Exports the buffer protocol.
struct Window {
  void* data = nullptr;
  uint64_t bytes = 0;
  bool writable = false;
  std::shared_ptr<void> owner;
};

inline nb::bytes BytesOf(const larder_id& id) {
  return nb::bytes(reinterpret_cast<const char*>(id.bytes), sizeof id.bytes);
}
inline nb::bytes BytesOf(const std::vector<uint8_t>& bytes) {
  return nb::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}
// 32 bytes or ValueError.
larder_id IdOf(const nb::bytes& bytes);

// Each file's part of the module.
void BindMemory(nb::module_& module);
void BindClient(nb::module_& module);
void BindQueue(nb::module_& module);
void BindSpace(nb::module_& module);
void BindKv(nb::module_& module);
void BindValues(nb::module_& module);

}  // namespace larder::python

#endif  // LARDER_CLIENT_PYTHON_SRC_COMMON_H_
