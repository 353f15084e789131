"""What others' kernels take for the same shapes, where they can be imported.

A peer that is missing, refuses or fails is a null with its reason printed. Some tune themselves for minutes at the first call: each has
a budget of wall-clock time, and its remaining shapes are skipped once it is spent.
"""

import contextlib
import importlib
import importlib.metadata
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import FrameType

import torch
import torch.nn.functional as F
from operator_cases import Shape, Timing
from torch import Tensor

from mmrec.measuring.clocks import Clocked, kernel_ms, median_ms
from mmrec.measuring.failures import Failure, guarded, reason_of

BUDGET = 40.0  # seconds a peer may take over all shapes; what is under way then gets as long again
Prepared = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


class UnsuitableError(Exception):
    """This peer does not compute this shape."""


def _sdpa_flash(inputs: dict[str, Tensor], timing: Timing) -> Prepared:
    """Causal attention, heads outward as it wants them, by the faster of torch's two flash kernels (its own, and cuDNN's on Hopper).

    The layout is changed before the clock starts.
    """
    if timing.shape.W and timing.shape.W < timing.shape.T:
        raise UnsuitableError("it has no window")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def through(backend: SDPBackend) -> Callable[..., Tensor]:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return attention

    tensors = tuple(inputs[name].transpose(1, 2).contiguous() for name in "qkv")
    where = tensors[0].device
    taken: dict[Callable[..., Tensor], float] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        attention = through(backend)
        ms = guarded(lambda call: median_ms(lambda: call(*tensors), where, 20, 5), attention)
        if not isinstance(ms, Failure):
            taken[attention] = ms
    if not taken:
        raise UnsuitableError("neither flash kernel runs it")
    return min(taken, key=lambda attention: taken[attention]), tensors


def _flex_attention(inputs: dict[str, Tensor], timing: Timing) -> Prepared:
    """Softmax attention to the same window, compiled, without the decays. The mask's blocks are found before the clock starts."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    time, window = timing.shape.T, timing.shape.W
    if not window or window >= time:
        raise UnsuitableError("measured where the window hides something alone")
    tensors = tuple(inputs[name].transpose(1, 2).contiguous() for name in "qkv")

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < window)

    mask = create_block_mask(visible, None, None, time, time, device=tensors[0].device)
    attention = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: attention(q, k, v, block_mask=mask), tensors


def _accelerated_scan(inputs: dict[str, Tensor], timing: Timing) -> Prepared:
    """Decays in the values' dtype and time innermost, as it wants them; exponential and transposition are left out of the time."""
    try:
        module = importlib.import_module("accelerated_scan.scalar")  # from 0.3 on; `triton` before
    except ModuleNotFoundError:
        module = importlib.import_module("accelerated_scan.triton")
    x, decay = inputs["x"], inputs["log_a"].exp().to(inputs["x"].dtype)
    return module.scan, (decay.transpose(1, 2).contiguous(), x.transpose(1, 2).contiguous())


def _chunk_hgrn(inputs: dict[str, Tensor], timing: Timing) -> Prepared:
    function = importlib.import_module("fla.ops.hgrn").chunk_hgrn
    return lambda x, g: function(x, g)[0], (inputs["x"], inputs["log_a"])


def _simple_gla(inputs: dict[str, Tensor], timing: Timing) -> Prepared:
    function = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    return lambda q, k, v, g: function(q, k, v, g=g, scale=1.0)[0], tuple(inputs[name] for name in ("q", "k", "v", "log_alpha"))


def _gla(inputs: dict[str, Tensor], timing: Timing) -> Prepared:
    """One decay a key channel."""
    function = importlib.import_module("fla.ops.gla").chunk_gla
    decay = inputs["log_alpha"].unsqueeze(-1).expand(inputs["k"].shape).contiguous()
    return lambda q, k, v, g: function(q, k, v, g, scale=1.0)[0], (inputs["q"], inputs["k"], inputs["v"], decay)


def _gated_delta_rule(inputs: dict[str, Tensor], timing: Timing) -> Prepared:
    """It also erases, with a write strength a token: more work than ours. Its keys must be normalised."""
    function = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    beta = torch.rand_like(inputs["log_alpha"]).to(inputs["q"].dtype)
    q, k = (F.normalize(inputs[name], dim=-1) for name in ("q", "k"))
    return lambda q, k, v, g, b: function(q, k, v, g, b, scale=1.0)[0], (q, k, inputs["v"], inputs["log_alpha"], beta)


def _conv1d(inputs: dict[str, Tensor], timing: Timing) -> Prepared:
    """torch's own, a group a channel: gains in the values' dtype, time innermost. The layout is changed before the clock starts."""
    x, weight = inputs["x"].transpose(1, 2).contiguous(), inputs["weight"].to(inputs["x"].dtype).unsqueeze(1)
    channels, time, taps = x.shape[1], x.shape[2], weight.shape[2]
    return lambda x, w: F.conv1d(x, w, groups=channels, padding=taps - 1)[..., :time], (x, weight)


