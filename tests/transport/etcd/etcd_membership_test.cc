// Membership over a real etcd.

#include "transport/etcd/etcd_membership.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/testing/etcd_process.h"
#include "transport/etcd/node_value.h"

namespace larder {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::UnorderedElementsAre;

// A member, and what it has heard.
class Member {
 public:
  Member(std::vector<std::string> endpoints, const std::string& name,
         uint64_t incarnation = 1, EtcdOptions options = {}) {
    options.endpoints = std::move(endpoints);
    if (options.cluster.empty()) options.cluster = "test";
    options.lease = absl::Seconds(1);
    options.call_timeout = absl::Milliseconds(700);
    options.retry = absl::Milliseconds(20);
    options.log = [this](const std::string& line) {
      absl::MutexLock lock(&mu_);
      log_ += line + "\n";
    };
    auto made = NewEtcdMembership(options);
    EXPECT_TRUE(made.ok()) << made.status();
    self_.id = ComputeNodeId(options.cluster, name);
    self_.name = name;
    self_.address = "192.0.2.1:9400";
    self_.incarnation = incarnation;
    membership_ = *std::move(made);
  }

  Member& Join() {
    membership_->Join(
        self_,
        [this](std::shared_ptr<const ClusterView> view) {
          absl::MutexLock lock(&mu_);
          if (view_ != nullptr && view->revision <= view_->revision) {
            ADD_FAILURE() << "views out of order";
          }
          view_ = std::move(view);
        },
        [this](const Status& status) {
          absl::MutexLock lock(&mu_);
          joined_ = status;
        });
    return *this;
  }
  // What Join said.
  Status Joined() {
    absl::MutexLock lock(&mu_);
    const auto said = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      return joined_.has_value();
    };
    mu_.Await(absl::Condition(&said));
    return *joined_;
  }
  // Waits until exactly these are there.
  void Await(const std::vector<std::string>& names, bool current = true) {
    absl::MutexLock lock(&mu_);
    const auto so = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      return view_ != nullptr && view_->current == current &&
             testing::Value(Names(), testing::UnorderedElementsAreArray(names));
    };
    mu_.Await(absl::Condition(&so));
  }
  void AwaitDraining(const std::string& name) {
    absl::MutexLock lock(&mu_);
    const auto so = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      return std::any_of(
          view_->nodes.begin(), view_->nodes.end(),
          [&](const Node& n) { return n.name == name && n.draining; });
    };
    mu_.Await(absl::Condition(&so));
  }
  void AwaitLog(const std::string& text) {
    absl::MutexLock lock(&mu_);
    const auto so = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      return log_.find(text) != std::string::npos;
    };
    mu_.Await(absl::Condition(&so));
  }
  void Drain() {
    self_.draining = true;
    membership_->Update(self_, [](const Status&) {});
  }
  void Leave() {
    absl::Notification left;
    membership_->Leave([&](const Status& status) {
      EXPECT_TRUE(status.ok()) << status;
      left.Notify();
    });
    left.WaitForNotification();
  }
  void Die() { membership_.reset(); }
  const Node& self() const { return self_; }

 private:
  std::vector<std::string> Names() const {
    std::vector<std::string> names;
    for (const Node& node : view_->nodes) names.push_back(node.name);
    return names;
  }

  Node self_;
  absl::Mutex mu_;
  std::shared_ptr<const ClusterView> view_;
  std::optional<Status> joined_;
  std::string log_;
  std::unique_ptr<Membership> membership_;
};

class EtcdTest : public testing::Test {
 protected:
  EtcdProcess etcd_;
  const std::vector<std::string> endpoints_ = {etcd_.endpoint()};
};

TEST_F(EtcdTest, NodesComeAndGo) {
  Member a(endpoints_, "a"), b(endpoints_, "b");
  EXPECT_TRUE(a.Join().Joined().ok());
  a.Await({"a"});
  EXPECT_TRUE(b.Join().Joined().ok());
  a.Await({"a", "b"});
  b.Await({"a", "b"});
  b.Drain();
  a.AwaitDraining("b");
  b.Leave();
  a.Await({"a"});
}

TEST_F(EtcdTest, OneThatDiesIsGoneWithItsLease) {
  Member a(endpoints_, "a"), b(endpoints_, "b");
  a.Join().Await({"a"});
  b.Join().Await({"a", "b"});
  b.Die();
  a.Await({"a"});
}

TEST_F(EtcdTest, TwoOfOneName) {
  auto a = std::make_unique<Member>(endpoints_, "a", 1);
  Member again(endpoints_, "a", 2);
  EXPECT_TRUE(a->Join().Joined().ok());
  const Status refused = again.Join().Joined();
  EXPECT_TRUE(absl::IsAlreadyExists(refused)) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("a name of its own"));
  again.Await({"a"});
  // Of a pod that was replaced, the old one may end long after the new began.
  a = nullptr;
  again.AwaitLog("joined");
}

