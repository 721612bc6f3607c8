#include "codec/profile.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string_view>
#include <utility>

#include "codec/kvc1/bank.h"
#include "codec/kvc1/layer_format.h"
#include "store/checksum.h"

namespace larder {
namespace {

constexpr std::string_view kMagic = "LARDPRF1";
constexpr uint32_t kMaxText = 1024;
constexpr uint32_t kMaxLayers = 4096, kMaxChannels = 1 << 16;
constexpr uint32_t kMaxTransformChannels = 1024;
constexpr int kMaxParents = 32;
// Bits of what is said of a profile as a whole.
constexpr uint8_t kUnrotated = 1, kTrellis = 2, kNested = 4;

// ---- Writing ----

class Writer {
 public:
  template <typename T>
  void Number(T value) {
    out_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  template <typename T>
  void Numbers(const std::vector<T>& values) {
    out_.append(reinterpret_cast<const char*>(values.data()),
                values.size() * sizeof(T));
  }
  void Text(const std::string& text) {
    Number(static_cast<uint16_t>(text.size()));
    out_ += text;
  }
  std::string Take() { return std::move(out_); }

 private:
  std::string out_{kMagic};
};

void Write(Writer& writer, const TensorProfile& tensor) {
  writer.Numbers(tensor.step);
  writer.Numbers(tensor.mean);
  writer.Numbers(tensor.weight);
  writer.Numbers(tensor.tables.base);
  writer.Numbers(tensor.tables.refinement);
  writer.Number(static_cast<uint16_t>(tensor.transforms.size()));
  for (const TensorProfile::Transform& transform : tensor.transforms) {
    writer.Number(transform.channel_begin);
    writer.Number(transform.channel_count);
    writer.Numbers(transform.weight);
    writer.Numbers(transform.tables.base);
    writer.Numbers(transform.tables.refinement);
    writer.Numbers(transform.matrix);
  }
  writer.Number(static_cast<uint16_t>(tensor.predictions.size()));
  for (const TensorProfile::Prediction& prediction : tensor.predictions) {
    writer.Number(prediction.channel_begin);
    writer.Number(prediction.channel_count);
    writer.Numbers(prediction.order);
    writer.Numbers(prediction.parents);
    writer.Numbers(prediction.parent);
    writer.Numbers(prediction.factor);
    writer.Numbers(prediction.tables.base);
    writer.Numbers(prediction.tables.refinement);
    writer.Numbers(prediction.trellis_tables);
    writer.Numbers(prediction.nested_tables);
  }
}

// What every prediction has or none has, which Complete() sees to.
uint8_t PredictionFlags(const Profile::Contents& contents) {
  uint8_t flags = 0;
  for (const Profile::Group& group : contents.groups) {
    for (const auto* tensors : {&group.keys, &group.values}) {
      for (const TensorProfile& tensor : *tensors) {
        for (const TensorProfile::Prediction& prediction : tensor.predictions) {
          if (!prediction.trellis_tables.empty()) flags |= kTrellis;
          if (!prediction.nested_tables.empty()) flags |= kNested;
        }
      }
    }
  }
  return flags;
}

std::string Write(const Profile::Contents& contents) {
  Writer writer;
  writer.Text(contents.model_name);
  writer.Text(contents.made_by);
  writer.Number(contents.weights.bytes);
  writer.Number(static_cast<uint8_t>(
      (contents.unrotated_keys ? kUnrotated : 0) | PredictionFlags(contents)));
  writer.Number(contents.level_count);
  writer.Numbers(contents.divergence);
  writer.Number(static_cast<uint16_t>(contents.groups.size()));
  for (const Profile::Group& group : contents.groups) {
    writer.Number(group.layer_count);
    writer.Number(group.kv_head_count);
    writer.Number(group.key_dim);
    writer.Number(group.value_dim);
    for (const TensorProfile& tensor : group.keys) Write(writer, tensor);
    for (const TensorProfile& tensor : group.values) Write(writer, tensor);
  }
  return writer.Take();
}

// ---- Reading ----

// Never allocates more than the bytes that are left could fill.
class Reader {
 public:
  explicit Reader(ByteSpan rest) : rest_(rest) {}
  bool ok() const { return ok_; }
  bool AtEnd() const { return ok_ && rest_.empty(); }

