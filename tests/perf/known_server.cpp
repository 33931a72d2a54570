// A streaming server with a known schedule, for checking what load generators report.
//
//   known_server --log FILE [--host 127.0.0.1] [--port 0] [--ttft-ms 50] [--itl-ms 20] [--tokens 64] [--per-chunk 1]
//                [--stall-ms 0 --stall-at K]
//
// Prints its port, answers until SIGTERM, then writes the log. Chunk k of a request is due at
// (kernel's receive stamp of the request's last bytes) + ttft + k * itl, plus the stall for k >= K. One thread, one epoll set; the
// last 200 us before a chunk is due are spent polling, so give it a core of its own.
//
// The log is int64 little-endian, one record a finished request, in the order of their ends:
//   received_ns, count, sent_ns[count]
// on CLOCK_REALTIME. received_ns is the kernel's stamp of the request's first read: a long prompt takes a while to arrive,
// and who sends it waits for that too. sent_ns is read just before send().
// A request whose client left early is not logged.

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <memory>
#include <queue>
#include <string>
#include <vector>

#include "known_answers.h"

namespace {

constexpr int64_t kMillisecond = 1'000'000;
constexpr int64_t kSpin = 200'000;  // ns of polling before a chunk is due: a timer alone wakes some 60 us late

struct Options {
  std::string log, host = "127.0.0.1";
  int port = 0;
  double ttft_ms = 50, itl_ms = 20, stall_ms = 0;
  long tokens = 64, per_chunk = 1, stall_at = 32;
};

struct Due {
  int64_t at;
  int fd;
  uint64_t turn;
  bool operator>(const Due& other) const { return at > other.at; }
};

int64_t now_ns() {
  timespec t{};
  clock_gettime(CLOCK_REALTIME, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

[[noreturn]] void fail(const char* what) {
  perror(what);
  std::exit(1);
}

class Server {
 public:
  explicit Server(Options options) : options_(std::move(options)) {}

  void run() {
    open();
    std::vector<epoll_event> events(64);
    while (!stopped_) {
      send_due();
      int count = epoll_wait(epoll_, events.data(), static_cast<int>(events.size()), arm());
      if (count < 0 && errno != EINTR) fail("epoll_wait");
      for (int i = 0; i < count; i++) handle(events[i]);
    }
    write_log();
  }

 private:
  void open() {
    rlimit limit{};
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    epoll_ = epoll_create1(EPOLL_CLOEXEC);
    listener_ = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int on = 1;
    setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    // Accepted sockets inherit both, so that even a request that comes before its accept() is stamped.
    if (setsockopt(listener_, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on)) fail("SO_TIMESTAMPNS");
    setsockopt(listener_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    if (inet_pton(AF_INET, options_.host.c_str(), &address.sin_addr) != 1) fail("--host");
    address.sin_port = htons(static_cast<uint16_t>(options_.port));
    if (bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address)) fail("bind");
    if (listen(listener_, 4096)) fail("listen");
    socklen_t length = sizeof address;
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length);
    watch(listener_, EPOLLIN);
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigprocmask(SIG_BLOCK, &signals, nullptr);
    signals_ = signalfd(-1, &signals, SFD_NONBLOCK | SFD_CLOEXEC);
    watch(signals_, EPOLLIN);
    timer_ = timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK | TFD_CLOEXEC);
    watch(timer_, EPOLLIN);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
  }

  void watch(int fd, uint32_t mask) {
    epoll_event event{};
    event.events = mask;
    event.data.fd = fd;
    if (epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event) && epoll_ctl(epoll_, EPOLL_CTL_MOD, fd, &event)) fail("epoll_ctl");
  }

  // The timeout for epoll_wait: 0 when a chunk is due soon, else forever with the timer set to just before it.
  int arm() {
    if (due_.empty()) return -1;
    int64_t wake = due_.top().at - kSpin;
    if (now_ns() >= wake) return 0;
    itimerspec spec{};
    spec.it_value.tv_sec = wake / 1'000'000'000;
    spec.it_value.tv_nsec = wake % 1'000'000'000;
    timerfd_settime(timer_, TFD_TIMER_ABSTIME, &spec, nullptr);
    return -1;
  }

