"""Decoding and reading a long prompt: milliseconds a token against the memory's floor, at any length of what was read.

`python benchmarks/decode.py` decodes with the 7B network on a GPU, random weights, and writes benchmarks/results/decode_<gpu>.json; on a
CPU `--size tiny --output FILE` tries it. Parity first: the decoder's logits and the network's own step against fp32. The floor is the
bytes of the weights that a token needs and of the state, read and written (of a window, and of what is convolved before it, each token
one or the other), over the rate of a copy in the same run. `--sweep` times tiles of the decoding kernels as well and writes the best in
the form of mmrec/decoding/tiles.json.
"""

import argparse
import copy
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from decode_options import Plan, limit_of, parse, plan_for, require_same_size
from decode_tiles import require_kernels, sweep

from mmrec.commandline.errors import one_line_errors
from mmrec.commandline.plain_parser import command_line
from mmrec.commandline.sheets import Sheet, show
from mmrec.core.memory import BlockState
from mmrec.decoding import Decoder
from mmrec.generate import Sampling, generate, read_prompt
from mmrec.measuring.clocks import copy_rate
from mmrec.measuring.errors import relative_error
from mmrec.measuring.machine import device, machine, synchronize
from mmrec.measuring.meters import MIB, CudaMemoryMeter, MemoryMeter, ProcessMemoryMeter
from mmrec.measuring.results import write_rows
from mmrec.model import MMRecModel
from mmrec.scripts.benchmark_options import DTYPES, preset
from mmrec.scripts.device_memory import require_decoding_room
from mmrec.scripts.hem_parity import built_on

STEPS = 8  # tokens whose logits are compared
PROGRAM = "python benchmarks/decode.py"
Row = dict[str, Any]


@dataclass
class Run:
    """What one run of the benchmark holds.

    Attributes:
        copy_tbps: terabytes a second of a copy, read and write counted.
        told: what every row says of the network and the command.
        rows: what was measured; written whenever some are added.
    """

    model: MMRecModel
    plan: Plan
    where: torch.device
    output: Path
    copy_tbps: float
    told: Row
    rows: list[Row] = field(default_factory=list)

    @property
    def meter(self) -> MemoryMeter:
        """Of the device's memory, or the process's."""
        return CudaMemoryMeter(self.where) if self.where.type == "cuda" else ProcessMemoryMeter()

    def add(self, what: str, **values: Any) -> Row:
        """Keep a row, print it, write all."""
        config = self.model.config
        sizes = {"D": config.model_dim, "H": config.heads, "L": config.num_layers, "windows": config.num_windows}
        row = {"what": what} | values | sizes | {"copy_tbps": self.copy_tbps, **machine(self.where), **self.told}
        self.rows.append(row)
        write_rows(self.output, self.rows)
        shown = {name: value for name, value in values.items() if name in _PROGRESS and value is not None}
        print("  ".join([what, *(f"{name} {_short(value)}" for name, value in shown.items())]), flush=True)
        return row


_PROGRESS = ("path", "B", "context", "chunk_size", "error", "limit", "agrees", "ms", "tokens_per_s")  # the rest is in the table


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def weight_bytes(model: MMRecModel) -> int:
    """Bytes of the weights that a token's step reads: no planning projections; of an untied embedding one row, not counted."""
    tied = model.config.tie_embeddings
    needed = {name: p.nbytes for name, p in model.named_parameters() if "W_planning" not in name}
    return sum(size for name, size in needed.items() if tied or name != "embedding.weight")


def step_bytes(model: MMRecModel, batch: int) -> int:
    """Bytes that a step must move: the weights once; the state read and written, but of a window W − 1 tokens read and one written.

    Of q and k before a window's convolution likewise: J − 1 tokens read and one written.
    """
    config, size = model.config, model.embedding.weight.itemsize
    windows = config.num_windows
    carried = 4 * config.model_dim * (config.num_layers + (config.num_layers - windows) * config.head_dim)
    tokens = windows * config.window * (2 * config.model_dim * size + 4 * config.heads)
    convolved = windows * config.window_conv * 2 * config.model_dim * size if config.window_conv > 1 else 0
    return weight_bytes(model) + batch * (2 * carried + tokens + convolved)


