"""One block with six projections against its fused copy, outputs and gradients, on the CPU.

`python benchmarks/hem_parity.py OUTPUT.json`. Relative Frobenius errors; the gradients of W_e, b_e, W_p and b_p by the
relations of docs/math.md.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from curves import machine
from network_parity import relative_error

from mmrec.blocks.mm_rec_block import MMRecBlock


def parity(dtype: torch.dtype, pe_dim: int, model_dim: int = 256) -> dict[str, float]:
    """Errors of the fused block by quantity, the unfused one being the reference."""
    off = MMRecBlock(model_dim=model_dim, num_heads=2, use_hem=False, pe_dim=pe_dim).to(dtype)
    with torch.no_grad():
        for linear in off.projections.children():
            linear.bias.normal_(std=0.1)
    on = copy.deepcopy(off)
    on.set_hem(True)
    x, weight = torch.randn(2, 65, model_dim, dtype=dtype), torch.randn(2, 65, model_dim, dtype=dtype)
    found = {}
    for block in (off, on):
        leaf = x.clone().requires_grad_()
        y, planning = block(leaf, return_auxiliary_loss=True)
        ((y * weight).sum() + planning.mean()).backward()
        found[block] = {"output": y, "L_aux": planning.mean(), "dx": leaf.grad} | {
            name: parameter.grad for name, parameter in block.named_parameters() if not name.startswith("projections.")
        }
    found[off] |= {name: parameter.grad for name, parameter in off.projections.named_parameters()}
    dW = on.projections.W_fused.weight.grad.split(on.projections.widths)
    db = on.projections.W_fused.bias.grad.split(on.projections.widths)
    W_p, b_p, W_e = off.projections.W_p.weight, off.projections.W_p.bias, off.projections.W_e.weight
    found[on] |= {f"W_{name}.weight": dW[index] for index, name in enumerate("qkvz")}
    found[on] |= {f"W_{name}.bias": db[index] for index, name in enumerate("qkvz")}
    found[on] |= {"W_e.weight": dW[5] @ W_p.T + torch.outer(db[5], b_p), "W_e.bias": db[5]}
    found[on] |= {"W_p.weight": dW[4] + W_e.T @ dW[5], "W_p.bias": db[4] + W_e.T @ db[5]}
    return {name: relative_error(found[on][name], expected.double()) for name, expected in found[off].items()}


def main() -> None:
    """Measure, write JSON, print the largest error of each setting."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("output", type=Path, help="the JSON file to write")
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
    arguments.output.write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
