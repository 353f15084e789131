"""`generate`, `prepare`, `configs` and the help."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from cli_support import VOCABULARY, fit

from datamodules.sample_text import SampleText
from datamodules.tokenizer import load_tokenizer
from mmrec.cli import main
from mmrec.commandline import command_generate
from mmrec.commandline.checkpoints import load_network, network_config
from mmrec.commandline.streaming_text import text_pieces
from mmrec.config import MMRecConfig
from mmrec.generate import Sampling, generate
from mmrec.model import MMRecModel


class Streams:
    """A terminal's two streams as bytes."""

    def __init__(self, typed: bytes = b"") -> None:
        self.stdin = io.TextIOWrapper(io.BytesIO(typed))
        self.stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # whatever the terminal's encoding, the text is UTF-8

    def written(self) -> str:
        return self.stdout.buffer.getvalue().decode("utf-8")


@pytest.fixture
def generated(finished_run: Path, monkeypatch: pytest.MonkeyPatch):
    """Text that `generate` writes for some options; the ids of the prompt it read are in `prompt_ids`."""

    def spy(network: MMRecModel, prompt_ids: list[int], *args: object, **kwargs: object):
        call.prompt_ids = prompt_ids
        return generate(network, prompt_ids, *args, **kwargs)

    def call(*options: str, typed: bytes = b"") -> str:
        streams = Streams(typed)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", streams.stdin)
            patch.setattr(sys, "stdout", streams.stdout)
            patch.setattr(command_generate, "generate", spy)
            main(["generate", "--run", str(finished_run), *options])
        return streams.written()

    return call


def test_generate_streams_the_text_that_the_network_gives(generated, finished_run: Path, sample_cache: Path) -> None:
    text = generated("--prompt", "In the", "--max_new_tokens", "30", "--seed", "4", "--top_k", "50", "--temperature", "0.7")
    tokenizer = load_tokenizer(next(sample_cache.rglob("tokenizer.json")))
    network = load_network(finished_run / "checkpoints" / "last.ckpt", torch.device("cpu"))
    prompt = [tokenizer.eod_id, *tokenizer.encode("In the")]
    sampling = Sampling(max_new_tokens=30, seed=4, top_k=50, temperature=0.7)
    ids = list(generate(network, prompt, sampling, stop_id=tokenizer.eod_id))
    assert text == tokenizer.decode(ids) + "\n"
    assert ids


def test_generate_reads_the_prompt_from_a_file_or_the_standard_input(generated, sample_cache: Path) -> None:
    tokenizer = load_tokenizer(next(sample_cache.rglob("tokenizer.json")))
    options = ["--max_new_tokens", "10", "--chunk_size", "3"]
    expected = generated("--prompt", "Grüße, 世界", *options)
    prompt_ids = [tokenizer.eod_id, *tokenizer.encode("Grüße, 世界")]
    assert generated.prompt_ids == prompt_ids
    Path("prompt.txt").write_text("Grüße, 世界", encoding="utf-8")
    assert generated("--prompt_file", "prompt.txt", *options) == expected
    assert generated.prompt_ids == prompt_ids
    assert generated("--prompt_file", "-", *options, typed="Grüße, 世界".encode()) == expected
    assert generated.prompt_ids == prompt_ids
    generated(*options)
    assert generated.prompt_ids == [tokenizer.eod_id]  # a new document


def test_generate_builds_no_planning_projections(finished_run: Path) -> None:
    network = load_network(finished_run / "checkpoints" / "last.ckpt", torch.device("cpu"))
    assert not [name for name, _ in network.named_parameters() if "W_planning" in name]
    assert network.head.weight is network.embedding.weight
    assert not network.training
    half = load_network(finished_run / "checkpoints" / "last.ckpt", torch.device("cpu"), torch.bfloat16)
    assert half.embedding.weight.dtype == torch.bfloat16
    assert half.blocks[0].state_gate.w_g.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--prompt_file", "b"], "give --prompt or --prompt_file, not both"),
        (["--prompt_file", "none.txt"], "no prompt file none.txt"),
        (["--prompt_file", "latin.txt"], "--prompt_file: latin.txt is not UTF-8 text: byte 1 is 0xfc"),
        (["--tokenizer", "none.json"], "no tokenizer file none.json"),
        (["--ckpt_path", "none.ckpt"], "no checkpoint none.ckpt"),
        (["--ckpt_path", "latin.txt"], "checkpoint latin.txt is "),
    ],
)
def test_generate_refuses_bad_input_in_one_line(options: list[str], message: str, finished_run: Path, cli) -> None:
    Path("latin.txt").write_bytes("Grüße".encode("latin-1")[1:])
    assert cli("generate", "--run", str(finished_run), *options).error.startswith(message)


