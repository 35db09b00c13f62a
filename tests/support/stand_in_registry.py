"""Model registry of the stand-in workspace: the calls with which MLflow uses models in Unity Catalog.

Requests and answers are MLflow's own messages, so a field that Unity Catalog does not have is refused. As in Unity
Catalog, a search returns neither tags nor aliases. A new version is pending until the client has uploaded the files of
the version and finalised the version. The files are uploaded and downloaded with the Files API of Databricks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NoReturn

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from mlflow.protos import databricks_uc_registry_messages_pb2 as messages
from mlflow.protos.databricks_uc_registry_service_pb2 import UcModelRegistryService
from mlflow.utils.proto_json_utils import message_to_json
from mlflow.utils.rest_utils import extract_api_info_for_service
from stand_in_services import Json, Refused, missing

CALLS = {
    (method, path): request
    for request, (path, method) in extract_api_info_for_service(UcModelRegistryService, "/api/2.0").items()  # type: ignore[no-untyped-call]
}
FILES = re.compile(r"/api/2\.0/fs/(files|directories)(/Models/(.+?)/(.+?)/(.+?)/(\d+)(?:/.*)?)")
PAGE = 2
"""Number of versions or models on one page of a search. The number is small, so that tests read several pages."""
MAX_TAGS, MAX_KEY_CHARS, MAX_TEXT_CHARS = 50, 256, 1000
KEY_REFUSED = re.compile(r"[.,=/:-]|^\s|\s$")
VALUE_REFUSED = re.compile(r"^\s|\s$")
PENDING, READY = messages.PENDING_REGISTRATION, messages.READY


@dataclass
class StandInRegistry:
    """Registered models, versions and files of the stand-in workspace.

    Attributes:
        user: principal that sends the requests.
        schemas: full names of the schemas.
        models: registered models by full name.
        versions: model versions by full name of the model and number.
        files: content of each file, by path, such as `/Models/main/vision/demo/1/MLmodel`.
        code_of_existing: error code of the answer if a client creates a model that exists. Tests set this code, because
            MLflow accepts two different codes.
        created_by_others: names of models. Immediately before the next request to create one of these models, another
            client creates this model.
        lost: last parts of the paths of calls. The next request of each of these calls is executed, but the client gets
            an error as the answer.
    """

    user: str
    schemas: Collection[str]
    models: dict[str, Any] = field(default_factory=dict)
    versions: dict[tuple[str, str], Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    code_of_existing: str = "ALREADY_EXISTS"
    created_by_others: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    _clock: count[int] = field(default_factory=lambda: count(1_700_000_000_000))

    def answer(self, method: str, path: str, query: Json, body: bytes) -> bytes | None:
        """Answer a request to the registry or to the Files API, or return None for another request.

        Raises:
            Refused: the registry refuses the request.
        """
        if found := FILES.fullmatch(path):
            version = f"{found[3]}.{found[4]}.{found[5]}", found[6]
            return self._files(f"{method} {found[1]}", found[2], self._version(*version), body)
        request = CALLS.get((method, path))
        if request is None:
            return None
        given = ParseDict(json.loads(body) if body else query, request())
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", request.__name__.removesuffix("Request")).lower()
        handler: Callable[[Message], Message | None] = getattr(self, f"_{name}")
        response = handler(given) or getattr(messages, request.__name__.replace("Request", "Response"))()
        if path.rpartition("/")[2] in self.lost:
            self.lost.remove(path.rpartition("/")[2])
            raise Refused(503, "TEMPORARILY_UNAVAILABLE", "the answer was lost")
        return str(message_to_json(response)).encode()

    def _files(self, call: str, path: str, version: Any, body: bytes) -> bytes:
        below = {file for file in self.files if file.startswith(f"{path}/")}
        if call == "PUT files":
            if version.status != PENDING:
                raise Refused(403, "PERMISSION_DENIED", "The files of a finalized model version cannot be changed.")
            self.files[path] = body
            return b""
        if version.status != READY:
            raise Refused(400, "INVALID_STATE", f"Model version {version.version} is in state PENDING_REGISTRATION.")
        if call == "GET files" and path in self.files:
            return self.files[path]
        if call == "HEAD directories" and below:
            return b""
        if call == "GET directories" and below:
            entries: dict[str, Json] = {}
            for file in sorted(below):
                name, _, rest = file.removeprefix(f"{path}/").partition("/")
                size = {} if rest else {"file_size": len(self.files[file])}
                entries[name] = {"name": name, "path": f"{path}/{name}", "is_directory": bool(rest), **size}
            return json.dumps({"contents": list(entries.values())}).encode()
        raise Refused(404, "NOT_FOUND", f"{path} does not exist.")

    # -------------------------------------------------------------------------------------------- look-ups and checks

    def _model(self, name: str) -> Any:
        if name not in self.models:
            raise missing(f"Registered Model '{name}' does not exist.")
        return self.models[name]

    def _version(self, name: str, number: str) -> Any:
        self._model(name)
        if (name, number) not in self.versions:
            raise missing(f"Model version '{number}' of registered model '{name}' does not exist.")
        return self.versions[name, number]

    def _set_tag(self, item: Any, key: str, value: str) -> None:
        _require(0 < len(key) <= MAX_KEY_CHARS and not KEY_REFUSED.search(key), f"Tag key {key!r} is not valid.")
        _require(
            len(value) <= MAX_TEXT_CHARS and not VALUE_REFUSED.search(value), f"The value of tag {key} is not valid."
        )
        self._remove(item.tags, "key", key)
        _require(len(item.tags) < MAX_TAGS, f"{item.name} has already {MAX_TAGS} tags.")
        item.tags.add(key=key, value=value)

    def _remove(self, items: Any, attribute: str, value: str) -> bool:
        kept = [item for item in items if getattr(item, attribute) != value]
        removed = len(kept) < len(items)
        del items[:]
        items.extend(kept)
        return removed

    def _with_aliases(self, version: Any) -> Any:
        found = messages.ModelVersion()
        found.CopyFrom(version)
        found.aliases.extend(each for each in self.models[version.name].aliases if each.version == version.version)
        return found

    # -------------------------------------------------------------------------------------------- registered models

    def _create_registered_model(self, given: Any) -> Message:
        schema, _, _ = given.name.rpartition(".")
        if schema not in self.schemas:
            raise missing(f"Schema '{schema}' does not exist.")
        if given.name in self.created_by_others:
            self.created_by_others.remove(given.name)
            self.models[given.name] = messages.RegisteredModel(name=given.name, user_id="another")
        if given.name in self.models:
            raise Refused(409, self.code_of_existing, f"Registered Model '{given.name}' already exists.")
        model = messages.RegisteredModel(name=given.name, description=given.description, user_id=self.user)
        for tag in given.tags:
            self._set_tag(model, tag.key, tag.value)
        self.models[given.name] = model
        return messages.CreateRegisteredModelResponse(registered_model=model)

    def _get_registered_model(self, given: Any) -> Message:
        return messages.GetRegisteredModelResponse(registered_model=self._model(given.name))

    def _search_registered_models(self, given: Any) -> Message:
        found, token = _page([self.models[name] for name in sorted(self.models)], given.page_token)
        plain = [messages.RegisteredModel(name=each.name, description=each.description) for each in found]
        return messages.SearchRegisteredModelsResponse(registered_models=plain, next_page_token=token)

    def _set_registered_model_tag(self, given: Any) -> None:
        self._set_tag(self._model(given.name), given.key, given.value)

    def _delete_registered_model_tag(self, given: Any) -> None:
        if not self._remove(self._model(given.name).tags, "key", given.key):
            raise missing(f"Tag '{given.key}' does not exist.")

    def _set_registered_model_alias(self, given: Any) -> None:
        self._version(given.name, given.version)
        model = self._model(given.name)
        _require(not re.fullmatch(r"v?\d+|latest", given.alias), f"Alias name '{given.alias}' is reserved.")
        self._remove(model.aliases, "alias", given.alias)
        model.aliases.add(alias=given.alias, version=given.version)

    def _delete_registered_model_alias(self, given: Any) -> None:
        if not self._remove(self._model(given.name).aliases, "alias", given.alias):
            raise missing(f"Alias '{given.alias}' does not exist.")

    # -------------------------------------------------------------------------------------------- model versions

    def _create_model_version(self, given: Any) -> Message:
        self._model(given.name)
        number = str(1 + max((int(each) for name, each in self.versions if name == given.name), default=0))
        version = messages.ModelVersion(
            name=given.name,
            version=number,
            creation_timestamp=next(self._clock),
            user_id=self.user,
            description=given.description,
            source=given.source,
            run_id=given.run_id,
            model_id=given.model_id,
            status=PENDING,
        )
        for tag in given.tags:
            self._set_tag(version, tag.key, tag.value)
        self.versions[given.name, number] = version
        return messages.CreateModelVersionResponse(model_version=version)

    def _finalize_model_version(self, given: Any) -> Message:
        version = self._version(given.name, given.version)
        version.status = READY
        return messages.FinalizeModelVersionResponse(model_version=version)

    def _get_model_version(self, given: Any) -> Message:
        found = self._with_aliases(self._version(given.name, given.version))
        return messages.GetModelVersionResponse(model_version=found)

    def _search_model_versions(self, given: Any) -> Message:
        condition = re.fullmatch(r"name ?= ?'([^']+)'", given.filter)
        if condition is None:
            _refuse(f"The filter {given.filter!r} is not supported.")
        listed = [version for (name, _), version in self.versions.items() if name == condition[1]]
        found, token = _page(listed, given.page_token)
        plain = []
        for version in found:
            copy = messages.ModelVersion()
            copy.CopyFrom(version)
            del copy.tags[:]
            plain.append(copy)
        return messages.SearchModelVersionsResponse(model_versions=plain, next_page_token=token)

    def _update_model_version(self, given: Any) -> Message:
        version = self._version(given.name, given.version)
        version.description = given.description
        return messages.UpdateModelVersionResponse(model_version=version)

    def _delete_model_version(self, given: Any) -> None:
        self._version(given.name, given.version)
        self._remove(self.models[given.name].aliases, "version", given.version)
        del self.versions[given.name, given.version]

    def _set_model_version_tag(self, given: Any) -> None:
        self._set_tag(self._version(given.name, given.version), given.key, given.value)

    def _get_model_version_download_uri(self, given: Any) -> Message:
        version = self._version(given.name, given.version)
        return messages.GetModelVersionDownloadUriResponse(artifact_uri=f"s3://bucket/{version.name}/{version.version}")

    def _is_databricks_sdk_models_artifact_repository_enabled(self, _: Any) -> Message:
        return messages.IsDatabricksSdkModelsArtifactRepositoryEnabledResponse(
            is_databricks_sdk_models_artifact_repository_enabled=True
        )

    def _emit_model_version_lineage(self, given: Any) -> None:
        self._version(given.name, given.version)


def _page(items: list[Any], token: str) -> tuple[list[Any], str]:
    """Return the items of the page that a token names, and the token of the next page."""
    start = int(token or 0)
    end = start + PAGE
    return items[start:end], str(end) if end < len(items) else ""


def _require(valid: bool, message: str) -> None:
    if not valid:
        _refuse(message)


def _refuse(message: str) -> NoReturn:
    raise Refused(400, "INVALID_PARAMETER_VALUE", message)
