#include "bind.h"

void bind_decoder(nanobind::module_ &) {}
