#include "tests/kernels/ptx/module.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <absl/container/flat_hash_map.h>
#include <absl/status/status.h>
#include <absl/strings/ascii.h>
#include <absl/strings/match.h>
#include <absl/strings/numbers.h>
#include <absl/strings/str_cat.h>
#include <absl/strings/str_split.h>
#include <absl/strings/string_view.h>
#include <absl/strings/strip.h>

#include "tests/kernels/ptx/arithmetic.h"

namespace larder::kernels::ptx {
namespace {

// Of what one kernel or module may declare: far beyond any device.
constexpr uint64_t kMaxBytes = 1 << 20;
constexpr size_t kMaxInstructions = 1 << 20;

// What names stand for in each operand, in the order of PTX: d result
// (register or _), v result that may be a vector, s source, x source that may
// be a vector, m address. After | operands may be left out.
struct Shape {
  absl::string_view name;
  Op op;
  absl::string_view operands;
};

constexpr Shape kShapes[] = {
    {"abs", Op::kAbs, "ds"},
    {"activemask", Op::kActiveMask, "d"},
    {"add", Op::kAdd, "dss"},
    {"and", Op::kAnd, "dss"},
    {"atom", Op::kAtom, "dms|s"},
    {"bfe", Op::kBfe, "dsss"},
    {"bfi", Op::kBfi, "dssss"},
    {"bfind", Op::kBfind, "ds"},
    {"brev", Op::kBrev, "ds"},
    {"clz", Op::kClz, "ds"},
    {"cos", Op::kCos, "ds"},
    {"cvt", Op::kCvt, "ds|s"},
    {"cvta", Op::kCvta, "ds"},
    {"div", Op::kDiv, "dss"},
    {"dp2a", Op::kDp2a, "dsss"},
    {"dp4a", Op::kDp4a, "dsss"},
    {"ex2", Op::kEx2, "ds"},
    {"exit", Op::kExit, ""},
    {"fence", Op::kFence, ""},
    {"fma", Op::kFma, "dsss"},
    {"ld", Op::kLd, "vm"},
    {"ldu", Op::kLd, "vm"},
    {"lg2", Op::kLg2, "ds"},
    {"lop3", Op::kLop3, "dssss"},
    {"mad", Op::kMad, "dsss"},
    {"max", Op::kMax, "dss"},
    {"membar", Op::kFence, ""},
    {"min", Op::kMin, "dss"},
    {"mov", Op::kMov, "vx"},
    {"mul", Op::kMul, "dss"},
    {"neg", Op::kNeg, "ds"},
    {"not", Op::kNot, "ds"},
    {"or", Op::kOr, "dss"},
    {"popc", Op::kPopc, "ds"},
    {"prefetch", Op::kPrefetch, "m"},
    {"prmt", Op::kPrmt, "dsss"},
    {"rcp", Op::kRcp, "ds"},
    {"red", Op::kRed, "ms"},
    {"redux", Op::kRedux, "dss"},
    {"rem", Op::kRem, "dss"},
    {"ret", Op::kExit, ""},
    {"rsqrt", Op::kRsqrt, "ds"},
    {"sad", Op::kSad, "dsss"},
    {"selp", Op::kSelp, "dsss"},
    {"shf", Op::kShf, "dsss"},
    {"shl", Op::kShl, "dss"},
    {"shr", Op::kShr, "dss"},
    {"sin", Op::kSin, "ds"},
    {"sqrt", Op::kSqrt, "ds"},
    {"st", Op::kSt, "mx"},
    {"sub", Op::kSub, "dss"},
    {"tanh", Op::kTanh, "ds"},
    {"trap", Op::kTrap, ""},
    {"xor", Op::kXor, "dss"},
};

std::optional<Type> TypeNamed(absl::string_view name) {
  static const auto& types = *new absl::flat_hash_map<absl::string_view, Type>{
      {"b8", {Kind::kBits, 8}},         {"b16", {Kind::kBits, 16}},
      {"b32", {Kind::kBits, 32}},       {"b64", {Kind::kBits, 64}},
      {"u8", {Kind::kUnsigned, 8}},     {"u16", {Kind::kUnsigned, 16}},
      {"u32", {Kind::kUnsigned, 32}},   {"u64", {Kind::kUnsigned, 64}},
      {"s8", {Kind::kSigned, 8}},       {"s16", {Kind::kSigned, 16}},
      {"s32", {Kind::kSigned, 32}},     {"s64", {Kind::kSigned, 64}},
      {"f16", {Kind::kFloat, 16}},      {"f32", {Kind::kFloat, 32}},
      {"f64", {Kind::kFloat, 64}},      {"bf16", {Kind::kBfloat, 16}},
      {"f16x2", {Kind::kFloat, 32, 2}}, {"bf16x2", {Kind::kBfloat, 32, 2}},
      {"e4m3x2", {Kind::kE4m3, 16, 2}}, {"e5m2x2", {Kind::kE5m2, 16, 2}},
      {"pred", {Kind::kPredicate, 1}},
  };
  const auto it = types.find(name);
  if (it == types.end()) return std::nullopt;
  return it->second;
}

std::optional<int32_t> SpecialNamed(absl::string_view name) {
  static const auto& specials =
      *new absl::flat_hash_map<absl::string_view, int32_t>{
          {"%tid.x", kTid},
          {"%tid.y", kTid + 1},
          {"%tid.z", kTid + 2},
          {"%ntid.x", kNtid},
          {"%ntid.y", kNtid + 1},
          {"%ntid.z", kNtid + 2},
          {"%ctaid.x", kCtaid},
          {"%ctaid.y", kCtaid + 1},
          {"%ctaid.z", kCtaid + 2},
          {"%nctaid.x", kNctaid},
          {"%nctaid.y", kNctaid + 1},
          {"%nctaid.z", kNctaid + 2},
          {"%laneid", kLaneId},
          {"%warpid", kWarpId},
          {"%nwarpid", kNwarpId},
          {"%lanemask_eq", kMaskEq},
          {"%lanemask_lt", kMaskLt},
          {"%lanemask_le", kMaskLe},
          {"%lanemask_gt", kMaskGt},
          {"%lanemask_ge", kMaskGe},
          {"%dynamic_smem_size", kDynamicSharedBytes},
          {"%total_smem_size", kTotalSharedBytes},
      };
  const auto it = specials.find(name);
  if (it == specials.end()) return std::nullopt;
  return it->second;
}

struct Token {
  enum class Sort : uint8_t { kEnd, kWord, kNumber, kText, kMark };
  Sort sort = Sort::kEnd;
  absl::string_view text;
  int line = 0;

