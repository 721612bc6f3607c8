#include "tests/kernels/ptx/machine.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <absl/container/flat_hash_map.h>
#include <absl/status/status.h>
#include <absl/status/statusor.h>
#include <absl/strings/str_cat.h>
#include <absl/strings/string_view.h>

#include "tests/kernels/ptx/arithmetic.h"
#include "tests/kernels/ptx/memory.h"

namespace larder::kernels::ptx {
namespace {

constexpr unsigned kLanes = 32;
constexpr uint8_t kPoison = 0xCB;
constexpr uint64_t kPoisonWord = 0xCBCBCBCBCBCBCBCB;
constexpr size_t kMaxRaces = 8;
constexpr uint64_t kMaxSharedBytes = 1 << 20;
constexpr uint64_t kShadowPage = 256;

// Where generic addresses of other spaces than global are: above all memory of
// a process.
constexpr uint64_t kWindowMask = 0xffffull << 48;
constexpr uint64_t kSharedWindow = 0x7f00ull << 48;
constexpr uint64_t kLocalWindow = 0x7e00ull << 48;
constexpr uint64_t kParamWindow = 0x7d00ull << 48;

uint64_t WindowOf(Space space) {
  switch (space) {
    case Space::kShared:
      return kSharedWindow;
    case Space::kLocal:
      return kLocalWindow;
    case Space::kParam:
      return kParamWindow;
    default:
      return 0;
  }
}

using LaneValues = std::array<uint64_t, kLanes>;

template <typename Function>
void ForLanes(uint32_t mask, Function function) {
  for (; mask != 0; mask &= mask - 1) {
    function(static_cast<unsigned>(std::countr_zero(mask)));
  }
}

class Run {
 public:
  Run(const std::vector<Machine::Allocation>& allocations, const Module& module,
      const Kernel& kernel, const LaunchShape& shape, const uint8_t* params,
      const LaunchOptions& options)
      : kernel_(kernel),
        shape_(shape),
        params_(params),
        options_(options),
        random_(options.seed),
        allocations_(allocations),
        threads_(shape.block[0] * shape.block[1] * shape.block[2]) {
    for (const Variable& variable : module.variables) {
      allocations_.push_back({reinterpret_cast<uint64_t>(variable.data.get()),
                              variable.bytes, !variable.constant,
                              variable.name});
    }
    report_.counts.resize(kernel.code.size());
    for (size_t n = 0; n < kernel.code.size(); ++n) {
      report_.counts[n].instruction = &kernel.code[n];
    }
  }

  absl::StatusOr<Report> Execute() {
    const uint64_t blocks =
        uint64_t{shape_.grid[0]} * shape_.grid[1] * shape_.grid[2];
    std::vector<uint32_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    for (const uint32_t block : order) {
      ExecuteBlock(block);
      if (!error_.ok()) return error_;
    }
    return std::move(report_);
  }

 private:
  enum class Wait : uint8_t { kNone, kBarrier, kCollective };

  struct Copy {
    uint64_t shared;
    const uint8_t* from;
    unsigned bytes;
    unsigned given;  // the rest is zeros
    int32_t instruction;
  };
  struct Warp {
    unsigned index = 0;
    unsigned lanes = 0;
    uint32_t live = 0;
    uint32_t blocked = 0;
    uint32_t epoch = 0;
    std::array<int32_t, kLanes> pc = {};
    std::array<Wait, kLanes> wait = {};
    std::vector<LaneValues> registers;
    // Groups of each lane's copies; the last one is not committed.
    std::array<std::vector<std::vector<Copy>>, kLanes> copies;
  };
  struct Place {
    Space space;
    uint64_t address;
    uint8_t* data;
    bool shadowed;
  };

  void Fail(const Instruction& i, const Warp& warp, unsigned lane,
            absl::string_view what) {
    if (!error_.ok()) return;
    error_ = absl::FailedPreconditionError(
        absl::StrCat(kernel_.name, ", PTX line ", i.line, ", block (",
                     block_[0], ",", block_[1], ",", block_[2], ") thread ",
                     warp.index * kLanes + lane, ": ", what));
  }

  void ExecuteBlock(uint32_t block) {
    block_index_ = block;
    block_ = {block % shape_.grid[0], block / shape_.grid[0] % shape_.grid[1],
              block / shape_.grid[0] / shape_.grid[1]};
    epoch_ = 0;
    const size_t shared = kernel_.shared_bytes + shape_.dynamic_shared_bytes;
    shared_.assign(shared, kPoison);
    in_flight_.assign(shared, 0);
    shared_shadow_.assign(options_.find_races ? shared : 0, Shadow());
    local_.assign(size_t{kernel_.local_bytes} * threads_, kPoison);
    LaneValues poison;
    poison.fill(kPoisonWord);
    warps_.clear();
    warps_.resize((threads_ + kLanes - 1) / kLanes);
    for (unsigned n = 0; n < warps_.size(); ++n) {
      Warp& warp = warps_[n];
      warp.index = n;
      warp.lanes = std::min(kLanes, threads_ - n * kLanes);
      warp.live = warp.lanes == kLanes ? ~0u : (1u << warp.lanes) - 1;
      warp.registers.assign(static_cast<size_t>(kernel_.registers), poison);
    }
    while (error_.ok()) {
      const unsigned first = random_() % warps_.size();
      unsigned tried = 0;
      while (tried < warps_.size() && !Runnable(At(first + tried))) ++tried;
      if (tried == warps_.size()) {
        if (!ReleaseBarrier()) return;
        continue;
      }
      Warp& warp = At(first + tried);
      for (unsigned burst = 1 + random_() % 16;
           burst > 0 && error_.ok() && Runnable(warp); --burst) {
        Step(warp);
        if (++steps_ > options_.max_steps) {
          error_ = absl::ResourceExhaustedError(
              absl::StrCat(kernel_.name, ": more than ", options_.max_steps,
                           " steps; an endless loop?"));
        }
      }
    }
  }

