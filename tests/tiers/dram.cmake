larder_test(page_allocator_test SRCS page_allocator_test.cc DEPS larder::tiers_pages)
larder_test(sealed_memory_test SRCS sealed_memory_test.cc DEPS larder::tiers_dram)
larder_test(dram_tier_test SRCS dram_tier_test.cc DEPS larder::tiers_dram THREADS)
