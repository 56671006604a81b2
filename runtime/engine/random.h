// Random numbers as a pure function of (seed, position). Nothing is stateful: a position draws the
// same number whether its token is computed first, again after a rollback, or as a draft's check.
#pragma once

#include <array>
#include <cstdint>

namespace dsv3 {

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011). A plain hash such as SplitMix64 over seed + position was rejected: neighbouring seeds
// would share shifted streams.
std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// A number in [0, 1) with 53 random bits; `position` is the sequence index of the token it decides.
double position_uniform(uint64_t seed, uint64_t position);

}  // namespace dsv3
