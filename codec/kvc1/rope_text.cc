// ParseRope: what adapters write about an engine's RoPE, understood.

#include <nlohmann/json.hpp>

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

#include "codec/kvc1/rope.h"
#include "codec/kvc1/steady_math.h"

namespace larder::kvc1 {
namespace {

using Json = nlohmann::json;

// No text of an adapter comes near any of these.
constexpr size_t kTextBytesMax = 16384;
constexpr int kDepthMax = 8;
constexpr uint32_t kHeadDimMax = 65536;
// Outside of these nobody rotates, and the arithmetic is sure of itself.
constexpr double kNumberMin = 1e-9;
constexpr double kNumberMax = 1e15;
constexpr double kFrequencyMax = 1024;

constexpr double kTwoPi = 0x1.921fb54442d18p2;

Status NotUnderstood(std::string_view what) {
  return absl::UnimplementedError(
      absl::StrCat("RoPE not understood: ", std::string(what)));
}

bool InRange(double number) {  // false for NaN
  return number >= kNumberMin && number <= kNumberMax;
}

// ------------------------------------------------------------ the formulae

// base ** (-2i / dim), for i below dim / 2 (Su et al. 2021).
std::vector<double> Frequencies(double base, uint32_t dim) {
  const double log = SteadyLog(base);
  std::vector<double> out(dim / 2);
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = SteadyExp(-(2.0 * static_cast<double>(i) / dim) * log);
  }
  return out;
}

// Peng et al. 2023: dimensions that turn often are left, those that turn less
// than once are interpolated, and a ramp lies between.
struct Yarn {
  double base = 0;
  double interpolation = 1;  // what frequencies are multiplied with
  double original_context = 0;
  double beta_fast = 32;
  double beta_slow = 1;
  double extrapolation = 1;  // how much of the ramp counts
  bool whole_dimensions = true;
  // How wide a ramp without width is made. ggml widens all that are narrower,
  // also those that run backwards; Hugging Face only the one that is 0.
  bool widen_all = false;
};

std::vector<double> YarnFrequencies(const Yarn& yarn, uint32_t dim) {
  const auto dimension = [&](double rotations) {
    return dim * SteadyLog(yarn.original_context / (rotations * kTwoPi)) /
           (2 * SteadyLog(yarn.base));
  };
  double low = dimension(yarn.beta_fast);
  double high = dimension(yarn.beta_slow);
  if (yarn.whole_dimensions) {
    low = SteadyFloor(low);
    high = -SteadyFloor(-high);
  }
  if (low < 0) low = 0;
  if (high > dim - 1.0) high = dim - 1.0;
  double width = high - low;
  if (yarn.widen_all ? width < 0.001 : width == 0) width = 0.001;

  std::vector<double> out = Frequencies(yarn.base, dim);
  for (size_t i = 0; i < out.size(); ++i) {
    double ramp = (static_cast<double>(i) - low) / width;
    ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
    const double keep = (1 - ramp) * yarn.extrapolation;
    out[i] = out[i] * yarn.interpolation * (1 - keep) + out[i] * keep;
  }
  return out;
}

struct Llama3 {
  double base = 0;
  double factor = 0;
  double low_freq_factor = 0;
  double high_freq_factor = 0;
  double original_context = 0;
};

// Llama 3.1: short waves are left, long ones interpolated, and those between
// are mixed by how many fit into the original context.
std::vector<double> Llama3Frequencies(const Llama3& llama, uint32_t dim) {
  std::vector<double> out = Frequencies(llama.base, dim);
  for (double& frequency : out) {
    const double waves = llama.original_context * frequency / kTwoPi;
    if (waves > llama.high_freq_factor) continue;
    const double interpolated = frequency / llama.factor;
    if (waves < llama.low_freq_factor ||
        llama.low_freq_factor == llama.high_freq_factor) {
      frequency = interpolated;
      continue;
    }
    const double keep = (waves - llama.low_freq_factor) /
                        (llama.high_freq_factor - llama.low_freq_factor);
    frequency = (1 - keep) * interpolated + keep * frequency;
  }
  return out;
}

void Multiply(std::vector<double>& frequencies, double by) {
  for (double& frequency : frequencies) frequency *= by;
}

StatusOr<Rope> Checked(Rope rope, uint32_t head_dim) {
  if (rope.rotary_dim == 0 || rope.rotary_dim % 2 != 0 ||
      rope.rotary_dim > head_dim ||
      rope.frequencies.size() != rope.rotary_dim / 2) {
    return NotUnderstood(absl::StrCat(rope.rotary_dim, " dimensions of ",
                                      head_dim, " in ", rope.frequencies.size(),
                                      " pairs"));
  }
  for (const double frequency : rope.frequencies) {
    if (!(frequency >= 0 && frequency <= kFrequencyMax)) {
      return NotUnderstood("a frequency out of range");
    }
  }
  return rope;
}

// --------------------------------------------------------------- llama.cpp

// "type=0;scaling=-1;base=0;...;freq_base=10000.000000;...": what the context
// was told, then what the file says, "x.rope." taken off its keys.
class LlamaText {
 public:
  static StatusOr<LlamaText> Of(std::string_view text) {
    LlamaText made;
    while (!text.empty()) {
      const std::string_view field = text.substr(0, text.find(';'));
      text.remove_prefix(std::min(text.size(), field.size() + 1));
      const size_t equals = field.find('=');
      if (equals == std::string_view::npos ||
          !made.fields_
               .emplace(field.substr(0, equals), field.substr(equals + 1))
               .second) {
        return NotUnderstood("a field without a value, or twice");
      }
    }
    return made;
  }

