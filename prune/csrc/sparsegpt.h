#pragma once

#include "rows.h"

void bind_sparsegpt(nanobind::module_ &module);
