// torch.ops.kvk_emu: libkvk's own torch face, checks and launch code, with the emulator in the place of a card. The CPU's
// tensors count as lying on cuda:0, and those of a call are the device buffers: touching anything else is an error.
#include "cuda/backend.h"

#include <algorithm>
#include <list>
#include <string>
#include <vector>

#include "core/check.h"
#include "cpu/backend.h"
#include "cuda/check_values.h"
#include "cuda/log.h"
#include "emulator/launch_ops.h"
#include "torch/adapter.h"

namespace kvk {
namespace {

// ---------------------------------------------------------------------------------------------- the call's tensors
struct Operand {
  torch_face::TorchTensor tensor;  // held until the call's end, so that its memory stays its own
  char* begin;
  size_t bytes;  // from the first element to the last
};

// The tensors that the torch face has looked at since the last call.
std::vector<Operand>& operands() {
  static std::vector<Operand> list;
  return list;
}

void remember(const torch_face::TorchTensor& t) {
  if (t.numel() == 0) return;
  char* begin = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  int64_t elements = 1;
  for (size_t i = 0; i < t.sizes().size(); ++i) elements += (t.sizes()[i] - 1) * t.strides()[i];
  operands().push_back({t, begin, static_cast<size_t>(elements) * t.element_size()});
}

// Every byte of a strided tensor, and none between its rows.
void poison(const torch_face::TorchTensor& t, char* at, size_t dim = 0) {
  if (dim == t.sizes().size()) {
    std::memset(at, 0xff, t.element_size());
    return;
  }
  for (int64_t i = 0; i < t.sizes()[dim]; ++i) {
    poison(t, at + i * t.strides()[dim] * static_cast<int64_t>(t.element_size()), dim + 1);
  }
}

// One op over the emulator. `outputs` start the tensors that it defines, filled with NaN first; `updated` those that it
// changes; it may only read the others.
class Call {
 public:
  Call(std::initializer_list<const void*> outputs, std::initializer_list<const void*> updated = {}) {
    const auto starts = [](std::initializer_list<const void*> list, const Operand& operand) {
      return std::find(list.begin(), list.end(), operand.begin) != list.end();
    };
    struct Range {
      char *begin, *end;
      emu::Use use;
    };
    std::vector<Range> ranges;
    for (const Operand& operand : operands()) {
      const bool defined = starts(outputs, operand);
      if (defined) poison(operand.tensor, operand.begin);
      const emu::Use use = defined ? emu::Use::output : starts(updated, operand) ? emu::Use::in_out : emu::Use::input;
      ranges.push_back({operand.begin, operand.begin + operand.bytes, use});
    }
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    for (size_t i = 0; i < ranges.size();) {  // views of one allocation become one buffer
      Range whole = ranges[i];
      for (++i; i < ranges.size() && ranges[i].begin < whole.end; ++i) {
        whole.end = std::max(whole.end, ranges[i].end);
        if (ranges[i].use != whole.use) whole.use = emu::Use::in_out;
      }
      const char* name = whole.use == emu::Use::input ? "an input" : "an output";
      buffers_.emplace_back(whole.begin, static_cast<size_t>(whole.end - whole.begin), whole.use, name);
    }
  }
  ~Call() { operands().clear(); }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

 private:
  std::list<emu::Adopted> buffers_;
};

// ---------------------------------------------------------------------------------------------- the launcher
int num_sms = 4;
std::vector<std::string> launched;

class NotedLauncher final : public cuda::Launcher {
 public:
  const cuda::DeviceProperties& properties() const override { return emulator_.properties(); }
  void launch(const cuda::Kernel& kernel, cuda::Dim3 grid, cuda::Dim3 block, size_t shared_bytes, const void* params,
              size_t params_size) override {
    launched.push_back(kernel.expression);
    emulator_.launch(kernel, grid, block, shared_bytes, params, params_size);
  }
  void read(void* host, const void* device, size_t bytes) override { emulator_.read(host, device, bytes); }