  bool Has(std::string_view name) const { return fields_.contains(name); }

  std::string_view Text(std::string_view name) const {
    const auto found = fields_.find(name);
    return found == fields_.end() ? std::string_view() : found->second;
  }

  // Unimplemented if it is there and no finite number.
  StatusOr<double> Number(std::string_view name, double otherwise) const {
    const auto found = fields_.find(name);
    if (found == fields_.end()) return otherwise;
    const std::string_view text = found->second;
    double value = 0;
    const auto [end, error] =
        std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() ||
        !(value >= -kNumberMax && value <= kNumberMax)) {
      return NotUnderstood(absl::StrCat(std::string(name), " is no number"));
    }
    return value;
  }

  // As Number, but what the context was told comes first, unless it is `unset`.
  StatusOr<double> Number(std::string_view told, double unset,
                          std::string_view of_file, double otherwise) const {
    LARDER_ASSIGN_OR_RETURN(const double value, Number(told, unset));
    if (value != unset && !(unset < 0 && value < 0)) return value;
    return Number(of_file, otherwise);
  }

 private:
  std::map<std::string_view, std::string_view> fields_;
};

enum class LlamaScaling : int { kNone = 0, kLinear = 1, kYarn = 2 };

StatusOr<LlamaScaling> ScalingOf(const LlamaText& text) {
  const std::string_view told = text.Text("scaling");
  const std::string_view file = text.Text("scaling.type");
  // These have factors of their own for each pair, which only the file's
  // tensors tell. Phi-3's files do not say so but for the attention's factor.
  if (told == "3" || file == "longrope" ||
      (file.empty() && text.Has("scaling.attn_factor"))) {
    return NotUnderstood("factors in tensors (LongRoPE)");
  }
  if (told == "0") return LlamaScaling::kNone;
  if (told == "1") return LlamaScaling::kLinear;
  if (told == "2") return LlamaScaling::kYarn;
  if (told != "-1") return NotUnderstood("a new kind of scaling");
  if (file == "none") return LlamaScaling::kNone;
  if (file.empty() || file == "linear") return LlamaScaling::kLinear;
  if (file == "yarn") return LlamaScaling::kYarn;
  return NotUnderstood("a new scaling.type");
}

