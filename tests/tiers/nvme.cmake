larder_test(nvme_conformance_test
  SRCS nvme/nvme_conformance_test.cc
  DEPS larder::tiers_nvme larder::tiers_index)
