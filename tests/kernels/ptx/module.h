#ifndef LARDER_TESTS_KERNELS_PTX_MODULE_H_
#define LARDER_TESTS_KERNELS_PTX_MODULE_H_

// PTX, the assembly that nvcc makes of CUDA C++ (NVIDIA, "PTX ISA", version
// 9.0), as instructions that machine.h executes. Modelled is what nvcc makes of
// this project's kernels: sm_80-class code, of tensor cores mma.m16n8k16 of 16
// bits, without textures, clusters and calls. Whatever else is met is an error
// that names the line; nothing is skipped in silence.

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <absl/status/status.h>
#include <absl/status/statusor.h>
#include <absl/strings/string_view.h>

namespace larder::kernels::ptx {

enum class Op : uint8_t {
  kAbs,
  kActiveMask,
  kAdd,
  kAnd,
  kAtom,
  kBarrier,
  kBarrierWarp,
  kBfe,
  kBfi,
  kBfind,
  kBranch,
  kBranchIndexed,
  kBrev,
  kClz,
  kCopyAsync,
  kCopyCommit,
  kCopyWait,     // all but the `a` latest groups
  kCopyWaitAll,  // groups or not
  kCos,
  kCvt,
  kCvtPack,
  kCvta,
  kDiv,
  kDp2a,
  kDp4a,
  kEx2,
  kExit,
  kFence,
  kFma,
  kLd,
  kLg2,
  kLop3,
  kMad,
  kMatchAll,
  kMatchAny,
  kMax,
  kMin,
  kMma,  // m16n8k16 of f16 or bf16, sums of f32
  kMov,
  kMul,
  kNeg,
  kNot,
  kOr,
  kPopc,
  kPrefetch,
  kPrmt,
  kRcp,
  kRed,
  kRedux,
  kRem,
  kRsqrt,
  kSad,
  kSelp,
  kSetp,
  kShf,
  kShfl,
  kShl,
  kShr,
  kSin,
  kSqrt,
  kSt,
  kSub,
  kTanh,
  kTrap,
  kVote,
  kXor,
};

enum class Kind : uint8_t {
  kBits,
  kUnsigned,
  kSigned,
  kFloat,
  kBfloat,
  kE4m3,
  kE5m2,
  kPredicate
};

struct Type {
  Kind kind = Kind::kBits;
  uint8_t bits = 32;  // of all lanes
  uint8_t lanes =
      1;  // 2: two numbers in one register, the first in the low half

  friend bool operator==(const Type&, const Type&) = default;
};

enum class Space : uint8_t {
  kGeneric,
  kGlobal,
  kShared,
  kLocal,
  kParam,
  kConst
};

// In setp: a comparison; the unordered ones are also true where an operand is
// NaN.
enum class Comparison : uint8_t { kEq, kNe, kLt, kLe, kGt, kGe, kNumber, kNan };

enum class Combination : uint8_t { kNone, kAnd, kOr, kXor };

// What else tells instructions of one Op apart.
enum class Variant : uint8_t {
  kNone,
  kAdd,
  kMin,
  kMax,
  kAnd,
  kOr,
  kXor,
  kExchange,
  kCompareAndSwap,
  kIncrement,
  kDecrement,
  kBallot,
  kAny,
  kAll,
  kUniform,
  kIndex,
  kUp,
  kDown,
  kButterfly,
  kLeft,
  kRight,
  kLowHalf,
  kHighHalf,
  kForward4,
  kTo,  // cvta.to
  kShiftAmount,
};

enum class Rounding : uint8_t {
  kNearest,
  kZero,
  kDown,
  kUp,
  kIntegerNearest,
  kIntegerZero,
  kIntegerDown,
  kIntegerUp,
};

struct Operand {
  enum class Kind : uint8_t {
    kNone,
    kRegister,
    kImmediate,
    kSpecial,
    kAddress,  // [reg + value], or [value] where reg < 0
    kVector,
    kSink,  // _
  };
  struct Element {
    int32_t reg = -1;  // < 0: the value (of a source), or nowhere (as a sink)
    uint64_t value = 0;
  };

  Kind kind = Kind::kNone;
  bool negated = false;         // a predicate with !
  bool dynamic_shared = false;  // the value counts from there
  uint8_t count = 0;            // elements of a vector
  int32_t reg = -1;             // of a special register: a value of Special
  uint64_t value = 0;
  std::array<Element, 4> elements;
};

enum Special : int32_t {
  kTid,  // x, y, z
  kNtid = 3,
  kCtaid = 6,
  kNctaid = 9,
  kLaneId = 12,
  kWarpId,
  kNwarpId,
  kMaskEq,
  kMaskLt,
  kMaskLe,
  kMaskGt,
  kMaskGe,
  kDynamicSharedBytes,
  kTotalSharedBytes,
};

struct Instruction {
  Op op = Op::kExit;
  Type type;         // of the result
  Type source_type;  // of the operands, where it is another
  Space space = Space::kGeneric;
  Variant variant = Variant::kNone;
  Comparison comparison = Comparison::kEq;
  Combination combination = Combination::kNone;
  Rounding rounding = Rounding::kNearest;
  bool unordered = false;
  bool saturate = false;
  bool relu = false;
  bool flush = false;  // ftz: subnormal numbers of 32 bits are zeros
  bool wide = false;
  bool high = false;
  bool clamp = false;
  uint8_t vector = 1;  // elements of a load or store
  int32_t guard = -1;
  bool guard_negated = false;
  int32_t target = -1;  // of a branch; of brx, an index into Kernel::tables
  int line = 0;
  Operand d;   // the result
  Operand d2;  // setp's and shfl's second
  std::array<Operand, 4> sources;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::vector<int32_t>> tables;  // brx's targets
  int32_t registers = 0;
  uint32_t param_bytes = 0;
  uint32_t shared_bytes = 0;  // dynamic shared memory begins here
  uint32_t local_bytes = 0;
  uint32_t max_threads = 0;  // of launch bounds; 0: none
};

// A variable of the module, in global or constant memory. Launches share it.
struct Variable {
  std::string name;
  bool constant = false;
  uint32_t bytes = 0;
  struct Free {
    void operator()(uint8_t* memory) const;
  };
  std::unique_ptr<uint8_t[], Free> data;
};

struct Module {
  std::vector<Kernel> kernels;
  std::vector<Variable> variables;

  // Null where there is none of that name.
  const Kernel* Find(absl::string_view name) const;
};

// Untrusted text is safe: it gives a module or an error that names the line.
absl::StatusOr<Module> Parse(absl::string_view text);

}  // namespace larder::kernels::ptx

#endif  // LARDER_TESTS_KERNELS_PTX_MODULE_H_
