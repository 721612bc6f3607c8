// larder completion: scripts made from the command tree itself.

#include <algorithm>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"

#include "tools/cli.h"

namespace larder {
namespace {

struct Word {
  std::string text;  // "status", "--json"
  std::string help;
};

// What may follow a command: its subcommands and options, and the options that
// it hands up to the command itself.
struct Node {
  std::string path;  // "", "status", "bench shm"
  std::vector<Word> commands;
  std::vector<Word> options;
};

std::string FirstLine(std::string text) {
  text = text.substr(0, text.find('\n'));
  return absl::StrReplaceAll(text, {{"'", ""},
                                    {"[", "("},
                                    {"]", ")"},
                                    {":", " -"},
                                    {"\"", ""},
                                    {"`", ""},
                                    {"$", ""},
                                    {"\\", ""}});
}

void Walk(const CLI::App& app, const std::string& path,
          std::vector<Node>& nodes) {
  Node node;
  node.path = path;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) {
      node.options.push_back(
          {"--" + name, FirstLine(option->get_description())});
    }
  }
  const auto commands =
      app.get_subcommands([](const CLI::App*) { return true; });
  for (const CLI::App* command : commands) {
    node.commands.push_back(
        {command->get_name(), FirstLine(command->get_description())});
  }
  nodes.push_back(std::move(node));
  for (const CLI::App* command : commands) {
    Walk(*command,
         path.empty() ? command->get_name()
                      : absl::StrCat(path, " ", command->get_name()),
         nodes);
  }
}

std::string JoinWords(const std::vector<Word>& words) {
  return absl::StrJoin(words, " ", [](std::string* out, const Word& word) {
    *out += word.text;
  });
}

// The words before the cursor that are commands, joined, name the node.
std::string Bash(const std::vector<Node>& nodes) {
  std::string out =
      "# bash completion of larder; load with:\n"
      "#   source <(larder completion bash)\n"
      "_larder() {\n"
      "  local cur=\"${COMP_WORDS[COMP_CWORD]}\" path=\"\" word next\n"
      "  for word in \"${COMP_WORDS[@]:1:COMP_CWORD-1}\"; do\n"
      "    next=\"${path:+$path }$word\"\n"
      "    case \"$next\" in\n";
  std::vector<std::string> paths;
  for (const Node& node : nodes) {
    if (!node.path.empty())
      paths.push_back(absl::StrCat("\"", node.path, "\""));
  }
  absl::StrAppend(&out, "      ", absl::StrJoin(paths, "|"),
                  ") path=\"$next\" ;;\n    esac\n  done\n"
                  "  local words=\"\"\n  case \"$path\" in\n");
  for (const Node& node : nodes) {
    const bool root = node.path.empty();
    absl::StrAppend(&out, "    \"", node.path, "\") words=\"",
                    JoinWords(node.commands), node.commands.empty() ? "" : " ",
                    JoinWords(node.options), root ? "" : " ",
                    root ? "" : JoinWords(nodes[0].options), "\" ;;\n");
  }
  return out +
         "  esac\n"
         "  COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"
         "  [[ ${#COMPREPLY[@]} -gt 0 ]] || COMPREPLY=($(compgen -f -- "
         "\"$cur\"))\n"
         "}\n"
         "complete -o filenames -F _larder larder\n";
}

std::string Zsh(const std::vector<Node>& nodes) {
  std::string out =
      "#compdef larder\n"
      "# zsh completion of larder; put it into a folder of $fpath as _larder,\n"
      "# or load with: source <(larder completion zsh)\n"
      "_larder() {\n"
      "  local path=\"\" word next\n"
      "  local -a words_here\n"
      "  for word in \"${(@)words[2,CURRENT-1]}\"; do\n"
      "    next=\"${path:+$path }$word\"\n"
      "    case \"$next\" in\n";
  std::vector<std::string> paths;
  for (const Node& node : nodes) {
    if (!node.path.empty()) paths.push_back(absl::StrCat("'", node.path, "'"));
  }
  absl::StrAppend(&out, "      ", absl::StrJoin(paths, "|"),
                  ") path=\"$next\" ;;\n    esac\n  done\n"
                  "  case \"$path\" in\n");
  for (const Node& node : nodes) {
    absl::StrAppend(&out, "    '", node.path, "') words_here=(");
    const auto add = [&out](const std::vector<Word>& words) {
      for (const Word& word : words) {
        absl::StrAppend(&out, " '", word.text, ":", word.help, "'");
      }
    };
    add(node.commands);
    add(node.options);
    if (!node.path.empty()) add(nodes[0].options);
    out += " ) ;;\n";
  }
  return out +
         "  esac\n"
         "  _describe 'larder' words_here || _files\n"
         "}\n"
         "compdef _larder larder\n";
}

std::string Fish(const std::vector<Node>& nodes) {
  std::string out =
      "# fish completion of larder; load with:\n"
      "#   larder completion fish | source\n";
  for (const Word& word : nodes[0].options) {
    absl::StrAppend(&out, "complete -c larder -l ", word.text.substr(2),
                    " -d '", word.help, "'\n");
  }
  for (const Node& node : nodes) {
    std::string when = "__fish_use_subcommand";
    if (!node.path.empty()) {
      std::vector<std::string> seen;
      for (const auto& part : CLI::detail::split(node.path, ' ')) {
        seen.push_back(absl::StrCat("__fish_seen_subcommand_from ", part));
      }
      when = absl::StrJoin(seen, "; and ");
    }
    for (const Word& word : node.commands) {
      absl::StrAppend(&out, "complete -c larder -n '", when, "' -a ", word.text,
                      " -d '", word.help, "'\n");
    }
    if (node.path.empty()) continue;
    for (const Word& word : node.options) {
      absl::StrAppend(&out, "complete -c larder -n '", when, "' -l ",
                      word.text.substr(2), " -d '", word.help, "'\n");
    }
  }
  return out;
}

}  // namespace

std::string CompletionScript(const CLI::App& root, const std::string& shell) {
  std::vector<Node> nodes;
  Walk(root, "", nodes);
  if (shell == "bash") return Bash(nodes);
  if (shell == "zsh") return Zsh(nodes);
  if (shell == "fish") return Fish(nodes);
  return "";
}

void AddCompletionCommand(CLI::App& app, GlobalOptions& options) {
  auto shell = std::make_shared<std::string>();
  CLI::App* const command = AddCommand(
      app, options, "completion", "Print a completion script for a shell",
      "  source <(larder completion bash)\n"
      "  larder completion fish | source",
      [&app, shell] {
        std::fputs(CompletionScript(app, *shell).c_str(), stdout);
        return static_cast<int>(kExitOk);
      });
  command->add_option("SHELL", *shell, "bash, zsh or fish")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh", "fish"}));
}

}  // namespace larder
