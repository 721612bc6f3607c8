# Installs the client, builds the example against what was installed with CMake
# and with pkg-config, and runs the C99 program of the tests with it.
#   cmake -DBUILD_DIR= -DSOURCE_DIR= -DWORK_DIR= -DC_COMPILER= -DCXX_COMPILER=
#         -DLIB_DIR= [-DLLAMA_DIR=] -P install_test.cmake
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status
    OUTPUT_VARIABLE text ERROR_VARIABLE text)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${ARGN}: ${status}\n${text}")
  endif()
endfunction()

file(REMOVE_RECURSE ${WORK_DIR})
file(MAKE_DIRECTORY ${WORK_DIR}/program)
set(prefix ${WORK_DIR}/prefix)
run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${prefix}
  --component larder_client)

set(example ${SOURCE_DIR}/client/examples/first_steps.cc)
file(WRITE ${WORK_DIR}/program/CMakeLists.txt "
cmake_minimum_required(VERSION 3.16)
project(program CXX)
find_package(larder 0.1 REQUIRED)
add_executable(first_steps ${example})
target_link_libraries(first_steps larder::larder)
target_compile_features(first_steps PRIVATE cxx_std_17)
")
run(${CMAKE_COMMAND} -S ${WORK_DIR}/program -B ${WORK_DIR}/program/build
  -DCMAKE_PREFIX_PATH=${prefix} -DCMAKE_CXX_COMPILER=${CXX_COMPILER})
run(${CMAKE_COMMAND} --build ${WORK_DIR}/program/build)

find_program(PKG_CONFIG pkg-config REQUIRED)
set(ENV{PKG_CONFIG_PATH} ${prefix}/${LIB_DIR}/pkgconfig)
execute_process(COMMAND ${PKG_CONFIG} --define-variable=prefix=${prefix}
    --cflags --libs larder
  OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "pkg-config does not know larder")
endif()
separate_arguments(flags UNIX_COMMAND "${flags}")
run(${CXX_COMPILER} -std=c++17 ${example} ${flags} -o ${WORK_DIR}/by_pkg_config)
run(${C_COMPILER} -std=c99 -pedantic -Wall -Wextra -Werror
  ${SOURCE_DIR}/tests/client/abi_test.c ${flags} -o ${WORK_DIR}/abi_test)
set(ENV{LD_LIBRARY_PATH} ${prefix}/${LIB_DIR})
run(${WORK_DIR}/abi_test)

# The adapters, as packages of their own.
run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${prefix}
  --component larder_mooncake)
set(components mooncake)
set(programs "
add_executable(mooncake_c_test ${SOURCE_DIR}/tests/client/mooncake_c_test.c)
target_link_libraries(mooncake_c_test larder::mooncake)
")
if(LLAMA_DIR)
  run(${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${prefix}
    --component larder_llama)
  set(components "mooncake llama")
  string(APPEND programs "
find_package(nlohmann_json REQUIRED)
add_executable(llama_server_loop
  ${SOURCE_DIR}/client/examples/llama_server_loop.cc)
target_compile_features(llama_server_loop PRIVATE cxx_std_17)
target_include_directories(llama_server_loop PRIVATE ${LLAMA_DIR}/include)
target_link_directories(llama_server_loop PRIVATE ${LLAMA_DIR}/lib)
target_link_libraries(llama_server_loop larder::llama
  nlohmann_json::nlohmann_json
  -l:libllama.v0.5.0.so -l:libggml.v0.5.0.so -l:libggml-base.so)
")
endif()
file(MAKE_DIRECTORY ${WORK_DIR}/adapters)
file(WRITE ${WORK_DIR}/adapters/CMakeLists.txt "
cmake_minimum_required(VERSION 3.16)
project(adapters C CXX)
find_package(larder 0.1 REQUIRED COMPONENTS ${components})
${programs}
find_package(larder 0.1 COMPONENTS nonsense)
if(larder_FOUND)
  message(FATAL_ERROR \"an adapter that is not there was found\")
endif()
")
run(${CMAKE_COMMAND} -S ${WORK_DIR}/adapters -B ${WORK_DIR}/adapters/build
  -DCMAKE_PREFIX_PATH=${prefix} -DCMAKE_CXX_COMPILER=${CXX_COMPILER}
  -DCMAKE_C_COMPILER=${C_COMPILER})
run(${CMAKE_COMMAND} --build ${WORK_DIR}/adapters/build)
