// larderd: the daemon. Flags, log, signals and the service manager; everything
// else is wiring.h.

#include <CLI/CLI.hpp>
#include <signal.h>
#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

#include "store/clock.h"
#include "tools/config.h"
#include "tools/exit_code.h"
#include "tools/service_notify.h"
#include "tools/version.h"
#include "tools/wiring.h"

namespace larder {
namespace {

constexpr char kDefaultConfig[] = "/etc/larder/larderd.toml";

using Flags = std::vector<std::pair<std::string, std::string>>;

struct CommandLine {
  std::string config_path;
  Flags flags;
  bool check_config = false;
  bool print_config = false;
  bool help_config = false;
};

void Complain(const Status& status) {
  std::fprintf(stderr, "larderd: %s\n", std::string(status.message()).c_str());
}

// ---- Log ----

Status OpenLog(const DaemonConfig& config) {
  try {
    std::shared_ptr<spdlog::sinks::sink> sink;
    if (config.log.file.empty()) {
      sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
    } else {
      sink =
          std::make_shared<spdlog::sinks::basic_file_sink_mt>(config.log.file);
    }
    auto logger = std::make_shared<spdlog::logger>("larderd", std::move(sink));
    logger->set_pattern("%Y-%m-%dT%H:%M:%S.%e%z %l %v");
    logger->set_level(spdlog::level::from_str(config.log.level));
    logger->flush_on(spdlog::level::info);
    spdlog::set_default_logger(std::move(logger));
  } catch (const spdlog::spdlog_ex& error) {
    return absl::PermissionDeniedError(absl::StrCat(
        "cannot open log.file ", config.log.file, ": ", error.what()));
  }
  return absl::OkStatus();
}

// ---- Signals: blocked everywhere, taken one by one by the main thread. ----

sigset_t HandledSignals() {
  sigset_t set;
  sigemptyset(&set);
  for (const int number : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&set, number);
  return set;
}

// 0 if none came in time.
int NextSignal(absl::Duration timeout) {
  const sigset_t set = HandledSignals();
  const timespec wait = absl::ToTimespec(timeout);
  const int number = sigtimedwait(&set, nullptr, &wait);
  return number < 0 ? 0 : number;
}

// ---- The life of the daemon ----

class Main {
 public:
  Main(CommandLine command, DaemonConfig config)
      : command_(std::move(command)),
        config_(std::move(config)),
        notify_(Environment("NOTIFY_SOCKET")),
        watchdog_(
            WatchdogPeriod(getenv("WATCHDOG_USEC"), getenv("WATCHDOG_PID"))) {}

  int Run() {
    spdlog::info("larderd {} starts (process {})", kVersion, getpid());
    std::unique_ptr<Daemon> daemon;
    if (const int code = Start(daemon); code != kExitOk || !daemon) {
      return code;
    }
    spdlog::info("ready: serving {}", config_.server.socket);
    notify_.Send(
        absl::StrCat("READY=1\nSTATUS=serving ", config_.server.socket));
    Serve(*daemon);
    return Stop(std::move(daemon));
  }

 private:
  static std::string Environment(const char* name) {
    const char* const value = getenv(name);
    return value == nullptr ? "" : value;
  }

  // Recovery and prefaulting may take long: the service manager is kept
  // patient, and a signal ends it at once (nothing is lost: nobody was served).
  int Start(std::unique_ptr<Daemon>& daemon) {
    StatusOr<std::unique_ptr<Daemon>> result = nullptr;
    absl::Notification done;
    std::thread starter([&] {
      result = Daemon::Start(config_);
      done.Notify();
    });
    while (!done.WaitForNotificationWithTimeout(absl::Milliseconds(10))) {
      notify_.Send("EXTEND_TIMEOUT_USEC=10000000\nSTATUS=starting");
      const int number = NextSignal(absl::Milliseconds(90));
      if (number == SIGTERM || number == SIGINT) {
        spdlog::info("signal {} while starting: exit", number);
        notify_.Send("STOPPING=1");
        spdlog::shutdown();
        std::_Exit(kExitOk);
      }
    }
    starter.join();
    if (!result.ok()) {
      spdlog::error("cannot start: {}", std::string(result.status().message()));
      notify_.Send("STATUS=cannot start, see the log");
      return kExitError;
    }
    daemon = *std::move(result);
    return kExitOk;
  }

