// The executor. This file is compiled without instrumentation in sanitizers'
// builds: to them only kernels are code. It says what they have to know by
// their annotations (LARDER_SIMT_TSAN, LARDER_SIMT_ASAN), and touches no memory
// on a fiber that an interceptor would see.

#include "tests/kernels/simt/simt.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <utility>
#include <vector>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#if defined(LARDER_SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#if defined(LARDER_SIMT_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom,
                                    size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save,
                                     const void** bottom_old, size_t* size_old);
void __asan_unpoison_memory_region(const volatile void* at, size_t bytes);
void __asan_poison_memory_region(const volatile void* at, size_t bytes);
}
#endif

// Saves the registers that a call preserves and the stack pointer to *save, and
// goes on where `load` was saved.
#if !defined(__x86_64__)
#error "The executor switches stacks on x86-64 only."
#endif
extern "C" void larder_simt_switch(void** save, void* load);
asm(R"(
.text
.globl larder_simt_switch
.type larder_simt_switch,@function
larder_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size larder_simt_switch,.-larder_simt_switch
)");

namespace simt {

thread_local const Self* self = nullptr;

namespace {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kThreadsMax = 1024;
// Sanitizers' frames are large.
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kPage = 4096;
constexpr size_t kGuardedStack = kStackBytes + kPage;
constexpr uint8_t kPoison = 0xcb;
// What an sm_90 gives a block at most.
constexpr size_t kSharedMax = 227 << 10;
// Behind each shared array, watched.
constexpr size_t kRedZone = 64;
constexpr size_t kCopiesMax = 128;
#if defined(LARDER_SIMT_TSAN)
// To ThreadSanitizer blocks must not seem to have anything in common: neither
// shared memory nor stacks are used twice in a launch.
constexpr bool kReuse = false;
constexpr size_t kArenaBytes = 256 << 20;
#else
constexpr bool kReuse = true;
constexpr size_t kArenaBytes = 512 << 10;
#endif

const Registration* registrations = nullptr;

enum class State : uint8_t { kReady, kAtBarrier, kInWarpOp, kDone };

// Why a launch ends early. Recorded on a fiber, told on the launcher's stack.
enum class Fault : uint8_t {
  kNone,
  kBarrierAfterExit,
  kBarrierElsewhere,
  kNotInMask,
  kLaneExited,
  kWarpOpsDiffer,
  kShuffleOutside,
  kMmaOfPart,
  kMisaligned,
  kTooManyCopies,
  kTooMuchShared,
  kTooManyArrays,
};

struct Fiber {
  Self me;
  State state = State::kReady;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Site site = {nullptr, 0};
  // The warp operation that it is in.
  Op op;
  uint32_t mask, argument, width;
  uint64_t value, result;
  uint32_t warp_syncs = 0;
  // Copies from first_copy to before copies are missing; groups count up.
  uint32_t copies = 0, first_copy = 0, group = 0;
  Copy copy[kCopiesMax];
  uint32_t copy_group[kCopiesMax];
  void* tsan = nullptr;
  void* fake_stack = nullptr;
};

struct Array {
  const void* declaration;
  char* at;
  size_t bytes;
};

// The lanes of a warp that have come to an operation, kept with the lowest lane
// of their mask.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  Op op = Op::kSyncWarp;
  Site site = {nullptr, 0};
};

struct Map {
  explicit Map(size_t size) : bytes(size) {
    void* const got = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) {
      perror("simt: mmap");
      abort();
    }
    data = static_cast<char*>(got);
  }
  ~Map() { munmap(data, bytes); }
  Map(const Map&) = delete;
  Map& operator=(const Map&) = delete;
  char* data;
  size_t bytes;
};

constexpr size_t kSyncsOfThread = 2;

size_t SyncsOfBlock(uint32_t threads) {
  return 2 + kSyncsOfThread * threads;
}

uint32_t Volume(Dim3 size) {
  return size.x * size.y * size.z;
}

class Executor {
 public:
  Executor(const Kernel& kernel, Dim3 grid, Dim3 block, size_t shared_bytes,
           const void* params, const Schedule& schedule);

  std::optional<std::string> Run();