  Warp& At(unsigned n) { return warps_[n % warps_.size()]; }
  static bool Runnable(const Warp& warp) {
    return (warp.live & ~warp.blocked) != 0;
  }

  // Nobody can go on: all wait at the barrier, or the block is done, or it is
  // stuck. False: no more to do.
  bool ReleaseBarrier() {
    unsigned live = 0;
    unsigned waiting = 0;
    int32_t barrier = -1;
    for (const Warp& warp : warps_) {
      ForLanes(warp.live, [&](unsigned lane) {
        ++live;
        if (warp.wait[lane] != Wait::kBarrier) return;
        ++waiting;
        const int32_t at = warp.pc[lane] - 1;
        if (barrier >= 0 && at != barrier) {
          Fail(kernel_.code[at], warp, lane,
               absl::StrCat("waits at another barrier than threads at line ",
                            kernel_.code[barrier].line));
        }
        barrier = at;
      });
    }
    if (live == 0) {
      CheckCopiesEnded();
      return false;
    }
    const Instruction& at = kernel_.code[std::max(barrier, 0)];
    if (waiting != live) {
      Fail(at, warps_[0], 0,
           absl::StrCat("deadlock: ", waiting, " threads wait at a barrier, ",
                        live - waiting, " in a warp's collective"));
    } else if (live != threads_) {
      Fail(at, warps_[0], 0,
           absl::StrCat("a barrier that ", threads_ - live,
                        " threads have left without"));
    }
    if (!error_.ok()) return false;
    for (Warp& warp : warps_) {
      warp.blocked = 0;
      warp.wait.fill(Wait::kNone);
      ++warp.epoch;
    }
    ++epoch_;
    return true;
  }

  void CheckCopiesEnded() {
    for (const Warp& warp : warps_) {
      for (unsigned lane = 0; lane < warp.lanes; ++lane) {
        for (const auto& group : warp.copies[lane]) {
          if (group.empty()) continue;
          Fail(kernel_.code[group[0].instruction], warp, lane,
               "the thread ends, and its cp.async was never waited for");
        }
      }
    }
  }

  uint64_t SpecialValue(int32_t special, const Warp& warp,
                        unsigned lane) const {
    const unsigned thread = warp.index * kLanes + lane;
    const auto& size = shape_.block;
    switch (special) {
      case kTid:
        return thread % size[0];
      case kTid + 1:
        return thread / size[0] % size[1];
      case kTid + 2:
        return thread / size[0] / size[1];
      case kNtid:
      case kNtid + 1:
      case kNtid + 2:
        return size[special - kNtid];
      case kCtaid:
      case kCtaid + 1:
      case kCtaid + 2:
        return block_[special - kCtaid];
      case kNctaid:
      case kNctaid + 1:
      case kNctaid + 2:
        return shape_.grid[special - kNctaid];
      case kLaneId:
        return lane;
      case kWarpId:
        return warp.index;
      case kNwarpId:
        return warps_.size();
      case kMaskEq:
        return 1ull << lane;
      case kMaskLt:
        return (1ull << lane) - 1;
      case kMaskLe:
        return (2ull << lane) - 1;
      case kMaskGt:
        return Mask(~((2ull << lane) - 1), 32);
      case kMaskGe:
        return Mask(~((1ull << lane) - 1), 32);
      case kDynamicSharedBytes:
        return shape_.dynamic_shared_bytes;
      case kTotalSharedBytes:
        return shared_.size();
      default:
        return 0;
    }
  }

  uint64_t Read(const Operand& operand, const Warp& warp, unsigned lane) const {
    switch (operand.kind) {
      case Operand::Kind::kRegister: {
        const uint64_t value = warp.registers[operand.reg][lane];
        return operand.negated ? !(value & 1) : value;
      }
      case Operand::Kind::kSpecial:
        return SpecialValue(operand.reg, warp, lane);
      default:
        return operand.value;
    }
  }
  static uint64_t ReadElement(const Operand::Element& element, const Warp& warp,
                              unsigned lane) {
    return element.reg < 0 ? element.value : warp.registers[element.reg][lane];
  }
  static void Write(int32_t reg, Warp& warp, unsigned lane, uint64_t value) {
    if (reg >= 0) warp.registers[reg][lane] = value;
  }
  uint64_t AddressOf(const Operand& operand, const Warp& warp,
                     unsigned lane) const {
    return operand.value +
           (operand.reg < 0 ? 0 : warp.registers[operand.reg][lane]);
  }

