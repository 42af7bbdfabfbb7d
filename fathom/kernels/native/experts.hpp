// Weights as the model's layers hold them, and the routed experts of a few tokens (report eqs 12-16).

#pragma once

#include "rows.hpp"

namespace {

struct Weights {
    const void* data;
    const float* scales;  // [outputs, ceil(inputs / group)] of int8 weights
    long kind;
};

// One thread's place in a team that runs through the same code.
struct Team {
    long thread, all;
};

inline void meet() {
#pragma omp barrier
}

// Outputs from .. to of the products of `count` rows with weights of which `first` outputs come before.
inline void multiply(const Weights& w, long group, long first, long inputs, const float* const* x, long count, long from,
                     long to, float* const* y) {
    const long groups = (inputs + group - 1) / group;
    const char* data = static_cast<const char*>(w.data) + first * row_bytes(w.kind, inputs);
    any_strip(w.kind, x, count, data, w.scales ? w.scales + first * groups : nullptr, group, inputs, from, to, y);
}

// y = silu(gate) up of the places from .. to.
inline void gated(const float* gate, const float* up, float* y, long from, long to) {
    long i = from;
    for (; i + LANES <= to; i += LANES) {
        floats g, u;
        std::memcpy(&g, gate + i, sizeof(floats));
        std::memcpy(&u, up + i, sizeof(floats));
        const floats made = g / (1.0f + exp_of(-g)) * u;
        std::memcpy(y + i, &made, sizeof(floats));
    }
    for (; i < to; ++i) y[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

// A layer's experts: gate_up [E, 2 inner, width], gate rows first; down [E, width, inner].
struct Experts {
    Weights gate_up, down;
    long group, count, width, inner;
};

// What the experts' work on some tokens needs, in the order of experts. Planned by one thread, done by all.
struct Routed {
    std::vector<long> begin, place;  // pairs (token, choice) of expert e: begin[e] .. begin[e + 1]; where pair p went
    std::vector<const float*> in, held;
    std::vector<float*> hidden, made;
    std::vector<float> hidden_numbers, made_numbers;

    void plan(const Experts& e, const float* x, long tokens, long choices, const int64_t* chosen) {
        const long pairs = tokens * choices;
        begin.assign(e.count + 1, 0);
        place.resize(pairs);
        in.resize(pairs); held.resize(pairs); hidden.resize(pairs); made.resize(pairs);
        hidden_numbers.resize(pairs * 2 * e.inner);
        made_numbers.resize(pairs * e.width);
        for (long p = 0; p < pairs; ++p) ++begin[chosen[p] + 1];
        for (long i = 0; i < e.count; ++i) begin[i + 1] += begin[i];
        std::vector<long> next(begin.begin(), begin.end() - 1);
        for (long p = 0; p < pairs; ++p) {
            const long n = place[p] = next[chosen[p]]++;
            in[n] = x + p / choices * e.width;
            held[n] = hidden[n] = hidden_numbers.data() + n * 2 * e.inner;
            made[n] = made_numbers.data() + n * e.width;
        }
    }

    // silu(gate x) * up x of every pair, into the first half of its hidden numbers; all must meet afterwards.
    void widen(const Experts& e, Team team) {
        long lo, hi;
        share(e.inner, team.thread, team.all, lo, hi);
        for (long i = 0; i < e.count; ++i) {
            const long n = begin[i], count = begin[i + 1] - n;
            if (!count) continue;
            multiply(e.gate_up, e.group, i * 2 * e.inner, e.width, in.data() + n, count, lo, hi, hidden.data() + n);
            multiply(e.gate_up, e.group, i * 2 * e.inner, e.width, in.data() + n, count, e.inner + lo, e.inner + hi,
                     hidden.data() + n);
            for (long k = n; k < n + count; ++k) gated(hidden[k], hidden[k] + e.inner, hidden[k], lo, hi);
        }
    }

    // y [tokens, width] += sum over a token's choices, in their order, of weight * down(hidden); this thread's
    // share of the width, from .. to.
    void narrow(const Experts& e, long tokens, long choices, const float* weights, float* y, long from, long to) {
        for (long i = 0; i < e.count; ++i) {
            const long n = begin[i], count = begin[i + 1] - n;
            if (count) multiply(e.down, e.group, i * e.width, e.inner, held.data() + n, count, from, to, made.data() + n);
        }
        for (long p = 0; p < tokens * choices; ++p) {
            const float* part = made[place[p]];
            float* row = y + p / choices * e.width;
            for (long d = from; d < to; ++d) row[d] += weights[p] * part[d];
        }
    }
};

}  // namespace
