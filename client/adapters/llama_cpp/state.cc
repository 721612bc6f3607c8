#include "client/adapters/llama_cpp/state.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace larder {
namespace {

static_assert(std::endian::native == std::endian::little,
              "llama.cpp writes its state in the byte order of the host");

constexpr uint32_t kMagic = 0xaf143cd8;
constexpr uint64_t kCellBytes = 12;         // pos, n_seq_id = 1, seq_id
constexpr uint64_t kLayerHeaderBytes = 12;  // type and row size, both forms
constexpr uint64_t kPrefixBytes = 12;       // magic, seq_id, n_stream
constexpr uint64_t kCountsBytes = 8;        // v_trans, n_layer

template <typename T>
T Load(ByteSpan bytes, uint64_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

template <typename T>
void Store(MutableByteSpan bytes, uint64_t offset, T value) {
  std::memcpy(bytes.data() + offset, &value, sizeof value);
}

Status Malformed(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("llama.cpp state: ", what));
}

Status OtherShape(absl::string_view what, uint64_t found, uint64_t expected) {
  return absl::FailedPreconditionError(
      absl::StrCat("llama.cpp state of another shape: ", what, " is ", found,
                   ", expected ", expected));
}

// Reads a blob from its beginning, never past its end.
class Reader {
 public:
  explicit Reader(ByteSpan bytes) : bytes_(bytes) {}

  uint64_t left() const { return bytes_.size() - offset_; }

  template <typename T>
  Status Read(absl::string_view what, T& out) {
    if (left() < sizeof(T)) {
      return Malformed(absl::StrCat("ends inside ", what, " at byte ", offset_,
                                    " of ", bytes_.size()));
    }
    out = Load<T>(bytes_, offset_);
    offset_ += sizeof(T);
    return absl::OkStatus();
  }

  Status Skip(absl::string_view what, uint64_t bytes) {
    if (left() < bytes) {
      return Malformed(absl::StrCat(what, " of ", bytes, " bytes at byte ",
                                    offset_, " of ", bytes_.size()));
    }
    offset_ += bytes;
    return absl::OkStatus();
  }