  bool Is(absl::string_view other) const {
    return sort != Sort::kText && text == other;
  }
};

bool IsWordCharacter(char c) {
  return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_' ||
         c == '$' || c == '%' || c == '.' || c == ':';
}

// Words have their dots, and double colons as in L1::no_allocate: an
// instruction and its modifiers are one word. Numbers may have a sign.
absl::StatusOr<std::vector<Token>> Split(absl::string_view text) {
  std::vector<Token> tokens;
  int line = 1;
  size_t at = 0;
  const auto peek = [&](size_t n) {
    return at + n < text.size() ? text[at + n] : '\0';
  };
  while (at < text.size()) {
    const char c = text[at];
    if (c == '\n') {
      ++line;
      ++at;
    } else if (c == ' ' || c == '\t' || c == '\r') {
      ++at;
    } else if (c == '/' && peek(1) == '/') {
      at = std::min(text.find('\n', at), text.size());
    } else if (c == '/' && peek(1) == '*') {
      const size_t end = text.find("*/", at + 2);
      if (end == absl::string_view::npos) {
        return absl::InvalidArgumentError(
            absl::StrCat("line ", line, ": the comment does not end"));
      }
      line += static_cast<int>(
          std::count(text.begin() + static_cast<int64_t>(at),
                     text.begin() + static_cast<int64_t>(end), '\n'));
      at = end + 2;
    } else if (c == '"') {
      const size_t end = text.find_first_of("\"\n", at + 1);
      if (end == absl::string_view::npos || text[end] == '\n') {
        return absl::InvalidArgumentError(
            absl::StrCat("line ", line, ": the string does not end"));
      }
      tokens.push_back(
          {Token::Sort::kText, text.substr(at + 1, end - at - 1), line});
      at = end + 1;
    } else if (IsWordCharacter(c) && c != ':') {
      size_t end = at;
      while (end < text.size() && IsWordCharacter(text[end])) {
        // A single colon ends a label.
        if (text[end] == ':') {
          if (end + 1 >= text.size() || text[end + 1] != ':') break;
          ++end;
        }
        ++end;
      }
      const bool number = absl::ascii_isdigit(static_cast<unsigned char>(c));
      tokens.push_back({number ? Token::Sort::kNumber : Token::Sort::kWord,
                        text.substr(at, end - at), line});
      at = end;
    } else if (std::strchr("{}()[]<>,;:=@!|+-", c) != nullptr) {
      tokens.push_back({Token::Sort::kMark, text.substr(at, 1), line});
      ++at;
    } else {
      return absl::InvalidArgumentError(absl::StrCat(
          "line ", line, ": unexpected character ", static_cast<int>(c)));
    }
  }
  tokens.push_back({Token::Sort::kEnd, "", line});
  return tokens;
}

class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  absl::StatusOr<Module> Run() {
    while (ok() && !At(Token::Sort::kEnd)) TopLevel();
    if (!ok()) return status_;
    return std::move(module_);
  }

 private:
  struct Symbol {
    enum class Sort : uint8_t {
      kVariable,
      kShared,
      kDynamicShared,
      kLocal,
      kParam
    };
    Sort sort;
    uint64_t address;
  };
  struct Declaration {
    Space space;
    std::string name;
    uint64_t bytes = 0;
    uint64_t align = 1;
    uint64_t element_bytes = 1;
    bool unsized = false;
  };
  struct Range {
    std::string prefix;
    uint64_t count;
  };
  struct Scope {
    absl::flat_hash_map<std::string, int32_t> registers;  // -1: not used yet
    std::vector<Range> ranges;
  };
  struct Jump {
    size_t instruction;
    std::string label;
    int line;
  };
  struct Table {
    size_t index;
    std::vector<std::string> labels;
    int line;
  };

  bool ok() const { return status_.ok(); }

  void Fail(int line, absl::string_view what) {
    if (ok()) {
      status_ =
          absl::InvalidArgumentError(absl::StrCat("line ", line, ": ", what));
    }
  }

  const Token& Next() const { return tokens_[at_]; }
  const Token& Peek(size_t n) const {
    return tokens_[std::min(at_ + n, tokens_.size() - 1)];
  }
  bool At(Token::Sort sort) const { return Next().sort == sort; }
  Token Take() {
    const Token token = Next();
    if (at_ + 1 < tokens_.size()) ++at_;
    return token;
  }
  bool Accept(absl::string_view text) {
    if (!Next().Is(text)) return false;
    Take();
    return true;
  }
  void Expect(absl::string_view text) {
    if (!Accept(text)) {
      Fail(Next().line,
           absl::StrCat("expected ", text, ", not '", Next().text, "'"));
    }
  }
  std::string Word() {
    if (!At(Token::Sort::kWord)) {
      Fail(Next().line,
           absl::StrCat("expected a name, not '", Next().text, "'"));
      return "";
    }
    return std::string(Take().text);
  }

