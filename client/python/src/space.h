#ifndef LARDER_CLIENT_PYTHON_SRC_SPACE_H_
#define LARDER_CLIENT_PYTHON_SRC_SPACE_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common.h"

namespace larder::python {

// An opened space; of KV or of values.
struct AnySpace {
  std::shared_ptr<SpaceHandle> handle;
  std::shared_ptr<ClientHandle> client;

  larder_space* get() const { return handle->get(); }
};

// What a space is described with, but for its groups.
struct Description {
  std::string model, cache_dtype, kv_scales, rope, engine_layout, hash_scheme;
  larder_id weights;
  std::optional<nb::bytes> expect;

  // Valid while this lives and does not change.
  larder_space_desc Raw() const;
};
struct Client;
void OpenSpace(const Client& client, const larder_space_desc& raw,
               const Seconds& deadline, AnySpace& space);

// Keys of one length, one after the other. ValueError if they are not.
class PackedKeys {
 public:
  explicit PackedKeys(const std::vector<nb::bytes>& keys);
  const larder_keys& raw() const { return raw_; }

 private:
  std::string bytes_;
  larder_keys raw_;
};

struct Group {
  std::string layers;
  larder_group_desc raw = {};
};

struct Space : AnySpace {
  uint32_t block_tokens = 0;
  uint32_t chunk_tokens = 0;
  std::vector<larder_group_desc> groups;  // without their layers
};

struct Values : AnySpace {};

}  // namespace larder::python

#endif  // LARDER_CLIENT_PYTHON_SRC_SPACE_H_
