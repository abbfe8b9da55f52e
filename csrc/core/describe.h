// The arguments of the C++ face's functions by the names that the torch schemas give them, for the recorder.
#pragma once

#include "core/record.h"
#include "kvk/block_sparse.h"
#include "kvk/hadamard.h"
#include "kvk/lightning.h"
#include "kvk/linear.h"
#include "kvk/neighborhood.h"
#include "kvk/paged.h"
#include "kvk/quant.h"
#include "kvk/sparse.h"

namespace kvk::record {

Fields fields_of(const PagedDecodeArgs& args);
Fields fields_of(const PagedPrefillArgs& args);
Fields fields_of(const AppendKvArgs& args);
Fields fields_of(const MergeStatesArgs& args);
Fields fields_of(const MergeStatesBackwardArgs& args);
Fields fields_of(const HadamardArgs& args);
Fields fields_of(const LightningArgs& args);
Fields fields_of(const LightningBackwardArgs& args);
Fields fields_of(const LightningDecodeArgs& args);
Fields fields_of(const LinearAttentionArgs& args);
Fields fields_of(const LinearAttentionBackwardArgs& args);
Fields fields_of(const TaylorFeatureMapArgs& args);
Fields fields_of(const TaylorFeatureMapBackwardArgs& args);
Fields fields_of(const QuantizePagesArgs& args);
Fields fields_of(const DequantizePagesArgs& args);
Fields fields_of(const QuantizeArgs& args);
Fields fields_of(const DequantizeArgs& args);
Fields fields_of(const QuantDecodeArgs& args);
Fields fields_of(const QuantPrefillArgs& args);
Fields fields_of(const CompressPagesArgs& args);
Fields fields_of(const DecompressPagesArgs& args);
Fields fields_of(const SparseDecodeArgs& args);
Fields fields_of(const SparsePrefillArgs& args);

Fields fields_of(const BlockSparseAttentionArgs& args);
Fields fields_of(const BlockSparseAttentionBackwardArgs& args);
Fields fields_of(const VerticalSlashAttentionArgs& args);
Fields fields_of(const NeighborhoodAttentionArgs& args);
Fields fields_of(const NeighborhoodAttentionBackwardArgs& args);

}  // namespace kvk::record