  // Digits of an integer, in any base of PTX.
  static std::optional<uint64_t> ToInteger(absl::string_view text) {
    absl::ConsumeSuffix(&text, "U");
    uint64_t value;
    if (absl::StartsWith(text, "0x") || absl::StartsWith(text, "0X")) {
      text.remove_prefix(2);
      if (text.empty() || text.size() > 16) return std::nullopt;
      value = 0;
      for (const char c : text) {
        if (!absl::ascii_isxdigit(static_cast<unsigned char>(c))) {
          return std::nullopt;
        }
        value = value << 4 |
                static_cast<uint64_t>(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
      }
      return value;
    }
    if (!absl::SimpleAtoi(text, &value)) return std::nullopt;
    return value;
  }
  uint64_t Integer() {
    const Token token = Take();
    const std::optional<uint64_t> value = token.sort == Token::Sort::kNumber
                                              ? ToInteger(token.text)
                                              : std::nullopt;
    if (!value) {
      Fail(token.line,
           absl::StrCat("expected an integer, not '", token.text, "'"));
      return 0;
    }
    return *value;
  }

  void TopLevel() {
    const Token token = Take();
    if (token.Is(".version") || token.Is(".target") ||
        token.Is(".address_size") || token.Is(".file")) {
      while (!At(Token::Sort::kEnd) && Next().line == token.line) Take();
    } else if (token.Is(".visible") || token.Is(".weak")) {
      extern_ = false;
    } else if (token.Is(".extern")) {
      extern_ = true;
    } else if (token.Is(".entry")) {
      Entry();
    } else if (token.Is(".func")) {
      // Declared ones do no harm; calls are refused.
      while (ok() && !At(Token::Sort::kEnd) && !Next().Is(";")) {
        if (Next().Is("{")) {
          Fail(Next().line, "functions that are not inlined are not modelled");
        }
        Take();
      }
      Expect(";");
      extern_ = false;
    } else if (token.Is(".global") || token.Is(".const") ||
               token.Is(".shared")) {
      ModuleVariable(token);
    } else {
      Fail(token.line, absl::StrCat("unexpected '", token.text, "'"));
    }
  }

  // After .shared, .param etc.: .align 16 .b8 name[64]
  Declaration Declare(const Token& space) {
    Declaration result;
    result.space = space.Is(".shared")  ? Space::kShared
                   : space.Is(".local") ? Space::kLocal
                   : space.Is(".param") ? Space::kParam
                   : space.Is(".const") ? Space::kConst
                                        : Space::kGlobal;
    bool typed = false;
    while (ok() && At(Token::Sort::kWord) && Next().text.front() == '.') {
      const Token token = Take();
      if (token.Is(".align")) {
        result.align = Integer();
        continue;
      }
      if (token.Is(".ptr") || token.Is(".global") || token.Is(".shared")) {
        continue;
      }
      const std::optional<Type> type = TypeNamed(token.text.substr(1));
      if (!type || type->bits < 8) {
        Fail(token.line, absl::StrCat("unknown type ", token.text));
        return result;
      }
      typed = true;
      result.element_bytes = type->bits / 8;
    }
    result.name = Word();
    if (!typed) Fail(space.line, "no type");
    uint64_t count = 1;
    while (ok() && Accept("[")) {
      if (Accept("]")) {
        result.unsized = true;
        continue;
      }
      const uint64_t n = Integer();
      if (n == 0 || n > kMaxBytes || count > kMaxBytes / n) {
        Fail(space.line, "array too large, or empty");
        return result;
      }
      count *= n;
      Expect("]");
    }
    result.bytes = count * result.element_bytes;
    result.align = std::max(result.align, result.element_bytes);
    if (result.bytes > kMaxBytes || result.align > 4096 ||
        (result.align & (result.align - 1)) != 0) {
      Fail(space.line, "size or alignment out of range");
    }
    return result;
  }

  // Takes the declaration's place in a space that has `used` bytes so far.
  uint64_t Place(const Declaration& declaration, uint32_t& used, int line) {
    const uint64_t at =
        (used + declaration.align - 1) & ~(declaration.align - 1);
    if (at + declaration.bytes > kMaxBytes) {
      Fail(line, "more memory declared than any device has");
      return 0;
    }
    used = static_cast<uint32_t>(at + declaration.bytes);
    return at;
  }

  void ModuleVariable(const Token& space) {
    const Declaration declaration = Declare(space);
    const bool is_extern = std::exchange(extern_, false);
    if (!ok()) return;
    if (declaration.space == Space::kShared) {
      // Dynamic shared memory; or static that nvcc did not give to one kernel.
      if (!is_extern || !declaration.unsized) {
        Fail(space.line, "shared memory of several kernels is not modelled");
      }
      globals_[declaration.name] = {Symbol::Sort::kDynamicShared, 0};
      Expect(";");
      return;
    }
    if (is_extern || (declaration.unsized && !Next().Is("="))) {
      Fail(space.line, "external variables are not modelled");
      return;
    }
    std::vector<uint64_t> values;
    if (Accept("=")) {
      const bool list = Accept("{");
      do {
        const bool negative = Accept("-");
        const uint64_t value = Constant(declaration.element_bytes * 8);
        values.push_back(negative ? -value : value);
      } while (ok() && list && Accept(","));
      if (list) Expect("}");
    }
    Expect(";");
    if (!ok()) return;
    const uint64_t bytes = declaration.unsized
                               ? values.size() * declaration.element_bytes
                               : declaration.bytes;
    total_ += bytes;
    if (values.size() * declaration.element_bytes > bytes ||
        total_ > 16 * kMaxBytes) {
      Fail(space.line, "more values than the variable has, or too many");
      return;
    }
    Variable variable;
    variable.name = declaration.name;
    variable.constant = declaration.space == Space::kConst;
    variable.bytes = static_cast<uint32_t>(bytes);
    variable.data.reset(static_cast<uint8_t*>(
        std::aligned_alloc(4096, (bytes + 4096) & ~4095ull)));
    if (variable.data == nullptr) {
      Fail(space.line, "out of memory");
      return;
    }
    std::memset(variable.data.get(), 0, bytes);
    for (size_t n = 0; n < values.size(); ++n) {
      std::memcpy(variable.data.get() + n * declaration.element_bytes,
                  &values[n], declaration.element_bytes);
    }
    globals_[declaration.name] = {
        Symbol::Sort::kVariable,
        reinterpret_cast<uint64_t>(variable.data.get())};
    module_.variables.push_back(std::move(variable));
  }

  // A number as an operand of that many bits.
  uint64_t Constant(uint64_t bits) {
    const Token token = Take();
    if (token.sort != Token::Sort::kNumber) {
      Fail(token.line,
           absl::StrCat("expected a number, not '", token.text, "'"));
      return 0;
    }
    const absl::string_view text = token.text;
    if (text.size() > 2 && text[0] == '0' &&
        std::strchr("fFdD", text[1]) != nullptr) {
      const bool single = (text[1] | 32) == 'f';
      const std::optional<uint64_t> value =
          ToInteger(absl::StrCat("0x", text.substr(2)));
      if (!value || text.size() != (single ? 10 : 18)) {
        Fail(token.line, absl::StrCat("bad number ", text));
        return 0;
      }
      return *value;
    }
    if (const std::optional<uint64_t> value = ToInteger(text)) return *value;
    double number;
    if (absl::StrContains(text, '.') && absl::SimpleAtod(text, &number)) {
      uint64_t value = 0;
      if (bits == 64) {
        std::memcpy(&value, &number, 8);
      } else {
        const auto narrow = static_cast<float>(number);
        std::memcpy(&value, &narrow, 4);
      }
      return value;
    }
    Fail(token.line, absl::StrCat("bad number ", text));
    return 0;
  }

  void Entry() {
    extern_ = false;
    Kernel kernel;
    kernel_ = &kernel;
    kernel.name = Word();
    if (ok() && module_.Find(kernel.name) != nullptr) {
      Fail(Next().line, absl::StrCat("a second kernel ", kernel.name));
    }
    locals_.clear();
    labels_.clear();
    jumps_.clear();
    table_names_.clear();
    table_uses_.clear();
    tables_.clear();
    scopes_.clear();
    if (Accept("(")) {
      while (ok() && !Accept(")")) {
        const Token space = Take();
        if (!space.Is(".param")) {
          Fail(space.line, "expected .param");
          break;
        }
        const Declaration declaration = Declare(space);
        locals_[declaration.name] = {
            Symbol::Sort::kParam,
            Place(declaration, kernel.param_bytes, space.line)};
        if (!Next().Is(")")) Expect(",");
      }
    }
    while (ok() && !Next().Is("{")) {
      const Token token = Take();
      if (token.Is(".maxntid") || token.Is(".reqntid")) {
        uint64_t threads = 1;
        do {
          const uint64_t n = Integer();
          if (n == 0 || n > 1024) {
            Fail(token.line, "launch bounds out of range");
            break;
          }
          threads *= n;
        } while (ok() && Accept(","));
        kernel.max_threads =
            static_cast<uint32_t>(std::min<uint64_t>(threads, 1024));
      } else if (token.Is(".minnctapersm") || token.Is(".maxnreg")) {
        Integer();
      } else {
        Fail(token.line, absl::StrCat("unknown directive '", token.text, "'"));
      }
    }
    Body();
    if (ok()) Finish();
    if (ok()) module_.kernels.push_back(std::move(kernel));
    kernel_ = nullptr;
  }

  void Body() {
    Expect("{");
    scopes_.emplace_back();
    while (ok() && !scopes_.empty()) {
      if (At(Token::Sort::kEnd)) {
        Fail(Next().line, "the kernel does not end");
      } else if (Accept("{")) {
        if (scopes_.size() > 64) Fail(Next().line, "nested too deeply");
        scopes_.emplace_back();
      } else if (Accept("}")) {
        scopes_.pop_back();
      } else if (At(Token::Sort::kWord) && Peek(1).Is(":")) {
        const Token label = Take();
        Take();
        if (Accept(".branchtargets")) {
          Table table = {0, {}, label.line};
          do {
            table.labels.push_back(Word());
          } while (ok() && Accept(","));
          Expect(";");
          table.index = tables_.size();
          table_names_[std::string(label.text)] = tables_.size();
          tables_.push_back(std::move(table));
        } else if (!labels_
                        .emplace(label.text,
                                 static_cast<int32_t>(kernel_->code.size()))
                        .second) {
          Fail(label.line, absl::StrCat("a second label ", label.text));
        }
      } else if (At(Token::Sort::kWord) && Next().text.front() == '.') {
        Directive();
      } else {
        Statement();
      }
    }
  }

  void Directive() {
    const Token token = Take();
    if (token.Is(".reg")) {
      const Token type = Take();
      if (type.text.size() < 2 || !TypeNamed(type.text.substr(1))) {
        Fail(type.line, absl::StrCat("unknown type ", type.text));
      }
      do {
        std::string name = Word();
        if (Accept("<")) {
          scopes_.back().ranges.push_back({std::move(name), Integer()});
          Expect(">");
        } else {
          scopes_.back().registers[name] = -1;
        }
      } while (ok() && Accept(","));
      Expect(";");
    } else if (token.Is(".shared") || token.Is(".local")) {
      const Declaration declaration = Declare(token);
      Expect(";");
      if (!ok()) return;
      if (declaration.unsized) {
        Fail(token.line, "no size");
        return;
      }
      const bool shared = declaration.space == Space::kShared;
      locals_[declaration.name] = {
          shared ? Symbol::Sort::kShared : Symbol::Sort::kLocal,
          Place(declaration,
                shared ? kernel_->shared_bytes : kernel_->local_bytes,
                token.line)};
    } else if (token.Is(".pragma")) {
      while (ok() && !At(Token::Sort::kEnd) && !Next().Is(";")) Take();
      Expect(";");
    } else if (token.Is(".loc")) {
      while (!At(Token::Sort::kEnd) && Next().line == token.line) Take();
    } else {
      Fail(token.line, absl::StrCat("unknown directive ", token.text));
    }
  }

  // Registers are numbered in the order of their first use.
  int32_t Register(const std::string& name, int line) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      auto it = scope->registers.find(name);
      if (it == scope->registers.end()) {
        const size_t digits = name.find_last_not_of("0123456789") + 1;
        uint64_t number;
        const bool numbered =
            digits < name.size() &&
            absl::SimpleAtoi(absl::string_view(name).substr(digits), &number);
        for (const Range& range : scope->ranges) {
          if (numbered && number < range.count &&
              absl::string_view(name).substr(0, digits) == range.prefix) {
            it = scope->registers.emplace(name, -1).first;
            break;
          }
        }
      }
      if (it != scope->registers.end()) {
        if (it->second < 0) it->second = kernel_->registers++;
        return it->second;
      }
    }
    Fail(line, absl::StrCat("unknown name ", name));
    return -1;
  }

