// larder ls, stat, pin, unpin, evict, why-miss.

#include <cstdio>
#include <fstream>
#include <iterator>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

#include "store/types.h"
#include "tools/cli.h"
#include "tools/cli_output.h"
#include "tools/format.h"

namespace larder {
namespace {

namespace v1 = admin::v1;

constexpr size_t kShortDigits = 16;
constexpr size_t kProfileDigits = 12;
constexpr size_t kMaxTokensFile = 64 << 20;

struct ChunkArgs {
  std::string id;
  std::string tenant;
  std::string space;
  std::string tokens_file;
  std::string salt;
  uint32_t limit = 100;
  bool full = false;
  bool subtree = false;
  bool dry_run = false;
  bool yes = false;
};

std::string Flags(const v1::Chunk& chunk) {
  std::string flags;
  if (chunk.pinned()) flags += "pinned ";
  if (chunk.tail()) flags += "tail ";
  if (!chunk.complete()) flags += "incomplete ";
  if (chunk.lineage() > 0) flags += absl::StrCat("lineage=", chunk.lineage());
  return flags.empty() ? "-" : flags;
}

int RunList(const GlobalOptions& options, const ChunkArgs& args) {
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  v1::ListChunksRequest request;
  request.set_tenant(args.tenant);
  request.set_space(args.space);
  Json json = {{"chunks", Json::array()}, {"more", false}};
  Table table({{"CHUNK"},
               {"TENANT"},
               {"TOKENS"},
               {"SIZE", true},
               {"TIERS"},
               {"HOLDS", true},
               {"IDLE", true},
               {"FLAGS"}});
  uint32_t shown = 0;
  bool more = true;
  while (more && (args.limit == 0 || shown < args.limit)) {
    request.set_limit(
        args.limit == 0 ? 1000 : std::min<uint32_t>(1000, args.limit - shown));
    StatusOr<v1::ChunkList> page = (*client)->ListChunks(request);
    if (!page.ok()) return Fail(options, page.status());
    for (const v1::Chunk& chunk : page->chunks()) {
      ++shown;
      if (options.json) {
        json["chunks"].push_back(ToJson(chunk));
        continue;
      }
      table.Add(
          {args.full ? chunk.id() : chunk.id().substr(0, kShortDigits),
           chunk.tenant(),
           absl::StrCat(chunk.token_begin(), "+", chunk.token_count()),
           FormatBytes(chunk.bytes()),
           chunk.tiers_size() == 0 ? "-" : absl::StrJoin(chunk.tiers(), ","),
           absl::StrCat(chunk.holds()),
           FormatAge(absl::Milliseconds(chunk.idle_ms())), Flags(chunk)});
    }
    more = page->more() && page->chunks_size() > 0;
    if (more) request.set_after(page->chunks(page->chunks_size() - 1).id());
  }
  if (options.json) {
    json["more"] = more;
    PrintJson(json);
    return kExitOk;
  }
  table.Print();
  if (more) {
    std::fprintf(stderr, "(first %u; --limit 0 shows all)\n", shown);
  }
  return kExitOk;
}

std::string LineageText(uint32_t lineage) {
  if (lineage == Raw(Lineage::kExact)) return "exact";
  if (lineage < Raw(Lineage::kApproximate)) {
    return absl::StrCat("lossy, level ", lineage);
  }
  return lineage < Raw(Lineage::kUnknown) ? "approximate" : "unknown";
}

std::string ProfileText(const v1::Copy& copy) {
  if (copy.profile().empty()) return "?";
  if (copy.profile() == "none") return "-";
  return absl::StrCat(copy.profile().substr(0, kProfileDigits),
                      copy.profile_missing() ? " (missing)" : "");
}

// What each copy is.
void PrintCopies(const v1::Chunk& chunk) {
  if (chunk.copies_size() == 0) return;
  std::printf("\n");
  Table table({{"TIER"},
               {"CODEC"},
               {"PROFILE"},
               {"QUALITY"},
               {"PARTS", true},
               {"SIZE", true},
               {"OF RAW", true}});
  for (const v1::Copy& copy : chunk.copies()) {
    table.Add({copy.tier(), copy.codec_name(), ProfileText(copy),
               LineageText(copy.lineage()), absl::StrCat(copy.parts()),
               FormatBytes(copy.bytes()),
               FormatRatio(copy.bytes(), copy.plain_bytes())});
  }
  table.Print();
}

int ShowChunk(const GlobalOptions& options, const StatusOr<v1::Chunk>& chunk) {
  if (!chunk.ok()) return Fail(options, chunk.status());
  if (options.json) {
    PrintJson(ToJson(*chunk));
    return kExitOk;
  }
  Table table({{"FIELD"}, {"VALUE"}});
  table.Add({"chunk", chunk->id()});
  table.Add({"parent", chunk->parent().empty() ? "-" : chunk->parent()});
  table.Add({"space", chunk->space()});
  table.Add({"tenant", chunk->tenant()});
  table.Add({"tokens", absl::StrCat(chunk->token_count(), " from position ",
                                    chunk->token_begin())});
  table.Add({"size", absl::StrCat(FormatBytes(chunk->bytes()), " in ",
                                  chunk->parts(), " parts")});
  table.Add({"tiers", chunk->tiers_size() == 0
                          ? "-"
                          : absl::StrJoin(chunk->tiers(), ", ")});
  table.Add({"holds", absl::StrCat(chunk->holds())});
  table.Add({"idle", FormatAge(absl::Milliseconds(chunk->idle_ms()))});
  table.Add({"flags", Flags(*chunk)});
  if (!chunk->durable_coding().empty()) {
    table.Add({"new copies", Clean(chunk->durable_coding())});
  }
  table.Print();
  PrintCopies(*chunk);
  return kExitOk;
}

int RunStat(const GlobalOptions& options, const ChunkArgs& args) {
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  v1::ChunkRequest request;
  request.set_id(args.id);
  request.set_tenant(args.tenant);
  return ShowChunk(options, (*client)->StatChunk(request));
}

int RunPin(const GlobalOptions& options, const ChunkArgs& args, bool pinned) {
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  v1::PinChunkRequest request;
  request.set_id(args.id);
  request.set_tenant(args.tenant);
  request.set_pinned(pinned);
  return ShowChunk(options, (*client)->PinChunk(request));
}

StatusOr<v1::EvictReply> CallEvict(AdminClient& client, const ChunkArgs& args,
                                   bool dry_run) {
  if (args.id.empty()) {
    v1::EvictSpaceRequest request;
    request.set_tenant(args.tenant);
    request.set_space(args.space);
    request.set_dry_run(dry_run);
    return client.EvictSpace(request);
  }
  v1::EvictChunkRequest request;
  request.set_tenant(args.tenant);
  request.set_id(args.id);
  request.set_subtree(args.subtree);
  request.set_dry_run(dry_run);
  return client.EvictChunk(request);
}

int RunEvict(const GlobalOptions& options, const ChunkArgs& args) {
  if (args.id.empty() == args.space.empty()) {
    return Fail(options, absl::InvalidArgumentError(
                             "give a chunk, or --space for all of a space"));
  }
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  if (args.dry_run || !args.yes) {
    StatusOr<v1::EvictReply> would = CallEvict(**client, args, true);
    if (!would.ok()) return Fail(options, would.status());
    const std::string what = absl::StrCat(
        would->chunks(), " chunks, ", FormatBytes(would->bytes()), ", ",
        would->held(), " of them held (those go when they are released)");
    if (args.dry_run) {
      if (options.json) {
        Json json = ToJson(*would);
        json["dry_run"] = true;
        PrintJson(json);
      } else {
        std::printf("would drop %s\n", what.c_str());
      }
      return kExitOk;
    }
    if (Status yes = Confirm(options, absl::StrCat("This drops ", what, "."));
        !yes.ok()) {
      return Fail(options, yes);
    }
  }
  StatusOr<v1::EvictReply> done = CallEvict(**client, args, false);
  if (!done.ok()) return Fail(options, done.status());
  if (options.json) {
    Json json = ToJson(*done);
    json["dry_run"] = false;
    PrintJson(json);
  } else {
    std::printf("dropped %lu chunks\n",
                static_cast<unsigned long>(done->chunks()));
  }
  return kExitOk;
}

// Numbers separated by blanks, commas or lines, brackets around them allowed:
// what tokenizers and JSON print.
Status ReadTokens(const std::string& path, v1::WhyMissRequest& request) {
  std::ifstream file;
  if (path != "-") file.open(path, std::ios::binary);
  std::istream& in = path == "-" ? std::cin : file;
  std::string text((std::istreambuf_iterator<char>(in)), {});
  if (!in || text.size() > kMaxTokensFile) {
    return absl::NotFoundError(
        absl::StrCat("cannot read tokens from ", path,
                     "; give a file of token ids, at most 64 MiB"));
  }
  for (absl::string_view word :
       absl::StrSplit(text, absl::ByAnyChar(" \t\r\n,[]"), absl::SkipEmpty())) {
    uint32_t token = 0;
    if (!absl::SimpleAtoi(word, &token)) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": \"", word.substr(0, 40), "\" is no token id"));
    }
    request.add_tokens(token);
  }
  return absl::OkStatus();
}

