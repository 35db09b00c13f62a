"""Stand-in for a Databricks workspace: an HTTP server on loopback that answers the calls of Databricks' CLI.

The workspace stores what was deployed. Like a real workspace, the stand-in refuses requests with a missing parent
folder, catalog, schema, table, cluster or runtime version. The stand-in also refuses an unknown principal or privilege,
and a name that already exists. A request that the stand-in does not know is answered with 501, so a test fails instead
of passing by accident.
"""

from __future__ import annotations

import base64
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import stand_in_apps
from stand_in_apps import Apps
from stand_in_jobs import job_problem
from stand_in_registry import StandInRegistry
from stand_in_services import Json, Refused, exists, missing, node

POLL_SECONDS = 0.02
"""Interval at which the server checks whether it must end, in seconds. With the default of 0.5 s, each test would wait
longer for the end of the server.
"""
PRIVILEGES = {"USE_SCHEMA", "SELECT", "MODIFY", "CREATE_TABLE", "READ_VOLUME", "WRITE_VOLUME", "EXECUTE"}
LEVELS = {
    "jobs": {"IS_OWNER", "CAN_MANAGE", "CAN_MANAGE_RUN", "CAN_VIEW"},
    "experiments": {"CAN_MANAGE", "CAN_EDIT", "CAN_READ"},
    "dashboards": {"CAN_MANAGE", "CAN_EDIT", "CAN_RUN", "CAN_READ"},
    "directories": {"CAN_MANAGE", "CAN_EDIT", "CAN_RUN", "CAN_READ"},
    "apps": {"CAN_MANAGE", "CAN_USE"},
    "serving-endpoints": {"CAN_MANAGE", "CAN_QUERY", "CAN_VIEW"},
}
PRINCIPAL_KEYS = ("user_name", "group_name", "service_principal_name")


