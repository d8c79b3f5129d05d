"""The one exception for mistakes the user can mend, and the nearest-name help it gives. Layer 0."""

import difflib


class UserError(ValueError):
    """An error the user can mend. Command lines print it as one line and exit with 2.

    The message names the value, the place, and the remedy.
    """


def choose(value, options, what: str):
    """Returns `value`. Raises UserError, with the nearest option, where it is not one of `options`."""
    if value in options:
        return value
    names = [str(o) for o in options]
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{what}: unknown {value!r}{hint} (known: {', '.join(names)})")
