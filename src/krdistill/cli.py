"""The command line: a thin face over the library; nothing is computed here.

Neither torch nor matplotlib is imported until a command needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from . import __version__
from .commands import (
    answers,
    bank,
    calibrate,
    compare,
    condense,
    data,
    device,
    export,
    inspect,
    listing,
    predict,
    rerun,
    results,
    run,
    share,
)
from .commands.shared import Commands, missing_package, print_error
from .errors import KrdistillError

_EXIT_USER_ERROR = 2


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="krdistill")
def app() -> None:
    """Distil a biased teacher into a small student that stays accurate on the rare classes."""


for command in (
    run.run,
    run.demo,
    rerun.rerun,
    compare.compare,
    listing.list_,
    results.report,
    results.show,
    data.data,
    condense.condense,
    inspect.inspect,
    bank.bank,
    answers.answers,
    calibrate.calibrate,
    export.export,
    predict.predict,
    device.bench_device,
    share.share,
):
    app.add_command(command)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: a user's mistake is one message and exit code 2, never a traceback."""
    try:
        app.main(args=None if args is None else list(args), prog_name="krdistill", standalone_mode=False)
    except click.exceptions.Abort:
        _fail("Stopped. The same command goes on from the last checkpoint.", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KrdistillError as error:
        _fail(str(error), _EXIT_USER_ERROR)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == __package__:
            raise  # our own: a defect
        _fail(missing_package(error), _EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _fail("Stopped. The same command goes on from the last checkpoint.", 130)


def _fail(message: str, code: int) -> None:
    print_error(message)
    sys.exit(code)


if __name__ == "__main__":
    main()
