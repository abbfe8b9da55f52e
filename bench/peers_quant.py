"""ONNX Runtime's GroupQueryAttention over its own int8 and int4 caches: symmetric, one scale for the whole tensor."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from bench.harness import Prepared
from bench.quant_cases import QuantAttentionCase, QuantAttentionData


class OnnxRuntimeQuant:
    """com.microsoft's GroupQueryAttention with kv_cache_bit_width 8 or 4, float32 activations (it takes no bf16)."""

    name = "onnxruntime quantized gqa"

    def __init__(self) -> None:
        self._session: tuple[QuantAttentionCase, int, Any] | None = None

    def unavailable(self, case: QuantAttentionCase) -> str | None:
        """Decode at 8 and 4 bits where onnx and onnxruntime are installed."""
        missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        return None if case.bits in (8, 4) else "has int8 and int4 caches"

    def _session_for(self, case: QuantAttentionCase, threads: int) -> Any:
        if self._session is not None and self._session[:2] == (case, threads):
            return self._session[2]
        import onnxruntime
        from onnx import TensorProto, helper

        dense = case.dense
        codes = TensorProto.INT8 if case.bits == 8 else TensorProto.UINT8
        past = [dense.batch, dense.kv_heads, dense.kv_len, dense.head_dim * case.bits // 8]

        def rows(name: str, heads: int) -> Any:
            shape = [dense.batch, 1, heads * dense.head_dim]
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        inputs = [
            rows("query", dense.q_heads),
            rows("key", dense.kv_heads),
            rows("value", dense.kv_heads),
            helper.make_tensor_value_info("past_key", codes, past),
            helper.make_tensor_value_info("past_value", codes, past),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [dense.batch]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, [1]),
            helper.make_tensor_value_info("k_scale", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("v_scale", TensorProto.FLOAT, [1]),
        ]
        outputs = [
            rows("output", dense.q_heads),
            helper.make_tensor_value_info("present_key", codes, past),
            helper.make_tensor_value_info("present_value", codes, past),
        ]
        names = [i.name for i in inputs]
        node = helper.make_node(
            "GroupQueryAttention",
            [*names[:7], "", "", "", "", "", *names[7:]],  # no rotation, bias or sink
            [o.name for o in outputs],
            domain="com.microsoft",
            num_heads=dense.q_heads,
            kv_num_heads=dense.kv_heads,
            k_quant_type="PER_TENSOR",
            v_quant_type="PER_TENSOR",
            kv_cache_bit_width=case.bits,
        )
        model = helper.make_model(
            helper.make_graph([node], "gqa", inputs, outputs),
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
            ir_version=10,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        self._session = (case, threads, session)
        return session

    def build(self, data: QuantAttentionData) -> Prepared:
        """Codes of the dense keys and values. The op appends the last token itself, to its own place."""
        import numpy

        case, dense = data.case, data.case.dense
        session = self._session_for(case, torch.get_num_threads())
        binding = session.io_binding()
        limit = 2 ** (case.bits - 1) - 1

        def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """(codes as stored, scale, what they read as)."""
            x = x.float()
            scale = (x.abs().amax() / limit).reshape(1)
            codes = (x / scale).round().clamp(-limit, limit)
            stored = codes.to(torch.int8)
            if case.bits == 4:
                unsigned = (stored + 8).to(torch.uint8)
                stored = unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
            return stored.contiguous(), scale, codes * scale

        k_codes, k_scale, k = quantized(data.dense.k)
        v_codes, v_scale, v = quantized(data.dense.v)

        def rows(x: torch.Tensor) -> torch.Tensor:
            return x.transpose(1, 2).reshape(dense.batch, 1, -1).float().contiguous()

        query = rows(data.dense.dense_q)
        tensors = {
            "query": query,
            "key": rows(k[:, :, -1:]),
            "value": rows(v[:, :, -1:]),
            "past_key": k_codes,
            "past_value": v_codes,
            "seqlens_k": torch.full((dense.batch,), dense.kv_len - 1, dtype=torch.int32),
            "total_sequence_length": torch.tensor([dense.kv_len], dtype=torch.int32),
            "k_scale": k_scale,
            "v_scale": v_scale,
        }
        out = torch.empty_like(query)
        results = {"output": out, "present_key": k_codes, "present_value": v_codes}
        element = {
            torch.float32: numpy.float32,
            torch.int8: numpy.int8,
            torch.uint8: numpy.uint8,
            torch.int32: numpy.int32,
        }
        for name, tensor in tensors.items():
            binding.bind_input(name, "cpu", 0, element[tensor.dtype], list(tensor.shape), tensor.data_ptr())
        for name, tensor in results.items():
            binding.bind_output(name, "cpu", 0, element[tensor.dtype], list(tensor.shape), tensor.data_ptr())

        def run(keep: object = (tensors, results)) -> torch.Tensor:
            session.run_with_iobinding(binding)
            return out

        return Prepared(run, lambda o: (o.reshape(data.dense.q.shape), None, k, v))
