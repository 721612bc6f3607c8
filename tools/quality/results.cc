#include "tools/quality/results.h"

#include <nlohmann/json.hpp>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <system_error>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace larder::quality {
namespace {

using Json = nlohmann::ordered_json;

Json ToJson(const TextFigures& text) {
  return {{"bits", text.rate.bits},
          {"elements", text.rate.elements},
          {"values",
           absl::StrFormat("%016x%016x", text.values.high, text.values.low)},
          {"kl", text.kl},
          {"same_top", text.same_top},
          {"delta_nll", text.delta_nll},
          {"attention_rel_mse", text.attention},
          {"retrieved", text.retrieved},
          {"retrievable", text.retrievable}};
}

// Throws what is not as ToJson writes it.
TextFigures TextFromJson(const Json& json) {
  TextFigures text;
  text.rate = {json.at("bits"), json.at("elements")};
  const std::string values = json.at("values");
  if (values.size() != 32 ||
      !absl::SimpleHexAtoi(values.substr(0, 16), &text.values.high) ||
      !absl::SimpleHexAtoi(values.substr(16), &text.values.low)) {
    throw std::invalid_argument("a checksum of 32 digits is missing");
  }
  text.kl = json.at("kl").get<std::vector<double>>();
  text.same_top = json.at("same_top");
  text.delta_nll = json.at("delta_nll");
  text.attention = json.at("attention_rel_mse").get<std::vector<double>>();
  text.retrieved = json.at("retrieved");
  text.retrievable = json.at("retrievable");
  if (text.kl.empty() || text.rate.elements == 0) {
    throw std::invalid_argument("a text without figures");
  }
  return text;
}

}  // namespace

StatusOr<Results> Results::Read(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::exists(path, error) && !error) return Results{};
  std::ifstream file(path, std::ios::binary);
  std::ostringstream contents;
  contents << file.rdbuf();
  if (!file.is_open() || contents.bad()) {
    return absl::UnavailableError("cannot read " + path);
  }
  StatusOr<Results> results = Parse(contents.str());
  if (!results.ok()) return Annotate(results.status(), path);
  return results;
}

StatusOr<Results> Results::Parse(const std::string& contents) {
  Results results;
  try {
    const Json json = Json::parse(contents);
    for (const Json& point : json.at("measured")) {
      const PointKey key{.weights = point.at("weights"),
                         .domain = point.at("domain"),
                         .codec = point.at("codec"),
                         .parameters = point.at("parameters"),
                         .profile = point.at("profile")};
      for (const auto& [digest, text] : point.at("texts").items()) {
        results.Put(key, digest, TextFromJson(text));
      }
    }
  } catch (const std::exception& error) {
    return absl::FailedPreconditionError(absl::StrCat(
        "not results of larder_quality run, which would be taken up: ",
        error.what()));
  }
  return results;
}

const TextFigures* Results::Find(const PointKey& key,
                                 const std::string& text) const {
  const auto point = points_.find(key);
  if (point == points_.end()) return nullptr;
  const auto at = point->second.find(text);
  return at == point->second.end() ? nullptr : &at->second;
}

void Results::Put(const PointKey& key, const std::string& text,
                  const TextFigures& figures) {
  points_[key][text] = figures;
}

void Results::Forget(const PointKey& key) {
  points_.erase(key);
}

std::string Results::Format(const std::string& figures) const {
  std::string out = figures;
  out.resize(out.find_last_of('}'));
  while (absl::ascii_isspace(static_cast<unsigned char>(out.back()))) {
    out.pop_back();
  }
  absl::StrAppend(&out, out == "{" ? "" : ",", "\n  \"measured\": [");
  bool first_point = true;
  for (const auto& [key, texts] : points_) {
    const Json head = {{"weights", key.weights},
                       {"domain", key.domain},
                       {"codec", key.codec},
                       {"parameters", key.parameters},
                       {"profile", key.profile}};
    std::string open = head.dump();
    open.pop_back();
    absl::StrAppend(&out, first_point ? "" : ",", "\n    ", open,
                    ", \"texts\": {");
    first_point = false;
    bool first_text = true;
    for (const auto& [digest, text] : texts) {
      absl::StrAppend(&out, first_text ? "" : ",", "\n      ",
                      Json(digest).dump(), ": ", ToJson(text).dump());
      first_text = false;
    }
    absl::StrAppend(&out, "}}");
  }
  absl::StrAppend(&out, "]\n}\n");
  return out;
}

Status Results::Write(const std::string& path,
                      const std::string& figures) const {
  const std::string beside = path + ".new";
  {
    std::ofstream file(beside, std::ios::binary | std::ios::trunc);
    file << Format(figures);
    file.close();
    if (!file) return absl::UnavailableError("cannot write " + beside);
  }
  std::error_code error;
  std::filesystem::rename(beside, path, error);
  if (error) {
    return absl::UnavailableError(
        absl::StrCat("cannot write ", path, ": ", error.message()));
  }
  return absl::OkStatus();
}

}  // namespace larder::quality
