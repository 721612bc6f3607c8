// The larder command against a real larderd: shapes of its output, exit codes,
// what it says when something is wrong.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <nlohmann/json.hpp>
#include <sys/socket.h>

#include <set>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "client/larder.h"
#include "tests/client/kv_samples.h"
#include "tests/testing/free_port.h"
#include "tests/tools/daemon_under_test.h"
#include "tests/tools/process.h"
#include "tools/metrics.h"

namespace larder {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using Json = nlohmann::ordered_json;

struct Answer {
  int code = 0;
  std::string out;
  std::string err;
  Json json() const { return Json::parse(out, nullptr, false); }
};

std::vector<std::string> Keys(const Json& json) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : json.items()) keys.push_back(key);
  return keys;
}

class CliTest : public ::testing::Test {
 protected:
  CliTest() : daemon_(folder_) {}

  void StartDaemon() {
    daemon_.WithNvme();
    daemon_.Start();
    ASSERT_TRUE(daemon_.WaitReady()) << daemon_.process().err();
  }

  Answer Larder(std::vector<std::string> arguments,
                std::vector<std::string> environment = {}) {
    environment.push_back("LARDER_ADMIN_SOCKET=" + daemon_.admin());
    Process process(folder_, "larder", std::move(arguments),
                    std::move(environment));
    Answer answer;
    answer.code = process.Wait();
    answer.out = process.out();
    answer.err = process.err();
    return answer;
  }

  // Saves a chain of three chunks; returns their ids in hex.
  std::vector<std::string> SaveChain() {
    ClientOptions options;
    options.socket_path = daemon_.socket();
    options.default_deadline = std::chrono::milliseconds(60000);
    auto client = Client::Open(options);
    EXPECT_TRUE(client.ok()) << client.status().ToString();
    auto space = client->OpenSpace(samples::SmallSpaceOptions());
    EXPECT_TRUE(space.ok());
    auto prompt = space->Ids(samples::PromptOf(3 * samples::kChunk));
    std::vector<std::string> ids;
    for (uint32_t i = 0; i < 3; ++i) {
      CommitOptions commit;
      if (i > 0) commit.parent = prompt->ids[i - 1];
      const Outcome saved = samples::SaveChunk(*space, prompt->ids[i], i, {},
                                               commit, LARDER_DURABLE);
      EXPECT_TRUE(saved.ok()) << saved.ToString();
      ids.push_back(ToHex(prompt->ids[i].bytes, sizeof prompt->ids[i].bytes));
    }
    return ids;
  }

  TestFolder folder_;
  DaemonUnderTest daemon_;
};

const std::set<std::string> kCommands = {
    "status", "config", "metrics", "version",  "ls",         "stat",
    "pin",    "unpin",  "evict",   "why-miss", "spaces",     "advance-epoch",
    "verify", "events", "doctor",  "bench",    "completion", "tier"};

TEST_F(CliTest, EveryCommandHasHelpAndExamples) {
  const Answer top = Larder({"--help"});
  EXPECT_EQ(top.code, 0);
  EXPECT_THAT(top.out, HasSubstr("Exit codes: 0 ok, 1 error, 2 usage"));
  for (const std::string& command : kCommands) {
    EXPECT_THAT(top.out, HasSubstr("  " + command + " "));
    const Answer help = Larder({command, "--help"});
    EXPECT_EQ(help.code, 0) << command;
    if (command != "bench") {
      EXPECT_THAT(help.out, HasSubstr("larder " + command)) << command;
      EXPECT_THAT(help.out, HasSubstr("Examples:")) << command;
    }
  }
}

TEST_F(CliTest, WrongUseIsTwo) {
  EXPECT_EQ(Larder({}).code, 2);
  EXPECT_EQ(Larder({"no-such-command"}).code, 2);
  EXPECT_EQ(Larder({"status", "--no-such-flag"}).code, 2);
  EXPECT_EQ(Larder({"stat"}).code, 2);
  EXPECT_EQ(Larder({"status", "--timeout", "soon"}).code, 2);
  EXPECT_EQ(Larder({"completion", "tcsh"}).code, 2);
  const Answer evict = Larder({"evict"});
  EXPECT_EQ(evict.code, 2);
  EXPECT_THAT(evict.err, HasSubstr("give a chunk, or --space"));
}

