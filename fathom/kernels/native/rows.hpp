// Products of a few rows with many weights, y = x W^T, each weight read once and at the rate of memory.
//
// Decoding multiplies 1 to some 16 rows with every weight of the model. A library's product is made for
// many rows; with few it reads at half of what the memory gives. Here a small block of outputs keeps all
// its sums in registers, so that every weight that comes in is used for all rows at once and never again.
// With up to eight rows (four where registers are few) the lanes of a vector are inputs, with more they are rows
// (see `few` and `many`).
//
// Weights stand by rows, [outputs, inputs], as float32, bfloat16, or int8 with a scale for each output and
// each group of inputs.
// Sums are float32. Vectors are the compiler's own, so the same text serves AVX2, AVX-512 and NEON.

#pragma once

#include <cstdint>
#include <cstring>
#include <cmath>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Numbers in a vector, and vectors that the registers hold. gcc keeps vectors that are wider than a register in
// memory: with sixteen numbers in them AVX2 would be five times slower.
#if defined(__AVX512F__)
constexpr long LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr long LANES = 8, REGISTERS = 16;
#else
constexpr long LANES = 16, REGISTERS = 8;
#endif
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef float eight __attribute__((vector_size(32)));

enum Kind { FLOAT32, BFLOAT16, INT8 };

// A weight format: where output o's input i stands, a vector of them as floats, and one; a vector's bytes, and how
// many bytes ahead memory is asked for where outputs are taken one by one (the best of 2, 4, 8, 16 KiB).
template <Kind kind> struct Format;

template <> struct Format<FLOAT32> {
    static const char* at(const void* w, long inputs, long o, long i) {
        return static_cast<const char*>(w) + 4 * (o * inputs + i);
    }
    static inline floats load(const char* p) { floats v; std::memcpy(&v, p, sizeof(floats)); return v; }
    static inline float one(const char* p) { float v; std::memcpy(&v, p, 4); return v; }
    static constexpr long step = 4 * LANES, ahead = 2048;
};

template <> struct Format<BFLOAT16> {
    static const char* at(const void* w, long inputs, long o, long i) {
        return static_cast<const char*>(w) + 2 * (o * inputs + i);
    }
    static inline floats load(const char* p) {
        halves h; std::memcpy(&h, p, sizeof h);
        words u = __builtin_convertvector(h, words) << 16;
        floats v; std::memcpy(&v, &u, sizeof(floats)); return v;
    }
    static inline float one(const char* p) {
        uint16_t h; std::memcpy(&h, p, 2);
        uint32_t u = uint32_t(h) << 16; float v; std::memcpy(&v, &u, 4); return v;
    }
    static constexpr long step = 2 * LANES, ahead = 8192;
};

template <> struct Format<INT8> {
    static const char* at(const void* w, long inputs, long o, long i) {
        return static_cast<const char*>(w) + o * inputs + i;
    }
    static inline floats load(const char* p) {
#if defined(__AVX512F__)  // gcc 12 would convert one by one
        __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
        floats out; std::memcpy(&out, &v, sizeof(floats)); return out;
#elif defined(__AVX2__)
        __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
        floats out; std::memcpy(&out, &v, sizeof(floats)); return out;
#else
        bytes b; std::memcpy(&b, p, LANES); return __builtin_convertvector(b, floats);
#endif
    }
    static inline float one(const char* p) { return float(*reinterpret_cast<const int8_t*>(p)); }
    static constexpr long step = LANES, ahead = 2048;
};

// e^x for each lane, to a relative 2e-7: x = n ln 2 + r, a polynomial in r (Cephes), and n into the exponent.
// Within +-87, where n stays in the exponent's bits; what lies beyond is taken as the end.
inline floats exp_of(floats x) {
    const floats lowest = floats{} - 87.0f, highest = floats{} + 87.0f;
    x = x > lowest ? x : lowest;
    x = x < highest ? x : highest;
    const floats half = floats{} + 0.5f;
    const floats scaled = x * 1.44269504088896341f;
    ints n = __builtin_convertvector(scaled + (scaled > 0 ? half : -half), ints);
    const floats whole = __builtin_convertvector(n, floats);
    const floats r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
    floats y = floats{} + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    n = (n + 127) << 23;
    floats power;
    std::memcpy(&power, &n, sizeof(floats));
    return y * power;
}