  void Serve(Daemon& daemon) {
    const absl::Duration period = watchdog_.value_or(absl::Seconds(60));
    for (;;) {
      const int number = NextSignal(period);
      if (number == SIGTERM || number == SIGINT) {
        spdlog::info("signal {}: shutting down", number);
        return;
      }
      if (number == SIGHUP) Reload(daemon);
      daemon.CheckAlive();
      if (watchdog_.has_value()) notify_.Send("WATCHDOG=1");
    }
  }

  // All or nothing; keys that need a restart are named and left alone.
  void Reload(Daemon& daemon) {
    notify_.Send("RELOADING=1");
    StatusOr<DaemonConfig> fresh =
        LoadConfig(command_.config_path, command_.flags);
    if (!fresh.ok()) {
      spdlog::error("SIGHUP: the configuration is refused, nothing changes: {}",
                    std::string(fresh.status().message()));
    } else {
      DaemonConfig next = config_;
      std::vector<std::string> changes;
      for (const ConfigKey* key : ChangedKeys(config_, *fresh)) {
        if (key->restart) {
          spdlog::warn("SIGHUP: {} changes only with a restart", key->name);
          continue;
        }
        const std::string value = FormatConfigKey(*fresh, *key);
        (void)SetConfigKey(next, key->name, value);
        changes.push_back(
            absl::StrCat(absl::string_view(key->name.data(), key->name.size()),
                         " = ", value));
      }
      if (const Status set = daemon.SetConfig(next); !set.ok()) {
        spdlog::error(
            "SIGHUP: the configuration is refused, nothing changes: {}",
            std::string(set.message()));
      } else {
        config_ = std::move(next);
        for (const std::string& change : changes) {
          spdlog::info("SIGHUP: {}", change);
        }
      }
    }
    if (Status opened = OpenLog(config_); !opened.ok()) {
      spdlog::error("SIGHUP: {}; the old log goes on",
                    std::string(opened.message()));
    } else {
      spdlog::info("SIGHUP: log opened");
    }
    notify_.Send("READY=1");
  }

  // Bounded, whatever the disk does: first the drain, then taking down.
  int Stop(std::unique_ptr<Daemon> daemon) {
    notify_.Send("STOPPING=1");
    auto drained = std::make_shared<absl::Notification>();
    auto status = std::make_shared<Status>();
    const absl::Time deadline =
        Clock::Real().Now() + config_.server.drain_timeout;
    daemon->BeginShutdown([drained, status](Status result) {
      *status = std::move(result);
      drained->Notify();
    });
    bool hurried = false;
    while (!drained->WaitForNotificationWithTimeout(absl::Milliseconds(10))) {
      const int number = NextSignal(absl::Milliseconds(40));
      hurried = number == SIGTERM || number == SIGINT;
      if (hurried || Clock::Real().Now() >= deadline) break;
    }
    if (!drained->HasBeenNotified()) {
      spdlog::warn("{}: {} bytes that were committed are not durable",
                   hurried ? "second signal" : "server.drain_timeout passed",
                   daemon->DurableBacklog());
    } else if (!status->ok()) {
      spdlog::warn("drain: {}", std::string(status->message()));
    }
    TakeDown(std::move(daemon), hurried ? absl::Seconds(1) : absl::Seconds(5));
    spdlog::info("stopped");
    spdlog::shutdown();
    return kExitOk;
  }

