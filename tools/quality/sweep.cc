#include "tools/quality/sweep.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

#include "store/checksum.h"

namespace larder::quality {
namespace {

// The reference run of one text, to which every subject is compared.
struct Reference {
  KvPrefix prefix;
  Capture suffix;
  std::vector<ReferenceLogits> logits;
};

int32_t NextOf(const SplitText& text, uint32_t position) {
  return position + 1 < text.suffix.size() ? text.suffix[position + 1] : -1;
}

// Did the model say every token of the answer? `top` gives what it said after
// each token of the suffix.
bool Retrieved(const SplitText& text, const std::vector<int32_t>& top) {
  if (text.answer_tokens == 0) return false;
  for (size_t i = text.suffix.size() - text.answer_tokens;
       i < text.suffix.size(); ++i) {
    if (top[i - 1] != text.suffix[i]) return false;
  }
  return true;
}

StatusOr<std::unique_ptr<Reference>> RunReference(QualityEngine& engine,
                                                  const SplitText& text,
                                                  bool queries) {
  auto reference = std::make_unique<Reference>();
  const auto prefix_tokens = static_cast<uint32_t>(text.prefix.size());
  engine.Clear();
  Capture prefix;
  LARDER_RETURN_IF_ERROR(engine.Decode(text.prefix, 0, /*logits=*/false,
                                       queries ? &prefix : nullptr));
  LARDER_ASSIGN_OR_RETURN(reference->prefix, engine.Read(prefix_tokens));
  for (CapturedLayer& layer : prefix.layers) {
    reference->prefix.queries.push_back(std::move(layer.queries));
  }
  LARDER_RETURN_IF_ERROR(engine.Decode(text.suffix, prefix_tokens,
                                       /*logits=*/true, &reference->suffix));
  for (uint32_t i = 0; i < text.suffix.size(); ++i) {
    reference->logits.emplace_back(engine.Logits(i), NextOf(text, i));
  }
  return reference;
}

Checksum ChecksumOf(const KvPrefix& prefix) {
  std::vector<Checksum> layers;
  for (const KvLayer& layer : prefix.layers) {
    layers.push_back(ComputeChecksum(std::as_bytes(std::span(layer.keys))));
    layers.push_back(ComputeChecksum(std::as_bytes(std::span(layer.values))));
  }
  return ComputeChecksum(std::as_bytes(std::span(layers)));
}

// What is known of one text by the checksum of what a subject made of its KV:
// the same bits give the same logits, so that codecs which differ in how they
// store the same values are judged once.
using Judged = std::map<std::pair<uint64_t, uint64_t>, TextFigures>;

// Figures as results hold them, so that they do not depend on which of them
// were measured by an earlier run.
double Rounded(double value) {
  return std::strtod(absl::StrFormat("%.7g", value).c_str(), nullptr);
}

StatusOr<TextFigures> Judge(QualityEngine& engine, const SplitText& text,
                            const Reference& reference,
                            const AttentionError* attention,
                            const QualitySubject& subject, Judged& judged) {
  KvPrefix prefix = reference.prefix;
  LARDER_ASSIGN_OR_RETURN(const Rate rate, subject.Apply(prefix));
  const Checksum values = ChecksumOf(prefix);
  if (const auto known = judged.find({values.low, values.high});
      known != judged.end()) {
    TextFigures figures = known->second;
    figures.rate = rate;
    return figures;
  }
  TextFigures figures{.rate = rate, .values = values};
  LARDER_RETURN_IF_ERROR(engine.Replace(prefix));
  LARDER_RETURN_IF_ERROR(
      engine.Decode(text.suffix, prefix.tokens, /*logits=*/true));
  const auto count = static_cast<uint32_t>(text.suffix.size());
  std::vector<int32_t> top, true_top;
  for (uint32_t i = 0; i < count; ++i) {
    const Divergence divergence = reference.logits[i].Compare(engine.Logits(i));
    figures.kl.push_back(Rounded(divergence.kl));
    figures.same_top += divergence.same_top;
    figures.delta_nll += divergence.delta_nll;
    top.push_back(divergence.top);
    true_top.push_back(reference.logits[i].top());
  }
  figures.delta_nll = Rounded(figures.delta_nll);
  figures.retrieved = Retrieved(text, top);
  figures.retrievable = Retrieved(text, true_top);
  if (attention != nullptr) {
    for (const double error : attention->Relative(prefix)) {
      figures.attention.push_back(Rounded(error));
    }
  }
  judged[{values.low, values.high}] = figures;
  return figures;
}

// Calls `work(engine, index)` for every index below `count`, on a thread for
// each engine, until one fails.
Status Spread(Engines engines, size_t count,
              const std::function<Status(QualityEngine&, size_t)>& work) {
  std::mutex mutex;
  size_t next = 0;
  Status failed;
  const auto run = [&](QualityEngine& engine) {
    for (;;) {
      size_t index;
      {
        const std::lock_guard lock(mutex);
        if (next == count || !failed.ok()) return;
        index = next++;
      }
      if (const Status status = work(engine, index); !status.ok()) {
        const std::lock_guard lock(mutex);
        failed = status;
        return;
      }
    }
  };
  {
    std::vector<std::jthread> threads;
    for (size_t i = 1; i < engines.size(); ++i) {
      threads.emplace_back([&, i] { run(*engines[i]); });
    }
    run(*engines[0]);
  }
  return failed;
}

std::string NameOf(const QualitySubject& subject) {
  return absl::StrCat(subject.name(), " ", subject.parameters());
}

bool IsKnown(const TextFigures& figures) {
  return !figures.kl.empty();
}

// One text, every subject that it is not known of.
Status JudgeAll(QualityEngine& engine, const SplitText& text,
                const Subjects& subjects, bool queries,
                const SweepOptions& options, size_t index,
                const std::function<void(size_t subject)>& measured,
                SweepFigures& figures) {
  Judged known;
  for (const PointFigures& point : figures.points) {
    const TextFigures& of = point.texts[index];
    if (IsKnown(of)) known[{of.values.low, of.values.high}] = of;
  }
  std::unique_ptr<Reference> reference;
  std::unique_ptr<AttentionError> attention;
  for (size_t i = 0; i < subjects.size(); ++i) {
    TextFigures& to = figures.points[i].texts[index];
    if (IsKnown(to)) continue;
    if (reference == nullptr) {
      LARDER_ASSIGN_OR_RETURN(reference, RunReference(engine, text, queries));
      if (options.query_stride > 0) {
        attention = std::make_unique<AttentionError>(
            reference->prefix, reference->suffix, options.query_stride);
      }
    }
    StatusOr<TextFigures> judged =
        Judge(engine, text, *reference, attention.get(), *subjects[i], known);
    if (!judged.ok()) return Annotate(judged.status(), NameOf(*subjects[i]));
    to = *std::move(judged);
    measured(i);
  }
  return absl::OkStatus();
}

// Takes what is known, of subjects that still make the same of the first text.
Status TakeKnown(Engines engines, std::span<const SplitText> texts,
                 const Subjects& subjects, bool queries,
                 const SweepOptions& options, SweepFigures& figures) {
  bool any = false;
  for (size_t i = 0; i < subjects.size(); ++i) {
    for (size_t text = 0; text < texts.size(); ++text) {
      const TextFigures* const known = options.known(i, text);
      if (known == nullptr) continue;
      any = true;
      figures.points[i].texts[text] = *known;
    }
  }
  if (!any) return absl::OkStatus();
  QualityEngine& first = *engines[0];
  Capture run;
  KvPrefix prefix;
  first.Clear();
  LARDER_RETURN_IF_ERROR(first.Decode(texts[0].prefix, 0, /*logits=*/false,
                                      queries ? &run : nullptr));
  LARDER_ASSIGN_OR_RETURN(
      prefix, first.Read(static_cast<uint32_t>(texts[0].prefix.size())));
  for (CapturedLayer& layer : run.layers) {
    prefix.queries.push_back(std::move(layer.queries));
  }
  // Each subject's result is its own.
  std::vector<char> same(subjects.size());
  LARDER_RETURN_IF_ERROR(
      Spread(engines, subjects.size(), [&](QualityEngine&, size_t i) -> Status {
        const TextFigures& known = figures.points[i].texts[0];
        if (!IsKnown(known)) return absl::OkStatus();
        KvPrefix applied = prefix;
        const StatusOr<Rate> rate = subjects[i]->Apply(applied);
        if (!rate.ok()) return Annotate(rate.status(), NameOf(*subjects[i]));
        same[i] = rate->bits == known.rate.bits &&
                  rate->elements == known.rate.elements &&
                  ChecksumOf(applied) == known.values;
        return absl::OkStatus();
      }));
  for (size_t i = 0; i < subjects.size(); ++i) {
    if (same[i]) continue;
    std::vector<TextFigures>& of = figures.points[i].texts;
    if (std::none_of(of.begin(), of.end(), IsKnown)) continue;
    of.assign(texts.size(), {});
    if (options.outdated) options.outdated(i);
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<std::vector<Capture>> CaptureTexts(Engines engines,
                                            std::span<const SplitText> texts,
                                            bool with_queries) {
  std::vector<Capture> captures(texts.size());
  const auto capture = [&](QualityEngine& engine, size_t index) {
    std::vector<llama_token> tokens = texts[index].prefix;
    tokens.insert(tokens.end(), texts[index].suffix.begin(),
                  texts[index].suffix.end());
    engine.Clear();
    const Status status =
        engine.Decode(tokens, 0, /*logits=*/false, &captures[index]);
    if (with_queries) return status;
    for (CapturedLayer& layer : captures[index].layers) {
      layer.keys_before_rope = layer.queries = layer.attention_output = {};
    }
    return status;
  };
  LARDER_RETURN_IF_ERROR(Spread(engines, texts.size(), capture));
  return captures;
}

StatusOr<SweepFigures> RunSweep(Engines engines,
                                std::span<const SplitText> texts,
                                const Subjects& subjects,
                                const SweepOptions& options) {
  SweepFigures figures;
  bool queries = false;
  for (const auto& subject : subjects) {
    queries = queries || subject->needs_queries();
    PointFigures& point = figures.points.emplace_back();
    point.name = subject->name();
    point.parameters = subject->parameters();
    point.profile = ProfileIdOf(*subject);
    point.profile_bytes = subject->profile_bytes();
    point.texts.resize(texts.size());
  }
  if (options.known) {
    LARDER_RETURN_IF_ERROR(
        TakeKnown(engines, texts, subjects, queries, options, figures));
  }
  size_t missing = 0;
  for (const PointFigures& point : figures.points) {
    missing += static_cast<size_t>(
        std::count_if(point.texts.begin(), point.texts.end(),
                      [](const TextFigures& text) { return !IsKnown(text); }));
  }

  // Workers write to texts of their own.
  std::mutex mutex;
  size_t done = 0;
  LARDER_RETURN_IF_ERROR(
      Spread(engines, texts.size(), [&](QualityEngine& engine, size_t index) {
        const auto measured = [&](size_t subject) {
          const std::lock_guard lock(mutex);
          if (options.measured) {
            options.measured(subject, index,
                             figures.points[subject].texts[index]);
          }
          if (options.progress) {
            options.progress(static_cast<double>(++done) /
                             static_cast<double>(missing));
          }
        };
        return JudgeAll(engine, texts[index], subjects, queries, options, index,
                        measured, figures);
      }));
  return figures;
}

}  // namespace larder::quality
