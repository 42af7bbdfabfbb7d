// Products of a few rows with many weights, y = x W^T, each weight read once and at the rate of memory.
//
// Decoding multiplies 1 to some 16 rows with every weight of the model. A library's product is made for
// many rows; with few it reads at half of what the memory gives. Here a small block of outputs keeps all
// its sums in registers, so that every weight that comes in is used for all rows at once and never again.
// With up to four rows the lanes of a vector are inputs, with more they are rows (see `few` and `many`).
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

constexpr long LANES = 16;
typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef int8_t bytes __attribute__((vector_size(16)));

enum Kind { FLOAT32, BFLOAT16, INT8 };

// A weight format: where output o's input i stands, sixteen of them as floats, and one; the bytes of sixteen, and how
// many bytes ahead memory is asked for where outputs are taken one by one (the best of 2, 4, 8, 16 KiB).
template <Kind kind> struct Format;

template <> struct Format<FLOAT32> {
    static const char* at(const void* w, long inputs, long o, long i) {
        return static_cast<const char*>(w) + 4 * (o * inputs + i);
    }
    static inline floats load(const char* p) { floats v; std::memcpy(&v, p, 64); return v; }
    static inline float one(const char* p) { float v; std::memcpy(&v, p, 4); return v; }
    static constexpr long step = 64, ahead = 2048;
};

template <> struct Format<BFLOAT16> {
    static const char* at(const void* w, long inputs, long o, long i) {
        return static_cast<const char*>(w) + 2 * (o * inputs + i);
    }
    static inline floats load(const char* p) {
        halves h; std::memcpy(&h, p, 32);
        words u = __builtin_convertvector(h, words) << 16;
        floats v; std::memcpy(&v, &u, 64); return v;
    }
    static inline float one(const char* p) {
        uint16_t h; std::memcpy(&h, p, 2);
        uint32_t u = uint32_t(h) << 16; float v; std::memcpy(&v, &u, 4); return v;
    }
    static constexpr long step = 32, ahead = 8192;
};

template <> struct Format<INT8> {
    static const char* at(const void* w, long inputs, long o, long i) {
        return static_cast<const char*>(w) + o * inputs + i;
    }
    static inline floats load(const char* p) {
#if defined(__AVX512F__)  // gcc 12 would convert one by one
        __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
        floats out; std::memcpy(&out, &v, 64); return out;
#elif defined(__AVX2__)
        __m256 lo = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
        __m256 hi = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))));
        floats out; std::memcpy(&out, &lo, 32); std::memcpy(reinterpret_cast<char*>(&out) + 32, &hi, 32); return out;
#else
        bytes b; std::memcpy(&b, p, 16); return __builtin_convertvector(b, floats);
#endif
    }
    static inline float one(const char* p) { return float(*reinterpret_cast<const int8_t*>(p)); }
    static constexpr long step = 16, ahead = 2048;
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
    std::memcpy(&power, &n, 64);
    return y * power;
}

inline float sum_of(floats v) {
    typedef float half __attribute__((vector_size(32)));
    typedef float quarter __attribute__((vector_size(16)));
    half a, b;
    std::memcpy(&a, &v, 32);
    std::memcpy(&b, reinterpret_cast<const char*>(&v) + 32, 32);
    a += b;
    quarter c, d;
    std::memcpy(&c, &a, 16);
    std::memcpy(&d, reinterpret_cast<const char*>(&a) + 16, 16);
    c += d;
    return (c[0] + c[2]) + (c[1] + c[3]);
}

#if defined(__AVX512F__)
constexpr bool MANY_REGISTERS = true;
#else
constexpr bool MANY_REGISTERS = false;
#endif

