"""megatron.core is imported without what VACE does not use, and works as if it were imported plainly."""

import subprocess
import sys

import pytest
import torch

from megatron.mm import core

pytestmark = pytest.mark.medium


def test_core_leaves_torch_compile_as_it_was() -> None:
    before = torch.compile
    assert core.core("parallel_state").__name__ == "megatron.core.parallel_state"
    assert torch.compile is before


def test_core_compiles_a_function_once_at_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_now(function, **options):
        compiled.append((function.__name__, options))
        return lambda x: function(x) + 100

    monkeypatch.setattr(torch, "compile", compile_now)
    with core._compile_on_first_call():

        @torch.compile
        def double(x: int) -> int:
            return 2 * x

        @torch.compile(dynamic=True)
        def triple(x: int) -> int:
            return 3 * x

    assert double.__name__ == "double"
    assert compiled == []
    assert [double(1), double(2), triple(1)] == [102, 104, 103]
    assert compiled == [("double", {}), ("triple", {"dynamic": True})]


def test_training_starts_without_the_compiler() -> None:
    code = """
import sys
import mindspeed_mm.training.trainer
from megatron.mm.core import core
core("parallel_state"), core("optimizer_param_scheduler")
heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.pipelining")
print([name for name in heavy if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "[]\n", ran.stderr