// Whole vectors are copied, never halves: a compiler keeps what is taken apart by address in memory, all through the
// loop that sums into it.
inline eight folded(floats v) {
    eight parts[LANES / 8];
    std::memcpy(parts, &v, sizeof(floats));
    return LANES == 8 ? parts[0] : parts[0] + parts[LANES / 8 - 1];
}

inline float sum_of(floats v) {
    typedef float quarter __attribute__((vector_size(16)));
    const eight half = folded(v);
    quarter quarters[2];
    std::memcpy(quarters, &half, 32);
    const quarter c = quarters[0] + quarters[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(32)));
#define PICK(a, b, ...) __builtin_shuffle(a, b, places{__VA_ARGS__})
#endif

// The sums of eight vectors, by halves of pairs: a third of the work of eight times `sum_of`.
inline void sums_of(const floats* v, float* sums) {
    eight four[4], two[2];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
        const eight a = folded(v[k]), b = folded(v[k + 4]);
        four[k] = PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    }
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k)
        two[k] = PICK(four[k], four[k + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
                 PICK(four[k], four[k + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    // now two[k] holds, by pairs of lanes, vectors k, k + 2, k + 4, k + 6
    const eight one = PICK(two[0], two[1], 0, 8, 2, 10, 4, 12, 6, 14) + PICK(two[0], two[1], 1, 9, 3, 11, 5, 13, 7, 15);
    std::memcpy(sums, &one, 32);
}

// Room for numbers that vectors are read from: at a multiple of 64 bytes no read touches two lines.
struct Room {
    std::vector<float> numbers;

    float* of(long count) {
        if (static_cast<long>(numbers.size()) < count + 16) numbers.resize(count + 16);
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(numbers.data()) + 63) / 64 * 64);
    }
};

// Outputs are taken C at a time. Their rows of weights are neighbours in memory but read side by side, which the
// processor does not foresee; so the block after the next is asked for here, in the order it lies in, while this one
// is at work. `at`: this block; `i`: the inputs it has come to, of which it takes U vectors now.
template <Kind kind, int C, int U>
inline void ask_ahead(const char* at, long inputs, long i) {
    constexpr long bytes = U * C * Format<kind>::step;
    const long distance = C > 1 ? 2 * C * inputs * Format<kind>::step / LANES : Format<kind>::ahead;
    const char* ahead = at + distance + i / LANES * C * Format<kind>::step;
    for (long k = 0; k < bytes; k += 64) __builtin_prefetch(ahead + k, 0, 2);
}

// That a value is read into a register once, where a compiler would rather read it again for each of its uses: weights
// that are made wider leave less of the one read a cycle. Not with float32, where a loop that is quicker than memory
// reads less from it (3 rows of 2,048: 22 GB/s instead of 28; why is not known).
inline void keep(floats& value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#elif defined(__AVX2__)
    asm("" : "+x"(value));
#endif
}

constexpr long NEXT = 512;  // bytes ahead that what was asked for comes into the nearest cache

// A few rows, C outputs: LANES inputs in the lanes, a sum over the lanes at the end. U sums of each let
// multiplications overlap. `packed`: the rows as `pack_rows` lays them. Loops are told to unroll: gcc keeps the sums in
// registers only then.
template <Kind kind, int R, int C, int U>
inline void few(const float* packed, const void* w, const float* scales, long group, long inputs, long o,
                float* const* y) {
    constexpr int ALL = (C * R + 7) / 8 * 8;
    floats sum[U][ALL];
#pragma GCC unroll 32
    for (int k = 0; k < U * ALL; ++k) sum[k / ALL][k % ALL] = floats{};
    const char* block = Format<kind>::at(w, inputs, o, 0);
    const long pitch = inputs * Format<kind>::step / LANES;
    const long groups = kind == INT8 ? (inputs + group - 1) / group : 1;
    float scale[C];
    auto add = [&](const floats* weight, const float* x, floats* into) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            floats value; std::memcpy(&value, x + r * LANES, sizeof(floats));
            if (C > 1 && kind != FLOAT32) keep(value);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) into[r * C + c] += value * weight[c];
        }
    };
    for (long g = 0; g < groups; ++g) {
        long i = g * group;
        const long to = groups > 1 && i + group < inputs ? i + group : inputs;
        for (int c = 0; c < C; ++c) scale[c] = kind == INT8 ? scales[(o + c) * groups + g] : 1.0f;
        for (; i + U * LANES <= to; i += U * LANES) {
            const char* at = block + i / LANES * Format<kind>::step;
            ask_ahead<kind, C, U>(block, inputs, i);
#pragma GCC unroll 4
            for (int u = 0; u < U; ++u) {
                floats weight[C];
#pragma GCC unroll 8
                for (int c = 0; c < C; ++c) {
                    const char* p = at + c * pitch + u * Format<kind>::step;
                    if (kind == FLOAT32 && C > 1) __builtin_prefetch(p + NEXT, 0, 3);
                    weight[c] = Format<kind>::load(p);
                    if (kind == INT8) weight[c] *= scale[c];
                    if (kind != FLOAT32) keep(weight[c]);
                }
                add(weight, packed + (i + u * LANES) * R, sum[u]);
            }
        }
        for (; i < to; i += LANES) {
            floats weight[C];
            for (int c = 0; c < C; ++c) {
                if (i + LANES <= to) {
                    weight[c] = Format<kind>::load(Format<kind>::at(w, inputs, o + c, i)) * scale[c];
                    continue;
                }
                float numbers[LANES] = {};
                for (long k = 0; i + k < to; ++k)
                    numbers[k] = scale[c] * Format<kind>::one(Format<kind>::at(w, inputs, o + c, i + k));
                std::memcpy(&weight[c], numbers, sizeof(floats));
            }
            add(weight, packed + i * R, sum[0]);
        }
    }
