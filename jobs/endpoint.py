"""`lakesight endpoint`: serve the champion with a model-serving endpoint of the Databricks workspace."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.common import Job, JsonOption, PlatformOption, RunOption, SetOption, open_job
from pipelines.errors import UserError
from vlm.config import Config
from vlm.errors.printable import hide_secrets

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient

ENTITY = "champion"
"""Name of the served version inside the endpoint. The name stays the same when the champion changes."""
DIGEST_VARIABLE = "LAKESIGHT_MODEL_DIGEST"
"""Environment variable in which the endpoint stores the digest of the served files.

If a registered model is deleted and trained again, its first version has the same name and number but other files.
"""


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
        typer.Option("--name", help="Name of the endpoint. Default: the full name of the model.", metavar="NAME"),
    ] = None,
    run: RunOption = "demo",
    platform: PlatformOption = "local",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve the champion at an endpoint of the workspace.

    The command creates the endpoint, or lets an existing endpoint serve the current champion. The endpoint scales to
    zero, so it costs nothing while nobody calls it. On a laptop, use lakesight serve.

    \b
    Example:
      lakesight endpoint --run demo --platform databricks
    """
    with open_job(run, platform, overrides, as_json) as job:
        report = run_endpoint(job, name)
        changed = "updated" if report.changed else "unchanged"
        job.output.line("endpoint", f"{report.endpoint}, {changed}")
        job.output.line("serves", f"{report.model_name} version {report.model_version}")
        job.output.report(report)


def run_endpoint(job: Job, name: str | None) -> EndpointReport:
    """Make an endpoint of the workspace serve the champion.

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
    champion = find_champion(job.platform, job.model_name)
    if champion is None:
        raise UserError(
            "the model has no champion version to serve",
            where=f"model {job.model_name} in {hide_secrets(job.platform.registry_uri)}",
            fix=f"run `{job.command('promote')}` first",
        )
    chosen = name or re.sub(r"[^A-Za-z0-9_-]", "-", champion.name)
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.errors.base import DatabricksError

    try:
        changed = serve_version(
            WorkspaceClient(), chosen, champion.name, champion.version, champion.tags.get(DIGEST_TAG)
        )
    except DatabricksError as error:
        raise UserError(
            "the Databricks workspace cannot create or update the serving endpoint",
            where=f"endpoint {chosen}, {champion.name} version {champion.version}",
            got=str(error),
            fix="correct the cause that Databricks reports; the user of this command needs CAN MANAGE on the "
            "endpoint and EXECUTE on the model",
        ) from None
    return EndpointReport(endpoint=chosen, model_name=champion.name, model_version=champion.version, changed=changed)


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
    from databricks.sdk.errors import NotFound
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
    try:
        found = client.serving_endpoints.get(name)
    except NotFound:
        client.serving_endpoints.create(name, config=EndpointCoreConfigInput(name=name, served_entities=[served]))
        return True
    config = found.pending_config or found.config
    current = [
        (entity.entity_name, entity.entity_version, entity.environment_vars or {})
        for entity in (config and config.served_entities) or []
    ]
    if current == [(model, version, variables)]:
        return False
    client.serving_endpoints.update_config(name, served_entities=[served])
    return True
