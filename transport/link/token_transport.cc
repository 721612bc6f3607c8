#include "transport/link/token_transport.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>

#include <set>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "transport/link/token_messages.h"

namespace larder {
namespace {

// The links of the data network as their services see them, by the ones
// beneath.
class ProvedLinks {
 public:
  struct Entry {
    std::weak_ptr<Link> link;
    LinkService* service = nullptr;
  };
  void Add(const Link* beneath, Entry entry) ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    links_[beneath] = std::move(entry);
  }
  void Remove(const Link* beneath) ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    links_.erase(beneath);
  }
  Entry Find(const Link* beneath) const ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    const auto it = links_.find(beneath);
    return it == links_.end() ? Entry() : it->second;
  }

 private:
  mutable absl::Mutex mu_;
  absl::flat_hash_map<const Link*, Entry> links_ ABSL_GUARDED_BY(mu_);
};

// A link whose peer is known.
class ProvedLink final : public Link {
 public:
  ProvedLink(std::shared_ptr<Link> beneath, Peer peer, std::string greeting,
             std::shared_ptr<ProvedLinks> links)
      : beneath_(std::move(beneath)),
        peer_(std::move(peer)),
        greeting_(std::move(greeting)),
        links_(std::move(links)) {}
  ~ProvedLink() override { links_->Remove(beneath_.get()); }

  void Call(std::string message, const CallOptions& options,
            Replied replied) override {
    beneath_->Call(std::move(message), options, std::move(replied));
  }
  LandingId OpenLanding(MutableByteSpan memory, Landed landed) override {
    return beneath_->OpenLanding(memory, std::move(landed));
  }
  void CloseLanding(LandingId landing, Task closed) override {
    beneath_->CloseLanding(landing, std::move(closed));
  }
  void Put(LandingId landing, uint64_t offset, ByteSpan bytes, Urgency urgency,
           Done done) override {
    beneath_->Put(landing, offset, bytes, urgency, std::move(done));
  }
  void Close() override { beneath_->Close(); }
  const std::string& peer_greeting() const override { return greeting_; }
  const Peer& peer() const override { return peer_; }
  LinkStats Stats() const override { return beneath_->Stats(); }

 private:
  const std::shared_ptr<Link> beneath_;
  const Peer peer_;
  const std::string greeting_;
  const std::shared_ptr<ProvedLinks> links_;
};

class TokenTransport final : public Transport {
 public:
  explicit TokenTransport(TokenTransportParts parts)
      : tokens_(*parts.clock, parts.tokens),
        data_address_(std::move(parts.data_address)),
        grants_(*this),
        links_(*this),
        data_(std::move(parts.data)),
        control_(std::move(parts.control)) {}

  StatusOr<std::string> Listen(const std::string& address,
                               LinkService& service) override {
    if (RAND_bytes(proof_key_, sizeof proof_key_) != 1) {
      return absl::InternalError("no random bytes");
    }
    service_ = &service;
    LARDER_ASSIGN_OR_RETURN(data_address_,
                            data_->Listen(data_address_, links_));
    return control_->Listen(address, grants_);
  }

  void Connect(const std::string& address, std::string greeting,
               LinkService& service, absl::Time deadline,
               Connected connected) override {
    control_->Connect(
        address, EncodeTokenInquiry(), grants_, deadline,
        [this, address, greeting = std::move(greeting), &service, deadline,
         connected = std::move(connected)](
            StatusOr<std::shared_ptr<Link>> control) mutable {
          if (!control.ok()) {
            return std::move(connected)(control.status());
          }
          Peer peer{address, (*control)->peer().identity};
          StatusOr<TokenGrant> grant =
              ParseTokenGrant((*control)->peer_greeting());
          (*control)->Close();
          if (grant.ok() && peer.identity.empty()) {
            grant = absl::UnauthenticatedError("the peer proved nobody");
          }
          if (!grant.ok()) return std::move(connected)(grant.status());
          ConnectData(*std::move(grant), std::move(peer), std::move(greeting),
                      service, deadline, std::move(connected));
        });
  }

 private:
  // The listener of the network that proves. It keeps no link for long: who
  // connects has all it wants with the answer to its greeting.
  class Grants final : public LinkService {
   public:
    explicit Grants(TokenTransport& owner) : owner_(owner) {}

    StatusOr<std::string> Admit(const std::string& greeting,
                                const Peer& peer) override {
      LARDER_RETURN_IF_ERROR(ParseTokenInquiry(greeting));
      if (peer.identity.size() > kTokenIdentityBytesMax) {
        return absl::InvalidArgumentError("an identity that is too long");
      }
      TokenGrant grant;
      LARDER_ASSIGN_OR_RETURN(grant.token, owner_.tokens_.Issue(peer.identity));
      LARDER_ASSIGN_OR_RETURN(grant.proof, owner_.ProofOf(grant.token));
      grant.identity = peer.identity;
      grant.address = owner_.data_address_;
      return Encode(grant);
    }
    // Closing it here would cut the answer short: who connected closes it.
    void OnLink(std::shared_ptr<Link> link) override {
      absl::MutexLock lock(&mu_);
      links_.insert(std::move(link));
    }
    void OnCall(const std::shared_ptr<Link>&, std::string, absl::Time,
                Answer answer) override {
      answer.Send(absl::UnimplementedError("nothing is asked here"));
    }
    void OnLost(const std::shared_ptr<Link>& link, const Status&) override {
      absl::MutexLock lock(&mu_);
      links_.erase(link);
    }