StatusOr<Rope> ParseLlama(std::string_view described, uint32_t head_dim) {
  LARDER_ASSIGN_OR_RETURN(const LlamaText text, LlamaText::Of(described));
  Rope rope;
  if (text.Text("type") == "0") {
    rope.pairs = Rope::Pairs::kAdjacent;
  } else if (text.Text("type") == "2") {
    rope.pairs = Rope::Pairs::kHalves;
  } else {
    return NotUnderstood("more than one position, or a new type");
  }
  // Hunyuan: a base that grows with this.
  if (text.Has("scaling.alpha")) return NotUnderstood("scaling.alpha");
  LARDER_ASSIGN_OR_RETURN(const double dim,
                          text.Number("dimension_count", head_dim));
  if (!(dim >= 2 && dim <= head_dim) || dim != SteadyFloor(dim)) {
    return NotUnderstood("dimension_count");
  }
  rope.rotary_dim = static_cast<uint32_t>(dim);

  Yarn yarn{.widen_all = true};
  LARDER_ASSIGN_OR_RETURN(yarn.base,
                          text.Number("base", 0, "freq_base", 10000));
  if (!InRange(yarn.base) || yarn.base <= 1) return NotUnderstood("the base");

  LARDER_ASSIGN_OR_RETURN(const LlamaScaling scaling, ScalingOf(text));
  LARDER_ASSIGN_OR_RETURN(double scale, text.Number("scale", 0));
  if (scale == 0) {
    LARDER_ASSIGN_OR_RETURN(double factor, text.Number("scale_linear", 0));
    LARDER_ASSIGN_OR_RETURN(factor, text.Number("scaling.factor", factor));
    if (factor != 0 && !InRange(factor)) return NotUnderstood("the factor");
    scale = factor == 0 ? 1 : 1 / factor;
  }
  if (!InRange(scale)) return NotUnderstood("the scale");
  yarn.interpolation = scaling == LlamaScaling::kNone ? 1 : scale;

  LARDER_ASSIGN_OR_RETURN(
      yarn.extrapolation,
      text.Number("ext", -1, "scaling.yarn_ext_factor", -1));
  if (yarn.extrapolation < 0) {
    yarn.extrapolation = scaling == LlamaScaling::kYarn ? 1 : 0;
  }
  if (yarn.extrapolation == 0 || yarn.interpolation == 1) {
    rope.frequencies = Frequencies(yarn.base, rope.rotary_dim);
    Multiply(rope.frequencies, yarn.interpolation);
    return Checked(std::move(rope), head_dim);
  }
  LARDER_ASSIGN_OR_RETURN(
      yarn.beta_fast, text.Number("fast", -1, "scaling.yarn_beta_fast", 32));
  LARDER_ASSIGN_OR_RETURN(yarn.beta_slow,
                          text.Number("slow", -1, "scaling.yarn_beta_slow", 1));
  LARDER_ASSIGN_OR_RETURN(const double trained, text.Number("trained", 0));
  LARDER_ASSIGN_OR_RETURN(
      yarn.original_context,
      text.Number("orig", 0, "scaling.original_context_length", trained));
  if (yarn.extrapolation > 1 || !InRange(yarn.beta_fast) ||
      !InRange(yarn.beta_slow) || !InRange(yarn.original_context)) {
    return NotUnderstood("YaRN without its original context, or out of range");
  }
  rope.frequencies = YarnFrequencies(yarn, rope.rotary_dim);
  return Checked(std::move(rope), head_dim);
}

// --------------------------------------------- Hugging Face, vLLM: JSON

// Members of one object; null is as if it were not there.
class Members {
 public:
  explicit Members(const Json& object) : object_(object) {}

  const Json* Find(const char* name) const {
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  StatusOr<double> Number(const char* name) const {
    const Json* value = Find(name);
    if (value == nullptr) return NotUnderstood(absl::StrCat("no ", name));
    if (!value->is_number() || !InRange(value->get<double>())) {
      return NotUnderstood(absl::StrCat(name, " is out of range"));
    }
    return value->get<double>();
  }

  StatusOr<double> Number(const char* name, double otherwise) const {
    return Find(name) == nullptr ? otherwise : Number(name);
  }

  StatusOr<bool> Truth(const char* name, bool otherwise) const {
    const Json* value = Find(name);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) return NotUnderstood(name);
    return value->get<bool>();
  }

  StatusOr<std::string> Type() const {
    const Json* value = Find("rope_type");
    if (value == nullptr) value = Find("type");
    if (value == nullptr) return "default";
    if (!value->is_string()) return NotUnderstood("rope_type");
    return value->get<std::string>();
  }

 private:
  const Json& object_;
};

struct HfContext {
  uint32_t head_dim = 0;
  // vLLM takes its tables for the longest context that it serves; transformers
  // changes frequencies as a sequence grows.
  bool of_vllm = false;
};

// Microsoft's LongRoPE: a factor for each pair, of one list in short contexts
// and of another in long ones. Which counts is known if there is but one.
StatusOr<std::vector<double>> LongRope(const Members& members, double base,
                                       uint32_t dim) {
  const Json* factors = members.Find("short_factor");
  const Json* others = members.Find("long_factor");
  if (factors == nullptr) std::swap(factors, others);
  if (factors == nullptr || (others != nullptr && *others != *factors)) {
    return NotUnderstood("LongRoPE whose context is not told");
  }
  if (!factors->is_array() || factors->size() != dim / 2) {
    return NotUnderstood("factors of other pairs");
  }
  std::vector<double> out = Frequencies(base, dim);
  for (size_t i = 0; i < out.size(); ++i) {
    const Json& factor = (*factors)[i];
    // Engines keep them as floats, and a text may shorten them to that.
    const double value =
        factor.is_number() ? static_cast<float>(factor.get<double>()) : 0;
    if (!InRange(value)) return NotUnderstood("a factor");
    out[i] /= value;
  }
  return out;
}