int RunWhyMiss(const GlobalOptions& options, const ChunkArgs& args) {
  v1::WhyMissRequest request;
  request.set_id(args.id);
  request.set_tenant(args.tenant);
  request.set_space(args.space);
  request.set_salt(args.salt);
  if (args.id.empty()) {
    if (args.space.empty() || args.tokens_file.empty()) {
      return Fail(options,
                  absl::InvalidArgumentError(
                      "give a chunk, or --space and --tokens of a prompt"));
    }
    if (Status read = ReadTokens(args.tokens_file, request); !read.ok()) {
      return Fail(options, read);
    }
  }
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  StatusOr<v1::WhyMissReply> reply = (*client)->WhyMiss(request);
  if (!reply.ok()) return Fail(options, reply.status());
  if (options.json) {
    PrintJson(ToJson(*reply));
    return kExitOk;
  }
  std::printf("%u of %u chunks would be served\n", reply->served(),
              reply->chunks());
  for (const v1::MissedChunk& missed : reply->missed()) {
    if (missed.reason() == "none") continue;
    std::printf("chunk %u (%s): %s%s%s\n", missed.index(),
                missed.id().substr(0, kShortDigits).c_str(),
                missed.reason().c_str(), missed.detail().empty() ? "" : ": ",
                Clean(missed.detail()).c_str());
  }
  return kExitOk;
}

