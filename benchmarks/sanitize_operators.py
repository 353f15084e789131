"""Every operator of the network, and blocks, which run some fused, both ways on small odd shapes: for NVIDIA's compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize_operators.py
    compute-sanitizer --tool racecheck python benchmarks/sanitize_operators.py

Without PyTorch's caching every tensor is an allocation of its own, so that an access beyond its end is seen. Nothing is timed; results
are compared with float64 on the CPU, as a race may show there first. Prints which rows of the kernels' table were launched.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from operator_cases import OPERATORS, Shape, draw, in_float64
from operator_parity import BF16, FP32, FP64, LIMIT, Case, Finding, check, relative
from tuning_shapes import using

from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.commandline.plain_parser import PlainParser
from mmrec.core.memory import BlockState
from mmrec.measuring.machine import device, machine, synchronize
from mmrec.nearest import did_you_mean, nearest_name
from mmrec.ops import tuning


def cases(names: Sequence[str]) -> list[Case]:
    """Odd lengths and widths; strides, document starts and states; grouped gates, the widths of heads, one token."""
    wanted = [
        *(Case("linear_scan", Shape(2, 131, 37), dtype, FP32, reset=True, strided=True) for dtype in (FP32, BF16)),
        *(Case("exp_product_scan", Shape(2, 131, 37), dtype, dtype, strided=True) for dtype in (FP32, BF16)),
        Case("exp_product_scan", Shape(2, 131, 37), FP32, FP32, options=(("accum_dtype", FP64),)),
        *(Case("gated_scan", Shape(2, 131, 36, P=p), dtype, FP32, reset=True, strided=True) for dtype in (FP32, BF16) for p in (36, 12)),
        *(
            Case("memory_scan", Shape(2, 131, 2 * k, H=2), dtype, FP32, reset=True, strided=True)
            for dtype in (FP32, BF16)
            for k in (20, 64)
        ),
        *(Case("memory_scan", Shape(1, 131, k, H=1), BF16, FP32) for k in (128, 256, 512)),
        Case("memory_scan", Shape(2, 67, 32 * 128, H=32), BF16, FP32),
        Case("memory_scan", Shape(2, 1, 2 * 64, H=2), BF16, FP32),
        *(
            Case("window_attention", Shape(2, 131, 2 * k, H=2, W=50), dtype, FP32, reset=True, strided=True)
            for dtype in (FP32, BF16)
            for k in (20, 64, 128)
        ),
        *(
            Case("short_convolution", Shape(2, 131, 37, J=j), dtype, FP32, reset=True, strided=True)
            for dtype in (FP32, BF16)
            for j in (4, 16)
        ),
        Case("linear_scan", Shape(5, 1, 3), FP32, FP32),
    ]
    return [case for case in wanted if case.operator in names]


def newton_is_right() -> bool:
    """The time-parallel form of gated_scan, which only long sequences take, on a short one."""
    from mmrec.ops.gated_scan.kernels import newton_scan  # Triton exists on Linux alone

    operator = OPERATORS["gated_scan"]
    inputs = draw(operator, Shape(1, 601, 9, P=3), BF16, FP32, device(), "ordinary", state=True, reset=True)
    h, _, _ = newton_scan(**inputs)
    expected, _ = operator.exact(**in_float64({name: tensor.cpu() for name, tensor in inputs.items()}))
    return relative(h.cpu(), expected) <= LIMIT[BF16]


@dataclass(frozen=True)
class BlockCase:
    """A block with H heads of K channels: what it runs fused depends on their number and width, and on the dtype.

    Attributes:
        carried: whether it starts from a state, and documents start within the sequence.
        window: tokens of a window in the matrix' place, with document starts and, as the fused form has none, no state; 0: a matrix.
    """

    B: int
    T: int
    H: int
    K: int
    dtype: torch.dtype
    carried: bool = False
    window: int = 0

    def missed(self, where: torch.device) -> list[str]:
        """Gradients of its input, its weights and its state that are off against float64 on the CPU."""
        memory = {"window_every": 1, "window": self.window} if self.window else {}
        block = MMRecBlock(model_dim=self.H * self.K, num_heads=self.H, pe_dim=self.H * self.K // 2, ffn_dim=48, use_uboo=False, **memory)
        sizes = {"x": (self.B, self.T, self.H * self.K), "h": (self.B, self.H * self.K), "M": (self.B, self.H, self.K, self.K)}
        inputs = {name: torch.randn(size).to(self.dtype) for name, size in sizes.items()}
        reset = torch.rand(self.B, self.T) < 0.1
        block = block.to(self.dtype)
        expected = self._gradients(copy.deepcopy(block).double(), {name: tensor.double() for name, tensor in inputs.items()}, reset)
        found = self._gradients(block.to(where), {name: tensor.to(where) for name, tensor in inputs.items()}, reset.to(where))
        return [
            f"{name}: {relative(gradient.cpu(), expected[name]):.1e}"
            for name, gradient in found.items()
            if not relative(gradient.cpu(), expected[name]) <= BLOCK_LIMIT[self.dtype]
        ]

    def _gradients(self, block: MMRecBlock, inputs: dict[str, torch.Tensor], reset: torch.Tensor) -> dict[str, torch.Tensor]:
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items() if name == "x" or self.carried}
        state = BlockState(leaves["h"], leaves["M"]) if self.carried else None
        y, after = block(leaves["x"], state=state, reset=reset if self.carried or self.window else None, return_state=True)
        leaves |= dict(block.named_parameters())
        total = y.square().mean() + (after.h.square().mean() + after.M.square().mean() if self.carried else 0)
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


BLOCK_LIMIT = {FP32: 1e-3, BF16: 0.2}  # of whole blocks, where rounding adds up; what is broken is off by more
BLOCKS = [
    *(BlockCase(2, 131, 2, width, dtype, carried) for dtype in (FP32, BF16) for width in (20, 64, 128) for carried in (True, False)),
    *(BlockCase(2, 70, 1, 256, dtype, True) for dtype in (FP32, BF16)),
    *(BlockCase(13, 131, 5, 128, BF16, carried) for carried in (True, False)),  # many heads: the forward's memories are kept
    *(BlockCase(3, 1, 2, 64, dtype, True) for dtype in (FP32, BF16)),
    *(BlockCase(2, 131, 2, width, dtype, window=50) for dtype in (FP32, BF16) for width in (20, 64, 128)),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases.

    Args:
        arguments: what follows the program's name; None: `sys.argv`.

    Returns:
        The exit code: 1 where a result is wrong; compute-sanitizer gives its own for what it finds.
    """
    parser = PlainParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*OPERATORS, "block"]
    parser.add_argument("--only", default=",".join(known), help="operators, or block, separated by commas")
    names = parser.parse_args(arguments).only.split(",")
    for name in names:
        if name not in known:
            parser.error(f"--only: no operator {name}{did_you_mean(nearest_name(name, known))}")
    torch.manual_seed(0)
    where = device()
    print(machine(where), flush=True)
    missed: list[Finding] = []
    wrong = False
    with using(tuning.read_table(tuning.architecture(where.index))["kernels"]) as used:
        for case in cases(names):
            missed += [finding for finding in check(case, truth_on=torch.device("cpu")) if finding.missed]
            synchronize(where)
            print(f"ran {case}", flush=True)
        if "gated_scan" in names and where.type == "cuda":
            wrong = not newton_is_right()
            print("ran gated_scan's time-parallel form" + (": WRONG" if wrong else ""), flush=True)
        for block in BLOCKS if "block" in names else []:
            off = block.missed(where)
            wrong |= bool(off)
            print(f"ran {block}" + (f": WRONG: {', '.join(off)}" if off else ""), flush=True)
    for finding in missed:
        print(f"WRONG: {finding.tensor}: {finding.error:.1e} > {finding.limit:.0e}; {finding.case}", flush=True)
    if used:  # none on a CPU, where no kernel is launched
        print("rows of the table: " + ", ".join(f"{kernel} {name}" for kernel, name in sorted(used)))
    return 1 if missed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