 private:
  ByteSpan bytes_;
  uint64_t offset_ = 0;
};

// Magic, sequence id (ignored, as llama.cpp does) and the number of streams.
Status ReadPrefix(Reader& reader, uint32_t& stream_count) {
  uint32_t magic = 0;
  int32_t sequence = 0;
  LARDER_RETURN_IF_ERROR(reader.Read("magic", magic));
  if (magic != kMagic) return Malformed(absl::StrCat("magic is ", magic));
  LARDER_RETURN_IF_ERROR(reader.Read("sequence id", sequence));
  return reader.Read("stream count", stream_count);
}

// The one stream that holds cells. Leaves the reader behind its cell count.
Status ReadCellCount(Reader& reader, uint32_t stream_count, uint32_t& stream,
                     uint32_t& cells) {
  for (stream = 0; stream < stream_count; ++stream) {
    LARDER_RETURN_IF_ERROR(reader.Read("cell count", cells));
    if (cells > kLlamaMaxTokens || cells > reader.left() / kCellBytes) {
      return Malformed(absl::StrCat("cell count ", cells, " with ",
                                    reader.left(), " bytes left"));
    }
    if (cells > 0) return absl::OkStatus();
  }
  return Malformed("holds no token");
}

Status CheckRowBytes(absl::string_view what, uint64_t bytes) {
  if (bytes == 0 || bytes > kLlamaMaxRowBytes) {
    return Malformed(absl::StrCat(what, " row of ", bytes, " bytes"));
  }
  return absl::OkStatus();
}

Status LearnKeys(Reader& reader, uint32_t cells, LlamaStateShape& shape) {
  for (LlamaLayerShape& layer : shape.layers) {
    uint64_t row_bytes = 0;
    LARDER_RETURN_IF_ERROR(reader.Read("K type", layer.k_type));
    LARDER_RETURN_IF_ERROR(reader.Read("K row size", row_bytes));
    LARDER_RETURN_IF_ERROR(CheckRowBytes("K", row_bytes));
    layer.k_row_bytes = static_cast<uint32_t>(row_bytes);
    LARDER_RETURN_IF_ERROR(reader.Skip("K rows", row_bytes * cells));
  }
  return absl::OkStatus();
}

Status LearnValues(Reader& reader, uint32_t cells, LlamaStateShape& shape) {
  for (LlamaLayerShape& layer : shape.layers) {
    uint64_t row_bytes = 0;
    LARDER_RETURN_IF_ERROR(reader.Read("V type", layer.v_type));
    if (shape.v_transposed) {
      uint32_t width = 0;
      LARDER_RETURN_IF_ERROR(
          reader.Read("V element size", layer.v_element_bytes));
      LARDER_RETURN_IF_ERROR(reader.Read("V width", width));
      row_bytes = uint64_t{layer.v_element_bytes} * width;
    } else {
      LARDER_RETURN_IF_ERROR(reader.Read("V row size", row_bytes));
    }
    LARDER_RETURN_IF_ERROR(CheckRowBytes("V", row_bytes));
    layer.v_row_bytes = static_cast<uint32_t>(row_bytes);
    LARDER_RETURN_IF_ERROR(reader.Skip("V rows", row_bytes * cells));
  }
  return absl::OkStatus();
}

Status CheckKeyHeader(ByteSpan blob, uint64_t rows, size_t index,
                      const LlamaLayerShape& layer) {
  const auto type = Load<int32_t>(blob, rows - kLayerHeaderBytes);
  if (type != layer.k_type) {
    return OtherShape(absl::StrCat("K type of layer ", index),
                      static_cast<uint32_t>(type),
                      static_cast<uint32_t>(layer.k_type));
  }
  const auto row_bytes = Load<uint64_t>(blob, rows - 8);
  if (row_bytes != layer.k_row_bytes) {
    return OtherShape(absl::StrCat("K row size of layer ", index), row_bytes,
                      layer.k_row_bytes);
  }
  return absl::OkStatus();
}

Status CheckValueHeader(ByteSpan blob, uint64_t rows, size_t index,
                        const LlamaLayerShape& layer) {
  const auto type = Load<int32_t>(blob, rows - kLayerHeaderBytes);
  if (type != layer.v_type) {
    return OtherShape(absl::StrCat("V type of layer ", index),
                      static_cast<uint32_t>(type),
                      static_cast<uint32_t>(layer.v_type));
  }
  if (layer.v_element_bytes == 0) {
    const auto row_bytes = Load<uint64_t>(blob, rows - 8);
    if (row_bytes == layer.v_row_bytes) return absl::OkStatus();
    return OtherShape(absl::StrCat("V row size of layer ", index), row_bytes,
                      layer.v_row_bytes);
  }
  const auto element = Load<uint32_t>(blob, rows - 8);
  if (element != layer.v_element_bytes) {
    return OtherShape(absl::StrCat("V element size of layer ", index), element,
                      layer.v_element_bytes);
  }
  const auto width = Load<uint32_t>(blob, rows - 4);
  if (uint64_t{width} * element != layer.v_row_bytes) {
    return OtherShape(absl::StrCat("V width of layer ", index), width,
                      layer.v_row_bytes / element);
  }
  return absl::OkStatus();
}

// Proves that the cells' positions are a run. Fills `row_of` (row by position)
// only if they are not in order.
Status ReadPositions(ByteSpan blob, const LlamaStateLayout& layout,
                     uint32_t& begin, std::vector<uint32_t>& row_of) {
  const uint32_t n = layout.tokens;
  int32_t lowest = INT32_MAX;
  bool in_order = true;
  const auto first = Load<int32_t>(blob, layout.cells_offset);
  for (uint32_t i = 0; i < n; ++i) {
    const uint64_t cell = layout.cells_offset + i * kCellBytes;
    const auto position = Load<int32_t>(blob, cell);
    const auto sequences = Load<uint32_t>(blob, cell + 4);
    if (sequences != 1) {
      return Malformed(
          absl::StrCat("cell ", i, " names ", sequences, " sequences"));
    }
    if (position < 0) {
      return Malformed(absl::StrCat("cell ", i, " is at ", position));
    }
    lowest = std::min(lowest, position);
    in_order = in_order && uint32_t(position) == uint32_t(first) + i;
  }
  begin = static_cast<uint32_t>(lowest);
  row_of.clear();
  if (in_order) return absl::OkStatus();

  constexpr uint32_t kUnset = UINT32_MAX;
  row_of.assign(n, kUnset);
  for (uint32_t i = 0; i < n; ++i) {
    const uint64_t cell = layout.cells_offset + i * kCellBytes;
    const uint32_t at = uint32_t(Load<int32_t>(blob, cell)) - begin;
    if (at >= n || row_of[at] != kUnset) {
      return Malformed(absl::StrCat("positions are no run: ", begin + at,
                                    at >= n ? " is too far from " : " twice, ",
                                    "the first is ", begin));
    }
    row_of[at] = i;
  }
  return absl::OkStatus();
}

// Copies a matrix of elements of `kBytes` bytes so that element (row, column)
// of the source, at row * source_stride + column_of(column), comes to
// column * destination_stride + row. In tiles, so that both sides stay in the
// first-level cache.
template <size_t kBytes, typename ColumnOf>
void TransposeTiled(const std::byte* source, uint64_t source_stride,
                    std::byte* destination, uint64_t destination_stride,
                    uint64_t rows, uint64_t columns, ColumnOf column_of) {
  constexpr uint64_t kTile = 32;
  for (uint64_t r0 = 0; r0 < rows; r0 += kTile) {
    const uint64_t r1 = std::min(rows, r0 + kTile);
    for (uint64_t c0 = 0; c0 < columns; c0 += kTile) {
      const uint64_t c1 = std::min(columns, c0 + kTile);
      for (uint64_t c = c0; c < c1; ++c) {
        const std::byte* from = source + column_of(c) * kBytes;
        std::byte* to = destination + c * destination_stride * kBytes;
        for (uint64_t r = r0; r < r1; ++r) {
          std::memcpy(to + r * kBytes, from + r * source_stride * kBytes,
                      kBytes);
        }
      }
    }
  }
}

template <typename ColumnOf>
void Transpose(size_t element_bytes, const std::byte* source,
               uint64_t source_stride, std::byte* destination,
               uint64_t destination_stride, uint64_t rows, uint64_t columns,
               ColumnOf column_of) {
  switch (element_bytes) {
    case 1:
      return TransposeTiled<1>(source, source_stride, destination,
                               destination_stride, rows, columns, column_of);
    case 2:
      return TransposeTiled<2>(source, source_stride, destination,
                               destination_stride, rows, columns, column_of);
    case 4:
      return TransposeTiled<4>(source, source_stride, destination,
                               destination_stride, rows, columns, column_of);
    default:
      return TransposeTiled<8>(source, source_stride, destination,
                               destination_stride, rows, columns, column_of);
  }
}

uint64_t Identity(uint64_t column) {
  return column;
}

bool IsElementSize(uint32_t bytes) {
  return bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8;
}

Status CheckRange(uint32_t layer_count, size_t layer, uint64_t first,
                  uint64_t count, uint64_t tokens) {
  if (layer >= layer_count) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", layer, " of ", layer_count));
  }
  if (count == 0 || first > tokens || count > tokens - first) {
    return absl::InvalidArgumentError(
        absl::StrCat(count, " tokens from token ", first, " of ", tokens));
  }
  return absl::OkStatus();
}

