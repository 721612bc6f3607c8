#ifndef LARDER_STORE_BYTES_INTERNAL_H_
#define LARDER_STORE_BYTES_INTERNAL_H_

// Little-endian fields at any alignment, for the formats of this folder. Not
// for use outside store/.

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "store/units.h"

namespace larder::internal {

// Every format of Larder is little-endian, and token ids are hashed where they
// lie; a big-endian port would have to swap in these few functions.
static_assert(std::endian::native == std::endian::little);

template <std::unsigned_integral T>
T Load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <std::unsigned_integral T>
void Store(void* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

template <std::unsigned_integral T>
void Append(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// Takes fields from the front of untrusted bytes. A read past the end fails and
// leaves the reader failed, so that callers may check once at the end.
class ByteReader {
 public:
  explicit ByteReader(ByteSpan bytes) : rest_(bytes) {}

  bool ok() const { return ok_; }
  bool AtEnd() const { return ok_ && rest_.empty(); }

  template <std::unsigned_integral T>
  T Take() {
    const ByteSpan bytes = TakeBytes(sizeof(T));
    return bytes.empty() ? T{0} : Load<T>(bytes.data());
  }

  // Empty on failure.
  ByteSpan TakeBytes(size_t size) {
    if (!ok_ || size > rest_.size()) {
      ok_ = false;
      return {};
    }
    const ByteSpan taken = rest_.first(size);
    rest_ = rest_.subspan(size);
    return taken;
  }

 private:
  ByteSpan rest_;
  bool ok_ = true;
};

}  // namespace larder::internal

#endif  // LARDER_STORE_BYTES_INTERNAL_H_