 private:
  emu::EmulatorLauncher emulator_{num_sms};
};

// KVK_CHECK=1, or what a test sets.
bool checking = cuda::check_mode();

// The check that comes before an op, which may write nothing: of the op's tensors, all are its inputs.
template <class Check>
void check_first(Check check) {
  if (!checking) return;
  const std::vector<Operand> kept = operands();
  {
    const Call call({});
    NotedLauncher launcher;
    emu::EmulatorWorkspace workspace;
    check(launcher, workspace);
  }
  operands() = kept;
}

std::string lines(const std::vector<std::string>& list) {
  std::string text;
  for (const std::string& line : list) text += line + "\n";
  return text;
}

// ---------------------------------------------------------------------------------------------- what tests ask for
// The card's number of multiprocessors; a seed below 0 runs threads and blocks in order.
void emulate(int64_t sms, int64_t seed) {
  num_sms = static_cast<int>(sms);
  emu::Options& options = emu::options();
  options.order = seed < 0 ? emu::Options::Order::in_order : emu::Options::Order::random;
  options.async = seed < 0 ? emu::Options::Async::late : emu::Options::Async::mixed;
  options.seed = static_cast<uint64_t>(std::max<int64_t>(seed, 1));
}

void check_values(bool on) { checking = on; }

// The kernels launched since the last question, a line each.
std::string launched_kernels() {
  const std::string text = lines(launched);
  launched.clear();
  return text;
}

std::string known_kernels() { return lines(emu::known_kernels()); }

}  // namespace

// ---------------------------------------------------------------------------------------------- csrc/torch/device.cc
namespace torch_face {

Device device_of(const TorchTensor& t) {
  if (!t.is_cpu()) return {DeviceType::other, 0};
  remember(t);
  return {DeviceType::cuda, 0};
}

void* current_stream(const Device&) { return nullptr; }

KVK_LIBRARY_FRAGMENT(KVK_NAMESPACE, m) {
  m.def("_emulate(int num_sms, int seed) -> ()");
  m.def("_check_values(bool on) -> ()");
  m.def("_launched_kernels() -> str");
  m.def("_known_kernels() -> str");
}

KVK_LIBRARY_IMPL(KVK_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_emulate", TORCH_BOX(&emulate));
  m.impl("_check_values", TORCH_BOX(&check_values));
  m.impl("_launched_kernels", TORCH_BOX(&launched_kernels));
  m.impl("_known_kernels", TORCH_BOX(&known_kernels));
}

}  // namespace torch_face

// ---------------------------------------------------------------------------------------------- csrc/cuda/backend.cc
namespace cuda {

void paged_attention(const char* op, const PagedProblem& problem, int64_t list_entries, Device, const Context&) {
  check_first([&](Launcher& launcher, Workspace& workspace) {
    check_table_values(op, problem, list_entries, launcher, workspace);
  });
  const Call call({problem.out.data, problem.lse});
  NotedLauncher launcher;
  emu::EmulatorWorkspace workspace;
  launch_paged_attention(problem, list_entries, launcher, workspace);
}

void append_kv(const AppendKvArgs& args, const Context&) {
  check_first([&](Launcher& launcher, Workspace& workspace) { check_slot_values(args, launcher, workspace); });
  const Call call({}, {args.k_pages.data, args.v_pages.data});
  NotedLauncher launcher;
  launch_append_kv(args, launcher);
}

void merge_states(const MergeStatesArgs& args, const Context&) {
  const Call call({args.out.data, args.lse.data});
  NotedLauncher launcher;
  launch_merge_states(args, launcher);
}

void merge_states_backward(const MergeStatesBackwardArgs& args, const Context&) {
  const Call call({args.grad_parts.data, args.grad_parts_lse.data});
  NotedLauncher launcher;
  launch_merge_states_backward(args, launcher);
}

void read_memory(Device, void*, void* host, const void* from, size_t bytes) { std::memcpy(host, from, bytes); }

void hadamard(const HadamardArgs& args, const Context&) {
  // In place the input is the output: what it holds stays.
  const bool in_place = args.x.data == args.out.data;
  const Call call({in_place ? nullptr : args.out.data}, {in_place ? args.out.data : nullptr});
  NotedLauncher launcher;
  launch_hadamard(args, launcher);
}

void quantize_pages(const QuantizePagesArgs& args, const Context&) {
  check_first([&](Launcher& launcher, Workspace& workspace) { check_quantize_ids(args, launcher, workspace); });
  const Call call({}, {args.k_pool.data, args.v_pool.data});
  NotedLauncher launcher;
  launch_quantize_pages(args, launcher);
}

void dequantize_pages(const DequantizePagesArgs& args, const Context&) {
  check_first([&](Launcher& launcher, Workspace& workspace) { check_dequantize_ids(args, launcher, workspace); });
  const Call call({args.k.data, args.v.data});
  NotedLauncher launcher;
  launch_dequantize_pages(args, launcher);
}

void quantize(const QuantizeArgs& args, const Context&) {
  const Call call({args.codes.data, args.scale.data, args.min.data});
  NotedLauncher launcher;
  launch_quantize(args, launcher);
}

void dequantize(const DequantizeArgs& args, const Context&) {
  const Call call({args.x.data});
  NotedLauncher launcher;
  launch_dequantize(args, launcher);
}

void compress_pages(const CompressPagesArgs& args, const Context&) {
  check_first([&](Launcher& launcher, Workspace& workspace) { check_compress_values(args, launcher, workspace); });
  const Call call({}, {args.k_pool.data, args.v_pool.data});
  NotedLauncher launcher;
  launch_compress_pages(args, launcher);
}

void decompress_pages(const DecompressPagesArgs& args, const Context&) {
  check_first([&](Launcher& launcher, Workspace& workspace) { check_decompress_ids(args, launcher, workspace); });
  const Call call({args.k.data, args.v.data});
  NotedLauncher launcher;
  launch_decompress_pages(args, launcher);
}

void lightning_attention(const LightningArgs& args, const Context&) {
  check_first([&](Launcher& launcher, Workspace& workspace) { check_lightning_starts(args, launcher, workspace); });
  const bool in_place = args.initial_state && args.initial_state->data == args.final_state.data;
  const Call call({args.out.data, in_place ? nullptr : args.final_state.data},
                  {in_place ? args.final_state.data : nullptr});
  NotedLauncher launcher;
  launch_lightning_attention(args, launcher);
}

void lightning_attention_backward(const LightningBackwardArgs& args, const Context&) {
  check_first(
      [&](Launcher& launcher, Workspace& workspace) { check_lightning_backward_starts(args, launcher, workspace); });
  const Call call({args.grad_q.data, args.grad_k.data, args.grad_v.data,
                   args.grad_log_decay ? args.grad_log_decay->data : nullptr,
                   args.grad_initial_state ? args.grad_initial_state->data : nullptr});
  NotedLauncher launcher;
  emu::EmulatorWorkspace workspace;
  launch_lightning_attention_backward(args, launcher, workspace);
}

void linear_attention(const LinearAttentionArgs& args, const Context&) {
  check_first([&](Launcher& launcher, Workspace& workspace) { check_linear_starts(args, launcher, workspace); });
  const bool states = args.initial_state && args.initial_state->data == args.final_state.data;
  const bool sums = args.initial_z && args.initial_z->data == args.final_z.data;
  const Call call(
      {args.out.data, args.den.data, states ? nullptr : args.final_state.data, sums ? nullptr : args.final_z.data},
      {states ? args.final_state.data : nullptr, sums ? args.final_z.data : nullptr});
  NotedLauncher launcher;
  launch_linear_attention(args, launcher);
}

void linear_attention_backward(const LinearAttentionBackwardArgs& args, const Context&) {
  check_first(
      [&](Launcher& launcher, Workspace& workspace) { check_linear_backward_starts(args, launcher, workspace); });
  const auto data = [](const std::optional<Tensor>& t) { return t ? t->data : nullptr; };
  const Call call({args.grad_q.data, args.grad_k.data, args.grad_v.data, data(args.grad_q_den), data(args.grad_k_den),
                   data(args.grad_initial_state), data(args.grad_initial_z)});
  NotedLauncher launcher;
  emu::EmulatorWorkspace workspace;
  launch_linear_attention_backward(args, launcher, workspace);
}

void lightning_decode(const LightningDecodeArgs& args, const Context&) {
  check_first([&](Launcher& launcher, Workspace& workspace) { check_state_slots(args, launcher, workspace); });
  const Call call({args.out.data}, {args.state.data});
  NotedLauncher launcher;
  launch_lightning_decode(args, launcher);
}

void block_sparse_attention(const BlockSparseProblem& problem, Device, const Context&) {
  check_first([&](Launcher& launcher, Workspace& workspace) { check_block_pattern(problem, launcher, workspace); });
  const Call call({problem.out.data, problem.lse.data});
  NotedLauncher launcher;
  launch_block_sparse_attention(problem, launcher);
}

void neighborhood_attention(const NeighborhoodProblem& problem, Device, const Context&) {
  const Call call({problem.out.data, problem.lse.data});
  NotedLauncher launcher;
  launch_neighborhood_attention(problem, launcher);
}

void block_sparse_attention_backward(const BlockSparseProblem& problem, Device, const Context&) {
  check_first([&](Launcher& launcher, Workspace& workspace) { check_block_pattern(problem, launcher, workspace); });
  const Call call({problem.dq.data, problem.dk.data, problem.dv.data});
  NotedLauncher launcher;
  emu::EmulatorWorkspace workspace;
  launch_block_sparse_attention_backward(problem, launcher, workspace);
}

void neighborhood_attention_backward(const NeighborhoodProblem& problem, Device, const Context&) {
  const Call call({problem.dq.data, problem.dk.data, problem.dv.data});
  NotedLauncher launcher;
  emu::EmulatorWorkspace workspace;
  launch_neighborhood_attention_backward(problem, launcher, workspace);
}

}  // namespace cuda

// ---------------------------------------------------------------------------------------------- csrc/cpu
const char* cpu_level() { return "emulator"; }
const char* version() { return "emulator"; }

namespace cpu {

[[noreturn]] void unexpected() {
  throw Error("kvk_emu: a call went to the CPU backend, which this build does not have");
}

void paged_attention(const PagedProblem&, Threads&) { unexpected(); }
void append_kv(const AppendKvArgs&, Threads&) { unexpected(); }
void merge_states(const MergeStatesArgs&, Threads&) { unexpected(); }
void merge_states_backward(const MergeStatesBackwardArgs&, Threads&) { unexpected(); }
void hadamard(const HadamardArgs&, Threads&) { unexpected(); }
void quantize_pages(const QuantizePagesArgs&, Threads&) { unexpected(); }
void dequantize_pages(const DequantizePagesArgs&, Threads&) { unexpected(); }
void quantize(const QuantizeArgs&, Threads&) { unexpected(); }
void dequantize(const DequantizeArgs&, Threads&) { unexpected(); }
void compress_pages(const CompressPagesArgs&, Threads&) { unexpected(); }
void decompress_pages(const DecompressPagesArgs&, Threads&) { unexpected(); }
void lightning_attention(const LightningArgs&, Threads&) { unexpected(); }
void lightning_attention_backward(const LightningBackwardArgs&, Threads&) { unexpected(); }
void lightning_decode(const LightningDecodeArgs&, Threads&) { unexpected(); }
void block_sparse_attention(const BlockSparseProblem&, Threads&) { unexpected(); }
void block_sparse_attention_backward(const BlockSparseProblem&, Threads&) { unexpected(); }
void vertical_slash_attention(const VerticalSlashProblem&, Threads&) { unexpected(); }
void neighborhood_attention(const NeighborhoodProblem&, Threads&) { unexpected(); }
void neighborhood_attention_backward(const NeighborhoodProblem&, Threads&) { unexpected(); }
void linear_attention(const LinearAttentionArgs&, Threads&) { unexpected(); }
void linear_attention_backward(const LinearAttentionBackwardArgs&, Threads&) { unexpected(); }
void taylor_feature_map(const TaylorFeatureMapArgs&, Threads&) { unexpected(); }
void taylor_feature_map_backward(const TaylorFeatureMapBackwardArgs&, Threads&) { unexpected(); }

}  // namespace cpu
}  // namespace kvk
