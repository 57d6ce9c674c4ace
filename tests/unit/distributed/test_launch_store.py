"""Which store serves the socket that the launcher opened, by the version of torch."""

import pytest

from mindspeed_mm.distributed.launch import _libuv_takes_a_socket

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("version", "takes"), [("2.7.1", False), ("2.7.1+cpu", False), ("2.8.0", True), ("2.13.0+cpu", True)]
)
def test_torch_2_7_serves_an_open_socket_by_the_older_store(version: str, takes: bool) -> None:
    """2.7.1 refuses it: "The libuv TCPStore backend does not support initialization with an listen fd"."""
    assert _libuv_takes_a_socket(version) is takes