  // A disk that hangs keeps its thread for ever; the process does not wait for
  // it. What was acknowledged as durable is durable already.
  static void TakeDown(std::unique_ptr<Daemon> daemon, absl::Duration limit) {
    absl::Notification gone;
    std::thread watcher([&gone, limit] {
      if (gone.WaitForNotificationWithTimeout(limit)) return;
      spdlog::warn("something does not end (a disk that hangs?): exit now");
      spdlog::shutdown();
      std::_Exit(kExitOk);
    });
    daemon.reset();
    gone.Notify();
    watcher.join();
  }

  const CommandLine command_;
  DaemonConfig config_;
  const ServiceNotify notify_;
  const std::optional<absl::Duration> watchdog_;
};

void RaiseFileLimit() {
  rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    const rlim_t before = limit.rlim_cur;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) == 0) {
      spdlog::debug("open files: {} at most, {} before", limit.rlim_max,
                    before);
    }
  }
}

// One flag per key of the schema.
void AddConfigFlags(CLI::App& app, CommandLine& command) {
  for (const ConfigKey& key : ConfigSchema()) {
    const std::string name(key.name);
    app.add_option_function<std::string>(
           "--" + name,
           [&command, name](const std::string& text) {
             command.flags.emplace_back(name, text);
           },
           std::string(key.description))
        ->default_str(FormatConfigKey(DaemonConfig(), key))
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast)
        ->group("Configuration (also keys of the file)");
  }
}

int LarderdMain(int argc, char** argv) {
  CLI::App app("larderd keeps the KV cache of LLM inference engines.");
  app.set_version_flag("--version", absl::StrCat("larderd ", kVersion));
  app.footer(
      "Examples:\n"
      "  larderd --dram.capacity 8GiB --nvme.path /var/lib/larder\n"
      "  larderd --config /etc/larder/larderd.toml --check-config\n"
      "  larderd --print-config > larderd.toml\n"
      "Signals: SIGTERM and SIGINT drain and exit (a second one: at once), "
      "SIGHUP reads\nthe configuration and opens the log anew.");
  CommandLine command;
  app.add_option("--config,-c", command.config_path,
                 absl::StrCat("configuration file (default ", kDefaultConfig,
                              " if it exists)"));
  app.add_flag("--check-config", command.check_config,
               "check the configuration and exit: 0 accepted, 2 refused");
  app.add_flag("--print-config", command.print_config,
               "print the effective configuration as commented TOML and exit");
  app.add_flag("--help-config", command.help_config,
               "print every key as a Markdown table and exit");
  AddConfigFlags(app, command);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kExitOk : kExitUsage;
  }
  if (command.help_config) {
    std::fputs(ConfigTable().c_str(), stdout);
    return kExitOk;
  }
  struct stat info;
  if (command.config_path.empty() && stat(kDefaultConfig, &info) == 0) {
    command.config_path = kDefaultConfig;
  }
  StatusOr<DaemonConfig> config =
      LoadConfig(command.config_path, command.flags);
  if (!config.ok()) {
    Complain(config.status());
    return kExitUsage;
  }
  if (command.print_config) {
    std::fputs(PrintConfig(*config).c_str(), stdout);
    return kExitOk;
  }
  if (command.check_config) {
    std::puts("larderd: the configuration is accepted");
    return kExitOk;
  }
  if (Status opened = OpenLog(*config); !opened.ok()) {
    Complain(opened);
    return kExitError;
  }
  umask(0077);
  signal(SIGPIPE, SIG_IGN);
  const sigset_t handled = HandledSignals();
  pthread_sigmask(SIG_BLOCK, &handled, nullptr);
  RaiseFileLimit();
  return Main(std::move(command), *std::move(config)).Run();
}

}  // namespace
}  // namespace larder

int main(int argc, char** argv) {
#ifdef NDEBUG
  // Debian's Abseil is built with its checks: every lock would pass through one
  // global graph that looks for deadlocks. Tests keep it.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
#endif
  return larder::LarderdMain(argc, argv);
}
