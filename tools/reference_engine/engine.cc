#include "tools/reference_engine/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <span>
#include <utility>

namespace larder::reference {
namespace {

using SteadyClock = std::chrono::steady_clock;

std::string ToText(const Status& status) {
  return std::string(status.message());
}

}  // namespace

// One step of a prefill: waits for the load's layers, saves its own.
class Engine::Step final : public StepObserver {
 public:
  Step(PrefixLoad* load, PrefixSave* save, Timeline* timeline,
       const std::function<void(uint32_t)>& told)
      : load_(load), save_(save), timeline_(timeline), told_(told) {
    since_ = Now();
  }

  Status BeforeAttention(uint32_t layer) override {
    if (load_ == nullptr) return absl::OkStatus();
    if (told_ != nullptr) told_(layer);
    Switch(Track::kCompute, layer);
    const Status came = load_->WaitLayer(layer);
    Switch(Track::kWait, layer);
    return came;
  }

  Status AfterKv(uint32_t layer) override {
    if (save_ == nullptr || !save_problem_.ok()) return absl::OkStatus();
    Switch(Track::kCompute, layer);
    save_problem_ = save_->SaveLayer(layer);
    Switch(Track::kSave, layer);
    return absl::OkStatus();
  }

  void AfterLayer(uint32_t layer) override { Switch(Track::kCompute, layer); }

  // Saving is nobody's step's failure.
  const Status& save_problem() const { return save_problem_; }

 private:
  double Now() const { return timeline_ == nullptr ? 0 : timeline_->Now(); }
  // What was done since the last call was this.
  void Switch(Track track, uint32_t layer) {
    if (timeline_ == nullptr) return;
    const double now = Now();
    timeline_->Add(track, layer, since_, now);
    since_ = now;
  }

  PrefixLoad* const load_;
  PrefixSave* const save_;
  Timeline* const timeline_;
  const std::function<void(uint32_t)>& told_;
  double since_ = 0;
  Status save_problem_;
};

Engine::Engine(const Checkpoint& checkpoint, uint32_t blocks,
               PrefixCache* prefixes)
    : checkpoint_(checkpoint),
      transformer_(checkpoint),
      cache_(checkpoint.config, blocks),
      prefixes_(prefixes) {}

StatusOr<std::vector<float>> Engine::Prefill(const Request& request,
                                             uint32_t position,
                                             PrefixLoad* load,
                                             std::unique_ptr<PrefixSave>& save,
                                             Answer& answer) {
  save = nullptr;
  if (prefixes_ != nullptr && request.save) {
    StatusOr<std::unique_ptr<PrefixSave>> begun =
        prefixes_->StartSave(request.prompt, table_, cache_, request.wish);
    if (begun.ok()) {
      save = *std::move(begun);
    } else {
      answer.problem = ToText(begun.status());
    }
  }
  const auto give_up_saving = [&](const Status& status) {
    if (status.ok()) return;
    answer.problem = ToText(status);
    save = nullptr;
  };
  std::vector<float> logits;
  const auto size = static_cast<uint32_t>(request.prompt.size());
  while (position < size) {
    const uint32_t end = std::min(size, position + request.step_tokens);
    if (save != nullptr) give_up_saving(save->BeginStep(position, end));
    Step step(load, save.get(), request.timeline, told_);
    LARDER_ASSIGN_OR_RETURN(
        logits, transformer_.Step(
                    std::span(request.prompt).subspan(position, end - position),
                    position, table_, cache_, &step));
    if (load != nullptr) {
      LARDER_ASSIGN_OR_RETURN(answer.lineage, load->Finish());
      load = nullptr;
    }
    if (save != nullptr) give_up_saving(step.save_problem());
    if (save != nullptr) give_up_saving(save->CommitStep(answer.lineage));
    position = end;
  }
  return logits;
}

StatusOr<Answer> Engine::Run(const Request& request) {
  const auto begin = SteadyClock::now();
  if (request.prompt.empty() || request.step_tokens == 0) {
    return absl::InvalidArgumentError("an empty prompt, or steps of nothing");
  }
  for (const uint32_t token : request.prompt) {
    if (token >= checkpoint_.config.vocabulary) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ", token, " is not in the vocabulary"));
    }
  }
  cache_.Free(table_);
  const uint64_t tokens = request.prompt.size() + request.answer_tokens;
  if (tokens > uint64_t{cache_.blocks()} * kBlockTokens) {
    return absl::ResourceExhaustedError(
        absl::StrCat(tokens, " tokens do not fit the paged cache"));
  }
  LARDER_RETURN_IF_ERROR(cache_.Grow(static_cast<uint32_t>(tokens), table_));

  Answer answer;
  std::unique_ptr<PrefixSave> save;
  StatusOr<std::vector<float>> logits = absl::NotFoundError("nothing loaded");
  if (prefixes_ != nullptr && (request.load || request.arriving)) {
    const StatusOr<uint32_t> found = request.arriving
                                         ? SharedTokens(request.prompt)
                                         : prefixes_->Match(request.prompt);
    if (!found.ok()) answer.problem = ToText(found.status());
    if (found.value_or(0) > 0) {
      StatusOr<std::unique_ptr<PrefixLoad>> load =
          prefixes_->StartLoad(request.prompt, *found, table_, cache_,
                               request.timeline, request.arriving);
      if (load.ok()) {
        logits = Prefill(request, *found, load->get(), save, answer);
      }
      if (load.ok() && logits.ok()) {
        answer.loaded_tokens = *found;
      } else {
        answer.voided = true;
        answer.lineage = LARDER_LINEAGE_EXACT;
        answer.problem = ToText(load.ok() ? logits.status() : load.status());
      }
      // The load ends here: from now on nothing lands in the blocks.
    }
  }
  if (!logits.ok()) logits = Prefill(request, 0, nullptr, save, answer);
  if (!logits.ok()) return logits.status();
  answer.prompt_logits = *logits;
  answer.first_token_seconds =
      std::chrono::duration<double>(SteadyClock::now() - begin).count();

  auto position = static_cast<uint32_t>(request.prompt.size());
  while (answer.tokens.size() < request.answer_tokens) {
    const uint32_t next = MostLikely(*logits);
    answer.tokens.push_back(next);
    if (answer.tokens.size() == request.answer_tokens) break;
    LARDER_ASSIGN_OR_RETURN(
        *logits,
        transformer_.Step(std::span(&next, 1), position++, table_, cache_));
  }
  if (save != nullptr) {
    StatusOr<uint32_t> saved =
        save->Wait(request.wish.durable ? LARDER_DURABLE : LARDER_VOLATILE);
    answer.saved_chunks = saved.value_or(0);
    if (saved.ok() && !request.wish.destination.empty()) {
      saved = save->Wait(LARDER_DELIVERED);
    }
    if (!saved.ok()) answer.problem = ToText(saved.status());
  }
  return answer;
}

uint32_t MostLikely(const std::vector<float>& logits) {
  return static_cast<uint32_t>(std::max_element(logits.begin(), logits.end()) -
                               logits.begin());
}

double Divergence(const std::vector<float>& logits,
                  const std::vector<float>& other) {
  const auto log_total = [](const std::vector<float>& of) {
    const double most = *std::max_element(of.begin(), of.end());
    double total = 0;
    for (const float x : of) total += std::exp(x - most);
    return most + std::log(total);
  };
  const double total = log_total(logits), other_total = log_total(other);
  double sum = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double log_p = logits[i] - total;
    sum += std::exp(log_p) * (log_p - (other[i] - other_total));
  }
  return sum;
}

}  // namespace larder::reference
