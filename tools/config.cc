#include "tools/config.h"

#include <arpa/inet.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <set>
#include <type_traits>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

#include "codec/record_coder.h"
#include "tools/profile_store.h"

namespace larder {
namespace {

// What the log needs to collect its garbage.
constexpr uint64_t kMinSegmentFiles = 8;

absl::string_view Absl(std::string_view s) {
  return {s.data(), s.size()};
}

Status Bad(const ConfigKey& key, std::string_view text,
           absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(
      Absl(key.name), " = \"", Absl(text.substr(0, 200)), "\": ", what));
}

StatusOr<int64_t> ParseInt(std::string_view text, int base) {
  int64_t value = 0;
  const auto [end, error] =
      std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (error != std::errc() || end != text.data() + text.size()) {
    return absl::InvalidArgumentError("not a whole number");
  }
  return value;
}

bool HasControlCharacter(std::string_view text) {
  return std::any_of(text.begin(), text.end(), [](char c) {
    return static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
  });
}

bool IsTenantName(std::string_view name) {
  return !name.empty() && name.size() <= 64 &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                  (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.';
         });
}

Status CheckBounds(const ConfigKey& key, std::string_view text, int64_t value) {
  if (value >= key.min && value <= key.max) return absl::OkStatus();
  return Bad(
      key, text,
      absl::StrCat("out of bounds; give ", FormatConfigBound(key, key.min),
                   " to ", FormatConfigBound(key, key.max)));
}

Status SetSize(const ConfigKey& key, std::string_view text, uint64_t& out) {
  if (key.unlimited && text == "unlimited") {
    out = UINT64_MAX;
    return absl::OkStatus();
  }
  StatusOr<uint64_t> value = ParseSize(text);
  if (!value.ok()) return Bad(key, text, value.status().message());
  LARDER_RETURN_IF_ERROR(CheckBounds(
      key, text, static_cast<int64_t>(std::min<uint64_t>(*value, INT64_MAX))));
  if (*value > INT64_MAX) return Bad(key, text, "too large");
  out = *value;
  return absl::OkStatus();
}

Status SetTenants(const ConfigKey& key, std::string_view text, TenantMap& out) {
  TenantMap map;
  for (absl::string_view item :
       absl::StrSplit(Absl(text), ',', absl::SkipEmpty())) {
    const std::pair<absl::string_view, absl::string_view> pair =
        absl::StrSplit(item, absl::MaxSplits('=', 1));
    uint32_t uid = 0;
    if (!absl::SimpleAtoi(pair.first, &uid)) {
      return Bad(key, text, "each item is UID=NAME, UID a number");
    }
    if (!IsTenantName({pair.second.data(), pair.second.size()})) {
      return Bad(key, text,
                 "a tenant name has 1 to 64 letters, digits, '-', '_', '.'");
    }
    map[uid] = std::string(pair.second);
  }
  out = std::move(map);
  return absl::OkStatus();
}

// The fields of a rule, by name.
template <class Rule>
struct RuleFields;

template <>
struct RuleFields<CodecRule> {
  static constexpr std::pair<absl::string_view, std::string CodecRule::*>
      kFields[] = {{"tenant", &CodecRule::tenant},
                   {"model", &CodecRule::model},
                   {"space", &CodecRule::space},
                   {"codec", &CodecRule::codec},
                   {"profile", &CodecRule::profile}};
  static constexpr absl::string_view kWanted =
      "each rule has tenant, model, space, codec and profile, or some of them, "
      "such as model=Llama-3*,codec=raw";
};

template <>
struct RuleFields<ClusterTenant> {
  static constexpr std::pair<absl::string_view, std::string ClusterTenant::*>
      kFields[] = {{"tenant", &ClusterTenant::tenant},
                   {"nodes", &ClusterTenant::nodes},
                   {"key_file", &ClusterTenant::key_file}};
  static constexpr absl::string_view kWanted =
      "each has a tenant and, if it likes, nodes and key_file, such as "
      "tenant=alice,nodes=a b,key_file=/etc/larder/alice.key";
};

