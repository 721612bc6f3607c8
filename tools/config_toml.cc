// The TOML side of the configuration: reading, printing, the reference table.
// The only file that sees toml++.

#include <algorithm>
#include <cstdio>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"

#include "tools/config.h"

#define TOML_EXCEPTIONS 0
#define TOML_HEADER_ONLY 1
#define TOML_UNDEF_MACROS 1
// What toml++ 3.3 asserts (and lets the optimizer assume) of a key's first
// character is not so for every input; it answers those with an error all the
// same.
#define TOML_ASSERT(expr) static_assert(true)
#pragma push_macro("NDEBUG")
#undef NDEBUG
#include <toml++/toml.h>
#pragma pop_macro("NDEBUG")

namespace larder {
namespace {

constexpr size_t kMaxConfigBytes = 1_MiB;
constexpr int kMaxDepth = 4;

absl::string_view Absl(std::string_view s) {
  return {s.data(), s.size()};
}

std::string Where(std::string_view source, const toml::source_region& region) {
  return absl::StrCat(Absl(source), ":", region.begin.line);
}

Status Wrong(std::string_view source, const toml::node& node,
             absl::string_view what) {
  return absl::InvalidArgumentError(
      absl::StrCat(Where(source, node.source()), ": ", what));
}

// "1000=alice,1001=bob" of a table.
StatusOr<std::string> TenantsText(const toml::table& table,
                                  std::string_view source) {
  std::string text;
  for (const auto& [uid, node] : table) {
    const auto* name = node.as_string();
    if (name == nullptr) {
      return Wrong(source, node, "server.tenants: give UID = \"tenant name\"");
    }
    absl::StrAppend(&text, text.empty() ? "" : ",", Absl(uid.str()), "=",
                    Absl(name->get()));
  }
  return text;
}

// "model=...,codec=...;..." of an array of tables.
StatusOr<std::string> RulesText(const toml::array& rules, const ConfigKey& key,
                                std::string_view source) {
  const auto word_of =
      [](const toml::node& node) -> std::optional<std::string> {
    const auto* word = node.as_string();
    if (word == nullptr || word->get().empty() ||
        word->get().find_first_of(",;") != std::string::npos) {
      return std::nullopt;
    }
    return std::string(word->get());
  };
  std::string text;
  for (const toml::node& node : rules) {
    const toml::table* rule = node.as_table();
    if (rule == nullptr) {
      return Wrong(source, node, absl::StrCat(Absl(key.name), ": give tables"));
    }
    absl::StrAppend(&text, text.empty() ? "" : ";");
    bool first = true;
    for (const auto& [name, value] : *rule) {
      std::vector<std::optional<std::string>> words;
      if (const toml::array* several = value.as_array()) {
        for (const toml::node& one : *several) words.push_back(word_of(one));
      } else {
        words.push_back(word_of(value));
      }
      absl::StrAppend(&text, first ? "" : ",", Absl(name.str()), "=");
      for (size_t i = 0; i < words.size(); ++i) {
        if (!words[i].has_value()) {
          return Wrong(
              source, value,
              absl::StrCat(Absl(key.name), ": give texts without ',' and ';'"));
        }
        absl::StrAppend(&text, i == 0 ? "" : " ", *words[i]);
      }
      first = false;
    }
  }
  return text;
}

// A value as the text that a flag would have; `key` decides what may stand for
// what. TOML's own octal integers serve for modes.
StatusOr<std::string> ValueText(const toml::node& node, const ConfigKey& key,
                                std::string_view source) {
  if (const auto* value = node.as_string()) return std::string(value->get());
  if (const auto* value = node.as_boolean();
      value != nullptr && key.type == ConfigType::kBool) {
    return std::string(value->get() ? "true" : "false");
  }
  if (const auto* value = node.as_integer(); value != nullptr) {
    switch (key.type) {
      case ConfigType::kInt:
      case ConfigType::kSize:
        return absl::StrCat(value->get());
      case ConfigType::kMode: {
        if (value->get() < 0 || value->get() > 07777) break;
        char text[16];
        std::snprintf(text, sizeof text, "%04o",
                      static_cast<unsigned>(value->get()));
        return std::string(text);
      }
      default:
        break;
    }
  }
  return Wrong(source, node,
               absl::StrCat(Absl(key.name), ": wrong type of value; ",
                            key.type == ConfigType::kBool ? "give true or false"
                            : key.type == ConfigType::kInt ? "give an integer"
                                                           : "give a string"));
}

bool IsSection(std::string_view name) {
  const std::string prefix = absl::StrCat(Absl(name), ".");
  for (const ConfigKey& key : ConfigSchema()) {
    if (key.name.substr(0, prefix.size()) == prefix) return true;
  }
  return false;
}

Status ReadTable(const toml::table& table, const std::string& prefix,
                 std::string_view source, int depth, DaemonConfig& config) {
  for (const auto& [toml_key, node] : table) {
    const std::string name =
        prefix.empty() ? std::string(toml_key.str())
                       : absl::StrCat(prefix, ".", Absl(toml_key.str()));
    const ConfigKey* key = FindConfigKey(name);
    const toml::table* inner = node.as_table();
    if (key == nullptr && inner != nullptr && depth < kMaxDepth &&
        IsSection(name)) {
      LARDER_RETURN_IF_ERROR(
          ReadTable(*inner, name, source, depth + 1, config));
      continue;
    }
    std::string text;
    if (key != nullptr && key->type == ConfigType::kTenants &&
        inner != nullptr) {
      LARDER_ASSIGN_OR_RETURN(text, TenantsText(*inner, source));
    } else if (key != nullptr &&
               (key->type == ConfigType::kCodecRules ||
                key->type == ConfigType::kClusterTenants) &&
               node.as_array() != nullptr) {
      LARDER_ASSIGN_OR_RETURN(text, RulesText(*node.as_array(), *key, source));
    } else if (key != nullptr) {
      LARDER_ASSIGN_OR_RETURN(text, ValueText(node, *key, source));
    }
    // An unknown key is refused there, with a suggestion.
    const Status status = SetConfigKey(config, name, text);
    if (!status.ok()) {
      return Annotate(status, Where(source, key == nullptr ? toml_key.source()
                                                           : node.source()));
    }
  }
  return absl::OkStatus();
}

std::string Quoted(std::string_view text) {
  return absl::StrCat(
      "\"", absl::StrReplaceAll(Absl(text), {{"\\", "\\\\"}, {"\"", "\\\""}}),
      "\"");
}

std::string TomlValue(const DaemonConfig& config, const ConfigKey& key) {
  const std::string text = FormatConfigKey(config, key);
  if (key.type == ConfigType::kBool || key.type == ConfigType::kInt) {
    return text;
  }
  if (key.type == ConfigType::kTenants) {
    std::string out = "{ ";
    for (absl::string_view item :
         absl::StrSplit(text, ',', absl::SkipEmpty())) {
      const std::pair<absl::string_view, absl::string_view> pair =
          absl::StrSplit(item, absl::MaxSplits('=', 1));
      absl::StrAppend(&out, out.size() > 2 ? ", " : "", pair.first, " = \"",
                      pair.second, "\"");
    }
    return out + (out.size() > 2 ? " }" : "}");
  }
  if (key.type == ConfigType::kCodecRules ||
      key.type == ConfigType::kClusterTenants) {
    std::vector<std::string> rules;
    for (absl::string_view rule :
         absl::StrSplit(text, ';', absl::SkipEmpty())) {
      std::vector<std::string> words;
      for (absl::string_view word : absl::StrSplit(rule, ',')) {
        const std::pair<absl::string_view, absl::string_view> pair =
            absl::StrSplit(word, absl::MaxSplits('=', 1));
        words.push_back(
            absl::StrCat(pair.first, " = ",
                         Quoted({pair.second.data(), pair.second.size()})));
      }
      rules.push_back(absl::StrCat("{ ", absl::StrJoin(words, ", "), " }"));
    }
    return absl::StrCat("[", absl::StrJoin(rules, ", "), "]");
  }
  return Quoted(text);
}

std::string Bounds(const ConfigKey& key) {
  const std::string min = FormatConfigBound(key, key.min);
  switch (key.type) {
    case ConfigType::kBool:
      return "true, false";
    case ConfigType::kEnum:
      return absl::StrReplaceAll(Absl(key.choices), {{"|", ", "}});
    case ConfigType::kInt:
    case ConfigType::kDuration:
      return absl::StrCat(min, " .. ", FormatConfigBound(key, key.max));
    case ConfigType::kSize:
      return absl::StrCat(
          min, " .. ",
          key.unlimited ? "unlimited" : FormatConfigBound(key, key.max));
    case ConfigType::kMode:
      return "0000 .. 0777";
    case ConfigType::kPath:
      return key.min > 0 ? "absolute path" : "absolute path, \"\"";
    case ConfigType::kTenants:
      return "UID = \"name\"";
    case ConfigType::kCodecRules:
      return "{ tenant, model, space, codec, profile }";
    case ConfigType::kClusterTenants:
      return "{ tenant, nodes, key_file }";
    case ConfigType::kString:
      return "";
  }
  return "";
}

}  // namespace

StatusOr<DaemonConfig> ParseConfig(std::string_view text,
                                   std::string_view source) {
  if (text.size() > kMaxConfigBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(Absl(source), ": longer than 1 MiB"));
  }
  toml::parse_result result = toml::parse(text);
  if (!result) {
    const toml::parse_error& error = result.error();
    return absl::InvalidArgumentError(absl::StrCat(
        Where(source, error.source()), ": ", Absl(error.description())));
  }
  DaemonConfig config;
  LARDER_RETURN_IF_ERROR(ReadTable(result.table(), "", source, 0, config));
  return config;
}

