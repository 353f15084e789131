"""What both benchmarks do: parity, calls of a block and of a network, their times in turn, and a row for each."""

import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmrec.blocks.mm_rec_block import MMRecBlock
from mmrec.measuring.clocks import Clocked, kernel_ms
from mmrec.measuring.errors import LIMITS, WINDOW_LIMITS
from mmrec.measuring.machine import synchronize
from mmrec.measuring.marks import Clock, CudaClock, HostClock
from mmrec.measuring.meters import MIB, CudaMemoryMeter, MemoryMeter, ProcessMemoryMeter
from mmrec.model import MMRecModel
from mmrec.scripts.benchmark_options import Settings, memory_of
from mmrec.scripts.dram_traffic import DramBytes, dram_bytes
from mmrec.scripts.hem_parity import BlockPair, built_on, parity_errors
from mmrec.scripts.launches import count_launches
from mmrec.scripts.matrix_products import Product, products_call, products_of, projection_traffic
from mmrec.scripts.plain_passes import with_plain_passes

Row = dict[str, Any]
Call = Callable[[], Any]
Advance = Callable[[str], None]
DIRECTIONS = ("fwd", "fwdbwd")
# A GPU at its power limit settles within some tenths of a second; before, products alone run faster than they could for long, and a block,
# which draws less power, does not.
_SETTLING_MS, _REPEAT_MS = 300, 200
FUSED_REST = "_six_gemms_fused_rest"  # of a row's name: HEM off, but the passes around it as with HEM on


@dataclass(frozen=True)
class Subject:
    """A block or a network, ready to be timed.

    Attributes:
        what: the name of its rows.
        module: the block or the network.
        memory: of MEMORIES, a block's; None: a network's, whose layers differ.
        hem: whether its projections are fused.
        calls: by direction.
        products: its matrix products.
        projections: its HEM modules, one a layer.
    """

    what: str
    module: nn.Module
    memory: str | None
    hem: bool
    calls: Mapping[str, Call]
    products: Sequence[Product]
    projections: Sequence[nn.Module]


class Timed(NamedTuple):
    """Median of the rounds, and the medians of the fastest and the slowest round, in milliseconds."""

    clocked: Clocked
    fastest: float
    slowest: float


def block_subject(settings: Settings, block: MMRecBlock, x: Tensor, cotangent: Tensor) -> Subject:
    """A block's forward, and its forward with the gradients of its input and of every parameter."""
    uboo = settings.config.use_uboo
    leaf = x.detach().clone().requires_grad_()
    wanted = [leaf, *(parameter for parameter in block.parameters() if parameter.requires_grad)]

    @torch.no_grad()
    def forward() -> Any:
        return block(x, return_auxiliary_loss=uboo)

    def both() -> Any:
        y, planning = block(leaf, return_auxiliary_loss=True)
        outputs, cotangents = ([y, planning.mean()], [cotangent, None]) if uboo else ([y], [cotangent])
        return torch.autograd.grad(outputs, wanted, cotangents)

    calls = {"fwd": forward, "fwdbwd": both}
    products = products_of(block, settings.tokens)
    return Subject("block", block, memory_of(block.has_window), block.use_hem, calls, products, [_projections(block)])


def _projections(block: MMRecBlock) -> nn.Module:
    """What runs the projections: the one `nn.Linear`, or the module of six."""
    fused = getattr(block.projections, "W_fused", None)
    return block.projections if fused is None else fused


def with_eager_rest(subject: Subject) -> Subject:
    """The same, its element-wise passes in plain PyTorch."""
    return replace(subject, calls={direction: with_plain_passes(call) for direction, call in subject.calls.items()})


def model_subject(settings: Settings, model: MMRecModel, input_ids: Tensor) -> Subject:
    """The forward of all layers, the embedding and the head, to the logits of every token."""
    blocks = [block for block in model.blocks if isinstance(block, MMRecBlock)]

    @torch.no_grad()
    def forward() -> Any:
        return model(input_ids, return_auxiliary_loss=settings.config.use_uboo)

    products, projections = products_of(model, settings.tokens), [_projections(block) for block in blocks]
    return Subject(settings.forward_name, model, None, blocks[0].use_hem, {"fwd": forward}, products, projections)


def build_model(settings: Settings, use_hem: bool) -> MMRecModel:
    """The network with random weights, made on the device in the precision asked for."""
    with built_on(settings.where, settings.dtype):
        return MMRecModel(replace(settings.config, use_hem=use_hem)).eval()


