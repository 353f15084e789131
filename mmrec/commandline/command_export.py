"""`export`: a run's network as safetensors, for sharing."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mmrec.commandline.checkpoints import load_network, read_run_checkpoint
from mmrec.commandline.parser import PROGRAM, OneLineErrors
from mmrec.commandline.run_folder import run_and_checkpoint
from mmrec.commandline.run_tokenizer import find_tokenizer
from mmrec.pretrained import CONFIG, TOKENIZER, WEIGHTS, require_new_folder, save_pretrained


def build_parser() -> OneLineErrors:
    """The options."""
    parser = OneLineErrors(
        prog=f"{PROGRAM} export",
        description="Write a trained network as safetensors, with its configuration and tokenizer.",
    )
    parser.add_argument("--run", type=str, help="Run folder, e.g. runs/cpu_tiny; default: the one --ckpt_path lies in.")
    parser.add_argument("--ckpt_path", type=str, default="last", help="Checkpoint file, or last or best for the run's.")
    parser.add_argument("--tokenizer", type=str, help="tokenizer.json; default: the run's, where it has one.")
    parser.add_argument("--output", type=str, required=True, help="Folder to make; `generate --model FOLDER` reads it.")
    return parser


def run(arguments: Sequence[str]) -> None:
    """Export, and say what was written."""
    options = build_parser().parse_args(list(arguments))
    output = Path(options.output)
    require_new_folder(output)
    folder, checkpoint = run_and_checkpoint(options.run, options.ckpt_path)
    network = load_network(checkpoint, torch.device("cpu"))
    facts = {"step": read_run_checkpoint(checkpoint).get("global_step")}
    try:
        tokenizer, facts["document_first"] = find_tokenizer(folder, options.tokenizer)
    except (FileNotFoundError, ValueError) as error:
        if options.tokenizer is not None:
            raise
        print(f"without a tokenizer: {error}", file=sys.stderr)
        path = None
    else:
        path = Path(tokenizer.path)
    save_pretrained(network, output, path, **facts)
    names = [WEIGHTS, CONFIG, *([TOKENIZER] if path is not None else [])]
    print(f"{checkpoint} at step {facts['step']}: {network.num_parameters():,} parameters in {output} ({', '.join(names)})")
    print(f"try it with generate --model {output} --prompt TEXT, or mmrec.pretrained.load_pretrained({str(output)!r})", flush=True)
