# liblarder.so.0, and what is installed with it.
include(CMakePackageConfigHelpers)

# CMake's absl targets name shared libraries; an engine must not have to have
# them, nor meet our version of them. The archives lie beside.
get_target_property(absl_library absl::status LOCATION)
get_filename_component(absl_folder ${absl_library} DIRECTORY)
file(GLOB absl_archives ${absl_folder}/libabsl_*.a)
# Those for programs with flags and tests.
list(FILTER absl_archives EXCLUDE REGEX "flags|scoped_set_env|mock|test")
find_library(LARDER_XXHASH_ARCHIVE NAMES libxxhash.a)
find_library(LARDER_ZSTD_ARCHIVE NAMES libzstd.a)
if(NOT absl_archives OR NOT LARDER_XXHASH_ARCHIVE OR NOT LARDER_ZSTD_ARCHIVE)
  message(FATAL_ERROR
    "liblarder.so needs the archives (.a) of Abseil, xxHash and zstd")
endif()

add_library(larder_shared SHARED abseil_in_shared.cc)
add_library(larder::larder ALIAS larder_shared)
set_target_properties(larder_shared PROPERTIES
  OUTPUT_NAME larder
  EXPORT_NAME larder
  VERSION ${PROJECT_VERSION}
  SOVERSION ${PROJECT_VERSION_MAJOR}
  LINK_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/liblarder.map)
target_include_directories(larder_shared SYSTEM PRIVATE
  $<TARGET_PROPERTY:absl::status,INTERFACE_INCLUDE_DIRECTORIES>)
target_include_directories(larder_shared INTERFACE
  $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}>
  $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
# Daemons of other hosts: by TLS, and by UCX if it is there at run time.
set(remote_objects $<TARGET_OBJECTS:larder_client_remote>)
set(remote_archives larder_transport_remote larder_transport_tls larder_transport_tcp
  larder_transport_link)
if(NOT LARDER_CORE_ONLY)
  list(APPEND remote_objects $<TARGET_OBJECTS:larder_ucx_at_run_time>)
  list(APPEND remote_archives larder_transport_ucx)
endif()
target_sources(larder_shared PRIVATE ${remote_objects})
list(TRANSFORM remote_archives REPLACE "(.+)" "$<TARGET_FILE:\\1>"
  OUTPUT_VARIABLE remote_files)
# As files, so that what these libraries depend on does not come along.
add_dependencies(larder_shared larder_client larder_codec larder_cuda larder_cuda_images larder_kernels
  larder_transport_local larder_store ${remote_archives})
target_link_libraries(larder_shared PRIVATE
  -Wl,--whole-archive $<TARGET_FILE:larder_client> -Wl,--no-whole-archive
  -Wl,--start-group
  $<TARGET_FILE:larder_codec>
  $<TARGET_FILE:larder_cuda>
  $<TARGET_FILE:larder_cuda_images>
  $<TARGET_FILE:larder_kernels>
  ${remote_files}
  $<TARGET_FILE:larder_transport_local>
  $<TARGET_FILE:larder_store>
  ${absl_archives}
  ${LARDER_XXHASH_ARCHIVE}
  ${LARDER_ZSTD_ARCHIVE}
  -Wl,--end-group
  OpenSSL::SSL OpenSSL::Crypto Threads::Threads ${CMAKE_DL_LIBS})
set_property(TARGET larder_shared APPEND PROPERTY LINK_DEPENDS
  $<TARGET_FILE:larder_client> $<TARGET_FILE:larder_codec>
  $<TARGET_FILE:larder_kernels> $<TARGET_FILE:larder_transport_local>
  $<TARGET_FILE:larder_store> ${remote_files})
target_link_options(larder_shared PRIVATE
  # Threads and thread-local text of ours may outlive a dlclose.
  -Wl,-z,nodelete
  -Wl,--gc-sections -Wl,--as-needed
  -Wl,--version-script=${CMAKE_CURRENT_SOURCE_DIR}/liblarder.map)
target_link_options(larder_shared PRIVATE
  -static-libstdc++ -static-libgcc -Wl,-z,defs)

install(TARGETS larder_shared EXPORT larder-targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT larder_client)
install(FILES larder.h larder_c.h
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT larder_client)
set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/larder)
install(EXPORT larder-targets NAMESPACE larder::
  DESTINATION ${package_folder} COMPONENT larder_client)
configure_package_config_file(cmake/larder-config.cmake.in larder-config.cmake
  INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(larder-config-version.cmake
  COMPATIBILITY SameMinorVersion)
configure_file(cmake/larder.pc.in larder.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/larder-config.cmake
    ${CMAKE_CURRENT_BINARY_DIR}/larder-config-version.cmake
  DESTINATION ${package_folder} COMPONENT larder_client)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/larder.pc
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT larder_client)
