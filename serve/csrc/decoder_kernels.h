// What a step computes besides products: one table for each instruction set.
#pragma once

#include "layout.h"

enum class Activation { silu, gelu_tanh, gelu };

struct DecoderKernels {
    const char *name;
    // y = weight * x / sqrt(mean of x^2 + epsilon); y may be x.
    void (*norm)(const float *x, const float *weight, float epsilon, Index n, float *y);
    void (*add)(const float *x, Index n, float *y);  // y += x
    // Turn the pairs x[i], x[half + i] by angles of which cosine and sine are given.
    void (*rotate)(const float *cosine, const float *sine, Index half, float *x);
    void (*gate)(Activation, const float *gate, const float *up, Index n, float *y);
    void (*cap)(float limit, Index n, float *x);  // x = limit * tanh(x / limit)
    // x = exp(x - their maximum); returns their sum.
    float (*exponentials)(Index n, float *x);
    float (*peak)(const float *x, Index n);  // the largest magnitude
    void (*widen_half)(const std::uint16_t *, Index n, float *);
    void (*widen_bfloat)(const std::uint16_t *, Index n, float *);
    void (*widen_int8)(const std::int8_t *, Index n, float *);
    void (*narrow_half)(const float *, Index n, std::uint16_t *);
    // The nearest whole numbers to factor * x.
    void (*narrow_int8)(const float *, float factor, Index n, std::int8_t *);
};

// Of the instruction set that products use.
const DecoderKernels &decoder_kernels();

const DecoderKernels &plain_decoder_kernels();
#if defined(__x86_64__)
const DecoderKernels &avx2_decoder_kernels();
const DecoderKernels &avx512_decoder_kernels();
#elif defined(__aarch64__)
const DecoderKernels &neon_decoder_kernels();
#endif