Status CheckSegment(const LlamaLayerShape& layer, uint32_t count,
                    uint64_t bytes) {
  const uint64_t expected = LlamaSegmentBytes(layer, count);
  if (bytes == expected) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("a segment of ", count,
                                                 " tokens has ", expected,
                                                 " bytes, the span ", bytes));
}

}  // namespace

Status Validate(const LlamaStateShape& shape) {
  const auto refuse = [](auto&&... what) {
    return absl::InvalidArgumentError(
        absl::StrCat("llama.cpp state shape: ", what...));
  };
  if (shape.stream_count == 0 || shape.stream_count > kLlamaMaxStreams) {
    return refuse(shape.stream_count, " streams");
  }
  if (shape.layers.empty() || shape.layers.size() > kLlamaMaxLayers) {
    return refuse(shape.layers.size(), " layers");
  }
  const bool has_v = shape.layers[0].v_row_bytes > 0;
  for (size_t i = 0; i < shape.layers.size(); ++i) {
    const LlamaLayerShape& layer = shape.layers[i];
    if (layer.k_row_bytes == 0 || layer.k_row_bytes > kLlamaMaxRowBytes) {
      return refuse("layer ", i, ": K row of ", layer.k_row_bytes, " bytes");
    }
    if (layer.v_row_bytes > kLlamaMaxRowBytes) {
      return refuse("layer ", i, ": V row of ", layer.v_row_bytes, " bytes");
    }
    if ((layer.v_row_bytes > 0) != has_v) {
      return refuse("layer ", i, ": V in some layers only");
    }
    if (has_v && shape.v_transposed) {
      if (!IsElementSize(layer.v_element_bytes) ||
          layer.v_row_bytes % layer.v_element_bytes != 0) {
        return refuse("layer ", i, ": V element of ", layer.v_element_bytes,
                      " bytes in a row of ", layer.v_row_bytes);
      }
    } else if (layer.v_element_bytes != 0) {
      return refuse("layer ", i, ": V element size, but V is not transposed");
    }
    if (!has_v && layer.v_type != 0) {
      return refuse("layer ", i, ": V type, but no V");
    }
  }
  return absl::OkStatus();
}

