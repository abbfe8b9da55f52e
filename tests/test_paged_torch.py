"""The ops as torch sees them: schemas, opcheck, fakes, compile, export, autograd, inference mode."""

from __future__ import annotations

import inspect

import kvk
import pytest
import torch
from kvk_testing import assert_bit_equal
from paged_cases import PagedCase, make_case
from paged_strategies import DTYPES
from torch import library

FORMS = {
    "plain": {},
    "options": {
        "window_left": 9,
        "logits_soft_cap": 5.0,
        "softmax_scale": 0.2,
        "alibi": True,
        "sinks": True,
        "key_bias": "head",
        "table": "csr",
    },
    "per_head": {"table": "per_head", "layout": "hnd", "q_layout": "head_major", "head_dim_v": 32},
}


def decode_case(form: str = "plain", dtype=torch.float32) -> PagedCase:
    return no_poison(make_case([20, 0, 33], dtype=dtype, **FORMS[form]))


def prefill_case(form: str = "plain", dtype=torch.float32) -> PagedCase:
    options = FORMS[form] | ({"mask": "tree"} if form == "options" else {})
    return no_poison(make_case([20, 3, 33], [5, 1, 9], dtype=dtype, padding_rows=2, **options))


def no_poison(case: PagedCase) -> PagedCase:
    """opcheck compares arguments before and after with ==, which NaN fails."""
    for x in (case.q, case.k_pages, case.v_pages, case.options.get("key_bias")):
        if x is not None:
            x.nan_to_num_(0.0)
    return case


def append_args(dtype=torch.float32, layout_hnd: bool = False) -> tuple[torch.Tensor, ...]:
    k, v = torch.randn(5, 2, 64).to(dtype), torch.randn(5, 2, 40).to(dtype)
    k_pages, v_pages = torch.zeros(4, 8, 2, 64, dtype=dtype), torch.zeros(4, 8, 2, 40, dtype=dtype)
    if layout_hnd:
        k_pages = torch.zeros(4, 2, 8, 64, dtype=dtype).transpose(1, 2)
    return k, v, k_pages, v_pages, torch.tensor([0, 31, -1, 7, 8])


def merge_args(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 5, 2, 40).to(dtype), torch.randn(3, 5, 2)


def outputs(case: PagedCase) -> dict[str, torch.Tensor]:
    rows, heads, dim = case.q.shape[0], case.q.shape[1], case.v_pages.shape[3]
    return {"out": torch.zeros(rows, heads, dim, dtype=case.q.dtype), "lse": torch.zeros(rows, heads)}


class TestSchema:
    @pytest.mark.parametrize("op", ["paged_decode", "paged_prefill", "append_kv", "merge_states"])
    def test_python_and_torch_agree(self, op):
        """Same names, order, defaults and keyword-only arguments; the Python functions add the outputs."""
        schema = getattr(torch.ops.kvk, op).default._schema
        outputs = {"merged_out", "merged_lse"} if op == "merge_states" else {"out", "lse"}
        parameters = [
            p for p in inspect.signature(getattr(kvk, op)).parameters.values() if p.name not in outputs
        ]
        assert [a.name for a in schema.arguments] == [p.name for p in parameters]
        for argument, parameter in zip(schema.arguments, parameters, strict=True):
            assert argument.kwarg_only == (parameter.kind is inspect.Parameter.KEYWORD_ONLY)
            assert argument.has_default_value() == (parameter.default is not inspect.Parameter.empty)
            if argument.has_default_value():
                assert argument.default_value == parameter.default

    def test_only_outputs_and_pools_are_written(self):
        written = {
            (op, overload): [x.name for x in getattr(packet, overload)._schema.arguments if x.is_write]
            for op in ("paged_decode", "paged_prefill", "append_kv", "merge_states")
            for packet in [getattr(torch.ops.kvk, op)]
            for overload in packet.overloads()
        }
        assert written == {
            ("paged_decode", "default"): [],
            ("paged_decode", "out"): ["out", "lse"],
            ("paged_prefill", "default"): [],
            ("paged_prefill", "out"): ["out", "lse"],
            ("append_kv", "default"): ["k_pages", "v_pages"],
            ("merge_states", "default"): [],
            ("merge_states", "out"): ["merged_out", "merged_lse"],
        }

    def test_inference_ops_carry_no_autograd(self):
        """A registered autograd kernel costs every call several microseconds."""
        for op in ("paged_decode", "paged_prefill", "append_kv", "paged_decode.out", "paged_prefill.out"):
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"kvk::{op}", "Autograd"), op
        assert torch._C._dispatch_has_kernel_for_dispatch_key("kvk::merge_states", "Autograd")


