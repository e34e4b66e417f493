"""Device names."""

from __future__ import annotations

import pytest

from crosspool.backends.factory import make_backends
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
