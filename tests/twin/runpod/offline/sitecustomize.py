"""Read by every Python of the managed jobs' server: what SkyPilot takes for the internet.

Its controller believes that a cluster is lost only while https://8.8.8.8 or https://1.1.1.1
answers, past every proxy; where this runs neither can. This is the only change of SkyPilot.
"""

import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULE = "sky.backends.backend_utils"


class Finder(MetaPathFinder):
    """Sets the addresses when the module has run."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec: ModuleSpec | None = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_set(module: ModuleType) -> None:
            run(module)
            assert module._TEST_IP_LIST
            module._TEST_IP_LIST = [os.environ["EMULATED_INTERNET"]]

        spec.loader.exec_module = run_and_set  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
