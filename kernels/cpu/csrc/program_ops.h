// The operations of a program. Buffers are named by number; -1 stands for none. Weights and caches are addresses that
// whoever builds the program keeps alive.
#pragma once
#include <utility>
#include <vector>

#include "layer_jobs.h"
#include "matmul.h"
#include "program.h"

// A buffer of activations that an op fills.
struct ActBuffer {
    ActLayout layout;
    int buffer;
};

// Token ids to rows of the packed embedding, times a factor.
struct EmbedOp : Op {
    EmbedOp(PackedMatrix weight, int out, float factor) : Op(Rows::tokens), weight(weight), out(out), factor(factor) {}
    void run(const Step&, Worker&) const override;
    PackedMatrix weight;
    int out;
    float factor;
};

// job holds all but the addresses within buffers.
struct NormOp : Op {
    NormOp(Rows rows, NormJob job, int x, int residual, int out, std::vector<ActBuffer> acts)
        : Op(rows), job(job), x(x), residual(residual), out(out), acts(std::move(acts)) {}
    void run(const Step&, Worker&) const override;
    NormJob job;
    int x, residual, out;
    std::vector<ActBuffer> acts;
};

// RMS norm of each of some heads by itself, in place: heads [first, first + count) of the rows of x.
struct HeadNormOp : Op {
    HeadNormOp(Rows rows, NormJob job, int x, int64_t first, int64_t count)
        : Op(rows), job(job), x(x), first(first), count(count) {}
    void run(const Step&, Worker&) const override;
    NormJob job;  // width: of a head
    int x;
    int64_t first, count;
};

// One of several products over the same rows; its results lie from column `offset` on.
struct MatmulSegment {
    PackedMatrix weight;
    ActBuffer x;
    const float* bias;
    int64_t offset;
};
constexpr int kMaxSegments = 8;

struct MatmulOp : Op {
    MatmulOp(Rows rows, std::vector<MatmulSegment> segments, int out, int64_t out_stride)
        : Op(rows), segments(std::move(segments)), out(out), out_stride(out_stride) {}
    void run(const Step&, Worker&) const override;
    std::vector<MatmulSegment> segments;
    int out;
    int64_t out_stride;
};

struct GatedOp : Op {
    GatedOp(Rows rows, GatedJob job, int x, int out, std::vector<ActBuffer> acts)
        : Op(rows), job(job), x(x), out(out), acts(std::move(acts)) {}
    void run(const Step&, Worker&) const override;
    GatedJob job;
    int x, out;
    std::vector<ActBuffer> acts;
};

struct ConvertOp : Op {
    ConvertOp(Rows rows, int64_t width, int x, std::vector<ActBuffer> acts)
        : Op(rows), width(width), x(x), acts(std::move(acts)) {}
    void run(const Step&, Worker&) const override;
    int64_t width;
    int x;
    std::vector<ActBuffer> acts;
};

// Rows of qkv: queries, keys, values. Rotates (half 0: does not) and appends keys and values to the cache.
struct RopeKvOp : Op {
    RopeKvOp(RopeKvJob job, int qkv, int table, int group) : Op(Rows::tokens), job(job), qkv(qkv), table(table), group(group) {}
    void run(const Step&, Worker&) const override;
    RopeKvJob job;
    int qkv, table, group;
};

struct AttentionOp : Op {
    AttentionOp(AttentionJob job, int qkv, int out, int plan) : Op(Rows::tokens), job(job), qkv(qkv), out(out), plan(plan) {}
    void run(const Step&, Worker&) const override;
    AttentionJob job;
    int qkv, out, plan;
};

// Rows of buffers of tokens into buffers of wanted rows.
struct GatherOp : Op {
    explicit GatherOp(std::vector<std::pair<int, int>> pairs) : Op(Rows::wanted), pairs(std::move(pairs)) {}
    void run(const Step&, Worker&) const override;
    std::vector<std::pair<int, int>> pairs;  // from, to
};

// Element by element, in place: x = cap * tanh(x / cap), x = x * factor, x = x + other.
struct ElementOp : Op {
    enum Kind { softcap, scale, add };
    ElementOp(Rows rows, Kind kind, int64_t width, int x, int other, float factor)
        : Op(rows), kind(kind), width(width), x(x), other(other), factor(factor) {}
    void run(const Step&, Worker&) const override;
    Kind kind;
    int64_t width;
    int x, other;
    float factor;
};
