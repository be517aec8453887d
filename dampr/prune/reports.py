"""The base class of all reports."""

from __future__ import annotations

import html


class Report:
    """A report whose ``str()`` is a table: notebooks show it in a fixed-width font."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
