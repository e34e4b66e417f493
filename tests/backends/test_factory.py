"""Device names."""

from __future__ import annotations

import sys

import pytest
import torch

from crosspool import backends
from crosspool.backends.factory import are_cuda, make_backends, make_cuda_devices
from crosspool.core.errors import ConfigError

pytestmark = pytest.mark.backend


def test_cpu_names_make_backends_in_order():
    assert [backend.name for backend in make_backends(["cpu:1", "cpu:0"], None)] == ["cpu:1", "cpu:0"]


@pytest.mark.parametrize("name", ["mps", "xpu:3"])
def test_another_kind_of_device_is_not_supported(name):
    with pytest.raises(ConfigError, match=rf"'{name}' is not supported by this version"):
        make_backends(["cpu:0", name], None)


@pytest.mark.parametrize("name", ["", "cpu", "cpu:", "cpu:-1", "cpu:x", "cpu:0 ", "CPU:0", "0"])
def test_what_is_no_device_name_is_named(name):
    with pytest.raises(ConfigError, match=rf"'{name}' is not a device name"):
        make_backends([name], None)


def test_devices_are_of_one_kind():
    assert are_cuda(["cuda:0", "cuda:1/0"]) and not are_cuda(["cpu:0", "cpu:1"])
    with pytest.raises(ConfigError, match="devices of one kind are needed, not cpu:0, cuda:0"):
        are_cuda(["cpu:0", "cuda:0"])


@pytest.mark.parametrize("name", ["cuda", "cuda:", "cuda:x", "cuda:0/", "cuda:0/x", "cuda0", "cuda:0 "])
def test_what_is_no_name_of_a_gpu_is_named(name):
    with pytest.raises(ConfigError, match=rf"'{name}' is not a device name"):
        make_cuda_devices(["cuda:0", name])


@pytest.mark.skipif(torch.version.cuda is not None, reason="about a PyTorch without CUDA")
def test_a_torch_without_cuda_is_named():
    with pytest.raises(ConfigError, match=r"cuda:0: this PyTorch \(.*\) is built without CUDA"):
        make_cuda_devices(["cuda:0"])


def test_a_machine_without_triton_is_told_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "crosspool.backends.cuda", raising=False)
    monkeypatch.delattr(backends, "cuda", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "crosspool.kernels.triton.chip", None)
    with pytest.raises(ConfigError, match=r"'cuda:0' needs the package .*: install crosspool\[cuda\]"):
        make_cuda_devices(["cuda:0"])
