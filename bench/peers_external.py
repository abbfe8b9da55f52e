"""Peers from outside torch: ONNX Runtime and vLLM, each optional."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from bench.cases import AttentionCase, AttentionData, Case, heads_last
from bench.harness import Prepared


class OnnxRuntime:
    """ONNX Runtime's GroupQueryAttention (com.microsoft), past and present in one buffer."""

    name = "onnxruntime gqa"

    def __init__(self) -> None:
        self._session: tuple[AttentionCase, int, Any] | None = None

    def unavailable(self, case: Case) -> str | None:
        """f32 and f16 attention where onnx and onnxruntime are installed."""
        if not isinstance(case, AttentionCase):
            return "not attention"
        missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if case.batch > 1 and 1 < case.q_len < case.kv_len:
            return "takes chunks of one request at a time"
        return "no bf16 kernel" if case.dtype == "bf16" else None

    def _session_for(self, case: AttentionCase, threads: int) -> Any:
        if self._session is not None and self._session[:2] == (case, threads):
            return self._session[2]
        import onnxruntime
        from onnx import TensorProto, helper

        kind = TensorProto.FLOAT16 if case.dtype == "f16" else TensorProto.FLOAT
        past = [case.batch, case.kv_heads, case.kv_len, case.head_dim]

        def packed(name: str, heads: int) -> Any:
            return helper.make_tensor_value_info(name, kind, [case.batch, case.q_len, heads * case.head_dim])

        inputs = [
            packed("query", case.q_heads),
            packed("key", case.kv_heads),
            packed("value", case.kv_heads),
            helper.make_tensor_value_info("past_key", kind, past),
            helper.make_tensor_value_info("past_value", kind, past),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [case.batch]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, [1]),
        ]
        outputs = [
            packed("output", case.q_heads),
            helper.make_tensor_value_info("present_key", kind, past),
            helper.make_tensor_value_info("present_value", kind, past),
        ]
        node = helper.make_node(
            "GroupQueryAttention",
            [i.name for i in inputs],
            [o.name for o in outputs],
            domain="com.microsoft",
            num_heads=case.q_heads,
            kv_num_heads=case.kv_heads,
        )
        model = helper.make_model(
            helper.make_graph([node], "gqa", inputs, outputs),
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
            ir_version=10,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Its threads spin while it runs, but not on into the next implementation's turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        self._session = (case, threads, session)
        return session

    def build(self, data: AttentionData) -> Prepared:
        """Binds torch's memory. The op appends the new tokens' keys itself: to their own places, with their
        own values, so the cache stays as it is."""
        import numpy

        case = data.case
        session = self._session_for(case, torch.get_num_threads())
        binding = session.io_binding()
        new = slice(case.kv_len - case.q_len, case.kv_len)

        def rows(dense: torch.Tensor) -> torch.Tensor:
            return dense.transpose(1, 2).reshape(case.batch, -1, dense.shape[1] * case.head_dim).contiguous()

        query = rows(data.dense_q)
        tensors = {
            "query": query,
            "key": rows(data.k[:, :, new]),
            "value": rows(data.v[:, :, new]),
            "past_key": data.k,
            "past_value": data.v,
            "seqlens_k": torch.full((case.batch,), case.kv_len - 1, dtype=torch.int32),
            "total_sequence_length": torch.tensor([case.kv_len], dtype=torch.int32),
        }
        out = torch.empty_like(query)
        results = {"output": out, "present_key": data.k, "present_value": data.v}
        element = {torch.float32: numpy.float32, torch.float16: numpy.float16, torch.int32: numpy.int32}
        for name, tensor in tensors.items():
            binding.bind_input(name, "cpu", 0, element[tensor.dtype], list(tensor.shape), tensor.data_ptr())
        for name, tensor in results.items():
            binding.bind_output(name, "cpu", 0, element[tensor.dtype], list(tensor.shape), tensor.data_ptr())

        def run(keep: object = (tensors, results)) -> torch.Tensor:
            session.run_with_iobinding(binding)
            return out

        return Prepared(run, lambda o: (o.reshape(data.q.shape), None))


class VllmCpu:
    """vLLM's CPU attention over its own paged cache, called as its own test calls it
    (tests/kernels/attention/test_cpu_attn.py at 02658faa)."""

    name = "vllm cpu"
    block = 64

    def unavailable(self, case: Case) -> str | None:
        """Attention where a CPU build of vllm is installed."""
        if not isinstance(case, AttentionCase):
            return "not attention"
        if importlib.util.find_spec("vllm") is None:
            return "not installed: vllm"
        return None

    def build(self, data: AttentionData) -> Prepared:
        """Copies the dense keys into vLLM's cache layout with vLLM's own op."""
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        case, dtype = data.case, data.q.dtype
        isa = _get_attn_isa(dtype, self.block)
        per_request = -(-case.kv_len // self.block)
        blocks = case.batch * per_request
        cache = torch.empty(blocks, case.kv_heads, 2 * self.block, case.head_dim, dtype=dtype)
        k_cache, v_cache = cache.chunk(2, dim=2)
        table = torch.randperm(blocks).to(torch.int32).view(case.batch, per_request)
        places = table.long()[:, :, None] * self.block + torch.arange(self.block)
        ops.cpu_attn_reshape_and_cache(
            key=heads_last(data.k).contiguous(),
            value=heads_last(data.v).contiguous(),
            key_cache=k_cache,
            value_cache=v_cache,
            slot_mapping=places.flatten(1)[:, : case.kv_len].flatten().contiguous(),
            isa=isa,
        )
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=case.batch,
            num_heads=case.q_heads,
            num_kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            seq_lens=data.kv_lens,
            dtype=dtype,
            query_start_loc=data.qo_indptr,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        out = torch.empty_like(data.q)

        def run() -> torch.Tensor:
            ops.cpu_attention_with_kv_cache(
                query=data.q,
                key_cache=k_cache,
                value_cache=v_cache,
                output=out,
                query_start_loc=data.qo_indptr,
                seq_lens=data.kv_lens,
                scale=case.head_dim**-0.5,
                causal=True,
                alibi_slopes=None,
                sliding_window=(-1, -1),
                block_table=table,
                softcap=0,
                scheduler_metadata=metadata,
                s_aux=None,
            )
            return out

        return Prepared(run, lambda o: (o, None))
