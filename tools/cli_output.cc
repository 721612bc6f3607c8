#include "tools/cli_output.h"

#include <google/protobuf/descriptor.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"

namespace larder {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

Json FieldToJson(const Message& message, const Reflection& reflection,
                 const FieldDescriptor* field, int index) {
  const bool repeated = index >= 0;
#define LARDER_FIELD(Type)                                       \
  repeated ? reflection.GetRepeated##Type(message, field, index) \
           : reflection.Get##Type(message, field)
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_UINT32:
      return LARDER_FIELD(UInt32);
    case FieldDescriptor::CPPTYPE_UINT64:
      return LARDER_FIELD(UInt64);
    case FieldDescriptor::CPPTYPE_INT32:
      return LARDER_FIELD(Int32);
    case FieldDescriptor::CPPTYPE_INT64:
      return LARDER_FIELD(Int64);
    case FieldDescriptor::CPPTYPE_BOOL:
      return LARDER_FIELD(Bool);
    case FieldDescriptor::CPPTYPE_STRING:
      return LARDER_FIELD(String);
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return ToJson(LARDER_FIELD(Message));
    default:
      return nullptr;  // admin.proto has no other types
  }
#undef LARDER_FIELD
}

}  // namespace

Json ToJson(const Message& message) {
  Json json = Json::object();
  const Reflection& reflection = *message.GetReflection();
  const auto* descriptor = message.GetDescriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    Json& value = json[field->name()];
    if (!field->is_repeated()) {
      value = FieldToJson(message, reflection, field, -1);
      continue;
    }
    value = Json::array();
    for (int j = 0; j < reflection.FieldSize(message, field); ++j) {
      value.push_back(FieldToJson(message, reflection, field, j));
    }
  }
  return json;
}

void PrintJson(const Json& json) {
  // What is not UTF-8 is replaced, not thrown about.
  std::puts(json.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
}

std::string Clean(const std::string& text) {
  std::string out = text;
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  }
  return out;
}

void Table::Print() const {
  std::vector<size_t> widths;
  for (const Column& column : columns_) widths.push_back(column.title.size());
  for (const auto& row : rows_) {
    for (size_t i = 0; i < row.size() && i < widths.size(); ++i) {
      widths[i] = std::max(widths[i], row[i].size());
    }
  }
  const auto line = [&](size_t columns, const auto& cell) {
    std::string out;
    for (size_t i = 0; i < columns; ++i) {
      const std::string text = cell(i);
      const std::string pad(widths[i] - std::min(widths[i], text.size()), ' ');
      const bool last = i + 1 == columns;
      if (columns_[i].right) {
        absl::StrAppend(&out, pad, text);
      } else {
        absl::StrAppend(&out, text, last ? "" : pad);
      }
      if (!last) out += "  ";
    }
    std::puts(out.c_str());
  };
  line(columns_.size(), [&](size_t i) { return columns_[i].title; });
  for (const auto& row : rows_) {
    line(row.size(), [&](size_t i) { return Clean(row[i]); });
  }
}

bool StdoutIsTerminal() {
  return isatty(STDOUT_FILENO) == 1;
}

std::string Paint(const GlobalOptions& options, Color color,
                  const std::string& text) {
  if (options.no_color || !StdoutIsTerminal()) return text;
  return absl::StrCat("\033[", static_cast<int>(color), "m", text, "\033[0m");
}

Status WriteWholeFile(const std::string& path, const std::string& bytes) {
  const std::string scratch = path + ".new";
  std::ofstream file(scratch, std::ios::binary | std::ios::trunc);
  file << bytes;
  file.close();
  std::error_code error;
  if (file) std::filesystem::rename(scratch, path, error);
  if (!file || error) return absl::UnavailableError("cannot write " + path);
  return absl::OkStatus();
}

}  // namespace larder
