"""Tables, figures and the HTML page of a run, read back from the files of its folder.

Importing this package imports neither torch nor matplotlib: the terminal's table needs neither.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` of a run from the files in its folder.

    The page is one file: no script, no network, figures inside. A part whose file is missing is left out, with a note.

    Args:
        run_dir: the run folder; it must hold ``metrics.json``.

    Returns:
        The path of ``report.html``.

    Raises:
        RunFolderError: no ``metrics.json`` in the folder, or a file in it is damaged or speaks of other classes.
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    from .html import write  # matplotlib and jinja2 are not needed before

    return write(Path(run_dir))
