"""Dashboards and serving endpoints of the stand-in workspace, and helpers that all calls of the workspace use."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

Json = dict[str, Any]
MAX_ENDPOINT_CHARS = 63


class Refused(Exception):
    """Error for a refused request, which the workspace answers with an HTTP status, an error code and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


def missing(message: str) -> Refused:
    return Refused(404, "RESOURCE_DOES_NOT_EXIST", message)


def exists(message: str) -> Refused:
    return Refused(409, "RESOURCE_ALREADY_EXISTS", message)


def node(path: str) -> str:
    """Return the path of a workspace node without the optional prefix /Workspace."""
    return "/" + path.removeprefix("/").removeprefix("Workspace/").strip("/")


@dataclass(kw_only=True)
class Services:
    """Dashboards, serving endpoints, folders and files of the stand-in workspace."""

    nodes: dict[str, bytes | None] = field(default_factory=dict)
    """Dict from the path of each workspace node to the bytes of the file, or to None if the node is a folder."""
    dashboards: dict[str, Json] = field(default_factory=dict)
    versions: set[tuple[str, str]] = field(default_factory=set)
    """Registered model versions, as pairs of model name and version number."""
    endpoints: dict[str, Json] = field(default_factory=dict)
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(1001))

    def require_parent(self, path: str) -> None:
        parent = str(PurePosixPath(path).parent)
        if parent not in self.nodes:
            raise missing(f"The parent folder ({parent}) does not exist.")

    # -------------------------------------------------------------------------------------------- dashboards

    def create_dashboard(self, given: Json) -> Json:
        json.loads(given["serialized_dashboard"])
        path = node(f"{given['parent_path']}/{given['display_name']}.lvdash.json")
        self.require_parent(path)
        number = str(next(self._ids))
        self.nodes[path] = b""
        state = {"dashboard_id": number, "path": path, "etag": "1", "lifecycle_state": "ACTIVE"}
        self.dashboards[number] = given | state
        return self.dashboards[number]

    def read_dashboard(self, number: str, _: Json) -> Json:
        if number not in self.dashboards:
            raise missing(f"Dashboard {number} does not exist.")
        return self.dashboards[number]

    # -------------------------------------------------------------------------------------------- serving

    def create_endpoint(self, given: Json) -> Json:
        if len(given["name"]) > MAX_ENDPOINT_CHARS:
            raise Refused(400, "INVALID_PARAMETER_VALUE", f"The name has more than {MAX_ENDPOINT_CHARS} characters.")
        if given["name"] in self.endpoints:
            raise exists(f"Endpoint with name '{given['name']}' already exists.")
        return self.configure_endpoint(given["name"], given["config"])

    def configure_endpoint(self, name: str, given: Json) -> Json:
        for served in given["served_entities"]:
            if (served["entity_name"], served["entity_version"]) not in self.versions:
                raise missing(f"Version {served['entity_version']} of {served['entity_name']} does not exist.")
        number = self.endpoints[name]["id"] if name in self.endpoints else str(next(self._ids))
        config = {"served_entities": given["served_entities"]}
        self.endpoints[name] = {"name": name, "id": number, "config": config}
        return self.endpoints[name]
