// larder spaces, advance-epoch.

#include <cstdio>

#include "absl/strings/str_cat.h"

#include "tools/cli.h"
#include "tools/cli_output.h"

namespace larder {
namespace {

namespace v1 = admin::v1;

struct SpaceArgs {
  std::string space;
  std::string tenant;
  bool full = false;
  bool yes = false;
};

int RunSpaces(const GlobalOptions& options, const SpaceArgs& args) {
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  v1::ListSpacesRequest request;
  request.set_tenant(args.tenant);
  StatusOr<v1::SpaceList> spaces = (*client)->ListSpaces(request);
  if (!spaces.ok()) return Fail(options, spaces.status());
  if (options.json) {
    PrintJson(ToJson(*spaces));
    return kExitOk;
  }
  Table table({{"SPACE"},
               {"TENANT"},
               {"MODEL"},
               {"DTYPE"},
               {"LAYOUT"},
               {"LAYERS", true},
               {"CHUNK", true},
               {"EPOCH", true},
               {"NVME COPIES"}});
  for (const v1::Space& space : spaces->spaces()) {
    uint32_t layers = 0;
    for (const v1::Group& group : space.groups()) layers += group.layers();
    table.Add(
        {args.full ? space.id() : space.id().substr(0, 16), space.tenant(),
         space.model(), space.cache_dtype(), space.engine_layout(),
         absl::StrCat(layers), absl::StrCat(space.chunk_tokens()),
         absl::StrCat(space.epoch()),
         space.durable_coding().empty() ? "-" : Clean(space.durable_coding())});
  }
  table.Print();
  return kExitOk;
}

int RunAdvanceEpoch(const GlobalOptions& options, const SpaceArgs& args) {
  auto client = Connect(options);
  if (!client.ok()) return Fail(options, client.status());
  if (!args.yes) {
    if (Status yes = Confirm(
            options, absl::StrCat("From now on no chunk of space ", args.space,
                                  " that exists is served any more."));
        !yes.ok()) {
      return Fail(options, yes);
    }
  }
  v1::AdvanceEpochRequest request;
  request.set_space(args.space);
  request.set_tenant(args.tenant);
  StatusOr<v1::AdvanceEpochReply> reply = (*client)->AdvanceEpoch(request);
  if (!reply.ok()) return Fail(options, reply.status());
  if (options.json) {
    PrintJson(ToJson(*reply));
  } else {
    std::printf("epoch %lu\n", static_cast<unsigned long>(reply->epoch()));
  }
  return kExitOk;
}

}  // namespace

void AddSpaceCommands(CLI::App& app, GlobalOptions& options) {
  auto list = std::make_shared<SpaceArgs>();
  CLI::App* const spaces =
      AddCommand(app, options, "spaces", "List spaces",
                 "  larder spaces\n  larder spaces --tenant alice --full",
                 [&options, list] { return RunSpaces(options, *list); });
  spaces->add_option("--tenant", list->tenant, "name or number");
  spaces->add_flag("--full", list->full, "whole ids");

  auto advance = std::make_shared<SpaceArgs>();
  CLI::App* const epoch = AddCommand(
      app, options, "advance-epoch",
      "After a weight update: nothing older is served any more",
      "  larder advance-epoch 77ab02d1 --yes",
      [&options, advance] { return RunAdvanceEpoch(options, *advance); });
  epoch
      ->add_option("SPACE", advance->space, "id, or its first 8 digits or more")
      ->required();
  epoch->add_option("--tenant", advance->tenant, "name or number");
  epoch->add_flag("--yes,-y", advance->yes, "do not ask");
}

}  // namespace larder