std::string FirstDifference(const LlamaStateShape& a,
                            const LlamaStateShape& b) {
  const auto differ = [](std::string what, auto x, auto y) {
    return absl::StrCat(what, " ", x, " and ", y);
  };
  if (a.stream_count != b.stream_count) {
    return differ("streams", a.stream_count, b.stream_count);
  }
  if (a.v_transposed != b.v_transposed) {
    return differ("V transposed", int{a.v_transposed}, int{b.v_transposed});
  }
  if (a.layers.size() != b.layers.size()) {
    return differ("layers", a.layers.size(), b.layers.size());
  }
  for (size_t i = 0; i < a.layers.size(); ++i) {
    const LlamaLayerShape& x = a.layers[i];
    const LlamaLayerShape& y = b.layers[i];
    const std::string at = absl::StrCat("layer ", i, ": ");
    if (x.k_type != y.k_type) return differ(at + "K type", x.k_type, y.k_type);
    if (x.v_type != y.v_type) return differ(at + "V type", x.v_type, y.v_type);
    if (x.k_row_bytes != y.k_row_bytes) {
      return differ(at + "K row bytes", x.k_row_bytes, y.k_row_bytes);
    }
    if (x.v_row_bytes != y.v_row_bytes) {
      return differ(at + "V row bytes", x.v_row_bytes, y.v_row_bytes);
    }
    if (x.v_element_bytes != y.v_element_bytes) {
      return differ(at + "V element bytes", x.v_element_bytes,
                    y.v_element_bytes);
    }
  }
  return "";
}

uint64_t LlamaSegmentBytes(const LlamaLayerShape& layer, uint32_t tokens) {
  return (uint64_t{layer.k_row_bytes} + layer.v_row_bytes) * tokens;
}

