#ifndef LARDER_KERNELS_KVC1_STREAMS_INTERNAL_H_
#define LARDER_KERNELS_KVC1_STREAMS_INTERNAL_H_

// Several streams in flight: what the vector levels of the entropy coder share.
// Each includes this once and brings its step.
//
// A step is bound by latency, so kInFlight streams take turns step by step. One
// that has ended makes room for the next; the last ones run in smaller company.
//
// `Lanes` is what a level brings for one kind of stream:
//   Lanes::State                      32 states in registers
//   Lanes::Load(states), Lanes::Store(state, states)
//   Lanes::Step(...)                  see the calls

#include <string.h>

#include "kernels/kvc1_loops_internal.h"
#include "kernels/kvc1_types.h"

namespace larder::kernels::internal {
namespace {

// The most words a step takes or gives, in bytes.
constexpr size_t kStepBytes = 2 * kLanes;

// Streams without contexts have something of the same extent instead, which
// nobody reads.
inline const int8_t* ContextOf(const DecodeStream& stream) {
  return reinterpret_cast<const int8_t*>(stream.symbols);
}
inline const int8_t* ContextOf(const RefineDecodeStream& stream) {
  return stream.context;
}
inline const int8_t* ContextOf(const NestedDecodeStream& stream) {
  return stream.context;
}
inline const int8_t* ContextOf(const EncodeStream& stream) {
  return reinterpret_cast<const int8_t*>(stream.symbols);
}
inline const int8_t* ContextOf(const RefineEncodeStream& stream) {
  return stream.context;
}

// --- Decoding ----------------------------------------------------------------

// A stream on its way. Words are read 32 at a time, wanted or not: as long as
// so many are left from the stream itself, the last ones from a copy with room
// behind it.
template <typename Stream>
struct DecodeSlot {
  Stream* stream;
  uint32_t states[kLanes];
  const std::byte* next;
  // A step may begin while next <= last. In the copy, this is where the words
  // end: beyond it, there were too few.
  const std::byte* last;
  size_t channel;
  size_t rounds_left;
  uint8_t* symbols;
  const int8_t* context;
  bool in_copy;
  bool failed;
  AroundSteps<Stream> around;
  std::byte copy[2 * kStepBytes];

  // False if there is nothing to be done.
  bool Begin(Stream* s) {
    stream = s;
    s->words_used = 0;
    bool valid = true;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      states[lane] = s->states[lane];
      valid = valid && states[lane] >= kStateMin && states[lane] < kStateEnd;
    }
    s->ok = valid;
    if (s->rounds == 0 || s->channels == 0) return false;
    if (!valid) {
      memset(s->symbols, s->idle_symbol, s->rounds * s->channels * kLanes);
      return false;
    }
    channel = 0;
    rounds_left = s->rounds;
    symbols = s->symbols;
    context = ContextOf(*s);
    around.Begin(s);
    failed = false;
    in_copy = false;
    next = s->words;
    if (2 * s->words_count >= kStepBytes) {
      last = s->words + (2 * s->words_count - kStepBytes);
    } else {
      EnterCopy(2 * s->words_count);
    }
    return true;
  }

  // What to do when next > last.
  __attribute__((noinline)) void Refill() {
    if (!in_copy) {
      EnterCopy(static_cast<size_t>(last - next) + kStepBytes);
    } else {
      // Goes on with anything until somebody looks.
      failed = true;
      next = copy;
    }
  }

  void EnterCopy(size_t left) {
    in_copy = true;
    memset(copy, 0, sizeof copy);
    if (left != 0) memcpy(copy, next, left);
    next = copy;
    last = copy + left;
  }

