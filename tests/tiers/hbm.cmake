larder_device_test(hbm_tier_test SRCS hbm_tier_test.cc DEPS larder::tiers_hbm THREADS)
larder_device_test(hbm_engine_test SRCS hbm_engine_test.cc
  DEPS larder::tiers_hbm larder::codec THREADS)
