"""The C4 data module: text in C4's form from four kinds of source, as packed sequences of tokens."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from datamodules.base import PackedDataModule
from datamodules.documents import probe_files, resolve_files
from datamodules.fingerprint import corpus_fingerprint, fingerprint_of
from datamodules.packing import PackedBatches, StreamOptions
from datamodules.prepare import require_disjoint, validation_sources
from datamodules.sample import DEFAULT_VOCAB_SIZE, ensure_sample, require_sample_or_place, sample_folder
from datamodules.text_source import HubShards, LocalShards, TextShards
from datamodules.tokenizer import Tokenizer, load_tokenizer
from datamodules.tokens import TokenWindows, load_manifest
from datamodules.validation_text import validation_windows
from datamodules.windows import EndlessBatches

_ONLY = "val"
_NEEDED = {"sample": [], "hub": ["tokenizer"], "local": ["tokenizer", "train_files"], "tokens": ["tokens_dir"]}
_OF_SOURCES = {
    "tokenizer": ("hub", "local"),
    "train_files": ("local",),
    "validation_files": ("hub", "local"),
    "tokens_dir": ("tokens",),
}


class C4DataModule(PackedDataModule):
    """Packed sequences from text in C4's form, `{"text", "timestamp", "url"}`.

    Args:
        source: `sample`: the built-in text, made by a generator of ours; `hub`: streamed from the Hugging Face hub; `local`: JSON-lines
            files (plain, .gz, .xz), tokenised on the way; `tokens`: a folder of memory-mapped tokens written by `prepare`.
        seq_len: tokens a row, T.
        batch_size: rows a batch and rank, B.
        num_workers: worker processes that make training batches.
        seed: of the order of the data.
        vocab_size: sample: size of the BPE trained on it (default 4,096); else: the size that the tokenizer must have, if given.
        tokenizer: path of a `tokenizer.json` with `<|endoftext|>`; hub and local.
        train_files: globs of training files; local.
        validation_files: globs of validation files, or a mapping of source names to globs; local and hub. Without: the hub's validation
            split; local: the share `validation_fraction` of the training documents, chosen by a hash of the text and never trained on.
        tokens_dir: the folder that `prepare` wrote; tokens. Its validation splits are used.
        reset_at_documents: add `reset` (B, T), true at each document's first token: the network forgets there.
        shuffle: seeded shuffling of the training data: of windows (sample, tokens), or of shards and within blocks of documents.
        shuffle_block: documents that are shuffled together; hub and local.
        validation_fraction: see `validation_files`; local.
        validation_batches: of each validation source the batches that each rank reads, so that W ranks score W times as many sequences, and
            `val/loss` of 1 rank and of 2 are of other text; None: all.
        max_bad_line_share: share of lines that may be skipped (no JSON, no text, no UTF-8, empty) before an error.
        hub_dataset, hub_config, hub_split, hub_validation_split, hub_revision: what to load from the hub.
        cache_dir: where the built-in sample is kept; default `<trainer.default_root_dir>/data`.
    """

    def __init__(
        self,
        source: Literal["sample", "hub", "local", "tokens"] = "sample",
        seq_len: int = 2048,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        vocab_size: int | None = None,
        tokenizer: str | None = None,
        train_files: str | list[str] | None = None,
        validation_files: str | list[str] | dict[str, str | list[str]] | None = None,
        tokens_dir: str | None = None,
        reset_at_documents: bool = False,
        shuffle: bool = True,
        shuffle_block: int = 1024,
        validation_fraction: float = 0.005,
        validation_batches: int | None = 50,
        max_bad_line_share: float = 0.01,
        hub_dataset: str = "allenai/c4",
        hub_config: str | None = "en",
        hub_split: str = "train",
        hub_validation_split: str = "validation",
        hub_revision: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, validation_batches=validation_batches, cache_dir=cache_dir)
        self.source, self.seq_len, self.seed, self.shuffle = source, seq_len, seed, shuffle
        self.requested_vocab_size, self.requested_tokenizer = vocab_size, tokenizer
        self.train_files, self.validation_files, self.tokens_dir = train_files, validation_files, tokens_dir
        self.hub_dataset, self.hub_config, self.hub_split = hub_dataset, hub_config, hub_split
        self.hub_validation_split, self.hub_revision = hub_validation_split, hub_revision
        self.options = StreamOptions(
            seq_len, batch_size, seed, shuffle, shuffle_block, validation_fraction, max_bad_line_share, reset_at_documents
        )
        self._tokenizer: Tokenizer | None = None

    def check(self) -> None:
        """Refuse bad settings and files before anything is built or written.

        Raises:
            ValueError, OSError: one line, naming the thing and the remedy.
        """
        self._check_common(self.seq_len)
        self._check_arguments()
        if self.source == "sample":
            if self.cache_dir is not None or self.trainer is not None:  # else the folder is known once there is a Trainer
                require_sample_or_place(self._cache, self.vocab_size)
        elif self.source == "tokens":
            total = sum(int(shard["tokens"]) for shard in self._manifest()["splits"].get("train", {"shards": []})["shards"])
            if total <= self.seq_len:
                raise ValueError(f"data.seq_len={self.seq_len} is more than the {total:,} tokens of {self.tokens_dir}; give a smaller one")
        elif self.source == "local":
            train = resolve_files(self.train_files or [], "data.train_files")
            probe_files(train, "data.train_files", self.options.max_bad_line_share)
        if self.source in ("local", "hub"):
            for name, files in validation_sources(self.validation_files).items():
                if self.source == "local":
                    require_disjoint(train, files)
                probe_files(files, f"data.validation_files ({name})" if name else "data.validation_files", self.options.max_bad_line_share)
        # Reads the tokenizer or the manifest, and compares it with the size asked for.
        self.vocab_size  # noqa: B018

    def _check_arguments(self) -> None:
        if self.source not in _NEEDED:
            raise ValueError(f"data.source={self.source!r} is unknown; choose one of {', '.join(_NEEDED)}")
        given = {
            "tokenizer": self.requested_tokenizer,
            "train_files": self.train_files,
            "validation_files": self.validation_files,
            "tokens_dir": self.tokens_dir,
        }
        for name in _NEEDED[self.source]:
            if not given[name]:
                raise ValueError(f"data.source={self.source} needs data.{name}; give it or choose another source")
        for name, sources in _OF_SOURCES.items():
            if given[name] is not None and self.source not in sources:
                raise ValueError(f"data.{name} is not read with data.source={self.source}, only with {' or '.join(sources)}; leave it out")
        options = self.options
        for name, value in (("validation_fraction", options.validation_fraction), ("max_bad_line_share", options.max_bad_line_share)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"data.{name}={value} must lie between 0 and 1")
        if self.source == "local" and self.validation_files is None and not 0.0 < options.validation_fraction < 1.0:
            raise ValueError("data.validation_fraction must lie between 0 and 1 where data.validation_files is not given")
        if options.shuffle_block < 1:
            raise ValueError(f"data.shuffle_block={options.shuffle_block} must be at least 1")
        if self.source == "sample" and self.requested_vocab_size is not None and self.requested_vocab_size < 257:
            raise ValueError(f"data.vocab_size={self.requested_vocab_size} is too small for a byte-level BPE: give at least 257")

    @property
    def vocab_size(self) -> int:
        """Token ids are below it: of the sample the size asked for, else that of the tokenizer, or of the prepared tokens.

        Raises:
            ValueError: it is not the size asked for; the source lacks its tokenizer or folder, or what lies there is none.
            FileNotFoundError: there is no such tokenizer, or no prepared tokens.
        """
        if self.source == "sample":
            return self.requested_vocab_size or DEFAULT_VOCAB_SIZE
        size = int(self._manifest()["vocab_size"]) if self.source == "tokens" else self.tokenizer.vocab_size
        if self.requested_vocab_size is not None and self.requested_vocab_size != size:
            raise ValueError(
                f"data.vocab_size={self.requested_vocab_size}, but {self.tokenizer_path} has {size} tokens; correct one of them"
            )
        return size

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sources: of prepared tokens those of their splits, of a mapping its keys, else `["val"]`.

        Raises:
            ValueError, FileNotFoundError: prepared tokens cannot be read.
        """
        if self.source == "tokens":
            splits = [split for split in self._manifest()["splits"] if split != "train"]
            return [split.removeprefix("validation-") if split != "validation" else _ONLY for split in splits]
        if self.source in ("local", "hub") and isinstance(self.validation_files, dict):
            return list(self.validation_files)
        return [_ONLY]

    @property
    def tokenizer_path(self) -> str:
        """The file of the tokenizer in use; with the sample it is there after `prepare_data`.

        Raises:
            ValueError: the source needs a tokenizer or prepared tokens, and none are given.
            FileNotFoundError: there are no prepared tokens in the folder given.
        """
        if self.source == "sample":
            return str(sample_folder(self._cache, self.vocab_size) / "tokens" / "tokenizer.json")
        if self.source == "tokens":
            return str(Path(self._tokens_dir) / self._manifest()["tokenizer"]["file"])
        return self._required_tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in use, read once; with the sample it can be had after `prepare_data`.

        Raises:
            ValueError: none is given though the source needs one, or the file holds none with `<|endoftext|>`.
            FileNotFoundError: no such file.
        """
        if self._tokenizer is None or self._tokenizer.path != self.tokenizer_path:
            self._tokenizer = load_tokenizer(self.tokenizer_path)
        return self._tokenizer

    def prepare_data(self) -> None:
        """Check, and make the built-in sample where it is missing. Lightning calls it in one process a machine."""
        self.check()
        if self.source == "sample":
            ensure_sample(self._cache, self.vocab_size)

    def setup(self, stage: str | None = None) -> None:
        """Open the source. Called in every process; it does nothing the second time."""
        if self._train is not None:
            return
        super().setup(stage)
        corpus = self._setup_tokens() if self.source in ("sample", "tokens") else self._setup_text()
        options = asdict(self.options)
        del options["max_bad_line_share"]  # it changes no batch: a run may be resumed with another one
        if self.source in ("sample", "tokens"):
            options = {name: options[name] for name in ("seq_len", "batch_size", "seed", "shuffle", "reset_at_documents")}
        elif self.source == "hub" or self.validation_files is not None:
            options["validation_fraction"] = 0.0
        self._identity = {"source": self.source, **options, "corpus": corpus, "tokenizer": self.tokenizer.fingerprint}

    def _setup_tokens(self) -> str:
        folder = sample_folder(self._cache, self.vocab_size) / "tokens" if self.source == "sample" else Path(self._tokens_dir)

        def windows(split: str) -> TokenWindows:
            return TokenWindows(folder, split, self.seq_len, reset_at_documents=self.options.reset_at_documents)

        train = windows("train")
        splits = [split for split in load_manifest(folder)["splits"] if split != "train"]
        self._validation = {name: windows(split) for name, split in zip(self.validation_names, splits, strict=True)}
        self._train = EndlessBatches(
            train, self.batch_size, rank=self._rank, world_size=self._world_size, seed=self.seed, shuffle=self.shuffle
        )
        return train.fingerprint

    def _setup_text(self) -> str:
        shards: TextShards
        options = self.options
        if self.source == "local":
            files = resolve_files(self.train_files or [], "data.train_files")
            shards, corpus = LocalShards(files), corpus_fingerprint(files)
        else:
            shards = HubShards(self.hub_dataset, self.hub_config, self.hub_split, self.hub_revision)
            corpus = fingerprint_of(shards.identity)
        rows = None if self.validation_batches is None else self.validation_batches * self.batch_size * self._world_size
        sources: dict[str, tuple[TextShards, bool]] = {
            name or _ONLY: (LocalShards(paths), False) for name, paths in validation_sources(self.validation_files).items()
        }
        hashed = not sources and self.source == "local"
        if not sources:
            held_out = shards if hashed else HubShards(self.hub_dataset, self.hub_config, self.hub_validation_split, self.hub_revision)
            sources = {_ONLY: (held_out, hashed)}
        self._validation = {
            name: validation_windows(source, self.tokenizer, options, name, max_windows=rows, hashed=by_hash)
            for name, (source, by_hash) in sources.items()
        }
        if not hashed:
            options = StreamOptions(**{**asdict(options), "validation_fraction": 0.0})
        self._train = PackedBatches(shards, self.tokenizer_path, options, rank=self._rank, world_size=self._world_size)
        return corpus

    def _manifest(self) -> dict[str, Any]:
        return load_manifest(self._tokens_dir)

    @property
    def _tokens_dir(self) -> str:
        if self.tokens_dir is None:
            raise ValueError("data.source=tokens needs data.tokens_dir; give it or choose another source")
        return self.tokens_dir

    @property
    def _required_tokenizer(self) -> str:
        if self.requested_tokenizer is None:
            raise ValueError(f"data.source={self.source} needs data.tokenizer; give it or choose another source")
        return self.requested_tokenizer
