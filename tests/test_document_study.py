"""The document's tables of convergence: what is compared with what."""

from pathlib import Path
from types import ModuleType

from test_document import PLACE, written


def test_a_run_that_never_reaches_the_baseline_s_end_is_not_left_out(document: ModuleType, tmp_path: Path) -> None:
    of_study = {"study": "protocol", "steps": 10000, "tokens_m": 81.9, "val_loss": 3.0, "loss_variance": 0.02} | PLACE
    reached = {"off": (9900, None), "mse": (9000, None), "normalized": (None,)}
    rows = [
        of_study | {"uboo": uboo, "seed": seed, "steps_to_baseline": steps}
        for uboo, several in reached.items()
        for seed, steps in enumerate(several)
    ]
    made = written(document, tmp_path, convergence_h100=rows)
    # Seed by seed: 9,900 and 10,000 against 9,000 and 10,000; 9,900 against 10,000.
    assert "| 9,950 (9,900 … 10,000) | 9,500 (9,000 … 10,000) | 10,000 | −20 … −30 % | −4.5 % | +1.0 % |" in made
    assert "| Peak memory, GiB | – | – | – | +8 … +10 % | – | – |" in made
    assert "`mse` −4.5 %, `normalized` +1.0 % | `mse` no, `normalized` no |" in made


def test_the_protocol_s_two_forms_have_a_command_each_and_what_they_lack_is_owed(document: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"study": "protocol", "steps": steps, "batch_tokens": tokens, "uboo": uboo, "seed": seed, "val_loss": 3.0} | PLACE
        for steps, tokens in ((10000, 8192), (381, 262144))
        for uboo in ("off", "mse", "normalized")
        for seed in range(3 if steps == 10000 else 1 + (uboo == "off"))
    ]
    made = written(document, tmp_path, convergence_h100=rows)
    assert "train_uboo_test --study protocol --tokens-dir" in made
    assert "train_uboo_test --study protocol_128 --tokens-dir" in made
    assert "`--study uboo`; `--study finalist`; `--study protocol_128`: off 2, mse 1, normalized 1 of 3 seeds |" in made
    made = written(document, tmp_path, convergence_h100=[row for row in rows if row["steps"] == 10000])
    assert "`--study uboo`; `--study finalist`; `--study protocol_128` |" in made


def test_finalists_stand_beside_the_transformer(document: ModuleType, tmp_path: Path) -> None:
    of_study = {"study": "finalist", "params_m": 125.0, "tokens_m": 98.1, "variant": None} | PLACE
    rows = [
        of_study | {"model": model, "seed": seed, "lr": rate, "val_loss": loss + 0.1 * seed, "val_loss_c4": 5.0}
        for model, rate, loss in (("mm-rec", 2e-3, 3.8), ("mm-rec", 4e-3, 3.9), ("transformer++", 1e-3, 4.0))
        for seed in (0, 1)
    ]
    made = written(document, tmp_path, convergence_h100=rows)
    assert "| mm-rec | 125.0 | 98 | 2 | 0.002 | 3.8500 (3.8000 … 3.9000) | -0.2000 |" in made
    assert "| mm-rec | 125.0 | 98 | 2 | 0.004 | 3.9500 (3.9000 … 4.0000) | -0.1000 |" in made
    assert "| transformer++ | 125.0 | 98 | 2 | 0.001 | 4.0500 (4.0000 … 4.1000) | – |" in made