def test_generate_refuses_a_checkpoint_with_a_flipped_bit(finished_run: Path, cli) -> None:
    content = bytearray((finished_run / "checkpoints" / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("flipped.ckpt").write_bytes(content)
    error = cli("generate", "--run", str(finished_run), "--ckpt_path", "flipped.ckpt", "--prompt", "a").error
    assert error.startswith("checkpoint flipped.ckpt is damaged or no checkpoint (its checksums do not fit its bytes)")


def test_pieces_of_text_are_whole_characters() -> None:
    text = "a € and 𝄞, é"
    data = text.encode()

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    pieces = list(text_pieces(iter(data), decode))
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)
    assert len(pieces) == len(text)  # each as soon as it is whole
    broken = data[:4] + b"x"  # two bytes of the three of €
    assert "".join(text_pieces(iter(broken), decode)) == decode(list(broken))
    assert "".join(text_pieces(iter(data[:-1]), decode)) == decode(list(data[:-1]))


def test_prepare_writes_tokens_that_fit_trains_on(cli, tiny_config: Path) -> None:
    lines = [json.dumps({"text": document["text"], "timestamp": "", "url": ""}) for document in SampleText(5).documents(150)]
    Path("text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = [
        "--files",
        "text.jsonl",
        "--output",
        "tokens",
        "--vocab_size",
        str(VOCABULARY),
        "--validation_fraction",
        "0.1",
        "--workers",
        "0",
    ]
    prepared = cli("prepare", *options, "--validation_fraction", "0.1", "--progress", "false")
    assert prepared.code == 0, prepared.err
    assert f"vocabulary: {VOCABULARY}; tokenizer: tokens/tokenizer.json" in prepared.out
    Path("x.yaml").write_text("data:\n  init_args: {source: tokens, tokens_dir: tokens, cache_dir: null}\n")
    fit(tiny_config, "--config", "x.yaml", "--trainer.max_steps", "2")
    assert cli("generate", "--run", "runs/tiny+x", "--max_new_tokens", "3", "--temperature", "0").code == 0


def test_prepare_says_what_it_joined_and_says_it_again_of_a_finished_folder(cli) -> None:
    documents = list(SampleText(5).documents(60))
    urls = [f"x:book {number // 20}#{number % 20}" for number in range(60) if number != 30]
    lines = [json.dumps({"text": document["text"], "url": url}) for document, url in zip(documents, [*urls, "x:page"], strict=True)]
    Path("text.jsonl").write_text("\n".join(lines[:50]), encoding="utf-8")
    Path("held.jsonl").write_text("\n".join(lines[50:]), encoding="utf-8")
    options = ["--files", "text.jsonl", "--validation_files", "held.jsonl", "--vocab_size", str(VOCABULARY), "--workers", "0"]
    options += ["--output", "tokens", "--progress", "false"]
    said = "train: 50 pieces became 2 whole texts and, where a piece is missing, 2 stretches; 0 pieces are alone, "
    for _ in range(2):
        prepared = cli("prepare", *options, "--join_pieces", "true")
        assert said in prepared.out, prepared.err
    assert "pieces" not in cli("prepare", *options, "--output", "apart").out


def test_prepare_refuses_bad_lines_in_one_line_and_leaves_nothing(cli) -> None:
    Path("text.jsonl").write_text('{"text": "good"}\nno json\n{"no": "text"}\n')
    error = cli("prepare", "--files", "text.jsonl", "--output", "tokens").error
    assert "text.jsonl:2" in error
    assert not Path("tokens").exists()


def test_configs_lists_parameters_memory_and_tokens(cli) -> None:
    rows = {row["name"]: row for row in json.loads(cli("configs", "--json").out)}
    assert rows["h100_1b3"]["parameters_inference"] == pytest.approx(1.27e9, rel=0.01)
    large = rows["a100_7b"]
    assert large["weights"] == large["gradients"] == 2 * large["parameters"]  # bf16
    assert large["optimizer"] == pytest.approx(2 * (1 + 4 / 256) * large["parameters"], rel=1e-6)  # of 8 bits, a scale for each 256
    assert large["total"] == sum(large[part] for part in ("weights", "gradients", "optimizer", "activations"))
    assert rows["cpu_tiny"]["tokens"] == 300 * 8 * 128
    doubled = json.loads(cli("configs", "cpu_tiny", "--devices", "2", "--json").out)
    assert [row["tokens"] for row in doubled] == [2 * rows["cpu_tiny"]["tokens"]]
    table = cli("configs").out
    assert all(name in table for name in rows)
    assert "1.265 B" in table


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_narrow_terminal_loses_no_number_of_configs(columns: int, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    printed = cli("configs").out
    assert "…" not in printed
    for text in ("a100_7b", "24 × 4096", "6.603 B", "987.1 k", "65.54 k", "9.175 B"):
        assert text in printed


def test_the_help_lists_every_command(cli) -> None:
    printed = cli("--help")
    assert printed.code == 0
    for command in ("fit", "validate", "test", "predict", "generate", "prepare", "configs"):
        assert f"\n    {command}  " in printed.out
    listed = printed.out.partition("Available subcommands:")[2]
    assert " ".join(listed.split()).count(".") >= 8  # each in whole sentences
    assert "never run on your" not in listed
    assert "--top_p" in cli("generate", "--help").out
    assert "--vocab_size" in cli("prepare", "--help").out


def test_which_network_a_checkpoint_holds_does_not_depend_on_the_training_s_planning_error() -> None:
    gone = {"planning_loss": "ema", "planning_horizon": 4, "planning_layers": "upper"}
    held = {"hyper_parameters": {"network": {"model_dim": 16, "num_heads": 2, "embedding_scale": 4.0, **gone}}}
    assert network_config(held, Path("x")) == MMRecConfig(model_dim=16, num_heads=2, embedding_scale=4.0)
    for other in ({"taps": 3}, {"decay_accum_dtype": "half"}):
        with pytest.raises(ValueError, match=r"^checkpoint x is of another version of this code: "):
            network_config({"hyper_parameters": {"network": other}}, Path("x"))