template <class Rule>
StatusOr<std::vector<Rule>> ParseRules(const ConfigKey& key,
                                       std::string_view text) {
  if (HasControlCharacter(text)) return Bad(key, "", "control character");
  std::vector<Rule> rules;
  for (absl::string_view item :
       absl::StrSplit(Absl(text), ';', absl::SkipEmpty())) {
    Rule& rule = rules.emplace_back();
    for (absl::string_view word :
         absl::StrSplit(item, ',', absl::SkipEmpty())) {
      const std::pair<absl::string_view, absl::string_view> pair =
          absl::StrSplit(word, absl::MaxSplits('=', 1));
      const auto& fields = RuleFields<Rule>::kFields;
      const auto field =
          std::find_if(std::begin(fields), std::end(fields),
                       [&](const auto& f) { return f.first == pair.first; });
      if (field == std::end(fields) || pair.second.empty()) {
        return Bad(key, text, RuleFields<Rule>::kWanted);
      }
      rule.*(field->second) = std::string(pair.second);
    }
  }
  return rules;
}

template <class Rule>
std::string FormatRules(const std::vector<Rule>& rules) {
  return absl::StrJoin(rules, ";", [](std::string* out, const Rule& rule) {
    const char* comma = "";
    for (const auto& [name, field] : RuleFields<Rule>::kFields) {
      if ((rule.*field).empty()) continue;
      absl::StrAppend(out, comma, name, "=", rule.*field);
      comma = ",";
    }
  });
}

Status SetCodecRules(const ConfigKey& key, std::string_view text,
                     CodecRules& out) {
  LARDER_ASSIGN_OR_RETURN(CodecRules rules, ParseRules<CodecRule>(key, text));
  for (const CodecRule& rule : rules) {
    if (rule.codec.empty()) return Bad(key, text, "a rule names no codec");
  }
  out = std::move(rules);
  return absl::OkStatus();
}

Status SetClusterTenants(const ConfigKey& key, std::string_view text,
                         ClusterTenants& out) {
  LARDER_ASSIGN_OR_RETURN(ClusterTenants tenants,
                          ParseRules<ClusterTenant>(key, text));
  std::set<std::string> names;
  for (const ClusterTenant& tenant : tenants) {
    if (tenant.tenant.empty()) return Bad(key, text, "a table names no tenant");
    if (!names.insert(tenant.tenant).second) {
      return Bad(key, text, "a tenant has two tables");
    }
    if (!tenant.key_file.empty() && tenant.key_file[0] != '/') {
      return Bad(key, text, "give the absolute path of a key_file");
    }
  }
  out = std::move(tenants);
  return absl::OkStatus();
}

Status SetString(const ConfigKey& key, std::string_view text,
                 std::string& out) {
  if (HasControlCharacter(text)) return Bad(key, "", "control character");
  if (text.size() > 4096) return Bad(key, text, "longer than 4096 bytes");
  if (key.type == ConfigType::kEnum) {
    const std::vector<absl::string_view> choices =
        absl::StrSplit(Absl(key.choices), '|');
    if (std::find(choices.begin(), choices.end(), Absl(text)) ==
        choices.end()) {
      return Bad(key, text,
                 absl::StrCat("give one of ", absl::StrJoin(choices, ", ")));
    }
  }
  if (key.type == ConfigType::kPath) {
    if (text.empty() && key.min > 0) return Bad(key, text, "must not be empty");
    if (!text.empty() && text[0] != '/') {
      return Bad(key, text, "give an absolute path");
    }
  }
  out = std::string(text);
  return absl::OkStatus();
}

Status SetInt(const ConfigKey& key, std::string_view text, int64_t& out) {
  const bool mode = key.type == ConfigType::kMode;
  StatusOr<int64_t> value = ParseInt(text, mode ? 8 : 10);
  if (!value.ok()) {
    return Bad(key, text,
               mode ? "give octal permissions such as \"0660\""
                    : "give a whole number");
  }
  LARDER_RETURN_IF_ERROR(CheckBounds(key, text, *value));
  out = *value;
  return absl::OkStatus();
}

Status SetDuration(const ConfigKey& key, std::string_view text,
                   absl::Duration& out) {
  StatusOr<absl::Duration> value = ParseDurationText(text);
  if (!value.ok()) return Bad(key, text, value.status().message());
  LARDER_RETURN_IF_ERROR(
      CheckBounds(key, text, absl::ToInt64Nanoseconds(*value)));
  out = *value;
  return absl::OkStatus();
}

