// Blocks of the model for a few tokens, every weight read once and nothing but arithmetic between the products.
//
// A token's way through a layer is a dozen products and some small functions. Called one by one from Python the
// calls take longer than the reading of the weights; here a team of threads goes through all layers in one call
// and meets where one step needs the whole of another. The formulas are those of fathom/model, in its order.
//
// Shapes: N rows, D hidden, H heads, P nope, R rotary, V value dims, C latent rank, X = C + R, Q query rank,
// E experts, K choices.

#pragma once

#include "attention.hpp"
#include "experts.hpp"

namespace {

// What all layers have in common. Same order as fathom/kernels/whole_blocks.py.
struct Shape {
    long hidden, heads, nope, rope, value, rank, query_rank;  // query_rank 0: queries come from the hidden state
    long experts, choices, groups, kept_groups;
    long softmax, best_two, normed;  // V2's affinities; a group's score is the sum of its two best; weights sum to 1
    long interleave, group;          // rotary pairs side by side; inputs per scale of int8 weights
    float routed_scale, attention_scale, eps, latent_eps;
};

// One layer's weights and its cache. router null: a dense layer. gate, up, down: the dense or the shared experts.
struct Layer {
    const float *input_norm, *query_norm, *latent_norm, *post_norm;
    Weights query_a, query_b, latent, out;
    const float* up_by_head;  // W_UK and W_UV of each head, [H, P + V, C]
    const float *router, *bias;
    Weights gate_up, routed_down;
    Weights gate, up, down;
    long inner, width;  // of a routed expert; of the dense or shared ones, 0 for none
    float* cache;       // [slots, X]
};

// The rows of one pass: where they stand (angles [N, R/2]), where their entries go, what they see.
struct Pass {
    long rows;
    const float *cos, *sin;
    const int64_t* slots;
    Texts texts;
    float* h;  // [N, D], in and out
};

// A matrix [N, width] with its rows' addresses.
struct Matrix {
    std::vector<float> numbers;
    std::vector<float*> rows;
    long width;

    Matrix(long count, long width) : numbers(count * width), rows(count), width(width) {
        for (long n = 0; n < count; ++n) rows[n] = numbers.data() + n * width;
    }
    const float* const* in() const { return rows.data(); }
};

struct Scratch {
    Matrix x, query_latent, entry, q, query, attended, values, affinity, gate, up, y;
    std::vector<int64_t> chosen;
    std::vector<float> weights;
    Routed routed;

