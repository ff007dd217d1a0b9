// Tasks shared among threads, and their memory. For files that are compiled without an instruction set's
// flags: C++ library headers come with it.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace flashvsr {

// Calls body(context, worker) once for each worker below count, on as many threads as there are to have.
struct Workers {
  int count;
  void (*run)(int count, void (*body)(void* context, int worker), void* context);
};

struct Aligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<void, Aligned>;
inline Buffer buffer(size_t bytes) { return Buffer(::operator new(bytes, std::align_val_t(64))); }

// task(n, worker) for each n below tasks, handed out in order to whichever worker is free.
template <class Task>
void share(const Workers& workers, int64_t tasks, const Task& task) {
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    const Task& task;
  } context{{0}, tasks, task};
  workers.run(
      workers.count,
      [](void* p, int worker) {
        Context& c = *static_cast<Context*>(p);
        for (int64_t n; (n = c.next++) < c.tasks;) c.task(n, worker);
      },
      &context);
}

}  // namespace flashvsr