#pragma GCC unroll 32
    for (int k = 0; k < C * R; ++k)
#pragma GCC unroll 4
        for (int u = 1; u < U; ++u) sum[0][k] += sum[u][k];
    if (C * R < 4) {
        for (int k = 0; k < C * R; ++k) y[k / C][o + k % C] = sum_of(sum[0][k]);
        return;
    }
    float sums[ALL];
#pragma GCC unroll 4
    for (int k = 0; k < ALL; k += 8) sums_of(sum[0] + k, sums + k);
    for (int k = 0; k < C * R; ++k) y[k / C][o + k % C] = sums[k];
}

// One row and whole numbers in full groups of 64: each group is summed unscaled and scaled as one.
inline float one_of_int8(const float* x, const char* w, const float* scales, long inputs) {
    floats total = floats{};
    for (long i = 0; i < inputs; i += 64) {
        __builtin_prefetch(w + i + Format<INT8>::ahead, 0, 2);
        floats part[2] = {};
#pragma GCC unroll 8
        for (int u = 0; u < 64 / LANES; ++u) {
            floats value; std::memcpy(&value, x + i + u * LANES, sizeof(floats));
            part[u % 2] += Format<INT8>::load(w + i + u * LANES) * value;
        }
        total += (part[0] + part[1]) * scales[i / 64];
    }
    return sum_of(total);
}