  const Symbol* FindSymbol(const std::string& name) const {
    if (const auto it = locals_.find(name); it != locals_.end()) {
      return &it->second;
    }
    if (const auto it = globals_.find(name); it != globals_.end()) {
      return &it->second;
    }
    return nullptr;
  }

  Operand ParseOperand(uint64_t bits) {
    Operand operand;
    const Token token = Next();
    if (Accept("!")) {
      operand = ParseOperand(bits);
      if (operand.kind != Operand::Kind::kRegister) {
        Fail(token.line, "only registers can be negated");
      }
      operand.negated = true;
    } else if (Accept("{")) {
      operand.kind = Operand::Kind::kVector;
      do {
        if (operand.count == operand.elements.size()) {
          Fail(token.line, "a vector of more than 4 elements");
          return operand;
        }
        if (Next().Is("{") || Next().Is("[") || Next().Is("!")) {
          Fail(token.line, "not an element");
          return operand;
        }
        const Operand element = ParseOperand(bits);
        if (element.kind == Operand::Kind::kSpecial || element.dynamic_shared) {
          Fail(token.line, "not an element");
        }
        operand.elements[operand.count++] = {
            element.kind == Operand::Kind::kRegister ? element.reg : -1,
            element.value};
      } while (ok() && Accept(","));
      Expect("}");
    } else if (Accept("[")) {
      operand = Address();
    } else if (token.sort == Token::Sort::kNumber || token.Is("-")) {
      const bool negative = Accept("-");
      operand.kind = Operand::Kind::kImmediate;
      const uint64_t value = Constant(bits);
      operand.value = negative ? -value : value;
    } else if (Accept("_")) {
      operand.kind = Operand::Kind::kSink;
    } else {
      const std::string name = Word();
      if (!ok()) return operand;
      if (const std::optional<int32_t> special = SpecialNamed(name)) {
        operand.kind = Operand::Kind::kSpecial;
        operand.reg = *special;
      } else if (const Symbol* symbol = FindSymbol(name)) {
        operand.kind = Operand::Kind::kImmediate;
        operand.value = symbol->address;
        operand.dynamic_shared = symbol->sort == Symbol::Sort::kDynamicShared;
      } else {
        operand.kind = Operand::Kind::kRegister;
        operand.reg = Register(name, token.line);
      }
    }
    return operand;
  }