  template <typename T>
  T Number() {
    T value{};
    const ByteSpan bytes = Take(sizeof value);
    if (!bytes.empty()) std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }
  template <typename T>
  void Numbers(std::vector<T>& values, size_t count) {
    const ByteSpan bytes = Take(count * sizeof(T));
    if (!ok_) return;
    values.resize(count);
    if (count > 0) std::memcpy(values.data(), bytes.data(), bytes.size());
  }
  std::string Text() {
    const ByteSpan bytes = Take(Number<uint16_t>());
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  ByteSpan Take(size_t size) {
    if (!ok_ || size > rest_.size()) {
      ok_ = false;
      return {};
    }
    const ByteSpan taken = rest_.first(size);
    rest_ = rest_.subspan(size);
    return taken;
  }

 private:
  ByteSpan rest_;
  bool ok_ = true;
};

void Read(Reader& reader, size_t count, uint8_t levels,
          CoefficientTables& tables) {
  reader.Numbers(tables.base, levels * 3 * count);
  reader.Numbers(tables.refinement, levels * 2 * count);
}

void Read(Reader& reader, uint32_t channels, uint8_t levels, uint8_t flags,
          TensorProfile& tensor) {
  reader.Numbers(tensor.step, levels);
  reader.Numbers(tensor.mean, channels);
  reader.Numbers(tensor.weight, channels);
  Read(reader, channels, levels, tensor.tables);
  const auto transforms = reader.Number<uint16_t>();
  for (uint32_t i = 0; i < transforms && reader.ok(); ++i) {
    TensorProfile::Transform& transform = tensor.transforms.emplace_back();
    transform.channel_begin = reader.Number<uint32_t>();
    transform.channel_count = reader.Number<uint32_t>();
    const size_t count = std::min(transform.channel_count, kMaxChannels);
    reader.Numbers(transform.weight, count);
    Read(reader, count, levels, transform.tables);
    reader.Numbers(transform.matrix, count * count);
  }
  const auto predictions = reader.Number<uint16_t>();
  for (uint32_t i = 0; i < predictions && reader.ok(); ++i) {
    TensorProfile::Prediction& prediction = tensor.predictions.emplace_back();
    prediction.channel_begin = reader.Number<uint32_t>();
    prediction.channel_count = reader.Number<uint32_t>();
    const size_t count = std::min(prediction.channel_count, kMaxChannels);
    reader.Numbers(prediction.order, count);
    reader.Numbers(prediction.parents, count);
    const size_t all = std::accumulate(prediction.parents.begin(),
                                       prediction.parents.end(), size_t{0});
    reader.Numbers(prediction.parent, all);
    reader.Numbers(prediction.factor, all);
    Read(reader, count, levels, prediction.tables);
    if ((flags & kTrellis) != 0) {
      reader.Numbers(prediction.trellis_tables, levels * count);
    }
    if ((flags & kNested) != 0) {
      reader.Numbers(prediction.nested_tables, levels * 3 * count);
    }
  }
}

// ---- What must hold ----

Status Invalid(absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("profile: ", what));
}

Status CheckNumbers(const std::vector<float>& values, size_t count, bool above0,
                    absl::string_view name) {
  if (values.size() != count) return Invalid(absl::StrCat("number of ", name));
  for (const float value : values) {
    if (!std::isfinite(value) || (above0 && value <= 0)) {
      return Invalid(absl::StrCat("a value of ", name));
    }
  }
  return absl::OkStatus();
}

Status CheckTables(const CoefficientTables& tables, size_t count,
                   uint8_t levels) {
  if (tables.base.size() != levels * 3 * count ||
      tables.refinement.size() != levels * 2 * count) {
    return Invalid("number of table ids");
  }
  for (const uint8_t id : tables.base) {
    if (id >= kvc1::kBankIds) return Invalid("an id of no table");
  }
  for (const uint8_t id : tables.refinement) {
    if (id >= kvc1::kBankTables) return Invalid("an id of no refinement");
  }
  return absl::OkStatus();
}

// Gauss-Jordan with pivoting, in doubles: +, -, *, / alone, so that every
// machine derives the same floats.
Status Invert(TensorProfile::Transform& transform) {
  const size_t n = transform.channel_count;
  std::vector<double> a(n * n), inverse(n * n, 0.0);
  for (size_t c = 0; c < n; ++c) {
    for (size_t k = 0; k < n; ++k) {
      a[c * n + k] = double{transform.weight[c]} * transform.matrix[c * n + k];
    }
    inverse[c * n + c] = 1;
  }
  for (size_t column = 0; column < n; ++column) {
    size_t pivot = column;
    for (size_t row = column + 1; row < n; ++row) {
      if (std::abs(a[row * n + column]) > std::abs(a[pivot * n + column])) {
        pivot = row;
      }
    }
    const double p = a[pivot * n + column];
    if (!(std::abs(p) > 1e-12)) return Invalid("a transform without inverse");
    for (size_t i = 0; i < n; ++i) {
      std::swap(a[pivot * n + i], a[column * n + i]);
      std::swap(inverse[pivot * n + i], inverse[column * n + i]);
    }
    for (size_t i = 0; i < n; ++i) {
      a[column * n + i] /= p;
      inverse[column * n + i] /= p;
    }
    // Plain pointers: where nothing is inlined this is all of the time.
    const double* const from = a.data() + column * n;
    const double* const inverse_from = inverse.data() + column * n;
    for (size_t row = 0; row < n; ++row) {
      double* const to = a.data() + row * n;
      double* const inverse_to = inverse.data() + row * n;
      const double factor = to[column];
      if (row == column || factor == 0) continue;
      for (size_t i = 0; i < n; ++i) {
        to[i] -= factor * from[i];
        inverse_to[i] -= factor * inverse_from[i];
      }
    }
  }
  transform.forward.resize(n * n);
  for (size_t i = 0; i < n * n; ++i) {
    transform.forward[i] = static_cast<float>(inverse[i]);
    if (!std::isfinite(transform.forward[i])) {
      return Invalid("a transform whose inverse is too large");
    }
  }
  return absl::OkStatus();
}

Status CheckPrediction(const TensorProfile::Prediction& prediction) {
  const size_t n = prediction.channel_count;
  size_t at = 0;
  std::vector<bool> seen(n, false);
  if (prediction.order.size() != n || prediction.parents.size() != n) {
    return Invalid("size of a prediction");
  }
  for (size_t i = 0; i < n; ++i) {
    if (prediction.parents[i] > kMaxParents) return Invalid("too many parents");
    for (int p = 0; p < prediction.parents[i]; ++p, ++at) {
      if (at >= prediction.parent.size() || prediction.parent[at] >= n ||
          !seen[prediction.parent[at]]) {
        return Invalid("a parent that is not coded before");
      }
    }
    const uint16_t channel = prediction.order[i];
    if (channel >= n || seen[channel]) {
      return Invalid("an order that is no permutation");
    }
    seen[channel] = true;
  }
  if (at != prediction.parent.size() || at != prediction.factor.size()) {
    return Invalid("number of parents");
  }
  return absl::OkStatus();
}

Status Complete(TensorProfile& tensor, uint32_t heads, uint32_t head_dim,
                uint8_t levels, uint8_t flags, Profile::Use use) {
  const uint32_t channels = heads * head_dim;
  LARDER_RETURN_IF_ERROR(CheckNumbers(tensor.step, levels, true, "steps"));
  LARDER_RETURN_IF_ERROR(CheckNumbers(tensor.mean, channels, false, "means"));
  LARDER_RETURN_IF_ERROR(
      CheckNumbers(tensor.weight, channels, true, "weights"));
  LARDER_RETURN_IF_ERROR(CheckTables(tensor.tables, channels, levels));
  const uint32_t block = kvc1::TileGrid::BlockHeads(head_dim) * head_dim;
  uint32_t at = 0;
  for (const TensorProfile::Prediction& prediction : tensor.predictions) {
    const uint32_t n = prediction.channel_count;
    if (prediction.channel_begin != at || at >= channels ||
        n != std::min(block, channels - at)) {
      return Invalid("predictions that are not one for each block of heads");
    }
    at += n;
    LARDER_RETURN_IF_ERROR(CheckPrediction(prediction));
    LARDER_RETURN_IF_ERROR(CheckTables(prediction.tables, n, levels));
    if (prediction.trellis_tables.size() !=
        ((flags & kTrellis) != 0 ? size_t{n} * levels : 0)) {
      return Invalid("number of table ids of a trellis");
    }
    for (const uint8_t id : prediction.trellis_tables) {
      if (id >= kvc1::kBankIds) return Invalid("an id of no table");
    }
    if (prediction.nested_tables.size() !=
        ((flags & kNested) != 0 ? size_t{3} * n * levels : 0)) {
      return Invalid("number of table ids of nested numbers");
    }
    for (size_t i = 0; i < prediction.nested_tables.size(); ++i) {
      const int ids = i / n % 3 == 0 ? kvc1::kBankIds : kvc1::kBankTables;
      if (prediction.nested_tables[i] >= ids) {
        return Invalid("an id of no table");
      }
    }
  }
  if (at != channels && !tensor.predictions.empty()) {
    return Invalid("channels without a prediction");
  }
  if (tensor.transforms.empty()) return absl::OkStatus();
  at = 0;
  for (TensorProfile::Transform& transform : tensor.transforms) {
    const uint32_t n = transform.channel_count;
    if (transform.channel_begin != at || at >= channels ||
        n != std::min(block, channels - at) || n > kMaxTransformChannels) {
      return Invalid("transforms that are not one for each block of heads");
    }
    at += n;
    LARDER_RETURN_IF_ERROR(
        CheckNumbers(transform.weight, n, true, "a transform's weights"));
    LARDER_RETURN_IF_ERROR(CheckTables(transform.tables, n, levels));
    if (transform.matrix.size() != size_t{n} * n) {
      return Invalid("size of a transform");
    }
    transform.forward.clear();
    if (use == Profile::Use::kEncoding) {
      LARDER_RETURN_IF_ERROR(Invert(transform));
    }
    transform.wide_matrix.assign(transform.matrix.begin(),
                                 transform.matrix.end());
    transform.integer_max =
        kernels::KltInputMax(transform.wide_matrix.data(), n, n);
  }
  return at == channels ? absl::OkStatus()
                        : Invalid("channels without a transform");
}

Status Complete(Profile::Contents& contents, Profile::Use use) {
  if (contents.model_name.size() > kMaxText ||
      contents.made_by.size() > kMaxText) {
    return Invalid("a text of more than 1024 bytes");
  }
  if (contents.level_count < 1 || contents.level_count > kMaxProfileLevels) {
    return Invalid("1 to 9 levels");
  }
  LARDER_RETURN_IF_ERROR(CheckNumbers(contents.divergence, contents.level_count,
                                      false, "divergences"));
  if (contents.groups.empty() || contents.groups.size() > kMaxGroups) {
    return Invalid("1 to 16 groups");
  }
  const uint8_t flags = PredictionFlags(contents);
  if (flags == kNested) return Invalid("nested numbers without a trellis");
  for (Profile::Group& group : contents.groups) {
    const uint32_t heads = group.kv_head_count;
    if (group.layer_count < 1 || group.layer_count > kMaxLayers || heads < 1 ||
        group.key_dim < 1 || heads * group.key_dim > kMaxChannels ||
        heads * group.value_dim > kMaxChannels) {
      return Invalid("an absurd group");
    }
    if (group.keys.size() != group.layer_count ||
        group.values.size() != group.layer_count) {
      return Invalid("number of layers");
    }
    for (TensorProfile& keys : group.keys) {
      LARDER_RETURN_IF_ERROR(Complete(keys, heads, group.key_dim,
                                      contents.level_count, flags, use));
    }
    for (TensorProfile& values : group.values) {
      LARDER_RETURN_IF_ERROR(Complete(values, heads, group.value_dim,
                                      contents.level_count, flags, use));
    }
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<std::shared_ptr<const Profile>> Profile::Make(Contents contents) {
  return MakeFor(std::move(contents), Use::kEncoding);
}

StatusOr<std::shared_ptr<const Profile>> Profile::MakeFor(Contents contents,
                                                          Use use) {
  LARDER_RETURN_IF_ERROR(Complete(contents, use));
  std::shared_ptr<Profile> profile(new Profile);
  profile->bytes_ = Write(contents);
  if (profile->bytes_.size() > kMaxProfileBytes) {
    return Invalid("more than 256 MiB");
  }
  Sha256 hash;
  hash.Update(profile->bytes_.data(), profile->bytes_.size());
  hash.Finish(profile->id_.bytes.data());
  profile->contents_ = std::move(contents);
  return profile;
}

StatusOr<std::shared_ptr<const Profile>> Profile::Parse(ByteSpan bytes,
                                                        Use use) {
  if (bytes.size() < kMagic.size() || bytes.size() > kMaxProfileBytes ||
      std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return absl::DataLossError("profile: not a Larder profile of version 1");
  }
  Reader reader(bytes.subspan(kMagic.size()));
  Contents contents;
  contents.model_name = reader.Text();
  contents.made_by = reader.Text();
  contents.weights.bytes = reader.Number<std::array<uint8_t, 32>>();
  const auto flags = reader.Number<uint8_t>();
  contents.unrotated_keys = (flags & kUnrotated) != 0;
  contents.level_count = reader.Number<uint8_t>();
  reader.Numbers(contents.divergence, contents.level_count);
  const auto groups = reader.Number<uint16_t>();
  for (uint32_t g = 0; g < groups && g < kMaxGroups && reader.ok(); ++g) {
    Group& group = contents.groups.emplace_back();
    group.layer_count = reader.Number<uint16_t>();
    group.kv_head_count = reader.Number<uint16_t>();
    group.key_dim = reader.Number<uint16_t>();
    group.value_dim = reader.Number<uint16_t>();
    for (auto [tensors, dim] : {std::pair(&group.keys, group.key_dim),
                                std::pair(&group.values, group.value_dim)}) {
      for (uint32_t l = 0; l < group.layer_count && reader.ok(); ++l) {
        Read(reader, uint32_t{group.kv_head_count} * dim, contents.level_count,
             flags, tensors->emplace_back());
      }
    }
  }
  if (!reader.AtEnd() || groups != contents.groups.size() ||
      (flags & ~kUnrotated) != PredictionFlags(contents)) {
    return absl::DataLossError("profile: cut short, or more than a profile");
  }
  return MakeFor(std::move(contents), use);
}

}  // namespace larder
