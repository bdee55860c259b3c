"""What the end-to-end tests share: the engine, and the image built from this checkout."""

from collections.abc import Iterator

import pytest

from tests.twin.engine import Engine, build_image, given_image


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The Docker engine of this machine, without an image."""
    made = Engine()
    yield made
    made.close()


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """Tag of the image: a given one, else built from this checkout (seconds where unchanged)."""
    if given_image() is None:
        build_image(engine.image)
    return engine.image


@pytest.fixture
def volume(engine: Engine) -> Iterator[str]:
    """A fresh volume."""
    with engine.volume() as name:
        yield name
