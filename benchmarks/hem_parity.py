"""One block with six projections against its fused copy, outputs and gradients, on the CPU.

`python benchmarks/hem_parity.py OUTPUT.json`. Relative Frobenius errors; the gradients of W_e, b_e, W_p and b_p by the
relations of docs/math.md.
"""

import json

import torch

from mmrec.commandline.plain_parser import PlainParser, output_file
from mmrec.config import MMRecConfig
from mmrec.measuring.machine import machine, software
from mmrec.scripts.hem_parity import block_pair, parity_errors


def parity(dtype: torch.dtype, pe_dim: int, model_dim: int = 256) -> dict[str, float]:
    """Errors of the fused block by quantity, the unfused one being the reference."""
    pair = block_pair(MMRecConfig(model_dim=model_dim, num_heads=2, pe_dim=pe_dim, num_layers=1), torch.device("cpu"), dtype)
    return parity_errors(pair, *torch.randn(2, 2, 65, model_dim, dtype=dtype))


def main() -> None:
    """Measure, write JSON, print the largest error of each setting."""
    parser = PlainParser(description=__doc__)
    parser.add_argument("output", type=output_file, help="the JSON file to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.float64):
        for pe_dim in (256, 64):
            errors = parity(dtype, pe_dim)
            worst = max(errors, key=lambda name: errors[name])
            rows.append(
                {"dtype": str(dtype).removeprefix("torch."), "pe_dim": pe_dim, "largest": errors[worst], "of": worst, "errors": errors}
            )
            print(rows[-1]["dtype"], pe_dim, worst, f"{errors[worst]:.2e}", f"output {errors['output']:.2e}", f"dx {errors['dx']:.2e}")
    arguments.output.write_text(json.dumps({**machine(torch.device("cpu")), **software(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