// Outputs are taken C at a time. Their rows of weights are neighbours in memory but read side by side, which the
// processor does not foresee; so the block after the next is asked for here, in the order it lies in, while this one
// is at work. `at`: this block; `i`: the inputs it has come to, of which it takes U sixteens now.
template <Kind kind, int C, int U>
inline void ask_ahead(const char* at, long inputs, long i) {
    constexpr long bytes = U * C * Format<kind>::step;
    const long distance = C > 1 ? 2 * C * inputs * Format<kind>::step / LANES : Format<kind>::ahead;
    const char* ahead = at + distance + i / LANES * C * Format<kind>::step;
    for (long k = 0; k < bytes; k += 64) __builtin_prefetch(ahead + k, 0, 2);
}

// Up to four rows, C outputs: sixteen inputs in the lanes, a sum over the lanes at the end. U sums of each let
// multiplications overlap.
template <Kind kind, int R, int C, int U>
inline void few(const float* const* x, const void* w, const float* scales, long group, long inputs, long o,
                float* const* y) {
    floats sum[C][R][U];
    float rest[C][R], scale[C];
    for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) {
            rest[c][r] = 0;
            for (int u = 0; u < U; ++u) sum[c][r][u] = floats{};
        }
    const char* block = Format<kind>::at(w, inputs, o, 0);
    const long groups = kind == INT8 ? (inputs + group - 1) / group : 1;
    for (long g = 0; g < groups; ++g) {
        const long from = g * group, to = groups > 1 && from + group < inputs ? from + group : inputs;
        for (int c = 0; c < C; ++c) scale[c] = kind == INT8 ? scales[(o + c) * groups + g] : 1.0f;
        long i = from;
        auto step = [&](int u) {
            floats weight[C];
            for (int c = 0; c < C; ++c) {
                weight[c] = Format<kind>::load(Format<kind>::at(w, inputs, o + c, i + u * LANES));
                if (kind == INT8) weight[c] *= scale[c];
            }
            for (int r = 0; r < R; ++r) {
                floats value; std::memcpy(&value, x[r] + i + u * LANES, 64);
                for (int c = 0; c < C; ++c) sum[c][r][u] += value * weight[c];
            }
        };
        for (; i + U * LANES <= to; i += U * LANES) {
            ask_ahead<kind, C, U>(block, inputs, i);
            for (int u = 0; u < U; ++u) step(u);
        }
        for (; i + LANES <= to; i += LANES) step(0);
        for (; i < to; ++i)
            for (int c = 0; c < C; ++c) {
                const float weight = scale[c] * Format<kind>::one(Format<kind>::at(w, inputs, o + c, i));
                for (int r = 0; r < R; ++r) rest[c][r] += x[r][i] * weight;
            }
    }
    for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) {
            for (int u = 1; u < U; ++u) sum[c][r][0] += sum[c][r][u];
            y[r][o + c] = sum_of(sum[c][r][0]) + rest[c][r];
        }
}

// One row and whole numbers in full groups of 64: each group is summed unscaled and scaled as one.
inline float one_of_int8(const float* x, const char* w, const float* scales, long inputs) {
    floats total = floats{};
    for (long i = 0; i < inputs; i += 64) {
        __builtin_prefetch(w + i + Format<INT8>::ahead, 0, 2);
        floats weight[4], value[4];
        for (int u = 0; u < 4; ++u) {
            weight[u] = Format<INT8>::load(w + i + u * LANES);
            std::memcpy(&value[u], x + i + u * LANES, 64);
        }
        const floats even = weight[0] * value[0] + weight[2] * value[2], odd = weight[1] * value[1] + weight[3] * value[3];
        total += (even + odd) * scales[i / 64];
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
        float wide[C][LANES];
        const float* weight[C];
        if (C > 1) ask_ahead<kind, C, 1>(block, inputs, i);
        for (int c = 0; c < C; ++c) {
            const char* p = Format<kind>::at(w, inputs, o + c, i);
            if (kind == FLOAT32) { weight[c] = reinterpret_cast<const float*>(p); continue; }
            weight[c] = wide[c];
            const float scale = kind == INT8 ? scales[(o + c) * groups + i / group] : 1.0f;
            if (here == LANES) {
                const floats loaded = Format<kind>::load(p) * scale;
                std::memcpy(wide[c], &loaded, 64);
            } else {
                for (long k = 0; k < here; ++k)
                    wide[c][k] = scale * Format<kind>::one(Format<kind>::at(w, inputs, o + c, i + k));
            }
        }
        auto add = [&](long k) {
            lanes value; std::memcpy(&value, turned + (i + k) * L, 4 * L);
            for (int c = 0; c < C; ++c) sum[c] += value * weight[c][k];
        };
        if (here == LANES) for (long k = 0; k < LANES; ++k) add(k);
        else for (long k = 0; k < here; ++k) add(k);
    }
    for (int c = 0; c < C; ++c)
        for (long r = 0; r < count; ++r) y[r][o + c] = sum[c][r];
}

