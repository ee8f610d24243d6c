// Writes JSON, as much of it as the reports need: objects, arrays, strings, integers, booleans.
#pragma once
#include <concepts>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

namespace sparse24::ptx {

// Bytes that are no UTF-8 (a PTX text may hold any) become U+FFFD, so that every JSON reader takes the result.
class JsonWriter {
 public:
  // Each value of an object follows its key: writer.key("line"), writer.value(12).
  void key(std::string_view name) {
    value(name);
    text_ += ':';
    fresh_ = true;
  }
  void value(std::string_view string) {
    separate();
    text_ += '"';
    for (size_t i = 0; i < string.size();) i += character(string.substr(i));
    text_ += '"';
  }
  void value(const char* string) { value(std::string_view(string)); }
  void value(bool truth) {
    separate();
    text_ += truth ? "true" : "false";
  }
  template <std::integral T>
  void value(T number) {
    separate();
    text_ += std::to_string(number);
  }
  template <std::integral T, size_t N>
  void value(const T (&numbers)[N]) {
    array([&] {
      for (const T number : numbers) value(number);
    });
  }
  template <class T>
  void field(std::string_view name, const T& content) {
    key(name);
    value(content);
  }
  template <class Body>
  void object(Body&& body) {
    nested('{', '}', body);
  }
  template <class Body>
  void array(Body&& body) {
    nested('[', ']', body);
  }
  std::string take() { return std::move(text_); }

 private:
  void separate() {
    if (!fresh_) text_ += ',';
    fresh_ = false;
  }
  template <class Body>
  void nested(char open, char close, Body&& body) {
    separate();
    text_ += open;
    fresh_ = true;
    body();
    text_ += close;
    fresh_ = false;
  }
  // Writes the first character of `rest`; returns how many bytes it took.
  size_t character(std::string_view rest) {
    const auto byte = [&](size_t i) -> uint32_t { return i < rest.size() ? static_cast<uint8_t>(rest[i]) : 0; };
    const uint32_t first = byte(0);
    if (first < 0x80) {
      if (first == '"' || first == '\\') {
        text_ += '\\';
        text_ += static_cast<char>(first);
      } else if (first < 0x20 || first == 0x7f) {
        char escaped[8];
        std::snprintf(escaped, sizeof escaped, "\\u%04x", first);
        text_ += escaped;
      } else {
        text_ += static_cast<char>(first);
      }
      return 1;
    }
    const size_t size = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    uint32_t code = first & (0x7f >> size);
    bool legal = first >= 0xc2 && first <= 0xf4;
    for (size_t i = 1; i < size && legal; ++i) {
      legal = (byte(i) & 0xc0) == 0x80;
      code = code << 6 | (byte(i) & 0x3f);
    }
    constexpr uint32_t LEAST[] = {0, 0, 0x80, 0x800, 0x10000};
    if (!legal || code < LEAST[size] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) {
      text_ += "\\ufffd";
      return 1;
    }
    text_ += rest.substr(0, size);
    return size;
  }

  std::string text_;
  bool fresh_ = true;  // nothing stands before the next value that a comma would have to part it from
};

}  // namespace sparse24::ptx
