# Mooncake's C calls, by a C99 program beside a daemon.
add_executable(mooncake_c_test mooncake_c_test.c)
set_target_properties(mooncake_c_test PROPERTIES C_STANDARD 99 C_EXTENSIONS OFF)
target_link_libraries(mooncake_c_test PRIVATE larder::mooncake larder_flags)
find_package(Python3 REQUIRED COMPONENTS Interpreter)
add_test(NAME client.mooncake COMMAND Python3::Interpreter
  ${CMAKE_CURRENT_SOURCE_DIR}/with_daemon.py $<TARGET_FILE:larderd>
  $<TARGET_FILE:mooncake_c_test> larder://{socket})
set_tests_properties(client.mooncake PROPERTIES LABELS e2e TIMEOUT 120)
