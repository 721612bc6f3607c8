// How fast the CUDA kernels are on the device of this machine: bytes that a
// kernel reads and writes over the time of its launches (events on a stream,
// the median of some), against the device's own copy in the same run.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/attention_types.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/convert_types.h"
#include "kernels/cuda/image.h"
#include "kernels/cuda/launcher.h"
#include "kernels/cuda/paged_copy_types.h"

namespace larder::kernels::cuda {
namespace {

constexpr int kRuns = 15;

void Check(const Error& error) {
  if (!error) return;
  std::fprintf(stderr, "kernels_gpu_bench: %s\n", error.ToString().c_str());
  std::exit(1);
}

class Bench {
 public:
  Bench() {
    std::string why_not;
    driver_ = Driver::Open({}, &why_not);
    if (driver_ == nullptr) {
      std::fprintf(stderr, "kernels_gpu_bench: %s\n", why_not.c_str());
      std::exit(1);
    }
    Error error;
    context_ = Context::Retain(*driver_, 0, &error);
    Check(error);
    scope_ = std::make_unique<Context::Scope>(*context_);
    Check(driver_->stream_create(&stream_, kStreamNonBlocking));
    Check(driver_->event_create(&begin_, kEventDefault));
    Check(driver_->event_create(&end_, kEventDefault));
    std::printf("%s, driver %d\n", context_->info().name.c_str(),
                driver_->version());
  }

  void* Memory(uint64_t bytes) {
    DevicePtr at = 0;
    Check(driver_->mem_alloc(&at, bytes));
    Check(driver_->memset_d8_async(at, 1, bytes, stream_));
    return reinterpret_cast<void*>(at);
  }
  template <typename T>
  T* Put(const std::vector<T>& values) {
    void* const at = Memory(values.size() * sizeof(T));
    Check(driver_->memcpy_h2d_async(reinterpret_cast<DevicePtr>(at),
                                    values.data(), values.size() * sizeof(T),
                                    stream_));
    Check(driver_->stream_synchronize(stream_));
    return static_cast<T*>(at);
  }
  void Free(void* at) {
    Check(driver_->mem_free(reinterpret_cast<DevicePtr>(at)));
  }

  // GB/s, of bytes read and written.
  double Measure(double bytes, const std::function<Error()>& launch) {
    std::vector<float> times;
    for (int run = 0; run < kRuns + 2; ++run) {
      Check(driver_->event_record(begin_, stream_));
      Check(launch());
      Check(driver_->event_record(end_, stream_));
      Check(driver_->stream_synchronize(stream_));
      float ms = 0;
      Check(driver_->event_elapsed_time(&ms, begin_, end_));
      if (run >= 2) times.push_back(ms);
    }
    std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
    return bytes / times[kRuns / 2] * 1e-6;
  }
  void Row(const char* name, double speed) {
    if (limit_ == 0) limit_ = speed;
    std::printf("%-34s %8.0f GB/s %6.3f\n", name, speed, speed / limit_);
    std::fflush(stdout);
  }

  template <typename Params>
  double Run(const char* family, const LaunchPlan& plan, const Params& params,
             double bytes) {
    Error error;
    if (plan.entry == nullptr) {
      std::fprintf(stderr, "kernels_gpu_bench: nothing to launch\n");
      std::exit(1);
    }
    const Image image = FindImage(family);
    const auto launcher =
        Launcher::Load(*context_, image.data, {plan.entry}, &error);
    Check(error);
    const double speed =
        Measure(bytes, [&] { return launcher->Launch(plan, params, stream_); });
    return speed;
  }

  void Copies() {
    constexpr uint64_t kBytes = uint64_t{1} << 30;
    void* const from = Memory(kBytes);
    void* const to = Memory(kBytes);
    Row("device copy", Measure(2.0 * kBytes, [&] {
          return driver_->memcpy_d2d_async(reinterpret_cast<DevicePtr>(to),
                                           reinterpret_cast<DevicePtr>(from),
                                           kBytes, stream_);
        }));
    Free(from);
    Free(to);
  }

  // K and V of one layer: 8 heads of 128 fp16, blocks of 16 tokens in any
  // order, 512 MiB of either.
  void PagedCopies() {
    constexpr uint32_t kHeads = 8, kRow = 256, kBlock = 16;
    constexpr uint64_t kTokens = uint64_t{1} << 18;
    constexpr uint64_t kPlane = kTokens * kHeads * kRow;
    std::vector<int64_t> blocks(kTokens / kBlock);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937(1));
    std::vector<int64_t> slots;
    for (const int64_t block : blocks) {
      for (uint32_t t = 0; t < kBlock; ++t) slots.push_back(block * kBlock + t);
    }
    const int64_t* const places = Put(slots);
    void* const paged = Memory(2 * kPlane);
    void* const dense = Memory(2 * kPlane);
    for (const bool hnd : {true, false}) {
      ::larder::kernels::cuda::PagedCopies copies{};
      copies.count = 2;
      for (uint32_t i = 0; i < 2; ++i) {
        PagedCopy& copy = copies.planes[i];
        copy.paged = {static_cast<char*>(paged) + i * kPlane,
                      kBlock * kHeads * kRow, hnd ? kRow : kHeads * kRow,
                      hnd ? kBlock * kRow : kRow};
        copy.dense = {static_cast<char*>(dense) + i * kPlane, kTokens * kRow,
                      kRow};
        copy.places = {places, kBlock, 1};
        copy.tokens = kTokens;
        copy.heads = kHeads;
        copy.row_bytes = kRow;
      }
      Row(hnd ? "paged gather, HND" : "paged gather, NHD",
          Run("paged_copy", PlanGather(copies), copies, 4.0 * kPlane));
      Row(hnd ? "paged scatter, HND" : "paged scatter, NHD",
          Run("paged_copy", PlanScatter(copies), copies, 4.0 * kPlane));
    }
    Free(paged);
    Free(dense);
    Free(const_cast<int64_t*>(places));
  }

