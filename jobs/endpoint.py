"""`lakesight endpoint`: serve the champion with a model-serving endpoint of the Databricks workspace."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from pipelines.config.run import short_hash
from pipelines.errors import UserError
from vlm.config import Config
from vlm.errors.printable import hide_secrets

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.service.serving import ServedEntityOutput, ServingEndpointDetailed

logger = logging.getLogger(__name__)

ENTITY = "champion"
"""Name of the served version inside the endpoint. The name stays the same when the champion changes."""
DIGEST_VARIABLE = "LAKESIGHT_MODEL_DIGEST"
"""Environment variable in which the endpoint stores the digest of the served files.

The digest is needed because a registered model may be deleted and trained again. Its first version then has the same
name and number as before, but other files.
"""


MAX_NAME_CHARS = 63
"""Maximum length of the name of a Databricks serving endpoint."""


class EndpointReport(Config):
    """Report of `lakesight endpoint`: the endpoint, and the version that the endpoint serves or will soon serve."""

    endpoint: str
    model_name: str
    model_version: str
    changed: bool
    """Whether the command changed the endpoint; false if the endpoint already served this version."""


def endpoint(
    *,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the endpoint. Default: made from the name of the model.", metavar="NAME"),
    ] = None,
    if_exists: Annotated[
        bool,
        typer.Option("--if-exists", help="Change an existing endpoint, but create no endpoint."),
    ] = False,
    query_group: Annotated[
        str | None,
        typer.Option("--query-group", help="Group that may query the endpoint.", metavar="GROUP"),
    ] = None,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve the champion at an endpoint of the workspace.

    The command creates the endpoint, or lets an existing endpoint serve the current champion. The endpoint scales to
    zero, so it costs nothing while nobody calls it. On a laptop, use lakesight serve.

    Only the user who created the endpoint and workspace admins may query it. --query-group lets a group query it too.

    \b
    Example:
      lakesight endpoint --run demo --platform databricks
    """
    with open_job(run, platform, overrides, as_json) as job:
        report = run_endpoint(job, name, query_group or None, if_exists=if_exists)
        if report is None:
            job.output.line("endpoint", f"{_choose_name(job, name)} does not exist, so nothing is changed")
            job.output.report({"endpoint": None})
            return
        changed = "updated" if report.changed else "unchanged"
        job.output.line("endpoint", f"{report.endpoint}, {changed}")
        job.output.line("serves", f"{report.model_name} version {report.model_version}")
        job.output.report(report)


def run_endpoint(
    job: Job, name: str | None, query_group: str | None = None, *, if_exists: bool = False
) -> EndpointReport | None:
    """Make an endpoint of the workspace serve the champion, and let a group query the endpoint.

    Args:
        job: running command.
        name: name of the endpoint, or None for a name that is made from the model's name.
        query_group: group that may query the endpoint, or None.
        if_exists: whether to change only an existing endpoint. If there is none, the function returns None.

    Raises:
        UserError: the platform has no endpoints, there is no champion, or the workspace refuses the request.
    """
    from pipelines.tracking.aliases import find_champion
    from pipelines.tracking.home_store.copied_version import DIGEST_TAG

    if job.platform.kind != "databricks":
        raise UserError(
            "only a Databricks workspace has serving endpoints",
            where="--platform",
            got=job.platform.kind,
            fix=f"use `{job.command('serve')}` on this machine, or --platform databricks",
        )
    chosen = _choose_name(job, name)
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.errors.base import DatabricksError

    client = WorkspaceClient()
    try:
        if if_exists and _find(client, chosen) is None:
            return None
        champion = find_champion(job.platform, job.model_name)
        if champion is None:
            raise UserError(
                "the model has no champion version to serve",
                where=f"model {job.model_name} in {hide_secrets(job.platform.registry_uri)}",
                fix=f"run `{job.command('promote')}` first",
            )
        changed = serve_version(client, chosen, champion.name, champion.version, champion.tags.get(DIGEST_TAG))
        if query_group:
            let_query(client, chosen, query_group)
    except DatabricksError as error:
        raise UserError(
            "the Databricks workspace cannot create or update the serving endpoint",
            where=f"endpoint {chosen}, model {job.model_name}",
            got=str(error),
            fix="correct the cause that Databricks reports; the user of this command needs CAN MANAGE on the "
            "endpoint and EXECUTE on the model",
        ) from None
    return EndpointReport(endpoint=chosen, model_name=champion.name, model_version=champion.version, changed=changed)


