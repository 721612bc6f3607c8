# Tests of the llama.cpp adapter. The state tests are pure; the engine tests run
# the real library and model, where tools/setup-llama has put them.
larder_test(llama_cpp_state_test
  SRCS ${CMAKE_CURRENT_LIST_DIR}/llama_cpp_state_test.cc
  DEPS larder::llama_cpp_state
  LABELS unit)
larder_fuzz(llama_state DEPS larder::llama_cpp_state)
