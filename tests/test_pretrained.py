"""A network as safetensors and back: the same logits to the bit, one tensor a parameter, the whole folder or none, faults in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmrec.model import MMRecModel
from mmrec.pretrained import load_pretrained, read_config, save_pretrained

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def network(**options: Any) -> MMRecModel:
    fields = {"vocab_size": 20, "model_dim": 16, "num_layers": 3, "num_heads": 2, "use_uboo": False}
    return MMRecModel(**(fields | options)).eval()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("hem", [True, False])
def test_the_logits_are_equal_to_the_bit(tie: bool, hem: bool, tmp_path: Path) -> None:
    model = network(tie_embeddings=tie, use_hem=hem)
    save_pretrained(model, tmp_path / "deep" / "model", step=7)
    loaded = load_pretrained(tmp_path / "deep" / "model")
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert loaded.config == model.config
    assert not loaded.training
    assert (loaded.head.weight is loaded.embedding.weight) is tie
    assert read_config(tmp_path / "deep" / "model")["step"] == 7
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "deep" / "model").iterdir()} == {0o644}


def test_each_parameter_is_there_once(tmp_path: Path) -> None:
    model = network()
    save_pretrained(model, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}
        assert "head.weight" not in file.keys()  # noqa: SIM118  no mapping


def test_dtypes_stay_or_become_what_is_asked_for(tmp_path: Path) -> None:
    save_pretrained(network().to(torch.bfloat16), tmp_path / "half")
    loaded = load_pretrained(tmp_path / "half")
    assert loaded.embedding.weight.dtype == torch.bfloat16
    assert loaded.blocks[0].state_gate.w_g.dtype == torch.float32  # which stays in fp32
    assert load_pretrained(tmp_path / "half", dtype=torch.float32).embedding.weight.dtype == torch.float32


def test_what_lies_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_pretrained(network(), tmp_path / "empty")
    (tmp_path / "file").touch()
    for name in ("empty", "file"):
        with pytest.raises(FileExistsError, match=rf"^output .*{name} exists and is not an empty folder; name a new one$"):
            save_pretrained(network(), tmp_path / name)
    with pytest.raises(NotADirectoryError, match=r"^output .* is a file; choose another folder$"):
        save_pretrained(network(), tmp_path / "file" / "below")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(weights: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmrec.pretrained.save_file", full)
    with pytest.raises(OSError, match=r"^cannot write .*model: no space left on device; make room or name another folder$"):
        save_pretrained(network(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(network(), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damaged_and_foreign_folders_are_one_line(folder: Path) -> None:
    def message(kind: type[Exception], **options: Any) -> str:
        with pytest.raises(kind) as error:
            load_pretrained(folder, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    weights = folder / "model.safetensors"
    whole, config = weights.read_bytes(), (folder / "config.json").read_text()
    weights.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    assert message(ValueError) == f"{weights} is damaged: its SHA-256 is not the one in config.json; export the run again"
    weights.write_bytes(whole[:-1])
    assert message(ValueError, check=False).startswith(f"{weights} is damaged or no safetensors file (")
    tensors = load_file_bytes(whole, folder)
    for change, fault in (
        ({"norm.weight": None}, "norm.weight is missing"),
        ({"norm.weight": torch.ones(3)}, "norm.weight is (3,) and its configuration says (16,)"),
        ({"more": torch.ones(3)}, "more is unknown to its configuration"),
    ):
        save_file({name: tensor for name, tensor in (tensors | change).items() if tensor is not None}, weights)
        assert message(ValueError, check=False) == f"{weights} is damaged: {fault}"
    weights.unlink()
    assert message(FileNotFoundError) == f"no {weights}; export the run again"
    rewrite(folder, network={"taps": 3})
    assert "is of another version of this code: MMRecConfig has no option 'taps'" in message(ValueError)
    rewrite(folder, model_type="llama")
    assert message(ValueError).endswith("describes no MM-Rec network; give a folder that `export` wrote")
    (folder / "config.json").write_text(config[:50])
    assert message(ValueError).startswith(f"{folder / 'config.json'} is damaged: ")
    shutil.rmtree(folder)
    assert message(FileNotFoundError) == f"no {folder / 'config.json'}; give a folder that `export` wrote"


def load_file_bytes(content: bytes, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "model.safetensors").write_bytes(content)
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
