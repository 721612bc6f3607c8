#ifndef LARDER_CLIENT_PYTHON_SRC_KV_H_
#define LARDER_CLIENT_PYTHON_SRC_KV_H_

// Spaces of KV: what is opened from them, and the calls behind Space's methods.

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "queue.h"
#include "space.h"
#include "view.h"

namespace larder::python {

// (kind, value, offset): what else than tokens a prompt's KV depends on.
using RequestKey = std::tuple<uint32_t, nb::bytes, uint32_t>;
// Valid while `keys` live and do not change.
std::vector<larder_request_key> RawKeys(const std::vector<RequestKey>& keys);

// ---- Hold and find ----

struct Hold {
  std::shared_ptr<HoldHandle> handle;
  std::shared_ptr<SpaceHandle> space;
  uint32_t usable = 0;
  std::vector<uint8_t> reasons;

  larder_hold* get() const {
    if (handle == nullptr) throw nb::value_error("the hold is closed");
    return handle->get();
  }
};

std::optional<Hold> OpenHold(const Space& self, const Ids& ids,
                             const Seconds& ttl, bool each, uint32_t lineage,
                             const Seconds& deadline);
Hold AttachHold(const Space& self, uint64_t token, const Ids& ids,
                const Seconds& deadline);

struct Found {
  larder_found result = {};
  int32_t status = 0;
  std::optional<Hold> hold;
};

struct Find {
  std::shared_ptr<SpaceHandle> space;
  std::shared_ptr<FindHandle> handle;
};

std::unique_ptr<Find> StartFind(const Space& self, nb::handle tokens,
                                const std::vector<RequestKey>& keys,
                                uint64_t tokens_max, const Seconds& ttl,
                                uint32_t lineage, Queue* queue,
                                nb::object user_data, const Seconds& deadline);

// ---- Load ----

// larder_stream_opts.
struct Stream {
  double prefill_chunk = 0;
  double prefill_token = 0;
  double prefill_token_position = 0;
  bool soonest = false;
  uint64_t first_token = 0;
};

struct Loaded {
  larder_load_result result = {};
  int32_t status = 0;
  std::vector<uint8_t> reasons;
  std::vector<larder_stream_chunk> chunks;  // of a streaming load
};

struct Load {
  // Destroyed in reverse: the load first, then what it works on.
  std::vector<View> views;
  std::shared_ptr<HoldHandle> hold;
  std::vector<larder_stream_chunk> chunks;  // written by the wait
  std::shared_ptr<LoadHandle> handle;
  size_t count = 0;
};

Loaded LoadNow(const Space& self, const Ids& ids,
               const std::vector<View*>& views, const Hold* hold,
               uint32_t hold_first, uint32_t threads, bool each,
               uint32_t lineage, const Stream* stream, const Seconds& deadline);
std::unique_ptr<Load> StartLoad(const Space& self, const Ids& ids,
                                const std::vector<View*>& views,
                                const Hold* hold, uint32_t hold_first,
                                uint32_t threads, bool layerwise, bool each,
                                uint32_t lineage, const Stream* stream,
                                Queue* queue, nb::object user_data,
                                const Seconds& deadline);

// ---- Save ----

struct Save {
  std::shared_ptr<SaveHandle> handle;
  std::shared_ptr<SpaceHandle> space;

  larder_save* get() const {
    if (handle == nullptr) throw nb::value_error("the save is closed");
    return handle->get();
  }
};

// Nothing: it is there already.
std::optional<Save> BeginSave(
    const Space& self, const std::optional<nb::bytes>& id, uint32_t token_count,
    uint16_t group, uint16_t layer_begin, uint16_t layer_count,
    uint16_t head_begin, uint16_t head_count, uint16_t interleave_index,
    uint16_t interleave_count, bool wait, const Seconds& deadline);

void BindHold(nb::module_& module);
void BindLoad(nb::module_& module);
void BindSave(nb::module_& module);

}  // namespace larder::python

#endif  // LARDER_CLIENT_PYTHON_SRC_KV_H_
