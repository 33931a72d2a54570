// What known_server.cpp reads from requests and writes in answers.
#pragma once

#include <cctype>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

struct Connection {
  int fd = -1;
  uint64_t turn = 0;  // tells events of an answer from those of a descriptor's former life
  std::string in, out;
  size_t out_at = 0;
  bool answering = false, chat = false, streaming = false, usage = false, close_after = false, blocked = false;
  int64_t began_ns = 0, received_ns = 0;  // kernel stamps of the first and of the last read of the request
  long tokens = 0, sent_tokens = 0, prompt = 0;
  std::vector<int64_t> sent;
};

// The number that follows "key": in a JSON text, or `otherwise`.
inline long number_after(const std::string& text, const char* key, long otherwise) {
  size_t at = text.find(key);
  if (at == std::string::npos) return otherwise;
  at = text.find_first_not_of(" :", at + strlen(key));
  if (at == std::string::npos || !isdigit(static_cast<unsigned char>(text[at]))) return otherwise;
  return strtol(text.c_str() + at, nullptr, 10);
}

inline bool true_after(const std::string& text, const char* key) {
  size_t at = text.find(key);
  if (at == std::string::npos) return false;
  at = text.find_first_not_of(" :", at + strlen(key));
  return at != std::string::npos && text.compare(at, 4, "true") == 0;
}

inline std::string frame(const std::string& data) {
  char size[24];
  snprintf(size, sizeof size, "%zx\r\n", data.size() + 8);
  return size + ("data: " + data) + "\n\n\r\n";
}

inline std::string page(const char* status, const std::string& body) {
  return std::string("HTTP/1.1 ") + status + "\r\nContent-Type: application/json\r\nContent-Length: " +
         std::to_string(body.size()) + "\r\n\r\n" + body;
}

inline std::string usage(const Connection& c) {
  return ",\"usage\":{\"prompt_tokens\":" + std::to_string(c.prompt) + ",\"completion_tokens\":" +
         std::to_string(c.tokens) + ",\"total_tokens\":" + std::to_string(c.prompt + c.tokens) + "}";
}

inline std::string envelope(const Connection& c, const std::string& choices, const std::string& more) {
  const char* kind = c.chat ? (c.streaming ? "chat.completion.chunk" : "chat.completion") : "text_completion";
  return "{\"id\":\"known-" + std::to_string(c.turn) + "\",\"object\":\"" + kind +
         "\",\"created\":1,\"model\":\"known\",\"choices\":" + choices + more + "}";
}
