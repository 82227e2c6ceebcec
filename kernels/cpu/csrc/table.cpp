// Gathers one instruction-set build into its table.
#include "jobs.h"

#define SIROCCO_TEXT_(name) #name
#define SIROCCO_TEXT(name) SIROCCO_TEXT_(name)

namespace SIROCCO_ISA {

Decode decoder(int type_id);
Encode encoder(int type_id);
void hqq_start(const float*, int, float*, float*, int64_t);
double hqq_step(const HqqPass&, const float*, const float*, float*, int64_t);
void hqq_store(const float*, const float*, const float*, int, int64_t, uint8_t*);
void matmul_file(const FileMatmulJob&, int64_t, int64_t);
void matmul(const MatmulJob&, int64_t, int64_t, int64_t, int64_t);
void to_act(const ActLayout&, const float*, uint8_t*, int64_t, int64_t);
void norm(const NormJob&, int64_t, int64_t);
void activate(const GatedJob&, int64_t, int64_t);
void convert(const ConvertJob&, int64_t, int64_t);
void rope_kv(const RopeKvJob&, int64_t, int64_t);
void softcap(float*, int64_t, float);
void add(float*, const float*, int64_t);
void scale(float*, int64_t, float);
void attend(const AttentionTables&, const AttentionJob&, const AttentionUnit&, float*);
void merge_segments(const AttentionTables&, const AttentionJob&, const AttentionUnit&, float*);
void to_f32(const void*, Float, float*, int64_t);
float largest_of(const float*, int64_t);
int64_t first_equal(const float*, int64_t, float);
void exp_weights(const float*, float, float, float*, int64_t, double*);
void chunk_maxima(const float*, int64_t, float*);
double mass_above(const float*, int64_t, float);
int64_t collect(const float*, int64_t, int64_t, float, float*, int32_t*);

extern const KernelTable table;
const KernelTable table{
    .name = SIROCCO_TEXT(SIROCCO_ISA),
    .decoder = decoder,
    .matmul_file = matmul_file,
    .encoder = encoder,
    .hqq_start = hqq_start,
    .hqq_step = hqq_step,
    .hqq_store = hqq_store,
    .matmul = matmul,
    .to_act = to_act,
    .norm = norm,
    .activate = activate,
    .convert = convert,
    .rope_kv = rope_kv,
    .softcap = softcap,
    .add = add,
    .scale = scale,
    .attend = attend,
    .merge_segments = merge_segments,
    .to_f32 = to_f32,
    .largest_of = largest_of,
    .first_equal = first_equal,
    .exp_weights = exp_weights,
    .chunk_maxima = chunk_maxima,
    .mass_above = mass_above,
    .collect = collect,
};
}  // namespace SIROCCO_ISA