  // On fibers.
  void BlockSync(Site site);
  uint64_t WarpOp(Op op, uint32_t mask, uint64_t value, uint32_t argument,
                  uint32_t width, Site site);
  void Preempt();
  void* Shared(const void* declaration, size_t bytes);
  void Fail(Fault fault, Site site, uint32_t other = 0);
  Fiber& current() { return *current_; }

 private:
  static void Entry();
  void RunBlock(Dim3 index);
  void Prepare(Dim3 index);
  void SwitchTo(Fiber& fiber);
  void SwitchToLauncher(bool for_good = false);
  uint32_t NextFiber();
  void CheckRedZones();
  void Meet(uint32_t first, uint32_t mask);
  void Wake(uint32_t fiber);
  uint32_t IndexOf(const Fiber& fiber) const {
    return static_cast<uint32_t>(&fiber - fibers_.data());
  }
  uint64_t Random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_;
  }
  // An address of this block for barriers (0, 1) or of a thread's warp
  // synchronisations, for the sanitizer.
  void* SyncAddress(uint32_t at) {
    return syncs_.data + (blocks_run_ * SyncsOfBlock(threads_) + at) * 8;
  }
  std::string Told() const;
  std::string Where(const Fiber& fiber) const;

  const Kernel& kernel_;
  const Dim3 grid_, block_;
  const size_t shared_bytes_;
  const Schedule schedule_;
  std::vector<uint64_t> params_;
  const uint32_t threads_;
  Map stacks_;
  Map arena_;
  size_t arena_used_ = 0;
  Map syncs_;
  size_t blocks_run_ = 0;
  std::vector<Fiber> fibers_;
  std::vector<uint32_t> ready_, next_;
  size_t turn_ = 0;
  std::vector<Meeting> meetings_;
  std::vector<uint32_t> exited_;
  uint32_t priority_[kThreadsMax / kLanes];
  Array arrays_[32];
  uint32_t array_count_ = 0;
  size_t block_shared_ = 0;
  Fiber* current_ = nullptr;
  void* launcher_pointer_ = nullptr;
  uint64_t random_;
  uint32_t at_barrier_ = 0, done_ = 0, barriers_ = 0;
  Site barrier_site_ = {nullptr, 0};
  Fault fault_ = Fault::kNone;
  uint32_t fault_fiber_ = 0, fault_other_ = 0;
  std::string error_;
  // For sanitizers.
  [[maybe_unused]] char begin_sync_ = 0, end_sync_ = 0;
  [[maybe_unused]] void* launcher_tsan_ = nullptr;
  [[maybe_unused]] void* launcher_fake_ = nullptr;
  [[maybe_unused]] const void* launcher_bottom_ = nullptr;
  [[maybe_unused]] size_t launcher_size_ = 0;
};

thread_local Executor* executor = nullptr;

Executor::Executor(const Kernel& kernel, Dim3 grid, Dim3 block,
                   size_t shared_bytes, const void* params,
                   const Schedule& schedule)
    : kernel_(kernel),
      grid_(grid),
      block_(block),
      shared_bytes_(shared_bytes),
      schedule_(schedule),
      params_((kernel.params_bytes + 7) / 8),
      threads_(Volume(block)),
      stacks_(threads_ * (kReuse ? 1 : size_t{Volume(grid)}) * kGuardedStack),
      arena_(kArenaBytes),
#if defined(LARDER_SIMT_TSAN)
      syncs_(SyncsOfBlock(threads_) * Volume(grid) * 8),
#else
      syncs_(kPage),
#endif
      fibers_(threads_),
      random_(schedule.seed * 0x9e3779b97f4a7c15u + 0x1234567) {
  memcpy(params_.data(), params, kernel.params_bytes);
  for (uint32_t i = 0; kReuse && i < threads_; ++i) {
    mprotect(stacks_.data + i * kGuardedStack, kPage, PROT_NONE);
  }
  ready_.reserve(threads_);
  next_.reserve(threads_);
  for (uint32_t& priority : priority_) {
    priority = static_cast<uint32_t>(Random());
  }
}

