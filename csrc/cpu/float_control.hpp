// Round to nearest, subnormals kept, whatever another library has left in this thread's control register.
#pragma once
#include <stdint.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fastgd {

class FloatControl {
  public:
#if defined(__x86_64__) || defined(_M_X64)
    FloatControl() : saved(_mm_getcsr()) {
        if (saved & control) _mm_setcsr(saved & ~control);
    }
    ~FloatControl() {
        if (saved & control) _mm_setcsr(saved);
    }

  private:
    static constexpr unsigned control = 0x8000 | 0x6000 | 0x0040;  // flush-to-zero, rounding, denormals-are-zero
    const unsigned saved;
#elif defined(__aarch64__) && defined(__GNUC__)
    FloatControl() {
        __asm__ __volatile__("mrs %0, fpcr" : "=r"(saved));
        if (saved & control) __asm__ __volatile__("msr fpcr, %0" ::"r"(saved & ~control));
    }
    ~FloatControl() {
        if (saved & control) __asm__ __volatile__("msr fpcr, %0" ::"r"(saved));
    }

  private:
    static constexpr uint64_t control = 0x7u << 22 | 1u << 19;  // rounding, flush-to-zero, and that of float16
    uint64_t saved;
#else
    FloatControl() {}
#endif
    FloatControl(const FloatControl&) = delete;
};

}  // namespace fastgd
