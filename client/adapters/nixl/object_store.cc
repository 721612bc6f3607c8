#include "client/adapters/nixl/object_store.h"

#include <poll.h>

#include <algorithm>
#include <utility>

namespace larder::nixl {
namespace {

constexpr auto kConnectPause = std::chrono::milliseconds(100);
constexpr int kStopPollMs = 10;
constexpr uint32_t kCompletionsPerPoll = 64;

SpaceOptions Describe(const Options& options) {
  SpaceOptions space;
  space.model_name = options.space;
  // The bytes mean what the agents of this space agree on, and its name is all
  // they say about it.
  const ObjectName digest = NameOf("larder nixl space " + options.space);
  std::copy(digest.begin(), digest.end(), space.weights.bytes);
  space.cache_dtype = "opaque";
  space.rope = "none";
  space.engine_layout = "nixl objects 1";
  space.hash_scheme = "nixl key sha256";
  space.value_bytes_max = options.value_bytes_max;
  return space;
}

// The worst of two, for a request has but one status.
Status Worse(Status a, Status b) {
  const auto rank = [](Status status) {
    switch (status) {
      case kSuccess:
        return 0;
      case kNotFound:
        return 1;
      case kMismatch:
        return 2;
      case kCancelled:
        return 3;
      default:
        return 4;
    }
  };
  return rank(a) >= rank(b) ? a : b;
}

Status ToStatus(uint8_t reason) {
  switch (reason) {
    case LARDER_REASON_NONE:
      return kSuccess;
    case LARDER_REASON_NEVER_SEEN:
    case LARDER_REASON_EVICTED:
    case LARDER_REASON_SPACE_DIFFERS:
    case LARDER_REASON_INCOMPLETE:
    case LARDER_REASON_LINEAGE:
    case LARDER_REASON_EPOCH:
    // The daemon drops its copy: the next one to look finds none.
    case LARDER_REASON_CORRUPT:
      return kNotFound;
    case LARDER_REASON_NOT_TRIED:
      return kMismatch;
    case LARDER_REASON_CANCELLED:
      return kCancelled;
    default:
      return kBackendError;
  }
}

Result<std::vector<Id>> IdsOf(const Space& space, const ObjectName* objects,
                              size_t count) {
  std::vector<Id> ids(count);
  const int32_t status = larder_ids_from_hashes(
      space.get(), objects, sizeof(ObjectName), 0, count, ids.data());
  if (status < 0) return Outcome::From(status);
  return ids;
}

}  // namespace

ObjectStore::~ObjectStore() {
  if (client_) larder_drain(client_.get(), 0);
}

Outcome ObjectStore::Connect() {
  std::lock_guard lock(mu_);
  if (client_) return Outcome();
  if (std::chrono::steady_clock::now() < connect_again_) {
    return connect_failure_;
  }
  const auto fail = [&](const Outcome& failure) {
    connect_failure_ = failure;
    connect_again_ = std::chrono::steady_clock::now() + kConnectPause;
    return failure;
  };
  const auto by = std::chrono::steady_clock::now() + options_.deadline;
  ClientOptions about;
  about.socket_path = options_.socket;
  about.token = options_.token;
  about.name = "nixl";
  about.default_deadline = options_.deadline;
  about.staging_bytes = options_.staging_bytes;
  about.worker_threads = options_.threads;
  Result<Client> client = Client::Open(about, options_.deadline);
  if (!client.ok()) return fail(client.status());
  Result<Space> space = client->OpenSpace(
      Describe(options_), by - std::chrono::steady_clock::now());
  if (!space.ok()) return fail(space.status());
  Result<Queue> queue = client->OpenQueue();
  if (!queue.ok()) return fail(queue.status());
  client_ = *std::move(client);
  space_ = *std::move(space);
  queue_ = *std::move(queue);
  return Outcome();
}

Result<std::vector<bool>> ObjectStore::Find(
    const std::vector<ObjectName>& objects) {
  const Outcome connected = Connect();
  if (!connected.ok()) return connected;
  const Result<std::vector<Id>> ids =
      IdsOf(space_, objects.data(), objects.size());
  if (!ids.ok()) return ids.status();
  std::vector<uint8_t> states(objects.size());
  const int32_t status = larder_lookup(space_.get(), ids->data(), ids->size(),
                                       0, states.data(), nullptr);
  if (status < 0) return Outcome::From(status);
  std::vector<bool> found(objects.size());
  std::transform(
      states.begin(), states.end(), found.begin(),
      [](uint8_t state) { return larder_state_is_there(state) != 0; });
  return found;
}

Status ObjectStore::Start(Transfer& transfer) {
  std::lock_guard lock(mu_);
  if (transfer.jobs_left_ != 0) return kRepostActive;
  transfer.status_ = kSuccess;
  transfer.deleting_ = transfer.operation_ == kWrite && options_.overwrite;
  return Submit(transfer);
}

Status ObjectStore::Check(Transfer& transfer) {
  std::lock_guard lock(mu_);
  if (transfer.jobs_left_ != 0) TakeCompletions();
  return transfer.jobs_left_ != 0 ? kInProgress : transfer.status_;
}

void ObjectStore::Stop(Transfer& transfer) {
  std::unique_lock lock(mu_);
  transfer.deleting_ = false;
  for (const auto& job : transfer.jobs_) {
    if (!job->done) larder_cancel(client_.get(), job->id);
  }
  // Bounded: every job has a deadline, and its completion comes.
  for (;;) {
    TakeCompletions();
    if (transfer.jobs_left_ == 0) return;
    lock.unlock();
    // Another thread may take our completion, hence the short wait.
    pollfd ready{queue_.fd(), POLLIN, 0};
    poll(&ready, 1, kStopPollMs);
    lock.lock();
  }
}

// mu_ is held, here and below.
void ObjectStore::TakeCompletions() {
  while (queue_) {
    const auto done = queue_.Poll(kCompletionsPerPoll);
    if (!done.ok() || done->empty()) return;
    for (const larder_completion& completion : *done) {
      // The arrays of a completion live until the next poll, so what the
      // end of one job starts (the writing after the deleting) does not poll.
      Finish(*reinterpret_cast<Transfer::Job*>(completion.user_data),
             completion);
    }
  }
}

void ObjectStore::Finish(Transfer::Job& job,
                         const larder_completion& completion) {
  Transfer& transfer = *job.transfer;
  Status status = completion.status == LARDER_OK            ? kSuccess
                  : completion.status == LARDER_E_CANCELLED ? kCancelled
                                                            : kBackendError;
  // What was deleted need not have been there.
  if (completion.op != LARDER_OP_DELETE && completion.per_key != nullptr) {
    for (uint32_t i = 0; i < completion.count; ++i) {
      Status one = ToStatus(completion.per_key[i]);
      if (one == kSuccess && completion.op == LARDER_OP_GET &&
          completion.per_key_bytes[i] < job.batch->bytes_least[job.begin + i]) {
        one = kMismatch;
      }
      status = Worse(status, one);
    }
  }
  job.done = true;
  transfer.status_ = Worse(transfer.status_, status);
  if (--transfer.jobs_left_ != 0 || !transfer.deleting_) return;
  transfer.deleting_ = false;
  if (transfer.status_ == kSuccess) Submit(transfer);
}

Status ObjectStore::Submit(Transfer& transfer) {
  transfer.jobs_.clear();
  for (const Batch& batch : transfer.plan_.batches) {
    const auto count = static_cast<uint32_t>(batch.objects.size());
    const uint32_t share = (count + options_.threads - 1) / options_.threads;
    for (uint32_t begin = 0; begin < count; begin += share) {
      transfer.jobs_.push_back(std::make_unique<Transfer::Job>(Transfer::Job{
          &transfer, &batch, begin, std::min(share, count - begin)}));
    }
  }
  for (const auto& job : transfer.jobs_) {
    const Status submitted = SubmitJob(*job);
    if (submitted == kSuccess) {
      ++transfer.jobs_left_;
    } else {
      job->done = true;
      transfer.status_ = Worse(transfer.status_, submitted);
    }
  }
  // If only some could be submitted, their end brings the failure.
  if (transfer.jobs_left_ != 0) return kInProgress;
  transfer.deleting_ = false;
  return transfer.status_;
}

Status ObjectStore::SubmitJob(Transfer::Job& job) {
  const ObjectName* const objects = job.batch->objects.data() + job.begin;
  const auto user_data = reinterpret_cast<uint64_t>(&job);
  if (job.transfer->deleting_) {
    const Result<std::vector<Id>> ids = IdsOf(space_, objects, job.count);
    if (!ids.ok()) return kBackendError;
    return larder_submit_delete(space_.get(), queue_.get(), ids->data(),
                                ids->size(), 0, user_data, &job.id) == LARDER_OK
               ? kSuccess
               : kBackendError;
  }
  const larder_keys keys{objects, sizeof(ObjectName), 0, job.count, 0};
  const larder_piece* const pieces =
      job.batch->pieces.data() +
      size_t{job.begin} * job.batch->pieces_per_object;
  const auto submit = job.transfer->operation_ == kWrite ? larder_submit_put
                                                         : larder_submit_get;
  return submit(space_.get(), queue_.get(), &keys, pieces,
                job.batch->pieces_per_object, nullptr, user_data,
                &job.id) == LARDER_OK
             ? kSuccess
             : kBackendError;
}

}  // namespace larder::nixl
