"""What the benchmarks measure: the options both scripts share, and the sizes of the shipped configs."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmrec.commandline.configs import config_layers, merge
from mmrec.commandline.plain_parser import PlainParser, command_line, output_file, whole_number
from mmrec.config import MMRecConfig
from mmrec.measuring.machine import device

# Names of sizes and the shipped configs that hold their networks, the largest first.
PRESETS = {"7b": "a100_7b", "1b3": "h100_1b3", "370m": "h100_370m", "125m": "h100_125m", "tiny": "cpu_tiny"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PARTS = ("block", "forward")
MEMORIES = ("matrix", "window")  # what the long-term memory of a layer is, as rows name it
# By kind of device: size, batch, tokens of a sequence, precision. On a GPU the founding document's, on a CPU seconds.
DEFAULTS = {"cuda": ("7b", 4, 2048, "bf16"), "cpu": ("tiny", 2, 128, "fp32")}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and where.

    Attributes:
        config: the network; `use_hem` in it is what a script starts from.
        batch, seq_len: B sequences of T tokens.
        precision: "bf16" or "fp32": of the weights and of everything the network does not keep in fp32 itself.
        where: the device.
        repeat: rounds; a figure is the median of them, each itself a median of many calls.
        parts: of PARTS, what is timed.
        output: the JSON file to write.
        append: whether the rows that it holds stay.
        ncu: whether to read memory traffic with NVIDIA's profiler.
        command: the command line that asks for all this.
    """

    config: MMRecConfig
    batch: int
    seq_len: int
    precision: str
    where: torch.device
    repeat: int
    parts: tuple[str, ...]
    output: Path
    append: bool = False
    ncu: bool = False
    command: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return DTYPES[self.precision]

    @property
    def tokens(self) -> int:
        """B · T."""
        return self.batch * self.seq_len

    @property
    def first_layers(self) -> dict[str, int]:
        """The first layer with each of MEMORIES that the network has."""
        memories = [memory_of(self.config.has_window(index)) for index in range(self.config.num_layers)]
        return {memory: memories.index(memory) for memory in MEMORIES if memory in memories}

    @property
    def forward_name(self) -> str:
        """The name of a row for the whole network: `forward_24` for 24 layers."""
        return f"forward_{self.config.num_layers}"


def memory_of(has_window: bool) -> str:
    """The name of a layer's long-term memory."""
    return MEMORIES[has_window]


def preset(size: str, use_uboo: bool = False) -> MMRecConfig:
    """The network of a shipped config, by a name of PRESETS; HEM on, UBÖO as asked, nothing recomputed."""
    network = merge(config_layers(PRESETS[size]))["model"]["network"]
    return MMRecConfig(**network | {"use_hem": True, "use_uboo": use_uboo, "activation_checkpointing": False})


def build_parser(program: str, description: str, output: str) -> argparse.ArgumentParser:
    """The options of both scripts; `output` is the default file."""
    parser = PlainParser(prog=f"python -m mmrec.scripts.{program}", description=description)
    parser.add_argument("--size", choices=PRESETS, help="a shipped config's network; 7b on a GPU, tiny on a CPU")
    parser.add_argument("--model-dim", type=whole_number, help="D; heads and feed-forward then follow from it unless they are given too")
    parser.add_argument("--num-layers", type=whole_number, help="L")
    parser.add_argument("--num-heads", type=whole_number, help="H, heads of the long-term memory")
    parser.add_argument("--pe-dim", type=whole_number, help="P, width of the path that says when the short-term memory writes")
    parser.add_argument("--ffn-dim", type=whole_number, help="F, hidden width of the feed-forward")
    parser.add_argument("--vocab-size", type=whole_number, help="tokens of the vocabulary")
    parser.add_argument("--batch", type=whole_number, help="B, sequences; 4 on a GPU, 2 on a CPU")
    parser.add_argument("--seq-len", type=whole_number, help="T, tokens a sequence; 2048 on a GPU, 128 on a CPU")
    parser.add_argument("--precision", choices=DTYPES, help="of the weights; bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--uboo", action=argparse.BooleanOptionalAction, default=False, help="compute the planning errors too")
    parser.add_argument("--device", type=_device, help="cpu, cuda or cuda:N; a GPU where there is one")
    parser.add_argument("--repeat", type=whole_number, default=3, help="rounds; a figure is their median")
    parser.add_argument("--only", choices=PARTS, help="time one part alone: forward is that of the whole network")
    parser.add_argument("--output", type=output_file, default=Path(output), help="the JSON file to write (default: %(default)s)")
    parser.add_argument("--append", action="store_true", help="keep the rows that the file holds already: several sizes in one file")
    return parser


def read_settings(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> Settings:
    """The settings that the command line asks for; what is wrong in it ends the program with exit code 2."""
    options = parser.parse_args(arguments)
    where: torch.device = options.device or device()
    size, batch, seq_len, precision = DEFAULTS[where.type]
    config = preset(options.size or size, options.uboo)
    given = ("model_dim", "num_layers", "num_heads", "pe_dim", "ffn_dim", "vocab_size")
    changes = {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    if "model_dim" in changes:  # the preset's widths belong to its own
        changes = {"num_heads": None, "pe_dim": None, "ffn_dim": None, "planning_error_dim": None} | changes
    try:
        config = replace(config, **changes)
    except ValueError as error:
        parser.error(str(error))
    return Settings(
        config=config,
        batch=options.batch or batch,
        seq_len=options.seq_len or seq_len,
        precision=options.precision or precision,
        where=where,
        repeat=options.repeat,
        parts=(options.only,) if options.only else PARTS,
        output=options.output,
        append=options.append,
        ncu=getattr(options, "ncu", False),
        command=command_line(parser.prog, arguments),
    )


def _device(name: str) -> torch.device:
    try:
        where = torch.device(name)
    except RuntimeError:
        where = torch.device("meta")
    if where.type not in DEFAULTS:
        raise argparse.ArgumentTypeError(f"{name!r} is no device of ours; give cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if where.type == "cuda" and (where.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"{name!r} is not there: {count} CUDA devices are seen")
    if where.type == "cuda" and where.index is None:
        return device()
    return where
