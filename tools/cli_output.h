#ifndef LARDER_TOOLS_CLI_OUTPUT_H_
#define LARDER_TOOLS_CLI_OUTPUT_H_

#include <google/protobuf/message.h>
#include <nlohmann/json.hpp>

#include <string>
#include <vector>

#include "tools/cli.h"

namespace larder {

using Json = nlohmann::ordered_json;

// A message as JSON: field names as in admin.proto, all of them always there,
// numbers as numbers.
Json ToJson(const google::protobuf::Message& message);

// One object, indented, and a newline, on stdout.
void PrintJson(const Json& json);

// Text of somebody else's for a terminal: no control characters.
std::string Clean(const std::string& text);

// Columns that line up; numbers to the right.
class Table {
 public:
  struct Column {
    std::string title;
    bool right = false;
  };
  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}
  void Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  void Print() const;

 private:
  const std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

enum class Color : int { kRed = 31, kGreen = 32, kYellow = 33 };
// Coloured where stdout is a terminal and nobody asked for none.
std::string Paint(const GlobalOptions& options, Color color,
                  const std::string& text);

bool StdoutIsTerminal();

// Writes a file. Whoever reads the path meanwhile sees the old one or the new.
Status WriteWholeFile(const std::string& path, const std::string& bytes);

}  // namespace larder

#endif  // LARDER_TOOLS_CLI_OUTPUT_H_
