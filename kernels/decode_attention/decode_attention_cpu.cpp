// `decode_attention` on the CPU. With one query per row, reading the keys and values takes longer than the
// arithmetic. So each is read once, for all queries that share it, and only as far as the row is long. Loops
// over kLanes elements become vector instructions.
#include "decode_attention/decode_attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "clones.h"
#include "device.h"
#include "exponential.h"
#include "host.h"

namespace vrthinker {
namespace {

constexpr int kLanes = 8;
constexpr std::int64_t kTile = 64;  // tokens whose keys or values stay in the first-level cache

// What a further thread must have to read to be worth starting.
constexpr std::int64_t kBytesPerThread = 4 * 1024 * 1024;

// Room for the scores of one key head's queries, and for the queries times the scale.
struct Workspace {
    std::vector<float> weights;  // [queries, padded length]
    std::vector<float> scaled;   // [queries, head_size]
    std::vector<float> sums;     // [queries]
};

// kLanes floats that the compiler keeps in vector registers of whatever width there is. Only ever a local
// variable: as an argument it would be passed in other ways by other instruction sets.
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));

// The sum of all lanes, the same for every instruction set.
#define VRTHINKER_ADD_LANES(lanes)                             \
    ((((lanes)[0] + (lanes)[4]) + ((lanes)[2] + (lanes)[6])) + \
     (((lanes)[1] + (lanes)[5]) + ((lanes)[3] + (lanes)[7])))

// kSize is the compile-time copy of the head size, or 0 to read it from `size`.
template <int kSize>
VRTHINKER_INLINE float dot(const float* a, const float* b, std::int64_t size) {
    const std::int64_t count = kSize ? kSize : size;
    Lanes sum = {};
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        Lanes left;
        Lanes right;
        std::memcpy(&left, a + i, sizeof(left));
        std::memcpy(&right, b + i, sizeof(right));
        sum += left * right;
    }
    float rest = 0.0F;
    for (; i < count; ++i) {
        rest += a[i] * b[i];
    }
    return VRTHINKER_ADD_LANES(sum) + rest;
}

// e^x for x <= 0, to about 1e-7 of itself; 0 below -87; NaN for NaN. x = n ln 2 + r, and a polynomial in r.
VRTHINKER_INLINE float exp_negative(float x) {
    constexpr float kRounder = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const float bounded = x < -87.0F ? -87.0F : x;
    const float rounded = bounded * 1.44269504088896341F + kRounder;
    const float n = rounded - kRounder;
    const float r = (bounded - n * 0.693359375F) + n * 2.12194440e-4F;
    const float value = (exp_tail(r) * (r * r) + r) + 1.0F;
    const std::int32_t power =
        static_cast<std::int32_t>(float_bits(rounded)) - static_cast<std::int32_t>(float_bits(kRounder));
    const float result = value * float_of_bits(static_cast<std::uint32_t>(power + 127) << 23);
    return x < -87.0F ? 0.0F : result;
}

// Turns the scores of one query, [0, padded), into weights that are not yet divided by their sum, which it
// returns. Scores behind the row's length are -infinity.
VRTHINKER_INLINE float soften(float* scores, std::int64_t padded) {
    float largest = -std::numeric_limits<float>::infinity();
    for (std::int64_t i = 0; i < padded; ++i) {
        largest = scores[i] > largest ? scores[i] : largest;
    }
    float sums[kLanes] = {};
    for (std::int64_t i = 0; i < padded; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const float weight = exp_negative(scores[i + lane] - largest);
            scores[i + lane] = weight;
            sums[lane] += weight;
        }
    }
    return VRTHINKER_ADD_LANES(sums);
}

// Adds weighted values of tokens [begin, end) to `out`, in registers where the head's size is known.
template <int kSize>
VRTHINKER_INLINE void add_values(const float* weights, const float* values, std::int64_t stride,
                                 std::int64_t begin, std::int64_t end, std::int64_t size, float* out) {
    if constexpr (kSize != 0) {
        float sum[kSize] = {};
        for (std::int64_t t = begin; t < end; ++t) {
            for (int i = 0; i < kSize; ++i) {
                sum[i] += weights[t] * values[t * stride + i];
            }
        }
        for (int i = 0; i < kSize; ++i) {
            out[i] += sum[i];
        }
    } else {
        for (std::int64_t t = begin; t < end; ++t) {
            for (std::int64_t i = 0; i < size; ++i) {
                out[i] += weights[t] * values[t * stride + i];
            }
        }
    }
}

