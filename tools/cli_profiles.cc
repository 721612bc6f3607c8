// larder profile add, list, show, rm: codec profiles that the daemon keeps.
// larder profile rewrite: files of them.

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <span>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

#include "codec/profile.h"
#include "tools/cli.h"
#include "tools/cli_output.h"
#include "tools/format.h"

namespace larder {
namespace {

namespace v1 = admin::v1;

constexpr size_t kShortDigits = 12;

constexpr char kPlanesAreSteps[] =
    "It was made before there were tables for two planes of a trellis: "
    "kvc1:N/2 "
    "takes a fifth\nto a quarter more bytes with it than kvc1:N. Calibrating "
    "again (larder calibrate) gives\nthese tables; they cannot be had from the "
    "profile.\n";

struct ProfileArgs {
  std::string file, to;
  std::string id;
  bool full = false;
  bool force = false;
};

StatusOr<std::shared_ptr<const Profile>> ReadProfile(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    return absl::NotFoundError(absl::StrCat("there is no file ", path));
  }
  if (!std::filesystem::is_regular_file(path, error)) {
    return absl::InvalidArgumentError(absl::StrCat(path, " is no file"));
  }
  const uint64_t size = std::filesystem::file_size(path, error);
  if (error || size > kMaxProfileBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, " has ", FormatBytes(size), "; a profile has at most ",
        FormatBytes(kMaxProfileBytes)));
  }
  std::string bytes(size, '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(bytes.data(), static_cast<std::streamsize>(size))) {
    return absl::UnavailableError(absl::StrCat("cannot read ", path));
  }
  auto profile =
      Profile::Parse(std::as_bytes(std::span(bytes.data(), bytes.size())));
  if (!profile.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", profile.status().message()));
  }
  return profile;
}

std::string LevelsText(const v1::Profile& profile) {
  return profile.divergence_size() == 1
             ? "1"
             : absl::StrCat("1-", profile.divergence_size());
}

std::string ShapeText(const v1::Profile& profile) {
  return absl::StrJoin(profile.groups(), " + ",
                       [](std::string* out, const v1::ProfileGroup& group) {
                         absl::StrAppend(out, group.layers(), "x",
                                         group.kv_heads(), "x", group.key_dim(),
                                         "/", group.value_dim());
                       });
}

std::string UseText(const v1::Profile& profile) {
  if (profile.rules_size() > 0) return "in rules";
  return profile.may_be_needed() ? "copies may need it" : "never used";
}

int RunAdd(const GlobalOptions& options, const ProfileArgs& args) {
  // Looked at here, so that what is no profile is not sent at all.
  const auto read = ReadProfile(args.file);
  if (!read.ok()) return Fail(options, read.status());
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  const StatusOr<v1::AddProfileReply> reply =
      (*client)->AddProfile((*read)->bytes());
  if (!reply.ok()) return Fail(options, reply.status());
  if (options.json) {
    PrintJson(ToJson(*reply));
    return kExitOk;
  }
  const v1::Profile& profile = reply->profile();
  std::printf("%s %s\n", profile.id().c_str(),
              reply->added() ? "added" : "was kept already");
  if ((*read)->PlanesAreSteps()) std::printf("%s", kPlanesAreSteps);
  if (profile.rules().empty()) {
    std::printf(
        "To code copies with it, name it in the daemon's configuration and "
        "send SIGHUP:\n"
        "  [[codec.rules]]\n"
        "  model = \"%s\"\n"
        "  codec = \"kvc1:%d\"\n"
        "  profile = \"%s\"\n",
        profile.model().empty() ? "*" : Clean(profile.model()).c_str(),
        std::min(2, std::max(1, profile.divergence_size())),
        profile.id().substr(0, kShortDigits).c_str());
  }
  return kExitOk;
}

int RunProfiles(const GlobalOptions& options, const ProfileArgs& args) {
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  const StatusOr<v1::ProfileList> list = (*client)->ListProfiles({});
  if (!list.ok()) return Fail(options, list.status());
  if (options.json) {
    PrintJson(ToJson(*list));
    return kExitOk;
  }
  Table table({{"PROFILE"},
               {"MODEL"},
               {"LEVELS"},
               {"LAYERSxHEADSxDIMS"},
               {"SIZE", true},
               {"USE"}});
  for (const v1::Profile& profile : list->profiles()) {
    table.Add({args.full ? profile.id() : profile.id().substr(0, kShortDigits),
               Clean(profile.model()), LevelsText(profile), ShapeText(profile),
               FormatBytes(profile.bytes()), UseText(profile)});
  }
  table.Print();
  return kExitOk;
}