// More rows: rows in the lanes, one weight at a time for all of them, no sum over lanes.
// `turned` is x as [inputs, L], rows beyond `count` zero.
template <Kind kind, int L, int C>
inline void many(const float* turned, const void* w, const float* scales, long group, long inputs, long o,
                 long count, float* const* y) {
    typedef float lanes __attribute__((vector_size(4 * L)));
    lanes sum[C];
    for (int c = 0; c < C; ++c) sum[c] = lanes{};
    const char* block = Format<kind>::at(w, inputs, o, 0);
    const long groups = kind == INT8 ? (inputs + group - 1) / group : 1;
    for (long i = 0; i < inputs; i += LANES) {
        const long here = inputs - i < LANES ? inputs - i : LANES;
        alignas(64) float wide[C][LANES];
        const float* weight[C];
        if (C > 1) ask_ahead<kind, C, 1>(block, inputs, i);
        for (int c = 0; c < C; ++c) {
            const char* p = Format<kind>::at(w, inputs, o + c, i);
            if (kind == FLOAT32 && (C == 1 || REGISTERS < 32)) {
                weight[c] = reinterpret_cast<const float*>(p);
                continue;
            }
            weight[c] = wide[c];  // C rows may want the same place in the nearest cache; here each has its own
            const float scale = kind == INT8 ? scales[(o + c) * groups + i / group] : 1.0f;
            if (here == LANES) {
                const floats loaded = kind == INT8 ? Format<kind>::load(p) * scale : Format<kind>::load(p);
                std::memcpy(wide[c], &loaded, sizeof(floats));
            } else {
                for (long k = 0; k < here; ++k)
                    wide[c][k] = scale * Format<kind>::one(Format<kind>::at(w, inputs, o + c, i + k));
            }
        }
        auto add = [&](long k) {
            lanes value; std::memcpy(&value, turned + (i + k) * L, 4 * L);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) sum[c] += value * weight[c][k];
        };
        if (here == LANES) {
#pragma GCC unroll 16
            for (long k = 0; k < LANES; ++k) add(k);
        } else for (long k = 0; k < here; ++k) add(k);
    }
    for (int c = 0; c < C; ++c)
        for (long r = 0; r < count; ++r) y[r][o + c] = sum[c][r];
}

// Rows as [inputs / LANES, R, LANES], zero beyond the inputs: one stream, in the order it is read.
template <int R>
inline void pack_rows(const float* const* x, long inputs, float* packed) {
    for (long i = 0; i < inputs; i += LANES)
        for (int r = 0; r < R; ++r) {
            float* to = packed + i * R + r * LANES;
            if (inputs - i >= LANES) { std::memcpy(to, x[r] + i, sizeof(floats)); continue; }
            std::memset(to, 0, sizeof(floats));
            std::memcpy(to, x[r] + i, (inputs - i) * 4);
        }
}

// Outputs at a time for so many rows: their sums, weights and a value fit into the registers.
constexpr int together(Kind kind, int rows) {
    int outputs = rows == 1 ? 1 : kind == INT8 && rows == 4 ? 2 : 4;
    while (outputs > 1 && (rows + 1) * outputs + 1 > REGISTERS) --outputs;
    return outputs;
}

// Numbers of two rows up to which outputs are better taken one by one, as those of one row are: one stream of memory.
constexpr long SMALL = 2048;

// Rows up to which this is the faster way.
constexpr int FEW = REGISTERS == 32 ? 8 : 4;

template <Kind kind, int R>
inline void few_strip(const float* const* rows, const void* w, const float* scales, long group, long inputs,
                      long from, long to, float* const* y, Room& room) {
    constexpr int C = together(kind, R), U = R == 1 ? 4 : R == 3 ? 2 : 1;
    float* x = room.of((inputs + LANES) * R);
    pack_rows<R>(rows, inputs, x);
    long o = from;
    if (kind == INT8 && R == 1 && group == 64 && inputs % 64 == 0) {
        for (; o < to; ++o)
            y[0][o] = one_of_int8(x, Format<kind>::at(w, inputs, o, 0), scales + o * (inputs / 64), inputs);
        return;
    }
    if (kind == FLOAT32 && REGISTERS == 32 && R == 2 && R * inputs <= SMALL)
        for (; o < to; ++o) few<kind, R, 1, 4>(x, w, scales, group, inputs, o, y);
    for (; o + C <= to; o += C) few<kind, R, C, U>(x, w, scales, group, inputs, o, y);
    for (; o < to; ++o) few<kind, R, 1, 1>(x, w, scales, group, inputs, o, y);
}

