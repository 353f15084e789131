"""Which tiles make the decoding kernels fastest: each kernel of all layers, one after another in one graph, by candidate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmrec.commandline.errors import BadInputError
from mmrec.core.memory import BlockState
from mmrec.decoding import Decoder, tiles
from mmrec.decoding.fused_step import FusedStep, Launch
from mmrec.decoding.support import unsupported
from mmrec.files import write_atomically
from mmrec.measuring.errors import relative_error
from mmrec.measuring.failures import Failure, guarded
from mmrec.measuring.machine import machine
from mmrec.model import MMRecModel

# Outputs a program, words at a time, warps. At 128 words a warp, a thread's piece of a row is 16 bytes, or a multiple.
PRODUCTS = [
    (1, 512, 4), (2, 512, 4), (4, 512, 4), (8, 512, 4), (16, 512, 4), (2, 1024, 4), (4, 1024, 4), (8, 1024, 4),
    (1, 1024, 8), (2, 1024, 8), (4, 1024, 8), (2, 2048, 8), (4, 256, 2), (8, 256, 2),
]  # fmt: skip
MEMORIES = [(16, 4), (32, 4), (32, 8), (64, 4), (64, 8), (128, 8), (128, 16)]  # columns a program, warps
WINDOWS = [(32, 4), (32, 8), (64, 4), (128, 8), (128, 16), (256, 16)]  # slots a program, warps
REPEATS = 12  # launches of a kernel that a network has once, so that the host keeps ahead
KEEP = 0.99  # the present tiles stay unless others take less than this share of their time
TIMED = 15  # replays
Clock = Callable[[Callable[[], Any], torch.device, int], float]
Options = dict[str, int]


def candidates(kernel: str) -> list[Options]:
    """Options to try, the present ones not among them."""
    if kernel == "memory":
        return [{"BV": columns, "num_warps": warps} for columns, warps in MEMORIES]
    if kernel == "window":
        return [{"BN": slots, "num_warps": warps} for slots, warps in WINDOWS]
    return [{"R": rows, "BW": words, "num_warps": warps} for rows, words, warps in PRODUCTS]


def launches(model: MMRecModel, state: list[BlockState], logits: torch.Tensor, kernel: str) -> list[Launch]:
    """A kernel's launches of all layers; none where no layer has it."""
    found = [launch for launch in FusedStep(model, state, logits).launches if launch.name == kernel]
    return found if len(found) > 1 else found * REPEATS


@torch.inference_mode()
def replayed_us(calls: list[Launch], where: torch.device, clock: Clock) -> float:
    """Microseconds of a launch among the given ones, replayed in a row; on a CPU, through the interpreter, of one call."""
    if where.type == "cpu":
        return clock(calls[0].run, where, 1) * 1e3
    for call in calls[:2]:
        call.run()
    torch.cuda.synchronize(where)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call.run()
    ms = clock(graph.replay, where, TIMED)
    graph.reset()
    return ms * 1e3 / len(calls)


def whole_step(model: MMRecModel, table: dict[str, Any], clock: Clock) -> tuple[float, float]:
    """Milliseconds of a step with the given kernels' options and `PDL`, and how far its logits are from those of the network's own step."""
    where = model.embedding.weight.device
    token = torch.ones(1, dtype=torch.int64, device=where)
    with tiles.overridden(**table), Decoder(model, fused=True, greedy=True) as decoder:
        found = decoder.step(token).clone()
        ms = clock(decoder.advance, where, 1 if where.type == "cpu" else TIMED)
    with torch.inference_mode():
        expected, _ = model.step(token, model.init_state(1))
    return ms, relative_error(found, expected)


def require_kernels(model: MMRecModel, batch: int = 1) -> None:
    """Raise where the kernels cannot run.

    Raises:
        BadInputError: with the reason.
    """
    if reason := unsupported(model, batch):
        raise BadInputError(f"no sweep: {reason}; the decoding kernels want a GPU and the fused projection")


def sweep(model: MMRecModel, output: Path, clock: Clock, batch: int = 1) -> dict[str, Any]:
    """Time all candidates and write a table in the form of tiles.json, with all timings.

    Args:
        model: the network whose shapes count, on the device that counts.
        output: the JSON file to write.
        clock: median milliseconds of a call on a device, among so many.
        batch: sequences.

    Raises:
        BadInputError: where the kernels cannot run.
    """
    require_kernels(model, batch)
    where = model.embedding.weight.device
    state = model.init_state(batch)
    logits = torch.empty(batch, model.config.vocab_size, dtype=model.embedding.weight.dtype, device=where)
    present: dict[str, Options] = tiles.read_table()["kernels"]
    best: dict[str, Options] = {}
    timings: list[dict[str, Any]] = []
    for kernel in present:

        def time_of(options: Options, kernel: str = kernel) -> float:
            with tiles.overridden(**{kernel: options}):
                return replayed_us(launches(model, state, logits, kernel), where, clock)

        if not launches(model, state, logits, kernel):
            best[kernel] = dict(present[kernel])
            continue
        times = {}
        for options in [present[kernel], *(other for other in candidates(kernel) if other != present[kernel])]:
            took = guarded(time_of, options)
            if isinstance(took, Failure):
                print(f"{kernel} {options}: {took.reason}", flush=True)
                continue
            times[tuple(options.items())] = took
            timings.append({"kernel": kernel, "us": took} | options)
        ranked = sorted(times, key=lambda options: times[options])
        kept = tuple(present[kernel].items())
        chosen = kept if kept in times and times[ranked[0]] > KEEP * times[kept] else ranked[0]
        best[kernel] = dict(chosen)
        shown = "  ".join(f"{'/'.join(str(value) for _, value in options)} {times[options]:.1f}" for options in ranked)
        print(f"{kernel} µs: {shown}", flush=True)
    steps: list[dict[str, Any]] = []
    for table, name in ((present, "present"), (best, "best")):
        for dependent in (0, 1):
            ms, error = whole_step(model, table | {"PDL": dependent}, clock)
            steps.append({"tiles": name, "PDL": dependent, "ms": ms, "error": error})
            print(f"step with {name} tiles, PDL {dependent}: {ms:.3f} ms, error {error:.1e}", flush=True)
    fastest = min(steps, key=lambda step: step["ms"])
    kernels = best if fastest["tiles"] == "best" else present
    table = {"found": machine(where), "PDL": fastest["PDL"], "kernels": kernels, "steps": steps, "timings": timings}
    write_atomically(output, (json.dumps(table, indent=1) + "\n").encode())
    print(output, flush=True)
    return table