std::string Executor::Where(const Fiber& fiber) const {
  const Self& me = fiber.me;
  char text[512];
  snprintf(text, sizeof text, "%s: block (%u, %u, %u) thread (%u, %u, %u)",
           kernel_.name, me.block.x, me.block.y, me.block.z, me.thread.x,
           me.thread.y, me.thread.z);
  std::string told = text;
  if (fiber.site.file != nullptr) {
    snprintf(text, sizeof text, " at %s:%d", fiber.site.file, fiber.site.line);
    told += text;
  }
  return told;
}

std::string Executor::Told() const {
  const std::string where = Where(fibers_[fault_fiber_]);
  const std::string other = Where(fibers_[fault_other_]);
  switch (fault_) {
    case Fault::kNone:
      return "";
    case Fault::kBarrierAfterExit:
      return where + " enters __syncthreads, but " + std::to_string(done_) +
             " threads of its block have exited";
    case Fault::kBarrierElsewhere:
      return where + " enters another __syncthreads than " + other;
    case Fault::kNotInMask:
      return where + " is not in the mask that it names";
    case Fault::kLaneExited:
      return where + " names a lane that has exited: " + other;
    case Fault::kWarpOpsDiffer:
      return where + " is in another warp operation than " + other;
    case Fault::kShuffleOutside:
      return where + " shuffles from a lane outside the mask";
    case Fault::kMmaOfPart:
      return where + " multiplies matrices in a block without whole warps";
    case Fault::kMisaligned:
      return where + " accesses 16 bytes at an address that is no multiple";
    case Fault::kTooManyCopies:
      return where + " has more copies under way than the executor keeps";
    case Fault::kTooMuchShared:
      return where + " needs more shared memory than a block has";
    case Fault::kTooManyArrays:
      return where + " has more shared arrays than the executor keeps";
  }
  return "";
}

void Executor::SwitchTo(Fiber& fiber) {
  current_ = &fiber;
  self = &fiber.me;
#if defined(LARDER_SIMT_TSAN)
  __tsan_switch_to_fiber(fiber.tsan, 1);
#endif
#if defined(LARDER_SIMT_ASAN)
  __sanitizer_start_switch_fiber(&launcher_fake_, fiber.stack, kStackBytes);
#endif
  larder_simt_switch(&launcher_pointer_, fiber.stack_pointer);
#if defined(LARDER_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(launcher_fake_, nullptr, nullptr);
#endif
}

void Executor::SwitchToLauncher(bool for_good) {
  Fiber* const fiber = current_;
#if defined(LARDER_SIMT_TSAN)
  __tsan_switch_to_fiber(launcher_tsan_, 1);
#endif
#if defined(LARDER_SIMT_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber->fake_stack,
                                 launcher_bottom_, launcher_size_);
#endif
  larder_simt_switch(&fiber->stack_pointer, launcher_pointer_);
#if defined(LARDER_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(fiber->fake_stack, &launcher_bottom_,
                                  &launcher_size_);
#endif
}

void Executor::Fail(Fault fault, Site site, uint32_t other) {
  current_->site = site;
  fault_ = fault;
  fault_fiber_ = IndexOf(*current_);
  fault_other_ = other;
  SwitchToLauncher();  // which does not come back
}

// Where every fiber begins.
void Executor::Entry() {
  Executor* const e = executor;
#if defined(LARDER_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &e->launcher_bottom_,
                                  &e->launcher_size_);
#endif
#if defined(LARDER_SIMT_TSAN)
  __tsan_acquire(&e->begin_sync_);
#endif
  e->kernel_.entry(e->params_.data());
  Fiber& fiber = *e->current_;
  const uint32_t index = e->IndexOf(fiber);
  e->exited_[index / kLanes] |= 1u << index % kLanes;
  fiber.state = State::kDone;
  fiber.site = {nullptr, 0};
  ++e->done_;
  e->SwitchToLauncher(true);
  abort();
}

void Executor::Wake(uint32_t fiber) {
  fibers_[fiber].state = State::kReady;
  next_.push_back(fiber);
}

