// What Python calls.

#include "block.hpp"

namespace {

inline Team team() {
#ifdef _OPENMP
    return {omp_get_thread_num(), omp_get_num_threads()};
#else
    return {0, 1};
#endif
}

}  // namespace

extern "C" {

// y [rows, outputs] = x [rows, inputs] times the weights transposed.
void fathom_product(const Weights* w, long group, const float* x, long count, long inputs, long outputs, float* y,
                    int threads) {
    std::vector<const float*> from(count);
    std::vector<float*> to(count);
    for (long r = 0; r < count; ++r) { from[r] = x + r * inputs; to[r] = y + r * outputs; }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Team t = team();
        long lo, hi;
        share(outputs, t.thread, t.all, lo, hi);
        multiply(*w, group, 0, inputs, from.data(), count, lo, hi, to.data());
    }
}

// The routed experts of a few tokens (report eq 12): y [tokens, width] += sum over a token's K choices of
// weight * down(silu(gate x) * up x).
void fathom_experts(const Weights* gate_up, const Weights* down, long group, long experts, long width, long inner,
                    const float* x, long tokens, long choices, const int64_t* chosen, const float* weights, float* y,
                    int threads) {
    const Experts e = {*gate_up, *down, group, experts, width, inner};
    Routed routed;
    routed.plan(e, x, tokens, choices, chosen);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Team t = team();
        routed.widen(e, t);
        meet();
        long lo, hi;
        share(width, t.thread, t.all, lo, hi);
        routed.narrow(e, tokens, choices, weights, y, lo, hi);
    }
}

// Queries of many texts, each over its own runs of a shared cache [slots, width]; q is [rows, heads, width], out
// [rows, heads, kept]: the weighted sum of the cache's first `kept` numbers.
void fathom_attend(const float* cache, long width, long kept, const float* q, long heads, const Texts* texts, float* out,
                   int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    attend_all(cache, width, kept, q, heads, *texts, out);
}

// Some blocks of the model, one after the other, on the rows of one pass.
void fathom_blocks(const Shape* s, const Layer* layers, long count, const Pass* p, int threads) {
    long width = 0;
    for (long i = 0; i < count; ++i) width = layers[i].width > width ? layers[i].width : width;
    Scratch scratch(*s, p->rows, width);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (long i = 0; i < count; ++i) {
        attention(*s, layers[i], *p, scratch, team());
        feed_forward(*s, layers[i], *p, scratch, team());
    }
}

}  // extern "C"
