#ifndef LARDER_KERNELS_LEVEL_CHOICE_INTERNAL_H_
#define LARDER_KERNELS_LEVEL_CHOICE_INTERNAL_H_

// Which instruction-set level a table of functions is taken from: the best that
// this CPU has, unless tests or benches say otherwise. Thread-safe.

#include <atomic>

#include "kernels/kvc1_internal.h"

namespace larder::kernels::internal {

// `kAt` gives the table of a level, null where the CPU lacks it, and always
// that of kScalar.
template <class Kernel, const Kernel* (*kAt)(Level)>
class LevelChoice {
 public:
  static const Kernel& Get() {
    return *Chosen().load(std::memory_order_relaxed);
  }
  static bool Use(Level level) {
    const Kernel* const kernel = kAt(level);
    if (kernel != nullptr) Chosen().store(kernel, std::memory_order_relaxed);
    return kernel != nullptr;
  }
  static void UseBest() { Chosen().store(Best(), std::memory_order_relaxed); }

 private:
  static const Kernel* Best() {
    for (const Level level : {Level::kAvx512, Level::kAvx2}) {
      const Kernel* const kernel = kAt(level);
      if (kernel != nullptr) return kernel;
    }
    return kAt(Level::kScalar);
  }
  static std::atomic<const Kernel*>& Chosen() {
    static std::atomic<const Kernel*> chosen = Best();
    return chosen;
  }
};

}  // namespace larder::kernels::internal

#endif  // LARDER_KERNELS_LEVEL_CHOICE_INTERNAL_H_
