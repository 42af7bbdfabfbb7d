// Attention of a few queries in the latent space (report eq 10), the cache of a text read once.
//
// Up to eight queries of one text go together: a tile of keys comes from memory, gives its scores, and is
// still near when its weighted sum is taken; meanwhile the next tile is fetched. The softmax goes along: when
// a higher score appears, what was summed so far is scaled down.

#pragma once

#include "rows.hpp"

namespace {

constexpr long TILE = 64;  // keys that are read once and used twice, from the nearest caches
constexpr int GROUP = 8;   // queries that attend together

// Where the queries and the cached tokens of some texts are: text p has rows rows_at[p] .. rows_at[p + 1], its
// last tokens, and sees the runs of slots runs_at[p] .. runs_at[p + 1] of the cache.
struct Texts {
    long count;
    const int64_t *rows_at, *runs_at, *run_start, *run_end;
};

// The eight queries' sums [GROUP, kept] += weights [GROUP, TILE] times the first `kept` numbers of `here` keys.
inline void add_weighted(const float* keys, long width, long kept, long here, const float (*weights)[TILE],
                         float* sums, int count, const float* ahead) {
    long x = 0;
    for (; x + LANES <= kept; x += LANES) {
        floats acc[GROUP];
        for (int r = 0; r < GROUP; ++r) std::memcpy(&acc[r], sums + r * kept + x, sizeof(floats));
        for (long j = 0; j < here; ++j) {
            floats v; std::memcpy(&v, keys + j * width + x, sizeof(floats));
            if (ahead) __builtin_prefetch(ahead + j * width + x);
            for (int r = 0; r < GROUP; ++r) acc[r] += v * weights[r][j];
        }
        for (int r = 0; r < GROUP; ++r) std::memcpy(sums + r * kept + x, &acc[r], sizeof(floats));
    }
    for (; x < kept; ++x)
        for (int r = 0; r < count; ++r)
            for (long j = 0; j < here; ++j) sums[r * kept + x] += weights[r][j] * keys[j * width + x];
}

// Scores of one tile become weights relative to the highest score so far; `sums` follow when it rises.
inline void weigh(float* s, long seen, float& highest, float& total, float* sums, long kept) {
    if (seen <= 0) { std::memset(s, 0, sizeof(float) * TILE); return; }
    float top = highest;
    for (long j = seen; j < TILE; ++j) s[j] = -INFINITY;
    for (long j = 0; j < seen; ++j) top = s[j] > top ? s[j] : top;
    floats sum = floats{};
    for (long j = 0; j < TILE; j += LANES) {
        floats v; std::memcpy(&v, s + j, sizeof(floats));
        const floats shifted = v - top;
        floats p = exp_of(shifted);
        p = shifted < -87.0f ? floats{} : p;
        p = shifted == shifted ? p : shifted;  // what is no number stays none, and shows
        sum += p;
        std::memcpy(s + j, &p, sizeof(floats));
    }
    const float factor = highest == top ? 1.0f : std::exp(highest - top);
    total = total * factor + sum_of(sum);
    highest = top;
    if (factor != 1.0f)
        for (long x = 0; x < kept; ++x) sums[x] *= factor;
}

// Up to eight queries [count, width] of one text. limits: how many keys each sees. out [count, kept]: the weighted
// sum of the keys' first `kept` numbers.
inline void attend_group(const float* cache, long width, long kept, const float* q, int count, const long* limits,
                         const Texts& texts, long text, float* out, std::vector<float>& scratch) {
    scratch.assign(GROUP * (width + kept), 0.0f);
    float *turned = scratch.data(), *sums = turned + GROUP * width;
    for (int r = 0; r < count; ++r)
        for (long x = 0; x < width; ++x) turned[x * GROUP + r] = q[r * width + x];
    float highest[GROUP], total[GROUP], score[GROUP][TILE];
    float* rows[GROUP];
    long most = 0;
    for (int r = 0; r < GROUP; ++r) {
        highest[r] = -INFINITY;
        total[r] = 0;
        rows[r] = score[r];
        if (r < count && limits[r] > most) most = limits[r];
    }
    std::memset(score, 0, sizeof score);
    long at = 0;
    for (long run = texts.runs_at[text]; run < texts.runs_at[text + 1] && at < most; ++run) {
        for (int64_t key = texts.run_start[run]; key < texts.run_end[run] && at < most; key += TILE) {
            long here = texts.run_end[run] - key < TILE ? texts.run_end[run] - key : TILE;
            if (here > most - at) here = most - at;
            const float* keys = cache + key * width;
            long k = 0;
            for (; k + 8 <= here; k += 8) many<FLOAT32, GROUP, 8>(turned, keys, nullptr, width, width, k, GROUP, rows);
            for (; k < here; ++k) many<FLOAT32, GROUP, 1>(turned, keys, nullptr, width, width, k, GROUP, rows);
            for (int r = 0; r < count; ++r) weigh(score[r], limits[r] - at < here ? limits[r] - at : here,
                                                  highest[r], total[r], sums + r * kept, kept);
            for (int r = count; r < GROUP; ++r) std::memset(score[r], 0, sizeof(float) * TILE);
            const bool more = key + 2 * TILE <= texts.run_end[run];
            add_weighted(keys, width, kept, here, score, sums, count, more ? keys + TILE * width : nullptr);
            at += here;
        }
    }
    for (int r = 0; r < count; ++r)
        for (long x = 0; x < kept; ++x) out[r * kept + x] = sums[r * kept + x] / total[r];
}

// Of all texts' queries q [rows, heads, width] -> out [rows, heads, kept]; by all threads of a team together.
inline void attend_all(const float* cache, long width, long kept, const float* q, long heads, const Texts& texts,
                       float* out) {
    static thread_local std::vector<float> scratch;
    long jobs = 0;
    for (long p = 0; p < texts.count; ++p)
        jobs += ((texts.rows_at[p + 1] - texts.rows_at[p]) * heads + GROUP - 1) / GROUP;
#pragma omp for schedule(dynamic)
    for (long job = 0; job < jobs; ++job) {
        long p = 0, first = job;
        for (;; ++p) {
            const long groups = ((texts.rows_at[p + 1] - texts.rows_at[p]) * heads + GROUP - 1) / GROUP;
            if (first < groups) break;
            first -= groups;
        }
        first *= GROUP;
        const long tokens = texts.rows_at[p + 1] - texts.rows_at[p], all = tokens * heads;
        long keys = 0;
        for (int64_t run = texts.runs_at[p]; run < texts.runs_at[p + 1]; ++run)
            keys += texts.run_end[run] - texts.run_start[run];
        const int count = all - first < GROUP ? all - first : GROUP;
        long limits[GROUP];
        for (int r = 0; r < count; ++r) limits[r] = keys - tokens + (first + r) / heads + 1;
        const long row = texts.rows_at[p] * heads + first;
        attend_group(cache, width, kept, q + row * width, count, limits, texts, p, out + row * kept, scratch);
    }
}

}  // namespace
