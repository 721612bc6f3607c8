#include "store/cluster/announcer.h"

#include <algorithm>
#include <utility>

namespace larder {
namespace {

// Anchors whose homes are found in one go: some milliseconds at 10,000 nodes.
constexpr size_t kRehomeSlice = 256;
// Refreshing rests at least so long.
constexpr absl::Duration kRefreshRest = absl::Milliseconds(200);

}  // namespace

Announcer::Announcer(Parts parts, const AnnouncerOptions& options)
    : parts_(std::move(parts)),
      options_(options),
      refreshed_(parts_.clock->Now()),
      free_at_(refreshed_) {}

Announcer::~Announcer() {
  lifeline_->Cut();
}

void Announcer::SetView(std::shared_ptr<const Rendezvous> rendezvous) {
  absl::MutexLock lock(&mu_);
  steady_ =
      rendezvous_ != nullptr && rendezvous->before() == rendezvous_->digest();
  rendezvous_ = std::move(rendezvous);
  ++views_;
  const ClusterView& view = rendezvous_->view();
  const Node* const self = view.Find(parts_.self.id);
  draining_ = self != nullptr && self->draining;
  // Those that left are nobody's business any more.
  absl::erase_if(homes_, [&view](const auto& home) {
    return !home.second->calling && view.Find(home.first) == nullptr;
  });
  rehome_left_ = order_.size();
  WakeAt(parts_.clock->Now());
}

void Announcer::SetOnTold(OnTold on_told) {
  absl::MutexLock lock(&told_mu_);
  on_told_ = std::move(on_told);
}

void Announcer::Stored(AnchorKey anchor_key, ChunkKey chunk,
                       const ChunkFacts& facts) {
  absl::MutexLock lock(&mu_);
  if (const auto it = places_.find(chunk); it != places_.end()) {
    Anchor& anchor = *anchors_[it->second.anchor];
    ChunkFacts& known = anchor.chunks[it->second.index].facts;
    if (known == facts) return;
    known = facts;
    anchor.copied |= facts.copies > 0;
    Changed(anchor, chunk);
    return;
  }
  std::unique_ptr<Anchor>& anchor = anchors_[anchor_key];
  if (anchor == nullptr) {
    anchor = std::make_unique<Anchor>();
    anchor->place = static_cast<uint32_t>(order_.size());
    order_.push_back(anchor_key);
    if (rendezvous_ != nullptr) {
      anchor->homes = rendezvous_->Find(anchor_key, kHomesMax);
      anchor->views = views_;
    }
  }
  places_[chunk] = {anchor_key, static_cast<uint32_t>(anchor->chunks.size())};
  anchor->chunks.push_back({chunk, facts});
  anchor->copied |= facts.copies > 0;
  Changed(*anchor, chunk);
}

void Announcer::Removed(ChunkKey chunk) {
  absl::MutexLock lock(&mu_);
  const auto it = places_.find(chunk);
  if (it == places_.end()) return;
  const Place place = it->second;
  places_.erase(it);
  Anchor& anchor = *anchors_[place.anchor];
  Changed(anchor, chunk);
  if (place.index + 1 != anchor.chunks.size()) {
    anchor.chunks[place.index] = anchor.chunks.back();
    places_[anchor.chunks[place.index].key].index = place.index;
  }
  anchor.chunks.pop_back();
  if (!anchor.chunks.empty()) return;
  const AnchorKey last = order_.back();
  order_[anchor.place] = last;
  anchors_[last]->place = anchor.place;
  order_.pop_back();
  anchors_.erase(place.anchor);
}

bool Announcer::Confirm(ChunkKey chunk) {
  absl::MutexLock lock(&mu_);
  const auto it = places_.find(chunk);
  if (it == places_.end()) return false;
  Changed(*anchors_[it->second.anchor], chunk);
  return true;
}

void Announcer::Changed(const Anchor& anchor, ChunkKey chunk) {
  for (size_t rank = 0; rank < DirectoriesOf(anchor); ++rank) {
    std::unique_ptr<Home>& home = homes_[anchor.homes[rank]];
    if (home == nullptr) home = std::make_unique<Home>();
    home->changed.Push(chunk);
    if (home->changed.size() > options_.changes_max) {
      ++stats_.overflows;
      home->changed.Clear();
      for (const auto& [key, other] : anchors_) {
        const auto end = other->homes.begin() +
                         static_cast<ptrdiff_t>(DirectoriesOf(*other));
        if (std::find(other->homes.begin(), end, anchor.homes[rank]) != end) {
          home->wholes.Push(key);
        }
      }
    }
    MakeReady(anchor.homes[rank], *home);
  }
}

void Announcer::TellWhole(AnchorKey key, NodeId id) {
  std::unique_ptr<Home>& home = homes_[id];
  if (home == nullptr) home = std::make_unique<Home>();
  home->wholes.Push(key);
  MakeReady(id, *home);
}

void Announcer::MakeReady(NodeId id, Home& home) {
  if (home.calling || home.queued) return;
  home.queued = true;
  ready_.push_back(id);
  WakeAt(parts_.clock->Now() + options_.batch_delay);
}

size_t Announcer::DirectoriesOf(const Anchor& anchor) const {
  return std::min<size_t>(anchor.directories, anchor.homes.size());
}

void Announcer::WakeAt(absl::Time when) {
  if (when >= wake_at_) return;
  wake_at_ = when;
  parts_.executor->PostAt(
      when, Lifeline::Guard<>(lifeline_, Task([this] { Pump(); })));
}

void Announcer::Pump() {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  const absl::Time now = parts_.clock->Now();
  if (now < wake_at_) return;  // another will come
  wake_at_ = absl::InfiniteFuture();
  FindHomes();
  Refresh(now);
  while (!retries_.empty() && retries_.begin()->first <= now) {
    ready_.push_back(retries_.begin()->second);
    retries_.erase(retries_.begin());
  }
  while (!ready_.empty() && free_at_ <= now) {
    const NodeId id = ready_.front();
    ready_.pop_front();
    const auto it = homes_.find(id);
    if (it == homes_.end()) continue;
    it->second->queued = false;
    if (!it->second->calling) Send(id, *it->second, now, after);
  }
  if (!ready_.empty()) WakeAt(free_at_);
  if (!retries_.empty()) WakeAt(retries_.begin()->first);
  if (rehome_left_ > 0) WakeAt(now);
  if (!order_.empty()) {
    const absl::Duration each =
        options_.refresh / static_cast<double>(order_.size());
    WakeAt(now + std::max(kRefreshRest, each * (1 - refresh_owed_)));
  }
}

void Announcer::FindHomes() {
  rehome_left_ = std::min(rehome_left_, order_.size());
  for (size_t i = 0; i < kRehomeSlice && rehome_left_ > 0; ++i) {
    const AnchorKey key = order_[--rehome_left_];
    FindHomes(key, *anchors_[key]);
  }
}

void Announcer::FindHomes(AnchorKey key, Anchor& anchor) {
  if (anchor.views == views_) return;
  // What changed is known if no view was left out.
  const bool known = steady_ && anchor.views != 0 && anchor.views + 1 == views_;
  anchor.views = views_;
  if (known && !draining_ &&
      !rendezvous_->Moved(key, anchor.homes, kHomesMax)) {
    return;
  }
  const Homes before =
      std::exchange(anchor.homes, rendezvous_->Find(key, kHomesMax));
  const auto end = before.begin() + static_cast<ptrdiff_t>(std::min<size_t>(
                                        anchor.directories, before.size()));
  for (size_t rank = 0; rank < DirectoriesOf(anchor); ++rank) {
    const NodeId home = anchor.homes[rank];
    const bool told = known && !rendezvous_->Left(home) &&
                      std::find(before.begin(), end, home) != end;
    // The first also says which copies are missing at the homes of now; who
    // drains asks for that of everything.
    const bool asks = rank == 0 && (draining_ || anchor.copied);
    if (!told || asks) TellWhole(key, home);
  }
}

void Announcer::Refresh(absl::Time now) {
  const double share = absl::FDivDuration(now - std::exchange(refreshed_, now),
                                          options_.refresh);
  refresh_owed_ = std::min(refresh_owed_ + share * order_.size(),
                           static_cast<double>(order_.size()));
  while (refresh_owed_ >= 1) {
    refresh_owed_ -= 1;
    if (refresh_left_ == 0 || refresh_left_ > order_.size()) {
      refresh_left_ = order_.size();
    }
    const AnchorKey key = order_[--refresh_left_];
    const Anchor& anchor = *anchors_[key];
    for (size_t rank = 0; rank < DirectoriesOf(anchor); ++rank) {
      TellWhole(key, anchor.homes[rank]);
    }
  }
}

void Announcer::Send(NodeId id, Home& home, absl::Time now,
                     AfterUnlock& after) {
  if (rendezvous_->view().Find(id) == nullptr) {
    homes_.erase(id);
    return;
  }
  Announce announce;
  announce.incarnation = parts_.self.incarnation;
  Announce::Section gone;
  size_t room =
      std::clamp<size_t>(options_.message_records_max, 1, kAnnounceRecordsMax);
  std::vector<std::pair<AnchorKey, ChunkRecord>> changed;
  for (; room > 0 && !home.changed.empty(); --room) {
    const ChunkKey key = home.changed.Pop();
    home.sent_changed.push_back(key);
    if (const auto it = places_.find(key); it != places_.end()) {
      changed.emplace_back(
          it->second.anchor,
          anchors_[it->second.anchor]->chunks[it->second.index]);
    } else {
      gone.records.push_back({key, {.tier = CopyTier::kGone}});
    }
  }
  std::stable_sort(
      changed.begin(), changed.end(),
      [](const auto& a, const auto& b) { return a.first < b.first; });
  for (const auto& [anchor, record] : changed) {
    if (announce.sections.empty() ||
        announce.sections.back().anchor != anchor) {
      announce.sections.push_back({anchor, {}});
    }
    announce.sections.back().records.push_back(record);
  }
  while (room > 0 && (home.current.has_value() || !home.wholes.empty())) {
    if (!home.current.has_value()) {
      home.current = {home.wholes.Pop(), SIZE_MAX};
    }
    Whole& whole = *home.current;
    const auto it = anchors_.find(whole.anchor);
    if (it == anchors_.end()) {
      home.current.reset();
      continue;
    }
    home.sent_wholes.push_back(whole.anchor);
    const std::vector<ChunkRecord>& chunks = it->second->chunks;
    whole.left = std::min(whole.left, chunks.size());
    const size_t count = std::min(room, whole.left);
    const auto end = chunks.begin() + static_cast<ptrdiff_t>(whole.left);
    if (count > 0) {
      announce.sections.push_back(
          {whole.anchor, {end - static_cast<ptrdiff_t>(count), end}});
    }
    room -= count;
    whole.left -= count;
    if (whole.left == 0) home.current.reset();
  }
  if (!gone.records.empty()) announce.sections.push_back(std::move(gone));
  if (announce.sections.empty()) {
    home.sent_changed.clear();
    home.sent_wholes.clear();
    return;
  }
  announce.sequence = ++sequence_;
  home.calling = true;
  size_t records = 0;
  for (const Announce::Section& section : announce.sections) {
    records += section.records.size();
  }
  ++stats_.messages;
  stats_.records += records;
  free_at_ = std::max(free_at_, now) +
             absl::Seconds(records / options_.records_per_second);

  std::string message = Encode(announce);
  if (id == parts_.self.id) {
    after.Call([this, id, message = std::move(message),
                announce = std::move(announce)]() mutable {
      parts_.executor->Post(Lifeline::Guard<>(
          lifeline_, Task([this, id, message = std::move(message),
                           announce = std::move(announce)] {
            OnAnswer(id, announce, parts_.directory->Handle(id, message));
          })));
    });
    return;
  }
  auto replied = Lifeline::Guard<StatusOr<std::string>>(
      lifeline_, PeerCalls::Replied([this, id, announce = std::move(announce)](
                                        StatusOr<std::string> answer) {
        OnAnswer(id, announce, std::move(answer));
      }));
  after.Call([this, id, message = std::move(message),
              deadline = now + options_.call_timeout,
              replied = std::move(replied)]() mutable {
    parts_.calls->Call(id, std::move(message), deadline, std::move(replied));
  });
}

void Announcer::OnAnswer(NodeId id, const Announce& said,
                         StatusOr<std::string> answer) {
  StatusOr<Announced> announced =
      answer.ok() ? ParseAnnounced(*answer) : answer.status();
  if (announced.ok() && announced->sections.size() != said.sections.size()) {
    announced = absl::InvalidArgumentError("an answer to something else");
  }
  std::vector<Told> told;
  {
    absl::MutexLock lock(&mu_);
    const auto it = homes_.find(id);
    if (it == homes_.end()) return;
    Home& home = *it->second;
    home.calling = false;
    const auto changed = std::exchange(home.sent_changed, {});
    const auto wholes = std::exchange(home.sent_wholes, {});
    if (!announced.ok()) {
      ++stats_.failures;
      for (const ChunkKey key : changed) home.changed.Push(key);
      for (const AnchorKey key : wholes) home.wholes.Push(key);
      if (!home.queued) {
        home.queued = true;
        retries_.emplace(parts_.clock->Now() + options_.retry, id);
        WakeAt(retries_.begin()->first);
      }
      return;
    }
    if (home.HasWork()) {
      MakeReady(id, home);
    } else {
      homes_.erase(it);
    }
    for (size_t s = 0; s < said.sections.size(); ++s) {
      const Announce::Section& section = said.sections[s];
      const Announced::Section& heard = announced->sections[s];
      const auto at = anchors_.find(section.anchor);
      if (at == anchors_.end()) continue;
      Anchor& anchor = *at->second;
      if (anchor.homes.empty() || anchor.homes[0] != id) continue;
      const size_t before = DirectoriesOf(anchor);
      anchor.directories = heard.directories;
      for (size_t rank = before; rank < DirectoriesOf(anchor); ++rank) {
        TellWhole(section.anchor, anchor.homes[rank]);
      }
      // Ranks mean something among those who agree about the homes.
      if (anchor.views != views_ ||
          announced->digest != rendezvous_->digest() ||
          heard.verdicts.size() != section.records.size()) {
        continue;
      }
      for (size_t i = 0; i < section.records.size(); ++i) {
        if (heard.verdicts[i].refused) continue;
        told.push_back({section.anchor, section.records[i].key,
                        section.records[i].facts, anchor.homes,
                        heard.verdicts[i]});
      }
    }
  }
  if (told.empty()) return;
  absl::MutexLock lock(&told_mu_);
  if (on_told_) on_told_(told);
}

Announcer::Stats Announcer::GetStats() const {
  absl::MutexLock lock(&mu_);
  Stats stats = stats_;
  stats.chunks = places_.size();
  stats.anchors = anchors_.size();
  for (const auto& [id, home] : homes_) {
    stats.waiting += home->changed.size() + home->wholes.size() +
                     home->sent_changed.size() + home->sent_wholes.size();
  }
  return stats;
}

bool Announcer::Quiet() const {
  absl::MutexLock lock(&mu_);
  return rehome_left_ == 0 && homes_.empty();
}

}  // namespace larder