Status SetBool(const ConfigKey& key, std::string_view text, bool& out) {
  if (text != "true" && text != "false") {
    return Bad(key, text, "give true or false");
  }
  out = text == "true";
  return absl::OkStatus();
}

Status Impossible(absl::string_view cause, absl::string_view cure) {
  return absl::InvalidArgumentError(absl::StrCat(cause, "; ", cure));
}

Status CheckListen(const std::string& listen) {
  if (listen.empty()) return absl::OkStatus();
  const size_t colon = listen.rfind(':');
  uint32_t port = 0;
  bool ok = colon != std::string::npos && colon > 0 &&
            absl::SimpleAtoi(listen.substr(colon + 1), &port) && port > 0 &&
            port < 65536;
  if (ok) {
    std::string host = listen.substr(0, colon);
    in_addr v4;
    in6_addr v6;
    if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
      ok = inet_pton(AF_INET6, host.substr(1, host.size() - 2).c_str(), &v6) ==
           1;
    } else {
      ok = inet_pton(AF_INET, host.c_str(), &v4) == 1;
    }
  }
  if (ok) return absl::OkStatus();
  return Impossible(
      absl::StrCat("metrics.listen = \"", listen, "\" is no ADDRESS:PORT"),
      "give a literal address such as 127.0.0.1:9464 or [::1]:9464, or \"\" "
      "for none");
}

// An ipc path or a literal address, and whether that is beyond loopback.
Status CheckEndpoint(absl::string_view key, const std::string& endpoint,
                     bool& beyond_loopback) {
  constexpr absl::string_view kIpc = "ipc://", kTcp = "tcp://";
  beyond_loopback = false;
  if (absl::StartsWith(endpoint, kIpc)) {
    if (endpoint.size() > kIpc.size() && endpoint[kIpc.size()] == '/') {
      return absl::OkStatus();
    }
  } else if (absl::StartsWith(endpoint, kTcp)) {
    const std::string listen = endpoint.substr(kTcp.size());
    if (!listen.empty() && CheckListen(listen).ok()) {
      beyond_loopback = !IsLoopback(listen);
      return absl::OkStatus();
    }
  }
  return Impossible(
      absl::StrCat(key, " = \"", endpoint.substr(0, 200), "\" is no endpoint"),
      "give ipc:///absolute/path or tcp://ADDRESS:PORT with a literal address");
}

Status CheckKvEvents(const DaemonConfig& config) {
  const DaemonConfig::KvEvents& events = config.kv_events;
  if (events.publish.empty()) {
    if (events.replay.empty()) return absl::OkStatus();
    return Impossible("kv_events.replay without kv_events.publish",
                      "give both, or neither");
  }
  if (events.publish == events.replay) {
    return Impossible("kv_events.publish and kv_events.replay are the same",
                      "give each its own");
  }
  const std::vector<absl::string_view> tenants =
      absl::StrSplit(events.tenants, ',', absl::SkipEmpty());
  const bool single = config.server.tenant_mode == "single";
  if (tenants.empty() && !single) {
    return Impossible(
        "kv_events.publish without kv_events.tenants: whose chunks may be told "
        "of is not known",
        "name tenants, or set server.tenant_mode = \"single\"");
  }
  for (const absl::string_view tenant : tenants) {
    if (!IsTenantName({tenant.data(), tenant.size()})) {
      return Impossible(
          absl::StrCat("kv_events.tenants: \"", tenant, "\" is no tenant"),
          "separate names or numbers by commas alone");
    }
  }
  for (const auto& [key, endpoint] :
       {std::pair<absl::string_view, const std::string&>("kv_events.publish",
                                                         events.publish),
        {"kv_events.replay", events.replay}}) {
    if (endpoint.empty()) continue;
    bool beyond_loopback = false;
    LARDER_RETURN_IF_ERROR(CheckEndpoint(key, endpoint, beyond_loopback));
    if (tenants.size() > 1 && !absl::StrContains(endpoint, "{tenant}")) {
      return Impossible(
          absl::StrCat(key,
                       ": several tenants at one endpoint would hear of "
                       "each other"),
          "put {tenant} into an ipc path");
    }
    if (!absl::StartsWith(endpoint, "tcp://") || !events.keys_file.empty()) {
      continue;
    }
    if (beyond_loopback || !single) {
      return Impossible(
          absl::StrCat(key, " = \"", endpoint,
                       "\" would be open to whoever reaches it"),
          "give kv_events.keys_file, or use ipc; tcp on loopback is enough if "
          "server.tenant_mode is \"single\"");
    }
  }
  constexpr int64_t kLeastEvents = 4096;
  if (config.engine.event_capacity < kLeastEvents) {
    return Impossible(
        absl::StrCat("kv_events.publish with engine.event_capacity = ",
                     config.engine.event_capacity,
                     " would lose events all the time"),
        absl::StrCat("give at least ", kLeastEvents));
  }
  return absl::OkStatus();
}

