"""The four recurrences of MM-Rec, attention to the recent past, and the elementwise passes around them.

Every operator is a folder: `naive.py` is the truth, a plain loop where it is a recurrence; `kernels*.py` are the Triton kernels, which run
on CUDA and, with `TRITON_INTERPRET=1` set before Python starts, on a CPU; `pytorch.py` is what runs on a CPU otherwise, and for float64
everywhere. States and log-decays are fp32 inside, whatever the inputs' dtype. `adamw_8bit` is an optimiser's step: a kernel alone.
"""

from mmrec.ops.decay_log import decay_log
from mmrec.ops.exp_product_scan import exp_product_scan
from mmrec.ops.gated_read_out import gated_read_out
from mmrec.ops.gated_scan import gated_scan, gated_scan_from_logits
from mmrec.ops.head_decay import head_decay
from mmrec.ops.linear_scan import linear_scan
from mmrec.ops.memory_address import memory_address
from mmrec.ops.memory_scan import memory_scan
from mmrec.ops.planning_error import planning_error
from mmrec.ops.rms_norm import rms_norm, rms_norm_branch
from mmrec.ops.short_convolution import short_convolution
from mmrec.ops.swiglu import swiglu
from mmrec.ops.window_attention import WindowState, window_attention

__all__ = [
    "WindowState",
    "decay_log",
    "exp_product_scan",
    "gated_read_out",
    "gated_scan",
    "gated_scan_from_logits",
    "head_decay",
    "linear_scan",
    "memory_address",
    "memory_scan",
    "planning_error",
    "rms_norm",
    "rms_norm_branch",
    "short_convolution",
    "swiglu",
    "window_attention",
]
