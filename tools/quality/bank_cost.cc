#include "tools/quality/bank_cost.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "codec/baselines/half.h"
#include "codec/kvc1/bank.h"

namespace larder::quality {
namespace {

constexpr double kEscapeBits = 16;
constexpr uint32_t kEscape = 31;

const TensorProfile& TensorOf(const Profile& profile, size_t layer,
                              bool values) {
  const Profile::Group& group = profile.contents().groups[0];
  return values ? group.values[layer] : group.keys[layer];
}

uint8_t IdOf(const CoefficientTables& tables, size_t coefficients, int level,
             size_t coefficient) {
  // One plane: the finest step.
  return tables
      .base[static_cast<size_t>(level - 1) * 3 * coefficients + coefficient];
}

uint32_t SymbolOf(int number) {
  return std::abs(number) <= 15 ? static_cast<uint32_t>(number + 15) : kEscape;
}

double BitsIn(const kernels::SymbolTable& table, uint32_t symbol) {
  const int end = symbol == 31 ? 4096 : table.start[symbol + 1];
  return 12 - std::log2(end - table.start[symbol]) +
         (symbol == kEscape ? kEscapeBits : 0);
}

// Half a count for what was never seen.
double BitsIn(const std::array<uint32_t, 32>& seen, uint32_t symbol) {
  double total = 0;
  for (const uint32_t count : seen) total += count + 0.5;
  return std::log2(total / (seen[symbol] + 0.5)) +
         (symbol == kEscape ? kEscapeBits : 0);
}

}  // namespace

bool BankCost::Takes(const Profile& profile) {
  const Profile::Contents& contents = profile.contents();
  if (!contents.unrotated_keys || contents.groups.size() != 1) return false;
  const Profile::Group& group = contents.groups[0];
  const auto plain = [](const TensorProfile& tensor) {
    return tensor.transforms.empty();
  };
  return std::all_of(group.keys.begin(), group.keys.end(), plain) &&
         std::all_of(group.values.begin(), group.values.end(), plain);
}

BankCost::BankCost(const Profile& profile, int level)
    : profile_(profile), level_(level) {
  const Profile::Group& group = profile.contents().groups[0];
  for (size_t layer = 0; layer < group.layer_count; ++layer) {
    for (const bool values : {false, true}) {
      const TensorProfile& tensor = TensorOf(profile, layer, values);
      const size_t begin = channels_.size();
      const size_t row = tensor.mean.size();
      for (size_t c = 0; c < row; ++c) {
        channels_.push_back({.id = IdOf(tensor.tables, row, level, c)});
      }
      for (const TensorProfile::Prediction& p : tensor.predictions) {
        for (size_t c = 0; c < p.channel_count; ++c) {
          channels_[begin + p.channel_begin + c].id =
              IdOf(p.tables, p.channel_count, level, c);
        }
      }
    }
  }
}

template <typename Found>
Status BankCost::ForEach(const Capture& capture, Found found) const {
  const Profile::Group& group = profile_.contents().groups[0];
  const size_t row = capture.shape.row();
  const size_t tokens = capture.token_count();
  if (capture.layers.size() != group.layer_count ||
      channels_.size() != 2 * row * group.layer_count) {
    return absl::InvalidArgumentError("the profile is of another model");
  }
  std::vector<int> numbers(row);
  for (size_t layer = 0; layer < group.layer_count; ++layer) {
    for (const bool values : {false, true}) {
      const TensorProfile& tensor = TensorOf(profile_, layer, values);
      const HalfRows& rows = values ? capture.layers[layer].values
                                    : capture.layers[layer].keys_before_rope;
      if (rows.size() != tokens * row) {
        return absl::InvalidArgumentError("a capture without keys before RoPE");
      }
      const float step = tensor.step[static_cast<size_t>(level_ - 1)];
      const size_t first = (2 * layer + (values ? 1 : 0)) * row;
      // The first row of a sequence is kept as it is.
      for (size_t t = capture.position_begin == 0 ? 1 : 0; t < tokens; ++t) {
        for (size_t c = 0; c < row; ++c) {
          const float x =
              baselines::HalfToFloat(rows[t * row + c]) - tensor.mean[c];
          numbers[c] = static_cast<int>(std::clamp(
              std::round(x / (tensor.weight[c] * step)), -32767.0f, 32767.0f));
        }
        std::vector<int> coded = numbers;
        for (const TensorProfile::Prediction& p : tensor.predictions) {
          const int* const block = &numbers[p.channel_begin];
          size_t at = 0;
          for (size_t i = 0; i < p.channel_count; ++i) {
            int64_t sum = 2048;
            for (size_t end = at + p.parents[i]; at < end; ++at) {
              sum += int64_t{p.factor[at]} * block[p.parent[at]];
            }
            coded[p.channel_begin + p.order[i]] -= static_cast<int>(sum >> 12);
          }
        }
        for (size_t c = 0; c < row; ++c) found(first + c, coded[c]);
      }
    }
  }
  return absl::OkStatus();
}

Status BankCost::Train(const Capture& capture) {
  return ForEach(capture, [this](size_t c, int number) {
    Channel& channel = channels_[c];
    if (kvc1::IsWide(channel.id)) {
      const int high = (number + 8) >> 4;
      ++channel.high[SymbolOf(high)];
      ++channel.low[SymbolOf(number - 16 * high)];
    } else {
      ++channel.high[SymbolOf(number)];
    }
  });
}

StatusOr<BankCost::Bits> BankCost::Of(const Capture& capture) const {
  // What each symbol costs, so that logarithms are few.
  struct Costs {
    std::array<double, 32> bank, trained, bank_low, trained_low;
  };
  std::vector<Costs> costs(channels_.size());
  for (size_t c = 0; c < channels_.size(); ++c) {
    const Channel& channel = channels_[c];
    const bool wide = kvc1::IsWide(channel.id);
    const kernels::SymbolTable& table =
        kvc1::BankTable(channel.id - (wide ? kvc1::kBankTables : 0));
    for (uint32_t symbol = 0; symbol < 32; ++symbol) {
      costs[c].bank[symbol] = BitsIn(table, symbol);
      costs[c].trained[symbol] = BitsIn(channel.high, symbol);
      costs[c].bank_low[symbol] = BitsIn(kvc1::LowTable(), symbol);
      costs[c].trained_low[symbol] = BitsIn(channel.low, symbol);
    }
  }
  Bits bits;
  LARDER_RETURN_IF_ERROR(ForEach(capture, [&](size_t c, int number) {
    ++bits.elements;
    int high = number;
    if (kvc1::IsWide(channels_[c].id)) {
      high = (number + 8) >> 4;
      const uint32_t low = SymbolOf(number - 16 * high);
      bits.bank += costs[c].bank_low[low];
      bits.trained += costs[c].trained_low[low];
    }
    bits.bank += costs[c].bank[SymbolOf(high)];
    bits.trained += costs[c].trained[SymbolOf(high)];
  }));
  return bits;
}

}  // namespace larder::quality