  void Conversions() {
    constexpr uint64_t kRows = uint64_t{1} << 21;
    constexpr uint32_t kWidth = 128;
    void* const from = Memory(kRows * kWidth * 4);
    void* const to = Memory(kRows * kWidth * 2);
    const float* const scales = Put(std::vector<float>(kRows, 0.5f));
    const struct {
      const char* name;
      Element element;
      double bytes;
    } kinds[] = {{"convert int8 to f16", Element::kInt8, 1},
                 {"convert int4 to f16", Element::kInt4, 0.5},
                 {"convert e4m3 to f16", Element::kE4m3, 1},
                 {"convert f32 to f16", Element::kF32, 4}};
    for (const auto& kind : kinds) {
      RowsConversion c{};
      c.src = from;
      c.src_stride = static_cast<int64_t>(kWidth * kind.bytes);
      c.dst = to;
      c.dst_stride = kWidth * 2;
      c.src_element = kind.element;
      c.dst_element = Element::kF16;
      c.rows = kRows;
      c.width = kWidth;
      c.scales = scales;
      c.rows_per_scale = 1;
      c.scale_count = kRows;
      Row(kind.name, Run("convert", PlanConvert(c), c,
                         kRows * (kWidth * (kind.bytes + 2) + 4)));
    }
    Free(from);
    Free(to);
    Free(const_cast<float*>(scales));
  }

  // 32 query heads over 8 KV heads of 128, 64 sequences of 4096 tokens.
  void Attention() {
    constexpr uint32_t kSequences = 64, kTokens = 4096, kHeads = 8, kDim = 128;
    constexpr uint32_t kQueries = 32, kBlock = 16, kParts = 8;
    std::vector<int64_t> blocks(uint64_t{kSequences} * kTokens / kBlock);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937(1));
    const int64_t* const places = Put(blocks);
    const uint32_t* const lengths =
        Put(std::vector<uint32_t>(kSequences, kTokens));
    const float* const scales =
        Put(std::vector<float>(uint64_t{kSequences} * kTokens * kHeads, 0.01f));
    void* const queries = Memory(uint64_t{kSequences} * kQueries * kDim * 4);
    const uint64_t plane = uint64_t{kSequences} * kTokens * kHeads * kDim * 2;
    void* const keys = Memory(plane);
    void* const values = Memory(plane);
    const uint64_t items = uint64_t{kParts} * kSequences * kQueries;
    auto* const outputs = static_cast<float*>(Memory(items * kDim * 4));
    auto* const maxima = static_cast<float*>(Memory(items * 4));
    auto* const sums = static_cast<float*>(Memory(items * 4));
    const struct {
      const char* name;
      Element element;
      double bytes;
    } kinds[] = {{"attention, f16", Element::kF16, 2},
                 {"attention, int8", Element::kInt8, 1},
                 {"attention, int4", Element::kInt4, 0.5}};
    for (const auto& kind : kinds) {
      const auto row = static_cast<int64_t>(kDim * kind.bytes);
      DecodeAttention a{};
      a.queries = queries;
      a.query_sequence_stride = kQueries * kDim * 4;
      a.query_head_stride = kDim * 4;
      a.query_element = Element::kF32;
      a.sequences = kSequences;
      a.query_heads = kQueries;
      a.kv_heads = kHeads;
      a.softmax_scale = 0.1f;
      for (AttentionPlane* p : {&a.keys, &a.values}) {
        p->rows = {p == &a.keys ? keys : values, row * kHeads * kBlock, row,
                   row * kBlock};
        p->element = kind.element;
        p->dim = kDim;
        if (kind.element != Element::kF16) {
          p->scales = {const_cast<float*>(scales), 4 * kHeads * kBlock, 4,
                       4 * kBlock};
        }
      }
      a.places = {places, kBlock, kBlock};
      a.places_stride = kTokens / kBlock;
      a.lengths = lengths;
      a.parts = kParts;
      a.outputs = outputs;
      a.maxima = maxima;
      a.sums = sums;
      const double read =
          2.0 * kSequences * kTokens * kHeads *
          (kDim * kind.bytes + (kind.element == Element::kF16 ? 0 : 4));
      Row(kind.name, Run("attention", PlanAttention(a), a, read));
    }
  }

 private:
  std::unique_ptr<const Driver> driver_;
  std::unique_ptr<Context> context_;
  std::unique_ptr<Context::Scope> scope_;
  Stream stream_ = nullptr;
  Event begin_ = nullptr, end_ = nullptr;
  double limit_ = 0;
};

int Main() {
  Bench bench;
  bench.Copies();
  bench.PagedCopies();
  bench.Conversions();
  bench.Attention();
  return 0;
}

}  // namespace
}  // namespace larder::kernels::cuda

int main() {
  return larder::kernels::cuda::Main();
}