LlamaStateLayout::LlamaStateLayout(const LlamaStateShape& shape,
                                   uint32_t token_count, uint32_t in_stream)
    : tokens(token_count), stream(in_stream) {
  // Within the limits of the shape nothing below comes near 2^64: 2^12 layers
  // of 2^27 bytes for each of 2^24 tokens are 2^63.
  uint64_t at = kPrefixBytes + sizeof(uint32_t) * (uint64_t{stream} + 1);
  cells_offset = at;
  at += kCellBytes * tokens;
  counts_offset = at;
  at += kCountsBytes;
  k_rows.reserve(shape.layers.size());
  for (const LlamaLayerShape& layer : shape.layers) {
    at += kLayerHeaderBytes;
    k_rows.push_back(at);
    at += uint64_t{layer.k_row_bytes} * tokens;
  }
  if (shape.layers[0].v_row_bytes > 0) {
    v_rows.reserve(shape.layers.size());
    for (const LlamaLayerShape& layer : shape.layers) {
      at += kLayerHeaderBytes;
      v_rows.push_back(at);
      at += uint64_t{layer.v_row_bytes} * tokens;
    }
  }
  at += sizeof(uint32_t) * (uint64_t{shape.stream_count} - 1 - stream);
  bytes = at;
}

StatusOr<LlamaStateShape> LearnLlamaShape(ByteSpan blob) {
  Reader reader(blob);
  LlamaStateShape shape;
  LARDER_RETURN_IF_ERROR(ReadPrefix(reader, shape.stream_count));
  if (shape.stream_count == 0 || shape.stream_count > kLlamaMaxStreams) {
    return Malformed(absl::StrCat("stream count ", shape.stream_count));
  }
  uint32_t stream = 0;
  uint32_t cells = 0;
  LARDER_RETURN_IF_ERROR(
      ReadCellCount(reader, shape.stream_count, stream, cells));
  LARDER_RETURN_IF_ERROR(reader.Skip("cells", kCellBytes * cells));

  uint32_t v_trans = 0;
  uint32_t layer_count = 0;
  LARDER_RETURN_IF_ERROR(reader.Read("v_trans", v_trans));
  if (v_trans > 1) return Malformed(absl::StrCat("v_trans is ", v_trans));
  shape.v_transposed = v_trans == 1;
  LARDER_RETURN_IF_ERROR(reader.Read("layer count", layer_count));
  if (layer_count == 0 || layer_count > kLlamaMaxLayers) {
    return Malformed(absl::StrCat("layer count ", layer_count));
  }
  shape.layers.resize(layer_count);
  LARDER_RETURN_IF_ERROR(LearnKeys(reader, cells, shape));
  const uint64_t trailing =
      sizeof(uint32_t) * (uint64_t{shape.stream_count} - 1 - stream);
  if (reader.left() != trailing) {
    LARDER_RETURN_IF_ERROR(LearnValues(reader, cells, shape));
  }
  if (Status valid = Validate(shape); !valid.ok()) {
    return Malformed(valid.message());
  }
  LARDER_RETURN_IF_ERROR(LlamaStateView::Parse(shape, blob).status());
  return shape;
}

StatusOr<uint32_t> LearnLlamaStreams(ByteSpan blob_of_no_tokens) {
  Reader reader(blob_of_no_tokens);
  uint32_t stream_count = 0;
  LARDER_RETURN_IF_ERROR(ReadPrefix(reader, stream_count));
  if (stream_count == 0 || stream_count > kLlamaMaxStreams ||
      reader.left() != sizeof(uint32_t) * stream_count) {
    return absl::FailedPreconditionError(absl::StrCat(
        "not the state of a plain KV cache: ", blob_of_no_tokens.size(),
        " bytes for no tokens, stream count ", stream_count));
  }
  for (uint32_t i = 0; i < stream_count; ++i) {
    uint32_t cells = 0;
    LARDER_RETURN_IF_ERROR(reader.Read("cell count", cells));
    if (cells != 0) {
      return absl::FailedPreconditionError(absl::StrCat(
          "not the state of a plain KV cache: stream ", i, " of a sequence ",
          "without tokens has ", cells, " cells"));
    }
  }
  return stream_count;
}

