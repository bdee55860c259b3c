"""SkyPilot's Python API behind the few calls of infra/launch/sky.py."""

import contextlib
import copy
from typing import Any

from infra.launch.base import LaunchError

MISSING = (
    "SkyPilot is not in this environment, whose packages it cannot share: in the checkout, "
    "make cloud-venv, then .venv-cloud/bin/nanochat launch … --to sky"
)


class SkyPilot:
    """The real SkyPilot. Raises LaunchError where it is not installed."""

    def __init__(self) -> None:
        try:
            import sky
        except ImportError:
            raise LaunchError(MISSING) from None
        if not hasattr(sky, "launch"):  # the folder sky/ of the checkout, as a namespace package
            raise LaunchError(MISSING)
        self._sky: Any = sky
        self._request: Any = None

    def launch(self, task: dict[str, Any], cluster: str, secrets: dict[str, str]) -> int:
        self._request = self._sky.launch(self._task(task, secrets), cluster_name=cluster)
        number, _ = self._sky.stream_and_get(self._request)
        return int(number)

    def launch_managed(self, task: dict[str, Any], name: str, secrets: dict[str, str]) -> int:
        request = self._sky.jobs.launch(self._task(task, secrets), name=name)
        numbers, _ = self._sky.stream_and_get(request)
        return int(numbers[0] if isinstance(numbers, list) else numbers)

    def rents_controller(self) -> bool:
        config = self._sky.skypilot_config
        controller = config.get_nested(("jobs", "controller"), None) or {}
        return not (controller.get("consolidation_mode") or controller.get("resources"))

    def _task(self, task: dict[str, Any], secrets: dict[str, str]) -> Any:
        made = self._sky.Task.from_yaml_config(copy.deepcopy(task))  # it takes it apart
        if secrets:
            made.update_secrets(secrets)
        return made

    def cancel_launch(self) -> None:
        with contextlib.suppress(Exception):  # the tear-down that follows is what counts
            self._sky.get(self._sky.api_cancel([self._request]))

    def logs(self, cluster: str, job: int) -> int:
        return int(self._sky.tail_logs(cluster, job, follow=True) or 0)

    def exists(self, cluster: str) -> bool:
        # asked anew: what SkyPilot remembers may be a pod that is gone
        mode = self._sky.StatusRefreshMode.FORCE
        return bool(self._sky.get(self._sky.status([cluster], refresh=mode)))

    def down(self, cluster: str) -> None:
        self._sky.get(self._sky.down(cluster))

    def status(self) -> list[dict[str, Any]]:
        return [
            {
                "name": str(c["name"]),
                "state": str(getattr(c["status"], "value", c["status"])),
                "autostop_minutes": c["autostop"],
                "down": c["to_down"],
            }
            for c in self._sky.get(self._sky.status())
        ]
