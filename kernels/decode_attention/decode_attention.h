// The native version of `decode_attention`. Callers have checked every argument (csrc/decode_attention.cpp).
#pragma once

#include <cstdint>

namespace vrthinker {

// A cache of keys or values: [rows, kv_heads, capacity, head_size] with any strides but that of the last
// dimension, which is 1. Strides are in elements.
struct DecodeCache {
    const float* data;
    std::int64_t row_stride;
    std::int64_t head_stride;
    std::int64_t token_stride;
};

struct DecodeShape {
    std::int64_t rows;
    std::int64_t kv_heads;
    std::int64_t queries;  // query heads that share a key head
    std::int64_t head_size;
    float scale;
};

// `query` and `out` are [rows, kv_heads * queries, head_size], contiguous. Row r reads lengths[r] keys and
// values. The result depends neither on `threads` nor on what stands behind a row's length.
void decode_attention_cpu(const DecodeShape& shape, const float* query, const DecodeCache& keys,
                          const DecodeCache& values, const std::int64_t* lengths, float* out, int threads);

}  // namespace vrthinker
