// Python's view of sampling. kernels/cpu/sampling.py is the typed side; ids and rows are checked here.
#include <nanobind/nanobind.h>

#include <limits>
#include <stdexcept>

#include "jobs.h"
#include "philox.h"
#include "sampling.h"
#include "team.h"

namespace nb = nanobind;

namespace {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* message) {
    if (!holds) throw std::out_of_range(message);
}

// Operations for a value of a row: a few passes over it, and an exponential.
constexpr int64_t kCost = 16;

// out[i] = the first 32 bits of Philox(key = seeds[i], counter = positions[i]) / 2^32.
void uniform(uintptr_t seeds, uintptr_t positions, uintptr_t out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint64_t seed = at<uint64_t>(seeds)[i], position = at<uint64_t>(positions)[i];
        const Philox bits = philox4x32_10({{uint32_t(position), uint32_t(position >> 32), 0, 0}}, uint32_t(seed), uint32_t(seed >> 32));
        at<double>(out)[i] = double(bits.x[0]) * 0x1p-32;
    }
}

void likeliest_tokens(uintptr_t logits, int64_t row_stride, int64_t rows, int64_t vocab, uintptr_t out) {
    require(vocab > 0, "likeliest: no vocabulary");
    nb::gil_scoped_release release;
    const KernelTable& kernels = current_kernels();
    parallel_for(rows, vocab, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) at<int64_t>(out)[r] = likeliest(kernels, at<float>(logits) + r * row_stride, vocab);
    });
}

void draw_tokens(uintptr_t logits, int64_t row_stride, int64_t rows, int64_t vocab, uintptr_t temperature, uintptr_t top_k,
                 uintptr_t top_p, uintptr_t min_p, uintptr_t u, uintptr_t out) {
    require(vocab > 0, "draw_tokens: no vocabulary");
    nb::gil_scoped_release release;
    const KernelTable& kernels = current_kernels();
    parallel_for(rows, vocab * kCost, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const DrawParams p{at<float>(temperature)[r], at<int64_t>(top_k)[r], at<double>(top_p)[r], at<double>(min_p)[r],
                               at<double>(u)[r]};
            at<int64_t>(out)[r] = draw_token(kernels, at<float>(logits) + r * row_stride, vocab, p);
        }
    });
}

void logprobs_of(uintptr_t logits, int64_t row_stride, int64_t rows, int64_t vocab, uintptr_t ids, int64_t k, uintptr_t chosen,
                 uintptr_t top_ids, uintptr_t top) {
    require(k >= 0 && k <= vocab, "logprobs: more tokens than the vocabulary has");
    for (int64_t r = 0; r < rows; ++r)
        require(at<int64_t>(ids)[r] >= 0 && at<int64_t>(ids)[r] < vocab, "logprobs: token outside the vocabulary");
    nb::gil_scoped_release release;
    const KernelTable& kernels = current_kernels();
    parallel_for(rows, vocab * kCost, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
            logprobs(kernels, at<float>(logits) + r * row_stride, vocab, at<int64_t>(ids)[r], k, at<float>(chosen) + r,
                     at<int64_t>(top_ids) + r * k, at<float>(top) + r * k);
    });
}

// One logit of each (row, token), of which count lie at each of `who` rows.
template <typename Change>
void change(uintptr_t logits, int64_t row_stride, int64_t rows, int64_t vocab, uintptr_t who, int64_t num_who, uintptr_t tokens,
            int64_t count, Change change_one) {
    for (int64_t i = 0; i < num_who; ++i) require(at<int64_t>(who)[i] >= 0 && at<int64_t>(who)[i] < rows, "logits: no such row");
    for (int64_t i = 0; i < num_who * count; ++i)
        require(at<int64_t>(tokens)[i] >= 0 && at<int64_t>(tokens)[i] < vocab, "logits: token outside the vocabulary");
    for (int64_t i = 0; i < num_who; ++i)
        for (int64_t j = 0; j < count; ++j)
            change_one(at<float>(logits)[at<int64_t>(who)[i] * row_stride + at<int64_t>(tokens)[i * count + j]], i, i * count + j);
}

void add_to_logits(uintptr_t logits, int64_t row_stride, int64_t rows, int64_t vocab, uintptr_t who, int64_t num_who,
                   uintptr_t tokens, uintptr_t amounts, int64_t count) {
    change(logits, row_stride, rows, vocab, who, num_who, tokens, count,
           [&](float& logit, int64_t, int64_t i) { logit += at<float>(amounts)[i]; });
}

// Padded lists name a token several times, which must be penalised once: all results are computed before any is written.
void penalise(uintptr_t logits, int64_t row_stride, int64_t rows, int64_t vocab, uintptr_t who, int64_t num_who, uintptr_t tokens,
              uintptr_t amounts, uintptr_t factors, uintptr_t scratch, int64_t count) {
    auto* results = at<float>(scratch);
    change(logits, row_stride, rows, vocab, who, num_who, tokens, count, [&](float& logit, int64_t row, int64_t i) {
        const float some = logit - at<float>(amounts)[i], factor = at<float>(factors)[row];
        results[i] = some > 0 ? some / factor : some * factor;
    });
    change(logits, row_stride, rows, vocab, who, num_who, tokens, count, [&](float& logit, int64_t, int64_t i) { logit = results[i]; });
}

// Word w of a row allows tokens 32 w and following by its bits, from the lowest on.
void forbid(uintptr_t logits, int64_t row_stride, int64_t rows, int64_t vocab, uintptr_t who, int64_t num_who, uintptr_t words,
            int64_t words_stride) {
    require(words_stride * 32 >= vocab, "forbid: fewer bits than tokens");
    for (int64_t i = 0; i < num_who; ++i) require(at<int64_t>(who)[i] >= 0 && at<int64_t>(who)[i] < rows, "logits: no such row");
    nb::gil_scoped_release release;
    for (int64_t i = 0; i < num_who; ++i) {
        float* row = at<float>(logits) + at<int64_t>(who)[i] * row_stride;
        const uint32_t* bits = at<uint32_t>(words) + i * words_stride;
        for (int64_t begin = 0; begin < vocab; begin += 32) {
            uint32_t forbidden = ~bits[begin / 32];
            if (vocab - begin < 32) forbidden &= (1u << (vocab - begin)) - 1;
            if (forbidden == ~0u) {
                for (int b = 0; b < 32; ++b) row[begin + b] = -std::numeric_limits<float>::infinity();
            } else {
                for (; forbidden; forbidden &= forbidden - 1)
                    row[begin + __builtin_ctz(forbidden)] = -std::numeric_limits<float>::infinity();
            }
        }
    }
}

}  // namespace

void bind_sampling(nb::module_& m) {
    m.def("uniform", uniform);
    m.def("likeliest", likeliest_tokens);
    m.def("draw_tokens", draw_tokens);
    m.def("logprobs", logprobs_of);
    m.def("add_to_logits", add_to_logits);
    m.def("penalise", penalise);
    m.def("forbid", forbid);
}
