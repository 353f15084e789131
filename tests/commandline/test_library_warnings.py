"""What libraries say about themselves does not come between a user and what can be mended."""

import logging
import re
from pathlib import Path

import pytest
import yaml
from processes import run_python

from mmrec.commandline.library_warnings import ignore_known_warnings


def validation_loss(printed: str) -> float:
    return float(re.search(r"val/loss\s*│\s*([\d.]+)", printed)[1])


def test_two_processes_validate_twice_as_many_sequences_and_nothing_is_said_of_it(
    finished_run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """`data.validation_batches` counts a rank's; the loss is reduced before Lightning sees it, whatever it recommends."""
    content = yaml.safe_load(tiny_config.read_text())
    content["trainer"] |= {"devices": 2, "strategy": "ddp"}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content))
    options = ("-m", "mmrec.cli", "validate", "--config", "two.yaml", "--trainer.default_root_dir", str(finished_run))
    two = run_python(*options, "--data.validation_batches", "1")
    for said in ("sync_dist", "RankChange", "litlogger", "litmodels"):
        assert said not in two.stdout + two.stderr
    alone = ("--trainer.devices", "1", "--trainer.strategy", "auto", "--data.validation_batches")
    assert validation_loss(two.stdout) == pytest.approx(validation_loss(run_python(*options, *alone, "2").stdout), abs=1e-5)
    assert validation_loss(two.stdout) != pytest.approx(validation_loss(run_python(*options, *alone, "1").stdout), abs=1e-5)


def test_a_start_advertises_nothing_and_tells_what_lightning_found(
    finished_run: Path, tiny_config: Path, cli, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        assert cli("validate", "--config", str(tiny_config), "--trainer.default_root_dir", str(finished_run)).code == 0
    told = [record.getMessage() for record in caplog.records]
    assert any(message.startswith("GPU available: ") for message in told)
    assert [message for message in told if "Tip" in message] == []


def test_only_the_text_decides(caplog: pytest.LogCaptureFixture) -> None:
    ignore_known_warnings()
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO, log.name):
        log.info("💡 Tip: %s", "try installing [litmodels](https://pypi.org)")
        log.info("💡 Tip: see %s", "litmodels")
    assert [record.getMessage() for record in caplog.records] == ["💡 Tip: see litmodels"]
