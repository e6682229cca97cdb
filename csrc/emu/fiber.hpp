// One fiber goes on where another stops. A hand-written switch on x86-64, since ucontext's asks the kernel for the signal
// mask each time, which costs a hundred times as much; ucontext elsewhere. AddressSanitizer is told of every switch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Keeps what a call must preserve on the stack it leaves, and that stack's top in *from.
extern "C" void megalm_emu_switch(void** from, void* to);
__asm__(R"(
.text
.weak megalm_emu_switch
.hidden megalm_emu_switch
.type megalm_emu_switch, @function
megalm_emu_switch:
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
.size megalm_emu_switch, .-megalm_emu_switch
)");
#else
#include <ucontext.h>
#endif

namespace emu {

// A place that can be left and gone back to: a fiber's, or the one that the thread came with.
class Place {
 public:
  // Start `entry`, which never returns, on this stack of whole pages when the place is first gone to.
  void start(char* stack, size_t bytes, void (*entry)()) {
    stack_ = stack;
    bytes_ = bytes;
    fake_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, bytes);  // frames of an entry that was left for good
#endif
#if defined(__x86_64__)
    auto* top = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{63}) - 8;
    for (int i = 0; i < 8; ++i) top[i] = 0;  // no caller, so that backtraces end there
    top[0] = reinterpret_cast<uint64_t>(entry);
    at_ = top - 6;
#else
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack;
    at_.uc_stack.ss_size = bytes;
    at_.uc_link = nullptr;
    makecontext(&at_, entry, 0);
#endif
  }

  // Leave this place for another; come back when somebody goes here, unless it is for good.
  void go(Place& other, [[maybe_unused]] bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_, other.stack_, other.bytes_);
#endif
#if defined(__x86_64__)
    megalm_emu_switch(&at_, other.at_);
#else
    swapcontext(&at_, &other.at_);
#endif
    arrived(nullptr);
  }

  // To be called first on a new stack; `from` is the thread's own place if that may be where it was left.
  void arrived([[maybe_unused]] Place* from) {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake_, &stack, &bytes);
    if (from != nullptr && from->stack_ == nullptr) from->stack_ = const_cast<void*>(stack), from->bytes_ = bytes;
#endif
  }

 private:
  void* stack_ = nullptr;
  size_t bytes_ = 0;
  void* fake_ = nullptr;
#if defined(__x86_64__)
  void* at_ = nullptr;
#else
  ucontext_t at_;
#endif
};

}  // namespace emu