// Rows as [inputs, L], zero beyond `count`.
template <int L>
inline void turn_rows(const float* const* x, long count, long inputs, float* turned) {
    for (long i = 0; i < inputs; ++i)
        for (long r = 0; r < L; ++r) turned[i * L + r] = r < count ? x[r][i] : 0.0f;
}

template <Kind kind, int L>
inline void many_strip(const float* turned, long count, const void* w, const float* scales, long group, long inputs,
                       long from, long to, float* const* y) {
    long o = from;
    constexpr int C = L == 8 || REGISTERS > 8 ? 8 : 6;
    for (; o + C <= to; o += C) many<kind, L, C>(turned, w, scales, group, inputs, o, count, y);
    for (; o < to; ++o) many<kind, L, 1>(turned, w, scales, group, inputs, o, count, y);
}

constexpr long NEAR = 256 << 10;  // bytes of weights that stay near while all rows meet them
constexpr long TOGETHER = 64;     // rows that are turned at a time

// Sixteen or eight rows after the other, all over a block of outputs before the next.
template <Kind kind>
void many_rows(const float* const* x, long count, const void* w, const float* scales, long group, long inputs,
               long from, long to, float* const* y, Room& room) {
    constexpr int L = LANES;
    const long times = (count + L - 1) / L, size = inputs * L;
    const long block = NEAR / (inputs * Format<kind>::step / LANES) / 48 * 48 + 48;
    auto rows_of = [&](long n) { return count - L * n < L ? count - L * n : L; };
    float* turned = room.of(times * size);
    for (long n = 0; n < times; ++n) turn_rows<L>(x + L * n, rows_of(n), inputs, turned + n * size);
    for (long o = from; o < to; o += block)
        for (long n = 0; n < times; ++n)
            many_strip<kind, L>(turned + n * size, rows_of(n), w, scales, group, inputs, o,
                                 o + block < to ? o + block : to, y + L * n);
}

// `few_strip` for as many rows as there are, R at most.
template <Kind kind, int R>
void up_to(const float* const* x, long count, const void* w, const float* scales, long group, long inputs,
           long from, long to, float* const* y, Room& room) {
    if (count == R) return few_strip<kind, R>(x, w, scales, group, inputs, from, to, y, room);
    if constexpr (R > 1) up_to<kind, R - 1>(x, count, w, scales, group, inputs, from, to, y, room);
}

template <Kind kind>
void strip(const float* const* x, long count, const void* w, const float* scales, long group, long inputs,
           long from, long to, float* const* y) {
    static thread_local Room room;
    for (; count > TOGETHER; count -= TOGETHER, x += TOGETHER, y += TOGETHER)
        many_rows<kind>(x, TOGETHER, w, scales, group, inputs, from, to, y, room);
    if (count <= FEW) return up_to<kind, FEW>(x, count, w, scales, group, inputs, from, to, y, room);
    if (count > 8) return many_rows<kind>(x, count, w, scales, group, inputs, from, to, y, room);
    float* turned = room.of(inputs * 8);
    turn_rows<8>(x, count, inputs, turned);
    many_strip<kind, 8>(turned, count, w, scales, group, inputs, from, to, y);
}

void any_strip(int kind, const float* const* x, long count, const void* w, const float* scales, long group,
               long inputs, long from, long to, float* const* y) {
    switch (kind) {
        case FLOAT32: return strip<FLOAT32>(x, count, w, nullptr, inputs, inputs, from, to, y);
        case BFLOAT16: return strip<BFLOAT16>(x, count, w, nullptr, inputs, inputs, from, to, y);
        default: return strip<INT8>(x, count, w, scales, group, inputs, from, to, y);
    }
}

// Bytes of one output's weights.
long row_bytes(int kind, long inputs) { return inputs * (kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1); }

// The share of `total` outputs that one of `threads` threads computes, in eights.
void share(long total, long thread, long threads, long& from, long& to) {
    const long eights = (total + 7) / 8;
    from = 8 * (eights * thread / threads);
    to = 8 * (eights * (thread + 1) / threads);
    if (to > total) to = total;
    if (from > total) from = total;
}

}  // namespace
