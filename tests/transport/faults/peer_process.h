#ifndef LARDER_TESTS_TRANSPORT_FAULTS_PEER_PROCESS_H_
#define LARDER_TESTS_TRANSPORT_FAULTS_PEER_PROCESS_H_

#include <nlohmann/json.hpp>
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/synchronization/mutex.h"

#include "tests/testing/netns/host_network.h"

namespace larder {

// A link_peer in a host, and what it says (link_peer_main.cc).
class PeerProcess {
 public:
  using Json = nlohmann::json;

  // `program` is the path of link_peer. Errors say that it did not start.
  static StatusOr<std::unique_ptr<PeerProcess>> Start(
      const HostNetwork& network, uint32_t host, const std::string& program,
      std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), program);
    LARDER_ASSIGN_OR_RETURN(
        std::unique_ptr<HostProcess> process,
        network.Start(host, arguments, {"UCX_WARN_UNUSED_ENV_VARS=n"}));
    std::unique_ptr<PeerProcess> peer(new PeerProcess(std::move(process)));
    const auto first = peer->Event(
        [](const Json& event) { return event["event"] != "state"; });
    if (!first.has_value() || (*first)["event"] != "ready") {
      return absl::UnavailableError(first.has_value()
                                        ? first->value("why", "it said nothing")
                                        : "it ended");
    }
    peer->address_ = first->value("address", "");
    return peer;
  }
  ~PeerProcess() {
    process_->Signal(SIGKILL);
    reader_.join();
  }

  const std::string& address() const { return address_; }
  pid_t pid() const { return process_->pid(); }
  void Order(const std::string& order) { process_->Write(order + "\n"); }
  void Signal(int signal) { process_->Signal(signal); }

  // The last state that it said.
  Json state() {
    absl::MutexLock lock(&mu_);
    return state_;
  }
  int64_t Count(const char* name) { return state().value(name, int64_t{0}); }
  // Waits until a state is as it should be, or the process is no more: false.
  bool Until(absl::FunctionRef<bool(const Json& state)> wanted) {
    absl::MutexLock lock(&mu_);
    const auto met = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      return ended_ || (!state_.empty() && wanted(state_));
    };
    mu_.Await(absl::Condition(&met));
    return !state_.empty() && wanted(state_);
  }
  // `more` than there were are there now.
  bool UntilMore(const char* name, int64_t more) {
    const int64_t before = Count(name);
    return Until([&](const Json& state) {
      return state.value(name, int64_t{0}) >= before + more;
    });
  }
  // Waits for an event, those included that were already; each is had once.
  std::optional<Json> Event(absl::FunctionRef<bool(const Json& event)> wanted) {
    absl::MutexLock lock(&mu_);
    const auto find = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      return std::find_if(events_.begin(), events_.end(), wanted);
    };
    const auto met = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      return ended_ || find() != events_.end();
    };
    mu_.Await(absl::Condition(&met));
    const auto it = find();
    if (it == events_.end()) return std::nullopt;
    Json event = std::move(*it);
    events_.erase(it);
    return event;
  }
  std::optional<Json> Event(const std::string& name) {
    return Event([&](const Json& event) { return event["event"] == name; });
  }
  // All of them.
  std::vector<Json> states() {
    absl::MutexLock lock(&mu_);
    return states_;
  }
  // Quits it; what it said last, null if it did not come to that, and how it
  // ended.
  std::pair<Json, int> Quit() {
    Order("quit");
    const auto end = Event("end");
    return {end.value_or(Json()), process_->Wait()};
  }
  int Wait() { return process_->Wait(); }

 private:
  explicit PeerProcess(std::unique_ptr<HostProcess> process)
      : process_(std::move(process)), reader_([this] { Read(); }) {}

  void Read() {
    while (const auto line = process_->ReadLine()) {
      Json said = Json::parse(*line, nullptr, false);
      if (!said.is_object() || !said.contains("event")) {
        std::fprintf(stderr, "%s\n", line->c_str());  // UCX's own words
        continue;
      }
      absl::MutexLock lock(&mu_);
      if (said["event"] == "state") {
        states_.push_back(said);
        state_ = std::move(said);
      } else {
        events_.push_back(std::move(said));
      }
    }
    absl::MutexLock lock(&mu_);
    ended_ = true;
  }

  const std::unique_ptr<HostProcess> process_;
  std::string address_;
  absl::Mutex mu_;
  Json state_ ABSL_GUARDED_BY(mu_) = Json::object();
  std::vector<Json> states_ ABSL_GUARDED_BY(mu_);
  std::vector<Json> events_ ABSL_GUARDED_BY(mu_);
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
  std::thread reader_;  // last: it uses the rest
};

}  // namespace larder

#endif  // LARDER_TESTS_TRANSPORT_FAULTS_PEER_PROCESS_H_
