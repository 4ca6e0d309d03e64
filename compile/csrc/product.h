// y = W x, for one matrix or for several that share their input.
#pragma once

#include "matrix.h"

// A factor of a product.
struct Factor {
    const Matrix *matrix;
    bool act8;          // integers: quantise the activations to int8
    const float *bias;  // [rows] or null
    float *y;           // [tokens, rows]
};

// x: [tokens, columns], the same columns in all factors.
void multiply(const std::vector<Factor> &factors, const float *x, Index columns, Index tokens);

// The same for many tokens; multiply calls it.
void multiply_large(const std::vector<Factor> &factors, const float *x, Index columns, Index tokens);
// Whether it rounds its inputs to int8, if it may.
bool rounds_inputs(const Kernels &, const View &);

// Whether a product with so many tokens does.
bool rounds_inputs(const View &, Index tokens);

// The kernels in use; and which could be.
const Kernels &kernels();
std::vector<const Kernels *> usable_kernels();
void use_kernels(const Kernels &chosen);
