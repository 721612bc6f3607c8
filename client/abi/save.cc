#include <memory>
#include <utility>
#include <vector>

#include "client/abi/abi.h"

namespace larder::abi {
extern "C" {

larder_status larder_save_begin(larder_space* space,
                                const larder_save_opts* opts,
                                larder_save** out) {
  if (space == nullptr || out == nullptr) {
    return Invalid("space or out is NULL");
  }
  *out = nullptr;
  larder_save_opts raw;
  if (const larder_status bad = Take(opts, raw); bad != LARDER_OK) return bad;
  if ((raw.flags & ~LARDER_SAVE_WAIT) != 0) {
    return Refuse(LARDER_E_UNSUPPORTED, "save: unknown flags");
  }
  core::SaveRequest request;
  request.group = GroupIndex{raw.group};
  request.box =
      BoxOf(raw.layer_begin, raw.layer_count, raw.head_begin, raw.head_count,
            raw.interleave_index, raw.interleave_count);
  request.token_count = raw.token_count;
  if (raw.id != nullptr) request.id = ToId(*raw.id);
  request.wait = (raw.flags & LARDER_SAVE_WAIT) != 0;
  request.deadline = ToDeadline(space->space->client(), raw.deadline_ms);
  StatusOr<std::unique_ptr<core::Saver>> saver =
      core::Saver::Begin(*space->space, request);
  if (!saver.ok()) return Answer(saver.status());
  *out = new larder_save{space->space, *std::move(saver)};
  return LARDER_OK;
}

larder_status larder_save_segment(larder_save* save, uint32_t layer,
                                  void** data, uint64_t* bytes) {
  if (save == nullptr || data == nullptr) {
    return Invalid("save or data is NULL");
  }
  const StatusOr<MutableByteSpan> segment = save->saver->Segment(layer);
  if (!segment.ok()) return Answer(segment.status());
  *data = segment->data();
  if (bytes != nullptr) *bytes = segment->size();
  return LARDER_OK;
}

larder_status larder_save_gather(larder_save* save, const larder_view* view,
                                 uint32_t layer_begin, uint32_t layer_count) {
  if (save == nullptr || view == nullptr) {
    return Invalid("save or view is NULL");
  }
  std::vector<core::View> views;
  const larder_status bad = TakeView(save->space->descriptor(), view, views);
  if (bad != LARDER_OK) return bad;
  const uint32_t end =
      layer_count == 0 ? UINT32_MAX : layer_begin + layer_count;
  return Answer(save->saver->Gather(views[0], layer_begin, end));
}

larder_status larder_save_gather_device(larder_save* save,
                                        const larder_view* view,
                                        uint32_t layer_begin,
                                        uint32_t layer_count,
                                        const larder_device_opts* opts) {
  if (save == nullptr || view == nullptr || opts == nullptr) {
    return Invalid("save, view or opts is NULL");
  }
  core::DeviceTarget target;
  if (const larder_status bad = TakeDevice(opts, target); bad != LARDER_OK) {
    return bad;
  }
  if (target.stream == nullptr) {
    return Invalid("save: which stream writes the KV?");
  }
  if (target.ready_word != 0 || !target.layer_events.empty()) {
    return Invalid("save: a ready word or layer events are for loads");
  }
  std::vector<core::View> views;
  const larder_status bad = TakeView(save->space->descriptor(), view, views);
  if (bad != LARDER_OK) return bad;
  const uint32_t end =
      layer_count == 0 ? UINT32_MAX : layer_begin + layer_count;
  return Answer(save->saver->GatherOnDevice(views[0], layer_begin, end,
                                            *target.device, target.stream));
}

int larder_save_gathering(const larder_save* save) {
  return save != nullptr && save->saver->Gathering() ? 1 : 0;
}

larder_status larder_save_truncate(larder_save* save, uint32_t token_count) {
  if (save == nullptr) return Invalid("save is NULL");
  return Answer(save->saver->Truncate(token_count));
}

larder_status larder_save_commit(larder_save* save,
                                 const larder_commit_opts* opts) {
  if (save == nullptr) return Invalid("save is NULL");
  larder_commit_opts raw;
  if (const larder_status bad = Take(opts, raw); bad != LARDER_OK) return bad;
  core::CommitHints hints;
  if (raw.id != nullptr) hints.id = ToId(*raw.id);
  if (raw.parent != nullptr) hints.parent = ToId(*raw.parent);
  if (raw.root_content != nullptr) {
    hints.root_content = ToId<Sha256Digest>(*raw.root_content);
  }
  hints.token_begin = raw.token_begin;
  hints.lineage = static_cast<Lineage>(raw.lineage);
  hints.stages = raw.stages;
  hints.want_durable =
      raw.want_durable != 0 || (raw.stages & (1 << LARDER_DURABLE)) != 0;
  hints.priority = raw.priority;
  hints.stop_reason = raw.stop_reason;
  hints.user_data = raw.user_data;
  if (raw.blocks != nullptr) {
    larder_blocks blocks;
    if (const larder_status bad = Take(raw.blocks, blocks); bad != LARDER_OK) {
      return bad;
    }
    if ((blocks.flags & ~(LARDER_BLOCKS_SIGNED | LARDER_BLOCKS_KEYED)) != 0) {
      return Refuse(LARDER_E_UNSUPPORTED, "blocks: unknown flags");
    }
    if ((blocks.token_count != 0 && blocks.tokens == nullptr) ||
        (blocks.hash_count != 0 && blocks.hashes == nullptr)) {
      return Invalid("blocks: tokens or hashes is NULL");
    }
    hints.blocks.tokens = {blocks.tokens, blocks.token_count};
    hints.blocks.hashes = {blocks.hashes, blocks.hash_count};
    hints.blocks.signed_hashes = (blocks.flags & LARDER_BLOCKS_SIGNED) != 0;
    hints.blocks.keyed = (blocks.flags & LARDER_BLOCKS_KEYED) != 0;
  }
  if (raw.queue != nullptr) hints.queue = raw.queue->queue;
  if (raw.destination != nullptr) hints.destination = raw.destination;
  return Answer(save->saver->Commit(hints));
}

larder_status larder_save_wait(larder_save* save, larder_stage stage,
                               uint32_t deadline_ms) {
  if (save == nullptr) return Invalid("save is NULL");
  if (stage < LARDER_SOURCE_REUSABLE || stage > LARDER_DELIVERED) {
    return Invalid("no such stage");
  }
  return Answer(
      save->saver->Wait(static_cast<SaveStage>(stage),
                        ToDeadline(save->space->client(), deadline_ms)));
}

larder_job larder_save_job(const larder_save* save) {
  return save == nullptr ? 0 : save->saver->job();
}

void larder_save_close(larder_save* save) {
  delete save;
}

}  // extern "C"

}  // namespace larder::abi
