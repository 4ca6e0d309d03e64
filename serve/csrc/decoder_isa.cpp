// The table of decoder_kernels.h for the instruction set that this file is compiled for.
#include "decoder_kernels.h"
#include "simd.h"

namespace isa::ISA {
namespace {

// out[i] = f(a[i], b[i]), eight at a time.
template <typename Function>
INLINE void each8(const float *a, const float *b, Index n, float *out, const Function &f) {
    Index i = 0;
    for (; i + 8 <= n; i += 8) store(out + i, f(load(a + i), load(b + i)));
    if (i == n) return;
    float left[8] = {}, right[8] = {};
    std::memcpy(left, a + i, std::size_t(n - i) * 4);
    std::memcpy(right, b + i, std::size_t(n - i) * 4);
    store(left, f(load(left), load(right)));
    std::memcpy(out + i, left, std::size_t(n - i) * 4);
}

// e^x to 2 units in the last place, x between -87.3 and 88; smaller and larger ones become these.
INLINE F8 exponential(F8 x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    x = least(set1(88.0f), greatest(set1(-87.3f), x));
    const F8 shifted = fma(x, set1(1.44269504088896341f), set1(kRound));
    const F8 whole = add(shifted, set1(-kRound));
    // x - whole ln 2, ln 2 in two parts
    F8 r = fma(whole, set1(-0.693359375f), x);
    r = fma(whole, set1(2.12194440e-4f), r);
    F8 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), set1(1.0f));
    const B32 power = add32(shift_left32<23>(as_bytes(shifted)), set1_32(0x3f800000));
    return mul(p, as_float(power));
}

INLINE F8 sigmoid(F8 x) {
    return divide(set1(1.0f), add(set1(1.0f), exponential(mul(x, set1(-1.0f)))));
}

void norm(const float *x, const float *weight, float epsilon, Index n, float *y) {
    F8 sums[2] = {zero(), zero()};
    Index i = 0;
    for (; i + 16 <= n; i += 16) {
        const F8 a = load(x + i), b = load(x + i + 8);
        sums[0] = fma(a, a, sums[0]);
        sums[1] = fma(b, b, sums[1]);
    }
    float squares = sum(add(sums[0], sums[1]));
    for (; i < n; ++i) squares += x[i] * x[i];
    const F8 factor = set1(1.0f / std::sqrt(squares / float(n) + epsilon));
    each8(x, weight, n, y, [&](F8 a, F8 w) { return mul(w, mul(a, factor)); });
}

void add_to(const float *x, Index n, float *y) {
    each8(x, y, n, y, [](F8 a, F8 b) { return add(a, b); });
}

void rotate(const float *cosine, const float *sine, Index half, float *x) {
    float *other = x + half;
    Index i = 0;
    for (; i + 8 <= half; i += 8) {
        const F8 a = load(x + i), b = load(other + i), c = load(cosine + i), s = load(sine + i);
        store(x + i, fma(mul(b, s), set1(-1.0f), mul(a, c)));
        store(other + i, fma(a, s, mul(b, c)));
    }
    for (; i < half; ++i) {
        const float a = x[i], b = other[i];
        x[i] = a * cosine[i] - b * sine[i];
        other[i] = b * cosine[i] + a * sine[i];
    }
}

void gate(Activation activation, const float *g, const float *up, Index n, float *y) {
    switch (activation) {
    case Activation::silu:
        return each8(g, up, n, y, [](F8 a, F8 b) { return mul(mul(a, sigmoid(a)), b); });
    case Activation::gelu_tanh:  // (1 + tanh u) / 2 = sigmoid(2 u)
        return each8(g, up, n, y, [](F8 a, F8 b) {
            const F8 cubic = fma(mul(a, a), set1(0.044715f), set1(1.0f));
            return mul(mul(a, sigmoid(mul(mul(a, cubic), set1(1.5957691216f)))), b);
        });
    case Activation::gelu:
        for (Index i = 0; i < n; ++i)
            y[i] = 0.5f * g[i] * (1.0f + std::erf(g[i] * 0.70710678118654752f)) * up[i];
    }
}

void cap(float limit, Index n, float *x) {
    const F8 inverse = set1(2.0f / limit), top = set1(limit), twice = set1(-2.0f * limit);
    each8(x, x, n, x, [&](F8 a, F8) {
        return add(top, divide(twice, add(exponential(mul(a, inverse)), set1(1.0f))));
    });
}

float exponentials(Index n, float *x) {
    float largest = x[0];
    Index i = 0;
    if (n >= 8) {
        F8 tops = load(x);
        for (i = 8; i + 8 <= n; i += 8) tops = greatest(load(x + i), tops);
        float lanes[8];
        store(lanes, tops);
        for (float lane : lanes) largest = lane > largest ? lane : largest;
    }
    for (; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
    const F8 top = set1(-largest);
    F8 sums = zero();
    each8(x, x, n, x, [&](F8 a, F8) { return exponential(add(a, top)); });
    for (i = 0; i + 8 <= n; i += 8) sums = add(sums, load(x + i));
    float total = sum(sums);
    for (; i < n; ++i) total += x[i];
    return total;
}

float peak(const float *x, Index n) {
    float largest = 0;
    for (Index i = 0; i < n; ++i) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
    return largest;
}

template <typename T, typename Function>
INLINE void widen(const T *x, Index n, float *y, const Function &loaded) {
    Index i = 0;
    for (; i + 8 <= n; i += 8) store(y + i, loaded(x + i));
    if (i == n) return;
    T rest[8] = {};
    float wide[8];
    std::memcpy(rest, x + i, std::size_t(n - i) * sizeof(T));
    store(wide, loaded(rest));
    std::memcpy(y + i, wide, std::size_t(n - i) * 4);
}

void widen_half(const std::uint16_t *x, Index n, float *y) {
    widen(x, n, y, [](const std::uint16_t *p) { return load_half(p); });
}
void widen_bfloat(const std::uint16_t *x, Index n, float *y) {
    widen(x, n, y, [](const std::uint16_t *p) { return load_bfloat(p); });
}
void widen_int8(const std::int8_t *x, Index n, float *y) {
    widen(x, n, y, [](const std::int8_t *p) { return load_int8(p); });
}

void narrow_half(const float *x, Index n, std::uint16_t *y) {
    Index i = 0;
    for (; i + 8 <= n; i += 8) store_half(y + i, load(x + i));
    if (i == n) return;
    float rest[8] = {};
    std::uint16_t half[8];
    std::memcpy(rest, x + i, std::size_t(n - i) * 4);
    store_half(half, load(rest));
    std::memcpy(y + i, half, std::size_t(n - i) * 2);
}

void narrow_int8(const float *x, float factor, Index n, std::int8_t *y) {
    constexpr float kRound = 12582912.0f;
    for (Index i = 0; i < n; ++i) y[i] = std::int8_t(int((x[i] * factor + kRound) - kRound));
}

}  // namespace
}  // namespace isa::ISA

#define JOIN(a, b) a##b
#define KERNELS_OF(isa) JOIN(isa, _decoder_kernels)
#define TEXT_OF(isa) #isa
#define NAME_OF(isa) TEXT_OF(isa)

const DecoderKernels &KERNELS_OF(ISA)() {
    using namespace isa::ISA;
    static constexpr DecoderKernels kernels{
        NAME_OF(ISA), norm,       add_to,       rotate,     gate,        cap,        exponentials,
        peak,         widen_half, widen_bfloat, widen_int8, narrow_half, narrow_int8};
    return kernels;
}
