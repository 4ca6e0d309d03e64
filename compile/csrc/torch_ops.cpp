// The op secateur::linear, on torch's stable ABI: built once, it runs with every torch from 2.10 on.
//
// A library of its own, so that the kernels need no torch. It is not linked with them either:
// compile/torch_ops.py loads both and hands the kernels' table over.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "table.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK // its name from torch 2.12 on
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::atomic<const KernelTable *> connected{nullptr};

// Memory that a thread keeps from call to call.
template <int Name> float *scratch(std::size_t count) {
    thread_local std::vector<float> kept;
    if (kept.size() < count) kept.resize(count);
    return kept.data();
}

template <typename From, typename To> void convert(const void *from, void *to, std::int64_t count) {
    const From *in = static_cast<const From *>(from);
    To *out = static_cast<To *>(to);
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<To>(static_cast<float>(in[i]));
}

// The elements of a contiguous tensor as floats.
template <int Name> const float *floats(const Tensor &t, std::int64_t count) {
    const void *data = t.data_ptr();
    switch (t.scalar_type()) {
        case ScalarType::Float: return static_cast<const float *>(data);
        case ScalarType::BFloat16:
            convert<c10::BFloat16, float>(data, scratch<Name>(std::size_t(count)), count);
            break;
        case ScalarType::Half:
            convert<c10::Half, float>(data, scratch<Name>(std::size_t(count)), count);
            break;
        default: STD_TORCH_CHECK(false, "secateur::linear takes float32, bfloat16 and float16");
    }
    return scratch<Name>(std::size_t(count));
}

Tensor like(const Tensor &x, const std::vector<std::int64_t> &sizes) {
    std::vector<std::int64_t> strides(sizes.size());
    std::int64_t step = 1;
    for (std::size_t i = sizes.size(); i-- > 0; step *= sizes[i]) strides[i] = step;
    std::int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
    AtenTensorHandle made;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(std::int64_t(sizes.size()), sizes.data(), strides.data(), type,
                                 aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
}

Tensor linear(const Tensor x, std::int64_t handle, const std::optional<Tensor> bias) {
    const KernelTable *kernels = connected.load(std::memory_order_acquire);
    STD_TORCH_CHECK(kernels, "secateur::linear: import secateur.compile.torch_ops first");
    std::int64_t rows = 0, columns = 0;
    STD_TORCH_CHECK(kernels->shape(handle, &rows, &columns) == kDone,
                    "secateur::linear: there is no matrix ", handle);
    const auto shape = x.sizes();
    STD_TORCH_CHECK(shape.size() > 0 && shape[shape.size() - 1] == columns,
                    "secateur::linear: matrix ", handle, " takes inputs of ", columns, " columns, not ",
                    shape.size() > 0 ? shape[shape.size() - 1] : 0);
    const Tensor in = x.is_contiguous() ? x : torch::stable::contiguous(x);
    std::vector<std::int64_t> sizes(shape.begin(), shape.end());
    sizes.back() = rows;
    const Tensor out = like(in, sizes);
    const std::int64_t count = in.numel(), tokens = count / columns;
    const float *added = nullptr;
    std::optional<Tensor> whole;
    if (bias) {
        STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == rows && bias->is_cpu(),
                        "secateur::linear: matrix ", handle, " takes ", rows, " biases");
        whole = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
        added = floats<0>(*whole, rows);
    }
    const float *from = floats<1>(in, count);
    const ScalarType type = in.scalar_type();
    float *to = type == ScalarType::Float ? static_cast<float *>(out.data_ptr())
                                          : scratch<2>(std::size_t(tokens * rows));
    const int outcome = kernels->multiply(handle, from, tokens, columns, added, to, rows);
    STD_TORCH_CHECK(outcome != kNoMemory, "secateur::linear: no memory left for matrix ", handle);
    STD_TORCH_CHECK(outcome == kDone, "secateur::linear: there is no matrix ", handle,
                    " any more: it was released during the call");
    if (type == ScalarType::BFloat16) convert<float, c10::BFloat16>(to, out.data_ptr(), tokens * rows);
    if (type == ScalarType::Half) convert<float, c10::Half>(to, out.data_ptr(), tokens * rows);
    return out;
}

// Run a task in each of torch's threads.
void lend(void (*task)(void *), void *context) {
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1,
                                [&](std::int64_t from, std::int64_t to) {
                                    for (; from < to; ++from) task(context);
                                });
}

}  // namespace

// Returns 0 if the table is of a version that this library does not know.
extern "C" __attribute__((visibility("default"))) int secateur_connect(const KernelTable *table) {
    if (table->version != kTableVersion) return 0;
    connected.store(table, std::memory_order_release);
    return 1;
}

// Let all products run in torch's threads from now on.
extern "C" __attribute__((visibility("default"))) void secateur_lend_threads() {
    if (const KernelTable *kernels = connected.load(std::memory_order_acquire))
        kernels->borrow(int(torch::stable::get_num_threads()), &lend);
}

STABLE_TORCH_LIBRARY(secateur, m) { m.def("linear(Tensor x, int handle, Tensor? bias=None) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(secateur, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }
