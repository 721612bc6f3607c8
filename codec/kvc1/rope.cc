#include "codec/kvc1/rope.h"

#include <bit>
#include <span>
#include <string>
#include <utility>

#include "codec/kvc1/steady_math.h"
#include "store/fingerprint.h"

namespace larder::kvc1 {
namespace {

// Rows of a table are a turn to the block that they lie in, and one within it.
constexpr uint32_t kBlock = 64;
constexpr uint64_t kKeptBytesMax = uint64_t{2} << 20;

struct Turns {
  std::vector<double> cos, sin;

  explicit Turns(size_t count) : cos(count), sin(count) {}
};

Rotation MakeRotation(const Rope& rope, uint64_t first, uint32_t stride,
                      uint32_t rows) {
  const size_t pairs = rope.frequencies.size();
  Rotation made;
  made.rows = rows;
  made.pairs = static_cast<uint32_t>(pairs);
  made.cos.resize(rows * pairs);
  made.sin.resize(rows * pairs);
  if (rows == 0 || pairs == 0) return made;

  std::vector<Spin> spins;
  spins.reserve(pairs);
  for (const double frequency : rope.frequencies) spins.emplace_back(frequency);

  // Turns by 0 to kBlock - 1 positions, one after the other.
  Turns within(kBlock * pairs);
  for (size_t i = 0; i < pairs; ++i) {
    const Turn one = spins[i].At(1);
    within.cos[i] = 1;
    within.cos[pairs + i] = one.cos;
    within.sin[pairs + i] = one.sin;
  }
  const double* step_cos = within.cos.data() + pairs;
  const double* step_sin = within.sin.data() + pairs;
  for (uint32_t k = 2; k < kBlock; ++k) {
    const double* last_cos = within.cos.data() + (k - 1) * pairs;
    const double* last_sin = within.sin.data() + (k - 1) * pairs;
    double* cos = within.cos.data() + k * pairs;
    double* sin = within.sin.data() + k * pairs;
    for (size_t i = 0; i < pairs; ++i) {
      const double c = last_cos[i] * step_cos[i] - last_sin[i] * step_sin[i];
      const double s = last_sin[i] * step_cos[i] + last_cos[i] * step_sin[i];
      cos[i] = c;
      sin[i] = s;
    }
  }

  Turns anchor(pairs);
  uint64_t block = 0;
  for (uint32_t row = 0; row < rows; ++row) {
    const uint64_t position = first + uint64_t{row} * stride;
    if (row == 0 || position / kBlock != block) {
      block = position / kBlock;
      for (size_t i = 0; i < pairs; ++i) {
        const Turn turn = spins[i].At(block * kBlock);
        anchor.cos[i] = turn.cos;
        anchor.sin[i] = turn.sin;
      }
    }
    const double* on_cos = within.cos.data() + position % kBlock * pairs;
    const double* on_sin = within.sin.data() + position % kBlock * pairs;
    const double* from_cos = anchor.cos.data();
    const double* from_sin = anchor.sin.data();
    float* cos = made.cos.data() + row * pairs;
    float* sin = made.sin.data() + row * pairs;
    for (size_t i = 0; i < pairs; ++i) {
      cos[i] =
          static_cast<float>(from_cos[i] * on_cos[i] - from_sin[i] * on_sin[i]);
    }
    for (size_t i = 0; i < pairs; ++i) {
      sin[i] =
          static_cast<float>(from_sin[i] * on_cos[i] + from_cos[i] * on_sin[i]);
    }
  }
  return made;
}

}  // namespace

uint64_t Fingerprint(const Rope& rope) {
  std::string said;
  const auto say = [&said](uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) {
      said.push_back(static_cast<char>(value >> 8 * i));
    }
  };
  say(static_cast<uint64_t>(rope.pairs), 1);
  say(rope.rotary_dim, 4);
  for (const double frequency : rope.frequencies) {
    // 0 and -0 are the same turn.
    say(std::bit_cast<uint64_t>(frequency + 0.0), 8);
  }
  const uint64_t hash = Fingerprint64(std::as_bytes(std::span(said)));
  return hash == 0 ? 1 : hash;
}

std::shared_ptr<const Rotation> RotationFor(const Rope& rope, uint64_t first,
                                            uint32_t stride, uint32_t rows) {
  struct Kept {
    Rope rope;
    uint64_t first = 0;
    uint32_t stride = 0;
    std::shared_ptr<const Rotation> made;
  };
  thread_local Kept kept;
  if (kept.made != nullptr && kept.first == first && kept.stride == stride &&
      kept.made->rows == rows && kept.rope == rope) {
    return kept.made;
  }
  auto made =
      std::make_shared<const Rotation>(MakeRotation(rope, first, stride, rows));
  const uint64_t bytes = 2 * sizeof(float) * made->cos.size();
  if (bytes <= kKeptBytesMax) {
    kept = {rope, first, stride, made};
  }
  return made;
}

}  // namespace larder::kvc1
