"""`generate`: continue a text with a trained network, streamed to the terminal."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from datamodules.tokenizer import Tokenizer, load_tokenizer
from mmrec.commandline.checkpoints import load_network
from mmrec.commandline.errors import BadInputError
from mmrec.commandline.parser import PROGRAM, OneLineErrors
from mmrec.commandline.run_folder import run_and_checkpoint
from mmrec.commandline.run_tokenizer import find_tokenizer
from mmrec.commandline.streaming_text import text_pieces
from mmrec.generate import Sampling, generate
from mmrec.model import MMRecModel
from mmrec.pretrained import TOKENIZER, load_pretrained, read_config


def build_parser() -> OneLineErrors:
    """The options; those of `Sampling` are its fields."""
    parser = OneLineErrors(
        prog=f"{PROGRAM} generate", description="Continue a prompt with a trained network, with a state of constant size."
    )
    parser.add_argument("--run", type=str, help="Run folder, e.g. runs/cpu_tiny; default: the one --ckpt_path lies in.")
    parser.add_argument("--ckpt_path", type=str, default="last", help="Checkpoint file, or last for the run's newest, or best.")
    parser.add_argument("--model", type=str, help="Folder that `export` wrote, in the place of --run and --ckpt_path.")
    parser.add_argument("--tokenizer", type=str, help="tokenizer.json; default: the run's.")
    parser.add_argument("--prompt", type=str, help="Text to continue; default: a new document.")
    parser.add_argument("--prompt_file", type=str, help="File with the text to continue, UTF-8; - reads the standard input.")
    parser.add_class_arguments(Sampling, None)
    parser.add_argument("--chunk_size", type=PositiveInt, default=512, help="Prompt tokens read at a time; memory grows with it alone.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="auto: a GPU where there is one.")
    parser.add_argument("--dtype", type=Literal["checkpoint", "float32", "bfloat16"], default="checkpoint", help="Of the weights.")
    return parser


def run(arguments: Sequence[str]) -> None:
    """Generate, writing each piece of text as soon as it is whole."""
    options = build_parser().parse_args(list(arguments))
    sampling = Sampling(**{name: options[name] for name in Sampling.__dataclass_fields__})
    prompt = _prompt(options)
    network, tokenizer, document_first = _network(options)
    prompt_ids = tokenizer.encode(prompt)
    if document_first or not prompt_ids:  # in training every document but a forgotten one follows the end of another
        prompt_ids = [tokenizer.eod_id, *prompt_ids]
    tokens = generate(network, prompt_ids, sampling, stop_id=tokenizer.eod_id, chunk_size=options.chunk_size)
    output = sys.stdout.buffer
    for piece in text_pieces(tokens, tokenizer.decode):
        output.write(piece.encode("utf-8"))
        output.flush()
    output.write(b"\n")
    output.flush()


def _prompt(options: Namespace) -> str:
    if options.prompt is not None and options.prompt_file is not None:
        raise BadInputError("give --prompt or --prompt_file, not both")
    if options.prompt_file is None:
        return options.prompt or ""
    name = "the standard input" if options.prompt_file == "-" else options.prompt_file
    if options.prompt_file != "-" and not Path(name).is_file():
        raise FileNotFoundError(f"no prompt file {name}; give a text file as --prompt_file, or the text itself as --prompt")
    content = sys.stdin.buffer.read() if options.prompt_file == "-" else Path(name).read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(f"--prompt_file: {name} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}") from error


def _network(options: Namespace) -> tuple[MMRecModel, Tokenizer, bool]:
    """The network, its tokenizer, and whether a document followed the end of another in training."""
    device, dtype = _device(options.device), None if options.dtype == "checkpoint" else getattr(torch, options.dtype)
    if options.model is None:
        folder, checkpoint = run_and_checkpoint(options.run, options.ckpt_path)
        tokenizer, document_first = find_tokenizer(folder, options.tokenizer)
        network = load_network(checkpoint, device, dtype)
    else:
        if options.run is not None or options.ckpt_path != "last":
            raise BadInputError("give --model, or --run and --ckpt_path, not both")
        facts, beside = read_config(options.model), Path(options.model) / TOKENIZER
        if options.tokenizer is None and not beside.is_file():
            raise FileNotFoundError(f"no {beside}; give the tokenizer of the run as --tokenizer")
        tokenizer, document_first = load_tokenizer(options.tokenizer or str(beside)), bool(facts.get("document_first", True))
        network = load_pretrained(options.model, device, dtype)
    if tokenizer.vocab_size != network.config.vocab_size:
        raise BadInputError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens but the network {network.config.vocab_size}; "
            "give the one it was trained with as --tokenizer"
        )
    return network, tokenizer, document_first


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise BadInputError("--device cuda: no CUDA device is available; leave it out or give --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")