  // What a thread may touch at an address of a space; data is null after an
  // error.
  Place Resolve(const Instruction& i, Space space, uint64_t address,
                unsigned bytes, bool write, const Warp& warp, unsigned lane) {
    Place place = {space, address, nullptr, false};
    if (space == Space::kGeneric) {
      place.space = Space::kGlobal;
      for (const Space window :
           {Space::kShared, Space::kLocal, Space::kParam}) {
        if ((address & kWindowMask) == WindowOf(window)) {
          place.space = window;
          place.address = address & ~kWindowMask;
        }
      }
    }
    const auto inside = [&](size_t size) {
      return place.address <= size && size - place.address >= bytes;
    };
    if (place.address % bytes != 0) {
      Fail(i, warp, lane,
           absl::StrCat("misaligned access of ", bytes, " bytes at 0x",
                        absl::Hex(place.address)));
      return place;
    }
    switch (place.space) {
      case Space::kShared:
        if (!inside(shared_.size())) break;
        for (unsigned n = 0; n < bytes; ++n) {
          if (in_flight_[place.address + n] != 0) {
            Fail(i, warp, lane,
                 "touches shared memory that a cp.async still writes");
            return place;
          }
        }
        place.data = &shared_[place.address];
        place.shadowed = true;
        return place;
      case Space::kLocal: {
        if (!inside(kernel_.local_bytes)) break;
        const size_t thread = warp.index * kLanes + lane;
        place.data = &local_[thread * kernel_.local_bytes + place.address];
        return place;
      }
      case Space::kParam:
        if (!inside(kernel_.param_bytes) || write) break;
        // Only ever read.
        place.data = const_cast<uint8_t*>(params_) + place.address;
        return place;
      default:
        if (const Machine::Allocation* found = Find(place.address, bytes)) {
          if (write && !found->writable) {
            Fail(i, warp, lane,
                 absl::StrCat("writes to ", found->name, ", which is input"));
            return place;
          }
          place.space = Space::kGlobal;
          place.data = reinterpret_cast<uint8_t*>(place.address);
          place.shadowed = found->writable;
          return place;
        }
    }
    Fail(i, warp, lane, OutOfBounds(place, bytes));
    return place;
  }

  const Machine::Allocation* Find(uint64_t address, unsigned bytes) {
    for (size_t n = 0; n < allocations_.size(); ++n) {
      // Most often it is the one of the last time.
      const size_t at = (last_found_ + n) % allocations_.size();
      const Machine::Allocation& a = allocations_[at];
      if (address >= a.base && address - a.base <= a.bytes &&
          a.bytes - (address - a.base) >= bytes) {
        last_found_ = at;
        return &a;
      }
    }
    return nullptr;
  }

  std::string OutOfBounds(const Place& place, unsigned bytes) const {
    absl::string_view where;
    switch (place.space) {
      case Space::kShared:
        where = "shared memory";
        break;
      case Space::kLocal:
        where = "local memory";
        break;
      case Space::kParam:
        where = "parameters";
        break;
      default: {
        const Machine::Allocation* nearest = nullptr;
        uint64_t least = ~0ull;
        for (const Machine::Allocation& a : allocations_) {
          const uint64_t end = a.base + a.bytes;
          const uint64_t distance = place.address < a.base
                                        ? a.base - place.address
                                    : place.address > end ? place.address - end
                                                          : 0;
          if (distance < least) {
            least = distance;
            nearest = &a;
          }
        }
        if (nearest == nullptr) {
          return "global access, and no memory was given";
        }
        return absl::StrCat(bytes, " bytes out of bounds, at ", nearest->name,
                            " + ",
                            static_cast<int64_t>(place.address - nearest->base),
                            " of ", nearest->bytes);
      }
    }
    return absl::StrCat(bytes, " bytes out of bounds of ", where, ", at ",
                        place.address, " of ",
                        place.space == Space::kShared  ? shared_.size()
                        : place.space == Space::kLocal ? kernel_.local_bytes
                                                       : kernel_.param_bytes);
  }

  void Touch(const Instruction& i, Space space, uint64_t address,
             unsigned bytes, bool write, bool atomic, const Warp& warp,
             unsigned lane) {
    if (!options_.find_races) return;
    const auto index = static_cast<int32_t>(&i - kernel_.code.data());
    const Access access = {block_index_, warp.index, lane,  epoch_,
                           warp.epoch,   index,      write, atomic};
    Shadow* shadow;
    if (space == Space::kShared) {
      shadow = &shared_shadow_[address];
    } else {
      // An aligned access lies in one page.
      const uint64_t page = address / kShadowPage;
      if (page != last_page_ || last_shadow_ == nullptr) {
        std::unique_ptr<Shadow[]>& slot = global_shadow_[page];
        if (slot == nullptr) slot = std::make_unique<Shadow[]>(kShadowPage);
        last_page_ = page;
        last_shadow_ = slot.get();
      }
      shadow = last_shadow_ + address % kShadowPage;
    }
    for (unsigned n = 0; n < bytes; ++n) {
      const std::optional<Conflict> conflict = shadow[n].Touch(access);
      if (!conflict || report_.races.size() >= kMaxRaces) continue;
      if (!racing_.insert(std::minmax(conflict->instruction, index)).second) {
        continue;
      }
      report_.races.push_back(absl::StrCat(
          kernel_.name, ": ", space == Space::kShared ? "shared" : "global",
          " memory, block ", block_index_, " thread ",
          warp.index * kLanes + lane, write ? " writes" : " reads",
          " (PTX line ", i.line, ") what another thread ",
          conflict->was_write ? "writes" : "reads", " (line ",
          kernel_.code[conflict->instruction].line, ")"));
    }
  }

