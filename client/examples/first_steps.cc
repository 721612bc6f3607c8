// Larder in thirty lines: save one chunk of KV, find it again, load it.
//   first_steps /run/larder/larderd.sock

#include <cstdio>
#include <cstring>

#include "larder.h"

int main(int argc, char** argv) {
  larder::ClientOptions where;
  if (argc > 1) where.socket_path = argv[1];
  auto client = larder::Client::Open(where);
  if (!client.ok()) return std::puts(client.status().ToString().c_str()), 1;

  larder::SpaceOptions about;  // everything that makes KV exchangeable
  about.model_name = "example";
  about.weights.bytes[0] = 1;  // SHA-256 of the weights
  about.cache_dtype = "f16";
  about.rope = "theta=10000";
  about.engine_layout = "first_steps 1";
  about.block_tokens = 16;
  about.chunk_tokens = 256;
  larder::Group group;
  group.layers = 2;
  group.kv_heads = 4;
  group.k_head_bytes = group.v_head_bytes = 128 * 2;  // per token and head
  group.layer_names = "0-1";
  about.groups = {group};
  auto space = client->OpenSpace(about);
  if (!space.ok()) return std::puts(space.status().ToString().c_str()), 1;

  auto prompt = space->Ids(larder::Tokens(256, 42));
  larder::SaveOptions what;
  what.id = prompt->ids[0];
  auto saver = space->BeginSave(what);
  if (saver.ok()) {  // else it is there already
    for (uint32_t layer = 0; layer < 2; ++layer) {
      auto segment = saver->Layer(layer);
      std::memset(segment->data, 'k', segment->bytes);
    }
    if (auto done = saver->Commit(); !done.ok()) return 1;
    if (auto done = saver->Wait(LARDER_VOLATILE); !done.ok()) return 1;
  }

  auto match = space->Match(prompt->ids);
  std::vector<char> layers[2];
  void* places[2];
  for (int i = 0; i < 2; ++i) {
    layers[i].resize(256 * 4 * 2 * 256);
    places[i] = layers[i].data();
  }
  auto loaded = space->Load(prompt->ids, {larder::SegmentsView(0, places, 2)});
  std::printf("matched %u, loaded %u chunks of %u tokens\n",
              match.ok() ? match->usable : 0, loaded.usable, loaded.tokens);
  return loaded.usable == 1 && layers[1].back() == 'k' ? 0 : 1;
}
