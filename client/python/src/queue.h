#ifndef LARDER_CLIENT_PYTHON_SRC_QUEUE_H_
#define LARDER_CLIENT_PYTHON_SRC_QUEUE_H_

#include <memory>
#include <unordered_map>
#include <vector>

#include "common.h"

namespace larder::python {

// What a submitted operation works on stays pinned until its completion was
// polled. Under the interpreter's lock.
class Queue {
 public:
  explicit Queue(std::shared_ptr<ClientHandle> client);
  ~Queue();

  larder_queue* get() const { return handle_->get(); }

  // Calls submit(number, &job), where `number` is to be the user data of the
  // completion until which `what` is kept. Throws if it fails.
  template <class Call>
  larder_job Submit(nb::object user_data, std::shared_ptr<void> what,
                    Call&& submit) {
    const uint64_t number = ++last_number_;
    larder_job job = 0;
    Check(submit(number, &job));
    pending_.emplace(number,
                     Pending{std::move(user_data), std::move(what), job});
    return job;
  }

  std::vector<nb::object> Poll(uint32_t capacity, const Seconds& wait);
  int fd() const { return larder_queue_fd(get()); }
  size_t pending() const { return pending_.size(); }

 private:
  struct Pending {
    nb::object user_data;
    std::shared_ptr<void> what;
    larder_job job = 0;
  };

  std::vector<nb::object> Take(uint32_t capacity, uint32_t wait_ms);

  std::shared_ptr<ClientHandle> client_;
  std::unique_ptr<QueueHandle> handle_;
  uint64_t last_number_ = 0;
  std::unordered_map<uint64_t, Pending> pending_;
};

struct Completion {
  int32_t status = 0;
  larder_job job = 0;
  uint32_t op = 0;
  uint32_t count = 0;
  uint32_t good = 0;
  uint64_t bytes = 0;
  uint32_t lineage = 0;
  nb::object user_data;
  nb::bytes per_key = nb::bytes("", 0);
  nb::object sizes = nb::none();
};

}  // namespace larder::python

#endif  // LARDER_CLIENT_PYTHON_SRC_QUEUE_H_
