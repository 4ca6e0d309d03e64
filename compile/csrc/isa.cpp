// The kernels of the instruction set that this file is compiled for; it is compiled once for each.
#include "large.h"
#include "simd.h"
#if SIMD_NUMBER(ISA) == SIMD_avx512
#include "large_ints_avx512.h"
#else
#include "large_ints.h"
#endif
#include "semi_structured_rows.h"
#include "small.h"

#define JOIN(a, b) a##b
#define KERNELS_OF(isa) JOIN(isa, _kernels)
#define TEXT_OF(isa) #isa
#define NAME_OF(isa) TEXT_OF(isa)

const Kernels &KERNELS_OF(ISA)() {
    using namespace isa::ISA;
    static constexpr Kernels kernels{
        NAME_OF(ISA), kTile, few_tokens, small,       quantize,  expand, slots,      strip_width,  strip,      turn,
        tile,         list,  skip,       steps,       expand_ints, tile_ints, quads, strip_ints, compress_row, expand_row, checksum};
    return kernels;
}
