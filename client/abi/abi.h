#ifndef LARDER_CLIENT_ABI_ABI_H_
#define LARDER_CLIENT_ABI_ABI_H_

// What the files of the C ABI share: the handles, the thread's last error, and
// how words and structs cross the boundary. Each of these files checks what its
// callers passed and translates to client/core; nothing throws underneath, so
// nothing is caught here.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

#include "client/core/client.h"
#include "client/core/device_load.h"
#include "client/core/find.h"
#include "client/core/hold.h"
#include "client/core/jobs.h"
#include "client/core/loader.h"
#include "client/core/queue.h"
#include "client/core/saver.h"
#include "client/core/space.h"
#include "client/core/view.h"
#include "client/larder_c.h"
#include "store/chunk_id.h"
#include "store/space.h"
#include "store/status.h"
#include "store/types.h"

struct larder_client {
  std::unique_ptr<larder::client::Client> client;
};
struct larder_space {
  std::shared_ptr<larder::client::Space> space;
};
struct larder_hold {
  std::shared_ptr<larder::client::Hold> hold;
};
struct larder_find {
  std::shared_ptr<larder::client::FindJob> job;
};
struct larder_load {
  std::shared_ptr<larder::client::LoadJob> job;
  larder_stream_chunk* chunks = nullptr;  // the caller's
};
struct larder_save {
  std::shared_ptr<larder::client::Space> space;
  std::unique_ptr<larder::client::Saver> saver;
};
struct larder_queue {
  std::shared_ptr<larder::client::Queue> queue;
};
struct larder_region {
  void* mapping = nullptr;
  size_t mapped_bytes = 0;
  std::byte* base = nullptr;
};

namespace larder::abi {

namespace core = larder::client;

// ---- Errors

// The calling thread's.
std::string& LastError();
larder_status Refuse(larder_status status, absl::string_view why);
larder_status Invalid(absl::string_view why);
larder_status CodeOf(const Status& status);
// The code of `status`; a failure becomes the last error.
larder_status Answer(const Status& status);

// ---- What crosses the boundary

// Copies a growable struct of the caller's, of whatever age, over zeroes. What
// a newer header added must be zero: otherwise the caller means something that
// this library cannot do.
template <class T>
larder_status Take(const T* in, T& out) {
  out = T{};
  out.struct_size = sizeof(T);
  if (in == nullptr) return LARDER_OK;
  const uint32_t size = in->struct_size;
  if (size < sizeof(uint32_t) || size > 64 * 1024) {
    return Invalid("struct_size is not set");
  }
  std::memcpy(static_cast<void*>(&out), in, std::min<size_t>(size, sizeof(T)));
  out.struct_size = sizeof(T);
  const auto* bytes = reinterpret_cast<const unsigned char*>(in);
  for (size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      return Refuse(LARDER_E_UNSUPPORTED,
                    "a field of a newer version of larder_c.h is set");
    }
  }
  return LARDER_OK;
}

// Copies as much as the caller's struct has room for.
template <class T>
void Give(const T& value, T* out) {
  if (out == nullptr) return;
  const uint32_t size = out->struct_size;
  if (size <= sizeof(uint32_t)) return;
  auto* to = reinterpret_cast<unsigned char*>(out);
  const auto* from = reinterpret_cast<const unsigned char*>(&value);
  std::memcpy(to + sizeof(uint32_t), from + sizeof(uint32_t),
              std::min<size_t>(size, sizeof(T)) - sizeof(uint32_t));
}

template <class T>
const T* At(const T* array, size_t index) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(array) +
                                    index * array->struct_size);
}
template <class T>
T* At(T* array, size_t index, uint32_t stride) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(array) +
                              index * size_t{stride});
}

// 0: the client's default.
absl::Duration ToDuration(const core::Client& client, uint32_t ms);
absl::Time ToDeadline(core::Client& client, uint32_t ms);

inline std::span<const ChunkId> Ids(const larder_id* ids, size_t count) {
  return {reinterpret_cast<const ChunkId*>(ids), count};
}
template <class Id = ChunkId>
Id ToId(const larder_id& id) {
  Id out;
  std::memcpy(out.bytes.data(), id.bytes, sizeof id.bytes);
  return out;
}
template <class Id>
void FromId(const Id& id, larder_id* out) {
  std::memcpy(out->bytes, id.bytes.data(), sizeof out->bytes);
}

larder_status TakeKeys(const larder_request_key* keys, size_t count,
                       std::vector<RequestKey>& out);
void GiveReasons(const std::vector<MissReason>& reasons, uint8_t* out);
std::vector<uint8_t> Bytes(const std::vector<MissReason>& reasons);
std::vector<uint8_t> Bytes(const std::vector<ChunkState>& states);
// "" for NULL.
std::string Text(const char* text);
PartShape BoxOf(uint16_t layer_begin, uint16_t layer_count, uint16_t head_begin,
                uint16_t head_count, uint16_t interleave_index,
                uint16_t interleave_count);
larder_status TakeHold(core::Client& client, const larder_hold_opts* opts,
                       core::HoldOptions& out);
// Appends to `out`.
larder_status TakeView(const SpaceDescriptor& space, const larder_view* in,
                       std::vector<core::View>& out);

// Opens the device.
larder_status TakeDevice(const larder_device_opts* opts,
                         core::DeviceTarget& out);

// ---- Jobs

using Body = absl::AnyInvocable<void(core::Done&, const core::Cancelled&) &&>;

// Runs `body` on a worker; what it leaves in Done goes to the queue.
larder_status Submit(core::Client& client, larder_queue* queue,
                     core::Operation operation, size_t count,
                     uint64_t user_data, larder_job* job, Body body);

}  // namespace larder::abi

#endif  // LARDER_CLIENT_ABI_ABI_H_