def token_ms(step: Callable[[], Any], where: torch.device, count: int) -> float:
    """Median milliseconds of a step among `count` in a row, by marks of the device between them; a fifth more run before."""
    for _ in range(max(1, count // 5)):
        step()
    synchronize(where)
    if where.type == "cpu":
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            step()
            times.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(times)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    synchronize(where)
    return statistics.median(before.elapsed_time(after) for before, after in itertools.pairwise(marks))


def random_tokens(model: MMRecModel, batch: int, length: int) -> torch.Tensor:
    """(batch, length) ids."""
    return torch.randint(model.config.vocab_size, (batch, length), device=model.embedding.weight.device)


@torch.inference_mode()
def read_on(model: MMRecModel, state: list[BlockState], length: int, chunk_size: int) -> list[BlockState]:
    """The state after `length` more random tokens, as `read_prompt` reads them."""
    for start in range(0, length, chunk_size):
        _, state = model.hidden_states(random_tokens(model, 1, min(chunk_size, length - start)), state=state)
    return state


@torch.inference_mode()
def parity(run: Run, batch: int) -> bool:
    """Whether the decoder's logits are as near to those of an fp32 copy as the network's own step's."""
    model = run.model
    exact = copy.deepcopy(model).float()
    state = read_on(model, model.init_state(1), 64, 64)
    many = model.init_state(batch)
    for own, given in zip(many, state, strict=True):
        for tensor, value in zip(own.kept(), given.kept(), strict=True):
            tensor.copy_(value.expand_as(tensor))
    state = many
    given = random_tokens(model, batch, STEPS).unbind(1)
    own_state, true_state = state, state
    own, truth = [], []
    for token in given:
        logits, own_state = model.step(token, own_state)
        own.append(logits)
        logits, true_state = exact.step(token, true_state)
        truth.append(logits)
    with Decoder(model, batch) as decoder:
        decoder.load(state)
        found = torch.stack([decoder.step(token).clone() for token in given])
        path = _path(decoder)
    errors = [relative_error(logits, torch.stack(truth)) for logits in (found, torch.stack(own))]
    limit = limit_of(errors[1])
    agrees = errors[0] <= limit
    run.add("parity", path=path, B=batch, error=errors[0], error_of_step=errors[1], limit=limit, agrees=agrees)
    return agrees


def _path(decoder: Decoder) -> str:
    return "fused" if decoder.fused else "modules"


def decode(run: Run, batch: int, context: int, state: list[BlockState] | None, fused: bool | None = None) -> Row:
    """Time steps of greedy decoding after `context` tokens, whose state is given."""
    model, where, meter = run.model, run.where, run.meter
    gc.collect()
    meter.reset_peak()
    with Decoder(model, batch, fused=fused, greedy=True) as decoder:
        if state is not None:
            decoder.load(state)
        decoder.step(random_tokens(model, batch, 1)[:, 0])
        ms = token_ms(decoder.advance, where, run.plan.tokens)
        finite = bool(decoder.logits.isfinite().all())
        moved, peak, path = step_bytes(model, batch), meter.read()["peak"], _path(decoder)
    if not finite:
        raise RuntimeError(f"logits after {context} tokens are not finite")
    floor = moved / run.copy_tbps / 1e9
    figures = {"ms": ms, "floor_ms": floor, "share_of_floor": floor / ms, "tokens_per_s": batch / ms * 1e3}
    return run.add("decode", path=path, B=batch, context=context, chunk_size=None, **figures, peak_mib=peak / MIB, bytes=moved)


def decode_after_reading(run: Run) -> None:
    """Decode one sequence after more and more was read."""
    state, read = run.model.init_state(1), 0
    for context in run.plan.contexts:
        state = read_on(run.model, state, context - read, run.plan.chunk_sizes[-1])
        read = context
        decode(run, 1, context, state)


def whole_call(run: Run) -> None:
    """Milliseconds a token of `generate` by the wall clock: the host, the choice of the token and its way back included."""
    count = run.plan.tokens
    found = generate(run.model, [1], Sampling(temperature=0.0, max_new_tokens=count + 2))
    next(found), next(found)  # the graph is captured in between
    begin = time.perf_counter()
    produced = sum(1 for _ in found)
    ms = (time.perf_counter() - begin) * 1e3 / produced
    run.add("generate", path="wall clock", B=1, context=1, chunk_size=None, ms=ms, tokens_per_s=1e3 / ms)


def prefill(run: Run) -> None:
    """Read a prompt, its half and its quarter: tokens a second and the peak of memory, which must not grow with the length."""
    model, plan = run.model, run.plan
    for chunk_size in plan.chunk_sizes:
        read_on(model, model.init_state(1), chunk_size, chunk_size)  # compiles
        for length in sorted({max(1, plan.prompt // part) for part in (4, 2, 1)}):
            prompt = random_tokens(model, 1, length)[0].tolist()
            gc.collect()
            synchronize(run.where)
            run.meter.reset_peak()
            begin = time.perf_counter()
            with torch.inference_mode():
                read_prompt(model, prompt, chunk_size)
            synchronize(run.where)
            ms = (time.perf_counter() - begin) * 1e3
            peak = run.meter.read()["peak"] / MIB
            run.add(
                "prefill", path="chunks", B=1, context=length, chunk_size=chunk_size, ms=ms, tokens_per_s=length / ms * 1e3, peak_mib=peak
            )


def table(rows: Sequence[Row]) -> Sheet:
    """The rows for a terminal."""
    lines = [
        (
            f"{row['what']}, {row['path']}",
            *("–" if row.get(key) is None else format(row[key] * factor, form) for key, factor, form in _SHOWN),
        )
        for row in rows
        if row["what"] != "parity"
    ]
    titles = ("B", "tokens read", "chunk", "ms", "floor, ms", "share of it, %", "tokens/s", "peak MiB")
    return Sheet("Decoding and reading prompts", ("what",), titles, lines)


_SHOWN = (
    ("B", 1, "d"),
    ("context", 1, ",d"),
    ("chunk_size", 1, ",d"),
    ("ms", 1, ",.3f"),
    ("floor_ms", 1, ",.3f"),
    ("share_of_floor", 100, ".0f"),
    ("tokens_per_s", 1, ",.0f"),
    ("peak_mib", 1, ",.0f"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 1 where the decoder is not the network's step. What is refused ends in one line and exit code 2."""
    options = parse(__doc__, arguments)
    with one_line_errors():
        return measure(options, command_line(PROGRAM, arguments))


def measure(options: argparse.Namespace, command: str) -> int:
    """Measure what the options ask for; the exit code."""
    where = device()
    plan = plan_for(where.type, options.longest)
    config = preset(options.size)
    require_decoding_room(options.size, options.precision, where, plan.chunk_sizes[-1], plan.batches[-1])
    if not options.only_sweep:
        require_same_size(options.output, options.size, options.precision, config)
    torch.manual_seed(0)
    with built_on(where, DTYPES[options.precision]):
        model = MMRecModel(config).eval().requires_grad_(False)
    if options.sweep or options.only_sweep:
        require_kernels(model)
    told = {"size": options.size, "precision": options.precision, "command": command}
    run = Run(model, plan, where, options.output, copy_rate(where), told)
    print(
        f"{machine(where)['gpu']}\n{options.size} {options.precision}  {weight_bytes(model) / 1e9:.2f} GB, {run.copy_tbps:.2f} TB/s",
        flush=True,
    )
    if options.sweep or options.only_sweep:
        sweep(model, options.sweep_output, token_ms)
        if options.only_sweep:
            return 0
    agreed = [parity(run, batch) for batch in plan.batches]
    for batch in plan.batches[1:]:
        decode(run, batch, 1, None)
    decode(run, 1, 1, None, fused=False)
    whole_call(run)
    decode_after_reading(run)
    prefill(run)
    show(table(run.rows))
    print(options.output)
    return 0 if all(agreed) else 1


if __name__ == "__main__":
    sys.exit(main())