TEST_F(CliTest, WithoutADaemonItSaysWhatToDo) {
  const std::string says = absl::StrCat("no daemon at ", daemon_.admin());
  for (const char* command :
       {"status", "ls", "config", "metrics", "spaces", "verify", "events"}) {
    const Answer answer = Larder({command});
    EXPECT_EQ(answer.code, 1) << command;
    EXPECT_EQ(answer.out, "") << command;
    EXPECT_THAT(answer.err, HasSubstr(says)) << command;
    EXPECT_THAT(answer.err, HasSubstr("start larderd or pass --socket"));
  }
  const Answer json = Larder({"status", "--json"});
  EXPECT_EQ(Json::parse(json.err)["error"]["code"], "UNAVAILABLE");
  // These work all the same.
  const Answer version = Larder({"version", "--json"});
  EXPECT_EQ(version.code, 0);
  EXPECT_TRUE(version.json()["daemon"].is_null());
  EXPECT_THAT(Larder({"version"}).out, HasSubstr("none answers"));
  const Answer doctor = Larder({"doctor", "--json"});
  EXPECT_THAT(Keys(doctor.json()), ElementsAre("worst", "checks"));
}

TEST_F(CliTest, JsonShapes) {
  StartDaemon();
  const std::vector<std::string> ids = SaveChain();
  const Answer status = Larder({"status", "--json"});
  EXPECT_EQ(status.code, 0) << status.out << status.err;
  EXPECT_THAT(
      Keys(status.json()),
      ElementsAre(
          "version", "pid", "uptime_ms", "ready", "draining", "checks", "tiers",
          "chunks", "incomplete_chunks", "holds", "held_bytes", "reservations",
          "reserved_bytes", "clients", "spaces", "matches", "matched_chunks",
          "missed_chunks", "held_chunks", "unheld_chunks", "holds_expired",
          "commits", "commits_rejected", "commits_present", "saved_bytes",
          "promoted_bytes", "demoted_bytes", "evicted_dram", "evicted_durable",
          "corrupt", "refused_full", "durable_backlog_bytes", "index_bytes",
          "user_bytes", "device_bytes", "gc_bytes", "socket", "encoded_records",
          "encoded_plain_bytes", "encoded_bytes", "encode_not_smaller",
          "encode_unsupported", "encode_failed", "encode_seconds",
          "spilled_bytes", "unspilled_bytes", "evicted_hbm",
          "unspilled_evictions", "spill_backlog_bytes"));
  EXPECT_EQ(status.json()["chunks"], 3);
  EXPECT_THAT(Keys(status.json()["tiers"][0]),
              ElementsAre("kind", "capacity_bytes", "used_bytes", "waste_bytes",
                          "healthy", "problem"));

  const Answer ls = Larder({"ls", "--json", "--limit", "2"});
  EXPECT_EQ(ls.code, 0);
  EXPECT_EQ(ls.json()["chunks"].size(), 2u);
  EXPECT_EQ(ls.json()["more"], true);
  EXPECT_EQ(Larder({"ls", "--json", "--limit", "0"}).json()["chunks"].size(),
            3u);
  const Answer stat = Larder({"stat", ids[1].substr(0, 12), "--json"});
  EXPECT_EQ(stat.code, 0);
  EXPECT_THAT(Keys(stat.json()),
              ElementsAre("id", "parent", "space", "tenant", "token_begin",
                          "token_count", "tail", "complete", "pinned",
                          "lineage", "holds", "bytes", "parts", "tiers",
                          "idle_ms", "copies", "durable_coding"));
  EXPECT_THAT(
      Keys(stat.json()["copies"][0]),
      ElementsAre("tier", "codec", "codec_name", "lineage", "parts", "bytes",
                  "plain_bytes", "profile", "profile_missing"));
  EXPECT_EQ(stat.json()["copies"][0]["codec_name"], "raw");
  EXPECT_EQ(stat.json()["copies"][0]["profile"], "none");
  EXPECT_EQ(stat.json()["durable_coding"], "raw");
  EXPECT_EQ(stat.json()["id"], ids[1]);
  EXPECT_EQ(stat.json()["parent"], ids[0]);

  const Answer spaces = Larder({"spaces", "--json"});
  EXPECT_EQ(spaces.code, 0);
  EXPECT_THAT(
      Keys(spaces.json()["spaces"][0]),
      ElementsAre("id", "tenant", "model", "cache_dtype", "engine_layout",
                  "hash_scheme", "weights", "block_tokens", "chunk_tokens",
                  "epoch", "groups", "durable_coding"));

  const Answer config = Larder({"config", "--json"});
  EXPECT_EQ(config.code, 0);
  EXPECT_THAT(
      Keys(config.json()["entries"][0]),
      ElementsAre("name", "value", "default_value", "description", "restart"));
  EXPECT_EQ(Larder({"config", "dram.capacity"}).out, "32MiB\n");
  EXPECT_EQ(Larder({"config", "no.such"}).code, 3);
  EXPECT_THAT(Larder({"config", "--changed"}).out,
              Not(HasSubstr("engine.hold_ttl")));

  const Answer doctor = Larder({"doctor", "--json"});
  EXPECT_THAT(
      Keys(doctor.json()["checks"][0]),
      ElementsAre("code", "name", "severity", "evidence", "why", "cure"));
  const Answer verify = Larder({"verify", "dram", "--json"});
  EXPECT_EQ(verify.code, 0) << verify.err;
  const std::vector<std::string> lines =
      absl::StrSplit(verify.out, '\n', absl::SkipEmpty());
  ASSERT_FALSE(lines.empty());
  EXPECT_THAT(Keys(Json::parse(lines.back())),
              ElementsAre("chunks_done", "chunks_total", "bytes_done",
                          "bytes_total", "corrupt", "finished", "tier"));
  EXPECT_EQ(Json::parse(lines.back())["finished"], true);
  EXPECT_EQ(Larder({"verify"}).code, 0);
  EXPECT_EQ(Larder({"verify", "tape"}).code, 2);
}

