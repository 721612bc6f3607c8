#include <algorithm>
#include <memory>
#include <utility>

#include "client/abi/abi.h"

namespace larder::abi {
extern "C" {

larder_status larder_queue_open(larder_client* client, larder_queue** out) {
  if (client == nullptr || out == nullptr) {
    return Invalid("client or out is NULL");
  }
  StatusOr<std::shared_ptr<core::Queue>> queue = core::Queue::Make();
  if (!queue.ok()) return Answer(queue.status());
  *out = new larder_queue{*std::move(queue)};
  return LARDER_OK;
}

void larder_queue_close(larder_queue* queue) {
  delete queue;
}

int larder_queue_fd(const larder_queue* queue) {
  return queue == nullptr ? -1 : queue->queue->fd();
}

int32_t larder_queue_poll(larder_queue* queue, larder_completion* completions,
                          uint32_t capacity, uint32_t deadline_ms) {
  if (queue == nullptr || (completions == nullptr && capacity != 0)) {
    return Invalid("queue or completions is NULL");
  }
  if (capacity == 0) return 0;
  const uint32_t stride = completions->struct_size;
  if (stride < sizeof(uint32_t)) return Invalid("struct_size is not set");
  const auto done = queue->queue->Poll(std::min<uint32_t>(capacity, INT32_MAX),
                                       deadline_ms == LARDER_NO_DEADLINE
                                           ? absl::InfiniteDuration()
                                           : absl::Milliseconds(deadline_ms));
  for (size_t i = 0; i < done.size(); ++i) {
    larder_completion out{};
    out.status = CodeOf(done[i].status);
    out.job = done[i].job;
    out.user_data = done[i].user_data;
    out.op = static_cast<uint32_t>(done[i].operation);
    out.stage = done[i].stage;
    out.count = done[i].count;
    out.good = done[i].good;
    out.bytes = done[i].bytes;
    out.lineage = done[i].lineage;
    if (!done[i].per_key.empty()) out.per_key = done[i].per_key.data();
    if (!done[i].per_key_bytes.empty()) {
      out.per_key_bytes = done[i].per_key_bytes.data();
    }
    larder_completion* to = At(completions, i, stride);
    to->struct_size = stride;
    Give(out, to);
  }
  return static_cast<int32_t>(done.size());
}

}  // extern "C"

}  // namespace larder::abi
