// The declarations of kernels/cuda/driver_types.h and driver.h against NVIDIA's
// own headers. Built only where those are installed.

#include <cudaTypedefs.h>

#include <cstddef>
#include <string>
#include <type_traits>
#include <vector>

#include "gtest/gtest.h"
#include <cuda.h>

#include "kernels/cuda/driver.h"
#include "tests/testing/cuda_device.h"

namespace larder {
namespace {

// What the calling convention sees of a function: how many parameters, how
// large each is, and whether it is a pointer.
template <typename T>
struct Signature;
template <typename R, typename... Args>
struct Signature<R (*)(Args...)> {
  static std::vector<std::pair<size_t, bool>> Of() {
    return {{sizeof(R), false}, {sizeof(Args), std::is_pointer_v<Args>}...};
  }
};

#define SAME_CALL(member, pfn)                                                 \
  EXPECT_EQ(Signature<decltype(cuda::Driver::member)::Pointer>::Of(),          \
            Signature<pfn>::Of())                                              \
      << #member;                                                              \
  EXPECT_NE(std::string(#pfn).find(std::string(driver->member.name()) + "_v" + \
                                   std::to_string(driver->member.version())),  \
            std::string::npos)                                                 \
      << #member " is " << driver->member.name() << " of "                     \
      << driver->member.version()

TEST(DriverAbi, CallsAreThoseOfTheirVersions) {
  std::string why_not;
  const auto driver = cuda::Driver::Open({LARDER_CUDA_STANDIN}, &why_not);
  ASSERT_NE(driver, nullptr) << why_not;
  SAME_CALL(device_get, PFN_cuDeviceGet_v2000);
  SAME_CALL(device_get_name, PFN_cuDeviceGetName_v2000);
  SAME_CALL(device_get_uuid, PFN_cuDeviceGetUuid_v11040);
  SAME_CALL(device_total_mem, PFN_cuDeviceTotalMem_v3020);
  SAME_CALL(device_get_attribute, PFN_cuDeviceGetAttribute_v2000);
  SAME_CALL(device_primary_ctx_retain, PFN_cuDevicePrimaryCtxRetain_v7000);
  SAME_CALL(device_primary_ctx_release, PFN_cuDevicePrimaryCtxRelease_v11000);
  SAME_CALL(ctx_push_current, PFN_cuCtxPushCurrent_v4000);
  SAME_CALL(ctx_pop_current, PFN_cuCtxPopCurrent_v4000);
  SAME_CALL(ctx_get_current, PFN_cuCtxGetCurrent_v4000);
  SAME_CALL(ctx_synchronize, PFN_cuCtxSynchronize_v2000);
  SAME_CALL(stream_create, PFN_cuStreamCreate_v2000);
  SAME_CALL(stream_destroy, PFN_cuStreamDestroy_v4000);
  SAME_CALL(stream_synchronize, PFN_cuStreamSynchronize_v2000);
  SAME_CALL(stream_query, PFN_cuStreamQuery_v2000);
  SAME_CALL(stream_wait_event, PFN_cuStreamWaitEvent_v3020);
  SAME_CALL(stream_wait_value32, PFN_cuStreamWaitValue32_v11070);
  SAME_CALL(stream_write_value32, PFN_cuStreamWriteValue32_v11070);
  SAME_CALL(launch_host_func, PFN_cuLaunchHostFunc_v10000);
  SAME_CALL(event_create, PFN_cuEventCreate_v2000);
  SAME_CALL(event_destroy, PFN_cuEventDestroy_v4000);
  SAME_CALL(event_record, PFN_cuEventRecord_v2000);
  SAME_CALL(event_query, PFN_cuEventQuery_v2000);
  SAME_CALL(event_synchronize, PFN_cuEventSynchronize_v2000);
  SAME_CALL(event_elapsed_time, PFN_cuEventElapsedTime_v2000);
  SAME_CALL(memcpy_h2d_async, PFN_cuMemcpyHtoDAsync_v3020);
  SAME_CALL(memcpy_d2h_async, PFN_cuMemcpyDtoHAsync_v3020);
  SAME_CALL(memcpy_d2d_async, PFN_cuMemcpyDtoDAsync_v3020);
  SAME_CALL(memset_d8_async, PFN_cuMemsetD8Async_v3020);
  SAME_CALL(memset_d32_async, PFN_cuMemsetD32Async_v3020);
  SAME_CALL(mem_alloc, PFN_cuMemAlloc_v3020);
  SAME_CALL(mem_free, PFN_cuMemFree_v3020);
  SAME_CALL(mem_get_info, PFN_cuMemGetInfo_v3020);
  SAME_CALL(mem_get_allocation_granularity,
            PFN_cuMemGetAllocationGranularity_v10020);
  SAME_CALL(mem_address_reserve, PFN_cuMemAddressReserve_v10020);
  SAME_CALL(mem_address_free, PFN_cuMemAddressFree_v10020);
  SAME_CALL(mem_create, PFN_cuMemCreate_v10020);
  SAME_CALL(mem_release, PFN_cuMemRelease_v10020);
  SAME_CALL(mem_map, PFN_cuMemMap_v10020);
  SAME_CALL(mem_unmap, PFN_cuMemUnmap_v10020);
  SAME_CALL(mem_set_access, PFN_cuMemSetAccess_v10020);
  SAME_CALL(mem_export_to_shareable_handle,
            PFN_cuMemExportToShareableHandle_v10020);
  SAME_CALL(mem_import_from_shareable_handle,
            PFN_cuMemImportFromShareableHandle_v10020);
  SAME_CALL(mem_host_alloc, PFN_cuMemHostAlloc_v2020);
  SAME_CALL(mem_free_host, PFN_cuMemFreeHost_v2000);
  SAME_CALL(mem_host_register, PFN_cuMemHostRegister_v6050);
  SAME_CALL(mem_host_unregister, PFN_cuMemHostUnregister_v4000);
  SAME_CALL(mem_host_get_device_pointer, PFN_cuMemHostGetDevicePointer_v3020);
  SAME_CALL(ipc_get_mem_handle, PFN_cuIpcGetMemHandle_v4010);
  SAME_CALL(ipc_open_mem_handle, PFN_cuIpcOpenMemHandle_v11000);
  SAME_CALL(ipc_close_mem_handle, PFN_cuIpcCloseMemHandle_v4010);
  SAME_CALL(ipc_get_event_handle, PFN_cuIpcGetEventHandle_v4010);
  SAME_CALL(ipc_open_event_handle, PFN_cuIpcOpenEventHandle_v4010);
  SAME_CALL(module_load_data, PFN_cuModuleLoadData_v2000);
  SAME_CALL(module_unload, PFN_cuModuleUnload_v2000);
  SAME_CALL(module_get_function, PFN_cuModuleGetFunction_v2000);
  SAME_CALL(func_get_attribute, PFN_cuFuncGetAttribute_v2020);
  SAME_CALL(func_set_attribute, PFN_cuFuncSetAttribute_v9000);
  SAME_CALL(launch_kernel, PFN_cuLaunchKernel_v4000);
  SAME_CALL(stream_begin_capture, PFN_cuStreamBeginCapture_v10010);
  SAME_CALL(stream_end_capture, PFN_cuStreamEndCapture_v10000);
  SAME_CALL(stream_is_capturing, PFN_cuStreamIsCapturing_v10000);
  SAME_CALL(graph_instantiate, PFN_cuGraphInstantiateWithFlags_v11040);
  SAME_CALL(graph_launch, PFN_cuGraphLaunch_v10000);
  SAME_CALL(graph_destroy, PFN_cuGraphDestroy_v10000);
  SAME_CALL(graph_exec_destroy, PFN_cuGraphExecDestroy_v10000);
}

#define SAME_VALUE(ours, theirs) \
  EXPECT_EQ(static_cast<long>(ours), static_cast<long>(theirs)) << #theirs

TEST(DriverAbi, ValuesAreNvidias) {
  using R = cuda::Result;
  SAME_VALUE(R::kSuccess, CUDA_SUCCESS);
  SAME_VALUE(R::kInvalidValue, CUDA_ERROR_INVALID_VALUE);
  SAME_VALUE(R::kOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY);
  SAME_VALUE(R::kNotInitialized, CUDA_ERROR_NOT_INITIALIZED);
  SAME_VALUE(R::kDeinitialized, CUDA_ERROR_DEINITIALIZED);
  SAME_VALUE(R::kStubLibrary, CUDA_ERROR_STUB_LIBRARY);
  SAME_VALUE(R::kDeviceUnavailable, CUDA_ERROR_DEVICE_UNAVAILABLE);
  SAME_VALUE(R::kNoDevice, CUDA_ERROR_NO_DEVICE);
  SAME_VALUE(R::kInvalidDevice, CUDA_ERROR_INVALID_DEVICE);
  SAME_VALUE(R::kInvalidImage, CUDA_ERROR_INVALID_IMAGE);
  SAME_VALUE(R::kInvalidContext, CUDA_ERROR_INVALID_CONTEXT);
  SAME_VALUE(R::kNoBinaryForGpu, CUDA_ERROR_NO_BINARY_FOR_GPU);
  SAME_VALUE(R::kEccUncorrectable, CUDA_ERROR_ECC_UNCORRECTABLE);
  SAME_VALUE(R::kUnsupportedPtxVersion, CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
  SAME_VALUE(R::kInvalidHandle, CUDA_ERROR_INVALID_HANDLE);
  SAME_VALUE(R::kIllegalState, CUDA_ERROR_ILLEGAL_STATE);
  SAME_VALUE(R::kNotFound, CUDA_ERROR_NOT_FOUND);
  SAME_VALUE(R::kNotReady, CUDA_ERROR_NOT_READY);
  SAME_VALUE(R::kIllegalAddress, CUDA_ERROR_ILLEGAL_ADDRESS);
  SAME_VALUE(R::kLaunchOutOfResources, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
  SAME_VALUE(R::kHostMemoryAlreadyRegistered,
             CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  SAME_VALUE(R::kHostMemoryNotRegistered,
             CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
  SAME_VALUE(R::kHardwareStackError, CUDA_ERROR_HARDWARE_STACK_ERROR);
  SAME_VALUE(R::kIllegalInstruction, CUDA_ERROR_ILLEGAL_INSTRUCTION);
  SAME_VALUE(R::kMisalignedAddress, CUDA_ERROR_MISALIGNED_ADDRESS);
  SAME_VALUE(R::kInvalidAddressSpace, CUDA_ERROR_INVALID_ADDRESS_SPACE);
  SAME_VALUE(R::kInvalidPc, CUDA_ERROR_INVALID_PC);
  SAME_VALUE(R::kLaunchFailed, CUDA_ERROR_LAUNCH_FAILED);
  SAME_VALUE(R::kNotPermitted, CUDA_ERROR_NOT_PERMITTED);
  SAME_VALUE(R::kNotSupported, CUDA_ERROR_NOT_SUPPORTED);
  SAME_VALUE(R::kSystemDriverMismatch, CUDA_ERROR_SYSTEM_DRIVER_MISMATCH);
  SAME_VALUE(R::kStreamCaptureUnsupported,
             CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  SAME_VALUE(R::kStreamCaptureInvalidated,
             CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  SAME_VALUE(R::kStreamCaptureUnmatched, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
  SAME_VALUE(R::kStreamCaptureUnjoined, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
  SAME_VALUE(R::kStreamCaptureIsolation, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
  SAME_VALUE(R::kStreamCaptureImplicit, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
  SAME_VALUE(R::kCapturedEvent, CUDA_ERROR_CAPTURED_EVENT);
  SAME_VALUE(R::kUnknown, CUDA_ERROR_UNKNOWN);

  using A = cuda::DeviceAttribute;
  SAME_VALUE(A::kWarpSize, CU_DEVICE_ATTRIBUTE_WARP_SIZE);
  SAME_VALUE(A::kMultiprocessorCount, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  SAME_VALUE(A::kIntegrated, CU_DEVICE_ATTRIBUTE_INTEGRATED);
  SAME_VALUE(A::kComputeMode, CU_DEVICE_ATTRIBUTE_COMPUTE_MODE);
  SAME_VALUE(A::kPciBusId, CU_DEVICE_ATTRIBUTE_PCI_BUS_ID);
  SAME_VALUE(A::kPciDeviceId, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID);
  SAME_VALUE(A::kL2CacheBytes, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  SAME_VALUE(A::kUnifiedAddressing, CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING);
  SAME_VALUE(A::kPciDomainId, CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID);
  SAME_VALUE(A::kComputeCapabilityMajor,
             CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  SAME_VALUE(A::kComputeCapabilityMinor,
             CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  SAME_VALUE(A::kCanUseHostPointerForRegisteredMem,
             CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM);
  SAME_VALUE(A::kMaxSharedMemoryPerBlockOptin,
             CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  SAME_VALUE(A::kHostRegisterSupported,
             CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED);
  SAME_VALUE(A::kVirtualMemoryManagementSupported,
             CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
  SAME_VALUE(A::kPosixFileDescriptorSupported,
             CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
  SAME_VALUE(A::kReadOnlyHostRegisterSupported,
             CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED);
  SAME_VALUE(A::kIpcEventSupported, CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED);

  using F = cuda::FunctionAttribute;
  SAME_VALUE(F::kMaxThreadsPerBlock, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
  SAME_VALUE(F::kSharedSizeBytes, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
  SAME_VALUE(F::kLocalSizeBytes, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES);
  SAME_VALUE(F::kNumRegs, CU_FUNC_ATTRIBUTE_NUM_REGS);
  SAME_VALUE(F::kMaxDynamicSharedSizeBytes,
             CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);

  SAME_VALUE(cuda::kStreamNonBlocking, CU_STREAM_NON_BLOCKING);
  SAME_VALUE(cuda::kEventBlockingSync, CU_EVENT_BLOCKING_SYNC);
  SAME_VALUE(cuda::kEventDisableTiming, CU_EVENT_DISABLE_TIMING);
  SAME_VALUE(cuda::kEventInterprocess, CU_EVENT_INTERPROCESS);
  SAME_VALUE(cuda::kHostRegisterPortable, CU_MEMHOSTREGISTER_PORTABLE);
  SAME_VALUE(cuda::kHostRegisterDeviceMap, CU_MEMHOSTREGISTER_DEVICEMAP);
  SAME_VALUE(cuda::kHostRegisterReadOnly, CU_MEMHOSTREGISTER_READ_ONLY);
  SAME_VALUE(cuda::kHostAllocPortable, CU_MEMHOSTALLOC_PORTABLE);
  SAME_VALUE(cuda::kHostAllocDeviceMap, CU_MEMHOSTALLOC_DEVICEMAP);
  SAME_VALUE(cuda::kWaitValueGeq, CU_STREAM_WAIT_VALUE_GEQ);
  SAME_VALUE(cuda::kWaitValueEq, CU_STREAM_WAIT_VALUE_EQ);
  SAME_VALUE(cuda::kWaitValueAnd, CU_STREAM_WAIT_VALUE_AND);
  SAME_VALUE(cuda::kWriteValueDefault, CU_STREAM_WRITE_VALUE_DEFAULT);
  SAME_VALUE(cuda::CaptureMode::kGlobal, CU_STREAM_CAPTURE_MODE_GLOBAL);
  SAME_VALUE(cuda::CaptureMode::kThreadLocal,
             CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
  SAME_VALUE(cuda::CaptureMode::kRelaxed, CU_STREAM_CAPTURE_MODE_RELAXED);
  SAME_VALUE(cuda::CaptureStatus::kActive, CU_STREAM_CAPTURE_STATUS_ACTIVE);
  SAME_VALUE(cuda::CaptureStatus::kInvalidated,
             CU_STREAM_CAPTURE_STATUS_INVALIDATED);
  SAME_VALUE(cuda::LocationType::kDevice, CU_MEM_LOCATION_TYPE_DEVICE);
  SAME_VALUE(cuda::AllocationType::kPinned, CU_MEM_ALLOCATION_TYPE_PINNED);
  SAME_VALUE(cuda::HandleType::kPosixFileDescriptor,
             CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  SAME_VALUE(cuda::AccessFlags::kRead, CU_MEM_ACCESS_FLAGS_PROT_READ);
  SAME_VALUE(cuda::AccessFlags::kReadWrite, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  SAME_VALUE(cuda::Granularity::kMinimum, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  SAME_VALUE(cuda::Granularity::kRecommended,
             CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
  SAME_VALUE(cuda::kIpcMemLazyEnablePeerAccess,
             CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
  EXPECT_EQ(cuda::kLaunchParamEnd, CU_LAUNCH_PARAM_END);
  EXPECT_EQ(cuda::kLaunchParamBufferPointer, CU_LAUNCH_PARAM_BUFFER_POINTER);
  EXPECT_EQ(cuda::kLaunchParamBufferSize, CU_LAUNCH_PARAM_BUFFER_SIZE);
}

TEST(DriverAbi, StructsLieAsNvidias) {
  EXPECT_EQ(sizeof(cuda::DevicePtr), sizeof(CUdeviceptr));
  EXPECT_EQ(sizeof(cuda::Device), sizeof(CUdevice));
  EXPECT_EQ(sizeof(cuda::MemHandle), sizeof(CUmemGenericAllocationHandle));
  EXPECT_EQ(sizeof(cuda::Uuid), sizeof(CUuuid));
  EXPECT_EQ(sizeof(cuda::IpcMemHandle), sizeof(CUipcMemHandle));
  EXPECT_EQ(sizeof(cuda::IpcEventHandle), sizeof(CUipcEventHandle));
  EXPECT_EQ(sizeof(cuda::MemLocation), sizeof(CUmemLocation));
  EXPECT_EQ(offsetof(cuda::MemLocation, id), offsetof(CUmemLocation, id));
  using P = cuda::MemAllocationProp;
  EXPECT_EQ(sizeof(P), sizeof(CUmemAllocationProp));
  EXPECT_EQ(offsetof(P, requested_handle_types),
            offsetof(CUmemAllocationProp, requestedHandleTypes));
  EXPECT_EQ(offsetof(P, location), offsetof(CUmemAllocationProp, location));
  EXPECT_EQ(offsetof(P, win32_handle_meta_data),
            offsetof(CUmemAllocationProp, win32HandleMetaData));
  EXPECT_EQ(offsetof(P, compression_type),
            offsetof(CUmemAllocationProp, allocFlags.compressionType));
  EXPECT_EQ(offsetof(P, gpu_direct_rdma_capable),
            offsetof(CUmemAllocationProp, allocFlags.gpuDirectRDMACapable));
  EXPECT_EQ(offsetof(P, usage),
            offsetof(CUmemAllocationProp, allocFlags.usage));
  using D = cuda::MemAccessDesc;
  EXPECT_EQ(sizeof(D), sizeof(CUmemAccessDesc));
  EXPECT_EQ(offsetof(D, flags), offsetof(CUmemAccessDesc, flags));
}

}  // namespace
}  // namespace larder
