"""What every config is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, lt=1)]


class Config(BaseModel):
    """Base of every config: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid")