  void CountAccess(const Instruction& i, Space space,
                   const LaneValues& addresses, uint32_t mask, unsigned bytes) {
    Count& count = report_.counts[&i - kernel_.code.data()];
    if (space == Space::kShared) {
      ++count.requests;
      count.wavefronts += Wavefronts(addresses, mask, bytes);
      count.ideal_wavefronts += IdealWavefronts(mask, bytes);
    } else if (space == Space::kGlobal) {
      std::array<uint64_t, kLanes> packed;
      size_t n = 0;
      ForLanes(mask, [&](unsigned lane) { packed[n++] = addresses[lane]; });
      const std::span<const uint64_t> active(packed.data(), n);
      ++count.requests;
      count.sectors += Sectors(active, bytes);
      count.ideal_sectors += IdealSectors(active, bytes);
    }
  }

  void Step(Warp& warp) {
    const uint32_t run = warp.live & ~warp.blocked;
    int32_t pc = std::numeric_limits<int32_t>::max();
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (run >> lane & 1) pc = std::min(pc, warp.pc[lane]);
    }
    uint32_t here = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      here |= static_cast<uint32_t>(warp.pc[lane] == pc) << lane;
    }
    here &= run;
    const Instruction& i = kernel_.code[pc];
    uint32_t active = here;
    if (i.guard >= 0) {
      const LaneValues& guard = warp.registers[i.guard];
      ForLanes(here, [&](unsigned lane) {
        if ((guard[lane] & 1) == i.guard_negated) active &= ~(1u << lane);
      });
    }
    ForLanes(here & ~active, [&](unsigned lane) { warp.pc[lane] = pc + 1; });
    if (active == 0) return;
    if (IsCollective(i.op)) {
      Collective(i, warp, active, pc);
      return;
    }
    ForLanes(active, [&](unsigned lane) { warp.pc[lane] = pc + 1; });
    CountExecuted(i, active);
    switch (i.op) {
      case Op::kBranch:
        ForLanes(active, [&](unsigned lane) { warp.pc[lane] = i.target; });
        return;
      case Op::kBranchIndexed: {
        const std::vector<int32_t>& table = kernel_.tables[i.target];
        ForLanes(active, [&](unsigned lane) {
          const uint64_t index = Mask(Read(i.sources[0], warp, lane), 32);
          if (index >= table.size()) {
            Fail(i, warp, lane, "brx.idx past its table");
          } else {
            warp.pc[lane] = table[index];
          }
        });
        return;
      }
      case Op::kExit:
        warp.live &= ~active;
        return;
      case Op::kTrap:
        Fail(i, warp, std::countr_zero(active), "trap");
        return;
      case Op::kBarrier:
        ForLanes(active,
                 [&](unsigned lane) { warp.wait[lane] = Wait::kBarrier; });
        warp.blocked |= active;
        return;
      case Op::kFence:
        return;
      case Op::kLd:
      case Op::kSt:
        LoadOrStore(i, warp, active);
        return;
      case Op::kPrefetch:
        return;
      case Op::kAtom:
      case Op::kRed:
        Atomic(i, warp, active);
        return;
      case Op::kCopyAsync:
        StartCopy(i, warp, active);
        return;
      case Op::kCopyCommit:
      case Op::kCopyWait:
      case Op::kCopyWaitAll:
        ForLanes(active, [&](unsigned lane) { EndCopies(i, warp, lane); });
        return;
      case Op::kActiveMask:
        ForLanes(active,
                 [&](unsigned lane) { Write(i.d.reg, warp, lane, active); });
        return;
      case Op::kMov:
        ForLanes(active, [&](unsigned lane) { Move(i, warp, lane); });
        return;
      case Op::kCvta:
        ForLanes(active, [&](unsigned lane) {
          const uint64_t value = Read(i.sources[0], warp, lane);
          Write(i.d.reg, warp, lane,
                i.variant == Variant::kTo ? value - WindowOf(i.space)
                                          : value + WindowOf(i.space));
        });
        return;
      case Op::kSetp:
        ForLanes(active, [&](unsigned lane) { SetPredicate(i, warp, lane); });
        return;
      default:
        Arithmetic(i, warp, active);
    }
  }

  void CountExecuted(const Instruction& i, uint32_t active) {
    ++report_.warp_instructions;
    report_.thread_instructions += std::popcount(active);
    ++report_.counts[&i - kernel_.code.data()].executed;
  }