Status CheckSockets(const DaemonConfig& config) {
  constexpr size_t kMaxSocketPath = sizeof(sockaddr_un{}.sun_path) - 1;
  for (const std::string_view name : {"server.socket", "admin.socket"}) {
    const std::string& path =
        name[0] == 's' ? config.server.socket : config.admin.socket;
    if (path.size() > kMaxSocketPath) {
      return Impossible(
          absl::StrCat(Absl(name), " has ", path.size(),
                       " bytes, the kernel takes ", kMaxSocketPath),
          "choose a shorter path");
    }
  }
  if (config.server.socket == config.admin.socket) {
    return Impossible("server.socket and admin.socket are the same path",
                      "give each its own");
  }
  return absl::OkStatus();
}

Status CheckDram(const DaemonConfig& config) {
  const DaemonConfig::Dram& dram = config.dram;
  if (dram.slab % 2_MiB != 0) {
    return Impossible(
        absl::StrCat("dram.slab = ", FormatSizeExact(dram.slab),
                     " is not a multiple of 2MiB"),
        absl::StrCat("give ", FormatSizeExact(RoundUp(dram.slab, 2_MiB))));
  }
  if (dram.capacity < dram.slab) {
    return Impossible(
        absl::StrCat(
            "dram.capacity = ", FormatSizeExact(dram.capacity),
            " is less than one dram.slab = ", FormatSizeExact(dram.slab)),
        "raise dram.capacity or lower dram.slab");
  }
  return absl::OkStatus();
}

Status CheckHbm(const DaemonConfig& config) {
  if (config.hbm.capacity != 0 && config.hbm.capacity < config.dram.slab) {
    return Impossible(
        absl::StrCat(
            "hbm.capacity = ", FormatSizeExact(config.hbm.capacity),
            " is less than one dram.slab = ", FormatSizeExact(config.dram.slab),
            ", the grain of GPU memory too"),
        "raise hbm.capacity, or lower dram.slab");
  }
  return absl::OkStatus();
}

Status CheckNvme(const DaemonConfig& config) {
  const DaemonConfig::Nvme& nvme = config.nvme;
  if (nvme.segment_file % kPageBytes != 0) {
    return Impossible("nvme.segment_file is not a multiple of 4KiB",
                      "give a power of two such as 256MiB");
  }
  if (config.engine.promote_io_bytes % kPageBytes != 0) {
    return Impossible("engine.promote_io_bytes is not a multiple of 4KiB",
                      "give a power of two such as 1MiB");
  }
  LARDER_RETURN_IF_ERROR(
      Annotate(ParseRates(nvme.read_limit).status(), "nvme.read_limit"));
  if (nvme.path.empty()) return absl::OkStatus();
  if (nvme.capacity / kMinSegmentFiles < nvme.segment_file) {
    const uint64_t largest = std::bit_floor(nvme.capacity / kMinSegmentFiles);
    return Impossible(
        absl::StrCat("nvme.capacity = ", FormatSizeExact(nvme.capacity),
                     " has no room for 8 files of nvme.segment_file = ",
                     FormatSizeExact(nvme.segment_file)),
        absl::StrCat("raise nvme.capacity to ",
                     FormatSizeExact(kMinSegmentFiles * nvme.segment_file),
                     largest < 4_MiB
                         ? ""
                         : absl::StrCat(" or lower nvme.segment_file to ",
                                        FormatSizeExact(largest))));
  }
  return absl::OkStatus();
}