class TestOpcheck:
    @pytest.mark.parametrize("form", list(FORMS))
    @pytest.mark.parametrize("build", [decode_case, prefill_case])
    def test_attention(self, build, form):
        case = build(form)
        packet = getattr(torch.ops.kvk, case.name)
        library.opcheck(packet.default, case.args, case.options)
        library.opcheck(packet.out, case.args, {**case.options, **outputs(case)})

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, dtype):
        for case in (decode_case("plain", dtype), prefill_case("plain", dtype)):
            library.opcheck(getattr(torch.ops.kvk, case.name).default, case.args, case.options)
        library.opcheck(torch.ops.kvk.append_kv.default, append_args(dtype))
        library.opcheck(torch.ops.kvk.merge_states.default, merge_args(dtype))

    def test_append(self):
        library.opcheck(torch.ops.kvk.append_kv.default, append_args(layout_hnd=True))

    def test_merge(self):
        out, lse = merge_args()
        library.opcheck(torch.ops.kvk.merge_states.default, (out.requires_grad_(), lse.requires_grad_()))
        out, lse = merge_args()
        merged = {"merged_out": torch.zeros(5, 2, 40), "merged_lse": torch.zeros(5, 2)}
        library.opcheck(torch.ops.kvk.merge_states.out, (out, lse), merged)

    def test_merge_backward(self):
        out, lse = merge_args()
        library.opcheck(
            torch.ops.kvk.merge_states_backward.default, (torch.randn(5, 2, 40), torch.randn(5, 2), out, lse)
        )


class TestMeta:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("form", list(FORMS))
    @pytest.mark.parametrize("build", [decode_case, prefill_case])
    def test_attention(self, build, form, dtype):
        case = build(form, dtype)
        want = case.run()
        options = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
        got = getattr(kvk, case.name)(*(x.to("meta") for x in case.args), **options)
        for x, y in zip(got, want, strict=True):
            assert x.device.type == "meta"
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())

    def test_append_and_merge(self):
        assert kvk.append_kv(*(x.to("meta") for x in append_args())) is None
        for dtype in DTYPES:
            args = merge_args(dtype)
            want = kvk.merge_states(*args)
            got = kvk.merge_states(*(x.to("meta") for x in args))
            for x, y in zip(got, want, strict=True):
                assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def step(q, k, v, k_pages, v_pages, slots, table, lens):
    """One decode step as an engine compiles it: new keys in, attention, something after it."""
    kvk.append_kv(k, v, k_pages, v_pages, slots)
    out, lse = kvk.paged_decode(torch.relu(q), k_pages, v_pages, table, lens, window_left=20)
    return out * 2, lse + 1