  void Arithmetic(const Instruction& i, Warp& warp, uint32_t active) {
    ForLanes(active, [&](unsigned lane) {
      const Sources sources = {
          Read(i.sources[0], warp, lane), Read(i.sources[1], warp, lane),
          Read(i.sources[2], warp, lane), Read(i.sources[3], warp, lane)};
      const std::optional<uint64_t> result = Compute(i, sources);
      if (!result) {
        Fail(i, warp, lane, "not modelled");
        return;
      }
      Write(i.d.reg, warp, lane, *result);
    });
  }

  void Move(const Instruction& i, Warp& warp, unsigned lane) {
    const Operand& source = i.sources[0];
    if (i.d.kind == Operand::Kind::kVector) {
      const int bits = i.type.bits / i.d.count;
      const uint64_t value = Read(source, warp, lane);
      for (int n = 0; n < i.d.count; ++n) {
        Write(i.d.elements[n].reg, warp, lane, Mask(value >> (n * bits), bits));
      }
    } else if (source.kind == Operand::Kind::kVector) {
      const int bits = i.type.bits / source.count;
      uint64_t value = 0;
      for (int n = 0; n < source.count; ++n) {
        value |= Mask(ReadElement(source.elements[n], warp, lane), bits)
                 << (n * bits);
      }
      Write(i.d.reg, warp, lane, value);
    } else {
      Write(i.d.reg, warp, lane, Mask(Read(source, warp, lane), i.type.bits));
    }
  }

  void SetPredicate(const Instruction& i, Warp& warp, unsigned lane) {
    const bool compared = *Compare(i, Read(i.sources[0], warp, lane),
                                   Read(i.sources[1], warp, lane));
    const bool other = Read(i.sources[2], warp, lane) & 1;
    const auto combined = [&](bool value) {
      switch (i.combination) {
        case Combination::kAnd:
          return value && other;
        case Combination::kOr:
          return value || other;
        case Combination::kXor:
          return value != other;
        case Combination::kNone:
          break;
      }
      return value;
    };
    Write(i.d.reg, warp, lane, combined(compared));
    if (i.d2.kind == Operand::Kind::kRegister) {
      Write(i.d2.reg, warp, lane, combined(!compared));
    }
  }

  void LoadOrStore(const Instruction& i, Warp& warp, uint32_t active) {
    const bool load = i.op == Op::kLd;
    const unsigned element = i.type.bits / 8;
    const unsigned bytes = element * i.vector;
    const Operand& value = load ? i.d : i.sources[1];
    LaneValues addresses;
    std::array<uint8_t*, kLanes> data;
    Space space = i.space;
    ForLanes(active, [&](unsigned lane) {
      if (!error_.ok()) return;
      const Place place =
          Resolve(i, i.space, AddressOf(i.sources[0], warp, lane), bytes, !load,
                  warp, lane);
      if (place.data == nullptr) return;
      addresses[lane] = place.address;
      data[lane] = place.data;
      space = place.space;
      if (place.shadowed) {
        Touch(i, place.space, place.address, bytes, !load, false, warp, lane);
      }
    });
    if (!error_.ok()) return;
    CountAccess(i, space, addresses, active, bytes);
    ForLanes(active, [&](unsigned lane) {
      for (unsigned n = 0; n < i.vector; ++n) {
        uint8_t* at = data[lane] + n * element;
        const bool vector = value.kind == Operand::Kind::kVector;
        if (load) {
          uint64_t loaded = 0;
          std::memcpy(&loaded, at, element);
          if (i.type.kind == Kind::kSigned) {
            loaded = SignExtend(loaded, i.type.bits);
          }
          Write(vector ? value.elements[n].reg : value.reg, warp, lane, loaded);
        } else {
          const uint64_t stored =
              vector ? ReadElement(value.elements[n], warp, lane)
                     : Read(value, warp, lane);
          std::memcpy(at, &stored, element);
        }
      }
    });
  }

  void Atomic(const Instruction& i, Warp& warp, uint32_t active) {
    const unsigned bytes = i.type.bits / 8;
    LaneValues addresses;
    Space space = i.space;
    ForLanes(active, [&](unsigned lane) {
      if (!error_.ok()) return;
      const Place place =
          Resolve(i, i.space, AddressOf(i.sources[0], warp, lane), bytes, true,
                  warp, lane);
      if (place.data == nullptr) return;
      addresses[lane] = place.address;
      space = place.space;
      if (place.shadowed) {
        Touch(i, place.space, place.address, bytes, true, true, warp, lane);
      }
      uint64_t old = 0;
      std::memcpy(&old, place.data, bytes);
      const uint64_t stored =
          ComputeAtomic(i, old, Read(i.sources[1], warp, lane),
                        Read(i.sources[2], warp, lane))
              .value_or(0);
      std::memcpy(place.data, &stored, bytes);
      if (i.op == Op::kAtom) Write(i.d.reg, warp, lane, old);
    });
    if (error_.ok()) CountAccess(i, space, addresses, active, bytes);
  }

