// The random stream of every mask: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011), the stream of Triton's tl.philox.
//
// A mask is a pure function of the seed and of a unit's index. The key is the 64-bit seed, the counter is the index of
// a block of four 32-bit words. Element dropout reads 16-bit lanes, eight to a block: lane k is half k % 2 (the low one
// first) of word k / 2. Coarser units and DropBlock's seeds read 32-bit lanes, four to a block: lane k is word k. A
// unit is dropped where its lane is below a threshold, so many out of 2^16 or 2^32.

#pragma once

#include <cstdint>

#include "math.h"

namespace fastreg {

struct PhiloxBlock {
  uint32_t words[4];
};

inline constexpr uint32_t philox_multipliers[2] = {0xD2511F53u, 0xCD9E8D57u};
inline constexpr uint32_t philox_key_steps[2] = {0x9E3779B9u, 0xBB67AE85u};
inline constexpr int philox_rounds = 10;

inline constexpr int philox_half_lanes = 8;  // 16-bit lanes of a block
inline constexpr int philox_lanes = 4;       // 32-bit lanes of a block

// The upper and the lower word of a product. On a GPU both are one instruction, in 64 bits several.
struct PhiloxProduct {
  uint32_t high;
  uint32_t low;
};

FASTREG_INLINE PhiloxProduct philox_product(uint32_t multiplier, uint32_t word) {
#if defined(__CUDA_ARCH__)
  return {__umulhi(multiplier, word), multiplier * word};
#else
  const uint64_t product = uint64_t{multiplier} * word;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
#endif
}

FASTREG_INLINE PhiloxBlock philox(uint64_t seed, const PhiloxBlock& counter) {
  // Device code knows the elements of a constant array, but not the array.
  constexpr uint32_t key_step0 = philox_key_steps[0];
  constexpr uint32_t key_step1 = philox_key_steps[1];
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  PhiloxBlock block = counter;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < philox_rounds; ++round) {
    const PhiloxProduct product0 = philox_product(philox_multipliers[0], block.words[0]);
    const PhiloxProduct product1 = philox_product(philox_multipliers[1], block.words[2]);
    block = {{product1.high ^ block.words[1] ^ key0, product1.low, product0.high ^ block.words[3] ^ key1,
              product0.low}};
    key0 += key_step0;
    key1 += key_step1;
  }
  return block;
}

FASTREG_INLINE PhiloxBlock philox(uint64_t seed, uint64_t block) {
  return philox(seed, PhiloxBlock{{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0u, 0u}});
}

FASTREG_INLINE uint32_t half_lane(const PhiloxBlock& block, int lane) {
  return lane % 2 == 0 ? block.words[lane / 2] & 0xffffu : block.words[lane / 2] >> 16;
}

// The lane of one unit.
FASTREG_INLINE uint32_t half_lane_at(uint64_t seed, uint64_t unit) {
  return half_lane(philox(seed, unit / philox_half_lanes), static_cast<int>(unit % philox_half_lanes));
}

FASTREG_INLINE uint32_t lane_at(uint64_t seed, uint64_t unit) {
  return philox(seed, unit / philox_lanes).words[unit % philox_lanes];
}

// What the units that are kept are multiplied by, so that the mean stays as it is: exact for the rate that the
// threshold stands for. Nothing is kept where the threshold is `lanes`, the number of different lanes.
FASTREG_INLINE double keep_scale(uint64_t threshold, uint64_t lanes) {
  return threshold >= lanes ? 0.0 : static_cast<double>(lanes) / static_cast<double>(lanes - threshold);
}

inline constexpr uint64_t half_lane_count = uint64_t{1} << 16;
inline constexpr uint64_t lane_count = uint64_t{1} << 32;

}  // namespace fastreg