  Operand Address() {
    Operand operand;
    operand.kind = Operand::Kind::kAddress;
    const Token token = Next();
    if (token.sort == Token::Sort::kNumber) {
      operand.value = Integer();
    } else {
      const std::string name = Word();
      if (!ok()) return operand;
      if (const Symbol* symbol = FindSymbol(name)) {
        operand.value = symbol->address;
        operand.dynamic_shared = symbol->sort == Symbol::Sort::kDynamicShared;
      } else {
        operand.reg = Register(name, token.line);
      }
    }
    if (Accept("+")) {
      const bool negative = Accept("-");
      const uint64_t offset = Integer();
      operand.value += negative ? -offset : offset;
    } else if (Accept("-")) {
      operand.value -= Integer();
    }
    Expect("]");
    return operand;
  }

  void Statement() {
    Instruction i;
    i.line = Next().line;
    if (Accept("@")) {
      i.guard_negated = Accept("!");
      i.guard = Register(Word(), i.line);
    }
    const std::string name = Word();
    if (!ok()) return;
    const std::vector<std::string> words = absl::StrSplit(name, '.');
    absl::string_view shape;
    bool named = false;
    if (words[0] == "bra") {
      i.op = Op::kBranch;
      for (size_t n = 1; n < words.size(); ++n) {
        if (words[n] != "uni") Unknown(i, name);
      }
      jumps_.push_back({kernel_->code.size(), Word(), i.line});
      named = true;
    } else if (words[0] == "brx" && words.size() > 1 && words[1] == "idx") {
      i.op = Op::kBranchIndexed;
      i.sources[0] = ParseOperand(32);
      if (i.sources[0].kind != Operand::Kind::kRegister) {
        Fail(i.line, "brx.idx wants a register");
      }
      Expect(",");
      table_uses_.push_back({kernel_->code.size(), Word(), i.line});
      named = true;
    }
    if (!named) {
      shape = Decode(words, name, i);
      if (!ok()) return;
      Operands(shape, name, i);
      if (!ok()) return;
      Check(name, i);
    }
    Expect(";");
    if (!ok()) return;
    if (kernel_->code.size() >= kMaxInstructions) {
      Fail(i.line, "too many instructions");
      return;
    }
    kernel_->code.push_back(i);
  }

  void Unknown(const Instruction& i, absl::string_view name) {
    Fail(i.line, absl::StrCat("not modelled: ", name));
  }