void Executor::Prepare(Dim3 index) {
  ready_.clear();
  next_.clear();
  turn_ = 0;
  meetings_.assign((threads_ + kLanes - 1) / kLanes * kLanes, {});
  exited_.assign((threads_ + kLanes - 1) / kLanes, 0);
  at_barrier_ = done_ = barriers_ = 0;
  array_count_ = 0;
  block_shared_ = 0;
#if defined(LARDER_SIMT_ASAN)
  __asan_unpoison_memory_region(arena_.data, arena_.bytes);
#endif
  if (kReuse) arena_used_ = 0;
  char* const stacks =
      stacks_.data + (kReuse ? 0 : blocks_run_ * threads_ * kGuardedStack);
  for (uint32_t i = 0; i < threads_; ++i) {
    Fiber& f = fibers_[i];
    f.me = {{i % block_.x, i / block_.x % block_.y, i / (block_.x * block_.y)},
            index,
            block_,
            grid_};
    f.stack = stacks + i * kGuardedStack + kPage;
    f.state = State::kReady;
    f.site = {nullptr, 0};
    f.warp_syncs = 0;
    f.copies = f.first_copy = f.group = 0;
    f.fake_stack = nullptr;
#if defined(LARDER_SIMT_ASAN)
    // What an abandoned fiber left.
    __asan_unpoison_memory_region(f.stack, kStackBytes);
#endif
    // As larder_simt_switch would have left it, one call deep.
    auto* top = reinterpret_cast<uint64_t*>(f.stack + kStackBytes);
    *--top = 0;
    *--top = reinterpret_cast<uint64_t>(&Entry);
    for (int i_register = 0; i_register < 6; ++i_register) *--top = 0;
    *--top = 0x1f80 | uint64_t{0x37f} << 32;  // the defaults of MXCSR and x87
    f.stack_pointer = top;
#if defined(LARDER_SIMT_TSAN)
    f.tsan = __tsan_create_fiber(0);
#endif
    ready_.push_back(i);
  }
}

// Who is next, or threads_ if nobody can be.
uint32_t Executor::NextFiber() {
  if (!schedule_.random) {
    if (turn_ == ready_.size()) {
      ready_.swap(next_);
      next_.clear();
      std::sort(ready_.begin(), ready_.end());
      turn_ = 0;
      if (ready_.empty()) return threads_;
    }
    return ready_[turn_++];
  }
  ready_.insert(ready_.end(), next_.begin(), next_.end());
  next_.clear();
  if (ready_.empty()) return threads_;
  // Of two the one whose warp has the higher priority, so that warps drift far
  // apart; priorities change now and then.
  size_t at = Random() % ready_.size();
  const size_t rival = Random() % ready_.size();
  if (priority_[ready_[rival] / kLanes] > priority_[ready_[at] / kLanes]) {
    at = rival;
  }
  if (Random() % 256 == 0) {
    priority_[Random() % (kThreadsMax / kLanes)] =
        static_cast<uint32_t>(Random());
  }
  const uint32_t fiber = ready_[at];
  ready_[at] = ready_.back();
  ready_.pop_back();
  return fiber;
}

void Executor::CheckRedZones() {
#if defined(LARDER_SIMT_ASAN)
  __asan_unpoison_memory_region(arena_.data, arena_.bytes);
#endif
  for (uint32_t a = 0; a < array_count_; ++a) {
    const char* const end = arrays_[a].at + arrays_[a].bytes;
    for (size_t i = 0; i < kRedZone; ++i) {
      if (static_cast<uint8_t>(end[i]) != kPoison) {
        error_ = std::string(kernel_.name) + ": a shared array of " +
                 std::to_string(arrays_[a].bytes) +
                 " bytes was written behind its end";
        return;
      }
    }
  }
}

void Executor::RunBlock(Dim3 index) {
  Prepare(index);
  while (fault_ == Fault::kNone) {
    const uint32_t next = NextFiber();
    if (next == threads_) break;
    SwitchTo(fibers_[next]);
  }
  self = nullptr;
  current_ = nullptr;
#if defined(LARDER_SIMT_TSAN)
  for (Fiber& f : fibers_) {
    // What an abandoned fiber did is over, too.
    __tsan_switch_to_fiber(f.tsan, 1);
    __tsan_release(&end_sync_);
    __tsan_switch_to_fiber(launcher_tsan_, 1);
    __tsan_destroy_fiber(f.tsan);
  }
#endif
  if (fault_ != Fault::kNone) {
    error_ = Told();
    return;
  }
  if (done_ != threads_) {
    for (const Fiber& f : fibers_) {
      if (f.state == State::kDone) continue;
      error_ = Where(f) + (f.state == State::kAtBarrier
                               ? " waits at a __syncthreads that not all reach"
                               : " waits in a warp operation for lanes of its "
                                 "mask that never come");
      return;
    }
  }
  CheckRedZones();
}

