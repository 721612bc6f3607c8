#include "client/adapters/mooncake/store_c.h"

#include <openssl/sha.h>

#include <algorithm>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "client/larder_c.h"

namespace {

// Mooncake's ErrorCode.
constexpr int kInternal = -1;
constexpr int kNoAvailableHandle = -200;
constexpr int kInvalidParams = -600;
constexpr int kObjectNotFound = -704;
constexpr int kRpcFail = -900;
constexpr int kRpcTimeout = -901;
constexpr int kUnavailableInStatus = -1010;
constexpr int kUnavailableInMode = -1011;

// The same space as client/python/larder/mooncake.py opens.
constexpr uint64_t kValueBytesMax = 256 << 20;
constexpr uint32_t kDeadlineMs = 5000;
constexpr std::string_view kScheme = "larder://";

struct Store {
  larder_client* client = nullptr;
  larder_space* space = nullptr;
  std::string hostname;

  void Close() {
    larder_space_close(space);
    larder_client_close(client);
    space = nullptr;
    client = nullptr;
  }
};

Store* Of(mooncake_store_t store) {
  return static_cast<Store*>(store);
}

larder_id Digest(std::string_view bytes) {
  larder_id id;
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(),
         id.bytes);
  return id;
}

int CodeOf(int32_t status) {
  if (status >= 0) return 0;
  if (status == LARDER_E_UNAVAILABLE) return kRpcFail;
  return status == LARDER_E_DEADLINE ? kRpcTimeout : kInternal;
}

int CodeOf(uint8_t reason, int otherwise) {
  switch (reason) {
    case LARDER_REASON_NONE:
      return 0;
    case LARDER_REASON_BUSY:
      return kNoAvailableHandle;
    case LARDER_REASON_NOT_TRIED:
      return kInvalidParams;
    case LARDER_REASON_DEADLINE:
      return kRpcTimeout;
    case LARDER_REASON_UNAVAILABLE:
    case LARDER_REASON_CANCELLED:
      return kRpcFail;
    default:
      return otherwise;
  }
}

// Keys of any length, as digests of one.
struct Keys {
  std::vector<larder_id> digests;
  larder_keys raw{};

  explicit Keys(std::span<const char* const> names) {
    for (const char* name : names) digests.push_back(Digest(name));
    raw = {.data = digests.data(),
           .key_bytes = sizeof(larder_id),
           .stride = 0,
           .count = static_cast<uint32_t>(digests.size())};
  }
};

struct Batch {
  std::vector<size_t> at;  // of the caller's keys
  std::vector<const char*> names;
  std::vector<larder_piece> pieces;

  // Mooncake refuses keys without a name and values without a byte.
  Batch(const char* const* keys, void* const* buffers, const size_t* sizes,
        size_t count) {
    for (size_t i = 0; i < count; ++i) {
      if (keys[i][0] == '\0' || sizes[i] == 0) continue;
      at.push_back(i);
      names.push_back(keys[i]);
      pieces.push_back({.data = buffers[i], .bytes = sizes[i]});
    }
  }
};

larder_value_opts ValueOptions() {
  larder_value_opts options = {};
  options.struct_size = sizeof options;
  return options;
}

bool AnyMissing(const char* const* keys, void* const* buffers,
                const size_t* sizes, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (keys[i] == nullptr) return true;
    if (buffers != nullptr && buffers[i] == nullptr && sizes[i] > 0) {
      return true;
    }
  }
  return false;
}

void Put(Store& store, const char* const* keys, void* const* buffers,
         const size_t* sizes, size_t count, int* results) {
  std::fill_n(results, count,
              store.space == nullptr ? kUnavailableInStatus : kInvalidParams);
  const Batch batch(keys, buffers, sizes, count);
  if (store.space == nullptr || batch.at.empty()) return;
  const Keys named(batch.names);
  const larder_value_opts options = ValueOptions();
  std::vector<uint8_t> reasons(batch.at.size());
  const int32_t status =
      larder_put(store.space, &named.raw, batch.pieces.data(), 1, &options,
                 reasons.data());
  for (size_t i = 0; i < batch.at.size(); ++i) {
    const int code = CodeOf(reasons[i], kInternal);
    results[batch.at[i]] = code == 0 ? CodeOf(status) : code;
    if (reasons[i] == 0 && status != LARDER_E_INVALID) results[batch.at[i]] = 0;
  }
}

