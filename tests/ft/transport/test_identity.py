"""The identity of run folders: a copy becomes a run of its own, and nothing else does."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keepwarm.ft.transport import identity
from keepwarm.ft.transport.auth import load_secret
from keepwarm.ft.transport.identity import OF_ONE_START, claim_secret, copied_from, separate


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for name in ("agents", "nodes", "checkpoints"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text(name)
    (folder / "submission.json").write_text("{}")
    (folder / "cancelled-7").touch()
    claim_secret(folder)
    return folder


def secret_of(folder: Path) -> bytes:
    return load_secret(folder / "secret")


def test_copy_gets_a_secret_of_its_own_and_leaves_the_processes_of_the_original_behind(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert copied_from(copy) == str(run)
    assert claim_secret(copy) == secret_of(copy) != secret_of(run)
    assert f"{copy}: this is a copy of {run} and becomes a run of its own" in capsys.readouterr().err
    assert not [path for pattern in OF_ONE_START for path in copy.glob(pattern)]
    assert (copy / "checkpoints" / "file").exists()
    assert (run / "agents" / "file").exists()
    assert copied_from(copy) is copied_from(run) is None
    assert claim_secret(copy) == secret_of(copy)
    assert capsys.readouterr().err == ""


def test_copy_of_a_copy_is_known_too(run: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(run, first)
    claim_secret(first)
    shutil.copytree(first, second)
    assert copied_from(second) == str(first)
    assert len({claim_secret(folder) for folder in (run, first, second)}) == 3


def test_moved_run_keeps_its_secret_and_what_then_takes_its_place_is_a_copy(run: Path, tmp_path: Path) -> None:
    before, moved = secret_of(run), tmp_path / "moved"
    run.rename(moved)
    assert claim_secret(moved) == before
    shutil.copytree(moved, run)
    assert copied_from(run) == str(moved)
    assert claim_secret(run) != before


def test_run_on_storage_whose_inodes_do_not_last_keeps_its_secret(run: Path, tmp_path: Path) -> None:
    before = secret_of(run)
    shutil.copytree(run, tmp_path / "same bytes")
    shutil.rmtree(run)
    (tmp_path / "same bytes").rename(run)
    assert claim_secret(run) == before


def test_many_processes_that_start_a_copy_at_once_share_one_secret(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    with ThreadPoolExecutor(16) as pool:
        found = set(pool.map(claim_secret, [copy] * 16))
    assert found == {secret_of(copy)}
    assert secret_of(copy) != secret_of(run)
    # One that died before it had replaced the secret is followed by another with the same one.
    again = tmp_path / "again"
    shutil.copytree(run, again)

    def dies(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(identity, "_leave_behind", dies)
        with pytest.raises(KeyboardInterrupt):
            separate(again)
    (successor,) = again.glob("secret-after-*")
    monkeypatch.setattr(identity, "TAKE_OVER_S", 0.0)
    assert claim_secret(again) == successor.read_bytes()


def test_copy_of_a_run_without_a_secret_leaves_its_jobs_behind_and_makes_none(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    (run / "submission.json").write_text("{}")
    identity.remember(run)
    shutil.copytree(run, copy)
    separate(copy)
    assert [path.name for path in copy.iterdir()] == ["place.json"]
    assert copied_from(copy) is None


def test_folder_of_an_earlier_version_is_remembered_from_its_next_start_on(run: Path, tmp_path: Path) -> None:
    (run / "place.json").unlink()
    before = secret_of(run)
    assert claim_secret(run) == before
    shutil.copytree(run, tmp_path / "copy")
    assert copied_from(tmp_path / "copy") == str(run)
