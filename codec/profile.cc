#include "codec/profile.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <span>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include <zstd.h>

#include "codec/kvc1/bank.h"
#include "codec/kvc1/layer_format.h"
#include "store/checksum.h"

namespace larder {
namespace {

constexpr std::string_view kPlainMagic = "LARDPRF1";
constexpr std::string_view kCompressedMagic = "LARDPRF2";
constexpr uint32_t kMaxText = 1024;
constexpr uint32_t kMaxLayers = 4096, kMaxChannels = 1 << 16;
constexpr uint32_t kMaxTransformChannels = 1024;
constexpr int kMaxParents = 32;
// Bits of what is said of a profile as a whole.
constexpr uint8_t kUnrotated = 1, kTrellis = 2, kNested = 4;

// Kinds of fields. Version 1 has all fields in one sequence, version 2 those of
// each kind in a column, for like bytes compress better together. On disk.
enum class Column : uint8_t {
  kRest,
  kReals,
  kTables,
  kRefinements,
  kTrellisTables,
  kOrder,
  kParents,
  kFactors,
  kMatrices,
};
// Bytes of a column's numbers. The first bytes of all of them come first, then
// the second ones, and so on.
constexpr std::array<size_t, 9> kWidths = {1, 4, 1, 1, 1, 2, 2, 2, 1};

// zstd's level for the one that writes: profiles are made once, kept for ever.
constexpr int kZstdLevel = 19;
// Which 19 takes of itself; a reader allocates as much.
constexpr int kZstdWindowLog = 23;

// ---- The order of columns ----

// [row][column] -> [column][row]
std::vector<uint8_t> Transposed(const std::vector<uint8_t>& ids, size_t rows) {
  if (ids.empty()) return {};
  const size_t columns = ids.size() / rows;
  std::vector<uint8_t> out;
  out.reserve(ids.size());
  for (size_t c = 0; c < columns; ++c) {
    for (size_t r = 0; r < rows; ++r) out.push_back(ids[r * columns + c]);
  }
  return out;
}

// Of each channel's parents (`counts`): differences to the one before, or back.
std::vector<uint16_t> Differences(const std::vector<uint8_t>& counts,
                                  std::vector<uint16_t> parents, bool back) {
  size_t at = 0;
  for (const uint8_t count : counts) {
    uint16_t last = 0;
    for (uint8_t i = 0; i < count; ++i, ++at) {
      const uint16_t given = parents[at];
      parents[at] = static_cast<uint16_t>(back ? last + given : given - last);
      last = back ? parents[at] : given;
    }
  }
  return parents;
}

// ---- Compression ----

StatusOr<std::string> Compress(const std::string& content) {
  const std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)> context(
      ZSTD_createCCtx(), ZSTD_freeCCtx);
  if (context == nullptr) return absl::ResourceExhaustedError("zstd: memory");
  for (const auto& [parameter, value] :
       {std::pair{ZSTD_c_compressionLevel, kZstdLevel},
        {ZSTD_c_windowLog, kZstdWindowLog}}) {
    const size_t set = ZSTD_CCtx_setParameter(context.get(), parameter, value);
    if (ZSTD_isError(set) != 0) {
      return absl::InternalError(ZSTD_getErrorName(set));
    }
  }
  std::string frame(ZSTD_compressBound(content.size()), '\0');
  const size_t bytes = ZSTD_compress2(context.get(), frame.data(), frame.size(),
                                      content.data(), content.size());
  if (ZSTD_isError(bytes) != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("zstd: ", ZSTD_getErrorName(bytes)));
  }
  frame.resize(bytes);
  return frame;
}

// Allocates as bytes come, not as they are promised.
StatusOr<std::string> Decompress(ByteSpan frame, uint64_t content_bytes) {
  const std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context(
      ZSTD_createDCtx(), ZSTD_freeDCtx);
  if (context == nullptr) return absl::ResourceExhaustedError("zstd: memory");
  const size_t set = ZSTD_DCtx_setParameter(context.get(), ZSTD_d_windowLogMax,
                                            kZstdWindowLog);
  if (ZSTD_isError(set) != 0) {
    return absl::InternalError(ZSTD_getErrorName(set));
  }
  std::string content;
  std::vector<char> piece(ZSTD_DStreamOutSize());
  ZSTD_inBuffer in{frame.data(), frame.size(), 0};
  for (size_t left = 1; left != 0;) {
    ZSTD_outBuffer out{piece.data(), piece.size(), 0};
    const size_t read = in.pos;
    left = ZSTD_decompressStream(context.get(), &out, &in);
    if (ZSTD_isError(left) != 0) {
      return absl::DataLossError(
          absl::StrCat("profile: zstd: ", ZSTD_getErrorName(left)));
    }
    if (out.pos > content_bytes - content.size()) {
      return absl::DataLossError("profile: more than it says");
    }
    content.append(piece.data(), out.pos);
    if (left != 0 && out.pos == 0 && in.pos == read) {
      return absl::DataLossError("profile: cut short");
    }
  }
  if (in.pos != in.size || content.size() != content_bytes) {
    return absl::DataLossError("profile: cut short, or more than a profile");
  }
  return content;
}