StatusOr<LlamaStateView> LlamaStateView::Parse(const LlamaStateShape& shape,
                                               ByteSpan blob) {
  Reader reader(blob);
  uint32_t stream_count = 0;
  LARDER_RETURN_IF_ERROR(ReadPrefix(reader, stream_count));
  if (stream_count != shape.stream_count) {
    return OtherShape("stream count", stream_count, shape.stream_count);
  }
  uint32_t stream = 0;
  uint32_t cells = 0;
  LARDER_RETURN_IF_ERROR(ReadCellCount(reader, stream_count, stream, cells));

  LlamaStateView view(shape, blob, LlamaStateLayout(shape, cells, stream));
  const LlamaStateLayout& layout = view.layout_;
  // The counts and the first header lie where they lie whatever the layers
  // are, so a state of another shape is told apart from a damaged one.
  if (layout.counts_offset + kCountsBytes > blob.size()) {
    return Malformed(
        absl::StrCat("ends inside the cells, at byte ", blob.size()));
  }
  const auto v_trans = Load<uint32_t>(blob, layout.counts_offset);
  if (v_trans != uint32_t{shape.v_transposed}) {
    return OtherShape("v_trans", v_trans, shape.v_transposed);
  }
  const auto layer_count = Load<uint32_t>(blob, layout.counts_offset + 4);
  if (layer_count != shape.layers.size()) {
    return OtherShape("layer count", layer_count, shape.layers.size());
  }
  if (layout.k_rows[0] > blob.size()) {
    return Malformed(
        absl::StrCat("ends before the rows, at byte ", blob.size()));
  }
  LARDER_RETURN_IF_ERROR(
      CheckKeyHeader(blob, layout.k_rows[0], 0, shape.layers[0]));
  if (layout.bytes != blob.size()) {
    return Malformed(absl::StrCat(cells, " tokens take ", layout.bytes,
                                  " bytes, the blob has ", blob.size()));
  }
  for (size_t i = 0; i < layout.k_rows.size(); ++i) {
    LARDER_RETURN_IF_ERROR(
        CheckKeyHeader(blob, layout.k_rows[i], i, shape.layers[i]));
  }
  for (size_t i = 0; i < layout.v_rows.size(); ++i) {
    LARDER_RETURN_IF_ERROR(
        CheckValueHeader(blob, layout.v_rows[i], i, shape.layers[i]));
  }
  const uint64_t after = sizeof(uint32_t) * (stream_count - 1 - stream);
  for (uint64_t at = blob.size() - after; at < blob.size(); at += 4) {
    if (Load<uint32_t>(blob, at) != 0) {
      return Malformed("more than one stream holds cells");
    }
  }
  LARDER_RETURN_IF_ERROR(
      ReadPositions(blob, layout, view.position_begin_, view.row_of_));
  return view;
}

Status LlamaStateView::Cut(size_t layer, uint32_t position, uint32_t count,
                           MutableByteSpan destination) const {
  const uint32_t n = layout_.tokens;
  if (position < position_begin_) {
    return absl::InvalidArgumentError(absl::StrCat(
        "position ", position, " of a state that begins at ", position_begin_));
  }
  const uint32_t first = position - position_begin_;
  LARDER_RETURN_IF_ERROR(CheckRange(
      static_cast<uint32_t>(shape_->layers.size()), layer, first, count, n));
  const LlamaLayerShape& shape = shape_->layers[layer];
  LARDER_RETURN_IF_ERROR(CheckSegment(shape, count, destination.size()));

  const auto row = [&](uint64_t i) -> uint64_t {
    return in_order() ? first + i : row_of_[first + i];
  };
  const auto copy_rows = [&](uint64_t rows, uint64_t row_bytes, std::byte* to) {
    const std::byte* from = blob_.data() + rows;
    if (in_order()) {
      std::memcpy(to, from + first * row_bytes, count * row_bytes);
      return;
    }
    for (uint64_t i = 0; i < count; ++i) {
      std::memcpy(to + i * row_bytes, from + row(i) * row_bytes, row_bytes);
    }
  };
  std::byte* const keys = destination.data();
  copy_rows(layout_.k_rows[layer], shape.k_row_bytes, keys);
  if (layout_.v_rows.empty()) return absl::OkStatus();
  std::byte* const values = keys + uint64_t{shape.k_row_bytes} * count;
  if (!shape_->v_transposed) {
    copy_rows(layout_.v_rows[layer], shape.v_row_bytes, values);
    return absl::OkStatus();
  }
  const uint64_t width = shape.v_row_bytes / shape.v_element_bytes;
  Transpose(shape.v_element_bytes, blob_.data() + layout_.v_rows[layer], n,
            values, width, width, count, row);
  return absl::OkStatus();
}

