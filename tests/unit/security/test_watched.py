"""Files that change while a process runs."""

import os
from pathlib import Path

import pytest

from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.security.watched import Watched


class Clock:
    """Seconds that pass when told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def watched(file: Path, clock: Clock, reads: list[str]) -> Watched[str]:
    """The text of a file; "bad" is refused."""

    def load() -> str:
        text = file.read_text("utf-8")
        reads.append(text)
        if text == "bad":
            raise ConfigError("bad")
        return text

    return Watched("the file", [str(file)], load, recheck_s=1.0, clock=clock)


def test_a_change_is_seen_when_it_is_time_to_look(tmp_path: Path) -> None:
    file, clock, reads = tmp_path / "f", Clock(), list[str]()
    file.write_text("one")
    value = watched(file, clock, reads)
    file.write_text("three")
    assert value.get() == "one"
    clock.now_s = 1.0
    assert value.get() == "three"
    clock.now_s = 9.0
    assert value.get() == "three"
    assert reads == ["one", "three"]


def test_a_bad_version_is_said_once_and_the_good_one_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, clock, reads = tmp_path / "f", Clock(), list[str]()
    file.write_text("one")
    value = watched(file, clock, reads)
    file.write_text("bad")
    for second in range(1, 5):
        clock.now_s = second
        assert value.get() == "one"
    assert [r.message for r in caplog.records] == ["the file: the new version is not used: bad"]
    file.write_text("better")
    clock.now_s = 5
    assert value.get() == "better"


def test_replacing_and_removing_are_changes(tmp_path: Path) -> None:
    """Kubernetes swaps a link to a folder; the new file may be as old and as long as the former."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
        os.utime(tmp_path / name / "f", ns=(1, 1))
    link, clock = tmp_path / "current", Clock()
    link.symlink_to("a")
    value = watched(link / "f", clock, [])
    new = tmp_path / "new"
    new.symlink_to("b")
    new.replace(link)
    clock.now_s = 1
    assert value.get() == "b"


def test_the_first_version_must_be_good(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("bad")
    with pytest.raises(ConfigError):
        watched(file, Clock(), [])
