"""`prepare`: documents in JSON lines to a BPE tokenizer and memory-mapped tokens."""

from collections.abc import Sequence

from mmrec.commandline.parser import PROGRAM, OneLineErrors


def build_parser() -> OneLineErrors:
    """The options of `datamodules.prepare.prepare`, with its defaults and its docstring as help."""
    from datamodules.prepare import prepare

    parser = OneLineErrors(prog=f"{PROGRAM} prepare", description="Train a BPE tokenizer and write memory-mapped tokens; resumable.")
    parser.add_function_arguments(prepare, fail_untyped=False)
    return parser


def run(arguments: Sequence[str]) -> None:
    """Prepare, and say what the folder holds."""
    from datamodules.pieces import Joining
    from datamodules.prepare import prepare

    parser = build_parser()
    options = parser.parse_args(list(arguments)).as_dict()
    manifest = prepare(**options)
    if "joined" in manifest:  # a folder that was joined before it was counted has none
        print(f"train: {Joining(**manifest['joined']).summary()}")
    for name, split in manifest["splits"].items():
        print(f"{name}: {split['tokens']:,} tokens in {len(split['shards'])} shards")
    output = options["output"]
    print(f"vocabulary: {manifest['vocab_size']:,}; tokenizer: {output}/{manifest['tokenizer']['file']}")
    print(
        f"train on it with --data.source tokens --data.tokens_dir {output} --model.network.vocab_size {manifest['vocab_size']}",
        flush=True,
    )
