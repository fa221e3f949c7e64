// The short way of rows between ranks of one host: what `workers/parallel/host_link.py` does for wholes of one piece,
// in a call to send, one to wait and one to fetch.
//
// A side's state is shared with that module, which does everything else; both speak the same messages.

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>
#include <vector>

namespace {

constexpr int64_t kPlaces = 2;
constexpr int64_t kMostHead = 1 << 16;

// The order of these and of `Message` is that of `host_link.py`.
struct Link {
  int64_t descriptor, generation, out, in, piece_bytes, put, freed, taken;
  int64_t number, size, left;  // of the piece that was heard last
};

struct Message {
  uint64_t generation, number, taken, size, left;
};

enum Trouble { kNone = 0, kLong = 1, kGone = 2, kGeneration = 3, kTurn = 4, kSilent = 5, kSize = 6 };

// What a call says of one rank.
int64_t tell(Trouble trouble, int64_t rank) { return rank << 8 | trouble; }

double now_s() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

int64_t sum(const int64_t* counts, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += counts[i];
  return total;
}

// Takes in messages until a piece has come; whether one has.
bool hear(Link& link, int64_t* head, int64_t head_bytes, Trouble& trouble) {
  alignas(8) static thread_local uint8_t buffer[sizeof(Message) + kMostHead];
  while (true) {
    const ssize_t got = recv(static_cast<int>(link.descriptor), buffer, sizeof buffer, MSG_DONTWAIT);
    // A reset is told once, where the peer left with something of ours unread: what it sent before follows.
    if (got < 0 && (errno == EINTR || errno == ECONNRESET)) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
    if (got < static_cast<ssize_t>(sizeof(Message))) return trouble = kGone, true;
    Message message;
    std::memcpy(&message, buffer, sizeof message);
    if (static_cast<int64_t>(message.generation) != link.generation) return trouble = kGeneration, true;
    const int64_t freed = static_cast<int64_t>(message.taken), number = static_cast<int64_t>(message.number);
    if (freed < link.freed || freed > link.put || message.size > static_cast<uint64_t>(link.piece_bytes) ||
        (number && (number != link.taken + 1 || got - static_cast<ssize_t>(sizeof message) != head_bytes)))
      return trouble = kTurn, true;
    link.freed = freed;
    if (!number) continue;
    link.number = number;
    link.size = static_cast<int64_t>(message.size);
    link.left = static_cast<int64_t>(message.left);
    std::memcpy(head, buffer + sizeof message, head_bytes);
    return true;
  }
}

}  // namespace

extern "C" {

// What is told with rows: nothing, how many they are [n], or the sender's counts for all ranks [size, n].
enum Told { kNothing = 0, kTheirs = 1, kAll = 2 };

int64_t head_words(int64_t told, int64_t size, int64_t n) { return told == kAll ? size * n : told == kTheirs ? n : 0; }

// Sends each other rank its rows of x, in the order of ranks: `counts` [size, n] of them, and with them what is `told`.
// `links` [size], null for this rank. kLong, and nothing has been sent, where that is more than a piece.
int64_t shoal_post(Link* const* links, int64_t size, const uint8_t* x, int64_t width, const int64_t* counts, int64_t n,
                   int64_t told) {
  for (int64_t rank = 0; rank < size; ++rank)
    if (links[rank] && (sum(counts + rank * n, n) * width > links[rank]->piece_bytes ||
                        links[rank]->put - links[rank]->freed >= kPlaces))
      return tell(kLong, rank);
  for (int64_t rank = 0; rank < size; ++rank) {
    const int64_t bytes = sum(counts + rank * n, n) * width;
    if (Link* link = links[rank]) {
      std::memcpy(reinterpret_cast<uint8_t*>(link->out) + link->put % kPlaces * link->piece_bytes, x, bytes);
      ++link->put;
      Message message{static_cast<uint64_t>(link->generation), static_cast<uint64_t>(link->put),
                      static_cast<uint64_t>(link->taken), static_cast<uint64_t>(bytes), 0};
      iovec parts[2] = {{&message, sizeof message},
                        {const_cast<int64_t*>(told == kAll ? counts : counts + rank * n),
                         static_cast<size_t>(head_words(told, size, n)) * 8}};
      msghdr whole{};
      whole.msg_iov = parts;
      whole.msg_iovlen = told ? 2 : 1;
      ssize_t sent;
      do sent = sendmsg(static_cast<int>(link->descriptor), &whole, MSG_NOSIGNAL);
      while (sent < 0 && errno == EINTR);
      if (sent < 0) return tell(kGone, rank);
    }
    x += bytes;
  }
  return kNone;
}

// Waits for a piece from each other rank. What they have `told` comes into `arrived` [size, n] or [size, size, n], beside
// this rank's own. Looks again and again for `spin_s`, giving its core to whoever wants it, before it sleeps. kLong where a whole is
// more than a piece: all of the first pieces have come.
int64_t shoal_hear(Link* const* links, int64_t size, int64_t* arrived, int64_t n, int64_t told, double spin_s,
                   double timeout_s) {
  std::vector<int64_t> busy;
  for (int64_t rank = 0; rank < size; ++rank)
    if (links[rank]) {
      links[rank]->number = 0;  // none: who is silent can be told by it
      busy.push_back(rank);
    }
  const double started_s = now_s();
  const int64_t words = head_words(told, size, n);
  int64_t found = kNone;
  while (true) {
    size_t left = 0;
    for (const int64_t rank : busy) {
      Trouble trouble = kNone;
      if (!hear(*links[rank], arrived + rank * words, words * 8, trouble)) {
        busy[left++] = rank;
        continue;
      }
      if (trouble) return tell(trouble, rank);
      if (links[rank]->left) found = tell(kLong, rank);
    }
    busy.resize(left);
    if (busy.empty()) return found;
    const double waited_s = now_s() - started_s;
    if (waited_s >= timeout_s) return kSilent;
    if (waited_s < spin_s) {
      sched_yield();
      continue;
    }
    std::vector<pollfd> watched;
    for (const int64_t rank : busy) watched.push_back({static_cast<int>(links[rank]->descriptor), POLLIN, 0});
    poll(watched.data(), watched.size(), static_cast<int>(1000 * (timeout_s - waited_s)) + 1);
  }
}

// Puts the rows that were heard of behind one another, by sending rank; this rank's own lie in x. `receive` [size, n].
// kSize where other bytes came than are due.
int64_t shoal_fetch(Link* const* links, int64_t size, uint8_t* out, const uint8_t* x, int64_t width,
                    const int64_t* counts, const int64_t* receive, int64_t n) {
  for (int64_t rank = 0; rank < size; ++rank) {
    const int64_t bytes = sum(receive + rank * n, n) * width;
    if (Link* link = links[rank]) {
      if (link->size != bytes) return tell(kSize, rank);
      std::memcpy(out, reinterpret_cast<uint8_t*>(link->in) + (link->number - 1) % kPlaces * link->piece_bytes, bytes);
      ++link->taken;
    } else {
      std::memcpy(out, x, bytes);
    }
    x += sum(counts + rank * n, n) * width;
    out += bytes;
  }
  return kNone;
}

}  // extern "C"
