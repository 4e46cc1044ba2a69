// Dropout by sample: which elements are dropped is a function of (seed, sample id, layer, element). The layout is a
// contract, as philox.h's is; ddpm_fast/noise.py says the same in plain torch.
//   element = position * channels + channel, so that the order is that of channels_last memory
//   key     = seed, low word first
//   counter = { element / 8,  sample id (low 32 bits),  layer,  stream | sample id (high 24 bits) << 8 }
//   bits    = the lower (element even) or upper half of word element % 8 / 2; the element is dropped if bits < dropped
// So a counter, which costs as much as two normals' words, serves eight elements.
#pragma once

#include "ops.h"
#include "philox.h"

namespace ddpm {

constexpr int kBitsOfCounter = 8;  // elements

DDPM_FN NoiseKey key_of(const DropoutArgs& args, int64_t sample) {
    return noise_key(uint64_t(*args.seed), uint64_t(args.sample_id[sample]), args.layer, args.stream);
}

// Chosen and not multiplied, so that what is dropped is 0 also of an infinity.
DDPM_FN float dropout(float x, uint32_t bits, uint32_t dropped, float scale) {
    const float kept = mul(x, scale);
    return bits >= dropped ? kept : 0.0f;
}

}  // namespace ddpm
