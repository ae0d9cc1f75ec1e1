"""Folders that all tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import tiny


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViLT without a head for questions."""
    return tiny.vilt_folder(tmp_path_factory.mktemp("models") / "student", "ViltModel")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViLT that answers with colours, in an order of its own."""
    return tiny.vilt_folder(tmp_path_factory.mktemp("models") / "teacher", labels=["white", "red", "blue", "green"])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where data lie."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def questions(folder: Path) -> Path:
    """40 questions about four images."""
    return tiny.squares(folder)
