#ifndef LARDER_KERNELS_CUDA_DRIVER_H_
#define LARDER_KERNELS_CUDA_DRIVER_H_

// The door to the CUDA driver. The driver is a library of the machine that is
// opened at run time, or is not there: nothing of Larder links with it, and
// that there is none is an ordinary answer.
//
//   std::string why_not;
//   const auto driver = cuda::Driver::Open({}, &why_not);
//   if (!driver) { log(why_not); ... go on without ... }
//   cuda::DevicePtr memory_dev;
//   if (cuda::Error error = driver->mem_alloc(&memory_dev, bytes)) {
//     log(error.ToString());  // "cuMemAlloc: out of memory (..., 2)"
//   }

#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/driver_types.h"

namespace larder::kernels::cuda {

// What a call of the driver said. True if it is an error. The texts live as
// long as the process.
struct [[nodiscard]] Error {
  Result code = Result::kSuccess;
  const char* call = "";  // "cuMemCreate"
  const char* name = "";  // "CUDA_ERROR_OUT_OF_MEMORY"
  const char* text = "";  // the driver's own words: "out of memory"

  explicit operator bool() const { return code != Result::kSuccess; }
  // "cuMemCreate: out of memory (CUDA_ERROR_OUT_OF_MEMORY, 2)", or "OK".
  std::string ToString() const;
};

// True for errors after which the process's context on the device can do
// nothing any more (a kernel's wild access, the device gone): every later call
// fails alike, its memory is lost, and only a new process gets a new context.
bool LosesContext(Result code);

class Driver;

// One function of the driver, found by name. `version` is that of the CUDA
// release whose form of the function is declared here; `symbol` what that form
// is called in the library, for drivers that cannot look it up by version.
class EntryPoint {
 public:
  EntryPoint(Driver* driver, const char* name, int version, const char* symbol);
  EntryPoint(const EntryPoint&) = delete;
  EntryPoint& operator=(const EntryPoint&) = delete;

  const char* name() const { return name_; }
  int version() const { return version_; }
  const char* symbol() const { return symbol_; }

 protected:
  Error Explain(Result code) const;
  void* address_ = nullptr;

 private:
  friend class Driver;
  const Driver* const driver_;
  const char* const name_;
  const int version_;
  const char* const symbol_;
};

template <typename... Args>
class Call : public EntryPoint {
 public:
  using Pointer = Result (*)(Args...);
  using EntryPoint::EntryPoint;

  Error operator()(Args... args) const {
    const Result code = reinterpret_cast<Pointer>(address_)(args...);
    return code == Result::kSuccess ? Error() : Explain(code);
  }
};

struct DriverOptions {
  // The library. Empty: what the environment's LARDER_CUDA_DRIVER names, or
  // else libcuda.so.1.
  std::string path;
};

// The functions are the driver's own, with its parameters and its rules; each
// is thread-safe, and asynchronous where its last parameter is a stream. Most
// work on the calling thread's current context (context.h).
//
// Thread-safe. The library stays loaded when the object goes: what it began
// may still run.
class Driver {
 public:
  // Opens the library, finds every function, initialises it. Null if there is
  // none, it is too old, or it finds no device; `why_not` (may be null) then
  // says so in a sentence, and what to do.
  static std::unique_ptr<const Driver> Open(const DriverOptions& options,
                                            std::string* why_not);
  // The oldest that is supported, as the driver counts: 12000 = CUDA 12.0.
  static constexpr int kVersionMin = 12000;

  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  int version() const { return version_; }            // 13000 = CUDA 13.0
  int device_count() const { return device_count_; }  // at least 1
  // What was opened, as it was named.
  const std::string& path() const { return path_; }

 private:
  friend class EntryPoint;
  Driver() = default;
  Error Explain(Result code, const char* call) const;
  bool Load(void* library, std::string* why_not);
  bool Start(std::string* why_not);

  std::string path_;
  int version_ = 0;
  int device_count_ = 0;
  std::vector<EntryPoint*> entry_points_;  // those below; first, they add
                                           // themselves to it

  Call<Result, const char**> get_error_name_{this, "cuGetErrorName", 6000,
                                             "cuGetErrorName"};
  Call<Result, const char**> get_error_string_{this, "cuGetErrorString", 6000,
                                               "cuGetErrorString"};
  Call<unsigned> init_{this, "cuInit", 2000, "cuInit"};
  Call<int*> driver_get_version_{this, "cuDriverGetVersion", 2020,
                                 "cuDriverGetVersion"};
  Call<int*> device_get_count_{this, "cuDeviceGetCount", 2000,
                               "cuDeviceGetCount"};

 public:
  // Devices
  Call<Device*, int> device_get{this, "cuDeviceGet", 2000, "cuDeviceGet"};
  Call<char*, int, Device> device_get_name{this, "cuDeviceGetName", 2000,
                                           "cuDeviceGetName"};
  Call<Uuid*, Device> device_get_uuid{this, "cuDeviceGetUuid", 11040,
                                      "cuDeviceGetUuid_v2"};
  Call<size_t*, Device> device_total_mem{this, "cuDeviceTotalMem", 3020,
                                         "cuDeviceTotalMem_v2"};
  Call<int*, DeviceAttribute, Device> device_get_attribute{
      this, "cuDeviceGetAttribute", 2000, "cuDeviceGetAttribute"};

