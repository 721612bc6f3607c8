larder_test(nvme_conformance_test
  SRCS nvme/nvme_conformance_test.cc
  DEPS larder::tiers_nvme larder::tiers_index
  THREADS)

larder_test(nvme_crash_test
  SRCS nvme/nvme_crash_test.cc
  DEPS larder::tiers_nvme
  LABELS sim)

larder_test(nvme_log_format_test
  SRCS nvme/log_format_test.cc
  DEPS larder::tiers_nvme)

larder_test(nvme_fault_test
  SRCS nvme/nvme_fault_test.cc
  DEPS larder::tiers_nvme larder::tiers_index)

larder_test(io_queue_test
  SRCS nvme/io_queue_test.cc
  DEPS larder::tiers_nvme
  THREADS)

larder_fuzz(nvme_log DEPS larder::tiers_nvme)
