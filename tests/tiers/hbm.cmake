larder_device_test(hbm_tier_test SRCS hbm_tier_test.cc DEPS larder::tiers_hbm THREADS)
