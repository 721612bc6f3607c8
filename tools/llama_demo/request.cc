#include "tools/llama_demo/request.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <utility>

namespace larder {

StatusOr<std::vector<llama_token>> ReadDemoText(const DemoModel& model,
                                                const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  if (!in) return absl::NotFoundError(absl::StrCat("cannot read ", file));
  const std::string text(std::istreambuf_iterator<char>(in), {});
  return model.Tokenize("<|im_start|>user\nRead this.\n\n" + text);
}

StatusOr<DemoRequest> MakeDemoRequest(const DemoModel& model,
                                      const std::vector<llama_token>& text,
                                      uint32_t begin, uint32_t shared_tokens,
                                      const std::string& question) {
  if (begin > text.size() || shared_tokens > text.size() - begin) {
    return absl::InvalidArgumentError(
        absl::StrCat("the text has ", text.size(), " tokens; ", shared_tokens,
                     " from token ", begin, " were asked for"));
  }
  const auto from = text.begin() + begin;
  DemoRequest request;
  request.tokens.assign(from,
                        shared_tokens > 0 ? from + shared_tokens : text.end());
  request.shared_tokens = static_cast<uint32_t>(request.tokens.size());
  const std::vector<llama_token> rest =
      model.Tokenize("\n\n" + question + "<|im_end|>\n<|im_start|>assistant\n");
  request.tokens.insert(request.tokens.end(), rest.begin(), rest.end());
  return request;
}

Status DemoPrefill(DemoEngine& engine, const DemoRequest& request,
                   uint32_t begin, uint32_t end, LlamaPrompt* saving) {
  const uint32_t chunk = engine.cache().space().chunk_tokens;
  for (uint32_t at = begin; at < end;) {
    uint32_t next = std::min((at / chunk + 1) * chunk, end);
    if (at < request.shared_tokens) {
      next = std::min(next, request.shared_tokens);
    }
    LARDER_RETURN_IF_ERROR(engine.Decode(request.tokens, at, next));
    at = next;
    if (saving != nullptr && at < end) saving->Save();
  }
  return absl::OkStatus();
}

StatusOr<std::unique_ptr<DemoService>> DemoService::Connect(
    DemoEngine& engine, const std::string& socket,
    const LlamaPrefixOptions& options) {
  ClientOptions client_options;
  client_options.socket_path = socket;
  client_options.name = "larder_demo_engine";
  Result<Client> client = Client::Open(client_options);
  if (!client.ok()) {
    return absl::UnavailableError(
        absl::StrCat("larderd at ", socket, ": ", client.status().ToString()));
  }
  auto service = std::make_unique<DemoService>();
  service->client = std::move(*client);
  LARDER_ASSIGN_OR_RETURN(
      service->prefixes,
      LlamaPrefixCache::Open(engine.cache(), service->client, options));
  return service;
}

LlamaPrefixOptions DemoPrefixOptions(std::chrono::milliseconds load_deadline,
                                     bool want_durable) {
  LlamaPrefixOptions options;
  options.load_deadline = load_deadline;
  options.save_deadline = std::chrono::milliseconds(1000);
  options.want_durable = want_durable;
  return options;
}

uint64_t DemoService::PromotedBytes() {
  const Result<larder_usage> usage = client.Usage();
  return usage.ok() ? usage->promoted_bytes : 0;
}

double Ms(std::chrono::nanoseconds time) {
  return std::chrono::duration<double, std::milli>(time).count();
}

}  // namespace larder
