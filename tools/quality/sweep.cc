#include "tools/quality/sweep.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>

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

StatusOr<TextFigures> Judge(QualityEngine& engine, const SplitText& text,
                            const Reference& reference,
                            const AttentionError* attention,
                            const QualitySubject& subject) {
  KvPrefix prefix = reference.prefix;
  TextFigures figures;
  LARDER_ASSIGN_OR_RETURN(figures.rate, subject.Apply(prefix));
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
  return figures;
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
  for (size_t i = 0; i < subjects.size(); ++i) {
    StatusOr<TextFigures> judged =
        Judge(engine, text, *reference, attention.get(), *subjects[i]);
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

StatusOr<std::vector<Capture>> CaptureTexts(QualityEngine& engine,
                                            std::span<const SplitText> texts,
                                            bool with_queries) {
  std::vector<Capture> captures;
  for (const SplitText& text : texts) {
    std::vector<llama_token> tokens = text.prefix;
    tokens.insert(tokens.end(), text.suffix.begin(), text.suffix.end());
    engine.Clear();
    Capture& capture = captures.emplace_back();
    LARDER_RETURN_IF_ERROR(
        engine.Decode(tokens, 0, /*logits=*/false, &capture));
    if (with_queries) continue;
    for (CapturedLayer& layer : capture.layers) {
      layer.keys_before_rope = layer.queries = layer.attention_output = {};
    }
  }
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

  // Workers write to texts of their own; all else is under the mutex.
  std::mutex mutex;
  size_t next = 0, done = 0;
  Status failed;
  const auto work = [&](QualityEngine& engine) {
    for (;;) {
      size_t index;
      {
        const std::lock_guard lock(mutex);
        if (next == texts.size() || !failed.ok()) return;
        index = next++;
      }
      const auto progress = [&] {
        const std::lock_guard lock(mutex);
        ++done;
        if (options.progress) {
          options.progress(static_cast<double>(done) /
                           static_cast<double>(texts.size() * subjects.size()));
        }
      };
      const Status status = JudgeAll(engine, texts[index], subjects, queries,
                                     options, index, progress, figures);
      if (!status.ok()) {
        const std::lock_guard lock(mutex);
        failed = status;
        return;
      }
    }
  };
  {
    std::vector<std::jthread> threads;
    for (size_t i = 1; i < engines.size(); ++i) {
      threads.emplace_back([&, i] { work(*engines[i]); });
    }
    work(*engines[0]);
  }
  LARDER_RETURN_IF_ERROR(failed);
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