TEST_F(CliTest, PinsEvictsAndExplains) {
  StartDaemon();
  const std::vector<std::string> ids = SaveChain();
  EXPECT_EQ(Larder({"pin", ids[0], "--json"}).json()["pinned"], true);
  EXPECT_EQ(Larder({"unpin", ids[0], "--json"}).json()["pinned"], false);
  EXPECT_EQ(Larder({"stat", std::string(64, '0')}).code, 3);
  EXPECT_EQ(Larder({"stat", "xyz"}).code, 2);

  EXPECT_THAT(Larder({"why-miss", ids[0]}).out,
              HasSubstr("1 of 1 chunks would be served"));
  // Without a terminal nobody can be asked.
  const Answer refused = Larder({"evict", ids[1], "--subtree"});
  EXPECT_EQ(refused.code, 6);
  EXPECT_THAT(refused.err, HasSubstr("drops 2 chunks"));
  EXPECT_THAT(refused.err, HasSubstr("--yes"));
  const Answer dry = Larder({"evict", ids[1], "--subtree", "--dry-run"});
  EXPECT_EQ(dry.code, 0);
  EXPECT_THAT(dry.out, HasSubstr("would drop 2 chunks"));
  EXPECT_EQ(Larder({"ls", "--json"}).json()["chunks"].size(), 3u);
  const Answer evict =
      Larder({"evict", ids[1], "--subtree", "--yes", "--json"});
  EXPECT_EQ(evict.code, 0) << evict.err;
  EXPECT_EQ(evict.json()["chunks"], 2);
  EXPECT_EQ(Larder({"ls", "--json"}).json()["chunks"].size(), 1u);

  const Answer why = Larder({"why-miss", ids[1], "--json"});
  EXPECT_EQ(why.code, 0);
  EXPECT_EQ(why.json()["missed"][0]["reason"], "evicted");

  // The same prompt by its tokens.
  const std::string tokens = folder_ / "tokens.json";
  std::ofstream out(tokens);
  out << "[";
  for (const uint32_t token : samples::PromptOf(3 * samples::kChunk)) {
    out << token << ", ";
  }
  out << "]";
  out.close();
  const std::string space =
      Larder({"spaces", "--json"}).json()["spaces"][0]["id"];
  const Answer prompt = Larder({"why-miss", "--space", space.substr(0, 16),
                                "--tokens", tokens, "--json"});
  EXPECT_EQ(prompt.code, 0) << prompt.err;
  EXPECT_EQ(prompt.json()["chunks"], 3);
  EXPECT_EQ(prompt.json()["served"], 1);
  EXPECT_EQ(prompt.json()["missed"][0]["index"], 1);

  const Answer epoch = Larder({"advance-epoch", space, "--yes", "--json"});
  EXPECT_EQ(epoch.code, 0) << epoch.err;
  EXPECT_GT(epoch.json()["epoch"], 0);
  EXPECT_THAT(Larder({"why-miss", ids[0]}).out,
              HasSubstr("0 of 1 chunks would be served"));
}