  // Contexts
  Call<ContextHandle*, Device> device_primary_ctx_retain{
      this, "cuDevicePrimaryCtxRetain", 7000, "cuDevicePrimaryCtxRetain"};
  Call<Device> device_primary_ctx_release{
      this, "cuDevicePrimaryCtxRelease", 11000, "cuDevicePrimaryCtxRelease_v2"};
  Call<ContextHandle> ctx_push_current{this, "cuCtxPushCurrent", 4000,
                                       "cuCtxPushCurrent_v2"};
  Call<ContextHandle*> ctx_pop_current{this, "cuCtxPopCurrent", 4000,
                                       "cuCtxPopCurrent_v2"};
  Call<ContextHandle*> ctx_get_current{this, "cuCtxGetCurrent", 4000,
                                       "cuCtxGetCurrent"};
  Call<> ctx_synchronize{this, "cuCtxSynchronize", 2000, "cuCtxSynchronize"};

  // Streams
  Call<Stream*, unsigned> stream_create{this, "cuStreamCreate", 2000,
                                        "cuStreamCreate"};
  Call<Stream> stream_destroy{this, "cuStreamDestroy", 4000,
                              "cuStreamDestroy_v2"};
  Call<Stream> stream_synchronize{this, "cuStreamSynchronize", 2000,
                                  "cuStreamSynchronize"};
  Call<Stream> stream_query{this, "cuStreamQuery", 2000, "cuStreamQuery"};
  Call<Stream, Event, unsigned> stream_wait_event{this, "cuStreamWaitEvent",
                                                  3020, "cuStreamWaitEvent"};
  Call<Stream, DevicePtr, uint32_t, unsigned> stream_wait_value32{
      this, "cuStreamWaitValue32", 11070, "cuStreamWaitValue32_v2"};
  Call<Stream, DevicePtr, uint32_t, unsigned> stream_write_value32{
      this, "cuStreamWriteValue32", 11070, "cuStreamWriteValue32_v2"};
  Call<Stream, HostFunction, void*> launch_host_func{this, "cuLaunchHostFunc",
                                                     10000, "cuLaunchHostFunc"};

  // Events
  Call<Event*, unsigned> event_create{this, "cuEventCreate", 2000,
                                      "cuEventCreate"};
  Call<Event> event_destroy{this, "cuEventDestroy", 4000, "cuEventDestroy_v2"};
  Call<Event, Stream> event_record{this, "cuEventRecord", 2000,
                                   "cuEventRecord"};
  Call<Event> event_query{this, "cuEventQuery", 2000, "cuEventQuery"};
  Call<Event> event_synchronize{this, "cuEventSynchronize", 2000,
                                "cuEventSynchronize"};
  Call<float*, Event, Event> event_elapsed_time{this, "cuEventElapsedTime",
                                                2000, "cuEventElapsedTime"};

  // Copies
  Call<DevicePtr, const void*, size_t, Stream> memcpy_h2d_async{
      this, "cuMemcpyHtoDAsync", 3020, "cuMemcpyHtoDAsync_v2"};
  Call<void*, DevicePtr, size_t, Stream> memcpy_d2h_async{
      this, "cuMemcpyDtoHAsync", 3020, "cuMemcpyDtoHAsync_v2"};
  Call<DevicePtr, DevicePtr, size_t, Stream> memcpy_d2d_async{
      this, "cuMemcpyDtoDAsync", 3020, "cuMemcpyDtoDAsync_v2"};
  Call<DevicePtr, unsigned char, size_t, Stream> memset_d8_async{
      this, "cuMemsetD8Async", 3020, "cuMemsetD8Async"};
  Call<DevicePtr, unsigned, size_t, Stream> memset_d32_async{
      this, "cuMemsetD32Async", 3020, "cuMemsetD32Async"};

  // Device memory
  Call<DevicePtr*, size_t> mem_alloc{this, "cuMemAlloc", 3020, "cuMemAlloc_v2"};
  Call<DevicePtr> mem_free{this, "cuMemFree", 3020, "cuMemFree_v2"};
  Call<size_t*, size_t*> mem_get_info{this, "cuMemGetInfo", 3020,
                                      "cuMemGetInfo_v2"};

