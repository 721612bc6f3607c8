# How CUDA kernels are compiled. Every .cu is one family of kernels. For every
# architecture nvcc makes PTX of it, and ptxas makes code of that very PTX: so
# what tests interpret (tests/kernels/ptx) and measure (tests/kernels/gate) is
# what ships. A family's code for all architectures, and PTX for those to come,
# is one fat binary, which is embedded in the library behind image.h.
#
# Nothing of CUDA is linked; without nvcc image.h has no images.

set(LARDER_CUDA AUTO CACHE STRING
  "Compile CUDA kernels: ON, OFF, or AUTO (where nvcc is found; not with sanitizers)")
set_property(CACHE LARDER_CUDA PROPERTY STRINGS AUTO ON OFF)
# Tests need these too.
set(LARDER_CUDA_ARCHITECTURES 80 90 100 120 CACHE INTERNAL "")
set(LARDER_CUDA_FOLDER ${CMAKE_BINARY_DIR}/cuda CACHE INTERNAL "")
set(LARDER_CUDA_FOUND FALSE CACHE INTERNAL "")
# The PTX in the fat binary: what a driver compiles for any other device.
set(LARDER_CUDA_PTX 80)

set(why "LARDER_CUDA is OFF")
if(LARDER_CUDA STREQUAL "AUTO" AND LARDER_SANITIZE)
  set(why "a sanitizer's build")
elseif(LARDER_CUDA)
  find_program(LARDER_NVCC nvcc
    HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(LARDER_NVCC)
    # It may have been found through a link or a script, but knows where it is.
    execute_process(
      COMMAND ${LARDER_NVCC} --dryrun -x cu -c /dev/null -o /dev/null
      OUTPUT_QUIET ERROR_VARIABLE said)
    string(REGEX MATCH "_HERE_=([^\n]*)" said "${said}")
    set(folder "${CMAKE_MATCH_1}")
    find_program(LARDER_PTXAS ptxas HINTS ${folder} NO_DEFAULT_PATH)
    find_program(LARDER_FATBINARY fatbinary HINTS ${folder} NO_DEFAULT_PATH)
    execute_process(COMMAND ${LARDER_NVCC} --version
      OUTPUT_VARIABLE version ERROR_VARIABLE version)
    string(REGEX MATCH "release ([0-9.]+)" version "${version}")
    set(version "${CMAKE_MATCH_1}")
    if(NOT version OR version VERSION_LESS 12.8)
      set(why "${LARDER_NVCC} is older than 12.8, which knows sm_120")
    elseif(NOT LARDER_PTXAS OR NOT LARDER_FATBINARY)
      set(why "no ptxas and fatbinary beside nvcc in '${folder}'")
    else()
      set(LARDER_CUDA_FOUND TRUE CACHE INTERNAL "")
      set(LARDER_CUDA_VERSION ${version} CACHE INTERNAL "")
    endif()
  else()
    set(why "no nvcc in PATH, CUDA_HOME or /usr/local/cuda")
  endif()
endif()
if(LARDER_CUDA_FOUND)
  message(STATUS "CUDA kernels: ${LARDER_NVCC} ${version}")
elseif(LARDER_CUDA STREQUAL "ON")
  message(FATAL_ERROR "CUDA kernels: ${why}")
else()
  message(STATUS "CUDA kernels: not compiled (${why}), nor what tests their PTX and code")
endif()

# larder_ptx(OUTPUT SOURCE ARCHITECTURE [FLAGS...]): PTX of one .cu, made again
# when anything it includes changes.
function(larder_ptx output source architecture)
  add_custom_command(OUTPUT ${output}
    COMMAND ${LARDER_NVCC} -std=c++20 -O2 --expt-relaxed-constexpr -ccbin ${CMAKE_CXX_COMPILER}
      -arch=compute_${architecture} -I${PROJECT_SOURCE_DIR} --ptx ${ARGN}
      -MD -MF ${output}.d -MT ${output} -o ${output} ${source}
    DEPENDS ${source} DEPFILE ${output}.d
    COMMENT "PTX of ${source} for compute_${architecture}" VERBATIM)
endfunction()

# larder_cubin(OUTPUT PTX ARCHITECTURE): code, and in OUTPUT.txt what ptxas says
# of registers and spills.
function(larder_cubin output ptx architecture)
  add_custom_command(OUTPUT ${output} ${output}.txt
    COMMAND ${CMAKE_COMMAND} -DPTXAS=${LARDER_PTXAS} -DARCH=sm_${architecture}
      -DPTX=${ptx} -DOUTPUT=${output}
      -P ${PROJECT_SOURCE_DIR}/kernels/cuda/ptxas.cmake
    DEPENDS ${ptx} ${PROJECT_SOURCE_DIR}/kernels/cuda/ptxas.cmake
    COMMENT "code of ${ptx} for sm_${architecture}" VERBATIM)
endfunction()

# larder_cuda_images(FAMILY...): FAMILY.cu beside the caller's CMakeLists.txt.
# Makes the library larder::cuda_images.
function(larder_cuda_images)
  file(MAKE_DIRECTORY ${LARDER_CUDA_FOLDER})
  set(outputs)
  set(rows)
  set(blobs)
  if(LARDER_CUDA_FOUND)
    foreach(family ${ARGN})
      set(base ${LARDER_CUDA_FOLDER}/${family})
      set(parts)
      set(cubins)
      foreach(architecture ${LARDER_CUDA_ARCHITECTURES})
        set(stem ${base}.${architecture})
        larder_ptx(${stem}.ptx
          ${CMAKE_CURRENT_SOURCE_DIR}/${family}.cu ${architecture})
        larder_cubin(${stem}.cubin ${stem}.ptx ${architecture})
        list(APPEND cubins ${stem}.cubin)
        list(APPEND parts
          --image3=kind=elf,sm=${architecture},file=${stem}.cubin)
      endforeach()
      list(APPEND parts
        --image3=kind=ptx,sm=${LARDER_CUDA_PTX},file=${base}.${LARDER_CUDA_PTX}.ptx)
      add_custom_command(OUTPUT ${base}.fatbin
        COMMAND ${LARDER_FATBINARY} --64 --create=${base}.fatbin ${parts}
        DEPENDS ${cubins} COMMENT "fat binary of ${family}" VERBATIM)
      list(APPEND outputs ${base}.fatbin)
      string(APPEND blobs "LARDER_EMBED(${family}, \"${base}.fatbin\")\n")
      string(APPEND rows "    LARDER_IMAGE(${family}),\n")
    endforeach()
  endif()
  set(LARDER_IMAGE_BLOBS "${blobs}")
  set(LARDER_IMAGE_ROWS "${rows}")
  set(source ${PROJECT_BINARY_DIR}/generated/cuda_images.inc)
  file(CONFIGURE OUTPUT ${source} CONTENT
    "#ifdef LARDER_EMBED\n@LARDER_IMAGE_BLOBS@#endif\n#ifdef LARDER_IMAGE\n@LARDER_IMAGE_ROWS@#endif\n"
    @ONLY)
  larder_library(cuda_images NO_PCH HDRS image.h SRCS image.cc)
  target_include_directories(larder_cuda_images PRIVATE
    ${PROJECT_BINARY_DIR}/generated)
  set_source_files_properties(image.cc PROPERTIES
    OBJECT_DEPENDS "${outputs};${source}")
  set_property(GLOBAL PROPERTY LARDER_CUDA_FAMILIES ${ARGN})
endfunction()