  // The operation and its modifiers; the shape of its operands.
  absl::string_view Decode(const std::vector<std::string>& words,
                           const std::string& name, Instruction& i) {
    const auto has = [&words](absl::string_view word) {
      return std::find(words.begin() + 1, words.end(), word) != words.end();
    };
    absl::string_view shape;
    bool known = true;
    if (words[0] == "bar" || words[0] == "barrier") {
      // Of all threads, or of a warp's.
      i.op = has("warp") ? Op::kBarrierWarp : Op::kBarrier;
      shape = "s";
      known = has("sync");
    } else if (words[0] == "vote") {
      i.op = Op::kVote;
      shape = "dss";
      known = has("sync");
    } else if (words[0] == "shfl") {
      i.op = Op::kShfl;
      shape = "pssss";
      known = has("sync");
    } else if (words[0] == "match") {
      i.op = has("all") ? Op::kMatchAll : Op::kMatchAny;
      shape = has("all") ? "pss" : "dss";
      known = has("sync");
    } else if (words[0] == "mma") {
      i.op = Op::kMma;
      shape = "vxxx";
      known = has("sync") && has("aligned") && has("m16n8k16") && has("row") &&
              has("col");
    } else if (words[0] == "setp") {
      i.op = Op::kSetp;
      shape = "pss|s";
    } else if (words[0] == "cp" && has("async")) {
      if (has("commit_group")) {
        i.op = Op::kCopyCommit;
      } else if (has("wait_group")) {
        i.op = Op::kCopyWait;
        shape = "s";
      } else if (has("wait_all")) {
        i.op = Op::kCopyWaitAll;
      } else {
        i.op = Op::kCopyAsync;
        shape = "mms|s";
        known = has("shared") && has("global") && !has("bulk");
      }
    } else if (words[0] == "cvt" && has("pack")) {
      i.op = Op::kCvtPack;
      shape = "dss|s";
    } else {
      const Shape* found = nullptr;
      for (const Shape& candidate : kShapes) {
        if (candidate.name == words[0]) found = &candidate;
      }
      if (found == nullptr) {
        Unknown(i, name);
        return "";
      }
      i.op = found->op;
      shape = found->operands;
    }
    if (!known) {
      Unknown(i, name);
      return "";
    }
    std::vector<Type> types;
    for (size_t n = 1; n < words.size() && ok(); ++n) {
      if (const std::optional<Type> type = TypeNamed(words[n])) {
        types.push_back(*type);
      } else if (!Modifier(words[n], i)) {
        Fail(i.line, absl::StrCat("not modelled: .", words[n], " of ", name));
      }
    }
    if (i.op == Op::kMma) {
      // d, a, b and c.
      const Type sum = {Kind::kFloat, 32};
      if (types.size() != 4 || types[0] != sum || types[3] != sum ||
          types[1] != types[2] || types[1].bits != 16 ||
          (types[1].kind != Kind::kFloat && types[1].kind != Kind::kBfloat)) {
        Unknown(i, name);
        return "";
      }
      types.resize(2);
    }
    if (types.size() > 3 || (types.size() == 3 && i.op != Op::kCvtPack)) {
      Unknown(i, name);
      return "";
    }
    if (!types.empty()) {
      i.type = types[0];
      i.source_type = types.size() > 1 ? types[1] : types[0];
    }
    if (types.empty() && TypeNeeded(i.op)) Unknown(i, name);
    if (i.op == Op::kCopyAsync) {
      i.space = Space::kShared;
    }
    return shape;
  }

  static bool TypeNeeded(Op op) {
    switch (op) {
      case Op::kActiveMask:
      case Op::kBarrier:
      case Op::kBarrierWarp:
      case Op::kCopyAsync:
      case Op::kCopyCommit:
      case Op::kCopyWait:
      case Op::kCopyWaitAll:
      case Op::kExit:
      case Op::kFence:
      case Op::kPrefetch:
      case Op::kTrap:
        return false;
      default:
        return true;
    }
  }