// One key head of one row.
template <int kSize>
VRTHINKER_INLINE void attend(const DecodeShape& shape, const float* query, const float* keys,
                             std::int64_t key_stride, const float* values, std::int64_t value_stride,
                             std::int64_t length, float* out, Workspace& space) {
    const std::int64_t size = kSize ? kSize : shape.head_size;
    const std::int64_t padded = (length + kLanes - 1) / kLanes * kLanes;
    for (std::int64_t i = 0; i < shape.queries * size; ++i) {
        space.scaled[i] = query[i] * shape.scale;
        out[i] = 0.0F;
    }
    float* weights = space.weights.data();
    for (std::int64_t begin = 0; begin < length; begin += kTile) {
        const std::int64_t end = std::min(begin + kTile, length);
        for (std::int64_t q = 0; q < shape.queries; ++q) {
            for (std::int64_t t = begin; t < end; ++t) {
                weights[q * padded + t] =
                    dot<kSize>(space.scaled.data() + q * size, keys + t * key_stride, size);
            }
        }
    }
    for (std::int64_t q = 0; q < shape.queries; ++q) {
        std::fill(weights + q * padded + length, weights + (q + 1) * padded,
                  -std::numeric_limits<float>::infinity());
        space.sums[q] = soften(weights + q * padded, padded);
    }
    for (std::int64_t begin = 0; begin < length; begin += kTile) {
        const std::int64_t end = std::min(begin + kTile, length);
        for (std::int64_t q = 0; q < shape.queries; ++q) {
            add_values<kSize>(weights + q * padded, values, value_stride, begin, end, size, out + q * size);
        }
    }
    for (std::int64_t q = 0; q < shape.queries; ++q) {
        for (std::int64_t i = 0; i < size; ++i) {
            out[q * size + i] /= space.sums[q];
        }
    }
}

// Key heads [begin, end) of all rows, counted through.
template <int kSize>
VRTHINKER_INLINE void attend_all(const DecodeShape& shape, const float* query, const DecodeCache& keys,
                                 const DecodeCache& values, const std::int64_t* lengths, float* out,
                                 std::int64_t begin, std::int64_t end, Workspace& space) {
    for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t row = i / shape.kv_heads;
        const std::int64_t head = i % shape.kv_heads;
        const std::int64_t offset = i * shape.queries * shape.head_size;
        if (lengths[row] == 0) {
            std::fill_n(out + offset, shape.queries * shape.head_size, 0.0F);
            continue;  // a cache of no capacity has no address
        }
        attend<kSize>(shape, query + offset, keys.data + row * keys.row_stride + head * keys.head_stride,
                      keys.token_stride, values.data + row * values.row_stride + head * values.head_stride,
                      values.token_stride, lengths[row], out + offset, space);
    }
}

VRTHINKER_CLONES void attend_part(const DecodeShape& shape, const float* query, const DecodeCache& keys,
                                  const DecodeCache& values, const std::int64_t* lengths, float* out,
                                  std::int64_t begin, std::int64_t end, Workspace& space) {
    switch (shape.head_size) {
        case 32:
            return attend_all<32>(shape, query, keys, values, lengths, out, begin, end, space);
        case 64:
            return attend_all<64>(shape, query, keys, values, lengths, out, begin, end, space);
        case 128:
            return attend_all<128>(shape, query, keys, values, lengths, out, begin, end, space);
        default:
            return attend_all<0>(shape, query, keys, values, lengths, out, begin, end, space);
    }
}

}  // namespace

void decode_attention_cpu(const DecodeShape& shape, const float* query, const DecodeCache& keys,
                          const DecodeCache& values, const std::int64_t* lengths, float* out, int threads) {
    if (shape.rows * shape.kv_heads == 0) {
        return;
    }
    std::int64_t longest = 0;
    std::int64_t read = 0;
    for (std::int64_t row = 0; row < shape.rows; ++row) {
        longest = std::max(longest, lengths[row]);
        read += lengths[row];
    }
    const std::int64_t room = shape.queries * (longest + kLanes);
    const std::int64_t size = shape.queries * shape.head_size;
    const std::int64_t workers =
        std::clamp<std::int64_t>(read * shape.kv_heads * shape.head_size * 2 *
                                     static_cast<std::int64_t>(sizeof(float)) / kBytesPerThread,
                                 1, threads);
    const std::int64_t heads = shape.rows * shape.kv_heads;
    std::vector<Workspace> spaces(static_cast<std::size_t>(std::min(workers, heads)));
    for (Workspace& space : spaces) {
        space.weights.resize(static_cast<std::size_t>(room));
        space.scaled.resize(static_cast<std::size_t>(size));
        space.sums.resize(static_cast<std::size_t>(shape.queries));
    }
    const auto parts = static_cast<std::int64_t>(spaces.size());
    parallel_for(parts, 1, static_cast<int>(parts), [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t part = first; part < last; ++part) {
            attend_part(shape, query, keys, values, lengths, out, heads * part / parts,
                        heads * (part + 1) / parts, spaces[static_cast<std::size_t>(part)]);
        }
    });
}

}  // namespace vrthinker
