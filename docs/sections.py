"""An extension of griffe: a blank line before each section of a docstring, which its parser needs to see one."""

import re

import griffe

_SECTION = re.compile(r"(?<!\n)\n([ \t]*)(Args|Attributes|Returns|Yields|Raises|Warns):\n")


class Sections(griffe.Extension):
    """Our docstrings leave the blank line out."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called for everything that has a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _SECTION.sub(r"\n\n\1\2:\n", obj.docstring.value)