  // False: unknown, or not of this instruction. What says nothing about results
  // (caches, scopes, order: the machine is sequentially consistent) is dropped.
  static bool Modifier(absl::string_view word, Instruction& i) {
    const auto is = [&i](std::initializer_list<Op> ops) {
      return std::find(ops.begin(), ops.end(), i.op) != ops.end();
    };
    const bool memory = is(
        {Op::kLd, Op::kSt, Op::kAtom, Op::kRed, Op::kPrefetch, Op::kCopyAsync});
    const auto set = [](auto& field, auto value, bool allowed) {
      field = value;
      return allowed;
    };
    if (is({Op::kFence}) ||
        is({Op::kCopyCommit, Op::kCopyWait, Op::kCopyWaitAll})) {
      return !absl::StrContains(word, "proxy") && word != "mbarrier" &&
             word != "bulk";
    }
    if (memory || is({Op::kCvta})) {
      if (word == "global") {
        if (!is({Op::kCopyAsync})) i.space = Space::kGlobal;
        return true;
      }
      if (word == "shared" || word == "shared::cta") {
        return set(i.space, Space::kShared, true);
      }
      if (word == "local") return set(i.space, Space::kLocal, true);
      if (word == "param") return set(i.space, Space::kParam, true);
      if (word == "const") return set(i.space, Space::kConst, true);
      if (word == "v2") return set(i.vector, 2, is({Op::kLd, Op::kSt}));
      if (word == "v4") return set(i.vector, 4, is({Op::kLd, Op::kSt}));
    }
    if (memory) {
      for (const absl::string_view ignored :
           {"ca",      "cg",      "cs",       "cv",   "lu",      "wb",
            "wt",      "nc",      "volatile", "weak", "relaxed", "acquire",
            "release", "acq_rel", "cta",      "gpu",  "sys",     "async",
            "noftz",   "L1",      "L2"}) {
        if (word == ignored) return true;
      }
      if (absl::StartsWith(word, "L1::") || absl::StartsWith(word, "L2::")) {
        return word != "L2::cache_hint";
      }
    }
    if (is({Op::kAtom, Op::kRed, Op::kRedux})) {
      const bool memory_too = !is({Op::kRedux});
      if (word == "add") return set(i.variant, Variant::kAdd, true);
      if (word == "min") return set(i.variant, Variant::kMin, true);
      if (word == "max") return set(i.variant, Variant::kMax, true);
      if (word == "and") return set(i.variant, Variant::kAnd, true);
      if (word == "or") return set(i.variant, Variant::kOr, true);
      if (word == "xor") return set(i.variant, Variant::kXor, true);
      if (word == "exch") {
        return set(i.variant, Variant::kExchange, memory_too);
      }
      if (word == "cas") {
        return set(i.variant, Variant::kCompareAndSwap, memory_too);
      }
      if (word == "inc") {
        return set(i.variant, Variant::kIncrement, memory_too);
      }
      if (word == "dec") {
        return set(i.variant, Variant::kDecrement, memory_too);
      }
    }
    if (is({Op::kVote})) {
      if (word == "ballot") return set(i.variant, Variant::kBallot, true);
      if (word == "any") return set(i.variant, Variant::kAny, true);
      if (word == "all") return set(i.variant, Variant::kAll, true);
      if (word == "uni") return set(i.variant, Variant::kUniform, true);
    }
    if (is({Op::kShfl})) {
      if (word == "idx") return set(i.variant, Variant::kIndex, true);
      if (word == "up") return set(i.variant, Variant::kUp, true);
      if (word == "down") return set(i.variant, Variant::kDown, true);
      if (word == "bfly") return set(i.variant, Variant::kButterfly, true);
    }
    if (is({Op::kVote, Op::kShfl, Op::kMatchAll, Op::kMatchAny, Op::kRedux,
            Op::kBarrier, Op::kBarrierWarp}) &&
        (word == "sync" || word == "aligned" || word == "warp" ||
         word == "cta" || word == "any" || word == "all")) {
      return true;
    }
    if (is({Op::kMma})) {
      return word == "sync" || word == "aligned" || word == "m16n8k16" ||
             word == "row" || word == "col";
    }
    if (is({Op::kShf})) {
      if (word == "l") return set(i.variant, Variant::kLeft, true);
      if (word == "r") return set(i.variant, Variant::kRight, true);
      if (word == "clamp") return set(i.clamp, true, true);
      if (word == "wrap") return true;
    }
    if (is({Op::kPrmt}) && word == "f4e") {
      return set(i.variant, Variant::kForward4, true);
    }
    if (is({Op::kBfind}) && word == "shiftamt") {
      return set(i.variant, Variant::kShiftAmount, true);
    }
    if (is({Op::kDp2a})) {
      if (word == "lo") return set(i.variant, Variant::kLowHalf, true);
      if (word == "hi") return set(i.variant, Variant::kHighHalf, true);
    }
    if (is({Op::kCvta}) && word == "to") {
      return set(i.variant, Variant::kTo, true);
    }
    if (is({Op::kSetp})) {
      if (word == "and") return set(i.combination, Combination::kAnd, true);
      if (word == "or") return set(i.combination, Combination::kOr, true);
      if (word == "xor") return set(i.combination, Combination::kXor, true);
      absl::string_view plain = word;
      i.unordered |= plain.size() == 3 && absl::ConsumeSuffix(&plain, "u");
      if (plain == "eq") return set(i.comparison, Comparison::kEq, true);
      if (plain == "ne") return set(i.comparison, Comparison::kNe, true);
      if (plain == "lt") return set(i.comparison, Comparison::kLt, true);
      if (plain == "le") return set(i.comparison, Comparison::kLe, true);
      if (plain == "gt") return set(i.comparison, Comparison::kGt, true);
      if (plain == "ge") return set(i.comparison, Comparison::kGe, true);
      if (word == "lo") return set(i.comparison, Comparison::kLt, true);
      if (word == "ls") return set(i.comparison, Comparison::kLe, true);
      if (word == "hi") return set(i.comparison, Comparison::kGt, true);
      if (word == "hs") return set(i.comparison, Comparison::kGe, true);
      if (word == "num") return set(i.comparison, Comparison::kNumber, true);
      if (word == "nan") return set(i.comparison, Comparison::kNan, true);
    }
    if (is({Op::kMul, Op::kMad})) {
      if (word == "lo") return true;
      if (word == "hi") return set(i.high, true, true);
      if (word == "wide") return set(i.wide, true, true);
    }
    if (word == "rn") return true;
    if (word == "rz") return set(i.rounding, Rounding::kZero, true);
    if (word == "rm") return set(i.rounding, Rounding::kDown, true);
    if (word == "rp") return set(i.rounding, Rounding::kUp, true);
    if (is({Op::kCvt})) {
      if (word == "rni") {
        return set(i.rounding, Rounding::kIntegerNearest, true);
      }
      if (word == "rzi") return set(i.rounding, Rounding::kIntegerZero, true);
      if (word == "rmi") return set(i.rounding, Rounding::kIntegerDown, true);
      if (word == "rpi") return set(i.rounding, Rounding::kIntegerUp, true);
      if (word == "satfinite") return set(i.saturate, true, true);
    }
    if (is({Op::kCvtPack}) && word == "pack") return true;
    if (word == "ftz") return set(i.flush, true, true);
    if (word == "sat") return set(i.saturate, true, true);
    if (word == "relu") return set(i.relu, true, is({Op::kCvt, Op::kFma}));
    // Rounded correctly here, which approximate and full are allowed to be.
    return (word == "approx" || word == "full") &&
           is({Op::kEx2, Op::kLg2, Op::kSin, Op::kCos, Op::kTanh, Op::kRcp,
               Op::kRsqrt, Op::kSqrt, Op::kDiv});
  }

  void Operands(absl::string_view shape, const std::string& name,
                Instruction& i) {
    bool optional = false;
    bool first = true;
    size_t source = 0;
    for (const char c : shape) {
      if (c == '|') {
        optional = true;
        continue;
      }
      if (optional && Next().Is(";")) break;
      if (!first) Expect(",");
      first = false;
      const int line = Next().line;
      const Operand operand = ParseOperand(i.source_type.bits);
      if (!ok()) return;
      const bool result = operand.kind == Operand::Kind::kRegister ||
                          operand.kind == Operand::Kind::kSink;
      const bool plain = operand.kind == Operand::Kind::kRegister ||
                         operand.kind == Operand::Kind::kImmediate ||
                         operand.kind == Operand::Kind::kSpecial;
      const bool vector = operand.kind == Operand::Kind::kVector;
      bool fits = true;
      if (c == 'd' || c == 'p' || c == 'v') {
        fits = (result || (vector && c == 'v')) && !operand.negated;
        i.d = operand;
        if (c == 'p' && Accept("|")) {
          i.d2 = ParseOperand(1);
          fits &= i.d2.kind == Operand::Kind::kRegister && !i.d2.negated;
        }
      } else {
        fits = c == 'm'   ? operand.kind == Operand::Kind::kAddress
               : c == 'x' ? plain || vector
                          : plain;
        i.sources[source++] = operand;
      }
      if (!fits) Fail(line, absl::StrCat("wrong operand of ", name));
    }
  }