Status CheckCodecs(const DaemonConfig& config) {
  const auto check = [](absl::string_view where, const std::string& codec,
                        const std::string& profile) -> Status {
    const StatusOr<CodingSpec> spec = ParseCoding(codec);
    if (!spec.ok()) return Annotate(spec.status(), where);
    if (profile.empty()) return Annotate(CheckWithoutProfile(*spec), where);
    if (!FindCodec(spec->codec)->uses_profiles()) {
      return Impossible(
          absl::StrCat(where, ": codec ", codec, " uses no profile"),
          "give a codec that does, such as kvc1:2, or no profile");
    }
    if (profile[0] == '/' || IsProfileName(profile)) return absl::OkStatus();
    return Impossible(
        absl::StrCat(where, ": \"", profile.substr(0, 100),
                     "\" names no profile"),
        "give 8 to 64 digits of its id (`larder profile list`), or the "
        "absolute path of its file");
  };
  LARDER_RETURN_IF_ERROR(
      check("codec.nvme", config.codec.nvme, config.codec.profile));
  for (size_t i = 0; i < config.codec.rules.size(); ++i) {
    const CodecRule& rule = config.codec.rules[i];
    const std::string where = absl::StrCat("codec.rules, rule ", i + 1);
    LARDER_RETURN_IF_ERROR(check(where, rule.codec, rule.profile));
    const bool hex =
        std::all_of(rule.space.begin(), rule.space.end(), [](char c) {
          return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
        });
    if (!rule.space.empty() &&
        (!hex || rule.space.size() < 8 || rule.space.size() > 64)) {
      return Impossible(
          absl::StrCat(where, ": space = \"", rule.space, "\" is no space id"),
          "give its first 8 hexadecimal digits or more (`larder spaces`)");
    }
  }
  return absl::OkStatus();
}

}  // namespace

bool IsLoopback(std::string_view address) {
  return absl::StartsWith(Absl(address), "127.") ||
         absl::StartsWith(Absl(address), "[::1]:");
}

std::string FormatConfigBound(const ConfigKey& key, int64_t bound) {
  switch (key.type) {
    case ConfigType::kSize:
      return FormatSizeExact(static_cast<uint64_t>(bound));
    case ConfigType::kDuration:
      return absl::FormatDuration(absl::Nanoseconds(bound));
    case ConfigType::kMode: {
      char text[16];
      std::snprintf(text, sizeof text, "%04o", static_cast<unsigned>(bound));
      return text;
    }
    default:
      return absl::StrCat(bound);
  }
}

std::string FormatSizeExact(uint64_t bytes) {
  static constexpr const char* kUnits[] = {"", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  while (bytes != 0 && bytes % 1024 == 0 && unit < 4) {
    bytes /= 1024;
    ++unit;
  }
  return absl::StrCat(bytes, kUnits[unit]);
}

StatusOr<uint64_t> ParseSize(std::string_view text) {
  uint64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value, 10);
  if (error == std::errc::result_out_of_range) {
    return absl::InvalidArgumentError("too large");
  }
  if (error != std::errc()) {
    return absl::InvalidArgumentError("give a size such as 512MiB or 4GiB");
  }
  const std::string_view suffix(rest, static_cast<size_t>(end - rest));
  int shift = -1;
  if (suffix.empty() || suffix == "B") shift = 0;
  if (suffix == "KiB") shift = 10;
  if (suffix == "MiB") shift = 20;
  if (suffix == "GiB") shift = 30;
  if (suffix == "TiB") shift = 40;
  if (shift < 0) {
    return absl::InvalidArgumentError(
        "give whole numbers of B, KiB, MiB, GiB or TiB");
  }
  if (shift > 0 && value > (UINT64_MAX >> shift)) {
    return absl::InvalidArgumentError("too large");
  }
  return value << shift;
}

StatusOr<absl::Duration> ParseDurationText(std::string_view text) {
  absl::Duration value;
  if (!absl::ParseDuration(Absl(text), &value)) {
    return absl::InvalidArgumentError("give a time such as 30s, 5m or 100ms");
  }
  if (value < absl::ZeroDuration() || value > absl::Hours(24 * 365)) {
    return absl::InvalidArgumentError("out of bounds");
  }
  return absl::Nanoseconds(absl::ToInt64Nanoseconds(value));
}

