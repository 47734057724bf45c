"""`krdistill predict`: an exported student on images, without torch."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

import click

from ..errors import ConfigError
from .shared import print_error

_EXIT_SOME_FAILED = 3


@click.command()
@click.argument("model", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), help="File to write. [default: standard output]")
@click.option("--format", "form", type=click.Choice(["csv", "jsonl"]), default="csv", show_default=True)
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="Likeliest classes per image.")
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Images at a time.")
@click.option(
    "--prior", default="uniform", show_default=True, metavar="uniform|natural|FILE",
    help="How frequent the classes are where the images come from: all alike, as in training, or a CSV class,weight.",
)  # fmt: skip
@click.option("--calibrated", is_flag=True, help="Apply the calibrator that the file was exported with.")
@click.option(
    "--abstain-below", type=click.FloatRange(0, 1), default=0.0, metavar="P",
    help="Leave the class empty where its probability is below P.",
)  # fmt: skip
def predict(
    model: Path, inputs: tuple[str, ...], out: Path | None, form: str, top: int, batch: int, prior: str,
    calibrated: bool, abstain_below: float,
) -> None:  # fmt: skip
    """Classify images with an exported student; torch is not needed.

    An INPUT is an image, a folder (searched at any depth), a .txt file of paths, a .csv or .tsv file with a column
    path (both relative to the folder it lies in), or - for paths on standard input. There is one row per image, in
    order. An image that cannot be read has the reason in its column error, and the exit status is then 3.

    Of a student for sentences, an INPUT is a text file with one per line, a .csv or .tsv file with a column text, or -
    for lines on standard input; of one for rows of numbers, a .csv or .tsv file with a header and these columns.
    """
    from ..deploy.inputs import entries, listed_entries
    from ..deploy.predicting import predict as predictions
    from ..deploy.predicting import refusing_bombs, write_predictions
    from ..deploy.runtime import DeviceModel, class_weights

    if out is not None and out.is_dir():
        raise ConfigError(f"--out: {out} is a folder; give a file.")
    network = DeviceModel(model)
    weights, top = class_weights(network, prior), min(top, len(network.class_names))
    if calibrated and network.calibrator is None:
        raise ConfigError(
            f"--calibrated: {model} holds no calibrator. Fit one and export again: krdistill calibrate RUN --method "
            "temperature, then krdistill export RUN."
        )
    calibrator = network.calibrator if calibrated else None
    what = {"image": "path", "text": "text", "features": "row"}[network.kind]
    given = entries(inputs) if what == "path" else listed_entries(inputs, network.kind, network.channels)
    found = predictions(network, given, top=top, weights=weights, calibrator=calibrator, batch=batch)
    try:
        with _stream(out, form) as stream, refusing_bombs():
            summary = write_predictions(found, stream, form=form, top=top, abstain_below=abstain_below, what=what)
    except KeyboardInterrupt:
        print_error("Stopped." if out is None else f"Stopped; {out} was not written.")
        sys.exit(130)
    except BrokenPipeError:  # whoever reads has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except OSError as error:
        raise ConfigError(f"The predictions cannot be written to {out or 'standard output'}: {error}.") from None
    if abstain_below > 0:
        words = f"{summary.abstained:,} of {summary.images:,} are less sure than {abstain_below:g}, and left open."
        click.echo(words, err=True)
    if summary.failed:
        more = f" and {summary.failed - len(summary.first):,} more" if summary.failed > len(summary.first) else ""
        print_error(f"{summary.failed:,} of {summary.images:,} could not be read: {', '.join(summary.first)}{more}")
        sys.exit(_EXIT_SOME_FAILED)


@contextlib.contextmanager
def _stream(out: Path | None, form: str) -> Iterator[TextIO]:
    """Where rows go. Names that are no UTF-8 come out as the bytes they are in CSV, as JSON escapes in JSON."""
    from ..files import replacing

    errors = "surrogateescape" if form == "csv" else "backslashreplace"
    if out is not None:
        with replacing(out) as part, part.open("w", newline="", encoding="utf-8", errors=errors) as file:
            yield file
        return
    if sys.stdout.isatty():  # a person reads it: names may not command the terminal
        yield cast(TextIO, _Plain(sys.stdout))
        return
    stream = io.TextIOWrapper(sys.stdout.buffer, newline="", encoding="utf-8", errors=errors)
    try:
        yield stream
        stream.flush()
    finally:
        stream.detach()  # standard output stays open


class _Plain(io.TextIOBase):
    """Text that can be shown, line by line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        from ..reporting.tables import clean

        return self._stream.write("\n".join(map(clean, text.split("\n"))))