// Without buffers: the sizes.
void Get(Store& store, const char* const* keys, void* const* buffers,
         const size_t* sizes, size_t count, int64_t* results) {
  std::fill_n(results, count,
              store.space == nullptr ? kUnavailableInStatus : kInvalidParams);
  if (store.space == nullptr) return;
  std::vector<size_t> ones;
  std::vector<void*> nothing;
  const bool sizes_only = buffers == nullptr;
  if (sizes_only) {
    ones.assign(count, 1);
    nothing.assign(count, nullptr);
  }
  Batch batch(keys, sizes_only ? nothing.data() : buffers,
              sizes_only ? ones.data() : sizes, count);
  if (batch.at.empty()) return;
  if (sizes_only) {
    for (larder_piece& piece : batch.pieces) piece.bytes = 0;
  }
  const Keys named(batch.names);
  larder_value_opts options = ValueOptions();
  if (sizes_only) options.flags = LARDER_GET_SIZES;
  std::vector<uint8_t> reasons(batch.at.size());
  std::vector<uint64_t> bytes(batch.at.size());
  const int32_t status =
      larder_get(store.space, &named.raw, batch.pieces.data(), 1, &options,
                 reasons.data(), bytes.data());
  for (size_t i = 0; i < batch.at.size(); ++i) {
    int64_t& result = results[batch.at[i]];
    if (status == LARDER_E_INVALID) {
      result = kInternal;
    } else if (reasons[i] == 0 || (sizes_only && bytes[i] != 0)) {
      result = static_cast<int64_t>(bytes[i]);  // too little memory: told, too
    } else {
      result = CodeOf(reasons[i], kObjectNotFound);
    }
  }
}

int IdsOf(Store& store, std::span<const char* const> names,
          std::vector<larder_id>& ids) {
  const Keys named(names);
  ids.resize(names.size());
  return CodeOf(larder_ids_from_hashes(store.space, named.digests.data(),
                                       sizeof(larder_id), 0, names.size(),
                                       ids.data()));
}

void Exist(Store& store, const char* const* keys, size_t count, int* results) {
  std::vector<larder_id> ids;
  std::vector<uint8_t> states(count);
  int code = kUnavailableInStatus;
  if (store.space != nullptr) code = IdsOf(store, {keys, count}, ids);
  if (code == 0) {
    code = CodeOf(larder_lookup(store.space, ids.data(), count, 0,
                                states.data(), nullptr));
  }
  for (size_t i = 0; i < count; ++i) {
    results[i] = code != 0 ? code : larder_state_is_there(states[i]);
  }
}

}  // namespace

mooncake_store_t mooncake_store_create() {
  return new Store;
}

void mooncake_store_destroy(mooncake_store_t store) {
  if (store == nullptr) return;
  Of(store)->Close();
  delete Of(store);
}

int mooncake_store_setup(mooncake_store_t store, const char* local_hostname,
                         const char* metadata_server, uint64_t, uint64_t,
                         const char*, const char*,
                         const char* master_server_addr) {
  if (store == nullptr) return kInternal;
  Store& self = *Of(store);
  self.Close();
  self.hostname = local_hostname == nullptr ? "" : local_hostname;
  larder_client_opts options = {};
  options.struct_size = sizeof options;
  options.default_deadline_ms = kDeadlineMs;
  options.name = "mooncake";
  for (const char* address : {metadata_server, master_server_addr}) {
    if (address == nullptr) continue;
    const std::string_view text = address;
    if (text.starts_with(kScheme) && text.size() > kScheme.size()) {
      options.socket_path = address + kScheme.size();
    }
  }
  int32_t status = larder_client_open(&options, kDeadlineMs, &self.client);
  if (status >= 0) {
    const larder_id weights = Digest("larder.mooncake");
    larder_space_desc space = {};
    space.struct_size = sizeof space;
    space.model_name = "mooncake/default";
    space.weights = &weights;
    space.cache_dtype = "bytes";
    space.kv_scales = "none";
    space.rope = "none";
    space.engine_layout = "mooncake";
    space.hash_scheme = "sha256(key)";
    space.value_bytes_max = kValueBytesMax;
    status = larder_space_open(self.client, &space, kDeadlineMs, &self.space);
  }
  if (status < 0) self.Close();
  return CodeOf(status);
}

int mooncake_store_init_all(mooncake_store_t, const char*, const char*,
                            uint64_t) {
  return kUnavailableInMode;
}

int mooncake_store_health_check(mooncake_store_t store) {
  if (store == nullptr) return kInternal;
  if (Of(store)->client == nullptr) return kUnavailableInStatus;
  return CodeOf(larder_ping(Of(store)->client, 0));
}

int mooncake_store_get_hostname(mooncake_store_t store, char* buf_out,
                                size_t buf_len) {
  if (store == nullptr || buf_out == nullptr) return kInternal;
  const std::string& name = Of(store)->hostname;
  if (name.size() >= buf_len) return kInternal;
  std::memcpy(buf_out, name.c_str(), name.size() + 1);
  return 0;
}

int mooncake_store_put(mooncake_store_t store, const char* key,
                       const void* value, size_t size,
                       const mooncake_replicate_config_t* config) {
  // A put only reads.
  return mooncake_store_put_from(store, key, const_cast<void*>(value), size,
                                 config);
}

