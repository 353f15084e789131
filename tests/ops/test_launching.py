"""What is remembered of a launch, with a kernel that only notes how it was called."""

from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from mmrec.ops import launching
from mmrec.ops.exp_product_scan import kernels as exp_product_scan_kernels
from mmrec.ops.gated_scan import kernels as gated_scan_kernels
from mmrec.ops.launching import Call, blocks, check_row_strides, launch, power_of_two, strides
from mmrec.ops.tuning import overridden


class Kernel:
    """Compiles on the slow way, `kernel[grid](…)`, and notes what runs on either."""

    arg_names = ("x", "y", "size", "stride", "BLOCK", "FLAG")

    def __init__(self) -> None:
        self.compiled: list[dict[str, Any]] = []
        self.ran: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def slow(*arguments: Any, **named: Any) -> Any:
            self.compiled.append(named)
            self.ran.append((grid, *arguments, named["BLOCK"], named["FLAG"]))
            return fast

        class Fast:
            def __getitem__(_, grid: tuple[int, ...]) -> Any:  # noqa: N805
                return lambda *arguments: self.ran.append((grid, *arguments))

        fast = Fast()
        return slow


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launching, "_KNOWN", {})
    monkeypatch.setattr(launching, "INTERPRETED", False)
    return Kernel()


def run(kernel: Kernel, x: Tensor, y: Tensor | None = None, flag: bool = False) -> None:
    launch(kernel, (x, y), lambda: Call((x.shape[0],), (x.shape[1], x.stride(0)), {"num_warps": 4, "FLAG": flag, "BLOCK": 16}), flag)


def test_a_second_launch_passes_what_the_first_did(kernel: Kernel) -> None:
    x = torch.zeros(3, 8)
    run(kernel, x)
    other = torch.ones(3, 8)
    run(kernel, other)
    assert len(kernel.compiled) == 1
    first, second = kernel.ran
    assert first[0] == (3,)
    assert second[0] == (3, 1, 1)
    assert second[1] is other  # the tensors are the new ones, not remembered ones
    assert first[2:] == second[2:] == (None, 8, 8, 16, False)


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.zeros(4, 8)},
        {"x": torch.zeros(3, 16)[:, :8]},
        {"x": torch.zeros(3, 8, dtype=torch.bfloat16)},
        {"x": torch.zeros(25)[1:].view(3, 8)},  # four bytes off an aligned address
        {"y": torch.zeros(3)},
        {"flag": True},
    ],
    ids=["shape", "strides", "dtype", "alignment", "presence", "constant"],
)
def test_anything_that_changes_the_kernel_is_asked_for_again(kernel: Kernel, changed: dict[str, Any]) -> None:
    arguments = {"x": torch.zeros(3, 8)}
    run(kernel, **arguments)
    run(kernel, **(arguments | changed))
    assert len(kernel.compiled) == 2


def test_other_options_are_not_answered_from_memory(kernel: Kernel) -> None:
    x = torch.zeros(3, 8)
    run(kernel, x)
    with overridden(**{"some.kernel": {"BLOCK": 32}}):
        run(kernel, x)
    run(kernel, x)
    assert len(kernel.compiled) == 3


def test_two_kernels_do_not_answer_for_each_other(kernel: Kernel) -> None:
    other, x = Kernel(), torch.zeros(3, 8)
    run(kernel, x)
    run(other, x)
    assert len(kernel.compiled) == len(other.compiled) == 1


class SmallGPU(Kernel):
    """Has shared memory for so many stages."""

    arg_names = ("x", "STAGES")

    def __init__(self, stages: int = 2) -> None:
        super().__init__()
        self.stages = stages

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def slow(*arguments: Any, STAGES: int) -> Any:
            self.compiled.append({"STAGES": STAGES})
            if self.stages < STAGES:
                raise OutOfResources(200_000, 166_912, "shared memory")
            return {grid: lambda *arguments: self.ran.append(arguments), (*grid, 1, 1): lambda *arguments: self.ran.append(arguments)}

        return slow


def test_fewer_stages_where_shared_memory_is_small(kernel: Kernel) -> None:
    small, x = SmallGPU(), torch.zeros(3, 8)
    for _ in range(2):
        launch(small, (x,), lambda: Call((1,), (), {"STAGES": 4}))
    assert [named["STAGES"] for named in small.compiled] == [4, 3, 2]
    assert small.ran == [(x, 2)]  # the second launch, from memory, with what fitted


def test_options_that_are_tried_out_run_as_given_or_not_at_all(kernel: Kernel) -> None:
    small = SmallGPU()
    with overridden(), pytest.raises(OutOfResources):
        launch(small, (torch.zeros(3, 8),), lambda: Call((1,), (), {"STAGES": 4}))
    assert len(small.compiled) == 1


def test_what_never_fits_is_an_error(kernel: Kernel) -> None:
    small = SmallGPU(stages=0)
    with pytest.raises(OutOfResources):
        launch(small, (torch.zeros(3, 8),), lambda: Call((1,), (), {"STAGES": 2}))
    assert [named["STAGES"] for named in small.compiled] == [2, 1]


def test_the_memory_is_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_LIMIT", 4)
    for length in range(1, 11):
        run(kernel, torch.zeros(length, 8))
    assert len(launching._KNOWN) <= 4


def test_plain_arithmetic() -> None:
    assert [blocks(size, 4) for size in (1, 4, 5)] == [1, 1, 2]
    assert [power_of_two(size) for size in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert strides(None, 2) == (0, 0)
    assert strides(torch.zeros(2, 3), 2) == (3, 1)


def far_apart(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, T, D) without memory, 2^27 elements from token to token."""
    return torch.empty_strided(shape, (2**27 * shape[1], 2**27, 1), dtype=dtype, device="meta")


def test_tokens_too_far_apart_are_refused() -> None:
    z, log_gamma, w_g = far_apart(1, 40, 8), torch.empty(1, 40, 8, device="meta"), torch.empty(8, device="meta")
    with pytest.raises(ValueError, match="gated_scan: 134217728 elements from one token to the next"):
        gated_scan_kernels.launch_forward(z, log_gamma, log_gamma, w_g, None, None)
    with pytest.raises(ValueError, match="gated_scan"):
        gated_scan_kernels.newton_scan(log_gamma, z, log_gamma, w_g)
    gradients = (torch.empty_like(log_gamma), torch.empty_like(log_gamma), z, torch.empty_like(w_g), torch.empty(1, 8, device="meta"))
    with pytest.raises(ValueError, match="gated_scan"):
        gated_scan_kernels.launch_backward(log_gamma, None, log_gamma, log_gamma, log_gamma, log_gamma, w_g, None, None, *gradients)
    with pytest.raises(ValueError, match="exp_product_scan"):
        exp_product_scan_kernels.launch_forward(z, None, torch.float32)
    with pytest.raises(ValueError, match="exp_product_scan"):
        exp_product_scan_kernels.launch_backward(log_gamma, None, log_gamma, w_g.view(1, 8), None, torch.float32, z, None)
    check_row_strides("any", 16, torch.empty_strided((1, 3, 8), (2**30, 2**26, 1), device="meta"))
