#include "client.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include "queue.h"

namespace larder::python {
namespace {

const char* Text(const std::optional<std::string>& text) {
  return text.has_value() ? text->c_str() : nullptr;
}

void OpenClient(Client* self, const std::optional<std::string>& socket,
                const std::optional<std::string>& token,
                const std::optional<std::string>& name, Seconds deadline,
                Seconds connect_deadline, uint64_t staging_bytes,
                uint32_t worker_threads, double cached_age,
                uint64_t ahead_bytes, uint32_t queued_jobs_max) {
  larder_client_opts options = {};
  options.struct_size = sizeof options;
  options.default_deadline_ms = Milliseconds(deadline);
  options.socket_path = Text(socket);
  options.token = Text(token);
  options.name = Text(name);
  options.staging_bytes = staging_bytes;
  options.worker_threads = worker_threads;
  options.cached_age_ms = Milliseconds(cached_age);
  options.ahead_bytes = ahead_bytes;
  options.queued_jobs_max = queued_jobs_max;
  larder_client* client = nullptr;
  Check(Unlocked([&] {
    return larder_client_open(&options, Milliseconds(connect_deadline),
                              &client);
  }));
  new (self) Client{std::make_shared<ClientHandle>(client, nullptr)};
}

nb::dict Usage(const Client& self, const Seconds& deadline) {
  larder_usage usage = {};
  usage.struct_size = sizeof usage;
  Check(Unlocked([&] {
    return larder_get_usage(self.Live()->get(), Milliseconds(deadline), &usage);
  }));
  nb::dict result;
  result["memory_used"] = usage.memory_used;
  result["memory_capacity"] = usage.memory_capacity;
  result["durable_used"] = usage.durable_used;
  result["durable_capacity"] = usage.durable_capacity;
  result["durable_backlog"] = usage.durable_backlog;
  result["chunks"] = usage.chunks;
  result["matched"] = usage.matched;
  result["missed"] = usage.missed;
  result["commits"] = usage.commits;
  result["corrupt"] = usage.corrupt;
  result["saved_bytes"] = usage.saved_bytes;
  result["promoted_bytes"] = usage.promoted_bytes;
  result["client_loaded_bytes"] = usage.client_loaded_bytes;
  result["client_saved_bytes"] = usage.client_saved_bytes;
  result["client_missed_chunks"] = usage.client_missed_chunks;
  result["client_corrupt_chunks"] = usage.client_corrupt_chunks;
  result["client_reconnects"] = usage.client_reconnects;
  return result;
}

// A region and the client it was opened from.
Window OpenRegion(const Client& self, int fd, uint64_t bytes, uint64_t offset) {
  larder_region_desc description = {};
  description.struct_size = sizeof description;
  description.fd = fd;
  description.offset = offset;
  description.bytes = bytes;
  larder_region* region = nullptr;
  Check(larder_region_open(self.Live()->get(), &description, &region));
  auto owner = std::make_shared<RegionHandle>(region, self.Live());
  void* const base = larder_region_base(region);
  return {.data = base, .bytes = bytes, .writable = true, .owner = owner};
}

}  // namespace

void BindClient(nb::module_& module) {
  nb::class_<Client>(
      module, "Client",
      "A connection to larderd.\n\n"
      "Args:\n"
      "    socket: the daemon's Unix socket; None: /run/larder/larderd.sock.\n"
      "    token: the tenant's token; None: the daemon goes by the user.\n"
      "    name: for people, shown by `larder status`.\n"
      "    deadline: seconds that a call may take which names none; None: "
      "1.\n"
      "    connect_deadline: the same for this call.\n"
      "    staging_bytes: memory that saves are filled in; 0: 256 MiB, on "
      "first use.\n"
      "    worker_threads: for submitted and started operations; 0: 1.\n"
      "    cached_age: seconds after which cached answers are refreshed.\n"
      "    ahead_bytes: held ahead of the copying of a load; 0: 256 MiB.\n"
      "    queued_jobs_max: submitted, not yet started; 0: 4096.\n\n"
      "May be used by any number of threads; calls that wait let other Python "
      "threads run.\nNot across fork(): open in the process that uses it. "
      "After a restart of the daemon\nthe next call reconnects by itself.\n\n"
      "Raises Unavailable if nobody listens, Denied for a wrong token.")
      .def("__init__", &OpenClient, nb::arg("socket").none() = nb::none(),
           nb::kw_only(), nb::arg("token").none() = nb::none(),
           nb::arg("name").none() = nb::none(),
           nb::arg("deadline").none() = nb::none(),
           nb::arg("connect_deadline").none() = nb::none(),
           nb::arg("staging_bytes") = 0, nb::arg("worker_threads") = 0,
           nb::arg("cached_age") = 0.05, nb::arg("ahead_bytes") = 0,
           nb::arg("queued_jobs_max") = 0)
      .def(
          "close", [](Client& self) { self.handle.reset(); },
          "Ends the connection, as soon as nothing that was opened from it is "
          "left. Cancels\nwhat is under way.")
      .def(
          "__enter__", [](nb::object self) { return self; },
          nb::sig("def __enter__(self) -> Client"))
      .def(
          "__exit__",
          [](Client& self, nb::handle, nb::handle, nb::handle) {
            self.handle.reset();
          },
          nb::arg("type").none(), nb::arg("value").none(),
          nb::arg("traceback").none())
      .def_prop_ro(
          "healthy",
          [](const Client& self) {
            return larder_health(self.Live()->get()) == LARDER_OK;
          },
          "Whether it is connected (or was not tried since). Never blocks.")
      .def(
          "ping",
          [](const Client& self, const Seconds& deadline) {
            Check(Unlocked([&] {
              return larder_ping(self.Live()->get(), Milliseconds(deadline));
            }));
          },
          nb::arg("deadline").none() = nb::none(), "A round trip.")
      .def("usage", &Usage, nb::arg("deadline").none() = nb::none(),
           "Counts and bytes of the daemon, and of this client "
           "(`client_*`).")
      .def(
          "queue",
          [](const Client& self) {
            return std::make_unique<Queue>(self.Live());
          },
          "A new queue of completions.")
      .def("region", &OpenRegion, nb::arg("fd"), nb::arg("bytes"),
           nb::arg("offset") = 0,
           "Memory of another process (an engine's slab), mapped here by its "
           "descriptor.")
      .def(
          "cancel",
          [](const Client& self, larder_job job) {
            const int32_t status = larder_cancel(self.Live()->get(), job);
            return status == LARDER_E_NOT_FOUND ? false : Check(status) == 0;
          },
          nb::arg("job"),
          "Takes a job back; its completion still comes. False if it is "
          "done.")
      .def(
          "drain",
          [](const Client& self, const Seconds& deadline) {
            Check(Unlocked([&] {
              return larder_drain(self.Live()->get(), Milliseconds(deadline));
            }));
          },
          nb::arg("deadline").none() = nb::none(),
          "Waits until no submitted or started operation is left; those not "
          "done at the\ndeadline are cancelled.");
}

}  // namespace larder::python
