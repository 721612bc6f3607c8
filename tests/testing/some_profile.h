#ifndef LARDER_TESTS_TESTING_SOME_PROFILE_H_
#define LARDER_TESTS_TESTING_SOME_PROFILE_H_

// A codec profile of any shape, without a model: sensible enough to be coded
// with, and another one for every seed.

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>

#include "gtest/gtest.h"

#include "codec/kvc1/bank.h"
#include "codec/kvc1/layer_format.h"
#include "codec/profile.h"

namespace larder {

struct SomeProfile {
  std::string model = "some";
  uint16_t layers = 2, heads = 4, key_dim = 64, value_dim = 64;
  uint8_t levels = 3;
  bool unrotated_keys = true;
  uint32_t seed = 1;
  int trellis_planes = 0;  // 1 or 2: along a trellis, with tables for so many
  Profile::Format format = Profile::Format::kCompressed;

  std::shared_ptr<const Profile> Make() const {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(0, 1);
    Profile::Contents contents;
    contents.model_name = model;
    contents.made_by = "a test";
    contents.unrotated_keys = unrotated_keys;
    contents.level_count = levels;
    Profile::Group group;
    group.layer_count = layers;
    group.kv_head_count = heads;
    group.key_dim = key_dim;
    group.value_dim = value_dim;
    for (int level = 0; level < levels; ++level) {
      contents.divergence.push_back(0.001f * static_cast<float>(1 << level));
    }
    const auto tensor = [&](uint32_t channels) {
      TensorProfile out;
      for (uint32_t c = 0; c < channels; ++c) {
        out.mean.push_back(uniform(random) - 0.5f);
        out.weight.push_back(0.5f + uniform(random));
      }
      for (int level = 0; level < levels; ++level) {
        out.step.push_back(0.0625f * static_cast<float>(1 << level));
        const int position = kvc1::ScalePosition(2.0f / out.step.back());
        for (int coarser = 0; coarser < 3; ++coarser) {
          out.tables.base.insert(
              out.tables.base.end(), channels,
              static_cast<uint8_t>(kvc1::BankId(2, position, coarser)));
        }
        for (int coarser = 1; coarser < 3; ++coarser) {
          out.tables.refinement.insert(
              out.tables.refinement.end(), channels,
              static_cast<uint8_t>(kvc1::RefinementId(2, position, coarser)));
        }
      }
      const uint32_t block = kvc1::TileGrid::BlockHeads(64) * 64;
      for (uint32_t at = 0; at < channels && trellis_planes > 0; at += block) {
        TensorProfile::Prediction& from = out.predictions.emplace_back();
        const uint32_t n = std::min(block, channels - at);
        from.channel_begin = at;
        from.channel_count = n;
        for (uint16_t c = 0; c < n; ++c) from.order.push_back(c);
        from.parents.assign(n, 0);
        from.tables.base.assign(size_t{3} * levels * n, out.tables.base[0]);
        from.tables.refinement.assign(size_t{2} * levels * n,
                                      out.tables.refinement[0]);
        from.trellis_tables.assign(size_t{levels} * n, out.tables.base[0]);
        if (trellis_planes < 2) continue;
        from.nested_tables.assign(size_t{3} * levels * n,
                                  out.tables.refinement[0]);
      }
      return out;
    };
    for (uint16_t layer = 0; layer < layers; ++layer) {
      group.keys.push_back(tensor(uint32_t{heads} * key_dim));
      group.values.push_back(tensor(uint32_t{heads} * value_dim));
    }
    contents.groups = {std::move(group)};
    auto profile = Profile::Make(std::move(contents), format);
    EXPECT_TRUE(profile.ok()) << profile.status();
    return profile.ok() ? *profile : nullptr;
  }
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_SOME_PROFILE_H_
