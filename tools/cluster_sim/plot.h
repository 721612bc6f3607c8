#ifndef LARDER_TOOLS_CLUSTER_SIM_PLOT_H_
#define LARDER_TOOLS_CLUSTER_SIM_PLOT_H_

#include <string>
#include <utility>
#include <vector>

namespace larder::cluster_sim {

// Lines over one axis.
struct Plot {
  struct Series {
    std::string name;
    std::vector<std::pair<double, double>> points;  // x ascending
  };
  std::string title, x_label, y_label;
  bool log_x = false;  // by tens
  double y_max = 1;    // from 0
  std::vector<Series> series;
  std::vector<std::pair<double, std::string>> limits;  // horizontal lines
};

// As a picture for a README.
std::string ToSvg(const Plot& plot);

}  // namespace larder::cluster_sim

#endif  // LARDER_TOOLS_CLUSTER_SIM_PLOT_H_