@dataclass
class Workspace(Apps):
    """Content of the stand-in workspace, which a test sets before a deployment and reads after the deployment.

    `user` is the principal that deploys and that sends all requests except those of apps.
    """

    user: str
    groups: set[str] = field(default_factory=set)
    catalogs: set[str] = field(default_factory=lambda: {"main"})
    runtimes: set[str] = field(
        default_factory=lambda: {"18.x-cpu-ml-scala2.13", "18.x-gpu-ml-scala2.13", "17.3.x-cpu-ml-scala2.13"}
    )
    node_types: set[str] = field(default_factory=lambda: {"g5.4xlarge", "m6gd.2xlarge"})
    schemas: dict[str, Json] = field(default_factory=dict)
    volumes: dict[str, Json] = field(default_factory=dict)
    experiments: dict[str, Json] = field(default_factory=dict)
    jobs: dict[int, Json] = field(default_factory=dict)
    runs: list[Json] = field(default_factory=list)
    grants: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    permissions: dict[str, list[Json]] = field(default_factory=dict)
    denied: set[str] = field(default_factory=set)
    """Calls that are refused with 403, such as `experiments/create`."""

    def __post_init__(self) -> None:
        self._node_ids: dict[str, int] = {}
        self.registry = StandInRegistry(self.user, self.schemas)
        self.nodes |= {"/": None, "/Shared": None, "/Users": None, f"/Users/{self.user}": None}

    # -------------------------------------------------------------------------------------------- calls

    def answer(self, method: str, path: str, query: Json, body: bytes) -> Any:
        """Answer one request with JSON or bytes.

        Raises:
            Refused: the workspace refuses the request.
        """
        for name in self.denied:
            if path.endswith(name):
                raise Refused(403, "PERMISSION_DENIED", f"{self.user} does not have permission for {name}")
        if path.startswith("/api/2.0/workspace-files/import-file/"):
            return self.write(node(path.removeprefix("/api/2.0/workspace-files/import-file/")), body, query)
        if path == "/oidc/v1/token":
            # The stand-in checks no secrets. The token is the application id, so that later calls name the caller.
            name = base64.b64decode(self.caller.removeprefix("Basic ")).decode().partition(":")[0]
            return {"access_token": name, "token_type": "Bearer", "expires_in": 3600}
        if (found_there := self.registry.answer(method, path, query, body)) is not None:
            return found_there
        for pattern, call in (CALLS | stand_in_apps.CALLS).items():
            if found := re.fullmatch(pattern, f"{method} {path}"):
                given = json.loads(body) if body else {}
                return call(self, *found.groups(), given | query)
        raise Refused(501, "NOT_IMPLEMENTED", f"the stand-in does not know {method} {path}")

    # -------------------------------------------------------------------------------------------- folders and files

    def write(self, path: str, content: bytes, query: Json) -> Json:
        self.require_parent(path)
        if query.get("overwrite") != "true" and path in self.nodes:
            raise exists(f"Path ({path}) already exists.")
        self.nodes[path] = content
        return {}

    def mkdirs(self, given: Json) -> Json:
        path = PurePosixPath(node(given["path"]))
        home = next((str(each) for each in (path, *path.parents) if str(each.parent) == "/Users"), "/")
        if home not in self.nodes:
            raise missing(f"The parent folder ({home}) does not exist.")
        self.nodes |= {str(each): None for each in (path, *path.parents)}
        return {}

    def status(self, given: Json) -> Json:
        path = node(given["path"])
        if path not in self.nodes:
            raise missing(f"Path ({path}) doesn't exist.")
        number = self._node_ids.setdefault(path, next(self._ids))
        kind = "DIRECTORY" if self.nodes[path] is None else "FILE"
        return {"object_id": number, "object_type": kind, "path": given["path"]}

    def export(self, given: Json) -> bytes:
        content = self.nodes.get(node(given["path"]))
        if content is None:
            raise missing(f"Path ({given['path']}) doesn't exist.")
        return content

    def delete(self, given: Json) -> Json:
        path = node(given["path"])
        if path not in self.nodes:
            raise missing(f"Path ({path}) doesn't exist.")
        self.nodes = {name: each for name, each in self.nodes.items() if not f"{name}/".startswith(f"{path}/")}
        return {}

    # -------------------------------------------------------------------------------------------- Unity Catalog

    def create_schema(self, given: Json) -> Json:
        if given["catalog_name"] not in self.catalogs:
            raise Refused(404, "CATALOG_DOES_NOT_EXIST", f"Catalog '{given['catalog_name']}' does not exist.")
        name = f"{given['catalog_name']}.{given['name']}"
        if name in self.schemas:
            raise Refused(409, "SCHEMA_ALREADY_EXISTS", f"Schema '{name}' already exists")
        self.schemas[name] = given | {"full_name": name, "owner": self.user}
        return self.schemas[name]

    def create_volume(self, given: Json) -> Json:
        schema = f"{given['catalog_name']}.{given['schema_name']}"
        if schema not in self.schemas:
            raise Refused(404, "SCHEMA_DOES_NOT_EXIST", f"Schema '{schema}' does not exist.")
        name = f"{schema}.{given['name']}"
        self.volumes[name] = given | {"full_name": name, "owner": self.user}
        return self.volumes[name]

    def delete_schema(self, name: str, given: Json) -> Json:
        held = [volume for volume in self.volumes if volume.startswith(f"{name}.")]
        if held and given.get("force") != "true":
            raise Refused(400, "BAD_REQUEST", f"Schema '{name}' is not empty: {held}")
        self.volumes = {key: each for key, each in self.volumes.items() if key not in held}
        del self.schemas[name]
        self.grants.pop(name, None)
        return {}

    def change_grants(self, name: str, given: Json) -> Json:
        held = self.grants.setdefault(name, {})
        for change in given["changes"]:
            self.require_principal(change["principal"])
            if unknown := set(change.get("add", [])) - PRIVILEGES:
                raise Refused(400, "INVALID_PARAMETER_VALUE", f"Privilege {unknown} is not applicable to a schema")
            privileges = held.setdefault(change["principal"], set())
            gone = change.get("remove", [])
            privileges.difference_update(privileges.copy() if "ALL_PRIVILEGES" in gone else gone)
            privileges.update(change.get("add", []))
        return self.read_grants(name, {})

    def read_grants(self, name: str, _: Json) -> Json:
        held = self.grants.get(name, {})
        return {"privilege_assignments": [{"principal": who, "privileges": sorted(p)} for who, p in held.items() if p]}

    def require_principal(self, name: str) -> None:
        apps = {app["service_principal_client_id"] for app in self.apps.values()}
        if name not in {self.user, *self.groups, *apps}:
            raise Refused(404, "PRINCIPAL_DOES_NOT_EXIST", f"Could not find principal with name {name}")

    # -------------------------------------------------------------------------------------------- permissions

    def set_permissions(self, kind: str, number: str, given: Json) -> Json:
        for entry in given["access_control_list"]:
            self.require_principal(next(entry[key] for key in PRINCIPAL_KEYS if key in entry))
            if entry["permission_level"] not in LEVELS[kind]:
                raise Refused(400, "INVALID_PARAMETER_VALUE", f"{entry['permission_level']} is no permission of {kind}")
        self.permissions[f"{kind}/{number}"] = given["access_control_list"]
        return self.read_permissions(kind, number, {})

    def add_permissions(self, kind: str, number: str, given: Json) -> Json:
        kept = [
            each for each in self.permissions.get(f"{kind}/{number}", []) if each not in given["access_control_list"]
        ]
        return self.set_permissions(kind, number, {"access_control_list": kept + given["access_control_list"]})

    def read_permissions(self, kind: str, number: str, _: Json) -> Json:
        entries = self.permissions.get(
            f"{kind}/{number}", [{"service_principal_name": self.user, "permission_level": "CAN_MANAGE"}]
        )
        held = []
        for entry in entries:
            who = {key: entry[key] for key in PRINCIPAL_KEYS if key in entry}
            level = {"permission_level": entry["permission_level"], "inherited": False}
            held.append(who | {"all_permissions": [level]})
        return {"object_id": f"/{kind}/{number}", "object_type": kind, "access_control_list": held}

    # -------------------------------------------------------------------------------------------- MLflow

    def create_experiment(self, given: Json) -> Json:
        name = node(given["name"])
        self.require_parent(name)
        if name in self.nodes:
            raise exists(f"Node named '{name}' already exists")
        number = str(next(self._ids))
        self.nodes[name] = b""
        self.experiments[number] = given | {"experiment_id": number, "name": name, "lifecycle_stage": "active"}
        return {"experiment_id": number}

    def read_experiment(self, given: Json) -> Json:
        for number, experiment in self.experiments.items():
            if given.get("experiment_id") == number or node(given.get("experiment_name", "")) == experiment["name"]:
                return {"experiment": experiment}
        raise missing("No experiment with this id or name exists")

    def set_experiment_tag(self, given: Json) -> Json:
        tags = self.experiments[given["experiment_id"]].setdefault("tags", [])
        tags[:] = [tag for tag in tags if tag["key"] != given["key"]] + [{"key": given["key"], "value": given["value"]}]
        return {}

    def delete_experiment(self, given: Json) -> Json:
        del self.nodes[self.experiments.pop(given["experiment_id"])["name"]]
        return {}

    # -------------------------------------------------------------------------------------------- jobs

    def create_job(self, given: Json) -> Json:
        self.check_job(given)
        number = next(self._ids)
        self.jobs[number] = given
        return {"job_id": number}

    def reset_job(self, given: Json) -> Json:
        self.check_job(given["new_settings"])
        self.jobs[given["job_id"]] = given["new_settings"]
        return {}

    def check_job(self, settings: Json) -> None:
        for who in settings.get("run_as", {}).values():
            self.require_principal(who)
        if problem := job_problem(settings, self):
            raise Refused(400, "INVALID_PARAMETER_VALUE", problem)

    def read_job(self, given: Json) -> Json:
        number = int(given["job_id"])
        if number not in self.jobs:
            raise missing(f"Job {number} does not exist.")
        return {"job_id": number, "creator_user_name": self.user, "settings": self.jobs[number]}

    def delete_job(self, given: Json) -> Json:
        del self.jobs[given["job_id"]]
        return {}

    def run_job(self, given: Json) -> Json:
        declared = {parameter["name"] for parameter in self.jobs[given["job_id"]]["parameters"]}
        if unknown := set(given.get("job_parameters", {})) - declared:
            raise Refused(400, "INVALID_PARAMETER_VALUE", f"the job has no parameter {unknown}")
        self.runs.append(given)
        return {"run_id": len(self.runs), "number_in_job": len(self.runs)}

    def read_run(self, given: Json) -> Json:
        state = {"life_cycle_state": "TERMINATED", "result_state": "SUCCESS"}
        return {"run_id": int(given["run_id"]), "state": state, "run_page_url": "http://127.0.0.1/run"}


