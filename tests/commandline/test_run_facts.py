"""What ranks must share: each value of the config by its key, versions, and hashes that a changed byte changes."""

from pathlib import Path

from mmrec.commandline.run_facts import files_digest, run_facts


def test_every_value_of_the_config_has_its_key() -> None:
    facts = run_facts({"model": {"network": {"width": 16}, "betas": [0.9, 0.95]}, "seed": None})
    assert facts["config.model.network.width"] == "16"
    assert facts["config.model.betas"] == "[0.9, 0.95]"
    assert facts["config.seed"] == "None"
    assert facts == run_facts({"seed": None, "model": {"betas": [0.9, 0.95], "network": {"width": 16}}})


def test_versions_and_hashes_are_there() -> None:
    facts = run_facts({})
    assert facts["the version of torch"][0].isdigit()
    assert facts["the version of mmrec"][0].isdigit()
    for name in ("the packages' source", "the kernels' tables of tiles"):
        assert len(facts[name]) == 64
    assert facts["the git commit"] == "none" or len(facts["the git commit"]) == 40


def test_a_byte_a_name_or_a_file_more_changes_the_digest(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"one")
    (tmp_path / "b.py").write_bytes(b"two")
    found = {files_digest(tmp_path, tmp_path.glob("*"))}
    assert files_digest(tmp_path, sorted(tmp_path.glob("*"), reverse=True)) in found
    (tmp_path / "b.py").write_bytes(b"twO")
    found.add(files_digest(tmp_path, tmp_path.glob("*")))
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    found.add(files_digest(tmp_path, tmp_path.glob("*")))
    (tmp_path / "d.py").touch()
    found.add(files_digest(tmp_path, tmp_path.glob("*")))
    assert len(found) == 4
