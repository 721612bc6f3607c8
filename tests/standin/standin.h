#ifndef LARDER_TESTS_STANDIN_STANDIN_H_
#define LARDER_TESTS_STANDIN_STANDIN_H_

// How a test works the stand-in driver (README.md): what it exports besides the
// functions of CUDA.

#include <cstddef>
#include <cstdint>

extern "C" {

// A command in words; answers in `answer` (ended by 0, cut to `size`). Returns
// 0, or -1 with the reason as the answer. Any thread, any time.
//
//   seed N               the order in which things happen
//   memory BYTES         what the device has (1 GiB)
//   attribute N VALUE    of cuDeviceGetAttribute
//   devices N            how many there are; 0: cuInit finds none
//   version N            what cuDriverGetVersion says
//   fail CALL N CODE     the Nth call of CALL from now on returns CODE
//   lose CODE            the context is lost, as after a wild access
//   background 0|1       a thread that runs steps, as a device does unasked
//   calls CALL           how often it was called
//   leaks                what exists and was not given back; empty: nothing
//   reset                as after loading; refused while anything exists
int standinControl(const char* command, char* answer, size_t size);

// A kernel that is run by calling a function of the test.
typedef int (*StandinKernel)(const uint32_t grid[3], uint32_t block_threads,
                             uint32_t shared_bytes, const void* params,
                             size_t params_bytes);
void standinRegisterKernel(const char* name, StandinKernel kernel);

}  // extern "C"

#endif  // LARDER_TESTS_STANDIN_STANDIN_H_