def _item(kind: str, group: str) -> Callable[..., Json]:
    """Return the handler of a call that reads one item (a schema, a Volume or an endpoint) by name."""

    def read(workspace: Workspace, name: str, _: Json) -> Json:
        held: dict[str, Json] = getattr(workspace, group)
        if name not in held:
            raise Refused(404, f"{kind.upper()}_DOES_NOT_EXIST", f"{kind} '{name}' does not exist.")
        return held[name]

    return read


CALLS: dict[str, Callable[..., Any]] = {
    r"HEAD /simple/": lambda w, _: {},
    r"GET /\.well-known/databricks-config": lambda w, _: {"workspace_id": "1", "oidc_endpoint": f"{w.url}/oidc"},
    r"GET /api/2\.0/preview/scim/v2/Me": lambda w, _: {"id": "1", "userName": w.user},
    r"POST /telemetry-ext": lambda w, _: {"errors": [], "numProtoSuccess": 1},
    r"GET /api/2\.0/workspace/get-status": Workspace.status,
    r"GET /api/2\.0/workspace/export": Workspace.export,
    r"POST /api/2\.0/workspace/mkdirs": Workspace.mkdirs,
    r"POST /api/2\.0/workspace/delete": Workspace.delete,
    r"POST /api/2\.1/unity-catalog/schemas": Workspace.create_schema,
    r"GET /api/2\.1/unity-catalog/schemas/(.+)": _item("Schema", "schemas"),
    r"DELETE /api/2\.1/unity-catalog/schemas/(.+)": Workspace.delete_schema,
    r"POST /api/2\.1/unity-catalog/volumes": Workspace.create_volume,
    r"GET /api/2\.1/unity-catalog/volumes/(.+)": _item("Volume", "volumes"),
    r"DELETE /api/2\.1/unity-catalog/volumes/(.+)": lambda w, name, _: [w.volumes.pop(name), {}][1],
    r"PATCH /api/2\.1/unity-catalog/permissions/schema/(.+)": Workspace.change_grants,
    r"GET /api/2\.1/unity-catalog/permissions/schema/(.+)": Workspace.read_grants,
    r"PUT /api/2\.0/permissions/([\w-]+)/([\w-]+)": Workspace.set_permissions,
    r"PATCH /api/2\.0/permissions/([\w-]+)/([\w-]+)": Workspace.add_permissions,
    r"GET /api/2\.0/permissions/([\w-]+)/([\w-]+)": Workspace.read_permissions,
    r"POST /api/2\.0/mlflow/experiments/create": Workspace.create_experiment,
    r"POST /api/2\.0/mlflow/experiments/delete": Workspace.delete_experiment,
    r"POST /api/2\.0/mlflow/experiments/set-experiment-tag": Workspace.set_experiment_tag,
    r"GET /api/2\.0/mlflow/experiments/get(?:-by-name)?": Workspace.read_experiment,
    r"POST /api/2\.0/mlflow/experiments/search": lambda w, _: {"experiments": list(w.experiments.values())},
    r"GET /api/2\.0/serving-endpoints/([\w-]+)": _item("Endpoint", "endpoints"),
    r"POST /api/2\.0/serving-endpoints": Workspace.create_endpoint,
    r"PUT /api/2\.0/serving-endpoints/([\w-]+)/config": Workspace.configure_endpoint,
    r"POST /api/2\.0/lakeview/dashboards": Workspace.create_dashboard,
    r"GET /api/2\.0/lakeview/dashboards/(\d+)": Workspace.read_dashboard,
    r"(?:POST|GET) /api/2\.0/lakeview/dashboards/(\d+)/published": lambda w, number, _: w.read_dashboard(number, {}),
    r"POST /api/2\.2/jobs/create": Workspace.create_job,
    r"POST /api/2\.2/jobs/reset": Workspace.reset_job,
    r"GET /api/2\.2/jobs/get": Workspace.read_job,
    r"POST /api/2\.2/jobs/delete": Workspace.delete_job,
    r"POST /api/2\.2/jobs/run-now": Workspace.run_job,
    r"GET /api/2\.2/jobs/runs/get": Workspace.read_run,
}


@contextmanager
def serve(workspace: Workspace) -> Iterator[str]:
    """Answer requests on a free port of the loopback device. Yield the URL of the workspace."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[-1] for key, values in parse_qs(url.query).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                with lock:
                    workspace.caller = self.headers.get("Authorization") or ""
                    found, status = workspace.answer(self.command, unquote(url.path), query, body), 200
            except Refused as refused:
                found, status = {"error_code": refused.code, "message": refused.message}, refused.status
            content = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[POLL_SECONDS], daemon=True).start()
    workspace.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield workspace.url
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def mlflow_unchanged() -> Iterator[None]:
    """Restore MLflow's URIs at the end of the block. MLflow's setters also set environment variables."""
    import mlflow

    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    yield
    mlflow.set_tracking_uri(before[0])
    mlflow.set_registry_uri(before[1])
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)