  void handle(const epoll_event& event) {
    int fd = event.data.fd;
    if (fd == listener_) return accept_all();
    if (fd == timer_) {
      uint64_t ticks;
      if (read(timer_, &ticks, sizeof ticks) < 0 && errno != EAGAIN) fail("timerfd");
      return;
    }
    if (fd == signals_) {
      stopped_ = true;
      return;
    }
    auto found = connections_.find(fd);
    if (found == connections_.end()) return;
    if ((event.events & EPOLLOUT) && !flush(*found->second)) return;
    if (event.events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(*found->second);
  }

  void accept_all() {
    int fd;
    while ((fd = accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
      auto connection = std::make_unique<Connection>();
      connection->fd = fd;
      connections_[fd] = std::move(connection);
      watch(fd, EPOLLIN);
    }
  }

  void drop(Connection& c) {
    close(c.fd);
    connections_.erase(c.fd);  // c is gone
  }

  void receive(Connection& c) {
    static char buffer[1 << 16];
    char ancillary[256];
    iovec part{buffer, sizeof buffer};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = ancillary;
    message.msg_controllen = sizeof ancillary;
    ssize_t count = recvmsg(c.fd, &message, 0);
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (count <= 0) return drop(c);
    int64_t stamp = now_ns();
    for (cmsghdr* m = CMSG_FIRSTHDR(&message); m; m = CMSG_NXTHDR(&message, m)) {
      if (m->cmsg_level == SOL_SOCKET && m->cmsg_type == SO_TIMESTAMPNS) {
        timespec t;
        memcpy(&t, CMSG_DATA(m), sizeof t);
        stamp = t.tv_sec * 1'000'000'000LL + t.tv_nsec;
      }
    }
    if (c.in.empty()) c.began_ns = stamp;
    c.in.append(buffer, static_cast<size_t>(count));
    c.received_ns = stamp;
    if (!c.answering) read_request(c);
  }

  void read_request(Connection& c) {
    size_t end = c.in.find("\r\n\r\n");
    if (end == std::string::npos) return;
    std::string head = c.in.substr(0, end);
    for (char& letter : head) letter = static_cast<char>(tolower(static_cast<unsigned char>(letter)));
    size_t length = 0, at = head.find("content-length:");
    if (at != std::string::npos) length = strtoul(head.c_str() + at + 15, nullptr, 10);
    if (c.in.size() < end + 4 + length) return;
    std::string body = c.in.substr(end + 4, length);
    c.in.erase(0, end + 4 + length);
    c.close_after = head.find("connection: close") != std::string::npos;
    bool chat = head.rfind("post /v1/chat/completions", 0) == 0;
    if (!chat && head.rfind("post /v1/completions", 0) != 0) return answer_page(c, head);
    begin(c, body, chat);
  }

  void begin(Connection& c, const std::string& body, bool chat) {
    c.answering = true;
    c.chat = chat;
    c.streaming = true_after(body, "\"stream\"");
    c.usage = true_after(body, "\"include_usage\"");
    c.tokens = number_after(body, "\"max_completion_tokens\"", number_after(body, "\"max_tokens\"", options_.tokens));
    c.tokens = std::max(1L, c.tokens);
    c.prompt = 1;
    size_t ids = body.find("\"prompt\"");
    if (ids != std::string::npos && (ids = body.find('[', ids)) != std::string::npos) {
      for (size_t i = ids; i < body.size() && body[i] != ']'; i++) c.prompt += body[i] == ',';
    } else {
      for (char letter : body) c.prompt += letter == ' ';
    }
    c.sent_tokens = 0;
    c.sent.clear();
    c.turn = ++turns_;
    long chunks = (c.tokens + options_.per_chunk - 1) / options_.per_chunk;
    due_.push({due_at(c, c.streaming ? 0 : chunks - 1), c.fd, c.turn});
  }

  int64_t due_at(const Connection& c, long chunk) const {
    double ms = options_.ttft_ms + static_cast<double>(chunk) * options_.itl_ms;
    if (options_.stall_ms > 0 && chunk >= options_.stall_at) ms += options_.stall_ms;
    return c.received_ns + static_cast<int64_t>(ms * kMillisecond);
  }

  void send_due() {
    while (!due_.empty() && due_.top().at <= now_ns()) {
      Due next = due_.top();
      due_.pop();
      auto found = connections_.find(next.fd);
      if (found == connections_.end() || found->second->turn != next.turn) continue;
      Connection& c = *found->second;
      if (c.streaming) {
        send_chunk(c);
      } else {
        send_whole(c);
      }
    }
  }

  void send_chunk(Connection& c) {
    long count = std::min(options_.per_chunk, c.tokens - c.sent_tokens);
    std::string text;
    if (c.sent_tokens == 0) text = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    c.sent_tokens += count;
    bool last = c.sent_tokens >= c.tokens;
    std::string words;
    for (long i = 0; i < count; i++) words += " word";
    std::string choice = c.chat ? "\"delta\":{\"role\":\"assistant\",\"content\":\"" + words + "\"}" : "\"text\":\"" + words + "\"";
    std::string reason = last ? "\"length\"" : "null";
    text += frame(envelope(c, "[{\"index\":0," + choice + ",\"logprobs\":null,\"finish_reason\":" + reason + "}]", ""));
    if (last) {
      if (c.usage) text += frame(envelope(c, "[]", usage(c)));
      text += frame("[DONE]") + "0\r\n\r\n";
    }
    Due following{0, c.fd, c.turn};
    if (!last) following.at = due_at(c, (c.sent_tokens + options_.per_chunk - 1) / options_.per_chunk);
    c.sent.push_back(now_ns());
    if (last) finish(c);
    if (push(c, text) && !last) due_.push(following);
  }

  void send_whole(Connection& c) {
    std::string words;
    for (long i = 0; i < c.tokens; i++) words += " word";
    std::string choice = c.chat ? "\"message\":{\"role\":\"assistant\",\"content\":\"" + words + "\"}" : "\"text\":\"" + words + "\"";
    std::string body = envelope(c, "[{\"index\":0," + choice + ",\"logprobs\":null,\"finish_reason\":\"length\"}]", usage(c));
    c.answering = false;
    push(c, page("200 OK", body));
  }

  void finish(Connection& c) {
    log_.push_back(c.began_ns);
    log_.push_back(static_cast<int64_t>(c.sent.size()));
    log_.insert(log_.end(), c.sent.begin(), c.sent.end());
    c.answering = false;
    c.turn = 0;
  }

  void answer_page(Connection& c, const std::string& head) {
    if (head.rfind("get /v1/models", 0) == 0) {
      push(c, page("200 OK", "{\"object\":\"list\",\"data\":[{\"id\":\"known\",\"object\":\"model\",\"created\":1,"
                             "\"owned_by\":\"known\",\"max_model_len\":1048576}]}"));
    } else if (head.rfind("get /health", 0) == 0) {
      push(c, page("200 OK", "{}"));
    } else {
      push(c, page("404 Not Found", "{\"error\":{\"message\":\"no such page\"}}"));
    }
  }

  // Sends or keeps for later; false when the connection is gone.
  bool push(Connection& c, const std::string& text) {
    c.out += text;
    return flush(c);
  }

  bool flush(Connection& c) {
    while (c.out_at < c.out.size()) {
      ssize_t count = send(c.fd, c.out.data() + c.out_at, c.out.size() - c.out_at, MSG_NOSIGNAL);
      if (count < 0 && (errno == EAGAIN || errno == EINTR)) {
        watch(c.fd, EPOLLIN | EPOLLOUT);
        c.blocked = true;
        return true;
      }
      if (count < 0) {
        drop(c);
        return false;
      }
      c.out_at += static_cast<size_t>(count);
    }
    if (c.blocked) watch(c.fd, EPOLLIN);
    c.blocked = false;
    c.out.clear();
    c.out_at = 0;
    if (!c.answering && c.close_after) {
      drop(c);
      return false;
    }
    return true;
  }

  void write_log() {
    FILE* file = fopen(options_.log.c_str(), "wb");
    if (!file || fwrite(log_.data(), sizeof(int64_t), log_.size(), file) != log_.size() || fclose(file)) fail("log");
  }

  Options options_;
  int epoll_ = -1, listener_ = -1, timer_ = -1, signals_ = -1;
  bool stopped_ = false;
  uint64_t turns_ = 0;
  std::map<int, std::unique_ptr<Connection>> connections_;
  std::priority_queue<Due, std::vector<Due>, std::greater<Due>> due_;
  std::vector<int64_t> log_;
};

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i += 2) {
    std::string name = argv[i];
    if (i + 1 >= argc) {
      fprintf(stderr, "%s needs a value\n", argv[i]);
      std::exit(2);
    }
    const char* value = argv[i + 1];
    if (name == "--log") o.log = value;
    else if (name == "--host") o.host = value;
    else if (name == "--port") o.port = atoi(value);
    else if (name == "--ttft-ms") o.ttft_ms = atof(value);
    else if (name == "--itl-ms") o.itl_ms = atof(value);
    else if (name == "--tokens") o.tokens = atol(value);
    else if (name == "--per-chunk") o.per_chunk = std::max(1L, atol(value));
    else if (name == "--stall-ms") o.stall_ms = atof(value);
    else if (name == "--stall-at") o.stall_at = atol(value);
    else {
      fprintf(stderr, "unknown flag %s\n", argv[i]);
      std::exit(2);
    }
  }
  if (o.log.empty()) {
    fprintf(stderr, "--log FILE is missing\n");
    std::exit(2);
  }
  return o;
}

}  // namespace

int main(int argc, char** argv) {
  Server(parse(argc, argv)).run();
  return 0;
}
