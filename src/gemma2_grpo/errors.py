"""Errors that a user can cause and correct, and the one line that says so."""

import re

# What is wrong, in the last words of an error of requests.
_BURIED = re.compile(r"""^.*\(Caused by \w+\(["'](?:\w+\(.*?\): )?(.*)["']\)\)$""")
# What a message of a library may hold: headers, tokens, and the signatures of download addresses.
_SECRET = re.compile(r"Bearer\s+[^'\"]+|\bhf_[\w.-]{16,}|(?<=\?)[^\s'\"]+")


class UserError(Exception):
    """A mistake that the user can correct: one line, exit status 2, no traceback."""

    def _render_traceback_(self) -> list[str]:
        """Lines that IPython shows in a notebook in place of a traceback."""
        return [f"error: {' '.join(str(self).split())}"]


class ConfigError(UserError):
    """A configuration that cannot run; the message names the field and the fix."""


def first_line(error: BaseException) -> str:
    """The first line of an error, without secrets."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = _BURIED.sub(r"\1", line)
    return _SECRET.sub("...", line)