  // What can be known to be wrong, or not modelled, before the code runs.
  void Check(const std::string& name, Instruction& i) {
    const auto immediate = [&i](int n) {
      return i.sources[n].kind == Operand::Kind::kImmediate;
    };
    switch (i.op) {
      case Op::kLd:
      case Op::kSt: {
        const Operand& value = i.op == Op::kLd ? i.d : i.sources[1];
        const int count =
            value.kind == Operand::Kind::kVector ? value.count : 1;
        if (i.type.bits < 8 || count != i.vector ||
            i.type.bits / 8 * i.vector > 16 ||
            (i.op == Op::kSt &&
             (i.space == Space::kParam || i.space == Space::kConst))) {
          Unknown(i, name);
        }
        return;
      }
      case Op::kMma:
        if (i.d.count != 4 || i.sources[0].count != 4 ||
            i.sources[1].count != 2 || i.sources[2].count != 4) {
          Unknown(i, name);
        }
        return;
      case Op::kMov: {
        const bool to = i.d.kind == Operand::Kind::kVector;
        const bool from = i.sources[0].kind == Operand::Kind::kVector;
        const int count = to ? i.d.count : from ? i.sources[0].count : 1;
        if ((to && from) || (i.type.bits > 1 && i.type.bits % count != 0) ||
            ((to || from) && (i.type.bits < 16 || count < 2 || count == 3))) {
          Unknown(i, name);
        }
        return;
      }
      case Op::kAtom:
      case Op::kRed:
        if (i.vector != 1 || i.type.lanes != 1 || i.type.bits < 32 ||
            !ComputeAtomic(i, 0, 0, 0) ||
            (i.space != Space::kGeneric && i.space != Space::kGlobal &&
             i.space != Space::kShared) ||
            (i.variant == Variant::kCompareAndSwap) !=
                (i.sources[2].kind != Operand::Kind::kNone)) {
          Unknown(i, name);
        }
        return;
      case Op::kSetp:
        if (!Compare(i, 0, 0) ||
            (i.combination == Combination::kNone) !=
                (i.sources[2].kind == Operand::Kind::kNone)) {
          Unknown(i, name);
        }
        return;
      case Op::kVote:
        if (i.variant == Variant::kNone) Unknown(i, name);
        return;
      case Op::kShfl:
        if (i.variant == Variant::kNone || i.type.bits != 32) Unknown(i, name);
        return;
      case Op::kRedux:
        if (i.type.bits != 32 || i.type.kind == Kind::kFloat ||
            i.variant == Variant::kNone) {
          Unknown(i, name);
        }
        return;
      case Op::kMatchAll:
      case Op::kMatchAny:
      case Op::kActiveMask:
      case Op::kBranch:
      case Op::kBranchIndexed:
      case Op::kBarrierWarp:
      case Op::kCopyCommit:
      case Op::kCopyWaitAll:
      case Op::kExit:
      case Op::kFence:
      case Op::kPrefetch:
      case Op::kTrap:
        return;
      case Op::kBarrier:
        if (!immediate(0) || i.sources[0].value != 0) {
          Fail(i.line, "barriers of other numbers than 0 are not modelled");
        }
        return;
      case Op::kCopyWait:
        if (!immediate(0)) Unknown(i, name);
        return;
      case Op::kCopyAsync: {
        const uint64_t bytes = i.sources[2].value;
        if (!immediate(2) || (bytes != 4 && bytes != 8 && bytes != 16)) {
          Unknown(i, name);
        }
        return;
      }
      case Op::kCvta:
        if (i.type.bits != 64) Unknown(i, name);
        return;
      default:
        if (!Compute(i, {0, 0, 0, 0})) Unknown(i, name);
    }
  }

  int32_t LabelNamed(const std::string& name, int line) {
    const auto it = labels_.find(name);
    if (it == labels_.end()) {
      Fail(line, absl::StrCat("unknown label ", name));
      return 0;
    }
    return it->second;
  }

  void Finish() {
    Kernel& kernel = *kernel_;
    // Falling off the end is leaving.
    Instruction end;
    end.line = Next().line;
    kernel.code.push_back(end);
    for (const Jump& jump : jumps_) {
      kernel.code[jump.instruction].target = LabelNamed(jump.label, jump.line);
    }
    for (const Table& table : tables_) {
      std::vector<int32_t> targets;
      for (const std::string& label : table.labels) {
        targets.push_back(LabelNamed(label, table.line));
      }
      kernel.tables.push_back(std::move(targets));
    }
    for (const Jump& use : table_uses_) {
      const auto it = table_names_.find(use.label);
      if (it == table_names_.end()) {
        Fail(use.line, absl::StrCat("unknown label ", use.label));
        return;
      }
      kernel.code[use.instruction].target = static_cast<int32_t>(it->second);
    }
    // Dynamic shared memory lies behind what is declared.
    kernel.shared_bytes = (kernel.shared_bytes + 127) & ~127u;
    for (Instruction& i : kernel.code) {
      for (Operand& operand : i.sources) {
        if (operand.dynamic_shared) operand.value += kernel.shared_bytes;
      }
    }
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  absl::Status status_;
  Module module_;
  absl::flat_hash_map<std::string, Symbol> globals_;
  uint64_t total_ = 0;  // bytes of variables
  bool extern_ = false;

  // Of the kernel that is being read.
  Kernel* kernel_ = nullptr;
  absl::flat_hash_map<std::string, Symbol> locals_;
  absl::flat_hash_map<std::string, int32_t> labels_;
  std::vector<Jump> jumps_;
  std::vector<Table> tables_;
  absl::flat_hash_map<std::string, size_t> table_names_;
  std::vector<Jump> table_uses_;
  std::vector<Scope> scopes_;
};

}  // namespace

void Variable::Free::operator()(uint8_t* memory) const {
  std::free(memory);
}

const Kernel* Module::Find(absl::string_view name) const {
  for (const Kernel& kernel : kernels) {
    if (kernel.name == name) return &kernel;
  }
  return nullptr;
}

absl::StatusOr<Module> Parse(absl::string_view text) {
  absl::StatusOr<std::vector<Token>> tokens = Split(text);
  if (!tokens.ok()) return tokens.status();
  return Parser(*std::move(tokens)).Run();
}

}  // namespace larder::kernels::ptx
