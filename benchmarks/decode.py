"""Decoding and reading a long prompt: milliseconds a token against the memory's floor, at any length of what was read.

`python benchmarks/decode.py` decodes with the 7B network on a GPU, a tiny one on a CPU, both with random weights, and writes
benchmarks/results/decode_<gpu>.json. Parity first: the decoder's logits and the network's own step against fp32. The floor is the bytes of
the weights that a token needs and of the state, read and written, over the rate of a copy in the same run. `--sweep` times tiles of the
decoding kernels as well and writes the best in the form of mmrec/decoding/tiles.json.
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
from decode_tiles import sweep

from mmrec.core.memory import BlockState
from mmrec.decoding import Decoder
from mmrec.generate import Sampling, generate, read_prompt
from mmrec.measuring.clocks import copy_rate
from mmrec.measuring.errors import relative_error
from mmrec.measuring.machine import device, machine, short_name, synchronize
from mmrec.measuring.meters import MIB, CudaMemoryMeter, MemoryMeter, ProcessMemoryMeter
from mmrec.measuring.results import write_rows
from mmrec.model import MMRecModel
from mmrec.scripts.benchmark_options import DTYPES, PRESETS, preset
from mmrec.scripts.hem_parity import built_on

RESULTS = Path(__file__).parent / "results"
STEPS = 8  # tokens whose logits are compared
WORSE = 1.5  # times as far from fp32 as the network's own step a decoder's logits may be: both round, at different places
ROUNDING = 1e-5  # what needs no comparison
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        contexts: tokens read before decoding; ascending.
        prompt: tokens of the longest prompt whose reading is measured, with its half and its quarter.
        chunk_sizes: tokens read at a time, each a measurement; the last also reads the contexts.
        batches: sequences decoded at once.
        tokens: steps timed.
    """

    contexts: tuple[int, ...]
    prompt: int
    chunk_sizes: tuple[int, ...]
    batches: tuple[int, ...]
    tokens: int


PLANS = {
    "cuda": Plan(contexts=(1, 1000, 100_000, 1_000_000), prompt=131_072, chunk_sizes=(2048, 8192), batches=(1, 2, 4, 8), tokens=100),
    "cpu": Plan(contexts=(1, 100, 300), prompt=256, chunk_sizes=(32, 64), batches=(1, 2), tokens=5),
}


@dataclass
class Run:
    """What one run of the benchmark holds.

    Attributes:
        copy_tbps: terabytes a second of a copy, read and write counted.
        rows: what was measured; written whenever some are added.
    """

    model: MMRecModel
    plan: Plan
    where: torch.device
    output: Path
    copy_tbps: float
    rows: list[Row] = field(default_factory=list)

    @property
    def meter(self) -> MemoryMeter:
        """Of the device's memory, or the process's."""
        return CudaMemoryMeter(self.where) if self.where.type == "cuda" else ProcessMemoryMeter()

    def add(self, what: str, **values: Any) -> Row:
        """Keep a row, print it, write all."""
        config = self.model.config
        sizes = {"D": config.model_dim, "H": config.heads, "L": config.num_layers}
        row = {"what": what} | values | sizes | {"copy_tbps": self.copy_tbps, **machine(self.where)}
        self.rows.append(row)
        write_rows(self.output, self.rows)
        print("  ".join(f"{name} {_short(value)}" for name, value in ({"what": what} | values).items()), flush=True)
        return row


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def weight_bytes(model: MMRecModel) -> int:
    """Bytes of the weights that a token's step reads: no planning projections; of an untied embedding one row, not counted."""
    tied = model.config.tie_embeddings
    needed = {name: p.nbytes for name, p in model.named_parameters() if "W_planning" not in name}
    return sum(size for name, size in needed.items() if tied or name != "embedding.weight")


def step_bytes(model: MMRecModel, batch: int) -> int:
    """Bytes that a step must move: the weights once, the state read and written."""
    return weight_bytes(model) + 2 * model.state_bytes(batch)


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
    state = [BlockState(own.h.repeat(batch, 1), own.M.repeat(batch, 1, 1, 1)) for own in state]
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
    agrees = errors[0] <= max(WORSE * errors[1], ROUNDING)
    run.add("parity", path=path, B=batch, error=errors[0], error_of_step=errors[1], agrees=agrees)
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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = device()
    parser.add_argument("--size", choices=PRESETS, default="7b" if where.type == "cuda" else "tiny", help="a shipped config's network")
    parser.add_argument("--precision", choices=DTYPES, default="bf16" if where.type == "cuda" else "fp32", help="of the weights")
    parser.add_argument("--longest", type=int, help="leave out contexts and prompts longer than this")
    parser.add_argument("--output", type=Path, help="the JSON file to write; default: benchmarks/results/decode_<gpu>.json")
    parser.add_argument("--sweep", action="store_true", help="time tiles of the decoding kernels too, before everything else")
    parser.add_argument("--only-sweep", action="store_true", help="and nothing else")
    parser.add_argument(
        "--sweep-output", type=Path, help="where the sweep's table goes; default: decode_tiles_<gpu>.json beside the output"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 1 where the decoder is not the network's step."""
    options = parse(arguments)
    where = device()
    torch.manual_seed(0)
    name = short_name(machine(where)["gpu"])
    output = options.output or RESULTS / f"decode_{name}.json"
    plan = PLANS[where.type]
    if options.longest:
        contexts = tuple(length for length in plan.contexts if length <= options.longest)
        plan = Plan(**vars(plan) | {"contexts": contexts or (1,), "prompt": min(plan.prompt, options.longest)})
    with built_on(where, DTYPES[options.precision]):
        model = MMRecModel(preset(options.size)).eval()
    run = Run(model.requires_grad_(False), plan, where, output, copy_rate(where))
    print(
        f"{machine(where)['gpu']}  {options.size} {options.precision}  {weight_bytes(model) / 1e9:.2f} GB, {run.copy_tbps:.2f} TB/s",
        flush=True,
    )
    if options.sweep or options.only_sweep:
        sweep(model, options.sweep_output or output.with_name(f"decode_tiles_{name}.json"), token_ms)
        if options.only_sweep:
            return 0
    agreed = [parity(run, batch) for batch in plan.batches]
    for batch in plan.batches[1:]:
        decode(run, batch, 1, None)
    decode(run, 1, 1, None, fused=False)
    whole_call(run)
    decode_after_reading(run)
    prefill(run)
    print(output)
    return 0 if all(agreed) else 1


if __name__ == "__main__":
    sys.exit(main())