def step_args(batch: int, seed: int = 0):
    gen = torch.Generator().manual_seed(seed)
    pages = (torch.randn(3 * batch, 8, 2, 64, generator=gen) for _ in range(2))
    table = torch.randperm(3 * batch, generator=gen).view(batch, 3).int()
    lens = torch.randint(1, 25, (batch,), generator=gen).int()
    last = lens.long() - 1
    slots = table[torch.arange(batch), last // 8].long() * 8 + last % 8
    new = (torch.randn(batch, 2, 64, generator=gen) for _ in range(2))
    return torch.randn(batch, 4, 64, generator=gen), *new, *pages, slots, table, lens


def check_step(compiled, batch: int):
    args, compiled_args = step_args(batch), step_args(batch)
    for got, want in zip(compiled(*compiled_args), step(*args), strict=True):
        assert_bit_equal(got, want)
    for got, want in zip(compiled_args, args, strict=True):
        assert_bit_equal(got, want)


# Sizes that happen to agree in the first call are not taken for one symbol.
SIZES_ARE_INDEPENDENT = torch.fx.experimental._config.patch(use_duck_shape=False)


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_decode_step(self, backend):
        check_step(torch.compile(step, fullgraph=True, backend=backend), 4)

    def test_dynamic_batch_does_not_recompile(self):
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        with SIZES_ARE_INDEPENDENT:
            check_step(compiled, 3)
            with torch._dynamo.config.patch(error_on_recompile=True):
                for batch in (4, 7, 32):
                    check_step(compiled, batch)

    def test_prefill_dynamic(self):
        def run(q, indptr, k_pages, v_pages, table, lens, bits):
            out, lse = kvk.paged_prefill(
                q * 2, indptr, k_pages, v_pages, table, lens, mask_bits=bits, logits_soft_cap=5.0
            )
            return out + 1, lse

        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
        cases = [
            make_case(lens, lens, seed=i, mask="tree")
            for i, lens in enumerate(([9, 5], [20, 9, 7], [30] * 6))
        ]
        for i, case in enumerate(cases):
            args = (*case.args, case.options["mask_bits"])
            with SIZES_ARE_INDEPENDENT, torch._dynamo.config.patch(error_on_recompile=i > 0):
                got = compiled(*args)
            for x, y in zip(got, run(*args), strict=True):
                assert_bit_equal(x, y)

    def test_out_form(self):
        case = decode_case("options")

        def run(out, lse):
            kvk.paged_decode(*case.args, **case.options, out=out, lse=lse)
            return out + 1

        out, lse = outputs(case).values()
        result = torch.compile(run, fullgraph=True, backend="aot_eager")(out, lse)
        want = case.run()
        assert_bit_equal(out, want[0])
        assert_bit_equal(lse, want[1])
        assert_bit_equal(result, want[0] + 1)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_merge_with_gradients(self, dynamic):
        def run(out, lse):
            merged, merged_lse = kvk.merge_states(out.sin(), lse)
            return merged.square().sum() + merged_lse.sum()

        compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for tokens in (5, 9):
            grads = []
            for function in (run, compiled):
                gen = torch.Generator().manual_seed(tokens)
                out = torch.randn(3, tokens, 2, 40, generator=gen, requires_grad=True)
                lse = torch.randn(3, tokens, 2, generator=gen, requires_grad=True)
                function(out, lse).backward()
                grads.append((out.grad, lse.grad))
            for x, y in zip(*grads, strict=True):
                torch.testing.assert_close(x, y)


class TestExport:
    def test_ops_stay_in_the_graph(self):
        class Step(torch.nn.Module):
            def forward(self, *args):
                return step(*args)

        args = step_args(4)
        program = torch.export.export(Step(), args)
        for op in (torch.ops.kvk.append_kv.default, torch.ops.kvk.paged_decode.default):
            assert len(program.graph.find_nodes(op="call_function", target=op)) == 1
        fresh, again = step_args(4), step_args(4)
        for got, want in zip(program.module()(*fresh), step(*again), strict=True):
            assert_bit_equal(got, want)

    def test_dynamic_tokens(self):
        class Prefill(torch.nn.Module):
            def forward(self, q, indptr, k_pages, v_pages, table, lens):
                return kvk.paged_prefill(q, indptr, k_pages, v_pages, table, lens)

        case = make_case([20, 9], [6, 9])
        tokens = torch.export.Dim("tokens", min=2, max=4096)
        shapes = {
            "q": {0: tokens},
            "indptr": None,
            "k_pages": None,
            "v_pages": None,
            "table": None,
            "lens": None,
        }
        program = torch.export.export(Prefill(), case.args, dynamic_shapes=shapes)
        other = make_case([20, 9], [20, 2])
        for got, want in zip(program.module()(*other.args), other.run(), strict=True):
            assert_bit_equal(got, want)


class TestAutograd:
    def test_merge_gives_gradients_only_when_asked(self):
        out, lse = merge_args()
        assert not any(x.requires_grad for x in kvk.merge_states(out, lse))
        out.requires_grad_()
        assert all(x.requires_grad for x in kvk.merge_states(out, lse))
        with torch.no_grad():
            assert not any(x.requires_grad for x in kvk.merge_states(out, lse))

    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
    def test_modes_do_not_change_results(self, mode):
        for case in (decode_case("options"), prefill_case("options")):
            want = case.run()
            with mode():
                for x, y in zip(case.run(), want, strict=True):
                    assert_bit_equal(x, y)
        args = merge_args()
        want = kvk.merge_states(*args)
        with mode():
            for x, y in zip(kvk.merge_states(*args), want, strict=True):
                assert_bit_equal(x, y)

    def test_inference_tensors(self):
        with torch.inference_mode():
            args = append_args()
            kvk.append_kv(*args)
            assert_bit_equal(args[2][3, 7], args[0][1])
            out, lse = decode_case().run()
            assert out.is_inference() and lse.is_inference()
