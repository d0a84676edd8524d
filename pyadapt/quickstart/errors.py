"""The one error of the quick start that a person can cause and put right."""


class QuickstartError(ValueError):
    """A bad option or bad data; the message is one line and names the way out."""
