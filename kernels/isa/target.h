// TK_TARGET_BEGIN("avx2,fma") … TK_TARGET_END: compile what stands between for that target, without per-file compiler flags.
// Include every system header before TK_TARGET_BEGIN, or its inline functions would be compiled for the target too.
#ifndef TICKETKIT_ISA_TARGET_H_
#define TICKETKIT_ISA_TARGET_H_

#define TK_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TK_TARGET_BEGIN(isa) TK_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define TK_TARGET_END _Pragma("clang attribute pop")
#else
#define TK_TARGET_BEGIN(isa) _Pragma("GCC push_options") TK_PRAGMA(GCC target(isa))
#define TK_TARGET_END _Pragma("GCC pop_options")
#endif

#endif  // TICKETKIT_ISA_TARGET_H_
