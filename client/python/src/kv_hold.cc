#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "kv.h"

namespace larder::python {
namespace {

nb::list MapHold(const Hold& self, uint32_t index, uint32_t layer,
                 uint32_t group, const Seconds& deadline) {
  std::vector<larder_mapped> mapped(64);
  mapped[0].struct_size = sizeof mapped[0];
  size_t count = 0;
  Check(Unlocked([&] {
    return larder_hold_map(self.get(), index, group, layer,
                           Milliseconds(deadline), mapped.data(), mapped.size(),
                           &count);
  }));
  nb::list pieces;
  for (size_t i = 0; i < count; ++i) {
    const larder_mapped& from = mapped[i];
    const auto window = [&](const void* data, uint64_t bytes) {
      return nb::cast(Window{.data = const_cast<void*>(data),
                             .bytes = bytes,
                             .writable = false,
                             .owner = self.handle});
    };
    nb::dict piece;
    piece["k"] = window(from.k, from.k_bytes);
    piece["v"] = from.v == nullptr ? nb::none() : window(from.v, from.v_bytes);
    piece["head_begin"] = from.head_begin;
    piece["head_count"] = from.head_count;
    piece["interleave_index"] = from.interleave_index;
    piece["token_count"] = from.token_count;
    piece["lineage"] = from.lineage;
    pieces.append(piece);
  }
  return pieces;
}

larder_hold_opts HoldOptions(const Seconds& ttl, uint32_t lineage,
                             const Seconds& deadline) {
  larder_hold_opts options = {};
  options.struct_size = sizeof options;
  options.deadline_ms = Milliseconds(deadline);
  options.ttl_ms = Milliseconds(ttl);
  options.worst_lineage = lineage;
  return options;
}

Ids IdsOf(const Hold& self) {
  Ids ids;
  size_t count = 0;
  larder_hold_ids(self.get(), nullptr, 0, &count);
  ids.ids.resize(count);
  Check(larder_hold_ids(self.get(), ids.ids.data(), count, &count));
  return ids;
}

template <class Wait>
Found TakeFound(const Find& self, Wait&& wait) {
  Found found;
  found.result.struct_size = sizeof found.result;
  larder_hold* raw = nullptr;
  found.status = wait(&found.result, &raw);
  if (raw == nullptr) return found;
  Hold hold;
  hold.handle = std::make_shared<HoldHandle>(raw, self.space);
  hold.space = self.space;
  size_t count = 0;
  larder_hold_ids(raw, nullptr, 0, &count);
  hold.usable = static_cast<uint32_t>(count);
  hold.reasons.resize(count);
  found.hold = std::move(hold);
  return found;
}

Found WaitFind(const Find& self, const Seconds& wait) {
  return TakeFound(self, [&](larder_found* found, larder_hold** hold) {
    return Unlocked([&] {
      return larder_find_wait(self.handle->get(), Milliseconds(wait), found,
                              hold);
    });
  });
}

// Keeps the interpreter's lock: nothing here waits.
std::optional<Found> PollFind(const Find& self) {
  larder_find* const find = self.handle->get();
  if (larder_find_check(find) != LARDER_OK) return std::nullopt;
  return TakeFound(self, [&](larder_found* found, larder_hold** hold) {
    return larder_find_wait(find, 1, found, hold);
  });
}

}  // namespace

std::optional<Hold> OpenHold(const Space& self, const Ids& ids,
                             const Seconds& ttl, bool each, uint32_t lineage,
                             const Seconds& deadline) {
  larder_hold_opts options = HoldOptions(ttl, lineage, deadline);
  options.flags = each ? LARDER_HOLD_EACH : 0;
  Hold hold;
  hold.reasons.resize(ids.ids.size());
  larder_hold* raw = nullptr;
  const int32_t status = Unlocked([&] {
    return larder_hold_open(self.get(), ids.ids.data(), ids.ids.size(),
                            &options, hold.reasons.data(), &hold.usable, &raw);
  });
  if (status == LARDER_E_NOT_FOUND) return std::nullopt;
  Check(status);
  hold.handle = std::make_shared<HoldHandle>(raw, self.handle);
  hold.space = self.handle;
  return hold;
}

Hold AttachHold(const Space& self, uint64_t token, const Ids& ids,
                const Seconds& deadline) {
  larder_hold* raw = nullptr;
  Check(Unlocked([&] {
    return larder_hold_attach(self.get(), token, ids.ids.data(), ids.ids.size(),
                              Milliseconds(deadline), &raw);
  }));
  Hold hold;
  hold.handle = std::make_shared<HoldHandle>(raw, self.handle);
  hold.space = self.handle;
  hold.usable = static_cast<uint32_t>(ids.ids.size());
  hold.reasons.resize(ids.ids.size());
  return hold;
}

std::unique_ptr<Find> StartFind(const Space& self, nb::handle tokens,
                                const std::vector<RequestKey>& keys,
                                uint64_t tokens_max, const Seconds& ttl,
                                uint32_t lineage, Queue* queue,
                                nb::object user_data, const Seconds& deadline) {
  const std::vector<uint32_t> numbers = TokensOf(tokens);
  const std::vector<larder_request_key> raw_keys = RawKeys(keys);
  larder_prompt prompt = {};
  prompt.struct_size = sizeof prompt;
  prompt.key_count = static_cast<uint32_t>(raw_keys.size());
  prompt.tokens = numbers.data();
  prompt.token_count = numbers.size();
  prompt.keys = raw_keys.data();
  prompt.tokens_max = tokens_max;
  const larder_hold_opts options = HoldOptions(ttl, lineage, deadline);
  larder_find* raw = nullptr;
  const auto start = [&](uint64_t number, larder_job* job) {
    const int32_t status = larder_find_start(
        self.get(), &prompt, &options,
        queue == nullptr ? nullptr : queue->get(), number, &raw);
    if (status == LARDER_OK) *job = larder_find_job(raw);
    return status;
  };
  if (queue == nullptr) {
    larder_job job;
    Check(start(0, &job));
  } else {
    queue->Submit(std::move(user_data), nullptr, start);
  }
  auto find = std::make_unique<Find>();
  find->space = self.handle;
  find->handle = std::make_shared<FindHandle>(raw, self.handle);
  return find;
}

void BindHold(nb::module_& module) {
  nb::class_<Hold>(module, "Hold",
                   "The right to read chunks where they lie. Ends with "
                   "close(), with its ttl, or with\nthe process.")
      .def_ro("usable", &Hold::usable,
              "Chunks from the first on that are held.")
      .def_prop_ro(
          "reasons", [](const Hold& self) { return BytesOf(self.reasons); },
          "A Reason for each chunk; 0: held.")
      .def_prop_ro("ids", &IdsOf,
                   "Of the chunks it was opened with, for Space.attach.")
      .def_prop_ro(
          "token",
          [](const Hold& self) { return larder_hold_token(self.get()); },
          "Unguessable; for Space.attach in the workers.")
      .def_prop_ro(
          "valid",
          [](const Hold& self) {
            return self.handle != nullptr &&
                   larder_hold_check(self.get()) == LARDER_OK;
          },
          "False once it was revoked. Never blocks.")
      .def(
          "renew",
          [](const Hold& self, const Seconds& ttl, const Seconds& deadline) {
            uint32_t left = 0;
            Check(Unlocked([&] {
              return larder_hold_renew(self.get(), Milliseconds(ttl),
                                       Milliseconds(deadline), &left);
            }));
            return left / 1000.0;
          },
          nb::arg("ttl").none() = nb::none(),
          nb::arg("deadline").none() = nb::none(),
          "Seconds left. Raises Aborted if it was revoked.")
      .def("map", &MapHold, nb::arg("index"), nb::arg("layer"),
           nb::arg("group") = 0, nb::arg("deadline").none() = nb::none(),
           "Reading in place: the segments of one layer of chunk `index`, "
           "verified once: a\ndict for each part, with Windows `k` and `v`. "
           "Keeps the hold open as long as a\nWindow lives; look at `valid` "
           "after reading.")
      .def(
          "close", [](Hold& self) { self.handle.reset(); }, "Releases.")
      .def(
          "__enter__", [](nb::object self) { return self; },
          nb::sig("def __enter__(self) -> Hold"))
      .def(
          "__exit__",
          [](Hold& self, nb::handle, nb::handle, nb::handle) {
            self.handle.reset();
          },
          nb::arg("type").none(), nb::arg("value").none(),
          nb::arg("traceback").none());

  nb::class_<Found>(module, "Found", "What became of a find.")
      .def_prop_ro(
          "tokens", [](const Found& self) { return self.result.tokens; },
          "From the first on, there and held; whole blocks.")
      .def_prop_ro(
          "reason", [](const Found& self) { return self.result.reason; },
          "A Reason: why no more; 0 if all that are of use are.")
      .def_ro("status", &Found::status,
              "0, a miss too; or what cut it short: deadline, daemon gone.")
      .def_ro("hold", &Found::hold,
              "Of whole chunks, and of at most one tail behind them. None: "
              "nothing is there.");

  nb::class_<Find>(module, "Find",
                   "A question under way. Dropping it cancels, and lets go of "
                   "what it holds.")
      .def_prop_ro(
          "ended",
          [](const Find& self) {
            return larder_find_check(self.handle->get()) == LARDER_OK;
          },
          "Never blocks.")
      .def("poll", &PollFind,
           "What became of it; None: it is under way. Never blocks.")
      .def("wait", &WaitFind, nb::arg("wait").none() = nb::none(),
           "Waits for the end. If `wait` passes first, the result's status is "
           "that of a\ndeadline and the question goes on.")
      .def_prop_ro("job", [](const Find& self) {
        return larder_find_job(self.handle->get());
      });
}

}  // namespace larder::python
