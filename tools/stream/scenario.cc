#include "tools/stream/scenario.h"

#include <cmath>
#include <random>

namespace larder::stream {
namespace {

// Prefill rates are those of the class of machine, not measured here: about
// 12 000 tokens/s at the start of a prompt for 8 B parameters on one GPU,
// halved by attention at 32k tokens; 1 500 tokens/s for 135 M on some cores.
constexpr client::PrefillModel kGpu{0.002, 80e-6, 2.4e-9};
constexpr client::PrefillModel kCores{0.004, 650e-6, 20e-9};

constexpr Geometry kGeometries[] = {
    {"llama8b-8k", "32 layers x 8 KV heads x 128, 8192 tokens, one GPU", 8192,
     65536, 30e9, 0.0005, 0.4, kGpu},
    {"llama8b-32k", "the same, 32768 tokens", 32768, 65536, 30e9, 0.0005, 1.5,
     kGpu},
    {"smollm2-4k", "30 layers x 3 KV heads x 64, 4096 tokens, CPU, WAN", 4096,
     11520, 1e9, 0.02, 1.2, kCores},
    {"smollm2-8k", "the same, 8192 tokens", 8192, 11520, 1e9, 0.02, 2.5,
     kCores},
};

double Uniform(std::mt19937_64& random) {
  return (static_cast<double>(random() >> 11) + 0.5) * 0x1p-53;
}

double Normal(std::mt19937_64& random) {
  const double radius = std::sqrt(-2 * std::log(Uniform(random)));
  return radius * std::cos(2 * M_PI * Uniform(random));
}

}  // namespace

PlaneModel PlaneModel::Default() {
  return {{{1.3, 0.09}, {1.5, 0.01}, {1.58, 0.001}}};
}

std::span<const Geometry> Geometries() {
  return kGeometries;
}

double SupplyOf(bool engine, uint64_t seed) {
  std::mt19937_64 random(seed * 0xBF58476D1CE4E5B9u + 3);
  const double least = engine ? 0.15 : 0.25;
  const double most = engine ? 0.7 : 1.2;
  return least * std::pow(most / least, Uniform(random));
}

Case MakeCase(const Scenario& scenario, const PlaneModel& planes) {
  const Geometry& geometry = *scenario.geometry;
  std::mt19937_64 random(scenario.seed * 0xD1B54A32D192ED03u + 7);
  Case result;
  result.deadline = geometry.deadline;
  result.round_trip = geometry.round_trip;
  result.load.start = absl::UnixEpoch();
  result.load.deadline = result.load.start + absl::Seconds(geometry.deadline);
  const double elements =
      static_cast<double>(kChunkTokens) * geometry.elements_per_token;
  const double engine_bias = 0.95 + 0.15 * Uniform(random);
  double all_bytes = 0;
  for (uint32_t first = 0; first < geometry.tokens; first += kChunkTokens) {
    client::StreamChunk chunk;
    chunk.planes = static_cast<uint32_t>(planes.planes.size());
    const double size = std::exp(0.05 * Normal(random));
    for (uint32_t p = 0; p < chunk.planes; ++p) {
      chunk.plane_bytes[p] =
          static_cast<uint64_t>(elements * planes.planes[p].bits / 8 * size);
      chunk.divergence[p] = planes.planes[p].kld;
      chunk.decode[p] = absl::Seconds(elements / geometry.decode_elements);
      all_bytes += static_cast<double>(chunk.plane_bytes[p]);
    }
    const absl::Duration cost = geometry.prefill.Cost(kChunkTokens, first);
    if (scenario.engine) chunk.recompute = cost;
    result.recompute.push_back(absl::ToDoubleSeconds(cost) * engine_bias *
                               std::exp(0.04 * Normal(random)));
    result.load.chunks.push_back(chunk);
  }
  result.rate = scenario.supply * all_bytes / geometry.deadline;
  const double error = std::exp(0.5 * Normal(random));
  if (scenario.seed % 3 != 0) result.prior = result.rate * error;
  return result;
}

}  // namespace larder::stream