StatusOr<LlamaStateBuilder> LlamaStateBuilder::Start(
    const LlamaStateShape& shape, uint32_t tokens, uint32_t stream,
    MutableByteSpan blob) {
  LARDER_RETURN_IF_ERROR(Validate(shape));
  if (tokens == 0 || tokens > kLlamaMaxTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("a state of ", tokens, " tokens"));
  }
  if (stream >= shape.stream_count) {
    return absl::InvalidArgumentError(
        absl::StrCat("stream ", stream, " of ", shape.stream_count));
  }
  LlamaStateLayout layout(shape, tokens, stream);
  if (layout.bytes != blob.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("a state of ", tokens, " tokens has ", layout.bytes,
                     " bytes, the span ", blob.size()));
  }
  LlamaStateBuilder builder(shape, blob, std::move(layout));
  builder.WriteFrame();
  for (size_t i = 0; i < shape.layers.size(); ++i) builder.WriteKeyHeader(i);
  for (size_t i = 0; i < builder.layout_.v_rows.size(); ++i) {
    builder.WriteValueHeader(i);
  }
  builder.WriteTrailer();
  return builder;
}

// All that comes before the layers.
void LlamaStateBuilder::WriteFrame() const {
  Store(blob_, 0, kMagic);
  Store(blob_, 4, int32_t{0});
  Store(blob_, 8, shape_->stream_count);
  for (uint32_t i = 0; i < layout_.stream; ++i) {
    Store(blob_, kPrefixBytes + 4 * uint64_t{i}, uint32_t{0});
  }
  Store(blob_, layout_.cells_offset - 4, layout_.tokens);
  for (uint32_t i = 0; i < layout_.tokens; ++i) {
    const uint64_t cell = layout_.cells_offset + i * kCellBytes;
    Store(blob_, cell, static_cast<int32_t>(i));
    Store(blob_, cell + 4, uint32_t{1});
    Store(blob_, cell + 8, int32_t{0});
  }
  Store(blob_, layout_.counts_offset, uint32_t{shape_->v_transposed});
  Store(blob_, layout_.counts_offset + 4,
        static_cast<uint32_t>(shape_->layers.size()));
}

// The empty streams behind the one that holds the tokens.
void LlamaStateBuilder::WriteTrailer() const {
  const uint64_t after =
      sizeof(uint32_t) * (shape_->stream_count - 1 - layout_.stream);
  std::memset(blob_.data() + layout_.bytes - after, 0, after);
}

void LlamaStateBuilder::WriteKeyHeader(size_t layer) const {
  const LlamaLayerShape& shape = shape_->layers[layer];
  Store(blob_, layout_.k_rows[layer] - kLayerHeaderBytes, shape.k_type);
  Store(blob_, layout_.k_rows[layer] - 8, uint64_t{shape.k_row_bytes});
}

void LlamaStateBuilder::WriteValueHeader(size_t layer) const {
  const LlamaLayerShape& shape = shape_->layers[layer];
  const uint64_t rows = layout_.v_rows[layer];
  Store(blob_, rows - kLayerHeaderBytes, shape.v_type);
  if (shape_->v_transposed) {
    Store(blob_, rows - 8, shape.v_element_bytes);
    Store(blob_, rows - 4, shape.v_row_bytes / shape.v_element_bytes);
  } else {
    Store(blob_, rows - 8, uint64_t{shape.v_row_bytes});
  }
}

MutableByteSpan LlamaStateBuilder::Keys(size_t layer, uint32_t first,
                                        uint32_t count) const {
  const uint64_t row_bytes = shape_->layers[layer].k_row_bytes;
  return blob_.subspan(layout_.k_rows[layer] + first * row_bytes,
                       count * row_bytes);
}