int RunShow(const GlobalOptions& options, const ProfileArgs& args) {
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  v1::GetProfileRequest request;
  request.set_id(args.id);
  const StatusOr<v1::Profile> profile = (*client)->GetProfile(request);
  if (!profile.ok()) return Fail(options, profile.status());
  if (options.json) {
    PrintJson(ToJson(*profile));
    return kExitOk;
  }
  std::printf("profile   %s\n", profile->id().c_str());
  std::printf("size      %s\n", FormatBytes(profile->bytes()).c_str());
  std::printf("model     %s\n", Clean(profile->model()).c_str());
  std::printf("made by   %s\n", Clean(profile->made_by()).c_str());
  std::printf("weights   %s\n",
              profile->weights().empty() ? "any" : profile->weights().c_str());
  std::printf("keys      %s\n", profile->unrotated_keys()
                                    ? "before rotation (RoPE)"
                                    : "as they are");
  if (profile->planes_are_steps()) {
    std::printf(
        "planes    as steps: two take a fifth to a quarter more bytes "
        "than one\n");
  }
  std::printf("use       %s\n",
              profile->rules().empty()
                  ? UseText(*profile).c_str()
                  : Clean(absl::StrJoin(profile->rules(), "; ")).c_str());
  std::printf("\n");
  Table groups({{"GROUP", true},
                {"LAYERS", true},
                {"KV HEADS", true},
                {"KEY DIM", true},
                {"VALUE DIM", true},
                {"MODE"}});
  for (int i = 0; i < profile->groups_size(); ++i) {
    const v1::ProfileGroup& group = profile->groups(i);
    groups.Add({absl::StrCat(i), absl::StrCat(group.layers()),
                absl::StrCat(group.kv_heads()), absl::StrCat(group.key_dim()),
                absl::StrCat(group.value_dim()), group.mode()});
  }
  groups.Print();
  std::printf("\n");
  Table levels({{"LEVEL", true}, {"EXPECTED KL", true}});
  for (int i = 0; i < profile->divergence_size(); ++i) {
    char text[32];
    std::snprintf(text, sizeof text, "%.4g", profile->divergence(i));
    levels.Add({absl::StrCat(i + 1), text});
  }
  levels.Print();
  return kExitOk;
}

// The same profile in the layout of today, compressed.
int RunRewrite(const GlobalOptions& options, const ProfileArgs& args) {
  const auto from = ReadProfile(args.file);
  if (!from.ok()) return Fail(options, from.status());
  const auto rewritten = [&]() -> StatusOr<std::shared_ptr<const Profile>> {
    LARDER_ASSIGN_OR_RETURN(auto to, Profile::Make((*from)->contents()));
    // That nothing is lost is seen from what was written.
    const std::string& bytes = to->bytes();
    LARDER_ASSIGN_OR_RETURN(
        auto again,
        Profile::Parse(std::as_bytes(std::span(bytes.data(), bytes.size()))));
    LARDER_ASSIGN_OR_RETURN(
        const auto before,
        Profile::Make((*from)->contents(), Profile::Format::kPlain));
    LARDER_ASSIGN_OR_RETURN(
        const auto after,
        Profile::Make(again->contents(), Profile::Format::kPlain));
    if (before->bytes() != after->bytes()) {
      return absl::InternalError("the rewritten profile is another one");
    }
    LARDER_RETURN_IF_ERROR(WriteWholeFile(args.to, bytes));
    return to;
  }();
  if (!rewritten.ok()) return Fail(options, rewritten.status());
  const Profile& to = **rewritten;
  if (options.json) {
    PrintJson({{"profile", args.to},
               {"id", ToHex(to.id())},
               {"bytes", to.bytes().size()},
               {"from",
                {{"id", ToHex((*from)->id())},
                 {"version", static_cast<int>((*from)->format())},
                 {"bytes", (*from)->bytes().size()}}},
               {"planes_are_steps", to.PlanesAreSteps()}});
    return kExitOk;
  }
  std::printf("%s: %s, version %d of %s -> version %d of %s\n", args.to.c_str(),
              ToHex(to.id()).c_str(), static_cast<int>((*from)->format()),
              FormatBytes((*from)->bytes().size()).c_str(),
              static_cast<int>(to.format()),
              FormatBytes(to.bytes().size()).c_str());
  if (to.PlanesAreSteps()) std::printf("%s", kPlanesAreSteps);
  std::printf(
      "It says the same under another id. Copies that were coded with %s need "
      "that one for\never; name the new one in rules for new copies.\n",
      ToHex((*from)->id()).substr(0, kShortDigits).c_str());
  return kExitOk;
}