def print_served_version(job: Job, champion: str) -> None:
    """If the endpoint with the default name serves another version than the new champion, print how to change this.

    A failed request is only logged, because the champion has already changed.
    """
    if job.platform.kind != "databricks":
        return
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.errors.base import DatabricksError

    name = _choose_name(job, None)
    try:
        found = _find(WorkspaceClient(), name)
    except (DatabricksError, ValueError, OSError) as error:
        logger.warning("the version that endpoint %s serves is not known: %s", name, error)
        return
    served = {entity.entity_version for entity in _served(found)} if found else set()
    if served - {champion}:
        job.output.line("", f"endpoint {name} still serves version {', '.join(sorted(map(str, served)))}")
        job.output.line("", f"to serve version {champion}, run `{job.command('endpoint')}`")


def _choose_name(job: Job, name: str | None) -> str:
    """Return `name`, or a name that is made from the model's name if `name` is None. If the name that is made from the
    model's name is too long for Databricks, a hash replaces its end.
    """
    chosen = name or re.sub(r"[^A-Za-z0-9_-]", "-", job.model_name)
    if name is None and len(chosen) > MAX_NAME_CHARS:
        key = short_hash(chosen)
        chosen = f"{chosen[: MAX_NAME_CHARS - len(key) - 1]}-{key}"
    return chosen


def _find(client: WorkspaceClient, name: str) -> ServingEndpointDetailed | None:
    from databricks.sdk.errors import NotFound

    try:
        return client.serving_endpoints.get(name)
    except NotFound:
        return None


def _served(found: ServingEndpointDetailed) -> list[ServedEntityOutput]:
    """Return the model versions that an endpoint serves, or will serve after the change that is in progress."""
    config = found.pending_config or found.config
    return list((config and config.served_entities) or [])


def let_query(client: WorkspaceClient, name: str, group: str) -> None:
    """Let a group query an endpoint. Other permissions of the endpoint stay as they are.

    Raises:
        DatabricksError: the workspace refuses the request.
    """
    from databricks.sdk.service.serving import ServingEndpointAccessControlRequest, ServingEndpointPermissionLevel

    number = client.serving_endpoints.get(name).id
    assert number is not None
    level = ServingEndpointPermissionLevel.CAN_QUERY
    entry = ServingEndpointAccessControlRequest(group_name=group, permission_level=level)
    client.serving_endpoints.update_permissions(number, access_control_list=[entry])


def serve_version(client: WorkspaceClient, name: str, model: str, version: str, digest: str | None) -> bool:
    """Create or update an endpoint, and return whether a change was needed. Do not wait until the endpoint is ready.

    Args:
        client: client of the workspace.
        name: name of the endpoint.
        model: full name of the registered model.
        version: number of the version to serve.
        digest: digest of the files of this version, or None for a version that Lakesight 0.1.0 registered.

    Raises:
        DatabricksError: the workspace refuses the request.
    """
    from databricks.sdk.service.serving import EndpointCoreConfigInput, ServedEntityInput

    variables = {DIGEST_VARIABLE: digest} if digest else {}
    served = ServedEntityInput(
        name=ENTITY,
        entity_name=model,
        entity_version=version,
        environment_vars=variables,
        workload_size="Small",
        scale_to_zero_enabled=True,
    )
    found = _find(client, name)
    if found is None:
        client.serving_endpoints.create(name, config=EndpointCoreConfigInput(name=name, served_entities=[served]))
        return True
    current = [(entity.entity_name, entity.entity_version, entity.environment_vars or {}) for entity in _served(found)]
    if current == [(model, version, variables)]:
        return False
    client.serving_endpoints.update_config(name, served_entities=[served])
    return True
