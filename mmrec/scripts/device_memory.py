"""Whether a measurement fits the device's memory, by arithmetic and before anything is built; and what would fit if it does not."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mmrec.commandline.errors import BadInputError
from mmrec.commandline.memory_estimate import Estimate, estimate
from mmrec.config import MMRecConfig
from mmrec.core.memory import state_bytes
from mmrec.scripts.benchmark_options import DTYPES, PARTS, PRESETS, Settings, preset

GIB = 2**30
_FLOAT64_COPIES = 3  # of a matrix and its gradients, while two blocks are compared


def free_bytes(where: torch.device) -> int:
    """Bytes that can still be allocated on the device; on a CPU what Linux calls available."""
    if where.type == "cuda":
        unused = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
        return int(torch.cuda.mem_get_info(where)[0]) + unused
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def needed_bytes(settings: Settings) -> int:
    """Bytes of what takes most, about: parity needs two blocks, whatever is timed. The caching allocator's own overhead is not in it."""
    block = _block_bytes(settings)
    return max(block, _forward_bytes(settings)) if "forward" in settings.parts else block


def require_room(settings: Settings) -> None:
    """Raise unless the measurement fits.

    Raises:
        BadInputError: in one line, with the options that would make it fit.
    """
    needed, free = needed_bytes(settings), free_bytes(settings.where)
    if needed > free:
        raise BadInputError(too_large(settings, f"need about {needed / GIB:.2f} GiB, {settings.where} has {free / GIB:.2f} GiB free", free))


def require_decoding_room(size: str, precision: str, where: torch.device, chunk_size: int, batch: int) -> None:
    """Raise unless a shipped config's network, its fp32 copy for the parity, and a chunk of a prompt fit.

    Raises:
        BadInputError: in one line, with sizes that would fit.
    """

    def needed(size: str) -> int:
        asked = Settings(
            config=preset(size), batch=1, seq_len=chunk_size, precision=precision, where=where, repeat=1, parts=PARTS, output=Path()
        )
        parameters = _estimate(asked, asked.config).parameters
        return parameters * (DTYPES[precision].itemsize + 4) + _one_block(asked).activations + 4 * state_bytes(asked.config, batch)

    free = free_bytes(where)
    if needed(size) <= free:
        return
    names = list(PRESETS)
    fitting = [f"--size {name}" for name in names[names.index(size) + 1 :] if needed(name) <= free]
    remedy = f"these would fit: {', '.join(fitting)}" if fitting else "no shipped size would fit"
    raise BadInputError(
        f"decoding with {size} in {precision} and its fp32 copy needs about {needed(size) / GIB:.2f} GiB, {where} has "
        f"{free / GIB:.2f} GiB free; {remedy}"
    )


def too_large(settings: Settings, fault: str, free: int) -> str:
    """The line for a measurement that does not fit.

    Args:
        settings: what was asked for.
        fault: what is wrong, with its figures.
        free: bytes that what is proposed must fit in.
    """
    config = settings.config
    fitting = list(_alternatives(settings, free))
    remedy = f"these would fit: {', '.join(fitting)}" if fitting else "no smaller batch, length or depth would fit"
    asked = f"{config.num_layers} layers of width {config.model_dim} at B {settings.batch}, T {settings.seq_len} in {settings.precision}"
    return f"{asked} {fault}; {remedy}"


def _estimate(settings: Settings, config: MMRecConfig) -> Estimate:
    content: dict[str, Any] = {
        "trainer": {"precision": "bf16-true" if settings.precision == "bf16" else "32-true"},
        "data": {"init_args": {"batch_size": settings.batch, "seq_len": settings.seq_len}},
        "model": {"network": asdict(config)},
    }
    return estimate("", content)


def _one_block(settings: Settings) -> Estimate:
    return _estimate(settings, replace(settings.config, num_layers=1, vocab_size=1))


def _block_bytes(settings: Settings) -> int:
    """Two blocks of each kind of memory, one kind's gradients, one block's activations, and the comparison in float64."""
    block, config = _one_block(settings), settings.config
    blocks = 2 * len(settings.first_layers) * (block.weights + _operand_bytes(settings))
    largest = config.model_dim * max(2 * config.ffn_width, 5 * config.model_dim + config.pe_width)
    return blocks + 2 * block.gradients + block.activations + _FLOAT64_COPIES * 8 * largest


def _forward_bytes(settings: Settings) -> int:
    """The network, one block's activations, the logits, and a second copy of the projections while they are fused."""
    config, size = settings.config, settings.dtype.itemsize
    projections = config.num_layers * config.model_dim * (5 * config.model_dim + config.pe_width) * size
    logits = settings.tokens * config.vocab_size * size
    passing = _one_block(settings).activations + logits + _operand_bytes(settings)
    return _estimate(settings, config).weights + projections + passing


def _operand_bytes(settings: Settings) -> int:
    """Of the matrix products that are timed alone: two inputs of each width, and a gradient of each output."""
    config = settings.config
    D, F = config.model_dim, config.ffn_width
    inputs, outputs = 2 * (D + D // 4 + F), 5 * D + config.pe_width + D + D // 4 + 2 * F
    return settings.tokens * (inputs + outputs) * settings.dtype.itemsize


def _largest(asked: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number below `asked` that fits, by bisection."""
    low, high = 0, asked  # low fits or is 0, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low or None


def _alternatives(settings: Settings, free: int) -> Iterator[str]:
    """Options that would each be enough."""

    def fits(**changes: Any) -> bool:
        return needed_bytes(replace(settings, **changes)) <= free

    if batch := _largest(settings.batch, lambda number: fits(batch=number)):
        yield f"--batch {batch}"
    if blocks := _largest(-(-settings.seq_len // 64), lambda number: fits(seq_len=64 * number)):
        yield f"--seq-len {64 * blocks}"
    with_layers = lambda number: fits(config=replace(settings.config, num_layers=number))  # noqa: E731
    if "forward" in settings.parts and (layers := _largest(settings.config.num_layers, with_layers)):
        yield f"--num-layers {layers}"
    if "forward" in settings.parts and fits(parts=("block",)):
        yield "--only block"
    sizes = {size: preset(size, settings.config.use_uboo) for size in PRESETS}
    if settings.config not in sizes.values():
        return  # widths were given, too, and would still be
    for size, network in sizes.items():
        if network.model_dim < settings.config.model_dim and fits(config=network):
            yield f"--size {size}"
            return
