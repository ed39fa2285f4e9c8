"""What can go wrong, as a tree. Every message is one sentence that says what to do.

FourfoldError
├── UserError            the input or the request is wrong: exit status 2
│   ├── CheckpointError      a file is missing, damaged, or says something we cannot honour
│   ├── UnsupportedError     a well-formed request that fourfold refuses by name
│   ├── MissingExtra         an optional package is not installed
│   └── ResourceError        not enough memory, disk or cores for what was asked
│       └── QueueFull            too much is waiting already
└── RuntimeFailure       fourfold or the machine failed: exit status 1
"""


class FourfoldError(Exception):
    """The root: catch this to catch everything that fourfold raises on purpose."""


class UserError(FourfoldError):
    """The input or the request is wrong; the message says what would be right."""


class CheckpointError(UserError):
    """A file or directory is missing, damaged, or disagrees with itself."""


class UnsupportedError(UserError):
    """Well-formed, but not something fourfold can do; the message names the thing."""


class MissingExtra(UserError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class ResourceError(UserError):
    """Not enough memory, disk or cores; the message gives the number needed."""


class QueueFull(ResourceError):
    """As many requests wait as may; the same one can be taken later."""


class RuntimeFailure(FourfoldError):
    """A rank stalled or a step failed: not the user's mistake."""
