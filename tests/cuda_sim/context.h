// One stack for each simulated CUDA thread, and the switch between them.
//
// swapcontext() asks the kernel to save the signal mask on every switch; on x86-64 a dozen instructions do without,
// some thirty times faster. Elsewhere ucontext serves.

#pragma once

#include <cstddef>

// FASTREG_UCONTEXT chooses ucontext on x86-64 too, so that it is tested.
#if defined(__x86_64__) && !defined(FASTREG_UCONTEXT)
#define FASTREG_OWN_SWITCH
#endif

#if !defined(FASTREG_OWN_SWITCH)
#include <ucontext.h>
#endif

namespace simulator {

class Context {
 public:
  // Makes the context start with `entry`, which must not return, on the given stack.
  void prepare(unsigned char* stack, size_t bytes, void (*entry)());

  // Continues with `next`, and here again when something switches back.
  void switch_to(Context& next);

 private:
#if defined(FASTREG_OWN_SWITCH)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  friend void entered(Context& self, Context& previous);
#endif
};

}  // namespace simulator
