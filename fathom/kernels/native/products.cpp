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

// A weight format: where output o's input i stands, sixteen of them as floats, and one.
template <Kind kind> struct Format;

template <> struct Format<FLOAT32> {
    static const char* at(const void* w, long inputs, long o, long i) {
        return static_cast<const char*>(w) + 4 * (o * inputs + i);
    }
    static inline floats load(const char* p) { floats v; std::memcpy(&v, p, 64); return v; }
    static inline float one(const char* p, long) { float v; std::memcpy(&v, p, 4); return v; }
    static constexpr long step = 64;
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
    static inline float one(const char* p, long) {
        uint16_t h; std::memcpy(&h, p, 2);
        uint32_t u = uint32_t(h) << 16; float v; std::memcpy(&v, &u, 4); return v;
    }
    static constexpr long step = 32;
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
    static inline float one(const char* p, long) { return float(*reinterpret_cast<const int8_t*>(p)); }
    static constexpr long step = 16;
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
    half a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
    half b = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    a += b;
    quarter c = __builtin_shufflevector(a, a, 0, 1, 2, 3), d = __builtin_shufflevector(a, a, 4, 5, 6, 7);
    c += d;
    return (c[0] + c[2]) + (c[1] + c[3]);
}

// Up to four rows: sixteen inputs in the lanes, a sum over the lanes at the end. One output at a time, so
// that memory is read in one stream; U sums for each row let its multiplications overlap.
template <Kind kind, int R, int U>
inline void few(const float* const* x, const void* w, const float* scales, long group, long inputs, long o,
                float* const* y) {
    floats total[R];
    float rest[R];
    for (int r = 0; r < R; ++r) { total[r] = floats{}; rest[r] = 0; }
    const long groups = (inputs + group - 1) / group;
    for (long g = 0; g < groups; ++g) {
        const long from = g * group, to = from + group < inputs ? from + group : inputs;
        const char* p = Format<kind>::at(w, inputs, o, from);
        const float scale = scales ? scales[o * groups + g] : 1.0f;
        floats part[R][U];
        for (int r = 0; r < R; ++r)
            for (int u = 0; u < U; ++u) part[r][u] = floats{};
        long i = from;
        for (; i + U * LANES <= to; i += U * LANES, p += U * Format<kind>::step)
            for (int u = 0; u < U; ++u) {
                const floats weight = Format<kind>::load(p + u * Format<kind>::step);
                for (int r = 0; r < R; ++r) {
                    floats value; std::memcpy(&value, x[r] + i + u * LANES, 64);
                    part[r][u] += value * weight;
                }
            }
        for (; i + LANES <= to; i += LANES, p += Format<kind>::step) {
            const floats weight = Format<kind>::load(p);
            for (int r = 0; r < R; ++r) {
                floats value; std::memcpy(&value, x[r] + i, 64);
                part[r][0] += value * weight;
            }
        }
        for (int r = 0; r < R; ++r)
            for (int u = 0; u < U; ++u) total[r] += part[r][u] * scale;
        for (long k = i; k < to; ++k) {
            const float weight = scale * Format<kind>::one(p + (k - i) * (Format<kind>::step / LANES), k);
            for (int r = 0; r < R; ++r) rest[r] += x[r][k] * weight;
        }
    }
    for (int r = 0; r < R; ++r) y[r][o] = sum_of(total[r]) + rest[r];
}

// More rows: rows in the lanes, one weight at a time for all of them, no sum over lanes.
// `turned` is x as [inputs, L], rows beyond `count` zero.
template <Kind kind, int L, int C>
inline void many(const float* turned, const void* w, const float* scales, long group, long inputs, long o,
                 long count, float* const* y) {
    typedef float lanes __attribute__((vector_size(4 * L)));
    lanes total[C];
    for (int c = 0; c < C; ++c) total[c] = lanes{};
    const long groups = (inputs + group - 1) / group;
    for (long g = 0; g < groups; ++g) {
        const long from = g * group, to = from + group < inputs ? from + group : inputs;
        lanes part[C];
        for (int c = 0; c < C; ++c) part[c] = lanes{};
        for (long i = from; i < to; i += LANES) {
            const long here = to - i < LANES ? to - i : LANES;
            float weight[C][LANES];
            for (int c = 0; c < C; ++c) {
                const char* p = Format<kind>::at(w, inputs, o + c, i);
                if (here == LANES) {
                    floats loaded = Format<kind>::load(p);
                    std::memcpy(weight[c], &loaded, 64);
                } else {
                    for (long k = 0; k < here; ++k)
                        weight[c][k] = Format<kind>::one(p + k * (Format<kind>::step / LANES), k);
                }
            }
            for (long k = 0; k < here; ++k) {
                lanes value; std::memcpy(&value, turned + (i + k) * L, 4 * L);
                for (int c = 0; c < C; ++c) part[c] += value * weight[c][k];
            }
        }
        for (int c = 0; c < C; ++c) total[c] += part[c] * (scales ? scales[(o + c) * groups + g] : 1.0f);
    }
    for (int c = 0; c < C; ++c)
        for (long r = 0; r < count; ++r) y[r][o + c] = total[c][r];
}