int RunRemove(const GlobalOptions& options, const ProfileArgs& args) {
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  v1::RemoveProfileRequest request;
  request.set_id(args.id);
  request.set_force(args.force);
  const StatusOr<v1::RemoveProfileReply> reply =
      (*client)->RemoveProfile(request);
  if (!reply.ok()) return Fail(options, reply.status());
  if (options.json) {
    PrintJson(ToJson(*reply));
    return kExitOk;
  }
  std::printf("removed %s\n", reply->id().c_str());
  if (reply->may_be_needed()) {
    std::printf(
        "Copies that were coded with it are misses from now on, except in "
        "clients that have\nit already; adding it again makes them "
        "readable.\n");
  }
  return kExitOk;
}

}  // namespace

void AddProfileCommands(CLI::App& app, GlobalOptions& options) {
  CLI::App* const profile = AddCommand(
      app, options, "profile",
      "Codec profiles that the daemon keeps (larder calibrate makes them)",
      "  larder profile add model.larderprofile\n"
      "  larder profile list\n"
      "  larder profile show 5f1c22d0\n"
      "  larder profile rewrite old.larderprofile new.larderprofile",
      nullptr);
  profile->require_subcommand(1);

  auto add = std::make_shared<ProfileArgs>();
  AddCommand(*profile, options, "add",
             "Give the daemon a profile; it keeps it, named by its SHA-256",
             "  larder profile add model.larderprofile\n"
             "  larder profile add model.larderprofile --json",
             [&options, add] { return RunAdd(options, *add); })
      ->add_option("FILE", add->file, "written by larder calibrate")
      ->required();

  auto list = std::make_shared<ProfileArgs>();
  AddCommand(*profile, options, "list", "List the profiles",
             "  larder profile list\n"
             "  larder profile list --full",
             [&options, list] { return RunProfiles(options, *list); })
      ->add_flag("--full", list->full, "whole ids");

  auto show = std::make_shared<ProfileArgs>();
  AddCommand(*profile, options, "show", "Show what a profile is",
             "  larder profile show 5f1c22d0",
             [&options, show] { return RunShow(options, *show); })
      ->add_option("PROFILE", show->id, "id, or its first 8 digits or more")
      ->required();

  auto rewrite = std::make_shared<ProfileArgs>();
  CLI::App* const re =
      AddCommand(*profile, options, "rewrite",
                 "Write a profile's file in the layout of today, which is half "
                 "as large as\n"
                 "version 1; nothing else changes but its id. Needs no daemon",
                 "  larder profile rewrite old.larderprofile new.larderprofile",
                 [&options, rewrite] { return RunRewrite(options, *rewrite); });
  re->add_option("OLD", rewrite->file, "a profile of any version")->required();
  re->add_option("NEW", rewrite->to, "the file to write")->required();

  auto remove = std::make_shared<ProfileArgs>();
  CLI::App* const rm =
      AddCommand(*profile, options, "rm",
                 "Remove a profile that no rule of the configuration names",
                 "  larder profile rm 5f1c22d0\n"
                 "  larder profile rm 5f1c22d0 --force",
                 [&options, remove] { return RunRemove(options, *remove); });
  rm->add_option("PROFILE", remove->id, "id, or its first 8 digits or more")
      ->required();
  rm->add_flag("--force", remove->force,
               "even if stored copies may need it to be read");
}

}  // namespace larder