std::optional<std::string> Executor::Run() {
  executor = this;
#if defined(LARDER_SIMT_TSAN)
  launcher_tsan_ = __tsan_get_current_fiber();
  __tsan_release(&begin_sync_);
#endif
  const uint32_t blocks = Volume(grid_);
  std::vector<uint32_t> order(blocks);
  for (uint32_t i = 0; i < blocks; ++i) order[i] = i;
  if (schedule_.random) {
    for (uint32_t i = blocks; i > 1; --i) {
      std::swap(order[i - 1], order[Random() % i]);
    }
  }
  for (const uint32_t i : order) {
    RunBlock({i % grid_.x, i / grid_.x % grid_.y, i / (grid_.x * grid_.y)});
    if (!error_.empty()) break;
    ++blocks_run_;
  }
#if defined(LARDER_SIMT_TSAN)
  __tsan_acquire(&end_sync_);
#endif
#if defined(LARDER_SIMT_ASAN)
  __asan_unpoison_memory_region(arena_.data, arena_.bytes);
  __asan_unpoison_memory_region(stacks_.data, stacks_.bytes);
#endif
  executor = nullptr;
  if (error_.empty()) return std::nullopt;
  return error_;
}

void Executor::BlockSync(Site site) {
  Fiber& fiber = *current_;
  if (done_ != 0) Fail(Fault::kBarrierAfterExit, site);
  if (at_barrier_ == 0) {
    barrier_site_ = site;
  } else if (barrier_site_.line != site.line ||
             strcmp(barrier_site_.file, site.file) != 0) {
    uint32_t other = 0;
    while (fibers_[other].state != State::kAtBarrier) ++other;
    Fail(Fault::kBarrierElsewhere, site, other);
  }
  fiber.site = site;
  fiber.state = State::kAtBarrier;
#if defined(LARDER_SIMT_TSAN)
  void* const sync = SyncAddress(barriers_ & 1);
  __tsan_release(sync);
#endif
  if (++at_barrier_ == threads_) {
    at_barrier_ = 0;
    ++barriers_;
    for (uint32_t i = 0; i < threads_; ++i) Wake(i);
  }
  SwitchToLauncher();
#if defined(LARDER_SIMT_TSAN)
  __tsan_acquire(sync);
#endif
}

// What lanes have of two matrices to what they have of the product.
void MultiplyMatrices(MmaFragments* const* lanes) {
  const bool bf16 = lanes[0]->bf16;
  const auto number = [bf16](uint32_t pair, uint32_t i) {
    const auto bits = static_cast<uint16_t>(pair >> i % 2 * 16);
    if (bf16) return __uint_as_float(uint32_t{bits} << 16);
    return larder::kernels::cuda::WidenF16(bits);
  };
  float a[16][16], b[16][8];
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t row = lane / 4, column = lane % 4 * 2;
    for (uint32_t i = 0; i < 8; ++i) {
      a[row + i / 2 % 2 * 8][column + i / 4 * 8 + i % 2] =
          number(lanes[lane]->a[i / 2], i);
    }
    for (uint32_t i = 0; i < 4; ++i) {
      b[column + i / 2 * 8 + i % 2][row] = number(lanes[lane]->b[i / 2], i);
    }
  }
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = lanes[lane]->c[i];
      for (uint32_t k = 0; k < 16; ++k) {
        // A product of two of bf16 may be too small for f32.
        sum = static_cast<float>(sum + double{a[row][k]} * b[k][column]);
      }
      lanes[lane]->c[i] = sum;
    }
  }
}

