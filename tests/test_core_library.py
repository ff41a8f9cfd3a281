"""The compiled core's library: it can be switched off, and what is wrong with it is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convlayer.core import library as core

TOLD = "from convlayer.core.library import library, state; print(library() is None, state())"


@pytest.fixture
def anew(monkeypatch):
    """As in a process that has not looked for the library; the other tests keep theirs."""
    monkeypatch.setattr(core, "_found", core._found.__wrapped__)
    monkeypatch.delenv(core.SWITCH, raising=False)
    return monkeypatch


def built() -> bool:
    return core._path("_baseline").exists()


def test_the_environment_switches_it_off():
    done = subprocess.run(
        [sys.executable, "-c", TOLD],
        env={**os.environ, core.SWITCH: "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"True no compiled core: switched off by {core.SWITCH}=0\n"


def test_what_is_built_loads_and_is_of_the_packages_version(anew):
    found = core.library()
    assert (found is not None) == built()
    assert core.state().startswith("compiled core: " if built() else "no compiled core: ")
    if found is not None:
        assert found.core_version() == core.VERSION


def test_without_a_library_it_is_said_how_to_get_one(anew, tmp_path):
    anew.setattr(core, "FOLDER", tmp_path)
    assert core.library() is None
    assert "without a compiler" in core.state()
    assert core.AGAIN in core.state()


def test_a_library_that_does_not_load_is_none(anew, tmp_path: Path):
    anew.setattr(core, "FOLDER", tmp_path)
    core._path("_baseline").write_bytes(b"no library")
    assert core.library() is None
    assert "does not load" in core.state()


@pytest.mark.skipif(not built(), reason="no library is built")
def test_a_library_of_another_version_is_none(anew):
    anew.setattr(core, "VERSION", core.VERSION + 1)
    assert core.library() is None
    assert f"the package {core.VERSION}" in core.state()


@pytest.mark.skipif(not built(), reason="no library is built")
def test_without_the_faster_library_the_baseline_runs(anew):
    anew.setattr(core, "_faster", lambda: None)
    assert core.library() is not None
    assert core.state() == "compiled core: baseline"
