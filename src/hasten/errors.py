"""Errors for users. Each says what was found, what was expected, and what to do, in one line.

    HastenError
    ├── ModelError      a checkpoint, configuration or tokenizer is missing, damaged or unsupported
    ├── RecipeError     a recipe or a step of one is not valid, or matched nothing
    ├── RequestError    a prompt or a sampling parameter cannot be served
    └── ResourceError   memory, disk space, permission, a device or an optional package is not there

The command line prints the message and exits 2; anything else that reaches a user is our bug.
"""


class HastenError(Exception):
    """Base of every error that hasten raises for its users."""


class ModelError(HastenError):
    """A checkpoint, configuration or tokenizer is missing, damaged or unsupported."""


class RecipeError(HastenError):
    """A recipe or a step of one is not valid, or matched nothing."""


class RequestError(HastenError):
    """A prompt or a sampling parameter cannot be served."""


class ResourceError(HastenError):
    """Memory, disk space, permission, a device or an optional package is not there."""
