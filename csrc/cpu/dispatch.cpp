#include "dispatch.hpp"

#include <stdexcept>

#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace fastgd {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)
// These ask the operating system too (XCR0), not the CPU alone.
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx2() { return __builtin_cpu_supports("avx2"); }
#elif defined(_M_X64)
bool has(unsigned ebx_bits, unsigned long long xcr0_bits) {
    int r[4];
    __cpuid(r, 1);
    if (!(r[2] & (1 << 27)) || (_xgetbv(0) & xcr0_bits) != xcr0_bits) return false;
    __cpuidex(r, 7, 0);
    return (unsigned(r[1]) & ebx_bits) == ebx_bits;
}
bool has_avx512() { return has(1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, 0xe6); }
bool has_avx2() { return has(1u << 5, 0x6); }
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
bool has_neon() { return true; }
#endif
bool has_baseline() { return true; }

}  // namespace

// FASTGD_ISAS comes from CMakeLists.txt: ISA(avx512) ISA(avx2) ISA(baseline), in order of preference.
#define ISA(name) extern const Kernels kernels_##name;
FASTGD_ISAS
#undef ISA

namespace {

struct Isa {
    const char* name;
    bool (*available)();
    const Kernels* kernels;
};
constexpr Isa isas[] = {
#define ISA(name) {#name, has_##name, &kernels_##name},
    FASTGD_ISAS
#undef ISA
};

const Isa* chosen = nullptr;
std::string chosen_name;

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& i : isas)
        if (i.available()) names.push_back(i.name);
    return names;
}

const std::string& isa() { return chosen_name; }
const Kernels& kernels() { return *chosen->kernels; }

void choose_isa(const char* name) {
    for (const Isa& i : isas) {
        if (!i.available() || (name && std::string(name) != i.name)) continue;
        chosen = &i;
        chosen_name = i.name;
        return;
    }
    std::string message = "FASTGD_ISA: expected one that this CPU and build have (";
    for (const std::string& n : available_isas()) message += n + ", ";
    message.resize(message.size() - 2);
    throw std::runtime_error(message + "), got '" + name + "'; unset it to use the best");
}

}  // namespace fastgd
