#include "tools/quality/sweep.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>

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
  TextFigures figures;
  figures.rate = rate;
  LARDER_RETURN_IF_ERROR(engine.Replace(prefix));
  LARDER_RETURN_IF_ERROR(
      engine.Decode(text.suffix, prefix.tokens, /*logits=*/true));
  const auto count = static_cast<uint32_t>(text.suffix.size());
  std::vector<int32_t> top;
  for (uint32_t i = 0; i < count; ++i) {
    const Divergence divergence = reference.logits[i].Compare(engine.Logits(i));
    figures.kl.push_back(divergence.kl);
    figures.same_top += divergence.same_top;
    figures.delta_nll += divergence.delta_nll;
    top.push_back(divergence.top);
  }
  figures.retrieved = Retrieved(text, top);
  if (attention != nullptr) {
    figures.attention = attention->Relative(prefix);
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

// One text, every subject.
Status JudgeAll(QualityEngine& engine, const SplitText& text,
                const Subjects& subjects, bool queries,
                const SweepOptions& options, size_t index,
                const std::function<void()>& progress, SweepFigures& figures) {
  LARDER_ASSIGN_OR_RETURN(const std::unique_ptr<Reference> reference,
                          RunReference(engine, text, queries));
  std::vector<int32_t> top;
  for (const ReferenceLogits& logits : reference->logits) {
    top.push_back(logits.top());
  }
  figures.reference_found[index] = Retrieved(text, top);
  std::unique_ptr<AttentionError> attention;
  if (options.query_stride > 0) {
    attention = std::make_unique<AttentionError>(
        reference->prefix, reference->suffix, options.query_stride);
  }
  Judged known;
  for (size_t i = 0; i < subjects.size(); ++i) {
    StatusOr<TextFigures> judged =
        Judge(engine, text, *reference, attention.get(), *subjects[i], known);
    if (!judged.ok()) {
      return Annotate(judged.status(), absl::StrCat(subjects[i]->name(), " ",
                                                    subjects[i]->parameters()));
    }
    figures.points[i].texts[index] = *std::move(judged);
    progress();
  }
  return absl::OkStatus();
}

template <typename Figure>
double Sum(const PointFigures& point, std::span<const uint32_t> texts,
           Figure figure) {
  double sum = 0;
  for (const uint32_t text : texts) sum += figure(point.texts[text]);
  return sum;
}

double Positions(const TextFigures& text) {
  return static_cast<double>(text.kl.size());
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
    point.profile_bytes = subject->profile_bytes();
    point.texts.resize(texts.size());
  }
  figures.reference_found.resize(texts.size());

  // Workers write to texts of their own.
  std::mutex mutex;
  size_t done = 0;
  const auto progress = [&] {
    const std::lock_guard lock(mutex);
    ++done;
    if (options.progress) {
      options.progress(static_cast<double>(done) /
                       static_cast<double>(texts.size() * subjects.size()));
    }
  };
  LARDER_RETURN_IF_ERROR(
      Spread(engines, texts.size(), [&](QualityEngine& engine, size_t index) {
        return JudgeAll(engine, texts[index], subjects, queries, options, index,
                        progress, figures);
      }));
  return figures;
}

std::vector<uint32_t> AllTexts(const PointFigures& point) {
  std::vector<uint32_t> texts(point.texts.size());
  std::iota(texts.begin(), texts.end(), 0u);
  return texts;
}

double BitsPerElement(const PointFigures& point, const ModelShape& shape,
                      std::span<const uint32_t> texts) {
  const double bits = Sum(point, texts, [](const TextFigures& text) {
    return static_cast<double>(text.rate.bits);
  });
  const double elements = Sum(point, texts, [](const TextFigures& text) {
    return static_cast<double>(text.rate.elements);
  });
  const double per_token = 2.0 * shape.row() * shape.layers;
  return bits / elements + static_cast<double>(point.profile_bytes) * 8 /
                               (kProfileTokens * per_token);
}

double MeanKl(const PointFigures& point, std::span<const uint32_t> texts) {
  return Sum(point, texts,
             [](const TextFigures& text) {
               return std::accumulate(text.kl.begin(), text.kl.end(), 0.0);
             }) /
         Sum(point, texts, Positions);
}

Summary Summarize(const PointFigures& point, const ModelShape& shape) {
  const auto count = static_cast<uint32_t>(point.texts.size());
  const std::vector<uint32_t> all = AllTexts(point);
  Summary summary;
  using Drawn = std::span<const uint32_t>;
  summary.bits = Bootstrap(
      count, [&](Drawn texts) { return BitsPerElement(point, shape, texts); });
  summary.kl =
      Bootstrap(count, [&](Drawn texts) { return MeanKl(point, texts); });
  summary.top1 = Bootstrap(count, [&](Drawn texts) {
    return Sum(point, texts,
               [](const TextFigures& text) { return double(text.same_top); }) /
           Sum(point, texts, Positions);
  });
  summary.delta_nll = Bootstrap(count, [&](Drawn texts) {
    // The last position of a text has no next token.
    return Sum(point, texts,
               [](const TextFigures& text) { return text.delta_nll; }) /
           Sum(point, texts,
               [](const TextFigures& text) { return Positions(text) - 1; });
  });
  std::vector<double> kl;
  for (const TextFigures& text : point.texts) {
    kl.insert(kl.end(), text.kl.begin(), text.kl.end());
  }
  std::sort(kl.begin(), kl.end());
  summary.max_kl = kl.back();
  summary.p99_kl =
      kl[static_cast<size_t>(0.99 * static_cast<double>(kl.size() - 1) + 0.5)];
  for (const TextFigures& text : point.texts) {
    summary.attention_of_layers.resize(text.attention.size());
    for (size_t layer = 0; layer < text.attention.size(); ++layer) {
      summary.attention_of_layers[layer] += text.attention[layer] / count;
    }
  }
  if (!summary.attention_of_layers.empty()) {
    const std::vector<double>& layers = summary.attention_of_layers;
    summary.attention = std::accumulate(layers.begin(), layers.end(), 0.0) /
                        static_cast<double>(layers.size());
    summary.worst_attention = *std::max_element(layers.begin(), layers.end());
  }
  summary.retrieved =
      Sum(point, all,
          [](const TextFigures& text) { return text.retrieved ? 1.0 : 0.0; }) /
      count;
  return summary;
}

}  // namespace larder::quality