   private:
    TokenTransport& owner_;
    absl::Mutex mu_;
    std::set<std::shared_ptr<Link>> links_ ABSL_GUARDED_BY(mu_);
  };

  // What happens on links of the other network, in either direction.
  class Links final : public LinkService {
   public:
    explicit Links(TokenTransport& owner) : owner_(owner) {}

    StatusOr<std::string> Admit(const std::string& greeting,
                                const Peer& peer) override {
      LARDER_ASSIGN_OR_RETURN(const TokenHello hello,
                              ParseTokenHello(greeting));
      LARDER_ASSIGN_OR_RETURN(const std::string identity,
                              owner_.tokens_.Redeem(hello.token));
      if (identity != hello.identity) {
        return absl::UnauthenticatedError("the token is another's");
      }
      TokenWelcome welcome;
      LARDER_ASSIGN_OR_RETURN(welcome.proof, owner_.ProofOf(hello.token));
      LARDER_ASSIGN_OR_RETURN(
          welcome.greeting,
          owner_.service_->Admit(hello.greeting, {peer.address, identity}));
      return Encode(welcome);
    }
    void OnLink(std::shared_ptr<Link> link) override {
      // As it was admitted.
      StatusOr<TokenHello> hello = ParseTokenHello(link->peer_greeting());
      Peer peer{link->peer_address(), std::move(hello->identity)};
      owner_.service_->OnLink(owner_.Wrap(std::move(link), std::move(peer),
                                          std::move(hello->greeting),
                                          *owner_.service_));
    }
    void OnCall(const std::shared_ptr<Link>& link, std::string message,
                absl::Time deadline, Answer answer) override {
      const ProvedLinks::Entry entry = owner_.proved_->Find(link.get());
      if (const std::shared_ptr<Link> proved = entry.link.lock()) {
        entry.service->OnCall(proved, std::move(message), deadline,
                              std::move(answer));
      }
    }
    void OnLost(const std::shared_ptr<Link>& link, const Status& why) override {
      const ProvedLinks::Entry entry = owner_.proved_->Find(link.get());
      if (const std::shared_ptr<Link> proved = entry.link.lock()) {
        entry.service->OnLost(proved, why);
      }
    }

   private:
    TokenTransport& owner_;
  };

  // What only this listener can know of a token, so that who shows one is
  // answered by whom it was got from.
  StatusOr<std::string> ProofOf(const std::string& token) const {
    std::string proof(kTokenBytes, '\0');
    unsigned size = 0;
    if (HMAC(EVP_sha256(), proof_key_, sizeof proof_key_,
             reinterpret_cast<const unsigned char*>(token.data()), token.size(),
             reinterpret_cast<unsigned char*>(proof.data()),
             &size) == nullptr ||
        size != kTokenBytes) {
      return absl::InternalError("OpenSSL cannot compute HMAC-SHA256");
    }
    return proof;
  }

  std::shared_ptr<Link> Wrap(std::shared_ptr<Link> beneath, Peer peer,
                             std::string greeting, LinkService& service) {
    const Link* const key = beneath.get();
    auto proved = std::make_shared<ProvedLink>(
        std::move(beneath), std::move(peer), std::move(greeting), proved_);
    proved_->Add(key, {proved, &service});
    return proved;
  }

  void ConnectData(TokenGrant grant, Peer peer, std::string greeting,
                   LinkService& service, absl::Time deadline,
                   Connected connected) {
    std::string hello =
        Encode(TokenHello{std::move(grant.token), std::move(grant.identity),
                          std::move(greeting)});
    data_->Connect(
        grant.address, std::move(hello), links_, deadline,
        [this, proof = std::move(grant.proof), peer = std::move(peer), &service,
         connected = std::move(connected)](
            StatusOr<std::shared_ptr<Link>> link) mutable {
          if (!link.ok()) return std::move(connected)(link.status());
          StatusOr<TokenWelcome> welcome =
              ParseTokenWelcome((*link)->peer_greeting());
          if (welcome.ok() && CRYPTO_memcmp(welcome->proof.data(), proof.data(),
                                            kTokenBytes) != 0) {
            welcome = absl::UnauthenticatedError(
                "another process answers than gave the token");
          }
          if (!welcome.ok()) {
            (*link)->Close();
            return std::move(connected)(welcome.status());
          }
          std::move(connected)(Wrap(*std::move(link), std::move(peer),
                                    std::move(welcome->greeting), service));
        });
  }

  LinkTokens tokens_;
  unsigned char proof_key_[32] = {};  // written before anything listens
  std::string data_address_;          // as is this
  LinkService* service_ = nullptr;    // and this
  const std::shared_ptr<ProvedLinks> proved_ = std::make_shared<ProvedLinks>();
  Grants grants_;
  Links links_;
  // What asks for tokens ends first: it goes on to the other.
  const std::unique_ptr<Transport> data_;
  const std::unique_ptr<Transport> control_;
};

}  // namespace

std::unique_ptr<Transport> NewTokenTransport(TokenTransportParts parts) {
  return std::make_unique<TokenTransport>(std::move(parts));
}

}  // namespace larder