MutableByteSpan LlamaStateBuilder::Values(size_t layer, uint32_t first,
                                          uint32_t count) const {
  if (layout_.v_rows.empty()) return {};
  const uint64_t row_bytes = shape_->layers[layer].v_row_bytes;
  return blob_.subspan(layout_.v_rows[layer] + first * row_bytes,
                       count * row_bytes);
}

Status LlamaStateBuilder::PutValues(size_t layer, uint32_t first,
                                    uint32_t count, ByteSpan rows) const {
  LARDER_RETURN_IF_ERROR(
      CheckRange(static_cast<uint32_t>(shape_->layers.size()), layer, first,
                 count, layout_.tokens));
  const LlamaLayerShape& shape = shape_->layers[layer];
  if (shape.v_row_bytes == 0 ||
      rows.size() != uint64_t{shape.v_row_bytes} * count) {
    return absl::InvalidArgumentError(absl::StrCat(
        "V of ", count, " tokens has ", uint64_t{shape.v_row_bytes} * count,
        " bytes, the span ", rows.size()));
  }
  if (!shape_->v_transposed) {
    const MutableByteSpan to = Values(layer, first, count);
    std::memcpy(to.data(), rows.data(), to.size());
    return absl::OkStatus();
  }
  const uint64_t width = shape.v_row_bytes / shape.v_element_bytes;
  Transpose(shape.v_element_bytes, rows.data(), width,
            blob_.data() + layout_.v_rows[layer] +
                uint64_t{first} * shape.v_element_bytes,
            layout_.tokens, count, width, Identity);
  return absl::OkStatus();
}

Status LlamaStateBuilder::Put(size_t layer, uint32_t first, uint32_t count,
                              ByteSpan segment) const {
  LARDER_RETURN_IF_ERROR(
      CheckRange(static_cast<uint32_t>(shape_->layers.size()), layer, first,
                 count, layout_.tokens));
  LARDER_RETURN_IF_ERROR(
      CheckSegment(shape_->layers[layer], count, segment.size()));
  const MutableByteSpan keys = Keys(layer, first, count);
  std::memcpy(keys.data(), segment.data(), keys.size());
  if (layout_.v_rows.empty()) return absl::OkStatus();
  return PutValues(layer, first, count, segment.subspan(keys.size()));
}

Status LlamaStateBuilder::Shorten(uint32_t tokens) {
  if (tokens == 0 || tokens > layout_.tokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a state of ", layout_.tokens, " tokens shortened to ", tokens));
  }
  if (tokens == layout_.tokens) return absl::OkStatus();
  const LlamaStateLayout old =
      std::exchange(layout_, LlamaStateLayout(*shape_, tokens, layout_.stream));
  // Everything moves towards the beginning, in the order in which it lies, so
  // that nothing is overwritten before it has moved.
  WriteFrame();
  for (size_t i = 0; i < old.k_rows.size(); ++i) {
    WriteKeyHeader(i);
    std::memmove(blob_.data() + layout_.k_rows[i], blob_.data() + old.k_rows[i],
                 uint64_t{shape_->layers[i].k_row_bytes} * tokens);
  }
  for (size_t i = 0; i < old.v_rows.size(); ++i) {
    WriteValueHeader(i);
    const LlamaLayerShape& shape = shape_->layers[i];
    const uint64_t run = shape_->v_transposed
                             ? uint64_t{shape.v_element_bytes} * tokens
                             : uint64_t{shape.v_row_bytes} * tokens;
    const uint64_t old_run = run / tokens * old.tokens;
    const uint64_t runs = uint64_t{shape.v_row_bytes} * tokens / run;
    for (uint64_t j = 0; j < runs; ++j) {
      std::memmove(blob_.data() + layout_.v_rows[i] + j * run,
                   blob_.data() + old.v_rows[i] + j * old_run, run);
    }
  }
  WriteTrailer();
  return absl::OkStatus();
}

}  // namespace larder
