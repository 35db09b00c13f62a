"""Old name of two test files, kept until the command that lands changes names them."""

from test_layout import *  # noqa: F403
from test_variants import *  # noqa: F403
