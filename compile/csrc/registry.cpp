#include "registry.h"

#include <exception>
#include <mutex>
#include <unordered_map>

#include "pool.h"
#include "product.h"

namespace {

struct Registry {
    std::mutex changing;
    std::unordered_map<std::int64_t, Held> held;
    std::int64_t last = 0;
};

// Never destroyed: a matrix may belong to a Python object, and Python is gone by then.
Registry &registry() {
    static Registry &all = *new Registry;
    return all;
}

int shape(std::int64_t handle, std::int64_t *rows, std::int64_t *columns) {
    const Held found = find(handle);
    if (!found.matrix) return kUnknown;
    *rows = found.matrix->view().rows;
    *columns = found.matrix->view().columns;
    return kDone;
}

int multiply_held(std::int64_t handle, const float *x, std::int64_t tokens, std::int64_t columns,
                  const float *bias, float *y, std::int64_t rows) try {
    const Held found = find(handle);
    if (!found.matrix) return kUnknown;
    const View &m = found.matrix->view();
    if (m.rows != rows || m.columns != columns || tokens < 0) return kMisfit;
    multiply({{found.matrix.get(), found.act8, bias, y}}, x, columns, tokens);
    return kDone;
} catch (const std::exception &) {
    return kNoMemory;
}

}  // namespace

std::int64_t hold(std::shared_ptr<const Matrix> matrix, bool act8) {
    Registry &all = registry();
    const std::lock_guard<std::mutex> changing(all.changing);
    all.held.emplace(++all.last, Held{std::move(matrix), act8});
    return all.last;
}

void release(std::int64_t handle) {
    Held dropped{nullptr, false};  // destroyed after the lock is free
    Registry &all = registry();
    const std::lock_guard<std::mutex> changing(all.changing);
    const auto found = all.held.find(handle);
    if (found == all.held.end()) return;
    dropped = std::move(found->second);
    all.held.erase(found);
}

Held find(std::int64_t handle) {
    Registry &all = registry();
    const std::lock_guard<std::mutex> changing(all.changing);
    const auto found = all.held.find(handle);
    return found == all.held.end() ? Held{nullptr, false} : found->second;
}

const KernelTable &kernel_table() {
    static const KernelTable table{kTableVersion, &shape, &multiply_held, &borrow_threads};
    return table;
}
