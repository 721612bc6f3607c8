larder_test(nvme_conformance_test
  SRCS nvme/nvme_conformance_test.cc
  DEPS larder::tiers_nvme larder::tiers_index)

larder_test(nvme_crash_test
  SRCS nvme/nvme_crash_test.cc
  DEPS larder::tiers_nvme
  LABELS sim)