def fuse_all(model: MMRecModel) -> None:
    """Fuse every block's projections; nothing here has an optimiser that would have to follow."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="set_hem changed the parameters")
        model.set_hem(True)


def draw(settings: Settings) -> tuple[Tensor, Tensor]:
    """A block's input and its output's gradient, (B, T, D) each."""
    shape = (2, settings.batch, settings.seq_len, settings.config.model_dim)
    x, cotangent = torch.randn(shape, device=settings.where, dtype=settings.dtype)
    return x, cotangent


def draw_ids(settings: Settings) -> Tensor:
    """Token ids, (B, T)."""
    return torch.randint(settings.config.vocab_size, (settings.batch, settings.seq_len), device=settings.where)


def in_turn(calls: Mapping[Any, Call], settings: Settings, advance: Advance) -> dict[Any, Timed]:
    """Time the calls in turn, round after round, so that a device that slows down slows all of them."""
    rounds: dict[Any, list[Clocked]] = {name: [] for name in calls}
    for _ in range(settings.repeat):
        for name, call in calls.items():
            rounds[name].append(kernel_ms([call], settings.where, repeat_ms=_REPEAT_MS, warmup_ms=_SETTLING_MS))
            advance(str(name))
    return {name: _joined(clocked) for name, clocked in rounds.items()}


def _joined(rounds: Sequence[Clocked]) -> Timed:
    """The medians of the rounds; of rounds with and without a graph only those with one."""
    alike = [clocked for clocked in rounds if clocked.replayed] or list(rounds)
    ms, alone, eager = (statistics.median(clocked[field] for clocked in alike) for field in range(3))
    times = [clocked.ms for clocked in alike]
    return Timed(Clocked(ms, alone, eager, alike[0].replayed), min(times), max(times))


def timings_count(settings: Settings, subjects: Sequence[Subject]) -> int:
    """How often `rows_of` will advance."""
    return 2 * settings.repeat * sum(len(subject.calls) for subject in subjects)


def rows_of(settings: Settings, place: Row, subjects: Sequence[Subject], advance: Advance) -> list[Row]:
    """Rows of subjects that are timed against each other, a direction and a subject each."""
    rows = []
    for direction in (name for name in DIRECTIONS if name in subjects[0].calls):
        calls: dict[Any, Call] = {}
        for subject in subjects:
            what = subject.what.replace(FUSED_REST, ", fused") + (f", {subject.memory}" if subject.memory else "")
            label = f"{what} {direction}, {'HEM' if subject.hem else 'six'}"
            calls[label] = subject.calls[direction]
            calls[f"{label}: products"] = products_call(subject.products, direction)
        timed = list(in_turn(calls, settings, advance).values())
        for index, subject in enumerate(subjects):
            rows.append(_row(settings, place, subject, direction, timed[2 * index], timed[2 * index + 1].clocked.ms))
    return with_reductions(rows)


def _row(settings: Settings, place: Row, subject: Subject, direction: str, timed: Timed, products_ms: float) -> Row:
    config, where = settings.config, settings.where
    layers = len(subject.projections)
    traffic = projection_traffic(config, settings.tokens, settings.dtype.itemsize, subject.hem, direction)
    launches = count_launches(subject.calls[direction], subject.projections, where)
    read = dram_bytes(settings, subject.hem) if direction == "fwd" and layers == 1 else DramBytes(None, "read for one block's forward")
    return base_row(settings, place, subject.what, subject.hem, direction, timed.clocked.ms, subject.memory) | {
        "gemm_only_ms": products_ms,
        "launches": launches.marked,
        "tokens_per_s": settings.tokens / timed.clocked.ms * 1e3,
        "peak_mib": peak_mib(subject, direction, where),
        "bytes": layers * traffic.total,
        "of_gemm_only": timed.clocked.ms / products_ms,
        "replayed": timed.clocked.replayed,
        "alone_ms": timed.clocked.alone_ms,
        "eager_ms": timed.clocked.eager_ms,
        "fastest_ms": timed.fastest,
        "slowest_ms": timed.slowest,
        "launched": sorted(set(launches.names)),
        "kernels": launches.total,
        "bytes_weights": layers * traffic.times * traffic.weights,
        "bytes_inputs": layers * traffic.times * traffic.inputs,
        "bytes_outputs": layers * traffic.times * traffic.outputs,
        "bytes_ncu": read.total,
        "bytes_ncu_reason": read.reason,
    }


def base_row(settings: Settings, place: Row, what: str, hem: bool, direction: str, ms: float | None, memory: str | None) -> Row:
    """The keys that every row has, in their order; what a row has no figure for is None."""
    config = settings.config
    unknown = dict.fromkeys(("gemm_only_ms", "launches", "tokens_per_s", "peak_mib", "bytes", "reduction_pct"))
    shape = {"what": what, "B": settings.batch, "T": settings.seq_len, "D": config.model_dim, "H": config.heads}
    kind = {"hem": hem, "uboo": config.use_uboo, "direction": direction, "ms": ms}
    sizes = {"P": config.pe_width, "F": config.ffn_width, "L": config.num_layers, "V": config.vocab_size, "precision": settings.precision}
    return shape | kind | unknown | place | sizes | {"memory": memory}


def with_reductions(rows: list[Row]) -> list[Row]:
    """The rows, with `reduction_pct` where the same was timed with HEM off and the rest eager: 100 · (1 − ms / off)."""
    off = {(row["what"], row["memory"], row["direction"]): row["ms"] for row in rows if not row["hem"]}
    for row in rows:
        before = off.get((row["what"].removesuffix(FUSED_REST), row["memory"], row["direction"]))
        if (row["hem"] or row["what"].endswith(FUSED_REST)) and row["ms"] is not None and before is not None:
            row["reduction_pct"] = 100 * (1 - row["ms"] / before)
    return rows


def parity_row(settings: Settings, place: Row, pair: BlockPair, x: Tensor, cotangent: Tensor) -> Row:
    """The error of one projection against six that is nearest to its limit, the limits, and which quantities miss theirs.

    `limit` is that of all quantities but those in `limits`.
    """
    has_window = pair.off.has_window
    errors, limit = parity_errors(pair, x, cotangent), LIMITS[settings.dtype]
    limits = WINDOW_LIMITS.get(settings.dtype, {}) if has_window else {}
    missed = {name: error for name, error in errors.items() if not error <= limits.get(name, limit)}
    worst = max(missed or errors, key=lambda name: errors[name] / limits.get(name, limit))
    verdict = {"parity": "missed" if missed else "ok", "limit": limit, "limits": limits, "largest": errors[worst], "of": worst}
    base = base_row(settings, place, "parity", True, "fwdbwd", None, memory_of(has_window))
    return base | verdict | {"errors": errors, "missed": sorted(missed)}


def peak_mib(subject: Subject, direction: str, where: torch.device) -> float:
    """Peak of one call in MiB: on a GPU the subject's weights and what the call allocated at most, on a CPU the process's resident set."""
    meter: MemoryMeter = CudaMemoryMeter(where) if where.type == "cuda" else ProcessMemoryMeter()
    subject.calls[direction]()
    synchronize(where)
    meter.reset_peak()
    before = meter.read()
    subject.calls[direction]()
    synchronize(where)
    peak = meter.read()["peak"]
    if where.type == "cuda":  # others' weights lie there too: of the other form of the block, of the products' operands
        peak += sum(parameter.nbytes for parameter in subject.module.parameters()) - before["allocated"]
    return peak / MIB


def module_latencies(modules: Sequence[nn.Module], call: Call, settings: Settings) -> list[float]:
    """Median milliseconds of each module's forward within `call`, so that each is timed with the input it really gets.

    On a GPU between two events on its stream: where the device waits for the host, that time is in it.
    """
    clock: Clock = CudaClock() if settings.where.type == "cuda" else HostClock()
    starts: dict[nn.Module, list[Any]] = {module: [] for module in modules}
    ends: dict[nn.Module, list[Any]] = {module: [] for module in modules}
    call()
    handles = [module.register_forward_pre_hook(lambda module, *_: starts[module].append(clock.mark())) for module in modules]
    handles += [module.register_forward_hook(lambda module, *_: ends[module].append(clock.mark())) for module in modules]
    try:
        for _ in range(5 * settings.repeat):
            call()
    finally:
        for handle in handles:
            handle.remove()
    synchronize(settings.where)
    return [statistics.median(map(clock.elapsed_ms, starts[module], ends[module])) for module in modules]


def layer_rows(settings: Settings, place: Row, model: MMRecModel, call: Call) -> list[Row]:
    """A row for the embedding, every layer, the last norm and the head, each with its share of the forward's time."""
    modules = [model.embedding, *model.blocks, model.norm, model.head]
    names: Iterable[str] = ["embedding", *["layer"] * len(model.blocks), "norm", "head"]
    memories = [memory_of(block.has_window) if isinstance(block, MMRecBlock) else None for block in modules]
    times = module_latencies(modules, call, settings)
    rows = []
    for index, (name, memory, ms) in enumerate(zip(names, memories, times, strict=True)):
        more = {"layer": index - 1 if name == "layer" else None, "tokens_per_s": settings.tokens / ms * 1e3, "share": ms / sum(times)}
        rows.append(base_row(settings, place, name, True, "fwd", ms, memory) | more)
    return rows
