#ifndef LARDER_CLIENT_CORE_DEVICE_LOAD_H_
#define LARDER_CLIENT_CORE_DEVICE_LOAD_H_

#include <cstdint>
#include <vector>

#include "client/core/device.h"
#include "client/core/jobs.h"
#include "store/units.h"

namespace larder::client {

class LoadObserver;
struct LoadOutcome;
struct LoadRequest;

// The readiness word after a miss: more than any layer, so that whoever waits
// for one on the device goes on, and can tell.
inline constexpr uint32_t kReadyPoison = 0x40000000;

// Where a load's layers go if not into host memory, and who is told.
struct DeviceTarget {
  Device* device = nullptr;
  // Kernels and copies are put on this stream; null: on one of the load's own,
  // which waits for nothing of the engine's.
  kernels::cuda::Stream stream = nullptr;
  // A word in memory that the device reaches, 0 when the load starts: how many
  // layers have landed, or kReadyPoison. 0: none. Only with a stream of the
  // load's own: on another's the word would be written behind who waits for it.
  kernels::cuda::DevicePtr ready_word = 0;
  // Recorded behind each layer of LayerEnd. May be empty.
  std::vector<kernels::cuda::Event> layer_events;
  // Coded layers are decoded on the host even where kernels could.
  bool decode_on_host = false;
  // Page-locked memory that layers pass through.
  uint64_t bounce_bytes = 64_MiB;
};

// As RunLoad, into views of device memory, in pieces of some chunks: a kernel
// puts one into the pages while the next is being read. Raw layers are verified
// where they lie and copied from there, if the driver page-locks slabs that may
// only be read (Device::AddressOf), and if they are just what a view wants;
// others, and all where it does not, are verified (and decoded) into
// page-locked memory as every load does. If the daemon let go of slabs that
// were being copied (it ended the session, by mistake or because this process
// broke the protocol), the load says so at its end: all of it is a miss. What
// does not fit the daemon's memory at once is held, and comes, in parts.
// OnLayers tells of layers whose last kernel is on the stream: whoever puts
// work on the same stream, or behind the layer's event, finds them there.
//
// Layers that KVC1 coded go encoded, verified, and a kernel decodes them into
// the pages (device_decode.h). Whether it could is known when it has run, so
// nobody is told of such a layer before this thread has looked: OnLayers, the
// event and the word come with the end of the next piece's reading, or of the
// load. A tile that could not be decoded makes its chunk a miss, kCorrupt.
// What no kernel has is decoded into the page-locked memory as before.
//
// Returns when nothing lands any more: what was put on the stream has run. On
// an engine's stream that waits for the engine's own work before it, whatever
// the deadline (kernels that decode and have not run by then are a miss all the
// same); on the load's own for some milliseconds at most.
//
// Unimplemented: views of blocks or slots of opaque pages or recurrent states
// (segments will do).
LoadOutcome RunDeviceLoad(const LoadRequest& request,
                          const Cancelled* cancelled, LoadObserver* observer);

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_DEVICE_LOAD_H_