StatusOr<RateSchedule> ParseRates(std::string_view text) {
  constexpr uint64_t kLeastRate = 64_KiB;
  constexpr absl::Duration kLeastTime = absl::Milliseconds(10);
  constexpr size_t kStepsMax = 1024;
  RateSchedule schedule;
  if (text.empty()) return schedule;
  const std::vector<absl::string_view> items = absl::StrSplit(Absl(text), ',');
  if (items.size() > kStepsMax) {
    return absl::InvalidArgumentError("at most 1024 steps");
  }
  for (const absl::string_view item : items) {
    const std::vector<absl::string_view> words =
        absl::StrSplit(item, ' ', absl::SkipEmpty());
    const bool timed = words.size() == 2;
    if (!timed && (words.size() != 1 || items.size() != 1)) {
      return absl::InvalidArgumentError(
          "give bytes per second such as 200MiB, or such rates and how long "
          "each lasts: 200MiB 2s, 5MiB 500ms");
    }
    RateSchedule::Step step;
    LARDER_ASSIGN_OR_RETURN(step.bytes_per_second,
                            ParseSize({words[0].data(), words[0].size()}));
    step.time = absl::Seconds(1);
    if (timed) {
      LARDER_ASSIGN_OR_RETURN(
          step.time, ParseDurationText({words[1].data(), words[1].size()}));
    }
    if (step.bytes_per_second != 0 && step.bytes_per_second < kLeastRate) {
      return absl::InvalidArgumentError("rates are 0 or at least 64KiB");
    }
    if (step.time < kLeastTime) {
      return absl::InvalidArgumentError("times are at least 10ms");
    }
    schedule.steps.push_back(step);
  }
  if (!schedule.Moves()) {
    return absl::InvalidArgumentError("some rate must not be 0");
  }
  return schedule;
}

Status SetConfigKey(DaemonConfig& config, std::string_view name,
                    std::string_view text) {
  const ConfigKey* key = FindConfigKey(name);
  if (key == nullptr) {
    const std::string near = SuggestConfigKey(name);
    return absl::InvalidArgumentError(absl::StrCat(
        "unknown key ", Absl(name.substr(0, 100)),
        near.empty() ? "" : absl::StrCat(" (did you mean ", near, "?)")));
  }
  return std::visit(
      [&](auto* field) -> Status {
        using T = std::remove_pointer_t<decltype(field)>;
        if constexpr (std::is_same_v<T, bool>) {
          return SetBool(*key, text, *field);
        } else if constexpr (std::is_same_v<T, int64_t>) {
          return SetInt(*key, text, *field);
        } else if constexpr (std::is_same_v<T, uint64_t>) {
          return SetSize(*key, text, *field);
        } else if constexpr (std::is_same_v<T, absl::Duration>) {
          return SetDuration(*key, text, *field);
        } else if constexpr (std::is_same_v<T, TenantMap>) {
          return SetTenants(*key, text, *field);
        } else if constexpr (std::is_same_v<T, CodecRules>) {
          return SetCodecRules(*key, text, *field);
        } else if constexpr (std::is_same_v<T, ClusterTenants>) {
          return SetClusterTenants(*key, text, *field);
        } else {
          return SetString(*key, text, *field);
        }
      },
      key->field(config));
}

std::string FormatConfigKey(const DaemonConfig& config, const ConfigKey& key) {
  // The accessor needs a mutable object; nothing is written through it.
  DaemonConfig copy = config;
  return std::visit(
      [&](auto* field) -> std::string {
        using T = std::remove_pointer_t<decltype(field)>;
        if constexpr (std::is_same_v<T, bool>) {
          return *field ? "true" : "false";
        } else if constexpr (std::is_same_v<T, int64_t>) {
          return FormatConfigBound(key, *field);
        } else if constexpr (std::is_same_v<T, uint64_t>) {
          return key.unlimited && *field == UINT64_MAX
                     ? "unlimited"
                     : FormatSizeExact(*field);
        } else if constexpr (std::is_same_v<T, absl::Duration>) {
          return absl::FormatDuration(*field);
        } else if constexpr (std::is_same_v<T, TenantMap>) {
          return absl::StrJoin(*field, ",", absl::PairFormatter("="));
        } else if constexpr (std::is_same_v<T, CodecRules> ||
                             std::is_same_v<T, ClusterTenants>) {
          return FormatRules(*field);
        } else {
          return *field;
        }
      },
      key.field(copy));
}