int mooncake_store_put_from(mooncake_store_t store, const char* key,
                            void* buffer, size_t size,
                            const mooncake_replicate_config_t*) {
  if (store == nullptr || key == nullptr) return kInternal;
  if (buffer == nullptr && size > 0) return kInternal;
  int result = 0;
  Put(*Of(store), &key, &buffer, &size, 1, &result);
  return result;
}

int mooncake_store_batch_put_from(mooncake_store_t store, const char** keys,
                                  void** buffers, const size_t* sizes,
                                  size_t count,
                                  const mooncake_replicate_config_t*,
                                  int* results_out) {
  if (store == nullptr || keys == nullptr || buffers == nullptr ||
      sizes == nullptr || results_out == nullptr ||
      AnyMissing(keys, buffers, sizes, count)) {
    return kInternal;
  }
  Put(*Of(store), keys, buffers, sizes, count, results_out);
  return 0;
}

int64_t mooncake_store_get_into(mooncake_store_t store, const char* key,
                                void* buffer, size_t size) {
  if (store == nullptr || key == nullptr) return kInternal;
  if (buffer == nullptr && size > 0) return kInternal;
  int64_t result = 0;
  Get(*Of(store), &key, &buffer, &size, 1, &result);
  return result;
}

int mooncake_store_batch_get_into(mooncake_store_t store, const char** keys,
                                  void** buffers, const size_t* sizes,
                                  size_t count, int64_t* results_out) {
  if (store == nullptr || keys == nullptr || buffers == nullptr ||
      sizes == nullptr || results_out == nullptr ||
      AnyMissing(keys, buffers, sizes, count)) {
    return kInternal;
  }
  Get(*Of(store), keys, buffers, sizes, count, results_out);
  return 0;
}

int mooncake_store_is_exist(mooncake_store_t store, const char* key) {
  int result = 0;
  const int code = mooncake_store_batch_is_exist(store, &key, 1, &result);
  return code == 0 ? result : code;
}

int mooncake_store_batch_is_exist(mooncake_store_t store, const char** keys,
                                  size_t count, int* results_out) {
  if (store == nullptr || keys == nullptr || results_out == nullptr ||
      AnyMissing(keys, nullptr, nullptr, count)) {
    return kInternal;
  }
  if (count != 0) Exist(*Of(store), keys, count, results_out);
  return 0;
}

int64_t mooncake_store_get_size(mooncake_store_t store, const char* key) {
  if (store == nullptr || key == nullptr) return kInternal;
  int64_t result = 0;
  Get(*Of(store), &key, nullptr, nullptr, 1, &result);
  return result;
}

int mooncake_store_remove(mooncake_store_t store, const char* key, int) {
  if (store == nullptr || key == nullptr) return kInternal;
  Store& self = *Of(store);
  if (self.space == nullptr) return kUnavailableInStatus;
  std::vector<larder_id> ids;
  uint64_t removed = 0;
  int code = IdsOf(self, {&key, 1}, ids);
  if (code == 0) {
    code = CodeOf(larder_delete(self.space, ids.data(), 1, 0, &removed));
  }
  return code != 0 || removed != 0 ? code : kObjectNotFound;
}

int64_t mooncake_store_remove_by_regex(mooncake_store_t, const char*, int) {
  return kUnavailableInMode;
}

int64_t mooncake_store_remove_all(mooncake_store_t store, int) {
  if (store == nullptr) return kInternal;
  Store& self = *Of(store);
  if (self.space == nullptr) return kUnavailableInStatus;
  int64_t total = 0;
  std::vector<larder_listed> page(256);
  larder_id cursor;
  for (uint32_t more = 1, first = 1; more != 0; first = 0) {
    size_t count = 0;
    int code = CodeOf(larder_list(self.space, first != 0 ? nullptr : &cursor,
                                  page.data(), page.size(), 0, &count, &more));
    if (code != 0) return code;
    if (count == 0) break;
    std::vector<larder_id> ids;
    for (size_t i = 0; i < count; ++i) ids.push_back(page[i].id);
    cursor = ids.back();
    uint64_t removed = 0;
    code = CodeOf(larder_delete(self.space, ids.data(), count, 0, &removed));
    if (code != 0) return code;
    total += static_cast<int64_t>(removed);
  }
  return total;
}

int mooncake_store_register_buffer(mooncake_store_t store, void* buffer,
                                   size_t size) {
  return store == nullptr || buffer == nullptr || size == 0 ? kInternal : 0;
}

int mooncake_store_unregister_buffer(mooncake_store_t store, void*) {
  return store == nullptr ? kInternal : 0;
}

int mooncake_store_calc_cache_stats(mooncake_store_t, char*, size_t) {
  return kInternal;
}

int mooncake_store_get_client_stats(mooncake_store_t, char*, size_t) {
  return kInternal;
}
