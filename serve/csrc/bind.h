// What of the native engine Python sees; called when the kernels' module is made.
#pragma once

#include <nanobind/nanobind.h>

void bind_decoder(nanobind::module_ &m);
void bind_sampler(nanobind::module_ &m);
