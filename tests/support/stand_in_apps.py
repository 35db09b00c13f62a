"""Apps of the stand-in workspace, their identities, and the SQL statements of a warehouse."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stand_in_services import Json, Refused, Services, exists, missing, node

APP_NAME = re.compile(r"[a-z][a-z0-9-]{1,29}")
TABLE_PERMISSIONS = {"SELECT", "MODIFY"}
CHUNK_ROWS = 2
"""Number of rows in one chunk of a result. A warehouse returns larger chunks."""
Rows = tuple[Sequence[str], Sequence[Sequence[Any]]]
RunSql = Callable[[str, Mapping[str, str | None]], Rows]
"""Function that runs a statement with values, and returns the names of the columns and the rows."""


class SqlError(Exception):
    """Error for a statement that the SQL engine cannot run."""


def no_sql(statement: str, values: Mapping[str, str | None]) -> Rows:
    raise Refused(501, "NOT_IMPLEMENTED", "the stand-in has no SQL engine")


@dataclass(kw_only=True)
class Apps(Services):
    """Apps and SQL warehouses of the stand-in workspace.

    An app may run a statement only if the resources of the app contain the permissions for the statement. All other
    callers may run all statements.
    """

    apps: dict[str, Json] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    warehouses: set[str] = field(default_factory=lambda: {"abc123"})
    run_sql: RunSql = no_sql
    statements: dict[str, Json] = field(default_factory=dict)
    url: str = ""
    caller: str = ""
    """Header Authorization of the request that is answered."""

    # -------------------------------------------------------------------------------------------- apps

    def create_app(self, given: Json) -> Json:
        name = given["name"]
        if not APP_NAME.fullmatch(name):
            raise Refused(400, "INVALID_PARAMETER_VALUE", f"App name {name!r} must have 2 to 30 characters a-z, 0-9, -")
        if name in self.apps:
            raise exists(f"An app with the same name already exists: {name}")
        self._check_resources(given.get("resources", []))
        number = next(self._ids)
        state = {
            "id": str(number),
            "url": f"https://{name}-1.databricksapps.com",
            "service_principal_client_id": f"app-{number}",
            "service_principal_id": number,
            "service_principal_name": f"app-{name}",
            "compute_status": {"state": "STOPPED", "message": "App compute is stopped."},
            "app_status": {"state": "UNAVAILABLE", "message": "App status is unavailable."},
            "compute_size": "MEDIUM",
        }
        self.apps[name] = {key: value for key, value in given.items() if key != "no_compute"} | state
        return self.apps[name]

    def _check_resources(self, resources: Sequence[Json]) -> None:
        """Refuse warehouses and tables that do not exist, and unknown permissions of a table."""
        for resource in resources:
            if "sql_warehouse" in resource and resource["sql_warehouse"]["id"] not in self.warehouses:
                raise missing(f"SQL warehouse {resource['sql_warehouse']['id']} does not exist.")
            table = resource.get("uc_securable", {})
            if table and table["securable_full_name"] not in self.tables:
                raise missing(f"Table '{table['securable_full_name']}' does not exist.")
            if table and table["permission"] not in TABLE_PERMISSIONS:
                raise Refused(400, "INVALID_PARAMETER_VALUE", f"{table['permission']} is no permission of a table")

    def read_app(self, name: str, _: Json) -> Json:
        if name not in self.apps:
            raise missing(f"App with name {name} does not exist or is deleted.")
        return self.apps[name]

    def start_app(self, name: str, _: Json) -> Json:
        self.read_app(name, {})["compute_status"] = {"state": "ACTIVE", "message": "App compute is active."}
        return self.apps[name]

    def deploy_app(self, name: str, given: Json) -> Json:
        app = self.read_app(name, {})
        folder = node(given["source_code_path"])
        if folder not in self.nodes:
            raise missing(f"Path ({folder}) doesn't exist.")
        status = {"state": "SUCCEEDED", "message": "App started successfully"}
        app["active_deployment"] = given | {"deployment_id": str(next(self._ids)), "status": status}
        app["default_source_code_path"] = given["source_code_path"]
        app["app_status"] = {"state": "RUNNING", "message": "App is running"}
        deployment: Json = app["active_deployment"]
        return deployment

    def read_deployment(self, name: str, number: str, _: Json) -> Json:
        deployment: Json = self.read_app(name, {}).get("active_deployment", {})
        if deployment.get("deployment_id") != number:
            raise missing(f"Deployment {number} does not exist.")
        return deployment

    def delete_app(self, name: str, _: Json) -> Json:
        self.read_app(name, {})
        return self.apps.pop(name)

    # -------------------------------------------------------------------------------------------- identities

    def oauth_endpoints(self, _: Json) -> Json:
        return {
            "authorization_endpoint": f"{self.url}/oidc/v1/authorize",
            "token_endpoint": f"{self.url}/oidc/v1/token",
        }

    def require_permissions(self, statement: str, warehouse: str) -> None:
        """Refuse a statement of an app that needs more permissions than the resources of the app have."""
        for app in self.apps.values():
            if self.caller != f"Bearer {app['service_principal_client_id']}":
                continue
            resources = app.get("resources", [])
            if warehouse not in [each["sql_warehouse"]["id"] for each in resources if "sql_warehouse" in each]:
                raise Refused(403, "PERMISSION_DENIED", f"no permission CAN_USE on warehouse {warehouse}")
            tables = [each["uc_securable"] for each in resources if "uc_securable" in each]
            held = {table["securable_full_name"]: table["permission"] for table in tables}
            for verb, name in re.findall(r"\b(FROM|JOIN|INTO)\s+(\w+\.\w+\.\w+)", statement):
                if held.get(name) not in ({"MODIFY"} if verb == "INTO" else TABLE_PERMISSIONS):
                    raise Refused(403, "PERMISSION_DENIED", f"the app may not access {name} in a clause {verb}")

    # -------------------------------------------------------------------------------------------- SQL statements

    def execute(self, given: Json) -> Json:
        """Run a statement. As with a warehouse that is still starting, the first answer has no result."""
        if given["warehouse_id"] not in self.warehouses:
            raise missing(f"SQL warehouse {given['warehouse_id']} does not exist.")
        self.require_permissions(given["statement"], given["warehouse_id"])
        number = str(next(self._ids))
        values = {entry["name"]: entry.get("value") for entry in given.get("parameters", [])}
        try:
            names, rows = self.run_sql(given["statement"], values)
        except SqlError as error:
            status = {"state": "FAILED", "error": {"error_code": "BAD_REQUEST", "message": str(error)[:1000]}}
            self.statements[number] = {"statement_id": number, "status": status}
            return self.statements[number]
        texts = [[None if value is None else str(value) for value in row] for row in rows]
        chunks = [texts[start : start + CHUNK_ROWS] for start in range(0, len(texts), CHUNK_ROWS)] or [[]]
        self.statements[number] = {
            "statement_id": number,
            "status": {"state": "SUCCEEDED"},
            "manifest": {"schema": {"columns": [{"name": name} for name in names]}},
            "chunks": chunks,
        }
        return {"statement_id": number, "status": {"state": "PENDING"}}

    def read_statement(self, number: str, _: Json) -> Json:
        found = self.statements[number]
        return {**found, "result": self.read_chunk(number, "0", {})}

    def read_chunk(self, number: str, index: str, _: Json) -> Json:
        chunks = self.statements[number]["chunks"]
        following = {"next_chunk_index": int(index) + 1} if int(index) + 1 < len(chunks) else {}
        return {"chunk_index": int(index), "data_array": chunks[int(index)], **following}


CALLS: dict[str, Callable[..., Any]] = {
    r"POST /api/2\.0/apps": Apps.create_app,
    r"GET /api/2\.0/apps/([\w-]+)": Apps.read_app,
    r"DELETE /api/2\.0/apps/([\w-]+)": Apps.delete_app,
    r"POST /api/2\.0/apps/([\w-]+)/start": Apps.start_app,
    r"POST /api/2\.0/apps/([\w-]+)/deployments": Apps.deploy_app,
    r"GET /api/2\.0/apps/([\w-]+)/deployments/(\d+)": Apps.read_deployment,
    r"GET /oidc/\.well-known/oauth-authorization-server": Apps.oauth_endpoints,
    r"POST /api/2\.0/sql/statements/?": Apps.execute,
    r"GET /api/2\.0/sql/statements/(\d+)": Apps.read_statement,
    r"GET /api/2\.0/sql/statements/(\d+)/result/chunks/(\d+)": Apps.read_chunk,
}
