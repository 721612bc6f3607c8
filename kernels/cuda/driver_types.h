#ifndef LARDER_KERNELS_CUDA_DRIVER_TYPES_H_
#define LARDER_KERNELS_CUDA_DRIVER_TYPES_H_

// The part of the CUDA driver API's binary interface that Larder uses, so that
// cuda.h is not needed to build. Values and layouts are NVIDIA's and never
// change; where cuda.h is installed, tests/kernels/driver_abi_test.cc compares
// every one of them with it.

#include <stddef.h>
#include <stdint.h>

namespace larder::kernels::cuda {

// An address in device memory. Under unified addressing (every device of
// today) it means the same to every context of the process.
using DevicePtr = unsigned long long;
using Device = int;
using MemHandle = unsigned long long;  // physical memory, mapped or not

// What the driver hands out; owned by whoever created it.
using ContextHandle = struct ContextObject*;
using Stream = struct StreamObject*;  // null: the legacy default stream
using Event = struct EventObject*;
using ModuleHandle = struct ModuleObject*;
using Function = struct FunctionObject*;
using Graph = struct GraphObject*;
using GraphExec = struct GraphExecObject*;

// Runs on a thread of the driver; must not call the driver, and should be
// short: nothing behind it on its stream begins before it returns.
using HostFunction = void (*)(void* user_data);

// Those codes that somebody here decides by; others keep their number.
enum class Result : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kDeinitialized = 4,
  kStubLibrary = 34,
  kDeviceUnavailable = 46,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kNoBinaryForGpu = 209,
  kEccUncorrectable = 214,
  kUnsupportedPtxVersion = 222,
  kInvalidHandle = 400,
  kIllegalState = 401,
  kNotFound = 500,
  kNotReady = 600,
  kIllegalAddress = 700,
  kLaunchOutOfResources = 701,
  kHostMemoryAlreadyRegistered = 712,
  kHostMemoryNotRegistered = 713,
  kHardwareStackError = 714,
  kIllegalInstruction = 715,
  kMisalignedAddress = 716,
  kInvalidAddressSpace = 717,
  kInvalidPc = 718,
  kLaunchFailed = 719,
  kNotPermitted = 800,
  kNotSupported = 801,
  kSystemDriverMismatch = 803,
  kStreamCaptureUnsupported = 900,
  kStreamCaptureInvalidated = 901,
  kStreamCaptureUnmatched = 903,
  kStreamCaptureUnjoined = 904,
  kStreamCaptureIsolation = 905,
  kStreamCaptureImplicit = 906,
  kCapturedEvent = 907,
  kUnknown = 999,
};

enum class DeviceAttribute : int {
  kWarpSize = 10,
  kMultiprocessorCount = 16,
  kIntegrated = 18,
  kComputeMode = 20,
  kPciBusId = 33,
  kPciDeviceId = 34,
  kL2CacheBytes = 38,
  kUnifiedAddressing = 41,
  kPciDomainId = 50,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kCanUseHostPointerForRegisteredMem = 91,
  kMaxSharedMemoryPerBlockOptin = 97,
  kHostRegisterSupported = 99,
  kVirtualMemoryManagementSupported = 102,
  kPosixFileDescriptorSupported = 103,
  kReadOnlyHostRegisterSupported = 113,
  kIpcEventSupported = 125,
};

enum class FunctionAttribute : int {
  kMaxThreadsPerBlock = 0,
  kSharedSizeBytes = 1,
  kLocalSizeBytes = 3,
  kNumRegs = 4,
  kMaxDynamicSharedSizeBytes = 8,
};

enum StreamFlags : unsigned {
  kStreamDefault = 0,
  kStreamNonBlocking = 1,  // no order with the legacy default stream
};
enum EventFlags : unsigned {
  kEventDefault = 0,
  kEventBlockingSync = 1,
  kEventDisableTiming = 2,
  kEventInterprocess = 4,  // with kEventDisableTiming
};
enum HostRegisterFlags : unsigned {
  kHostRegisterPortable = 1,
  kHostRegisterDeviceMap = 2,
  kHostRegisterReadOnly = 8,
};
enum HostAllocFlags : unsigned {
  kHostAllocPortable = 1,
  kHostAllocDeviceMap = 2,
};
enum WaitValueFlags : unsigned {
  kWaitValueGeq = 0,  // int32_t(*address - value) >= 0
  kWaitValueEq = 1,
  kWaitValueAnd = 2,
};
enum WriteValueFlags : unsigned {
  // All of the stream's work before it is visible before the value is.
  kWriteValueDefault = 0,
};

enum class CaptureMode : int { kGlobal = 0, kThreadLocal = 1, kRelaxed = 2 };
enum class CaptureStatus : int { kNone = 0, kActive = 1, kInvalidated = 2 };

enum class LocationType : int { kInvalid = 0, kDevice = 1 };
enum class AllocationType : int { kInvalid = 0, kPinned = 1 };
enum class HandleType : int { kNone = 0, kPosixFileDescriptor = 1 };
enum class AccessFlags : int { kNone = 0, kRead = 1, kReadWrite = 3 };
enum class Granularity : int { kMinimum = 0, kRecommended = 1 };

struct MemLocation {
  LocationType type;
  int id;
};

struct MemAllocationProp {
  AllocationType type;
  HandleType requested_handle_types;
  MemLocation location;
  void* win32_handle_meta_data;
  unsigned char compression_type;
  unsigned char gpu_direct_rdma_capable;
  unsigned short usage;
  unsigned char reserved[4];
};

struct MemAccessDesc {
  MemLocation location;
  AccessFlags flags;
};

struct Uuid {
  char bytes[16];
};

// Sent to another process as they are.
struct IpcMemHandle {
  char reserved[64];
};
struct IpcEventHandle {
  char reserved[64];
};
inline constexpr unsigned kIpcMemLazyEnablePeerAccess = 1;

// The keys of cuLaunchKernel's `extra`.
inline void* const kLaunchParamEnd = nullptr;
inline void* const kLaunchParamBufferPointer = reinterpret_cast<void*>(1);
inline void* const kLaunchParamBufferSize = reinterpret_cast<void*>(2);

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_DRIVER_TYPES_H_