  void End() {
    if (in_copy && next > last) failed = true;
    stream->ok = !failed;
    if (failed) {
      memset(stream->symbols, stream->idle_symbol,
             stream->rounds * stream->channels * kLanes);
      return;
    }
    const auto left = static_cast<size_t>(last - next);
    stream->words_used =
        stream->words_count - (in_copy ? left : left + kStepBytes) / 2;
    memcpy(stream->states, states, sizeof states);
  }
};

// Runs the slots until one of them has ended or failed.
template <typename Lanes, int kCount, typename Stream>
void RunDecoders(DecodeSlot<Stream>* const* slots) {
  typename Lanes::State state[kCount];
  const std::byte* next[kCount];
  const std::byte* last[kCount];
  uint8_t* symbols[kCount];
  const int8_t* context[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    state[i] = Lanes::Load(slots[i]->states);
    next[i] = slots[i]->next;
    last[i] = slots[i]->last;
    symbols[i] = slots[i]->symbols;
    context[i] = slots[i]->context;
  }
  for (bool ended = false; !ended;) {
    // As far as the first of them has to the end of its round.
    size_t steps = SIZE_MAX;
    decltype(Stream::tables) tables[kCount];
    for (int i = 0; i < kCount; ++i) {
      const size_t left = slots[i]->stream->channels - slots[i]->channel;
      if (left < steps) steps = left;
      tables[i] = slots[i]->stream->tables + slots[i]->channel;
    }
    for (size_t step = 0; step < steps; ++step) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const auto* table = tables[i][step];
        if (__builtin_expect(table == nullptr, false)) {
          memset(symbols[i] + step * kLanes, slots[i]->stream->idle_symbol,
                 kLanes);
          continue;
        }
        if (__builtin_expect(next[i] > last[i], false)) {
          slots[i]->next = next[i];
          slots[i]->Refill();
          next[i] = slots[i]->next;
          last[i] = slots[i]->last;
        }
        // What is there is room that the stream's owner may write to.
        slots[i]->around.Before(
            const_cast<int8_t*>(context[i] + step * kLanes));
        next[i] += Lanes::Step(&state[i], *table, context[i] + step * kLanes,
                               next[i], symbols[i] + step * kLanes);
        slots[i]->around.After(symbols[i] + step * kLanes);
      }
    }
    for (int i = 0; i < kCount; ++i) {
      DecodeSlot<Stream>& slot = *slots[i];
      symbols[i] += steps * kLanes;
      context[i] += steps * kLanes;
      slot.channel += steps;
      if (slot.channel == slot.stream->channels) {
        slot.channel = 0;
        --slot.rounds_left;
      }
      if (slot.rounds_left == 0 || slot.failed) ended = true;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    Lanes::Store(state[i], slots[i]->states);
    slots[i]->next = next[i];
    slots[i]->symbols = symbols[i];
    slots[i]->context = context[i];
  }
}

template <typename Lanes, typename Stream>
void RunDecodersOf(DecodeSlot<Stream>* const* slots, size_t count) {
  switch (count) {
    case 1:
      return RunDecoders<Lanes, 1>(slots);
    case 2:
      return RunDecoders<Lanes, 2>(slots);
    case 3:
      return RunDecoders<Lanes, 3>(slots);
    default:
      return RunDecoders<Lanes, 4>(slots);
  }
}

// --- Encoding ----------------------------------------------------------------

template <typename Stream>
struct EncodeSlot {
  Stream* stream;
  size_t channel;  // one past the next
  size_t rounds_left;
  const uint8_t* symbols;  // one past the next, as the two below
  const int8_t* context;
  std::byte* begin;  // of the words so far

  bool Begin(Stream* s) {
    stream = s;
    s->words_count = 0;
    if (s->rounds == 0 || s->channels == 0) return false;
    channel = s->channels;
    rounds_left = s->rounds;
    const size_t size = s->rounds * s->channels * kLanes;
    symbols = s->symbols + size;
    context = ContextOf(*s) + size;
    begin = s->words + 2 * size;
    return true;
  }

  void End() {
    const std::byte* const end =
        stream->words + 2 * stream->rounds * stream->channels * kLanes;
    const auto bytes = static_cast<size_t>(end - begin);
    stream->words_count = bytes / 2;
    if (bytes != 0) memmove(stream->words, begin, bytes);
  }
};

