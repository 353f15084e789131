"""The command line's own logger does not let a full disk end the run."""

from pathlib import Path

import pytest


def test_fit_reaches_its_end_where_no_event_can_be_written(cli, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(path: Path, *arguments, **options):
        if path.name.startswith("events.out.tfevents."):
            raise OSError(28, "No space left on device")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    run = tmp_path / "run"
    ended = cli("fit", "--config", str(tiny_config), "--trainer.default_root_dir", str(run), "--auxiliary_curves.histograms", "true")
    assert ended.code == 0
    assert [line for line in ended.err.splitlines() if "TensorBoard" in line] == [
        line for line in ended.err.splitlines() if line.startswith(f"warning: cannot write TensorBoard's {run}/tb/events.out.tfevents.")
    ]
    assert ended.err.count("No space left on device") == 1
    assert any(path.name.startswith("step=000005-loss=") for path in (run / "checkpoints").iterdir())
    assert not list((run / "tb").glob("events*"))
