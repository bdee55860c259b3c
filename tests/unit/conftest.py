"""What several unit tests share."""

from collections.abc import Callable, Iterator

import psutil
import pytest
import torch
from tiny_run import make_char_run, make_run

from nanochat.rundir import RunDir


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    """A finished run whose model knows a few answers by heart."""
    yield make_run(str(tmp_path_factory.mktemp("tiny") / "run"))


@pytest.fixture(scope="session")
def char_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of characters whose best checkpoint is not its newest."""
    return make_char_run(str(tmp_path_factory.mktemp("char") / "run"))


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`status` and `stop` ask no Docker engine of this machine, whatever runs there."""
    monkeypatch.setenv("DOCKER_HOST", "unix:///none/docker.sock")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors; a second thread would only wait for its turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def new_children() -> Callable[[], list[psutil.Process]]:
    """Living processes below this one that the test has started; other tests keep theirs."""
    before = set(psutil.Process().children(recursive=True))

    def living() -> list[psutil.Process]:
        found = set(psutil.Process().children(recursive=True)) - before
        return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    return living
