// Gathers one instruction-set build into its table.
#include "jobs.h"

#define SIROCCO_TEXT_(name) #name
#define SIROCCO_TEXT(name) SIROCCO_TEXT_(name)

namespace SIROCCO_ISA {

Decode decoder(int type_id);
void matmul(const MatmulJob&, int64_t, int64_t);
void norm(const NormJob&, int64_t, int64_t);
void rope(const RopeJob&, int64_t, int64_t);
void silu_mul(const SiluJob&, int64_t, int64_t);
void kv_write(const KvWriteJob&, int64_t, int64_t);
void attention(const AttentionJob&, const AttentionItem*, int64_t, int64_t);
void to_f32(const void*, Float, float*, int64_t);
void exp_shifted(const float*, float, float, float*, int64_t);

extern const KernelTable table;
const KernelTable table{SIROCCO_TEXT(SIROCCO_ISA), decoder,   matmul, norm,       rope, silu_mul,
                        kv_write,                  attention, to_f32, exp_shifted};

}  // namespace SIROCCO_ISA