// What a base becomes when contexts are stretched by `by` (NTK-aware scaling).
double NtkBase(double base, double by, uint32_t dim) {
  return base * SteadyPower(by, dim / (dim - 2.0));
}

StatusOr<std::vector<double>> HfFrequencies(const std::string& type,
                                            const Members& members,
                                            uint32_t dim, bool of_vllm) {
  LARDER_ASSIGN_OR_RETURN(const double base, members.Number("rope_theta"));
  if (base <= 1) return NotUnderstood("rope_theta");
  if (type == "default") return Frequencies(base, dim);
  if (type == "longrope" || type == "su") return LongRope(members, base, dim);
  if (type == "dynamic") {
    if (members.Find("alpha") != nullptr) {
      LARDER_ASSIGN_OR_RETURN(const double alpha, members.Number("alpha"));
      if (dim <= 2) return NotUnderstood("alpha for one pair");
      return Frequencies(NtkBase(base, alpha, dim), dim);
    }
    // vLLM stretches from the trained length to the longest, once for all; and
    // says of both the same if the model does not tell them apart.
    if (of_vllm && members.Find("max_trained_positions") == nullptr) {
      return Frequencies(base, dim);
    }
    return NotUnderstood("frequencies that depend on a sequence's length");
  }

  LARDER_ASSIGN_OR_RETURN(const double factor, members.Number("factor"));
  if (type == "linear") {
    std::vector<double> out = Frequencies(base, dim);
    for (double& frequency : out) frequency /= factor;
    return out;
  }
  if (type == "ntk") {
    if (members.Find("mixed_b") != nullptr) return NotUnderstood("mixed_b");
    std::vector<double> out = Frequencies(base * factor, dim);
    Multiply(out, 1 / SteadyPower(factor, 2.0 / dim));
    return out;
  }
  if (type == "llama3") {
    Llama3 llama{.base = base, .factor = factor};
    LARDER_ASSIGN_OR_RETURN(llama.low_freq_factor,
                            members.Number("low_freq_factor"));
    LARDER_ASSIGN_OR_RETURN(llama.high_freq_factor,
                            members.Number("high_freq_factor"));
    LARDER_ASSIGN_OR_RETURN(llama.original_context,
                            members.Number("original_max_position_embeddings"));
    if (llama.low_freq_factor > llama.high_freq_factor) {
      return NotUnderstood("low_freq_factor over high_freq_factor");
    }
    return Llama3Frequencies(llama, dim);
  }
  if (type == "yarn" || type == "deepseek_yarn") {
    Yarn yarn{.base = base, .interpolation = 1 / factor};
    LARDER_ASSIGN_OR_RETURN(yarn.original_context,
                            members.Number("original_max_position_embeddings"));
    LARDER_ASSIGN_OR_RETURN(yarn.beta_fast, members.Number("beta_fast", 32));
    LARDER_ASSIGN_OR_RETURN(yarn.beta_slow, members.Number("beta_slow", 1));
    LARDER_ASSIGN_OR_RETURN(yarn.whole_dimensions,
                            members.Truth("truncate", true));
    return YarnFrequencies(yarn, dim);
  }
  return NotUnderstood(absl::StrCat("rope_type ", type));
}

// Gemma 4: frequencies as of the whole head, and those of the last pairs are 0.
StatusOr<std::vector<double>> Proportional(const Members& members,
                                           uint32_t turning,
                                           uint32_t head_dim) {
  LARDER_ASSIGN_OR_RETURN(const double base, members.Number("rope_theta"));
  LARDER_ASSIGN_OR_RETURN(const double factor, members.Number("factor", 1));
  if (base <= 1) return NotUnderstood("rope_theta");
  std::vector<double> out = Frequencies(base, head_dim);
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = i < turning / 2 ? out[i] / factor : 0;
  }
  return out;
}

StatusOr<Rope> ParseParameters(const Json& parameters,
                               const HfContext& context) {
  const Members members(parameters);
  for (const char* name : {"mrope_section", "mrope_interleaved", "use_fope"}) {
    if (members.Find(name) != nullptr) return NotUnderstood(name);
  }
  Rope rope;
  LARDER_ASSIGN_OR_RETURN(const bool halves,
                          members.Truth("is_neox_style", true));
  rope.pairs = halves ? Rope::Pairs::kHalves : Rope::Pairs::kAdjacent;

  LARDER_ASSIGN_OR_RETURN(const double part,
                          members.Number("partial_rotary_factor", 1));
  if (part > 1) return NotUnderstood("partial_rotary_factor");
  LARDER_ASSIGN_OR_RETURN(
      const double dim,
      members.Number("rope_dim", SteadyFloor(context.head_dim * part)));
  if (!(dim >= 2 && dim <= context.head_dim) || dim != SteadyFloor(dim)) {
    return NotUnderstood("how many dimensions turn");
  }
  const auto turning = static_cast<uint32_t>(dim);
  LARDER_ASSIGN_OR_RETURN(const std::string type, members.Type());
  if (type == "proportional") {
    rope.rotary_dim = context.head_dim;
    LARDER_ASSIGN_OR_RETURN(rope.frequencies,
                            Proportional(members, turning, context.head_dim));
  } else {
    rope.rotary_dim = turning;
    LARDER_ASSIGN_OR_RETURN(
        rope.frequencies,
        HfFrequencies(type, members, turning, context.of_vllm));
  }
  return Checked(std::move(rope), context.head_dim);
}