// All lanes of the mask are there: gives each its result.
void Executor::Meet(uint32_t first, uint32_t mask) {
  if (fibers_[first + static_cast<uint32_t>(__builtin_ctz(mask))].op ==
      Op::kMma) {
    MmaFragments* lanes[kLanes];
    if (mask != 0xffffffff) Fail(Fault::kMmaOfPart, current_->site);
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] =
          reinterpret_cast<MmaFragments*>(fibers_[first + lane].value);
    }
    MultiplyMatrices(lanes);
    for (uint32_t lane = 0; lane < kLanes; ++lane) Wake(first + lane);
    return;
  }
  uint64_t votes = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1) != 0) {
      votes |= (fibers_[first + lane].value & 1) << lane;
    }
  }
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Fiber& f = fibers_[first + lane];
    const uint32_t segment = lane & ~(f.width - 1);
    uint32_t from = lane;
    switch (f.op) {
      case Op::kSyncWarp:
      case Op::kMma:
        continue;
      case Op::kBallot:
        f.result = votes;
        continue;
      case Op::kMatchAny:
        f.result = 0;
        for (uint32_t l = 0; l < kLanes; ++l) {
          if ((mask >> l & 1) != 0 && fibers_[first + l].value == f.value) {
            f.result |= uint64_t{1} << l;
          }
        }
        continue;
      case Op::kShuffle:
        from = segment + (f.argument & (f.width - 1));
        break;
      case Op::kShuffleUp:
        if (lane >= segment + f.argument) from = lane - f.argument;
        break;
      case Op::kShuffleDown:
        if (lane + f.argument < segment + f.width) from = lane + f.argument;
        break;
      case Op::kShuffleXor:
        if ((lane ^ f.argument) < segment + f.width) from = lane ^ f.argument;
        break;
    }
    if ((mask >> from & 1) == 0) Fail(Fault::kShuffleOutside, f.site);
    f.result = fibers_[first + from].value;
  }
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1) != 0) Wake(first + lane);
  }
}

uint64_t Executor::WarpOp(Op op, uint32_t mask, uint64_t value,
                          uint32_t argument, uint32_t width, Site site) {
  Fiber& fiber = *current_;
  const uint32_t index = IndexOf(fiber);
  const uint32_t first = index & ~(kLanes - 1);
  const uint32_t lane = index - first;
  const uint32_t lanes = std::min(kLanes, threads_ - first);
  if (lanes < kLanes) mask &= (1u << lanes) - 1;
  fiber.op = op;
  fiber.mask = mask;
  fiber.value = value;
  fiber.argument = argument;
  fiber.width = width;
  fiber.site = site;
  if ((mask >> lane & 1) == 0) Fail(Fault::kNotInMask, site);
  if (const uint32_t gone = mask & exited_[index / kLanes]; gone != 0) {
    Fail(Fault::kLaneExited, site,
         first + static_cast<uint32_t>(__builtin_ctz(gone)));
  }
  fiber.state = State::kInWarpOp;
#if defined(LARDER_SIMT_TSAN)
  // Votes and shuffles do not order memory; __syncwarp does.
  const uint32_t turn = fiber.warp_syncs & 1;
  const uint32_t syncs = 2 + first * 2 + turn;
  if (op == Op::kSyncWarp) __tsan_release(SyncAddress(syncs + lane * 2));
#endif
  Meeting& meeting =
      meetings_[first + static_cast<uint32_t>(__builtin_ctz(mask))];
  if (meeting.arrived == 0) {
    meeting = {mask, 0, op, site};
  } else if (meeting.mask != mask || meeting.op != op ||
             meeting.site.line != site.line ||
             strcmp(meeting.site.file, site.file) != 0) {
    Fail(Fault::kWarpOpsDiffer, site,
         first + static_cast<uint32_t>(__builtin_ctz(meeting.arrived)));
  }
  meeting.arrived |= 1u << lane;
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    Meet(first, mask);
  }
  SwitchToLauncher();
#if defined(LARDER_SIMT_TSAN)
  if (op == Op::kSyncWarp) {
    for (uint32_t l = 0; l < kLanes; ++l) {
      if ((mask >> l & 1) != 0) __tsan_acquire(SyncAddress(syncs + l * 2));
    }
    ++fiber.warp_syncs;
  }
#endif
  return fiber.result;
}

void Executor::Preempt() {
  if (!schedule_.random || Random() % 4 != 0) return;
  Wake(IndexOf(*current_));
  SwitchToLauncher();
}