  void StartCopy(const Instruction& i, Warp& warp, uint32_t active) {
    const auto bytes = static_cast<unsigned>(i.sources[2].value);
    LaneValues from;
    LaneValues to;
    ForLanes(active, [&](unsigned lane) {
      if (!error_.ok()) return;
      uint64_t given = bytes;
      if (i.sources[3].kind != Operand::Kind::kNone) {
        given = Mask(Read(i.sources[3], warp, lane), 32);
        if (given > bytes) {
          Fail(i, warp, lane, "cp.async of more bytes than its size");
          return;
        }
      }
      const Place target =
          Resolve(i, Space::kShared, AddressOf(i.sources[0], warp, lane), bytes,
                  true, warp, lane);
      if (target.data == nullptr) return;
      const uint64_t address = AddressOf(i.sources[1], warp, lane);
      const uint8_t* source = nullptr;
      if (given > 0) {
        const Place place =
            Resolve(i, Space::kGlobal, address, bytes, false, warp, lane);
        if (place.data == nullptr) return;
        source = place.data;
        if (place.shadowed) {
          Touch(i, Space::kGlobal, address, bytes, false, false, warp, lane);
        }
      }
      from[lane] = address;
      to[lane] = target.address;
      Touch(i, Space::kShared, target.address, bytes, true, false, warp, lane);
      auto& groups = warp.copies[lane];
      if (groups.empty()) groups.emplace_back();
      groups.back().push_back({target.address, source, bytes,
                               static_cast<unsigned>(given),
                               static_cast<int32_t>(&i - kernel_.code.data())});
    });
    if (!error_.ok()) return;
    // The whole warp's copies start before any of their bytes are in flight.
    ForLanes(active, [&](unsigned lane) {
      for (unsigned n = 0; n < bytes; ++n) ++in_flight_[to[lane] + n];
    });
    CountAccess(i, Space::kGlobal, from, active, bytes);
  }

  void EndCopies(const Instruction& i, Warp& warp, unsigned lane) {
    auto& groups = warp.copies[lane];
    if (groups.empty()) groups.emplace_back();
    if (i.op == Op::kCopyCommit) {
      groups.emplace_back();
      return;
    }
    size_t done = groups.size();
    if (i.op == Op::kCopyWait) {
      const uint64_t committed = groups.size() - 1;
      done = committed - std::min<uint64_t>(committed, i.sources[0].value);
    }
    for (size_t n = 0; n < done; ++n) {
      for (const Copy& copy : groups[n]) {
        uint8_t* to = &shared_[copy.shared];
        if (copy.given > 0) std::memcpy(to, copy.from, copy.given);
        std::memset(to + copy.given, 0, copy.bytes - copy.given);
        for (unsigned b = 0; b < copy.bytes; ++b) {
          --in_flight_[copy.shared + b];
        }
        Touch(kernel_.code[copy.instruction], Space::kShared, copy.shared,
              copy.bytes, true, false, warp, lane);
      }
    }
    groups.erase(groups.begin(), groups.begin() + static_cast<int64_t>(done));
  }

  static bool IsCollective(Op op) {
    return op == Op::kVote || op == Op::kShfl || op == Op::kBarrierWarp ||
           op == Op::kMatchAny || op == Op::kMatchAll || op == Op::kRedux ||
           op == Op::kMma;
  }

  static const Operand& MemberMask(const Instruction& i) {
    static const Operand& all = *new Operand([] {
      Operand mask;
      mask.kind = Operand::Kind::kImmediate;
      mask.value = 0xffffffff;
      return mask;
    }());
    if (i.op == Op::kMma) return all;
    if (i.op == Op::kBarrierWarp) return i.sources[0];
    return i.op == Op::kShfl ? i.sources[3] : i.sources[1];
  }

  // Threads wait until all that the mask names have come to the same
  // instruction.
  void Collective(const Instruction& i, Warp& warp, uint32_t active,
                  int32_t pc) {
    const auto leader = static_cast<unsigned>(std::countr_zero(active));
    const uint32_t all = warp.lanes == kLanes ? ~0u : (1u << warp.lanes) - 1;
    const auto members =
        static_cast<uint32_t>(Read(MemberMask(i), warp, leader)) & all;
    if ((members & ~warp.live) != 0) {
      Fail(i, warp, leader,
           absl::StrCat("the mask names threads that have ended: 0x",
                        absl::Hex(members & ~warp.live)));
      return;
    }
    uint32_t here = active;
    ForLanes(warp.live & warp.blocked, [&](unsigned lane) {
      if (warp.wait[lane] == Wait::kCollective && warp.pc[lane] == pc) {
        here |= 1u << lane;
      }
    });
    ForLanes(active, [&](unsigned lane) {
      const auto own = static_cast<uint32_t>(Read(MemberMask(i), warp, lane));
      if (!(own >> lane & 1)) {
        Fail(i, warp, lane, "the thread's mask does not name itself");
      }
    });
    if (!error_.ok()) return;
    if ((members & ~here) != 0 || (active & ~members) != 0) {
      // Threads of other masks at this instruction wait for their own turn.
      const uint32_t waits =
          (members & ~here) != 0 ? active : active & ~members;
      ForLanes(waits,
               [&](unsigned lane) { warp.wait[lane] = Wait::kCollective; });
      warp.blocked |= waits;
      if ((members & ~here) != 0) return;
    }
    ForLanes(members, [&](unsigned lane) {
      const auto own =
          static_cast<uint32_t>(Read(MemberMask(i), warp, lane)) & all;
      if (own != members) Fail(i, warp, lane, "the threads' masks differ");
      warp.wait[lane] = Wait::kNone;
    });
    // Whoever waits here with another mask tries again.
    ForLanes(here & ~members,
             [&](unsigned lane) { warp.wait[lane] = Wait::kNone; });
    warp.blocked &= ~here;
    if (!error_.ok()) return;
    CountExecuted(i, members);
    ForLanes(members, [&](unsigned lane) { warp.pc[lane] = pc + 1; });
    switch (i.op) {
      case Op::kBarrierWarp:
        // Of some threads only, it orders less than is modelled: as if nothing.
        if (members == warp.live) ++warp.epoch;
        return;
      case Op::kVote:
        Vote(i, warp, members);
        return;
      case Op::kShfl:
        Shuffle(i, warp, members);
        return;
      case Op::kRedux:
        Reduce(i, warp, members);
        return;
      case Op::kMma:
        MultiplyMatrices(i, warp, members);
        return;
      default:
        Match(i, warp, members);
    }
  }

