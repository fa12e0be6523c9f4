#include "context.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simulator {

#if defined(FASTREG_OWN_SWITCH)

// Saves what the calling convention says a call must keep, and the stack pointer; then the reverse for the other
// context.
extern "C" void fastreg_switch_stack(void** save, void* load);

asm(R"(
.text
.globl fastreg_switch_stack
.hidden fastreg_switch_stack
.type fastreg_switch_stack, @function
fastreg_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastreg_switch_stack, .-fastreg_switch_stack
)");

void Context::prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
  // As if `entry` had been called from address 0: a function starts with its stack pointer 8 below a multiple of 16.
  uintptr_t top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
  void** frame = reinterpret_cast<void**>(top) - 2;
  frame[1] = nullptr;
  frame[0] = reinterpret_cast<void*>(entry);
  for (int saved = 1; saved <= 6; ++saved) frame[-saved] = nullptr;
  stack_pointer_ = frame - 6;
#if defined(__SANITIZE_ADDRESS__)
  bottom_ = stack;
  bytes_ = bytes;
  fake_stack_ = nullptr;
#endif
}

void Context::switch_to(Context& next) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.bytes_);
  fastreg_switch_stack(&stack_pointer_, next.stack_pointer_);
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &bytes);
#else
  fastreg_switch_stack(&stack_pointer_, next.stack_pointer_);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
// The first thing on a new stack; also learns where the stack that it came from lies.
void entered(Context&, Context& previous) {
  __sanitizer_finish_switch_fiber(nullptr, &previous.bottom_, &previous.bytes_);
}
#endif

#else

void Context::prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Context::switch_to(Context& next) { swapcontext(&context_, &next.context_); }

#endif

}  // namespace simulator