void* Executor::Shared(const void* declaration, size_t bytes) {
  for (uint32_t a = 0; a < array_count_; ++a) {
    if (arrays_[a].declaration == declaration) return arrays_[a].at;
  }
  if (declaration == nullptr) bytes = shared_bytes_;
  if (array_count_ == std::size(arrays_)) {
    Fail(Fault::kTooManyArrays, current_->site);
  }
  const size_t room = (bytes + kRedZone + 127) / 128 * 128;
  block_shared_ += bytes;
  if (block_shared_ > kSharedMax || arena_used_ + room > kArenaBytes) {
    Fail(Fault::kTooMuchShared, current_->site);
  }
  char* const at = arena_.data + arena_used_;
  arena_used_ += room;
  // No memset: sanitizers would see it.
  for (volatile char* c = at; c != at + room; ++c) {
    *c = static_cast<char>(kPoison);
  }
#if defined(LARDER_SIMT_ASAN)
  __asan_poison_memory_region(at + bytes, room - bytes);
#endif
  arrays_[array_count_++] = {declaration, at, bytes};
  return at;
}

}  // namespace

Registration::Registration(const Kernel& registered)
    : kernel(registered), next(registrations) {
  registrations = this;
}

const Kernel* FindKernel(std::string_view name) {
  for (const Registration* r = registrations; r != nullptr; r = r->next) {
    if (name == r->kernel.name) return &r->kernel;
  }
  return nullptr;
}

std::optional<std::string> Launch(const Kernel& kernel, Dim3 grid, Dim3 block,
                                  size_t shared_bytes, const void* params,
                                  size_t params_bytes,
                                  const Schedule& schedule) {
  const std::string name = kernel.name;
  const auto within = [](Dim3 size, uint64_t most) {
    const uint64_t plane = uint64_t{size.x} * size.y;
    return plane != 0 && size.z != 0 && plane <= most && plane * size.z <= most;
  };
  if (params_bytes != kernel.params_bytes) {
    return name + ": parameters of " + std::to_string(params_bytes) +
           " bytes, not " + std::to_string(kernel.params_bytes);
  }
  if (!within(block, std::min(kThreadsMax, kernel.max_threads))) {
    return name + ": blocks of no thread, or of more than " +
           std::to_string(std::min(kThreadsMax, kernel.max_threads));
  }
  if (!within(grid, 1 << 24) || grid.y > 65535 || grid.z > 65535) {
    return name + ": a grid of no block, or of too many";
  }
  if (shared_bytes > kSharedMax) {
    return name + ": more shared memory than a block has";
  }
  if (executor != nullptr) return name + ": launched by a kernel";
  return Executor(kernel, grid, block, shared_bytes, params, schedule).Run();
}

void BlockSync(Site site) {
  executor->BlockSync(site);
}

uint64_t WarpOp(Op op, uint32_t mask, uint64_t value, uint32_t argument,
                uint32_t width, Site site) {
  return executor->WarpOp(op, mask, value, argument, width, site);
}

void Preempt() {
  executor->Preempt();
}

void* Shared(const void* declaration, size_t bytes) {
  return executor->Shared(declaration, bytes);
}

void CheckAligned16(const void* address, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    executor->Fail(Fault::kMisaligned, site);
  }
}

void QueueCopy(Copy copy, Site site) {
  Fiber& f = executor->current();
  if (f.first_copy == f.copies) f.first_copy = f.copies = 0;
  if (f.copies == kCopiesMax) {
    // Those that are there make room.
    for (uint32_t i = f.first_copy; i < f.copies; ++i) {
      f.copy[i - f.first_copy] = f.copy[i];
      f.copy_group[i - f.first_copy] = f.copy_group[i];
    }
    f.copies -= f.first_copy;
    f.first_copy = 0;
    if (f.copies == kCopiesMax) executor->Fail(Fault::kTooManyCopies, site);
  }
  f.copy[f.copies] = copy;
  f.copy_group[f.copies++] = f.group;
}

void CommitCopies() {
  ++executor->current().group;
}

bool NextCopy(uint32_t groups, Copy* copy) {
  Fiber& f = executor->current();
  if (f.first_copy == f.copies ||
      f.copy_group[f.first_copy] + groups >= f.group) {
    return false;
  }
  *copy = f.copy[f.first_copy++];
  return true;
}

}  // namespace simt
