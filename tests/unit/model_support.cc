#include "tests/unit/model_support.h"

#include <pthread.h>

namespace dsv3::test {

void on_small_stack(const std::function<void()>& body) {
#ifdef DSV3_SANITIZED
  constexpr size_t kStack = 1 << 20;  // red zones make every frame several times as large
#else
  constexpr size_t kStack = 256 << 10;
#endif
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, kStack);
  pthread_t thread;
  const auto run = [](void* arg) -> void* {
    (*static_cast<const std::function<void()>*>(arg))();
    return nullptr;
  };
  if (pthread_create(&thread, &attributes, run,
                     const_cast<void*>(static_cast<const void*>(&body))) != 0) {
    throw std::runtime_error("cannot start a thread");
  }
  pthread_join(thread, nullptr);
  pthread_attr_destroy(&attributes);
}

}  // namespace dsv3::test