TEST_F(CliTest, EventsFollow) {
  StartDaemon();
  Process follow(folder_, "larder",
                 {"events", "--follow", "--json", "--socket", daemon_.admin()});
  SaveChain();
  EXPECT_TRUE(Eventually([&] {
    return absl::StrContains(follow.out(), "\"chunk-stored\"") &&
           absl::StrContains(follow.out(), "\"client-gone\"");
  })) << follow.out();
  EXPECT_TRUE(follow.Running());
  uint64_t last = 0;
  for (absl::string_view line :
       absl::StrSplit(follow.out(), '\n', absl::SkipEmpty())) {
    const Json json = Json::parse(line.begin(), line.end(), nullptr, false);
    if (json.is_discarded()) break;  // still being written
    EXPECT_EQ(json["sequence"], ++last);
  }
  // The daemon's end is the stream's end, and an error.
  daemon_.process().Signal(SIGTERM);
  EXPECT_EQ(daemon_.process().Wait(), 0);
  EXPECT_NE(follow.Wait(), -1000);
}

TEST_F(CliTest, NoColoursOffATerminal) {
  StartDaemon();
  for (const char* command : {"status", "doctor", "ls", "verify"}) {
    EXPECT_THAT(Larder({command}).out, Not(HasSubstr("\033"))) << command;
  }
}

TEST_F(CliTest, CompletionKnowsEveryCommand) {
  for (const char* shell : {"bash", "zsh", "fish"}) {
    const Answer answer = Larder({"completion", shell});
    EXPECT_EQ(answer.code, 0);
    for (const std::string& command : kCommands) {
      EXPECT_THAT(answer.out, HasSubstr(command)) << shell;
    }
    EXPECT_THAT(answer.out, HasSubstr("dry-run")) << shell;
  }
}

TEST_F(CliTest, BashCompletionWorks) {
  const std::string script = folder_ / "completion.bash";
  std::ofstream(script) << Larder({"completion", "bash"}).out << R"(
COMP_WORDS=(larder ev); COMP_CWORD=1; _larder; echo "1: ${COMPREPLY[*]}"
COMP_WORDS=(larder evict --sub); COMP_CWORD=2; _larder; echo "2: ${COMPREPLY[*]}"
COMP_WORDS=(larder --json st); COMP_CWORD=2; _larder; echo "3: ${COMPREPLY[*]}"
)";
  const std::string command = "bash " + script + " 2>&1";
  FILE* const pipe = popen(command.c_str(), "r");
  std::string out;
  char buffer[256];
  while (fgets(buffer, sizeof buffer, pipe) != nullptr) out += buffer;
  EXPECT_EQ(pclose(pipe), 0) << out;
  EXPECT_THAT(out, HasSubstr("1: evict events\n"));
  EXPECT_THAT(out, HasSubstr("2: --subtree\n"));
  EXPECT_THAT(out, HasSubstr("3: status stat\n"));
}

// ---- Metrics ----

TEST(Metrics, NamesAreWellFormedAndFamiliesTogether) {
  std::set<std::string> families;
  std::set<std::string> series;
  std::string family;
  for (const MetricSpec& spec : MetricSpecs()) {
    const std::string name(spec.name);
    EXPECT_EQ(name.rfind("larder_", 0), 0u) << name;
    EXPECT_EQ(absl::EndsWith(name, "_total"),
              spec.type == MetricSpec::Type::kCounter)
        << name;
    if (name != family) {
      EXPECT_TRUE(families.insert(name).second) << name << " is split";
      EXPECT_FALSE(spec.help.empty()) << name;
      family = name;
    }
    EXPECT_TRUE(
        series.insert(absl::StrCat(name, "{", spec.labels.data(), "}")).second)
        << name;
    EXPECT_THAT(MetricsTable(), HasSubstr("`" + name));
  }
}

