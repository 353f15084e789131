"""Options that the commands of several studies take."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmrec.commandline.errors import BadInputError
from mmrec.commandline.plain_parser import whole_number
from mmrec.studies.plan import SIZES, Study


def add_common_options(parser: argparse.ArgumentParser, workers: int) -> None:
    """What every study has: arms, rates, seeds, steps, and how it is run.

    Args:
        parser: gets them.
        workers: how many runs side by side where none is given.
    """
    parser.add_argument("--arms", nargs="+", help="what is compared: mm-rec, transformer++, gated-deltanet, gla, overlays, joined by +")
    parser.add_argument("--seeds", nargs="+", type=_seed, help="seeds of weights and data order")
    parser.add_argument("--learning-rates", nargs="+", type=float, help="each arm is trained with each of them")
    parser.add_argument("--steps", type=whole_number, help="optimiser steps of a run")
    parser.add_argument("--batch", type=whole_number, help="sequences of a micro-batch")
    parser.add_argument(
        "--workers-per-gpu", type=whole_number, default=workers, help=f"runs side by side on a GPU (default: {workers}); more blur times"
    )
    parser.add_argument("--only-missing", action="store_true", help="train only what --output has no row of, as after an interruption")
    parser.add_argument("--plot-only", action="store_true", help="train nothing: draw what --output holds")


def _seed(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; give a whole number from 0 to 4,294,967,295")
    return number


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """What the studies that train on text have besides."""
    add_common_options(parser, workers=1)
    parser.add_argument("--size", choices=SIZES, help="the networks' size")
    parser.add_argument("--tokens-m", type=float, help="million tokens of a run, unless --steps says how many")
    parser.add_argument("--accumulate", type=whole_number, help="micro-batches of a step")
    parser.add_argument("--validations", type=whole_number, help="how often the loss on held-out text is taken on the way")
    parser.add_argument("--tokens-dir", type=Path, help="the folder that `prepare` wrote (default: tokens/books)")


def changed(study: Study, options: argparse.Namespace) -> Study:
    """The study with what the options change in it."""
    changes: dict[str, Any] = {name: getattr(options, name) for name in ("size", "tokens_m", "steps", "validations")}
    changes |= {
        name: tuple(dict.fromkeys(getattr(options, name))) for name in ("arms", "seeds", "learning_rates") if getattr(options, name)
    }
    study = replace(study, **{name: value for name, value in changes.items() if value is not None})
    if options.tokens_m is not None and options.steps is None:
        study = replace(study, steps=None)
    study = replace(study, batch=(options.batch or study.batch[0], options.accumulate or study.batch[1]))
    if options.tokens_dir is not None:
        study = replace(study, options=study.options | {"data.init_args.tokens_dir": str(options.tokens_dir)})
    return study


def require_gpu() -> None:
    """Refuse to train on a CPU what takes an H100 minutes.

    Raises:
        BadInputError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise BadInputError("no CUDA device; --quick trains tiny networks on the CPU")
