#include "queue.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>

namespace larder::python {
namespace {

constexpr uint32_t kTakenAtOnce = 64;

}  // namespace

Queue::Queue(std::shared_ptr<ClientHandle> client) : client_(client) {
  larder_queue* queue = nullptr;
  Check(larder_queue_open(client->get(), &queue));
  handle_ = std::make_unique<QueueHandle>(queue, std::move(client));
}

// What is under way works on memory that is kept here.
Queue::~Queue() {
  for (const auto& [number, pending] : pending_) {
    (void)larder_cancel(client_->get(), pending.job);
  }
  while (!pending_.empty()) {
    try {
      (void)Take(kTakenAtOnce, 100);
    } catch (const std::exception&) {
      return;  // the queue itself is broken: nothing is under way
    }
  }
}

std::vector<nb::object> Queue::Poll(uint32_t capacity, const Seconds& wait) {
  // Here 0 means: do not wait.
  const bool waits = wait.has_value() && *wait > 0;
  return Take(std::min(capacity, kTakenAtOnce), waits ? Milliseconds(wait) : 0);
}

std::vector<nb::object> Queue::Take(uint32_t capacity, uint32_t wait_ms) {
  std::array<larder_completion, kTakenAtOnce> taken;
  taken[0].struct_size = sizeof taken[0];
  const auto take = [&] {
    return larder_queue_poll(get(), taken.data(), capacity, wait_ms);
  };
  const int32_t count = Check(wait_ms == 0 ? take() : Unlocked(take));
  std::vector<nb::object> completions;
  for (int32_t i = 0; i < count; ++i) {
    const larder_completion& from = taken[static_cast<size_t>(i)];
    Completion to;
    to.status = from.status;
    to.job = from.job;
    to.op = from.op;
    to.count = from.count;
    to.good = from.good;
    to.bytes = from.bytes;
    to.lineage = from.lineage;
    if (from.per_key != nullptr) {
      to.per_key =
          nb::bytes(reinterpret_cast<const char*>(from.per_key), from.count);
    }
    if (from.per_key_bytes != nullptr) {
      nb::list sizes;
      for (uint32_t key = 0; key < from.count; ++key) {
        sizes.append(from.per_key_bytes[key]);
      }
      to.sizes = std::move(sizes);
    }
    const auto pending = pending_.find(from.user_data);
    if (pending != pending_.end()) {
      to.user_data = std::move(pending->second.user_data);
      pending_.erase(pending);
    }
    completions.push_back(nb::cast(std::move(to)));
  }
  return completions;
}

void BindQueue(nb::module_& module) {
  nb::class_<Completion>(module, "Completion",
                         "What became of one submitted operation.")
      .def_ro("status", &Completion::status,
              "0, or the negative status of larder_c.h that cut it short.")
      .def_ro("op", &Completion::op, "An Op.")
      .def_ro("job", &Completion::job)
      .def_ro("user_data", &Completion::user_data, "What was submitted.")
      .def_ro("count", &Completion::count, "Keys or ids of the operation.")
      .def_ro("good", &Completion::good,
              "Usable prefix (match, load), tokens (find) or keys served "
              "(others).")
      .def_ro("byte_count", &Completion::bytes, "Moved.")
      .def_ro("lineage", &Completion::lineage,
              "Of a load: the worst of what was delivered.")
      .def_ro("per_key", &Completion::per_key,
              "One byte for each key: a State (match, lookup) or a Reason.")
      .def_ro("sizes", &Completion::sizes,
              "Of a get: the size of each value, 0 for a miss. Else None.");

  nb::class_<Queue>(
      module, "Queue",
      "Completions of submitted operations, for one consumer.\n\n"
      "`fileno()` is an eventfd, readable while a completion waits, so that a "
      "queue can be\ngiven to select, poll or an event loop. What a submitted "
      "operation reads or writes\nis kept alive until its completion was "
      "polled. Dropping a queue cancels what is\nunder way and waits for it.")
      .def("fileno", &Queue::fd)
      .def("poll", &Queue::Poll, nb::arg("capacity") = kTakenAtOnce,
           nb::arg("wait") = 0.0,
           "Up to `capacity` (at most 64) Completions in the order in which "
           "they finished;\nwaits for the first one up to `wait` seconds.")
      .def_prop_ro("pending", &Queue::pending,
                   "Operations whose completion was not polled yet.");
}

}  // namespace larder::python