// Parameters may be told for each type of layer, some for all: those of `kind`,
// or whichever if all types rotate alike.
StatusOr<Rope> ParseLayerTypes(const Json& parameters, Json shared,
                               const HfContext& context,
                               std::optional<GroupKind> kind) {
  std::vector<std::pair<std::string, const Json*>> types;
  bool some_do_not = false;
  for (const auto& [name, value] : parameters.items()) {
    if (value.is_object()) {
      types.emplace_back(name, &value);
    } else if (value.is_null()) {
      some_do_not = some_do_not || name.ends_with("_attention");
    } else {
      shared[name] = value;
    }
  }
  if (types.empty()) return ParseParameters(shared, context);

  const auto parse = [&](const Json& own) {
    Json all = shared;
    all.update(own);
    return ParseParameters(all, context);
  };
  const std::string_view wanted =
      kind == GroupKind::kFullAttention   ? "full_attention"
      : kind == GroupKind::kSlidingWindow ? "sliding_attention"
                                          : "";
  for (const auto& [name, own] : types) {
    if (name == wanted) return parse(*own);
  }
  if (some_do_not) return NotUnderstood("layers that do not rotate");
  LARDER_ASSIGN_OR_RETURN(Rope first, parse(*types[0].second));
  for (const auto& [name, own] : types) {
    LARDER_ASSIGN_OR_RETURN(const Rope rope, parse(*own));
    if (rope != first) return NotUnderstood("layers that rotate differently");
  }
  return first;
}

bool DeeperThan(int levels, std::string_view text) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      if (c == '"') quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == '{' || c == '[') {
      if (++depth > levels) return true;
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return false;
}

// transformers writes the parameters; vLLM writes rope_theta, rope_scaling and
// rope_parameters of the configuration, as far as there are such.
StatusOr<Rope> ParseJson(std::string_view described, HfContext context,
                         std::optional<GroupKind> kind) {
  if (DeeperThan(kDepthMax, described)) return NotUnderstood("deep JSON");
  const Json json = Json::parse(described, /*cb=*/nullptr,
                                /*allow_exceptions=*/false);
  if (!json.is_object()) return NotUnderstood("no JSON");

  Json shared = json;
  shared.erase("rope_parameters");
  shared.erase("rope_scaling");
  const auto told = [&json](const char* name) -> const Json* {
    const auto found = json.find(name);
    return found != json.end() && found->is_object() && !found->empty()
               ? &*found
               : nullptr;
  };
  const Json* parameters = told("rope_parameters");
  const Json* scaling = told("rope_scaling");
  context.of_vllm = parameters != nullptr || scaling != nullptr;
  if (!context.of_vllm) {
    return ParseLayerTypes(json, Json::object(), context, kind);
  }
  if (parameters != nullptr && scaling != nullptr) {
    // One is an older name of the other.
    LARDER_ASSIGN_OR_RETURN(const std::string a, Members(*parameters).Type());
    LARDER_ASSIGN_OR_RETURN(const std::string b, Members(*scaling).Type());
    if (a != b) return NotUnderstood("rope_scaling beside rope_parameters");
  }
  return ParseLayerTypes(parameters != nullptr ? *parameters : *scaling, shared,
                         context, kind);
}

}  // namespace

StatusOr<Rope> ParseRope(std::string_view described, uint32_t head_dim,
                         std::optional<GroupKind> kind) {
  if (described.size() > kTextBytesMax) return NotUnderstood("a long text");
  if (head_dim == 0 || head_dim > kHeadDimMax) {
    return NotUnderstood("the size of a head");
  }
  if (described.starts_with("type=")) return ParseLlama(described, head_dim);
  if (described.starts_with("{")) {
    return ParseJson(described, {.head_dim = head_dim}, kind);
  }
  return NotUnderstood("no text of an adapter that tells it");
}

}  // namespace larder::kvc1