void AddPin(CLI::App& app, GlobalOptions& options, bool pinned) {
  auto args = std::make_shared<ChunkArgs>();
  const std::string name = pinned ? "pin" : "unpin";
  CLI::App* const command = AddCommand(
      app, options, name,
      pinned ? "Never evict a chunk, across restarts too"
             : "Let a chunk be evicted again",
      absl::StrCat("  larder ", name, " 3fa91c0e"),
      [&options, args, pinned] { return RunPin(options, *args, pinned); });
  command->add_option("CHUNK", args->id, "id, or its first 8 digits or more")
      ->required();
  command->add_option("--tenant", args->tenant, "name or number");
}

}  // namespace

void AddChunkCommands(CLI::App& app, GlobalOptions& options) {
  auto list = std::make_shared<ChunkArgs>();
  CLI::App* const ls =
      AddCommand(app, options, "ls", "List chunks",
                 "  larder ls --limit 20\n  larder ls --tenant alice --json",
                 [&options, list] { return RunList(options, *list); });
  ls->add_option("--tenant", list->tenant, "name or number");
  ls->add_option("--space", list->space, "id, or its first 8 digits or more");
  ls->add_option("--limit", list->limit, "at most so many; 0: all")
      ->capture_default_str();
  ls->add_flag("--full", list->full, "whole ids");

  auto stat = std::make_shared<ChunkArgs>();
  CLI::App* const show =
      AddCommand(app, options, "stat", "Everything about one chunk",
                 "  larder stat 3fa91c0e",
                 [&options, stat] { return RunStat(options, *stat); });
  show->add_option("CHUNK", stat->id, "id, or its first 8 digits or more")
      ->required();
  show->add_option("--tenant", stat->tenant, "name or number");

  AddPin(app, options, true);
  AddPin(app, options, false);

  auto drop = std::make_shared<ChunkArgs>();
  CLI::App* const evict = AddCommand(
      app, options, "evict", "Drop a chunk, its descendants, or a whole space",
      "  larder evict 3fa91c0e --dry-run\n"
      "  larder evict 3fa91c0e --subtree --yes\n"
      "  larder evict --space 77ab02d1 --yes",
      [&options, drop] { return RunEvict(options, *drop); });
  evict->add_option("CHUNK", drop->id, "id, or its first 8 digits or more");
  evict->add_option("--space", drop->space, "every chunk of this space");
  evict->add_option("--tenant", drop->tenant, "name or number");
  evict->add_flag("--subtree", drop->subtree, "and all chunks that follow it");
  evict->add_flag("--dry-run", drop->dry_run, "only say what would go");
  evict->add_flag("--yes,-y", drop->yes, "do not ask");

  auto why = std::make_shared<ChunkArgs>();
  CLI::App* const miss = AddCommand(
      app, options, "why-miss", "Why a chunk or a prompt is not served",
      "  larder why-miss 3fa91c0e...(64 digits)\n"
      "  larder why-miss --space 77ab02d1 --tokens prompt.json",
      [&options, why] { return RunWhyMiss(options, *why); });
  miss->add_option("CHUNK", why->id, "id of a chunk");
  miss->add_option("--space", why->space, "space of the prompt");
  miss->add_option("--tokens", why->tokens_file,
                   "file of token ids (JSON array or words); -: stdin");
  miss->add_option("--salt", why->salt, "the request's salt, if it has one");
  miss->add_option("--tenant", why->tenant, "name or number");
}

}  // namespace larder
