"""What every comparison with another library wants: no gradients, and no word from the library."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Features alone, and nothing on the terminal."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.no_grad():
        yield