template <typename Lanes, int kCount, typename Stream>
void RunEncoders(EncodeSlot<Stream>* const* slots) {
  typename Lanes::State state[kCount];
  std::byte* begin[kCount];
  const uint8_t* symbols[kCount];
  const int8_t* context[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    state[i] = Lanes::Load(slots[i]->stream->states);
    begin[i] = slots[i]->begin;
    symbols[i] = slots[i]->symbols;
    context[i] = slots[i]->context;
  }
  for (bool ended = false; !ended;) {
    size_t steps = SIZE_MAX;
    decltype(Stream::tables) tables[kCount];
    for (int i = 0; i < kCount; ++i) {
      const size_t left = slots[i]->channel;
      if (left < steps) steps = left;
      tables[i] = slots[i]->stream->tables + slots[i]->channel;
    }
    for (size_t step = 1; step <= steps; ++step) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const auto* table = *(tables[i] - step);
        if (__builtin_expect(table == nullptr, false)) continue;
        begin[i] = Lanes::Step(&state[i], *table, context[i] - step * kLanes,
                               symbols[i] - step * kLanes, begin[i]);
      }
    }
    for (int i = 0; i < kCount; ++i) {
      EncodeSlot<Stream>& slot = *slots[i];
      symbols[i] -= steps * kLanes;
      context[i] -= steps * kLanes;
      slot.channel -= steps;
      if (slot.channel == 0) {
        slot.channel = slot.stream->channels;
        --slot.rounds_left;
      }
      if (slot.rounds_left == 0) ended = true;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    Lanes::Store(state[i], slots[i]->stream->states);
    slots[i]->begin = begin[i];
    slots[i]->symbols = symbols[i];
    slots[i]->context = context[i];
  }
}

template <typename Lanes, typename Stream>
void RunEncodersOf(EncodeSlot<Stream>* const* slots, size_t count) {
  switch (count) {
    case 1:
      return RunEncoders<Lanes, 1>(slots);
    case 2:
      return RunEncoders<Lanes, 2>(slots);
    case 3:
      return RunEncoders<Lanes, 3>(slots);
    default:
      return RunEncoders<Lanes, 4>(slots);
  }
}

// --- Taking turns ------------------------------------------------------------

constexpr size_t kInFlight = 4;

template <typename Stream>
bool HasEnded(const DecodeSlot<Stream>& slot) {
  return slot.rounds_left == 0 || slot.failed;
}

template <typename Stream>
bool HasEnded(const EncodeSlot<Stream>& slot) {
  return slot.rounds_left == 0;
}

template <typename Slot, typename Stream, typename RunFunction>
void RunStreams(Stream* streams, size_t count, RunFunction run) {
  Slot room[kInFlight];
  Slot* slots[kInFlight];
  for (size_t i = 0; i < kInFlight; ++i) slots[i] = &room[i];
  size_t active = 0;
  Stream* const end = streams + count;
  for (;;) {
    while (active < kInFlight && streams != end) {
      if (slots[active]->Begin(streams++)) ++active;
    }
    if (active == 0) return;
    run(slots, active);
    for (size_t i = active; i-- > 0;) {
      if (!HasEnded(*slots[i])) continue;
      slots[i]->End();
      --active;
      Slot* const free = slots[i];
      slots[i] = slots[active];
      slots[active] = free;
    }
  }
}

template <typename Lanes, typename Stream>
void DecodeStreams(Stream* streams, size_t count) {
  RunStreams<DecodeSlot<Stream>>(streams, count, RunDecodersOf<Lanes, Stream>);
}

template <typename Lanes, typename Stream>
void EncodeStreams(Stream* streams, size_t count) {
  RunStreams<EncodeSlot<Stream>>(streams, count, RunEncodersOf<Lanes, Stream>);
}

}  // namespace
}  // namespace larder::kernels::internal

#endif  // LARDER_KERNELS_KVC1_STREAMS_INTERNAL_H_