Status CheckInsecure(const DaemonConfig::Cluster& cluster,
                     std::string_view listen) {
  if (cluster.insecure || IsLoopback(listen)) return absl::OkStatus();
  return Impossible(
      absl::StrCat("cluster.transport = \"", cluster.transport,
                   "\" without certificates would let everybody who reaches ",
                   Absl(listen), " read all chunks"),
      "give cluster.ca, cluster.certificate and cluster.key; or, on a network "
      "on which nobody else is, say cluster.insecure = true");
}

StatusOr<std::map<std::string, std::string>> RemoteTenants(
    const DaemonConfig& config) {
  std::map<std::string, std::string> tenants;
  for (const absl::string_view item : absl::StrSplit(
           config.remote_clients.tenants, ',', absl::SkipWhitespace())) {
    const std::pair<absl::string_view, absl::string_view> pair =
        absl::StrSplit(item, absl::MaxSplits('=', 1));
    const std::string name(absl::StripAsciiWhitespace(pair.first));
    const std::string tenant(absl::StripAsciiWhitespace(pair.second));
    if (name.empty() || !IsTenantName(tenant) ||
        !tenants.emplace(name, tenant).second) {
      return Impossible(
          absl::StrCat("remote_clients.tenants: \"", item.substr(0, 200),
                       "\" is no NAME=TENANT, or a name twice"),
          "a tenant has 1 to 64 letters, digits, '-', '_', '.'");
    }
  }
  return tenants;
}

Status CheckCluster(const DaemonConfig& config) {
  const DaemonConfig::Cluster& cluster = config.cluster;
  if (cluster.etcd.empty()) return absl::OkStatus();
  const int files =
      !cluster.ca.empty() + !cluster.certificate.empty() + !cluster.key.empty();
  if (files != 3 && (cluster.transport == "tls" || files != 0)) {
    return Impossible(
        "nodes prove themselves with cluster.ca, cluster.certificate and "
        "cluster.key",
        "give all three files; on a network on which nobody else is, "
        "cluster.transport = \"tcp\" or \"ucx\" goes without them");
  }
  if (files == 3 && cluster.insecure) {
    return Impossible("cluster.insecure is for nodes without certificates",
                      "leave it out, or leave out cluster.ca, "
                      "cluster.certificate and cluster.key");
  }
  if (files == 0 && !cluster.listen.empty()) {
    LARDER_RETURN_IF_ERROR(CheckInsecure(cluster, cluster.listen));
  }
  if (!cluster.data_listen.empty() &&
      (cluster.transport == "tls" || files != 3)) {
    return Impossible(
        "cluster.data_listen is for cluster.transport = \"tcp\" or \"ucx\" "
        "with certificates",
        "leave it out; without certificates KV goes by cluster.listen");
  }
  if (config.server.tenant_mode == "listed" && cluster.secret_file.empty()) {
    return Impossible(
        "tenants share a cluster without cluster.secret_file, which keeps "
        "chunks of one from being given the names of another's",
        "write one (openssl rand -hex 32 > cluster.secret; chmod 600 "
        "cluster.secret) and give it to all nodes");
  }
  for (const ClusterTenant& tenant : cluster.tenants) {
    if (!tenant.nodes.empty() && files == 0) {
      return Impossible(
          absl::StrCat("cluster.tenants: nodes of tenant ", tenant.tenant,
                       " without certificates: nobody proves which node it is"),
          "give cluster.ca, cluster.certificate and cluster.key");
    }
  }
  if (cluster.etcd_user.empty() != cluster.etcd_password_file.empty()) {
    return Impossible(
        "cluster.etcd_user and cluster.etcd_password_file go together",
        "give both or neither");
  }
  if (config.server.tenant_mode == "per-uid") {
    return Impossible(
        "in a cluster the same tenant must be the same on all nodes, which "
        "uids need not be: server.tenant_mode = \"per-uid\"",
        "use listed with server.tokens_file or server.tenants, or single");
  }
  return absl::OkStatus();
}

