// How long until a link carries as much as before after its cable was out, as
// a row of `larder bench` (remote.flap).
//
//   link_flap [--down MS] [--rounds N] [--gigabits G] [--silent]
//             [link_peer's options]
//
// Two link_peers in hosts of their own, joined by a network of G Gbit/s, so
// that the network is the bottleneck and not this machine's processors. One
// loads from the other and opens a new link when one is lost. "Back" is the
// beginning, counted from when the cable is in again, of the first half second
// in which at least 95 % came of what came in a half second before. The figure
// is the worst of the rounds.

#include <CLI/CLI.hpp>
#include <poll.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "store/clock.h"
#include "tests/transport/faults/peer_process.h"

namespace larder {
namespace {

constexpr int kWindows =
    5;  // states, which come every 100 ms, in half a second
constexpr double kGoalSeconds = 5;

double MillisecondsNow() {
  return absl::ToDoubleMilliseconds(Clock::Real().Now() - absl::UnixEpoch());
}

void Wait(double milliseconds) {
  ::poll(nullptr, 0, static_cast<int>(milliseconds));
}

// Bytes a millisecond in the half second before states[i].
double RateBefore(const std::vector<PeerProcess::Json>& states, size_t i) {
  const auto& from = states[i - kWindows];
  const auto& to = states[i];
  return (to["verified"].get<double>() - from["verified"].get<double>()) /
         (to["at_ms"].get<double>() - from["at_ms"].get<double>());
}

struct Round {
  double back_seconds = 0;
  double gigabytes_before = 0;  // a second
  int64_t lost = 0;             // links
};

StatusOr<Round> Flap(HostNetwork& network, PeerProcess& client, double down,
                     bool silent) {
  Round round;
  Wait(2000);
  std::vector<double> rates;
  const auto before = client.states();
  if (before.size() < 4 * kWindows) {
    return absl::UnavailableError("too few states");
  }
  for (size_t i = before.size() - 2 * kWindows; i < before.size(); ++i) {
    rates.push_back(RateBefore(before, i));
  }
  std::sort(rates.begin(), rates.end());
  const double rate = rates[rates.size() / 2];
  round.gigabytes_before = rate / 1e6;
  const int64_t lost = client.Count("lost");
  LARDER_RETURN_IF_ERROR(silent ? network.Partition(0, 1)
                                : network.LinkDown(1));
  Wait(down);
  LARDER_RETURN_IF_ERROR(silent ? network.Join(0, 1) : network.LinkUp(1));
  const double up = MillisecondsNow();
  for (;;) {
    const auto states = client.states();
    for (size_t i = before.size() + kWindows; i < states.size(); ++i) {
      const double begin = states[i - kWindows]["at_ms"].get<double>();
      if (begin >= up && RateBefore(states, i) >= 0.95 * rate) {
        round.back_seconds = (begin - up) / 1000;
        round.lost = client.Count("lost") - lost;
        return round;
      }
    }
    if (MillisecondsNow() - up > 60'000) {
      return absl::DeadlineExceededError("not back within a minute");
    }
    Wait(50);
  }
}

Status Run(double down, int rounds, double gigabits, bool silent,
           const std::vector<std::string>& options) {
  LARDER_ASSIGN_OR_RETURN(const auto network, HostNetwork::Create(2));
  LARDER_RETURN_IF_ERROR(
      network->LimitBandwidth(1, static_cast<uint64_t>(gigabits * 1e9)));
  std::vector<std::string> listening = options;
  listening.insert(listening.end(),
                   {"--listen", HostNetwork::Address(1) + ":9400"});
  LARDER_ASSIGN_OR_RETURN(
      const auto server,
      PeerProcess::Start(*network, 1, LARDER_LINK_PEER, listening));
  LARDER_ASSIGN_OR_RETURN(
      const auto client,
      PeerProcess::Start(*network, 0, LARDER_LINK_PEER, options));
  client->Order("stay 1 " + server->address());
  client->Order("load 1048576 16 normal");
  std::vector<Round> all;
  for (int i = 0; i < rounds; ++i) {
    LARDER_ASSIGN_OR_RETURN(all.emplace_back(),
                            Flap(*network, *client, down, silent));
    std::fprintf(stderr, "flap: back after %.2f s, %ld links lost, %.3f GB/s\n",
                 all.back().back_seconds, static_cast<long>(all.back().lost),
                 all.back().gigabytes_before);
  }
  const Round& worst = *std::max_element(
      all.begin(), all.end(), [](const Round& a, const Round& b) {
        return a.back_seconds < b.back_seconds;
      });
  const auto [end, code] = client->Quit();
  if (code != 0 || end["wrong"] != 0 || end["late"] != 0) {
    return absl::DataLossError("bytes were wrong");
  }
  const PeerProcess::Json row = {
      {"name", "remote.flap"},
      {"unit", "s"},
      {"limit", kGoalSeconds},
      {"value", worst.back_seconds},
      {"ratio", worst.back_seconds / kGoalSeconds},
      {"note", absl::StrCat("the cable was out for ", down / 1000, " s; ",
                            worst.lost, " links lost; ", worst.gigabytes_before,
                            " GB/s before; worst of ", rounds)}};
  std::printf("%s\n", PeerProcess::Json::array({row}).dump(2).c_str());
  return absl::OkStatus();
}

}  // namespace
}  // namespace larder

int main(int argc, char** argv) {
  double down = 2000, gigabits = 1;
  int rounds = 3;
  bool silent = false;
  CLI::App app("how long until a link is as it was after its cable was out");
  app.add_option("--down", down, "ms");
  app.add_option("--rounds", rounds, "the worst of so many");
  app.add_option("--gigabits", gigabits, "of the network, a second");
  app.add_flag("--silent", silent,
               "packets are lost further away: no end sees its cable out");
  app.allow_extras();
  CLI11_PARSE(app, argc, argv);
  const larder::Status ran =
      larder::Run(down, rounds, gigabits, silent, app.remaining());
  if (ran.ok()) return 0;
  std::fprintf(stderr, "flap: %s\n", ran.ToString().c_str());
  return 1;
}
