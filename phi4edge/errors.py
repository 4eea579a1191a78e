"""The exceptions that phi4edge raises, and the exit code that the command line gives each.

::

    Phi4EdgeError
      UsageError        (ValueError)   2   an option or a combination of options that makes no sense
      FileError         (OSError)      3   a file that is missing, unreadable, or not a regular file
      BundleError       (ValueError)   4   a model that is damaged, incomplete, or of a kind we cannot read
      InputError        (ValueError)   4   a prompt, an image or a sound that we cannot use
      DiskError         (OSError)      5   a disk that is full or failed while we wrote
      OutOfMemoryError  (MemoryError)  6   not enough memory, found out before it was allocated
      UnsupportedError  (RuntimeError) 9   this CPU or this build cannot do it
      Cancelled                        130 the caller asked to stop; nothing was changed
"""

from __future__ import annotations


class Phi4EdgeError(Exception):
    """Base of all errors of phi4edge.

    ``str(error)`` is one line: ``path: field: problem; hint``, without the parts that are empty.
    """

    exit_code = 70
    code = "internal_error"

    def __init__(self, problem: str, *, path: str = "", field: str = "", hint: str = "") -> None:
        self.problem = problem
        self.path = path
        self.field = field
        self.hint = hint
        where = "".join(f"{part}: " for part in (path, field) if part)
        super().__init__(f"{where}{problem}" + (f"; {hint}" if hint else ""))

    def as_json(self) -> dict[str, dict[str, str]]:
        """The error as ``--json`` prints it."""
        return {
            "error": {
                "code": self.code,
                "message": self.problem,
                "field": self.field,
                "path": self.path,
                "hint": self.hint,
            }
        }


class UsageError(Phi4EdgeError, ValueError):
    exit_code = 2
    code = "usage_error"


class FileError(Phi4EdgeError, OSError):
    exit_code = 3
    code = "file_error"


class BundleError(Phi4EdgeError, ValueError):
    exit_code = 4
    code = "bundle_error"


class InputError(Phi4EdgeError, ValueError):
    exit_code = 4
    code = "input_error"


class DiskError(Phi4EdgeError, OSError):
    exit_code = 5
    code = "disk_error"


class OutOfMemoryError(Phi4EdgeError, MemoryError):
    exit_code = 6
    code = "out_of_memory"


class UnsupportedError(Phi4EdgeError, RuntimeError):
    exit_code = 9
    code = "unsupported"


class Cancelled(Phi4EdgeError):  # noqa: N818  (a request of the caller, like KeyboardInterrupt)
    exit_code = 130
    code = "cancelled"
