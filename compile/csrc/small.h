// Products with few tokens: every byte of the weights is read once, in the order of its stream.
#pragma once

#include "small_ints.h"

namespace isa::ISA {

Index few_tokens(const View &m) {
#if SIMD_NUMBER(ISA) == SIMD_avx512
    if (m.kind == Kind::bitmask) return 5;
    if (is_integer(m.type)) return m.kind == Kind::vector ? 6 : 8;
    if (m.kind == Kind::vector) return m.height == 16 ? 24 : m.height == 8 ? 11 : 9;
    return m.kind == Kind::nm ? 24 : 8;
#else
    if (m.kind == Kind::bitmask) return 12;
    return m.kind == Kind::nm && !is_integer(m.type) ? 32 : 16;
#endif
}

template <int T>
void small_of(const View &m, Index first, Index last, const Inputs &in, float *y, Index stride,
              float *scratch) {
    switch (m.type) {
    case Type::fp32: return float_panels<Type::fp32, T>(m, first, last, in, y, stride);
    case Type::bf16: return float_panels<Type::bf16, T>(m, first, last, in, y, stride);
    case Type::fp16: return float_panels<Type::fp16, T>(m, first, last, in, y, stride);
    case Type::int8:
        return m.group == 64 ? small_ints<Type::int8, T, 64>(m, first, last, in, y, stride, scratch)
                             : small_ints<Type::int8, T, 32>(m, first, last, in, y, stride, scratch);
    case Type::int4:
        return m.group == 64 ? small_ints<Type::int4, T, 64>(m, first, last, in, y, stride, scratch)
                             : small_ints<Type::int4, T, 32>(m, first, last, in, y, stride, scratch);
    }
}

void small(const View &m, Index first, Index last, const Inputs &in, int tokens, float *y,
           Index stride, float *scratch) {
    Inputs rest = in;
    while (tokens > 0) {
        const int now = tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1;
        if (now == 4) small_of<4>(m, first, last, rest, y, stride, scratch);
        else if (now == 2) small_of<2>(m, first, last, rest, y, stride, scratch);
        else small_of<1>(m, first, last, rest, y, stride, scratch);
        tokens -= now;
        y += now * stride;
        rest.x += now * rest.stride;
        if (rest.q) {
            rest.q += now * rest.padded;
            rest.scale += now * rest.groups;
            rest.total += now * rest.groups;
        }
    }
}

}  // namespace isa::ISA