TEST_F(EtcdTest, ARestartedNodeWaitsForItsFormerLife) {
  auto a = std::make_unique<Member>(endpoints_, "a", 1);
  EXPECT_TRUE(a->Join().Joined().ok());
  a->Die();
  Member again(endpoints_, "a", 2);
  EXPECT_TRUE(again.Join().Joined().ok());
  again.Await({"a"});
}

TEST_F(EtcdTest, EtcdGoesAndComesBack) {
  Member a(endpoints_, "a"), b(endpoints_, "b");
  a.Join().Await({"a"});
  b.Join().Await({"a", "b"});
  a.Await({"a", "b"});
  etcd_.Kill();
  a.Await({"a", "b"}, false);  // as it was
  etcd_.Start();
  a.Await({"a", "b"});
  b.Await({"a", "b"});
}

TEST_F(EtcdTest, EtcdForgetsEverything) {
  Member a(endpoints_, "a"), b(endpoints_, "b");
  a.Join().Await({"a"});
  b.Join().Await({"a", "b"});
  etcd_.Kill();
  etcd_.Forget();
  etcd_.Start();
  a.Await({"a", "b"});
  b.Await({"a", "b"});
  a.AwaitLog("enters again");
}

TEST_F(EtcdTest, EtcdStandsStill) {
  Member a(endpoints_, "a");
  a.Join().Await({"a"});
  etcd_.Signal(SIGSTOP);
  a.Await({"a"}, false);
  {
    Member b(endpoints_, "b");
    EXPECT_TRUE(absl::IsUnavailable(b.Join().Joined()));
  }  // ends although nobody answers
  etcd_.Signal(SIGCONT);
  a.Await({"a"});
}

TEST_F(EtcdTest, WhatNobodyCanReadIsPassedOver) {
  ASSERT_EQ(etcd_.Ctl("put larder/test/nodes/x 'no json'"), 0);
  ASSERT_EQ(etcd_.Ctl("put larder/test/nodes/y '{\"version\":7}'"), 0);
  ASSERT_EQ(etcd_.Ctl("put larder/test/nodes/ '{}'"), 0);
  Member a(endpoints_, "a");
  a.Join().Await({"a"});
  a.AwaitLog("node x is no JSON object");
  ASSERT_EQ(etcd_.Ctl("put larder/test/nodes/z 'later'"), 0);
  a.AwaitLog("node z");
  ASSERT_EQ(
      etcd_.Ctl("put larder/test/nodes/z "
                "'{\"version\":1,\"address\":\"a:1\",\"incarnation\":3}'"),
      0);
  a.Await({"a", "z"});
}

TEST_F(EtcdTest, ClustersDoNotMix) {
  Member a(endpoints_, "a");
  EtcdOptions options;
  options.cluster = "test2";
  Member other(endpoints_, "o", 1, options);
  a.Join().Await({"a"});
  other.Join().Await({"o"});
}

TEST_F(EtcdTest, AnEndpointThatDoesNotAnswerIsPassedOver) {
  Member a({absl::StrCat("http://127.0.0.1:", FreePort()), etcd_.endpoint()},
           "a");
  a.Join().Await({"a"});
}

TEST_F(EtcdTest, Passwords) {
  ASSERT_EQ(etcd_.Ctl("user add root:secret"), 0);
  ASSERT_EQ(etcd_.Ctl("user grant-role root root"), 0);
  ASSERT_EQ(etcd_.Ctl("auth enable"), 0);
  EtcdOptions options;
  options.user = "root";
  options.password = "wrong";
  Member wrong(endpoints_, "w", 1, options);
  EXPECT_FALSE(wrong.Join().Joined().ok());
  options.password = "secret";
  Member right(endpoints_, "r", 1, options);
  EXPECT_TRUE(right.Join().Joined().ok());
  right.Await({"r"});
}

TEST(EtcdOptionsTest, AreChecked) {
  EtcdOptions options;
  options.cluster = "c";
  EXPECT_TRUE(absl::IsInvalidArgument(NewEtcdMembership(options).status()));
  options.endpoints = {"http://127.0.0.1"};
  EXPECT_TRUE(absl::IsInvalidArgument(NewEtcdMembership(options).status()));
  options.endpoints = {"http://127.0.0.1:2379"};
  EXPECT_TRUE(NewEtcdMembership(options).ok());
  options.ca_file = "/nowhere/ca.pem";
  EXPECT_TRUE(absl::IsNotFound(NewEtcdMembership(options).status()));
  options.ca_file.clear();
  options.cluster = "a/b";
  EXPECT_TRUE(absl::IsInvalidArgument(NewEtcdMembership(options).status()));
}

TEST(NodeValueTest, ThereAndBack) {
  Node node;
  node.name = "n";
  node.id = ComputeNodeId("c", "n");
  node.address = "[2001:db8::7]:9400";
  node.incarnation = UINT64_MAX;
  node.draining = true;
  const auto parsed = ParseNodeValue("c", "n", EncodeNodeValue(node));
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(*parsed, node);
}

}  // namespace
}  // namespace larder
