// Everything in store/ that reads foreign bytes. The first byte of an input
// says what to do with the rest:
//   0  a part record as it is
//   1  a part record whose checksums are made to fit first, as a malicious
//      client would, so that what lies behind them is reached
//   2  an encoded meta
//   3  an encoded space

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "store/checksum.h"
#include "store/record.h"
#include "store/record_internal.h"
#include "store/space.h"

namespace larder {
namespace {

void Require(bool ok) {
  if (!ok) std::abort();
}

void PutChecksum(std::vector<std::byte>& record, size_t at, ByteSpan of) {
  const Checksum checksum = ComputeChecksum(of);
  std::memcpy(record.data() + at, &checksum.low, 8);
  std::memcpy(record.data() + at + 8, &checksum.high, 8);
}

uint64_t Field(const std::vector<std::byte>& record, size_t at, size_t size) {
  uint64_t value = 0;
  std::memcpy(&value, record.data() + at, size);
  return value;
}

// Stripe checksums of where the tables say stripes are, then those of the
// tables and the header.
void Forge(std::vector<std::byte>& record) {
  if (record.size() < kRecordHeaderBytes) return;
  const uint64_t payload = Field(record, internal::kPayloadOffsetAt, 8);
  if (payload < kRecordHeaderBytes || payload > record.size()) return;
  const ByteSpan all(record);
  const auto seal = [&] {
    PutChecksum(record, internal::kTablesChecksumAt,
                all.subspan(kRecordHeaderBytes, payload - kRecordHeaderBytes));
    PutChecksum(record, internal::kChecksumAt,
                all.first(internal::kChecksumAt));
  };
  seal();
  const auto view = RecordView::Parse(record);
  if (!view.ok()) return;
  const size_t checksums =
      kRecordHeaderBytes + view->segment_count() * internal::kSegmentEntryBytes;
  for (size_t i = 0; i < view->segment_count(); ++i) {
    const SegmentEntry segment = view->segment(i);
    for (size_t s = 0; s < segment.k_stripes + segment.v_stripes; ++s) {
      PutChecksum(record,
                  checksums + (segment.stripe_begin + s) *
                                  internal::kStripeChecksumBytes,
                  view->stripe_bytes(segment, s));
    }
  }
  seal();
}

void TryRecord(ByteSpan bytes) {
  const auto view = RecordView::Parse(bytes);
  const Status verified = view.ok() ? view->VerifyPayload() : view.status();
  std::vector<std::byte> copy(bytes.size());
  const auto copied = CopyRecordVerified(bytes, copy);
  // A record that verifies can be copied, and what was copied verifies.
  if (verified.ok()) Require(copied.ok());
  if (!copied.ok()) return;
  Require(view.ok() && *copied == view->meta());
  const auto again = RecordView::Parse(copy);
  Require(again.ok() && again->VerifyPayload().ok());
  for (size_t i = 0; i < again->segment_count(); ++i) {
    const SegmentEntry segment = again->segment(i);
    for (size_t s = 0; s <= segment.k_stripes + segment.v_stripes; ++s) {
      const ByteSpan stripe = again->stripe_bytes(segment, s);
      Require(stripe.empty() ||
              (stripe.data() >= copy.data() &&
               stripe.data() + stripe.size() <= copy.data() + copy.size()));
    }
  }
  RecordMeta meta = *copied;
  meta.generation += 1;
  RestampRecord(copy, meta);
  const auto restamped = RecordView::Parse(copy);
  Require(restamped.ok() && restamped->meta() == meta);
}

void TryMeta(ByteSpan bytes) {
  const auto meta = DecodeMeta(bytes);
  if (!meta.ok()) return;
  std::byte encoded[kEncodedMetaBytes];
  EncodeMeta(*meta, encoded);
  Require(std::equal(bytes.begin(), bytes.end(), encoded,
                     encoded + sizeof encoded));
}

void TrySpace(ByteSpan bytes) {
  const auto space = DecodeSpace(bytes);
  if (!space.ok()) return;
  Require(Validate(*space).ok());
  const std::string encoded = EncodeSpace(*space);
  Require(encoded.size() == bytes.size() &&
          std::memcmp(encoded.data(), bytes.data(), bytes.size()) == 0);
}

}  // namespace
}  // namespace larder

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const larder::ByteSpan bytes =
      std::as_bytes(std::span(data, size)).subspan(1);
  switch (data[0] % 4) {
    case 0:
      larder::TryRecord(bytes);
      break;
    case 1: {
      std::vector<std::byte> forged(bytes.begin(), bytes.end());
      larder::Forge(forged);
      larder::TryRecord(forged);
      break;
    }
    case 2:
      larder::TryMeta(bytes);
      break;
    case 3:
      larder::TrySpace(bytes);
      break;
  }
  return 0;
}
