"""The fused step's kernels compile for the GPUs they are meant for, without one."""

import re
from typing import Any

import pytest
import torch
from decoding_cases import SMALL
from kernel_tools import SHARED_MEMORY, compiled_for

from mmrec.core.memory import init_state
from mmrec.decoding.fused_step import FusedStep
from mmrec.model import MMRecModel
from mmrec.scripts.hem_parity import built_on

SEVEN_B: dict[str, Any] = {"vocab_size": 32000, "model_dim": 4096}
ODD: dict[str, Any] = {"vocab_size": 50, "model_dim": 44, "num_heads": 2, "ffn_dim": 27}
WINDOW: dict[str, Any] = {"window_every": 1}
KINDS: dict[str, tuple[dict[str, Any], int, torch.dtype]] = {
    "7B": (SEVEN_B, 1, torch.bfloat16),
    "7B, four sequences": (SEVEN_B, 4, torch.bfloat16),
    "7B, eight heads": (SEVEN_B | {"num_heads": 8}, 1, torch.bfloat16),
    "7B, windows": (SEVEN_B | WINDOW, 1, torch.bfloat16),
    "7B, eight heads, windows, four sequences": (SEVEN_B | WINDOW | {"num_heads": 8}, 4, torch.bfloat16),
    "long windows": (SEVEN_B | WINDOW | {"window": 4096}, 1, torch.bfloat16),
    "DPG": (SEVEN_B | {"use_dpg": True, "pe_dim": 512}, 1, torch.bfloat16),
    "fp32, odd sizes": (ODD, 2, torch.float32),
    "fp32, odd sizes, windows": (ODD | WINDOW | {"window": 7}, 2, torch.float32),
    "windows of a token": (ODD | WINDOW | {"window": 1}, 1, torch.float32),
    "7B, windows, three taps": (SEVEN_B | WINDOW | {"window_conv": 3}, 1, torch.bfloat16),
    "7B, windows, no convolution": (SEVEN_B | WINDOW | {"window_conv": 1}, 1, torch.bfloat16),
    "fp32, odd sizes, windows, no convolution": (ODD | WINDOW | {"window": 7, "window_conv": 1}, 2, torch.float32),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("architecture", "dependent"), [(90, True), (90, False), (80, False)], ids=["hopper", "hopper-waiting", "ampere"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compile_and_fit(kind: str, architecture: int, dependent: bool) -> None:
    options, batch, dtype = KINDS[kind]
    meta = torch.device("meta")
    with built_on(meta, dtype):
        model = MMRecModel(num_layers=1, use_uboo=False, **options)
        logits = torch.empty(batch, options["vocab_size"])
    step = FusedStep(model, [init_state(model.config, batch, meta)], logits, dependent)
    assert {launch.name for launch in step.launches} == set(SMALL) - {"memory" if model.config.has_window(0) else "window"}
    for launch in step.launches:
        compiled = compiled_for(architecture, launch.kernel, launch.arguments, launch.named)
        assert compiled.metadata.shared <= SHARED_MEMORY[architecture], launch.name
        waits = compiled.asm["ptx"].count("griddepcontrol.wait")
        assert (waits > 0) == compiled.metadata.launch_pdl == dependent
        if dtype == torch.bfloat16 and launch.name not in ("memory", "projection"):  # the latter's first wait is that of the heads' logits
            early = compiled.asm["ptx"].partition("griddepcontrol.wait")[0]
            assert re.search(r"evict_first\S*\.v4\.b32", early), f"{launch.name}: no weights, 16 bytes a thread, before the wait"
