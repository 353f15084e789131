"""A network's weights as safetensors with its configuration beside them: for sharing, and for loading without Lightning.

A folder holds `model.safetensors`, `config.json` and, where the run had one, `tokenizer.json`. A name whose parameter is another's, as a
tied head's is, has no tensor of its own. safetensors runs no code and knows no checksums: `config.json` has the weights' SHA-256.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmrec.config import MMRecConfig, config_from_fields
from mmrec.files import TEMPORARY_SUFFIX, require_writable, sync_folder
from mmrec.model import MMRecModel

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
_MODEL_TYPE = "mmrec"


def require_new_folder(folder: Path) -> None:
    """Raise a one-line OSError where something lies at `folder` already, or where it cannot be made."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output {folder} exists and is not an empty folder; name a new one")
    require_writable(folder, "output")


def save_pretrained(network: MMRecModel, folder: str | os.PathLike[str], tokenizer: Path | None = None, **facts: Any) -> None:
    """Write a network to a new folder: the whole of it or nothing.

    Args:
        network: its weights are written in their dtypes.
        folder: where there is nothing yet.
        tokenizer: a `tokenizer.json` to copy.
        facts: plain values for `config.json` beside the network's fields.

    Raises:
        OSError: something is there already, or it cannot be written; one line.
    """
    target = Path(folder)
    require_new_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with the same number
    try:
        temporary.mkdir()
        weights = {name: tensor.detach().contiguous() for name, tensor in _own_tensors(network).items()}
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER)
        content = {"model_type": _MODEL_TYPE, "network": asdict(network.config), "sha256": _sha256(temporary / WEIGHTS), **facts}
        (temporary / CONFIG).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)  # safetensors leaves its file to the user alone
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot write {target}: {reason.lower()}; make room or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`config.json` as it is: `network`, the fields of MMRecConfig, and facts beside them.

    Raises:
        FileNotFoundError, ValueError: no such folder, or none that `save_pretrained` wrote; one line.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; give a folder that `export` wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; export the run again") from error
    if not isinstance(content, dict) or content.get("model_type") != _MODEL_TYPE or not isinstance(content.get("network"), dict):
        raise ValueError(f"{path} describes no MM-Rec network; give a folder that `export` wrote")
    return content


def load_pretrained(
    folder: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype | None = None, *, check: bool = True
) -> MMRecModel:
    """The network in a folder that `save_pretrained` wrote, in evaluation mode.

    Args:
        folder: with `config.json` and `model.safetensors`.
        device: where to put it.
        dtype: of the weights, but for those that stay in fp32; None: as in the file.
        check: compare the weights with their SHA-256, which reads the file once more.

    Raises:
        FileNotFoundError, ValueError: missing, damaged or unfitting files, in one line.
    """
    content, path = read_config(folder), Path(folder) / WEIGHTS
    try:
        config = config_from_fields("MMRecConfig", content["network"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{Path(folder) / CONFIG} is of another version of this code: {error}") from error
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; export the run again")
    if check and _sha256(path) != content.get("sha256"):
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {CONFIG}; export the run again")
    try:
        weights = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); export the run again") from error
    return assemble(config, weights, str(path), dtype)


def assemble(config: MMRecConfig, weights: Mapping[str, Tensor], source: str, dtype: torch.dtype | None = None) -> MMRecModel:
    """A network that takes over tensors as its parameters, in evaluation mode.

    Args:
        config: what the network is.
        weights: by name; the tensors themselves become the network's. A name whose parameter is another's may be left out.
        source: what errors call them.
        dtype: of the weights, but for those that stay in fp32; None: as they are.

    Raises:
        ValueError: naming the first that is missing, of another shape, or unknown.
    """
    with torch.device("meta"):
        network = MMRecModel(config)
    wanted, known = _own_tensors(network), network.state_dict()
    for name in [*wanted, *weights]:
        if name not in weights:
            fault = f"{name} is missing"
        elif name not in known:
            fault = f"{name} is unknown to its configuration"
        elif weights[name].shape != known[name].shape:
            fault = f"{name} is {tuple(weights[name].shape)} and its configuration says {tuple(known[name].shape)}"
        else:
            continue
        raise ValueError(f"{source} is damaged: {fault}")
    network.load_state_dict({name: weights[name] for name in wanted}, assign=True, strict=False)
    if config.tie_embeddings:
        network.head.weight = network.embedding.weight
    return network.to(dtype=dtype).eval() if dtype is not None else network.eval()


def _own_tensors(network: MMRecModel) -> dict[str, Tensor]:
    """The network's tensors by name, each once: of the names of one parameter the first."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