  void Vote(const Instruction& i, Warp& warp, uint32_t members) {
    uint32_t yes = 0;
    ForLanes(members, [&](unsigned lane) {
      yes |= static_cast<uint32_t>(Read(i.sources[0], warp, lane) & 1) << lane;
    });
    uint64_t result = yes;
    if (i.variant == Variant::kAny) result = yes != 0;
    if (i.variant == Variant::kAll) result = yes == members;
    if (i.variant == Variant::kUniform) result = yes == members || yes == 0;
    ForLanes(members,
             [&](unsigned lane) { Write(i.d.reg, warp, lane, result); });
  }

  void Shuffle(const Instruction& i, Warp& warp, uint32_t members) {
    LaneValues results;
    LaneValues inside;
    ForLanes(members, [&](unsigned lane) {
      const auto b = static_cast<unsigned>(Read(i.sources[1], warp, lane)) & 31;
      const auto c = static_cast<unsigned>(Read(i.sources[2], warp, lane));
      const unsigned segment = c >> 8 & 31;
      const unsigned last = (lane & segment) | (c & 31 & ~segment);
      int from = 0;
      bool valid = true;
      switch (i.variant) {
        case Variant::kUp:
          from = static_cast<int>(lane - b);
          valid = from >= static_cast<int>(last);
          break;
        case Variant::kDown:
          from = static_cast<int>(lane + b);
          valid = from <= static_cast<int>(last);
          break;
        case Variant::kButterfly:
          from = static_cast<int>(lane ^ b);
          valid = from <= static_cast<int>(last);
          break;
        default:
          from = static_cast<int>((lane & segment) | (b & ~segment & 31));
          valid = from <= static_cast<int>(last);
      }
      if (!valid) from = static_cast<int>(lane);
      if (!(members >> from & 1)) {
        Fail(i, warp, lane, "shfl from a thread that the mask does not name");
        return;
      }
      inside[lane] = valid;
      results[lane] =
          Mask(Read(i.sources[0], warp, static_cast<unsigned>(from)), 32);
    });
    if (!error_.ok()) return;
    ForLanes(members, [&](unsigned lane) {
      Write(i.d.reg, warp, lane, results[lane]);
      if (i.d2.kind == Operand::Kind::kRegister) {
        Write(i.d2.reg, warp, lane, inside[lane]);
      }
    });
  }

  void Reduce(const Instruction& i, Warp& warp, uint32_t members) {
    std::optional<uint64_t> result;
    ForLanes(members, [&](unsigned lane) {
      const uint64_t value = Mask(Read(i.sources[0], warp, lane), 32);
      result = result ? ComputeAtomic(i, *result, value, 0).value_or(0) : value;
    });
    ForLanes(members,
             [&](unsigned lane) { Write(i.d.reg, warp, lane, *result); });
  }

