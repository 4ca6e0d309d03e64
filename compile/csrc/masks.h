// For each byte of a bitmask: where the kept values, which lie side by side, belong.
#pragma once

#include <cstdint>

struct Places8 {
    alignas(64) std::uint8_t v[256][8];
};
struct Places16 {
    alignas(64) std::uint8_t v[256][16];
};
struct Places32 {
    alignas(64) std::uint8_t v[256][32];
};

// Position i: how many bits below i are set, or 255 if bit i is not.
constexpr Places8 find_ranks() {
    Places8 places{};
    for (int mask = 0; mask < 256; ++mask)
        for (int i = 0, rank = 0; i < 8; ++i)
            places.v[mask][i] = std::uint8_t(mask >> i & 1 ? rank++ : 255);
    return places;
}
inline constexpr Places8 kRanks = find_ranks();

// For a byte shuffle, 255 giving 0: halves to eight halves.
constexpr Places16 find_half_places() {
    Places16 places{};
    for (int mask = 0; mask < 256; ++mask)
        for (int i = 0; i < 16; ++i) {
            const int rank = kRanks.v[mask][i / 2];
            places.v[mask][i] = std::uint8_t(rank == 255 ? 255 : 2 * rank + i % 2);
        }
    return places;
}
inline constexpr Places16 kHalfPlaces = find_half_places();

// bf16 to the upper halves of eight floats.
constexpr Places32 find_bfloat_places() {
    Places32 places{};
    for (int mask = 0; mask < 256; ++mask)
        for (int i = 0; i < 32; ++i) {
            const int rank = kRanks.v[mask][i / 4];
            places.v[mask][i] = std::uint8_t(rank == 255 || i % 4 < 2 ? 255 : 2 * rank + i % 2);
        }
    return places;
}
inline constexpr Places32 kBfloatPlaces = find_bfloat_places();

// For a byte shuffle: the positions of the set bits, then 255.
constexpr Places8 find_kept() {
    Places8 places{};
    for (int mask = 0; mask < 256; ++mask) {
        int n = 0;
        for (int i = 0; i < 8; ++i)
            if (mask >> i & 1) places.v[mask][n++] = std::uint8_t(i);
        while (n < 8) places.v[mask][n++] = 255;
    }
    return places;
}
inline constexpr Places8 kKept = find_kept();