template <Kind kind, int R>
inline void few_strip(const float* const* x, const void* w, const float* scales, long group, long inputs,
                      long from, long to, float* const* y) {
    for (long o = from; o < to; ++o) few<kind, R, (R < 3 ? 4 / R : 1)>(x, w, scales, group, inputs, o, y);
}

template <Kind kind, int L>
inline void many_strip(const float* const* x, long count, const void* w, const float* scales, long group,
                       long inputs, long from, long to, float* const* y) {
    static thread_local std::vector<float> turned;
    turned.assign(inputs * L, 0.0f);
    for (long r = 0; r < count; ++r)
        for (long i = 0; i < inputs; ++i) turned[i * L + r] = x[r][i];
    long o = from;
    constexpr int C = L == 8 ? 8 : 6;
    for (; o + C <= to; o += C) many<kind, L, C>(turned.data(), w, scales, group, inputs, o, count, y);
    for (; o < to; ++o) many<kind, L, 1>(turned.data(), w, scales, group, inputs, o, count, y);
}

template <Kind kind>
void strip(const float* const* x, long count, const void* w, const float* scales, long group, long inputs,
           long from, long to, float* const* y) {
    for (; count > 16; count -= 16, x += 16, y += 16)
        many_strip<kind, 16>(x, 16, w, scales, group, inputs, from, to, y);
    switch (count) {
        case 1: return few_strip<kind, 1>(x, w, scales, group, inputs, from, to, y);
        case 2: return few_strip<kind, 2>(x, w, scales, group, inputs, from, to, y);
        case 3: return few_strip<kind, 3>(x, w, scales, group, inputs, from, to, y);
        case 4: return few_strip<kind, 4>(x, w, scales, group, inputs, from, to, y);
        case 5: case 6: case 7: case 8:
            return many_strip<kind, 8>(x, count, w, scales, group, inputs, from, to, y);
        default: return many_strip<kind, 16>(x, count, w, scales, group, inputs, from, to, y);
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

constexpr long TILE = 64;  // keys that are read once and used twice, from the nearest caches
constexpr int GROUP = 8;   // queries that attend together

// Up to eight queries of one text over its cache: scores, a softmax that goes along, weighted sum, reading
// the cache once. limits: how many keys each query sees. held: scratch [GROUP, width] and [width, GROUP].
void attend_group(const float* cache, long width, const float* q, int count, const long* limits, long runs,
                  const int64_t* run_start, const int64_t* run_end, float* out, std::vector<float>& scratch) {
    scratch.assign(2 * GROUP * width, 0.0f);
    float *sums = scratch.data(), *turned = sums + GROUP * width;
    for (int r = 0; r < count; ++r)
        for (long x = 0; x < width; ++x) turned[x * GROUP + r] = q[r * width + x];
    float highest[GROUP], total[GROUP];
    long most = 0;
    for (int r = 0; r < GROUP; ++r) {
        highest[r] = -INFINITY;
        total[r] = 0;
        if (r < count && limits[r] > most) most = limits[r];
    }
    float score[GROUP][TILE];
    float* rows[GROUP];
    for (int r = 0; r < GROUP; ++r) rows[r] = score[r];
    long at = 0;
    for (long run = 0; run < runs && at < most; ++run) {
        for (int64_t key = run_start[run]; key < run_end[run] && at < most; key += TILE) {
            long here = run_end[run] - key < TILE ? run_end[run] - key : TILE;
            if (here > most - at) here = most - at;
            const float* keys = cache + key * width;
            long k = 0;
            for (; k + 8 <= here; k += 8) many<FLOAT32, GROUP, 8>(turned, keys, nullptr, width, width, k, GROUP, rows);
            for (; k < here; ++k) many<FLOAT32, GROUP, 1>(turned, keys, nullptr, width, width, k, GROUP, rows);
            for (int r = 0; r < count; ++r) {
                float* s = score[r];
                const long seen = limits[r] - at < here ? limits[r] - at : here;
                for (long j = seen < 0 ? 0 : seen; j < TILE; ++j) s[j] = -INFINITY;
                float top = highest[r];
                for (long j = 0; j < seen; ++j) top = s[j] > top ? s[j] : top;
                if (top == -INFINITY) { std::memset(s, 0, sizeof(float) * TILE); continue; }
                floats sum = floats{};
                for (long j = 0; j < TILE; j += LANES) {
                    floats v; std::memcpy(&v, s + j, 64);
                    const floats shifted = v - top;
                    floats p = exp_of(shifted);
                    p = shifted < -87.0f ? floats{} : p;
                    sum += p;
                    std::memcpy(s + j, &p, 64);
                }
                const float factor = highest[r] == top ? 1.0f : std::exp(highest[r] - top);
                total[r] = total[r] * factor + sum_of(sum);
                highest[r] = top;
                if (factor != 1.0f)
                    for (long x = 0; x < width; ++x) sums[r * width + x] *= factor;
            }
            for (int r = count; r < GROUP; ++r) std::memset(score[r], 0, sizeof(float) * TILE);
            long x = 0;
            for (; x + LANES <= width; x += LANES) {
                floats acc[GROUP];
                for (int r = 0; r < GROUP; ++r) std::memcpy(&acc[r], sums + r * width + x, 64);
                for (long j = 0; j < here; ++j) {
                    floats v; std::memcpy(&v, keys + j * width + x, 64);
                    for (int r = 0; r < GROUP; ++r) acc[r] += v * score[r][j];
                }
                for (int r = 0; r < GROUP; ++r) std::memcpy(sums + r * width + x, &acc[r], 64);
            }
            for (; x < width; ++x)
                for (int r = 0; r < count; ++r)
                    for (long j = 0; j < here; ++j) sums[r * width + x] += score[r][j] * keys[j * width + x];
            at += here;
        }
    }
    for (int r = 0; r < count; ++r)
        for (long x = 0; x < width; ++x) out[r * width + x] = sums[r * width + x] / total[r];
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

extern "C" {

// y [rows, outputs] = x [rows, inputs] times the weights transposed.
void fathom_product(int kind, const void* w, const float* scales, long group, const float* x, long count,
                    long inputs, long outputs, float* y, int threads) {
    std::vector<const float*> from(count);
    std::vector<float*> to(count);
    for (long r = 0; r < count; ++r) { from[r] = x + r * inputs; to[r] = y + r * outputs; }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long thread = 0, all = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num(); all = omp_get_num_threads();
#endif
        long lo, hi;
        share(outputs, thread, all, lo, hi);
        any_strip(kind, from.data(), count, w, scales, group, inputs, lo, hi, to.data());
    }
}

// The routed experts of a few tokens (report eq 12): y [tokens, width] += sum over a token's K choices of
// weight * down(silu(gate x) * up x). gate_up [E, 2 inner, width], gate rows first; down [E, width, inner].
void fathom_experts(int kind, const void* gate_up, const float* gate_up_scales, const void* down,
                    const float* down_scales, long group, long experts, long width, long inner, const float* x,
                    long tokens, long choices, const int64_t* chosen, const float* weights, float* y,
                    int threads) {
    const long pairs = tokens * choices;
    std::vector<float> hidden(pairs * 2 * inner), made(pairs * width);
    std::vector<long> begin(experts + 1, 0), order(pairs);
    for (long p = 0; p < pairs; ++p) ++begin[chosen[p] + 1];
    for (long e = 0; e < experts; ++e) begin[e + 1] += begin[e];
    std::vector<long> next(begin.begin(), begin.end() - 1);
    for (long p = 0; p < pairs; ++p) order[next[chosen[p]]++] = p;
    std::vector<const float*> in(pairs), held(pairs);
    std::vector<float*> out(pairs), last(pairs);
    for (long n = 0; n < pairs; ++n) {
        in[n] = x + order[n] / choices * width;
        out[n] = hidden.data() + n * 2 * inner;
        held[n] = out[n];
        last[n] = made.data() + n * width;
    }
    const long up_groups = (width + group - 1) / group, down_groups = (inner + group - 1) / group;
    const long first_bytes = 2 * inner * row_bytes(kind, width), second_bytes = width * row_bytes(kind, inner);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        long thread = 0, all = 1;
#ifdef _OPENMP
        thread = omp_get_thread_num(); all = omp_get_num_threads();
#endif
        long lo, hi;
        share(2 * inner, thread, all, lo, hi);
        for (long e = 0; e < experts; ++e) {
            const long n = begin[e], count = begin[e + 1] - n;
            if (!count) continue;
            const float* scales = gate_up_scales ? gate_up_scales + e * 2 * inner * up_groups : nullptr;
            any_strip(kind, in.data() + n, count, static_cast<const char*>(gate_up) + e * first_bytes, scales,
                      group, width, lo, hi, out.data() + n);
        }
#pragma omp barrier
#pragma omp for
        for (long n = 0; n < pairs; ++n) {
            float* h = out[n];
            const float weight = weights[order[n]];
            long i = 0;
            for (; i + LANES <= inner; i += LANES) {
                floats gate, up;
                std::memcpy(&gate, h + i, 64);
                std::memcpy(&up, h + inner + i, 64);
                const floats made = gate / (1.0f + exp_of(-gate)) * up * weight;
                std::memcpy(h + i, &made, 64);
            }
            for (; i < inner; ++i) h[i] = h[i] / (1.0f + std::exp(-h[i])) * h[inner + i] * weight;
        }
        share(width, thread, all, lo, hi);
        for (long e = 0; e < experts; ++e) {
            const long n = begin[e], count = begin[e + 1] - n;
            if (!count) continue;
            const float* scales = down_scales ? down_scales + e * width * down_groups : nullptr;
            any_strip(kind, held.data() + n, count, static_cast<const char*>(down) + e * second_bytes, scales,
                      group, inner, lo, hi, last.data() + n);
        }
    }
    // Summed in the order of a token's choices, whatever expert came first.
    std::vector<long> place(pairs);
    for (long n = 0; n < pairs; ++n) place[order[n]] = n;
    for (long p = 0; p < pairs; ++p) {
        const float* part = last[place[p]];
        float* row = y + p / choices * width;
        for (long d = 0; d < width; ++d) row[d] += part[d];
    }
}

// Queries of many texts, each over its own runs of a shared cache [slots, width] (report eq 10 in the latent
// space). Text p has rows rows_at[p] .. rows_at[p + 1], its last tokens, each with `heads` queries, and the
// runs runs_at[p] .. runs_at[p + 1]. q and out are [rows, heads, width].
void fathom_attend(const float* cache, long width, const float* q, long heads, long texts, const int64_t* rows_at,
                   const int64_t* runs_at, const int64_t* run_start, const int64_t* run_end, float* out,
                   int threads) {
    std::vector<long> text, first;
    for (long p = 0; p < texts; ++p)
        for (long r = 0; r < (rows_at[p + 1] - rows_at[p]) * heads; r += GROUP) { text.push_back(p); first.push_back(r); }
    const long jobs = text.size();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (long job = 0; job < jobs; ++job) {
            const long p = text[job], tokens = rows_at[p + 1] - rows_at[p], all = tokens * heads;
            long keys = 0;
            for (int64_t run = runs_at[p]; run < runs_at[p + 1]; ++run) keys += run_end[run] - run_start[run];
            const int count = all - first[job] < GROUP ? all - first[job] : GROUP;
            long limits[GROUP];
            for (int r = 0; r < count; ++r) limits[r] = keys - tokens + (first[job] + r) / heads + 1;
            const long offset = (rows_at[p] * heads + first[job]) * width;
            attend_group(cache, width, q + offset, count, limits, runs_at[p + 1] - runs_at[p],
                         run_start + runs_at[p], run_end + runs_at[p], out + offset, scratch);
        }
    }
}

}  // extern "C"