Status CheckRemoteClients(const DaemonConfig& config) {
  const DaemonConfig::RemoteClients& remote = config.remote_clients;
  if (remote.listen.empty()) return absl::OkStatus();
  if (!CheckListen(remote.listen).ok()) {
    return Impossible(absl::StrCat("remote_clients.listen = \"", remote.listen,
                                   "\" is no ADDRESS:PORT"),
                      "give a literal address such as 10.0.0.7:9401");
  }
  LARDER_RETURN_IF_ERROR(RemoteTenants(config).status());
  const bool loopback = IsLoopback(remote.listen);
  if (remote.transport == "tls" &&
      (remote.ca.empty() || remote.certificate.empty() || remote.key.empty())) {
    return Impossible(
        "remote_clients.transport = \"tls\" needs remote_clients.ca, "
        "remote_clients.certificate and remote_clients.key",
        "give the three files");
  }
  if (remote.transport == "ucx" && !remote.tenants.empty()) {
    return Impossible("remote_clients.tenants: ucx proves no names",
                      "use tls, or tokens");
  }
  if (remote.transport == "ucx" && !loopback && !remote.insecure) {
    return Impossible(
        "remote_clients.transport = \"ucx\" beyond loopback: it neither "
        "encrypts nor proves who is there",
        "use tls, or set remote_clients.insecure on a network on which nobody "
        "else is");
  }
  if (remote.tenants.empty() && config.server.tenant_mode != "single" &&
      config.server.tokens_file.empty()) {
    return Impossible(
        "remote_clients.listen without a word on whose chunks they see",
        "give remote_clients.tenants, server.tokens_file, or "
        "server.tenant_mode = \"single\"");
  }
  return absl::OkStatus();
}

Status ValidateConfig(const DaemonConfig& config) {
  LARDER_RETURN_IF_ERROR(CheckSockets(config));
  LARDER_RETURN_IF_ERROR(CheckListen(config.metrics.listen));
  LARDER_RETURN_IF_ERROR(CheckKvEvents(config));
  LARDER_RETURN_IF_ERROR(CheckDram(config));
  LARDER_RETURN_IF_ERROR(CheckHbm(config));
  LARDER_RETURN_IF_ERROR(CheckNvme(config));
  LARDER_RETURN_IF_ERROR(CheckCodecs(config));
  LARDER_RETURN_IF_ERROR(CheckCluster(config));
  LARDER_RETURN_IF_ERROR(CheckRemoteClients(config));
  if (config.engine.hold_ttl > config.engine.hold_ttl_max) {
    return Impossible("engine.hold_ttl is longer than engine.hold_ttl_max",
                      "raise the maximum or lower the default");
  }
  if (config.server.tenant_mode == "listed" && config.server.tenants.empty() &&
      config.server.tokens_file.empty()) {
    return Impossible(
        "server.tenant_mode = \"listed\" with neither server.tenants nor "
        "server.tokens_file would refuse every client",
        "list tenants or use per-uid");
  }
  return absl::OkStatus();
}

StatusOr<DaemonConfig> LoadConfig(
    const std::string& path,
    std::span<const std::pair<std::string, std::string>> flags) {
  DaemonConfig config;
  if (!path.empty()) {
    std::ifstream in(path, std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(in)), {});
    if (!in) {
      return absl::NotFoundError(
          absl::StrCat("cannot read the configuration file ", path,
                       "; check the path and its permissions"));
    }
    LARDER_ASSIGN_OR_RETURN(config, ParseConfig(text, path));
  }
  for (const auto& [name, text] : flags) {
    LARDER_RETURN_IF_ERROR(
        Annotate(SetConfigKey(config, name, text), "command line"));
  }
  LARDER_RETURN_IF_ERROR(ValidateConfig(config));
  return config;
}

std::vector<const ConfigKey*> ChangedKeys(const DaemonConfig& a,
                                          const DaemonConfig& b) {
  std::vector<const ConfigKey*> changed;
  for (const ConfigKey& key : ConfigSchema()) {
    if (FormatConfigKey(a, key) != FormatConfigKey(b, key)) {
      changed.push_back(&key);
    }
  }
  return changed;
}

}  // namespace larder
