#include "tools/calibrate/predict.h"

#include <Eigen/Dense>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tools/calibrate/tables.h"

namespace larder::calibrate {
namespace {

// About what a rounded Gaussian of this variance takes.
double BitsOfVariance(double variance) {
  return 0.5 * std::log2(1 + 17.08 * std::max(variance, 0.0));
}

Eigen::MatrixXd Covariance(const Integers& integers) {
  const auto n = static_cast<Eigen::Index>(integers.channels);
  const auto rows = static_cast<Eigen::Index>(integers.rows);
  Eigen::MatrixXf centred(rows, n);
  for (Eigen::Index c = 0; c < n; ++c) {
    const int16_t* from = integers.column(static_cast<size_t>(c));
    double sum = 0;
    for (Eigen::Index r = 0; r < rows; ++r) sum += from[r];
    const auto mean = static_cast<float>(sum / static_cast<double>(rows));
    for (Eigen::Index r = 0; r < rows; ++r) centred(r, c) = from[r] - mean;
  }
  const Eigen::MatrixXf product = centred.transpose() * centred;
  return product.cast<double>() / static_cast<double>(rows);
}

double BaseBits(const int16_t* column, size_t rows) {
  Histogram histogram;
  for (size_t r = 0; r < rows; ++r) histogram.Add(column[r]);
  return CheapestBase(histogram).bits;
}

// The parents of `channel` among the first `candidates` of `order`, and their
// factors.
void ChooseParents(const Eigen::MatrixXd& covariance,
                   const std::vector<uint16_t>& order, size_t candidates,
                   uint16_t channel, int max_parents, double worthwhile,
                   std::vector<uint16_t>& parents,
                   std::vector<double>& factors) {
  // Given the parents so far: how much each candidate still says of the
  // channel, and how much of itself is new. One step of a pivoted Cholesky
  // decomposition for each parent.
  const auto n = static_cast<Eigen::Index>(candidates);
  Eigen::VectorXd with(n), own(n);
  for (Eigen::Index i = 0; i < n; ++i) {
    const uint16_t candidate = order[static_cast<size_t>(i)];
    with[i] = covariance(candidate, channel);
    own[i] = covariance(candidate, candidate);
  }
  const Eigen::VectorXd before = own;
  double left = covariance(channel, channel);
  std::vector<Eigen::VectorXd> rows;
  for (int p = 0; p < max_parents; ++p) {
    Eigen::Index best = -1;
    double most = 0;
    for (Eigen::Index i = 0; i < n; ++i) {
      if (own[i] < 1e-3 || own[i] < 1e-3 * before[i]) continue;
      const double gain = with[i] * with[i] / own[i];
      if (gain > most) {
        most = gain;
        best = i;
      }
    }
    if (best < 0 ||
        BitsOfVariance(left) - BitsOfVariance(left - most) < worthwhile) {
      break;
    }
    const uint16_t chosen = order[static_cast<size_t>(best)];
    parents.push_back(chosen);
    Eigen::VectorXd row(n);
    for (Eigen::Index i = 0; i < n; ++i) {
      row[i] = covariance(order[static_cast<size_t>(i)], chosen);
    }
    for (const Eigen::VectorXd& earlier : rows) row -= earlier * earlier[best];
    const double root = std::sqrt(own[best]);
    row /= root;
    const double share = with[best] / root;
    left -= share * share;
    with -= row * share;
    own -= row.cwiseAbs2();
    own[best] = 0;
    rows.push_back(std::move(row));
  }
  const auto count = static_cast<Eigen::Index>(parents.size());
  if (count == 0) return;
  // Their order says nothing; this one takes the least in a stored profile.
  std::sort(parents.begin(), parents.end());
  Eigen::MatrixXd normal(count, count);
  Eigen::VectorXd right(count);
  for (Eigen::Index a = 0; a < count; ++a) {
    const uint16_t parent = parents[static_cast<size_t>(a)];
    for (Eigen::Index b = 0; b < count; ++b) {
      normal(a, b) = covariance(parent, parents[static_cast<size_t>(b)]);
    }
    normal(a, a) += 1e-6;
    right[a] = covariance(parent, channel);
  }
  const Eigen::VectorXd solved = normal.ldlt().solve(right);
  factors.assign(solved.data(), solved.data() + count);
}

}  // namespace

TensorProfile::Prediction ChoosePrediction(const Integers& integers,
                                           uint32_t channel_begin,
                                           int max_parents, double worthwhile) {
  const Eigen::MatrixXd covariance = Covariance(integers);
  TensorProfile::Prediction prediction;
  prediction.channel_begin = channel_begin;
  prediction.channel_count = static_cast<uint32_t>(integers.channels);
  // Those that vary most say most of the others.
  prediction.order.resize(integers.channels);
  std::iota(prediction.order.begin(), prediction.order.end(), uint16_t{0});
  std::stable_sort(prediction.order.begin(), prediction.order.end(),
                   [&](uint16_t a, uint16_t b) {
                     return covariance(a, a) > covariance(b, b);
                   });
  std::vector<std::vector<uint16_t>> parents(integers.channels);
  std::vector<std::vector<int16_t>> factors(integers.channels);
  for (size_t i = 0; i < integers.channels; ++i) {
    std::vector<double> solved;
    ChooseParents(covariance, prediction.order, i, prediction.order[i],
                  max_parents, worthwhile, parents[i], solved);
    for (const double factor : solved) {
      factors[i].push_back(static_cast<int16_t>(
          std::clamp<long>(std::lround(factor * 4096), -32767, 32767)));
    }
    if (factors[i].size() != parents[i].size()) parents[i].clear();
  }
  const auto fill = [&] {
    prediction.parents.clear();
    prediction.parent.clear();
    prediction.factor.clear();
    for (size_t i = 0; i < integers.channels; ++i) {
      prediction.parents.push_back(static_cast<uint8_t>(parents[i].size()));
      prediction.parent.insert(prediction.parent.end(), parents[i].begin(),
                               parents[i].end());
      prediction.factor.insert(prediction.factor.end(), factors[i].begin(),
                               factors[i].end());
    }
  };
  fill();
  // What least squares promise is not always kept by the tables there are.
  const Integers differences = Differences(prediction, integers);
  for (size_t i = 0; i < integers.channels; ++i) {
    const uint16_t channel = prediction.order[i];
    if (!parents[i].empty() &&
        BaseBits(differences.column(channel), integers.rows) >
            BaseBits(integers.column(channel), integers.rows) -
                worthwhile * static_cast<double>(integers.rows)) {
      parents[i].clear();
      factors[i].clear();
    }
  }
  fill();
  return prediction;
}

Integers Differences(const TensorProfile::Prediction& prediction,
                     const Integers& integers) {
  Integers out = integers;
  std::vector<int32_t> sum(integers.rows);
  size_t at = 0;
  for (size_t i = 0; i < integers.channels; ++i) {
    if (prediction.parents[i] == 0) continue;
    std::fill(sum.begin(), sum.end(), 2048);
    for (int p = 0; p < prediction.parents[i]; ++p, ++at) {
      const int16_t* parent = integers.column(prediction.parent[at]);
      const int32_t factor = prediction.factor[at];
      for (size_t r = 0; r < integers.rows; ++r) sum[r] += factor * parent[r];
    }
    int16_t* column = out.column(prediction.order[i]);
    for (size_t r = 0; r < integers.rows; ++r) {
      column[r] = static_cast<int16_t>(column[r] - (sum[r] >> 12));
    }
  }
  return out;
}

}  // namespace larder::calibrate