    Scratch(const Shape& s, long n, long width)
        : x(n, s.hidden), query_latent(n, s.query_rank), entry(n, s.rank + s.rope), q(n, s.heads * (s.nope + s.rope)),
          query(n, s.heads * (s.rank + s.rope)), attended(n, s.heads * s.rank), values(n, s.heads * s.value),
          affinity(n, s.experts), gate(n, width), up(n, width), y(n, s.hidden), chosen(n * s.choices),
          weights(n * s.choices) {}
};

// y = x / sqrt(mean x^2 + eps) * weight; may be in place.
inline void norm(const float* x, const float* weight, long size, float eps, float* y) {
    floats squares = floats{};
    float rest = 0;
    long i = 0;
    for (; i + LANES <= size; i += LANES) { floats v; std::memcpy(&v, x + i, sizeof(floats)); squares += v * v; }
    for (; i < size; ++i) rest += x[i] * x[i];
    const float scale = 1.0f / std::sqrt((sum_of(squares) + rest) / size + eps);
    for (i = 0; i < size; ++i) y[i] = x[i] * scale * weight[i];
}

// R numbers turned by one position's angles (eqs 3, 8).
inline void turn(const float* x, const float* cos, const float* sin, long rope, bool interleave, float factor, float* y) {
    const long half = rope / 2, step = interleave ? 2 : 1, other = interleave ? 1 : half;
    for (long j = 0; j < half; ++j) {
        const float a = x[j * step], b = x[j * step + other];
        y[j * step] = (a * cos[j] - b * sin[j]) * factor;
        y[j * step + other] = (b * cos[j] + a * sin[j]) * factor;
    }
}

// y [rows, C] += q [rows, P] times W_UK [P, C] of one head: four rows of the matrix at a time, for all rows of q.
inline void absorb(const float* const* q, const float* w, long nope, long rank, long rows, float* const* y) {
    for (long n = 0; n < rows; ++n) std::memset(y[n], 0, rank * sizeof(float));
    for (long p = 0; p < nope; p += 4) {
        const long here = nope - p < 4 ? nope - p : 4;
        const float* from[4];
        for (long k = 0; k < 4; ++k) from[k] = w + (p + (k < here ? k : 0)) * rank;
        long c = 0;
        for (; c + LANES <= rank; c += LANES) {
            floats column[4];
            for (int k = 0; k < 4; ++k) std::memcpy(&column[k], from[k] + c, sizeof(floats));
            for (long n = 0; n < rows; ++n) {
                floats sum; std::memcpy(&sum, y[n] + c, sizeof(floats));
                for (int k = 0; k < 4; ++k) sum += column[k] * (k < here ? q[n][p + k] : 0.0f);
                std::memcpy(y[n] + c, &sum, sizeof(floats));
            }
        }
        for (; c < rank; ++c)
            for (long n = 0; n < rows; ++n)
                for (long k = 0; k < here; ++k) y[n][c] += from[k][c] * q[n][p + k];
    }
}

// Whether a is to be taken before b; what is no number comes first, as in torch, and shows in the result.
inline bool before(float a, float b) { return a > b || (a != a && b == b); }

// The K experts of one token and their weights (eqs 13-16); `affinity` [E] holds the router's logits and becomes
// the affinities.
inline void choose(const Shape& s, const float* bias, float* affinity, int64_t* chosen, float* weights) {
    const long E = s.experts, each = E / s.groups;
    float highest = affinity[0], total = 0;
    for (long e = 1; e < E; ++e) highest = affinity[e] > highest ? affinity[e] : highest;
    for (long e = 0; e < E; ++e) {
        affinity[e] = s.softmax ? std::exp(affinity[e] - highest) : 1.0f / (1.0f + std::exp(-affinity[e]));
        total += affinity[e];
    }
    std::vector<float> score(E), group_score(s.groups);
    std::vector<char> taken(E, 0);
    for (long e = 0; e < E; ++e) {
        if (s.softmax) affinity[e] /= total;
        score[e] = affinity[e] + (bias ? bias[e] : 0.0f);
    }
    if (s.kept_groups < s.groups) {
        for (long g = 0; g < s.groups; ++g) {
            float first = -INFINITY, second = -INFINITY;
            for (long e = g * each; e < (g + 1) * each; ++e) {
                if (before(score[e], first)) { second = first; first = score[e]; }
                else if (before(score[e], second)) second = score[e];
            }
            group_score[g] = s.best_two ? first + second : first;
        }
        std::vector<char> kept(s.groups, 0);
        for (long k = 0; k < s.kept_groups; ++k) {
            long best = -1;
            for (long g = 0; g < s.groups; ++g)
                if (!kept[g] && (best < 0 || before(group_score[g], group_score[best]))) best = g;
            kept[best] = 1;
        }
        for (long e = 0; e < E; ++e)
            if (!kept[e / each]) score[e] = -INFINITY;
    }
    float sum = 0;
    for (long k = 0; k < s.choices; ++k) {
        long best = -1;
        for (long e = 0; e < E; ++e)
            if (!taken[e] && (best < 0 || before(score[e], score[best]))) best = e;
        taken[best] = 1;
        chosen[k] = best;
        weights[k] = affinity[best];
        sum += affinity[best];
    }
    for (long k = 0; k < s.choices; ++k) weights[k] *= s.routed_scale / (s.normed ? sum + 1e-20f : 1.0f);
}

// h += attention(norm(h)) (eqs 1-11, in the latent space).
inline void attention(const Shape& s, const Layer& l, const Pass& p, Scratch& t, Team team) {
    const long N = p.rows, qk = s.nope + s.rope, X = s.rank + s.rope, half = s.rope / 2;
    long lo, hi;
    for (long n = team.thread; n < N; n += team.all)
        norm(p.h + n * s.hidden, l.input_norm, s.hidden, s.eps, t.x.rows[n]);
    meet();
    share(X, team.thread, team.all, lo, hi);
    multiply(l.latent, s.group, 0, s.hidden, t.x.in(), N, lo, hi, t.entry.rows.data());
    if (s.query_rank) {
        share(s.query_rank, team.thread, team.all, lo, hi);
        multiply(l.query_a, s.group, 0, s.hidden, t.x.in(), N, lo, hi, t.query_latent.rows.data());
        meet();
        for (long n = team.thread; n < N; n += team.all)
            norm(t.query_latent.rows[n], l.query_norm, s.query_rank, s.latent_eps, t.query_latent.rows[n]);
    }
    meet();
    for (long n = team.thread; n < N; n += team.all) {
        float* kept = l.cache + p.slots[n] * X;
        norm(t.entry.rows[n], l.latent_norm, s.rank, s.latent_eps, kept);
        turn(t.entry.rows[n] + s.rank, p.cos + n * half, p.sin + n * half, s.rope, s.interleave, 1.0f, kept + s.rank);
    }
    share(s.heads * qk, team.thread, team.all, lo, hi);
    multiply(l.query_b, s.group, 0, s.query_rank ? s.query_rank : s.hidden,
             s.query_rank ? t.query_latent.in() : t.x.in(), N, lo, hi, t.q.rows.data());
    meet();
    std::vector<const float*> from(N);
    std::vector<float*> to(N);
    for (long head = team.thread; head < s.heads; head += team.all) {
        for (long n = 0; n < N; ++n) { from[n] = t.q.rows[n] + head * qk; to[n] = t.query.rows[n] + head * X; }
        absorb(from.data(), l.up_by_head + head * (s.nope + s.value) * s.rank, s.nope, s.rank, N, to.data());
        for (long n = 0; n < N; ++n) {
            for (long c = 0; c < s.rank; ++c) to[n][c] *= s.attention_scale;
            turn(from[n] + s.nope, p.cos + n * half, p.sin + n * half, s.rope, s.interleave, s.attention_scale,
                 to[n] + s.rank);
        }
    }
    meet();
    attend_all(l.cache, X, s.rank, t.query.numbers.data(), s.heads, p.texts, t.attended.numbers.data());
    for (long head = team.thread; head < s.heads; head += team.all) {
        for (long n = 0; n < N; ++n) { from[n] = t.attended.rows[n] + head * s.rank; to[n] = t.values.rows[n] + head * s.value; }
        const Weights values = {l.up_by_head + (head * (s.nope + s.value) + s.nope) * s.rank, nullptr, FLOAT32};
        multiply(values, s.group, 0, s.rank, from.data(), N, 0, s.value, to.data());
    }
    meet();
    share(s.hidden, team.thread, team.all, lo, hi);
    multiply(l.out, s.group, 0, s.heads * s.value, t.values.in(), N, lo, hi, t.y.rows.data());
    for (long n = 0; n < N; ++n)
        for (long d = lo; d < hi; ++d) p.h[n * s.hidden + d] += t.y.rows[n][d];
    meet();
}

// h += FFN(norm(h)), dense or a mixture of experts (eq 12).
inline void feed_forward(const Shape& s, const Layer& l, const Pass& p, Scratch& t, Team team) {
    const long N = p.rows;
    const Experts experts = {l.gate_up, l.routed_down, s.group, s.experts, s.hidden, l.inner};
    long lo, hi;
    for (long n = team.thread; n < N; n += team.all)
        norm(p.h + n * s.hidden, l.post_norm, s.hidden, s.eps, t.x.rows[n]);
    meet();
    if (l.router) {
        share(s.experts, team.thread, team.all, lo, hi);
        const Weights router = {l.router, nullptr, FLOAT32};
        multiply(router, s.group, 0, s.hidden, t.x.in(), N, lo, hi, t.affinity.rows.data());
    }
    if (l.width) {
        share(l.width, team.thread, team.all, lo, hi);
        multiply(l.gate, s.group, 0, s.hidden, t.x.in(), N, lo, hi, t.gate.rows.data());
        multiply(l.up, s.group, 0, s.hidden, t.x.in(), N, lo, hi, t.up.rows.data());
        for (long n = 0; n < N; ++n) gated(t.gate.rows[n], t.up.rows[n], t.gate.rows[n], lo, hi);
    }
    meet();
    if (l.router) {
        if (team.thread == 0) {
            for (long n = 0; n < N; ++n)
                choose(s, l.bias, t.affinity.rows[n], t.chosen.data() + n * s.choices, t.weights.data() + n * s.choices);
            t.routed.plan(experts, t.x.numbers.data(), N, s.choices, t.chosen.data());
        }
        meet();
        t.routed.widen(experts, team);
        meet();
    }
    share(s.hidden, team.thread, team.all, lo, hi);
    for (long n = 0; n < N; ++n) std::memset(t.y.rows[n] + lo, 0, (hi - lo) * sizeof(float));
    if (l.width) multiply(l.down, s.group, 0, l.width, t.gate.in(), N, lo, hi, t.y.rows.data());
    if (l.router) t.routed.narrow(experts, N, s.choices, t.weights.data(), t.y.numbers.data(), lo, hi);
    for (long n = 0; n < N; ++n)
        for (long d = lo; d < hi; ++d) p.h[n * s.hidden + d] += t.y.rows[n][d];
    meet();
}

}  // namespace