std::string PrintConfig(const DaemonConfig& config) {
  std::string out;
  std::string section;
  for (const ConfigKey& key : ConfigSchema()) {
    const std::pair<absl::string_view, absl::string_view> name =
        absl::StrSplit(Absl(key.name), absl::MaxSplits('.', 1));
    if (name.first != section) {
      section = std::string(name.first);
      absl::StrAppend(&out, out.empty() ? "" : "\n", "[", section, "]\n");
    }
    absl::StrAppend(&out, "# ", Absl(key.description), "\n");
    const std::string bounds = Bounds(key);
    absl::StrAppend(
        &out, "# (", bounds, bounds.empty() ? "" : "; ", "default ",
        TomlValue(DaemonConfig(), key),
        key.restart ? "; change needs a restart)\n" : "; SIGHUP applies it)\n");
    absl::StrAppend(&out, name.second, " = ", TomlValue(config, key), "\n");
  }
  return out;
}

std::string ConfigTable() {
  std::string out =
      "| key | default | values | meaning | change |\n"
      "| --- | --- | --- | --- | --- |\n";
  for (const ConfigKey& key : ConfigSchema()) {
    absl::StrAppend(&out, "| `", Absl(key.name), "` | `",
                    TomlValue(DaemonConfig(), key), "` | ", Bounds(key), " | ",
                    Absl(key.description), " | ",
                    key.restart ? "restart" : "SIGHUP", " |\n");
  }
  return out;
}

}  // namespace larder
