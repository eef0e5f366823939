"""Launches of kernels: the device, the number of multiprocessors, the backend of each op."""

import interpreter  # isort: skip  # noqa: F401  first: makes Triton's interpreter round as a GPU does
from types import SimpleNamespace

import pytest
import torch
from dsv3_ref.kernels import attention, decode, gemm, launch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv3_ref import ops

WITHOUT_KERNEL = {  # products of cuBLAS, ops composed of others, and those of the decoder
    "linear", "swiglu_linear", "grouped_swiglu_linear", "attend_prefill", "decode_weights",
    "run_layers",
}  # fmt: skip


@pytest.fixture
def two_gpus(monkeypatch):
    """Pretend that there are GPUs and that cuda:0 is the current one; yield those made current."""
    entered = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *_):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    return entered


def test_a_kernel_is_launched_on_the_device_of_its_tensors(two_gpus):
    seen = []

    @launch.on_its_device
    def swiglu(gate, up):
        seen.append(list(two_gpus))

    with FakeTensorMode():
        near, far = torch.empty(2, device="cuda:0"), torch.empty(2, device="cuda:1")
    swiglu(near, near)
    assert two_gpus == []
    swiglu(far, far)
    assert two_gpus == [1, None]
    swiglu(gate=far, up=far)
    assert two_gpus == [1, None] * 2
    assert seen == [[], [1], [1, None, 1]]


def test_every_kernel_is_launched_so():
    code = launch.on_its_device(lambda: None).__code__
    for name, impls in ops.IMPLS.items():
        if "triton" in impls:
            assert impls["triton"].__code__ is code, name


@pytest.mark.parametrize("limit, expected", [(None, 132), (20, 20), (200, 132)])
def test_persistent_kernels_leave_multiprocessors_to_others(limit, expected, monkeypatch):
    found = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(launch, "SM_LIMIT", limit)
    with FakeTensorMode():
        assert launch.num_sms(torch.empty(1, device="cuda:0")) == expected
    assert launch.num_sms(torch.empty(1), interpreted=3) == 3


@pytest.mark.parametrize("is_used", [True, False])
def test_warp_specialization_can_be_switched_off(is_used, monkeypatch):
    monkeypatch.setattr(gemm, "USE_WARP_SPECIALIZATION", is_used)
    for configs in (gemm.BLOCKWISE_CONFIGS, gemm.WGRAD_CONFIGS):
        chosen = gemm.prune_fp8_configs(configs, {"GROUPED": False})
        assert any(config.kwargs["WS"] for config in chosen) is is_used
        assert not all(config.kwargs["WS"] for config in chosen)


def test_on_cuda_an_op_with_a_kernel_uses_it():
    """On CUDA, `auto` is Triton where an op has a kernel, and torch where it has none."""
    with ops.use("auto"):
        for name, impls in ops.IMPLS.items():
            backend = "triton" if "triton" in impls else "torch"
            assert ops.resolve_impl(name, "cuda") is impls[backend], name
        without = {name for name, impls in ops.IMPLS.items() if "triton" not in impls}
    assert without == WITHOUT_KERNEL


CHANGING = {  # from batch to batch, with every length and stride that follows from them
    "_mla_decode_split_kv_kernel": {"b", "stride_table", "bucket"},
    "_combine_splits_kernel": {"b"},
    "_attention_kernel": {"b", "s", "t", "stride", "bucket"},
    "_attention_dq_kernel": {"b", "s", "t", "stride", "bucket"},
    "_attention_dkdv_kernel": {"b", "s", "t", "bucket"},
}


@pytest.mark.parametrize("name", CHANGING)
def test_no_kernel_is_compiled_again_for_a_multiple_of_16(name):
    kernel = getattr(attention, name, None) or getattr(decode, name)
    options = kernel.fn.kwargs if hasattr(kernel.fn, "kwargs") else vars(kernel.fn)  # interpreted
    assert CHANGING[name] <= {*options["do_not_specialize"]} & {*kernel.fn.arg_names}


def test_decoding_is_tuned_for_the_number_of_keys():
    """A split of one short sequence is not that of 128 long ones."""
    few, many = (launch.autotune_bucket(b * t) for b, t in ((1, 1024), (128, 131_072)))
    assert few != many
    assert "bucket" in decode._mla_decode_split_kv_kernel.keys
