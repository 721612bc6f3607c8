#ifndef LARDER_CODEC_KVC1_SCRATCH_H_
#define LARDER_CODEC_KVC1_SCRATCH_H_

#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>

namespace larder::kvc1 {

// Room that is kept from one use to the next: of any content, aligned to lines.
template <typename T>
class Scratch {
  static_assert(std::is_trivial_v<T>);

 public:
  // Room for `count`; what was there is gone.
  T* Get(size_t count) {
    if (count > capacity_) {
      room_.reset();
      room_.reset(static_cast<T*>(
          ::operator new (count * sizeof(T), std::align_val_t{64})));
      capacity_ = count;
    }
    return room_.get();
  }
  T* data() const { return room_.get(); }

 private:
  struct Delete {
    void operator()(T* room) const {
      ::operator delete (room, std::align_val_t{64});
    }
  };
  std::unique_ptr<T, Delete> room_;
  size_t capacity_ = 0;
};

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_SCRATCH_H_
