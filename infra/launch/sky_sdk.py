"""SkyPilot's Python API behind the few calls of infra/launch/sky.py."""

import contextlib
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
        made = self._sky.Task.from_yaml_config(task)
        if secrets:
            made.update_secrets(secrets)
        self._request = self._sky.launch(made, cluster_name=cluster)
        number, _ = self._sky.stream_and_get(self._request)
        return int(number)

    def cancel_launch(self) -> None:
        with contextlib.suppress(Exception):  # the tear-down that follows is what counts
            self._sky.get(self._sky.api_cancel([self._request]))

    def logs(self, cluster: str, job: int) -> int:
        return int(self._sky.tail_logs(cluster, job, follow=True) or 0)

    def exists(self, cluster: str) -> bool:
        return any(c["name"] == cluster for c in self.status())

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