def _cumsum(inputs: dict[str, Tensor], timing: Timing) -> Prepared:
    """What a user would write: for exp_product_scan the same function, for linear_scan only the sum, without any decay."""
    if timing.operator == "linear_scan":
        return lambda x: x.cumsum(dim=1), (inputs["x"],)
    accum = timing.accum or torch.float32
    return lambda g: g.cumsum(dim=1, dtype=accum).exp().to(g.dtype), (inputs["log_gamma"],)


def _associative_scan(inputs: dict[str, Tensor], timing: Timing) -> Prepared:
    """torch's own, compiled; one shape, as its compilation is slow."""
    if timing.shape != Shape(4, 2048, 4096) or timing.gate_dtype != torch.float32:
        raise UnsuitableError("measured at B4 T2048 D4096 with fp32 gates alone")
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    @torch.compile
    def scan(x: Tensor, log_a: Tensor) -> Tensor:
        return associative_scan(combine, (log_a.exp(), x.float()), dim=1, combine_mode="pointwise")[1].to(x.dtype)

    return scan, (inputs["x"], inputs["log_a"])


# name: operators it is compared with, whether it needs no tuning at its first call, how its call is prepared
PEERS: dict[str, tuple[tuple[str, ...], bool, Callable[[dict[str, Tensor], Timing], Prepared]]] = {
    "sdpa_flash": (("memory_scan", "window_attention"), True, _sdpa_flash),
    "flex_attention": (("window_attention",), False, _flex_attention),
    "torch_cumsum": (("linear_scan", "exp_product_scan"), True, _cumsum),
    "torch_conv1d": (("short_convolution",), True, _conv1d),
    "accelerated_scan": (("linear_scan",), True, _accelerated_scan),
    "fla_chunk_hgrn": (("linear_scan",), False, _chunk_hgrn),
    "fla_simple_gla": (("memory_scan",), False, _simple_gla),
    "fla_gla": (("memory_scan",), False, _gla),
    "fla_gdn": (("memory_scan",), False, _gated_delta_rule),
    "torch_associative_scan": (("linear_scan",), False, _associative_scan),
}
PACKAGES = {"accelerated_scan": "accelerated-scan"} | dict.fromkeys(("fla_chunk_hgrn", "fla_simple_gla", "fla_gla", "fla_gdn"), "fla-core")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`, between two steps of the interpreter; nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor], cotangent: Tensor) -> Callable[[], object]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return lambda: torch.autograd.grad(function(*leaves), leaves, cotangent)


class Peers:
    """The peers chosen, and what each has used of its budget."""

    def __init__(self, chosen: str, budget: float, where: torch.device, graphs: bool = True) -> None:
        """`chosen` is "none", "fast" (those that need no tuning at their first call) or "all"; `budget` is seconds a peer.

        `graphs` as in `kernel_ms`: others' calls are timed as ours are.
        """
        self.names = [name for name, (_, fast, _) in PEERS.items() if chosen == "all" or (chosen == "fast" and fast)]
        self.budget, self.where, self.graphs = budget, where, graphs
        self.spent = dict.fromkeys(PEERS, 0.0)

    def of(self, timing: Timing) -> list[str]:
        """Those that compute what this row computes; a decoding step has none."""
        return [name for name in self.names if timing.operator in PEERS[name][0] and timing.shape.T > 1]

    def measure(self, name: str, timing: Timing, inputs: dict[str, Tensor]) -> tuple[dict[str, Clocked | None], str | None]:
        """Times by direction, and why one of them is null; the reason is printed too."""
        found: dict[str, Clocked | None] = dict.fromkeys(timing.directions)
        reason = None
        begin = time.monotonic()
        try:
            if self.spent[name] > self.budget:
                raise UnsuitableError(f"its {self.budget:.0f} s are spent")
            with time_limit(2 * self.budget - self.spent[name]):
                function, tensors = PEERS[name][2](inputs, timing)
                sets = [tensors, tuple(tensor.clone() for tensor in tensors)]  # as ours: what a call left in the cache serves not the next
                with torch.no_grad():
                    cotangent = torch.randn_like(function(*tensors))
                    found["fwd"] = kernel_ms([partial(function, *tensors) for tensors in sets], self.where, self.graphs)
                if "fwdbwd" in found:
                    found["fwdbwd"] = kernel_ms([_gradients(function, tensors, cotangent) for tensors in sets], self.where, self.graphs)
        except Exception as error:  # somebody else's code: whatever it raises is the reason there is no figure
            reason = str(error) if isinstance(error, UnsuitableError) else reason_of(error)
            missing = ", ".join(direction for direction, ms in found.items() if ms is None)
            print(f"no figure of {name} for {timing.operator} {timing.shape} {missing}: {reason}", flush=True)
        self.spent[name] += time.monotonic() - begin
        return found, reason


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """Of the packages that the named peers come from beside torch; null where one is not installed."""
    found: dict[str, str | None] = {}
    for package in sorted({PACKAGES[name] for name in names if name in PACKAGES}):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