  // d = a * b + c, summed from k = 0 to 15 and rounded after each product; as
  // "Matrix fragments for mma.m16n8k16" has it: a lane's row is lane / 4, and
  // of columns lane % 4 * 2 and the next.
  void MultiplyMatrices(const Instruction& i, Warp& warp, uint32_t members) {
    if (members != ~0u) {
      Fail(i, warp, 0, "mma by a warp that is not whole");
      return;
    }
    const auto number = [&i](uint64_t pair, unsigned n) {
      const auto bits = static_cast<uint16_t>(pair >> n % 2 * 16);
      return ToDouble(i.source_type, bits);
    };
    double a[16][16];
    double b[16][8];
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      const unsigned row = lane / 4;
      const unsigned column = lane % 4 * 2;
      for (unsigned n = 0; n < 8; ++n) {
        a[row + n / 2 % 2 * 8][column + n / 4 * 8 + n % 2] =
            number(ReadElement(i.sources[0].elements[n / 2], warp, lane), n);
      }
      for (unsigned n = 0; n < 4; ++n) {
        b[column + n / 2 * 8 + n % 2][row] =
            number(ReadElement(i.sources[1].elements[n / 2], warp, lane), n);
      }
    }
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      std::array<float, 4> sums;
      for (unsigned n = 0; n < 4; ++n) {
        const unsigned row = lane / 4 + n / 2 * 8;
        const unsigned column = lane % 4 * 2 + n % 2;
        float sum = std::bit_cast<float>(static_cast<uint32_t>(
            ReadElement(i.sources[2].elements[n], warp, lane)));
        for (unsigned k = 0; k < 16; ++k) {
          sum = static_cast<float>(sum + a[row][k] * b[k][column]);
        }
        sums[n] = sum;
      }
      for (unsigned n = 0; n < 4; ++n) {
        Write(i.d.elements[n].reg, warp, lane,
              std::bit_cast<uint32_t>(sums[n]));
      }
    }
  }

  void Match(const Instruction& i, Warp& warp, uint32_t members) {
    LaneValues results;
    ForLanes(members, [&](unsigned lane) {
      const uint64_t own = Mask(Read(i.sources[0], warp, lane), i.type.bits);
      uint32_t same = 0;
      ForLanes(members, [&](unsigned other) {
        const uint64_t value =
            Mask(Read(i.sources[0], warp, other), i.type.bits);
        same |= static_cast<uint32_t>(value == own) << other;
      });
      results[lane] = same;
    });
    ForLanes(members, [&](unsigned lane) {
      const bool all = results[lane] == members;
      Write(i.d.reg, warp, lane,
            i.op == Op::kMatchAny || all ? results[lane] : 0);
      if (i.d2.kind == Operand::Kind::kRegister) {
        Write(i.d2.reg, warp, lane, all);
      }
    });
  }

  const Kernel& kernel_;
  const LaunchShape& shape_;
  const uint8_t* params_;
  const LaunchOptions& options_;
  std::mt19937_64 random_;
  std::vector<Machine::Allocation> allocations_;
  const unsigned threads_;
  size_t last_found_ = 0;
  absl::Status error_;
  Report report_;
  std::set<std::pair<int32_t, int32_t>> racing_;
  uint64_t steps_ = 0;
  absl::flat_hash_map<uint64_t, std::unique_ptr<Shadow[]>> global_shadow_;
  uint64_t last_page_ = 0;
  Shadow* last_shadow_ = nullptr;

  // Of the block that runs.
  uint32_t block_index_ = 0;
  std::array<uint32_t, 3> block_ = {};
  uint32_t epoch_ = 0;
  std::vector<Warp> warps_;
  std::vector<uint8_t> shared_;
  std::vector<uint16_t> in_flight_;  // copies per byte of shared memory
  std::vector<Shadow> shared_shadow_;
  std::vector<uint8_t> local_;
};

}  // namespace

unsigned Count::bytes() const {
  return instruction->op == Op::kCopyAsync
             ? static_cast<unsigned>(instruction->sources[2].value)
             : instruction->type.bits / 8 * instruction->vector;
}

Count& Count::operator+=(const Count& other) {
  instruction = other.instruction;
  executed += other.executed;
  requests += other.requests;
  sectors += other.sectors;
  ideal_sectors += other.ideal_sectors;
  wavefronts += other.wavefronts;
  ideal_wavefronts += other.ideal_wavefronts;
  return *this;
}

void Machine::Map(void* data, size_t bytes, std::string name) {
  allocations_.push_back(
      {reinterpret_cast<uint64_t>(data), bytes, true, std::move(name)});
}

void Machine::MapReadOnly(const void* data, size_t bytes, std::string name) {
  allocations_.push_back(
      {reinterpret_cast<uint64_t>(data), bytes, false, std::move(name)});
}

absl::StatusOr<Report> Machine::Launch(const Module& module,
                                       const Kernel& kernel,
                                       const LaunchShape& shape,
                                       const void* params, size_t params_bytes,
                                       const LaunchOptions& options) const {
  uint64_t blocks = 1;
  uint64_t threads = 1;
  for (int n = 0; n < 3; ++n) {
    if (shape.grid[n] == 0 || shape.block[n] == 0 || shape.block[n] > 1024) {
      return absl::InvalidArgumentError("an empty grid, or blocks too large");
    }
    blocks *= shape.grid[n];
    threads *= shape.block[n];
    if (blocks > 1 << 24 || threads > 1024) {
      return absl::InvalidArgumentError("too many blocks or threads");
    }
  }
  if (kernel.max_threads != 0 && threads > kernel.max_threads) {
    return absl::InvalidArgumentError(absl::StrCat(
        kernel.name, ": ", threads,
        " threads, and it was compiled for at most ", kernel.max_threads));
  }
  if (params_bytes != kernel.param_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(kernel.name, ": parameters of ", params_bytes,
                     " bytes, and it takes ", kernel.param_bytes));
  }
  if (shape.dynamic_shared_bytes > kMaxSharedBytes) {
    return absl::InvalidArgumentError("too much shared memory");
  }
  return Run(allocations_, module, kernel, shape,
             static_cast<const uint8_t*>(params), options)
      .Execute();
}

}  // namespace larder::kernels::ptx
