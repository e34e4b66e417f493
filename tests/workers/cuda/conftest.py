"""Before any kernel is imported, the interpreter is made to compute as a GPU does."""

import helpers_triton  # noqa: F401
