"""Loss and gradients of a small network on this machine's device against float64 on its CPU.

Relative Frobenius errors, for fp32 and bf16 weights, eager and compiled, with one projection and with six:
`python benchmarks/network_parity.py OUTPUT.json`.
"""

import json
import sys
from itertools import product
from typing import Any

import torch

from mmrec.commandline.plain_parser import PlainParser, output_file
from mmrec.measuring.errors import relative_error
from mmrec.measuring.machine import machine, software
from mmrec.model import MMRecModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parity(dtype: torch.dtype, compiled: bool, use_hem: bool, device: str) -> dict[str, Any]:
    """Errors of one setting, with fresh random inputs and documents that start within the sequences."""
    sizes = {"vocab_size": 101, "model_dim": 64, "num_layers": 3, "num_heads": 2, "pe_dim": 16, "window": 50}  # one layer of three has it
    model = MMRecModel(**sizes, use_hem=use_hem, orthogonalize=True)
    batch = {"input_ids": torch.randint(101, (2, 130)), "labels": torch.randint(-1, 101, (2, 130)), "reset": torch.rand(2, 130) < 0.05}
    exact = MMRecModel(model.config).double()
    exact.load_state_dict(model.to(dtype).state_dict())
    expected = exact.loss(batch)
    expected.loss.backward()
    if compiled:
        for block in model.blocks:
            block.compile()
    loss = model.to(device).loss({name: tensor.to(device) for name, tensor in batch.items()})
    loss.loss.backward()
    wanted = {name: parameter.grad for name, parameter in exact.named_parameters()}
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    single = {name: relative_error(gradient, wanted[name]) for name, gradient in found.items()}
    worst = max(single, key=lambda name: single[name])
    whole = relative_error(
        torch.cat([g.cpu().double().flatten() for g in found.values()]), torch.cat([g.flatten() for g in wanted.values()])
    )
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": compiled,
        "use_hem": use_hem,
        "loss_error": relative_error(loss.loss, expected.loss),
        "gradient_error": whole,
        "worst_parameter": worst,
        "worst_parameter_error": single[worst],
    }


def main() -> None:
    """Measure all settings, print a line each, write JSON."""
    parser = PlainParser(description=__doc__)
    parser.add_argument("output", type=output_file, help="the JSON file to write")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for (name, dtype), compiled, use_hem in product(DTYPES.items(), (False, True), (True, False)):
        rows.append(parity(dtype, compiled, use_hem, device))
        print(name, json.dumps(rows[-1]), file=sys.stderr, flush=True)
    arguments.output.write_text(json.dumps({**machine(torch.device(device)), **software(), "rows": rows}, indent=1) + "\n")
    print(arguments.output)


if __name__ == "__main__":
    main()
