// The one symbol of a level that the rest of the library sees.
#include "cpu/kernels.h"

#define KVK_CONCAT_(a, b) a##b
#define KVK_CONCAT(a, b) KVK_CONCAT_(a, b)

extern "C" const kvk::cpu::Kernels KVK_CONCAT(kvk_cpu_kernels_, KVK_LEVEL) = {
    KVK_LEVEL_NAME,
    kvk::cpu::KVK_LEVEL::attention_scratch_bytes,
    kvk::cpu::KVK_LEVEL::attend,
    kvk::cpu::KVK_LEVEL::merge_splits,
    kvk::cpu::KVK_LEVEL::grid_scratch_bytes,
    kvk::cpu::KVK_LEVEL::grid_tile,
    kvk::cpu::KVK_LEVEL::merge_states,
    kvk::cpu::KVK_LEVEL::merge_states_backward,
    kvk::cpu::KVK_LEVEL::hadamard,
    kvk::cpu::KVK_LEVEL::lightning_scratch_floats,
    kvk::cpu::KVK_LEVEL::lightning_forward,
    kvk::cpu::KVK_LEVEL::lightning_decode,
    kvk::cpu::KVK_LEVEL::lightning_backward_scratch_floats,
    kvk::cpu::KVK_LEVEL::lightning_backward,
    kvk::cpu::KVK_LEVEL::linear_scratch_floats,
    kvk::cpu::KVK_LEVEL::linear_forward,
    kvk::cpu::KVK_LEVEL::linear_backward,
    kvk::cpu::KVK_LEVEL::taylor_feature_map,
    kvk::cpu::KVK_LEVEL::taylor_feature_map_backward,
    kvk::cpu::KVK_LEVEL::quantize_block,
    kvk::cpu::KVK_LEVEL::dequantize_block,
    kvk::cpu::KVK_LEVEL::compress_block,
    kvk::cpu::KVK_LEVEL::decompress_block,
    kvk::cpu::KVK_LEVEL::join_rows,
    kvk::cpu::KVK_LEVEL::split_rows,
};