  // Physical memory and addresses, apart
  Call<size_t*, const MemAllocationProp*, Granularity>
      mem_get_allocation_granularity{this, "cuMemGetAllocationGranularity",
                                     10020, "cuMemGetAllocationGranularity"};
  Call<DevicePtr*, size_t, size_t, DevicePtr, unsigned long long>
      mem_address_reserve{this, "cuMemAddressReserve", 10020,
                          "cuMemAddressReserve"};
  Call<DevicePtr, size_t> mem_address_free{this, "cuMemAddressFree", 10020,
                                           "cuMemAddressFree"};
  Call<MemHandle*, size_t, const MemAllocationProp*, unsigned long long>
      mem_create{this, "cuMemCreate", 10020, "cuMemCreate"};
  Call<MemHandle> mem_release{this, "cuMemRelease", 10020, "cuMemRelease"};
  Call<DevicePtr, size_t, size_t, MemHandle, unsigned long long> mem_map{
      this, "cuMemMap", 10020, "cuMemMap"};
  Call<DevicePtr, size_t> mem_unmap{this, "cuMemUnmap", 10020, "cuMemUnmap"};
  Call<DevicePtr, size_t, const MemAccessDesc*, size_t> mem_set_access{
      this, "cuMemSetAccess", 10020, "cuMemSetAccess"};
  // With HandleType::kPosixFileDescriptor, `shareable` points to an int.
  Call<void*, MemHandle, HandleType, unsigned long long>
      mem_export_to_shareable_handle{this, "cuMemExportToShareableHandle",
                                     10020, "cuMemExportToShareableHandle"};
  // ... and here the descriptor is the pointer's value; it stays the caller's.
  Call<MemHandle*, void*, HandleType> mem_import_from_shareable_handle{
      this, "cuMemImportFromShareableHandle", 10020,
      "cuMemImportFromShareableHandle"};

  // Host memory that the device can reach
  Call<void**, size_t, unsigned> mem_host_alloc{this, "cuMemHostAlloc", 2020,
                                                "cuMemHostAlloc"};
  Call<void*> mem_free_host{this, "cuMemFreeHost", 2000, "cuMemFreeHost"};
  Call<void*, size_t, unsigned> mem_host_register{this, "cuMemHostRegister",
                                                  6050, "cuMemHostRegister_v2"};
  Call<void*> mem_host_unregister{this, "cuMemHostUnregister", 4000,
                                  "cuMemHostUnregister"};
  Call<DevicePtr*, void*, unsigned> mem_host_get_device_pointer{
      this, "cuMemHostGetDevicePointer", 3020, "cuMemHostGetDevicePointer_v2"};

  // Between processes
  Call<IpcMemHandle*, DevicePtr> ipc_get_mem_handle{this, "cuIpcGetMemHandle",
                                                    4010, "cuIpcGetMemHandle"};
  Call<DevicePtr*, IpcMemHandle, unsigned> ipc_open_mem_handle{
      this, "cuIpcOpenMemHandle", 11000, "cuIpcOpenMemHandle_v2"};
  Call<DevicePtr> ipc_close_mem_handle{this, "cuIpcCloseMemHandle", 4010,
                                       "cuIpcCloseMemHandle"};
  Call<IpcEventHandle*, Event> ipc_get_event_handle{
      this, "cuIpcGetEventHandle", 4010, "cuIpcGetEventHandle"};
  Call<Event*, IpcEventHandle> ipc_open_event_handle{
      this, "cuIpcOpenEventHandle", 4010, "cuIpcOpenEventHandle"};

  // Kernels
  Call<ModuleHandle*, const void*> module_load_data{this, "cuModuleLoadData",
                                                    2000, "cuModuleLoadData"};
  Call<ModuleHandle> module_unload{this, "cuModuleUnload", 2000,
                                   "cuModuleUnload"};
  Call<Function*, ModuleHandle, const char*> module_get_function{
      this, "cuModuleGetFunction", 2000, "cuModuleGetFunction"};
  Call<int*, FunctionAttribute, Function> func_get_attribute{
      this, "cuFuncGetAttribute", 2020, "cuFuncGetAttribute"};
  Call<Function, FunctionAttribute, int> func_set_attribute{
      this, "cuFuncSetAttribute", 9000, "cuFuncSetAttribute"};
  Call<Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
       unsigned, Stream, void**, void**>
      launch_kernel{this, "cuLaunchKernel", 4000, "cuLaunchKernel"};

  // Graphs
  Call<Stream, CaptureMode> stream_begin_capture{
      this, "cuStreamBeginCapture", 10010, "cuStreamBeginCapture_v2"};
  Call<Stream, Graph*> stream_end_capture{this, "cuStreamEndCapture", 10000,
                                          "cuStreamEndCapture"};
  Call<Stream, CaptureStatus*> stream_is_capturing{
      this, "cuStreamIsCapturing", 10000, "cuStreamIsCapturing"};
  Call<GraphExec*, Graph, unsigned long long> graph_instantiate{
      this, "cuGraphInstantiateWithFlags", 11040,
      "cuGraphInstantiateWithFlags"};
  Call<GraphExec, Stream> graph_launch{this, "cuGraphLaunch", 10000,
                                       "cuGraphLaunch"};
  Call<Graph> graph_destroy{this, "cuGraphDestroy", 10000, "cuGraphDestroy"};
  Call<GraphExec> graph_exec_destroy{this, "cuGraphExecDestroy", 10000,
                                     "cuGraphExecDestroy"};
};

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_DRIVER_H_
