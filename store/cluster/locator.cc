#include "store/cluster/locator.h"

#include <algorithm>
#include <map>
#include <utility>

namespace larder {
namespace {

constexpr size_t kHotAnchorsMax = 4096;

}  // namespace

Locator::Locator(Parts parts, const LocatorOptions& options)
    : parts_(parts), options_(options) {}

Locator::~Locator() {
  lifeline_->Cut();
}

void Locator::SetView(std::shared_ptr<const Rendezvous> rendezvous) {
  absl::MutexLock lock(&mu_);
  rendezvous_ = std::move(rendezvous);
  suspects_.clear();
}

std::vector<Location> Locator::Find(const Scope& scope,
                                    std::span<const ChunkId> ids,
                                    size_t start) {
  std::vector<Location> locations;
  absl::MutexLock lock(&mu_);
  const absl::Time now = parts_.clock->Now();
  for (size_t i = start; i < ids.size(); ++i) {
    locations.push_back(Look(ComputeChunkKey(scope, ids[i]), now));
  }
  return locations;
}

void Locator::Locate(const Scope& scope, std::span<const ChunkId> ids,
                     size_t start, absl::Time deadline, Done done) {
  auto wait = std::make_shared<Wait>();
  wait->done = std::move(done);
  for (size_t i = start; i < ids.size(); ++i) {
    wait->keys.push_back(ComputeChunkKey(scope, ids[i]));
  }
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  const absl::Time now = parts_.clock->Now();
  std::map<NodeId, std::shared_ptr<Question>> questions;  // not full yet
  std::vector<std::shared_ptr<Question>> to_ask;
  const auto await = [&wait](Question& question) {
    auto& waits = question.waits;
    if (std::find(waits.begin(), waits.end(), wait) != waits.end()) return;
    waits.push_back(wait);
    ++wait->questions;
  };
  for (size_t begin = start; begin < ids.size();) {
    const size_t end =
        std::min(ids.size(), AnchorIndex(begin) + kAnchorSpacing);
    const AnchorKey anchor = ComputeAnchorKey(scope, ids[AnchorIndex(begin)]);
    NodeId home{};
    bool chosen = false, possible = false;
    for (size_t i = begin; i < end; ++i) {
      const ChunkKey key = wait->keys[i - start];
      if (Look(key, now).state != Location::State::kUnknown) continue;
      if (const auto it = asking_.find(key); it != asking_.end()) {
        await(*it->second);
        ++stats_.merged;
        continue;
      }
      if (!chosen) possible = ChooseHome(anchor, now, home);
      chosen = true;
      if (!possible) break;
      std::shared_ptr<Question>& question = questions[home];
      if (question == nullptr) {
        question = std::make_shared<Question>();
        question->home = home;
        to_ask.push_back(question);
        await(*question);
      }
      auto& sections = question->find.sections;
      if (sections.empty() || sections.back().anchor != anchor) {
        sections.push_back({anchor, {}});
      }
      sections.back().keys.push_back(key);
      asking_[key] = question;
      size_t keys = 0;
      for (const auto& section : sections) keys += section.keys.size();
      if (keys == kFindKeysMax) question = nullptr;
    }
    begin = end;
  }
  for (auto& question : to_ask) Ask(std::move(question), now, after);
  if (wait->questions == 0) {
    parts_.executor->Post(Lifeline::Guard<>(lifeline_, Task([this, wait] {
                                              AfterUnlock run;
                                              absl::MutexLock relock(&mu_);
                                              Finish(wait, run);
                                            })));
    return;
  }
  if (deadline == absl::InfiniteFuture()) return;
  parts_.executor->PostAt(
      deadline, Lifeline::Guard<>(
                    lifeline_, Task([this, weak = std::weak_ptr<Wait>(wait)] {
                      AfterUnlock run;
                      absl::MutexLock relock(&mu_);
                      if (const auto late = weak.lock()) Finish(late, run);
                    })));
}

void Locator::Forget(ChunkKey chunk, NodeId node) {
  absl::MutexLock lock(&mu_);
  for (auto* map : {&young_, &old_}) {
    const auto it = map->find(chunk);
    if (it == map->end() || it->second.holders.empty()) continue;
    auto& holders = it->second.holders;
    holders.erase(
        std::remove_if(holders.begin(), holders.end(),
                       [node](const Holder& h) { return h.node == node; }),
        holders.end());
    if (holders.empty()) {
      it->second.until =
          std::min(it->second.until, parts_.clock->Now() + options_.absent_for);
    }
  }
}

Location Locator::Look(ChunkKey key, absl::Time now) {
  Location location;
  const Known* known = nullptr;
  for (const auto* map : {&young_, &old_}) {
    const auto it = map->find(key);
    if (it == map->end()) continue;
    known = &it->second;
    break;
  }
  if (known == nullptr || known->until <= now) return location;
  for (const Holder& holder : known->holders) {
    if (rendezvous_->view().Find(holder.node) != nullptr) {
      location.holders.push_back(holder);
    }
  }
  if (!location.holders.empty()) {
    location.state = Location::State::kHeld;
  } else if (known->holders.empty()) {
    location.state = Location::State::kAbsent;
  }
  return location;
}

void Locator::Remember(ChunkKey key, Known known) {
  if (2 * young_.size() >= options_.chunks_max) {
    old_ = std::exchange(young_, {});
  }
  young_[key] = std::move(known);
}

bool Locator::ChooseHome(AnchorKey anchor, absl::Time now, NodeId& home) {
  if (rendezvous_ == nullptr) return false;
  size_t directories = 1;
  if (const auto it = hot_.find(anchor); it != hot_.end()) {
    if (it->second.until > now) {
      directories = it->second.directories;
    } else {
      hot_.erase(it);
    }
  }
  const Homes homes = rendezvous_->Find(anchor, directories);
  // Askers differ in where they begin.
  const size_t first =
      homes.size() < 2 ? 0
                       : Rendezvous::Weight(anchor, NodeId{~Raw(parts_.self)}) %
                             homes.size();
  for (size_t i = 0; i < homes.size(); ++i) {
    home = homes[(first + i) % homes.size()];
    const auto suspect = suspects_.find(home);
    if (suspect == suspects_.end() || suspect->second <= now) return true;
  }
  return false;
}

void Locator::Ask(std::shared_ptr<Question> question, absl::Time now,
                  AfterUnlock& after) {
  const NodeId home = question->home;
  std::string message = Encode(question->find);
  if (home == parts_.self) {
    after.Call([this, question = std::move(question),
                message = std::move(message)]() mutable {
      parts_.executor->Post(Lifeline::Guard<>(
          lifeline_, Task([this, question = std::move(question),
                           message = std::move(message)] {
            OnAnswer(question, parts_.directory->Handle(parts_.self, message));
          })));
    });
    return;
  }
  ++stats_.messages;
  for (const auto& section : question->find.sections) {
    stats_.asked += section.keys.size();
  }
  auto replied = Lifeline::Guard<StatusOr<std::string>>(
      lifeline_, PeerCalls::Replied([this, question = std::move(question)](
                                        StatusOr<std::string> answer) {
        OnAnswer(question, std::move(answer));
      }));
  after.Call([this, home, message = std::move(message),
              deadline = now + options_.call_timeout,
              replied = std::move(replied)]() mutable {
    parts_.calls->Call(home, std::move(message), deadline, std::move(replied));
  });
}

void Locator::OnAnswer(const std::shared_ptr<Question>& question,
                       StatusOr<std::string> answer) {
  StatusOr<FindAnswer> found =
      answer.ok() ? ParseFound(*answer) : answer.status();
  const auto& asked = question->find.sections;
  bool fits = found.ok() && found->sections.size() == asked.size();
  for (size_t s = 0; fits && s < asked.size(); ++s) {
    fits = found->sections[s].holders.size() == asked[s].keys.size();
  }
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  const absl::Time now = parts_.clock->Now();
  if (!fits) {
    ++stats_.failures;
    suspects_[question->home] = now + options_.suspect_for;
  }
  for (size_t s = 0; s < asked.size(); ++s) {
    for (size_t i = 0; i < asked[s].keys.size(); ++i) {
      const ChunkKey key = asked[s].keys[i];
      asking_.erase(key);
      if (!fits) continue;
      Known known;
      for (const Holder& holder : found->sections[s].holders[i]) {
        if (holder.node != parts_.self) known.holders.push_back(holder);
      }
      known.until = now + (known.holders.empty() ? options_.absent_for
                                                 : options_.held_for);
      Remember(key, std::move(known));
    }
    if (fits && found->sections[s].directories > 1) {
      if (hot_.size() >= kHotAnchorsMax) hot_.clear();
      hot_[asked[s].anchor] = {found->sections[s].directories,
                               now + options_.held_for};
    }
  }
  for (const auto& wait : question->waits) {
    if (--wait->questions == 0) Finish(wait, after);
  }
}

void Locator::Finish(const std::shared_ptr<Wait>& wait, AfterUnlock& after) {
  if (!wait->done) return;
  const absl::Time now = parts_.clock->Now();
  std::vector<Location> locations;
  for (const ChunkKey key : wait->keys) locations.push_back(Look(key, now));
  after.Call([done = std::exchange(wait->done, nullptr),
              locations = std::move(locations)]() mutable {
    std::move(done)(std::move(locations));
  });
}

Locator::Stats Locator::GetStats() const {
  absl::MutexLock lock(&mu_);
  Stats stats = stats_;
  stats.remembered = young_.size() + old_.size();
  return stats;
}

}  // namespace larder