// ---- Writing ----

class Writer {
 public:
  explicit Writer(Profile::Format format)
      : plain_(format == Profile::Format::kPlain) {}

  template <typename T>
  void Number(T value) {
    At(Column::kRest)
        .append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  template <typename T>
  void Numbers(Column column, const std::vector<T>& values) {
    At(column).append(reinterpret_cast<const char*>(values.data()),
                      values.size() * sizeof(T));
  }
  // [row][coefficient]; in columns those of a coefficient are together.
  void Ids(Column column, const std::vector<uint8_t>& ids, size_t rows) {
    Numbers(column, plain_ ? ids : Transposed(ids, rows));
  }
  void Parents(const TensorProfile::Prediction& prediction) {
    Numbers(Column::kParents,
            plain_ ? prediction.parent
                   : Differences(prediction.parents, prediction.parent, false));
  }
  void Text(const std::string& text) {
    Number(static_cast<uint16_t>(text.size()));
    At(Column::kRest) += text;
  }

  StatusOr<std::string> Finish() {
    if (plain_) return absl::StrCat(std::string(kPlainMagic), columns_[0]);
    std::string content;
    for (const std::string& column : columns_) {
      const uint64_t bytes = column.size();
      content.append(reinterpret_cast<const char*>(&bytes), sizeof bytes);
    }
    for (size_t i = 0; i < columns_.size(); ++i) {
      for (size_t place = 0; place < kWidths[i]; ++place) {
        for (size_t at = place; at < columns_[i].size(); at += kWidths[i]) {
          content.push_back(columns_[i][at]);
        }
      }
    }
    if (content.size() > kMaxProfileBytes) return content;
    const uint64_t bytes = content.size();
    LARDER_ASSIGN_OR_RETURN(const std::string frame, Compress(content));
    std::string out(kCompressedMagic);
    out.append(reinterpret_cast<const char*>(&bytes), sizeof bytes);
    return out + frame;
  }

 private:
  std::string& At(Column column) {
    return columns_[plain_ ? 0 : static_cast<size_t>(column)];
  }

  const bool plain_;
  std::array<std::string, kWidths.size()> columns_;
};

void Write(Writer& writer, const CoefficientTables& tables, uint8_t levels) {
  writer.Ids(Column::kTables, tables.base, levels * 3);
  writer.Ids(Column::kRefinements, tables.refinement, levels * 2);
}

void Write(Writer& writer, const TensorProfile& tensor, uint8_t levels) {
  writer.Numbers(Column::kReals, tensor.step);
  writer.Numbers(Column::kReals, tensor.mean);
  writer.Numbers(Column::kReals, tensor.weight);
  Write(writer, tensor.tables, levels);
  writer.Number(static_cast<uint16_t>(tensor.transforms.size()));
  for (const TensorProfile::Transform& transform : tensor.transforms) {
    writer.Number(transform.channel_begin);
    writer.Number(transform.channel_count);
    writer.Numbers(Column::kReals, transform.weight);
    Write(writer, transform.tables, levels);
    writer.Numbers(Column::kMatrices, transform.matrix);
  }
  writer.Number(static_cast<uint16_t>(tensor.predictions.size()));
  for (const TensorProfile::Prediction& prediction : tensor.predictions) {
    writer.Number(prediction.channel_begin);
    writer.Number(prediction.channel_count);
    writer.Numbers(Column::kOrder, prediction.order);
    writer.Numbers(Column::kRest, prediction.parents);
    writer.Parents(prediction);
    writer.Numbers(Column::kFactors, prediction.factor);
    Write(writer, prediction.tables, levels);
    writer.Ids(Column::kTrellisTables, prediction.trellis_tables, levels);
    writer.Ids(Column::kTrellisTables, prediction.nested_tables, levels * 3);
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

StatusOr<std::string> Write(const Profile::Contents& contents,
                            Profile::Format format) {
  Writer writer(format);
  writer.Text(contents.model_name);
  writer.Text(contents.made_by);
  writer.Number(contents.weights.bytes);
  writer.Number(static_cast<uint8_t>(
      (contents.unrotated_keys ? kUnrotated : 0) | PredictionFlags(contents)));
  writer.Number(contents.level_count);
  writer.Numbers(Column::kReals, contents.divergence);
  writer.Number(static_cast<uint16_t>(contents.groups.size()));
  for (const Profile::Group& group : contents.groups) {
    writer.Number(group.layer_count);
    writer.Number(group.kv_head_count);
    writer.Number(group.key_dim);
    writer.Number(group.value_dim);
    for (const auto* tensors : {&group.keys, &group.values}) {
      for (const TensorProfile& tensor : *tensors) {
        Write(writer, tensor, contents.level_count);
      }
    }
  }
  return writer.Finish();
}

// ---- Reading ----

// Never allocates more than the bytes that are left could fill.
class Reader {
 public:
  // `bytes` outlive the reader.
  Status Open(ByteSpan bytes) {
    if (bytes.size() > kMaxProfileBytes) {
      return absl::DataLossError("profile: more than 256 MiB");
    }
    if (HasMagic(bytes, kPlainMagic)) {
      plain_ = true;
      rest_[0] = bytes.subspan(kPlainMagic.size());
      return absl::OkStatus();
    }
    uint64_t content_bytes = 0;
    constexpr size_t kFront = kCompressedMagic.size() + sizeof content_bytes;
    if (!HasMagic(bytes, kCompressedMagic) || bytes.size() < kFront) {
      return absl::DataLossError(
          "profile: not a Larder profile of version 1 or 2");
    }
    std::memcpy(&content_bytes, bytes.data() + kCompressedMagic.size(),
                sizeof content_bytes);
    if (content_bytes > kMaxProfileBytes) {
      return absl::DataLossError("profile: more than 256 MiB of content");
    }
    LARDER_ASSIGN_OR_RETURN(const std::string content,
                            Decompress(bytes.subspan(kFront), content_bytes));
    return Split(std::as_bytes(std::span(content)));
  }

  bool ok() const { return ok_; }
  void Fail() { ok_ = false; }
  bool AtEnd() const {
    return ok_ && std::all_of(rest_.begin(), rest_.end(),
                              [](ByteSpan rest) { return rest.empty(); });
  }

  template <typename T>
  T Number() {
    T value{};
    const ByteSpan bytes = Take(Column::kRest, sizeof value);
    if (!bytes.empty()) std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }
  template <typename T>
  void Numbers(Column column, std::vector<T>& values, size_t count) {
    const ByteSpan bytes = Take(column, count * sizeof(T));
    if (!ok_) return;
    values.resize(count);
    if (count > 0) std::memcpy(values.data(), bytes.data(), bytes.size());
  }
  void Ids(Column column, std::vector<uint8_t>& ids, size_t rows,
           size_t count) {
    Numbers(column, ids, rows * count);
    if (ok_ && !plain_) ids = Transposed(ids, count);
  }
  void Parents(TensorProfile::Prediction& prediction) {
    const size_t all = std::accumulate(prediction.parents.begin(),
                                       prediction.parents.end(), size_t{0});
    Numbers(Column::kParents, prediction.parent, all);
    if (ok_ && !plain_) {
      prediction.parent =
          Differences(prediction.parents, std::move(prediction.parent), true);
    }
  }
  std::string Text() {
    const ByteSpan bytes = Take(Column::kRest, Number<uint16_t>());
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

 private:
  static bool HasMagic(ByteSpan bytes, std::string_view magic) {
    return bytes.size() >= magic.size() &&
           std::memcmp(bytes.data(), magic.data(), magic.size()) == 0;
  }

  // Numbers of columns, each with its bytes together.
  Status Split(ByteSpan content) {
    std::array<uint64_t, kWidths.size()> sizes;
    if (content.size() < sizeof sizes) {
      return absl::DataLossError("profile: no columns");
    }
    std::memcpy(sizes.data(), content.data(), sizeof sizes);
    content = content.subspan(sizeof sizes);
    split_.resize(content.size());
    std::byte* to = split_.data();
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] > content.size() || sizes[i] % kWidths[i] != 0) {
        return absl::DataLossError("profile: a column of an impossible size");
      }
      const size_t count = sizes[i] / kWidths[i];
      for (size_t at = 0; at < sizes[i]; ++at) {
        to[at] = content[at % kWidths[i] * count + at / kWidths[i]];
      }
      rest_[i] = {to, sizes[i]};
      to += sizes[i];
      content = content.subspan(sizes[i]);
    }
    if (!content.empty()) {
      return absl::DataLossError("profile: bytes behind the columns");
    }
    return absl::OkStatus();
  }

  ByteSpan Take(Column column, size_t size) {
    ByteSpan& rest = rest_[plain_ ? 0 : static_cast<size_t>(column)];
    if (!ok_ || size > rest.size()) {
      ok_ = false;
      return {};
    }
    const ByteSpan taken = rest.first(size);
    rest = rest.subspan(size);
    return taken;
  }

  bool plain_ = false, ok_ = true;
  std::vector<std::byte> split_;
  std::array<ByteSpan, kWidths.size()> rest_;
};

void Read(Reader& reader, size_t count, uint8_t levels,
          CoefficientTables& tables) {
  reader.Ids(Column::kTables, tables.base, size_t{levels} * 3, count);
  reader.Ids(Column::kRefinements, tables.refinement, size_t{levels} * 2,
             count);
}

// Of one block of the channels that are left; fails if it is none.
void ReadBlock(Reader& reader, uint32_t& begin, uint32_t& count,
               uint32_t& left) {
  begin = reader.Number<uint32_t>();
  count = reader.Number<uint32_t>();
  if (count == 0 || count > left) reader.Fail();
  left -= std::min(left, count);
}

void Read(Reader& reader, uint32_t channels, uint8_t levels, uint8_t flags,
          TensorProfile& tensor) {
  reader.Numbers(Column::kReals, tensor.step, levels);
  reader.Numbers(Column::kReals, tensor.mean, channels);
  reader.Numbers(Column::kReals, tensor.weight, channels);
  Read(reader, channels, levels, tensor.tables);
  const auto transforms = reader.Number<uint16_t>();
  uint32_t left = channels;
  for (uint32_t i = 0; i < transforms && reader.ok(); ++i) {
    TensorProfile::Transform& transform = tensor.transforms.emplace_back();
    ReadBlock(reader, transform.channel_begin, transform.channel_count, left);
    const size_t count = std::min(transform.channel_count, channels);
    reader.Numbers(Column::kReals, transform.weight, count);
    Read(reader, count, levels, transform.tables);
    reader.Numbers(Column::kMatrices, transform.matrix, count * count);
  }
  const auto predictions = reader.Number<uint16_t>();
  left = channels;
  for (uint32_t i = 0; i < predictions && reader.ok(); ++i) {
    TensorProfile::Prediction& prediction = tensor.predictions.emplace_back();
    ReadBlock(reader, prediction.channel_begin, prediction.channel_count, left);
    const size_t count = std::min(prediction.channel_count, channels);
    reader.Numbers(Column::kOrder, prediction.order, count);
    reader.Numbers(Column::kRest, prediction.parents, count);
    reader.Parents(prediction);
    reader.Numbers(Column::kFactors, prediction.factor,
                   prediction.parent.size());
    Read(reader, count, levels, prediction.tables);
    if ((flags & kTrellis) != 0) {
      reader.Ids(Column::kTrellisTables, prediction.trellis_tables, levels,
                 count);
    }
    if ((flags & kNested) != 0) {
      reader.Ids(Column::kTrellisTables, prediction.nested_tables,
                 size_t{levels} * 3, count);
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

Profile::Profile(Contents contents, std::string bytes)
    : contents_(std::move(contents)), bytes_(std::move(bytes)) {
  Sha256 hash;
  hash.Update(bytes_.data(), bytes_.size());
  hash.Finish(id_.bytes.data());
}

Profile::Format Profile::format() const {
  return bytes_.starts_with(kPlainMagic) ? Format::kPlain : Format::kCompressed;
}

bool Profile::HasTrellis(int planes) const {
  const uint8_t wanted = planes == 1 ? kTrellis : planes == 2 ? kNested : 0;
  return (PredictionFlags(contents_) & wanted) != 0;
}

StatusOr<std::shared_ptr<const Profile>> Profile::Make(Contents contents,
                                                       Format format) {
  LARDER_RETURN_IF_ERROR(Complete(contents, Use::kEncoding));
  LARDER_ASSIGN_OR_RETURN(std::string bytes, Write(contents, format));
  if (bytes.size() > kMaxProfileBytes) return Invalid("more than 256 MiB");
  return std::shared_ptr<const Profile>(
      new Profile(std::move(contents), std::move(bytes)));
}

StatusOr<std::shared_ptr<const Profile>> Profile::Parse(ByteSpan bytes,
                                                        Use use) {
  Reader reader;
  LARDER_RETURN_IF_ERROR(reader.Open(bytes));
  Contents contents;
  contents.model_name = reader.Text();
  contents.made_by = reader.Text();
  contents.weights.bytes = reader.Number<std::array<uint8_t, 32>>();
  const auto flags = reader.Number<uint8_t>();
  contents.unrotated_keys = (flags & kUnrotated) != 0;
  contents.level_count = reader.Number<uint8_t>();
  reader.Numbers(Column::kReals, contents.divergence, contents.level_count);
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
  LARDER_RETURN_IF_ERROR(Complete(contents, use));
  return std::shared_ptr<const Profile>(
      new Profile(std::move(contents),
                  {reinterpret_cast<const char*>(bytes.data()), bytes.size()}));
}

}  // namespace larder