TEST(Metrics, EverySeriesIsThereAsZero) {
  const std::string text = MetricsText(MetricsInput());
  for (const MetricSpec& spec : MetricSpecs()) {
    EXPECT_THAT(text, HasSubstr(absl::StrCat("\n", spec.name.data())));
    EXPECT_THAT(text,
                HasSubstr(absl::StrCat("# TYPE ", spec.name.data(), " ")));
  }
  EXPECT_THAT(text,
              HasSubstr("larder_ops_total{op=\"commit\",result=\"ok\"} 0"));
}

std::string Get(int port, const std::string& path) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string reply;
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) {
    const std::string request = absl::StrCat(
        "GET ", path, " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    (void)!write(fd, request.data(), request.size());
    char buffer[4096];
    ssize_t n = 0;
    while ((n = read(fd, buffer, sizeof buffer)) > 0) {
      reply.append(buffer, static_cast<size_t>(n));
    }
  }
  close(fd);
  return reply;
}

TEST_F(CliTest, FirstScrapeIsComplete) {
  const int port = FreePort();
  daemon_.extra.push_back(absl::StrCat("--metrics.listen=127.0.0.1:", port));
  StartDaemon();
  const std::string scrape = Get(port, "/metrics");
  EXPECT_THAT(scrape, HasSubstr("200 OK"));
  EXPECT_THAT(scrape, HasSubstr("version=0.0.4"));
  for (const MetricSpec& spec : MetricSpecs()) {
    EXPECT_THAT(scrape, HasSubstr(absl::StrCat("\n", spec.name.data())));
  }
  EXPECT_THAT(scrape, HasSubstr("larder_chunks{state=\"complete\"} 0"));
  EXPECT_THAT(scrape, HasSubstr("larder_build_info{version=\"0."));
  EXPECT_THAT(Get(port, "/livez"), HasSubstr("200 OK"));
  const std::string ready = Get(port, "/readyz?verbose");
  EXPECT_THAT(ready, HasSubstr("200 OK"));
  EXPECT_THAT(ready, HasSubstr("[+]listener ok"));
  EXPECT_THAT(ready, HasSubstr("[+]nvme-writable ok"));
  EXPECT_THAT(Get(port, "/no-such-page"), HasSubstr("404 Not Found"));
  EXPECT_THAT(Get(port, "no slash"), HasSubstr("400 Bad Request"));
  EXPECT_THAT(Get(port, "/" + std::string(20000, 'x')),
              HasSubstr("431 Request"));
  EXPECT_TRUE(daemon_.process().Running());
  SaveChain();
  EXPECT_THAT(Get(port, "/metrics"),
              HasSubstr("larder_chunks{state=\"complete\"} 3"));
  // The same through the admin socket.
  EXPECT_THAT(Larder({"metrics"}).out,
              HasSubstr("larder_chunks{state=\"complete\"} 3"));
}

TEST_F(CliTest, NobodyWhoIsSlowKeepsProbesWaiting) {
  const int port = FreePort();
  daemon_.extra.push_back(absl::StrCat("--metrics.listen=127.0.0.1:", port));
  StartDaemon();
  std::vector<int> slow;
  for (int i = 0; i < 20; ++i) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ASSERT_EQ(
        connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    ASSERT_EQ(write(fd, "GET /me", 7), 7);
    slow.push_back(fd);
  }
  EXPECT_THAT(Get(port, "/livez"), HasSubstr("alive"));
  for (const int fd : slow) close(fd);
  EXPECT_THAT(Get(port, "/livez"), HasSubstr("alive"));
}

TEST_F(CliTest, TakenMetricsPortSaysSo) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  bind(fd, reinterpret_cast<sockaddr*>(&address), size);
  listen(fd, 1);
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  daemon_.extra.push_back(
      absl::StrCat("--metrics.listen=127.0.0.1:", ntohs(address.sin_port)));
  EXPECT_EQ(daemon_.Start().Wait(), 1);
  EXPECT_THAT(daemon_.process().err(), HasSubstr("port is taken"));
  close(fd);
}

}  // namespace
}  // namespace larder
