# Tests of the llama.cpp adapter. The state tests are pure; the engine tests run
# the real library and model, where tools/setup-llama has put them.
larder_test(llama_cpp_state_test
  SRCS ${CMAKE_CURRENT_LIST_DIR}/llama_cpp_state_test.cc
  DEPS larder::llama_cpp_state
  LABELS unit)
larder_fuzz(llama_state DEPS larder::llama_cpp_state)

if(LARDER_WITH_LLAMA)
  larder_test(llama_cpp_engine_test
    SRCS ${CMAKE_CURRENT_LIST_DIR}/llama_cpp_engine_test.cc
    DEPS larder::llama_cpp
    LABELS e2e
    TIMEOUT 900)
  larder_test(llama_cpp_memory_test
    SRCS ${CMAKE_CURRENT_LIST_DIR}/llama_cpp_memory_test.cc
    DEPS larder::llama_cpp
    LABELS unit)
  larder_test(llama_cpp_prefix_test
    SRCS ${CMAKE_CURRENT_LIST_DIR}/llama_cpp_prefix_test.cc
    DEPS larder::llama_cpp larder::transport_local larder::tiers_dram
      larder::tiers_nvme
    LABELS unit)
  foreach(test llama_cpp_engine_test llama_cpp_memory_test
      llama_cpp_prefix_test)
    target_compile_definitions(${test} PRIVATE
      LARDER_DEPS_DIR="${LARDER_DEPS_DIR}")
  endforeach()
endif()