template <Kind kind, int R>
inline void few_strip(const float* const* x, const void* w, const float* scales, long group, long inputs,
                      long from, long to, float* const* y) {
    constexpr int C = R > 1 && MANY_REGISTERS ? 4 : 1, U = C > 1 || R > 2 ? 1 : 4 / R;
    long o = from;
    if (kind == INT8 && R == 1 && group == 64 && inputs % 64 == 0) {
        for (; o < to; ++o)
            y[0][o] = one_of_int8(x[0], Format<kind>::at(w, inputs, o, 0), scales + o * (inputs / 64), inputs);
        return;
    }
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
    constexpr int C = L == 8 || MANY_REGISTERS ? 8 : 6;
    for (; o + C <= to; o += C) many<kind, L, C>(turned, w, scales, group, inputs, o, count, y);
    for (; o < to; ++o) many<kind, L, 1>(turned, w, scales, group, inputs, o, count, y);
}

constexpr long NEAR = 256 << 10;  // bytes of weights that stay near while all rows meet them
constexpr long TOGETHER = 64;     // rows that are turned at a time

// Sixteen rows after the other, all over a block of outputs before the next.
template <Kind kind>
void many_rows(const float* const* x, long count, const void* w, const float* scales, long group, long inputs,
               long from, long to, float* const* y, std::vector<float>& turned) {
    const long sixteens = (count + 15) / 16, size = inputs * 16;
    const long block = NEAR / (inputs * Format<kind>::step / LANES) / 48 * 48 + 48;
    auto rows_of = [&](long n) { return count - 16 * n < 16 ? count - 16 * n : 16; };
    turned.resize(sixteens * size);
    for (long n = 0; n < sixteens; ++n) turn_rows<16>(x + 16 * n, rows_of(n), inputs, turned.data() + n * size);
    for (long o = from; o < to; o += block)
        for (long n = 0; n < sixteens; ++n)
            many_strip<kind, 16>(turned.data() + n * size, rows_of(n), w, scales, group, inputs, o,
                                 o + block < to ? o + block : to, y + 16 * n);
}

template <Kind kind>
void strip(const float* const* x, long count, const void* w, const float* scales, long group, long inputs,
           long from, long to, float* const* y) {
    static thread_local std::vector<float> turned;
    for (; count > TOGETHER; count -= TOGETHER, x += TOGETHER, y += TOGETHER)
        many_rows<kind>(x, TOGETHER, w, scales, group, inputs, from, to, y, turned);
    switch (count) {
        case 1: return few_strip<kind, 1>(x, w, scales, group, inputs, from, to, y);
        case 2: return few_strip<kind, 2>(x, w, scales, group, inputs, from, to, y);
        case 3: return few_strip<kind, 3>(x, w, scales, group, inputs, from, to, y);
        case 4: return few_strip<kind, 4>(x, w, scales, group, inputs, from, to, y);
        case 5: case 6: case 7: case 8:
            turned.resize(inputs * 8);
            turn_rows<8>(x, count, inputs, turned.data());
            return many_strip<kind, 8>(turned.data(), count, w, scales, group, inputs, from, to, y);
        default: return many_rows<kind>(x, count, w, scales, group, inputs, from, to, y, turned);
    }
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
