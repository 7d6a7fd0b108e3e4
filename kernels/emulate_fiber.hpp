// Fibers for emulate.hpp: stacks that take turns on one thread of the host.
#pragma once

#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulate {

constexpr size_t STACK_BYTES = 128 << 10;

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer in *from and goes on where `to` was saved.
extern "C" __attribute__((visibility("hidden"))) void tandem_emulate_switch(void** from, void* to);
__asm__(R"(
    .text
    .p2align 4
    .local tandem_emulate_switch
    .type tandem_emulate_switch, @function
tandem_emulate_switch:
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
    .size tandem_emulate_switch, . - tandem_emulate_switch
)");

struct Fiber {
    void* saved = nullptr;
    void start(char* stack, void (*entry)()) {
        void** top = reinterpret_cast<void**>(stack + STACK_BYTES);
        *--top = nullptr;  // entry finds the stack as after a call
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        saved = top;
    }
    static void switch_to(Fiber& from, Fiber& to) { tandem_emulate_switch(&from.saved, to.saved); }
};
#else
struct Fiber {
    ucontext_t context;
    void start(char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK_BYTES;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void switch_to(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
};
#endif

}  // namespace emulate
