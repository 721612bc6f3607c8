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

  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  file(GLOB model ${LARDER_DEPS_DIR}/model/*.gguf)
  add_test(NAME client.llama_server_loop COMMAND Python3::Interpreter
    ${CMAKE_CURRENT_LIST_DIR}/with_daemon.py $<TARGET_FILE:larderd>
    ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/llama_server_loop_test.py
    $<TARGET_FILE:llama_server_loop> ${model} ${LARDER_DEPS_DIR}/llama/lib
    ${PROJECT_SOURCE_DIR}/tools/llama_demo/prose.txt {socket})
  set_tests_properties(client.llama_server_loop PROPERTIES
    LABELS e2e TIMEOUT 900)
endif()
