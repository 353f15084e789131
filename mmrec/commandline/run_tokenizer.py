"""The tokenizer that a run was trained with, found through the config in its folder."""

from pathlib import Path
from typing import Any

import datamodules
from datamodules import C4DataModule
from datamodules.tokenizer import Tokenizer, load_tokenizer
from mmrec.commandline.configs import read_config
from mmrec.commandline.run_folder import RunFolder


def find_tokenizer(folder: RunFolder, given: str | None) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether a document followed the end of another in training (false where the state was reset there).

    Args:
        folder: a run's folder.
        given: path of a `tokenizer.json` to use instead of the run's.

    Raises:
        FileNotFoundError, ValueError: none to be found, with the remedy.
    """
    spec = _data_spec(folder.config)
    arguments = spec.get("init_args") or {}
    document_first = not arguments.get("reset_at_documents", False)
    if given is not None:
        return load_tokenizer(given), document_first
    if not spec:
        raise FileNotFoundError(f"no {folder.config} to find the run's tokenizer by; give it as --tokenizer")
    data_class = getattr(datamodules, str(spec.get("class_path", "")).rpartition(".")[2], None)
    if not (isinstance(data_class, type) and issubclass(data_class, C4DataModule)):
        raise ValueError(f"{folder.config}: data {spec.get('class_path')} has no tokenizer; give one as --tokenizer")
    # The folder may have been moved since: the sample lies in it, wherever it is now.
    cache = arguments.get("cache_dir") or str(folder.root / "data")
    return load_tokenizer(data_class(**{**arguments, "cache_dir": cache}).tokenizer_path), document_first


def _data_spec(config: Path) -> dict[str, Any]:
    spec = read_config(config).get("data") if config.is_file() else None
    return spec if isinstance(spec, dict) else {}
