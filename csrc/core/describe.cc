#include "core/describe.h"

#include "core/check.h"

namespace kvk::record {
namespace {

Field maybe(const char* name, const std::optional<Tensor>& t) {
  if (t) return {name, *t};
  return {name, std::monostate{}};
}

Field number(const char* name, double value, double otherwise) {
  return {name, value, Role::input, value == otherwise};
}

void add_table(Fields& fields, const PageTable& table) {
  fields.push_back({"page_indices", table.page_indices});
  fields.push_back({"kv_lens", table.kv_lens});
  fields.push_back(maybe("page_indptr", table.page_indptr));
}

void add_score(Fields& fields, const ScoreOptions& score) {
  if (score.softmax_scale) fields.push_back({"softmax_scale", *score.softmax_scale});
  fields.push_back({"window_left", score.window_left, Role::input, score.window_left == -1});
  fields.push_back(number("logits_soft_cap", score.logits_soft_cap, 0.0));
  fields.push_back(maybe("alibi_slopes", score.alibi_slopes));
  fields.push_back(maybe("sinks", score.sinks));
  fields.push_back(maybe("key_bias", score.key_bias));
}

void add_prefill(Fields& fields, bool causal, const std::optional<Tensor>& mask_bits, int64_t mask_width) {
  fields.push_back({"causal", causal, Role::input, causal});
  fields.push_back(maybe("mask_bits", mask_bits));
  fields.push_back({"mask_width", mask_width, Role::input, mask_width == -1});
}

void add_results(Fields& fields, const Tensor& out, const Tensor& lse) {
  fields.push_back({"out", out, Role::output});
  fields.push_back({"lse", lse, Role::output});
}

Fields linear_inputs(const LinearAttentionArgs& args) {
  return {{"q", args.q},
          {"k", args.k},
          {"v", args.v},
          maybe("q_den", args.q_den),
          maybe("k_den", args.k_den),
          maybe("initial_state", args.initial_state),
          maybe("initial_z", args.initial_z),
          maybe("cu_seqlens", args.cu_seqlens),
          {"causal", args.causal, Role::input, args.causal},
          {"block_size", args.block_size, Role::input, args.block_size == 1},
          {"normalize", args.normalize, Role::input, args.normalize},
          number("scale", args.scale, 1.0),
          number("eps", args.eps, 1e-6)};
}

std::vector<int64_t> numbers(const QuantFormat& format) {
  std::vector<int64_t> list = {format.page_size, format.head_dim, format.head_dim_v};
  for (const QuantPart& part : {format.k, format.v}) {
    list.insert(list.end(), {part.bits, part.group, part.along_tokens ? 0 : 1, part.rotate});
  }
  return list;
}

std::vector<int64_t> numbers(const BitmapFormat& format) {
  return {format.page_size, format.head_dim, format.head_dim_v, format.dtype == DType::bf16 ? 0 : 1,
          format.k.keep,    format.k.rotate, format.v.keep,     format.v.rotate};
}

void add_part(Fields& fields, const QuantPart& part) {
  fields.push_back({"bits", int64_t{part.bits}});
  fields.push_back({"group", int64_t{part.group}});
  fields.push_back({"axis", int64_t{part.along_tokens ? -2 : -1}});
}

template <class Args>
void add_pools(Fields& fields, const Args& args) {
  fields.push_back({"k_pool", args.k_pool});
  fields.push_back({"v_pool", args.v_pool});
  add_table(fields, args.table);
  fields.push_back({"fmt", numbers(args.format)});
  fields.push_back(maybe("k_pages", args.k_pages));
  fields.push_back(maybe("v_pages", args.v_pages));
  if constexpr (requires { args.k_permutation; }) {
    fields.push_back(maybe("k_permutation", args.k_permutation));
    fields.push_back(maybe("k_rope", args.k_rope));
  }
  add_score(fields, args.score);
}

void add_pattern(Fields& fields, const BlockSparseAttentionArgs& args) {
  fields.push_back({"row_ptr", args.pattern.row_ptr});
  fields.push_back({"col_idx", args.pattern.col_idx});
  fields.push_back({"block_q", args.pattern.block_q});
  fields.push_back({"block_k", args.pattern.block_k});
  fields.push_back(maybe("cu_seqlens_q", args.cu_seqlens_q));
  fields.push_back(maybe("cu_seqlens_k", args.cu_seqlens_k));
  fields.push_back(maybe("entry_bias", args.pattern.entry_bias));
  fields.push_back({"causal", args.causal, Role::input, !args.causal});
  if (args.softmax_scale) fields.push_back({"softmax_scale", *args.softmax_scale});
}

void add_axes(Fields& fields, const NeighborhoodAttentionArgs& args) {
  std::vector<int64_t> kernel_size, stride, dilation, is_causal;
  for (int i = 0; i + 3 < args.q.ndim && i < 3; ++i) {
    const NeighborhoodAxis& axis = args.axes[static_cast<size_t>(i)];
    kernel_size.push_back(axis.kernel_size);
    stride.push_back(axis.stride);
    dilation.push_back(axis.dilation);
    is_causal.push_back(axis.is_causal);
  }
  fields.push_back({"kernel_size", kernel_size});
  fields.push_back({"stride", stride});
  fields.push_back({"dilation", dilation});
  fields.push_back({"is_causal", is_causal});
  if (args.softmax_scale) fields.push_back({"softmax_scale", *args.softmax_scale});
}

// What a gradient reads: the gradients of the results, the inputs, the results.
template <class Args>
Fields gradient_inputs(const Args& args) {
  return {{"grad_out", args.grad_out}, {"grad_lse", args.grad_lse}, {"q", args.forward.q},    {"k", args.forward.k},
          {"v", args.forward.v},       {"out", args.forward.out},   {"lse", args.forward.lse}};
}

template <class Args>
void add_gradients(Fields& fields, const Args& args) {
  fields.push_back({"dq", args.dq, Role::output});
  fields.push_back({"dk", args.dk, Role::output});
  fields.push_back({"dv", args.dv, Role::output});
}

// Of the ops over records of any format.
template <class Args>
Fields decode_fields(const Args& args) {
  Fields fields = {{"q", args.q}};
  add_pools(fields, args);
  add_results(fields, args.out, args.lse);
  return fields;
}

template <class Args>
Fields prefill_fields(const Args& args) {
  Fields fields = {{"q", args.q}, {"qo_indptr", args.qo_indptr}};
  add_pools(fields, args);
  add_prefill(fields, args.causal, args.mask_bits, args.mask_width);
  add_results(fields, args.out, args.lse);
  return fields;
}

}  // namespace

Fields fields_of(const PagedDecodeArgs& args) {
  Fields fields = {{"q", args.q}, {"k_pages", args.k_pages}, {"v_pages", args.v_pages}};
  add_table(fields, args.table);
  add_score(fields, args.score);
  add_results(fields, args.out, args.lse);
  return fields;
}

Fields fields_of(const PagedPrefillArgs& args) {
  Fields fields = {{"q", args.q}, {"qo_indptr", args.qo_indptr}, {"k_pages", args.k_pages}, {"v_pages", args.v_pages}};
  add_table(fields, args.table);
  add_score(fields, args.score);
  add_prefill(fields, args.causal, args.mask_bits, args.mask_width);
  add_results(fields, args.out, args.lse);
  return fields;
}

Fields fields_of(const AppendKvArgs& args) {
  return {{"k", args.k},
          {"v", args.v},
          {"k_pages", args.k_pages, Role::in_out},
          {"v_pages", args.v_pages, Role::in_out},
          {"slot_mapping", args.slot_mapping}};
}

Fields fields_of(const MergeStatesArgs& args) {
  return {{"out", args.parts},
          {"lse", args.parts_lse},
          {"merged_out", args.out, Role::output},
          {"merged_lse", args.lse, Role::output}};
}

Fields fields_of(const MergeStatesBackwardArgs& args) {
  return {{"grad_out", args.grad_out},
          {"grad_lse", args.grad_lse},
          {"out", args.parts},
          {"lse", args.parts_lse},
          {"grad", args.grad_parts, Role::output},
          {"grad_of_lse", args.grad_parts_lse, Role::output}};
}

Fields fields_of(const HadamardArgs& args) {
  Fields fields = {{"x", args.x}};
  if (args.scale) fields.push_back({"scale", *args.scale});
  fields.push_back({"transpose", args.transpose, Role::input, !args.transpose});
  fields.push_back({"out", args.out, Role::output});
  return fields;
}

Fields fields_of(const LightningArgs& args) {
  return {{"q", args.q},
          {"k", args.k},
          {"v", args.v},
          maybe("log_decay", args.log_decay),
          maybe("initial_state", args.initial_state),
          maybe("cu_seqlens", args.cu_seqlens),
          number("scale", args.scale, 1.0),
          {"out", args.out, Role::output},
          {"final_state", args.final_state, Role::output}};
}

Fields fields_of(const LightningBackwardArgs& args) {
  Fields fields = {{"grad_out", args.grad_out},
                   maybe("grad_final_state", args.grad_final_state),
                   {"q", args.q},
                   {"k", args.k},
                   {"v", args.v},
                   maybe("log_decay", args.log_decay),
                   maybe("initial_state", args.initial_state),
                   maybe("cu_seqlens", args.cu_seqlens),
                   number("scale", args.scale, 1.0),
                   {"decay_grad", args.grad_log_decay.has_value(), Role::input, args.grad_log_decay.has_value()},
                   {"grad_q", args.grad_q, Role::output},
                   {"grad_k", args.grad_k, Role::output},
                   {"grad_v", args.grad_v, Role::output}};
  if (args.grad_log_decay) fields.push_back({"grad_log_decay", *args.grad_log_decay, Role::output});
  if (args.grad_initial_state) fields.push_back({"grad_initial_state", *args.grad_initial_state, Role::output});
  return fields;
}

Fields fields_of(const LightningDecodeArgs& args) {
  return {{"q", args.q},
          {"k", args.k},
          {"v", args.v},
          {"state", args.state, Role::in_out},
          {"slots", args.slots},
          maybe("log_decay", args.log_decay),
          number("scale", args.scale, 1.0),
          {"out", args.out, Role::output}};
}

Fields fields_of(const LinearAttentionArgs& args) {
  Fields fields = linear_inputs(args);
  fields.push_back({"out", args.out, Role::output});
  fields.push_back({"den", args.den, Role::output});
  fields.push_back({"final_state", args.final_state, Role::output});
  fields.push_back({"final_z", args.final_z, Role::output});
  return fields;
}

Fields fields_of(const LinearAttentionBackwardArgs& args) {
  Fields fields = {{"grad_out", args.grad_out},
                   maybe("grad_den", args.grad_den),
                   maybe("grad_final_state", args.grad_final_state),
                   maybe("grad_final_z", args.grad_final_z)};
  const Fields inputs = linear_inputs(args.forward);
  fields.insert(fields.end(), inputs.begin(), inputs.end());
  const auto add = [&](const char* name, const std::optional<Tensor>& t) {
    if (t) fields.push_back({name, *t, Role::output});
  };
  add("grad_q", args.grad_q);
  add("grad_k", args.grad_k);
  add("grad_v", args.grad_v);
  add("grad_q_den", args.grad_q_den);
  add("grad_k_den", args.grad_k_den);
  add("grad_initial_state", args.grad_initial_state);
  add("grad_initial_z", args.grad_initial_z);
  return fields;
}

Fields fields_of(const TaylorFeatureMapArgs& args) { return {{"x", args.x}, {"out", args.out, Role::output}}; }

Fields fields_of(const TaylorFeatureMapBackwardArgs& args) {
  return {{"grad", args.grad}, {"x", args.x}, {"grad_x", args.grad_x, Role::output}};
}

Fields fields_of(const QuantizePagesArgs& args) {
  return {{"k_pages", args.k_pages},
          {"v_pages", args.v_pages},
          {"src", args.src},
          {"k_pool", args.k_pool, Role::in_out},
          {"v_pool", args.v_pool, Role::in_out},
          {"dst", args.dst},
          {"fmt", numbers(args.format)},
          number("k_clip", args.k_clip, 1.0),
          number("v_clip", args.v_clip, 1.0),
          maybe("k_permutation", args.k_permutation)};
}

Fields fields_of(const DequantizePagesArgs& args) {
  return {{"k_pool", args.k_pool},
          {"v_pool", args.v_pool},
          {"ids", args.ids},
          {"fmt", numbers(args.format)},
          {"dtype", std::string(dtype_name(args.k.dtype))},
          maybe("k_permutation", args.k_permutation),
          {"k", args.k, Role::output},
          {"v", args.v, Role::output}};
}

Fields fields_of(const QuantizeArgs& args) {
  Fields fields = {{"x", args.x}};
  add_part(fields, args.part);
  fields.push_back(number("clip", args.clip, 1.0));
  fields.push_back({"codes", args.codes, Role::output});
  fields.push_back({"scale", args.scale, Role::output});
  fields.push_back({"min", args.min, Role::output});
  return fields;
}

Fields fields_of(const DequantizeArgs& args) {
  Fields fields = {{"codes", args.codes}, {"scale", args.scale}, {"min", args.min}};
  add_part(fields, args.part);
  fields.push_back({"dtype", std::string(dtype_name(args.x.dtype))});
  fields.push_back({"x", args.x, Role::output});
  return fields;
}

Fields fields_of(const QuantDecodeArgs& args) { return decode_fields(args); }
Fields fields_of(const QuantPrefillArgs& args) { return prefill_fields(args); }
Fields fields_of(const SparseDecodeArgs& args) { return decode_fields(args); }
Fields fields_of(const SparsePrefillArgs& args) { return prefill_fields(args); }

Fields fields_of(const CompressPagesArgs& args) {
  return {{"k_pages", args.k_pages},
          {"v_pages", args.v_pages},
          {"src", args.src},
          {"k_pool", args.k_pool, Role::in_out},
          {"v_pool", args.v_pool, Role::in_out},
          {"dst", args.dst},
          {"fmt", numbers(args.format)},
          maybe("k_select", args.k_select),
          maybe("v_select", args.v_select)};
}

Fields fields_of(const DecompressPagesArgs& args) {
  return {{"k_pool", args.k_pool},       {"v_pool", args.v_pool},     {"ids", args.ids},
          {"fmt", numbers(args.format)}, {"k", args.k, Role::output}, {"v", args.v, Role::output}};
}

Fields fields_of(const BlockSparseAttentionArgs& args) {
  Fields fields = {{"q", args.q}, {"k", args.k}, {"v", args.v}};
  add_pattern(fields, args);
  add_results(fields, args.out, args.lse);
  return fields;
}

Fields fields_of(const BlockSparseAttentionBackwardArgs& args) {
  Fields fields = gradient_inputs(args);
  add_pattern(fields, args.forward);
  add_gradients(fields, args);
  return fields;
}

Fields fields_of(const VerticalSlashAttentionArgs& args) {
  Fields fields = {{"q", args.q}, {"k", args.k}, {"v", args.v}, {"vertical", args.vertical}, {"slash", args.slash}};
  fields.push_back(maybe("cu_seqlens_q", args.cu_seqlens_q));
  fields.push_back(maybe("cu_seqlens_k", args.cu_seqlens_k));
  if (args.softmax_scale) fields.push_back({"softmax_scale", *args.softmax_scale});
  add_results(fields, args.out, args.lse);
  return fields;
}

Fields fields_of(const NeighborhoodAttentionArgs& args) {
  Fields fields = {{"q", args.q}, {"k", args.k}, {"v", args.v}};
  add_axes(fields, args);
  add_results(fields, args.out, args.lse);
  return fields;
}

Fields fields_of(const NeighborhoodAttentionBackwardArgs& args) {
  Fields fields = gradient_inputs(args);
  add_axes(fields, args.forward);
  add_gradients(fields, args);
  return fields;
}

}  // namespace kvk::record
