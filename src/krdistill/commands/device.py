"""`krdistill bench-device`: what an exported file costs on this machine, without torch; or a run's networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError
from .shared import make_console, needs_packages


@click.command("bench-device")
@click.argument("model", metavar="MODEL.onnx|RUN", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--save", is_flag=True, help="Keep it beside the file, or in the run: the run's report shows it.")
def bench_device(model: Path, as_json: bool, save: bool) -> None:
    """Measure an exported file here: size, multiply-accumulates, memory, latency; torch is not needed.

    One and two threads, one example and 32 at a time, through ONNX Runtime on the CPU, each in a process of its own.
    Of a run's folder, its teacher and its student in float32 and int8, side by side; that needs torch.
    """
    import json

    from ..files import write_json

    if model.is_dir():
        _bench_run(model, as_json, save)
        return
    from ..deploy.measuring import measure_file

    found = measure_file(model)
    if save:
        write_json(model.with_name(f"{model.name}.device.json"), found)
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    from ..console import print_table

    console = make_console()
    macs = "not known (open shapes)" if found["macs"] is None else f"{found['macs'] / 1e6:,.2f} M each"
    facts = [
        ["file", f"{found['bytes'] / 1024:,.1f} KiB"],
        ["parameters", f"{found['parameters']:,}"],
        ["multiply-accumulates", macs],
    ]
    print_table(console, [model.name, ""], facts)
    console.print()
    rows = [
        [
            f"{r['threads']} thread{'s' if r['threads'] > 1 else ''}, batch {r['batch']}",
            f"{r['median_ms']:.3f} ms", f"{r['p95_ms']:.3f} ms", f"{r['images_per_second']:,.0f}",
            f"{r['peak_bytes'] / 2**20:,.1f} MiB",
        ]
        for r in found["runs"]
    ]  # fmt: skip
    print_table(console, ["ONNX Runtime, CPU", "median", "95th percentile", "per second", "peak memory"], rows)


def _bench_run(run: Path, as_json: bool, save: bool) -> None:
    import json

    with needs_packages():
        from ..costing import measure_run
        from ..files import write_json
        from ..reporting.html import COSTS
        from ..runfolder import CONFIG
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run}: expected an .onnx file or the folder of a finished run.")
    console = make_console()
    with console.status("measuring") as status:
        found = measure_run(run, on_step=status.update)
    if save:
        write_json(run / COSTS, found)
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    from ..console import print_table
    from ..reporting.tables import count

    def cells(file: dict[str, Any]) -> list[str]:
        times = [f"{r['median_ms']:.3f} / {r['p95_ms']:.3f}" for r in file["runs"]]
        peak = max(r["peak_bytes"] for r in file["runs"]) / 2**20
        size = f"{file['bytes'] / 1024:,.1f} KiB"
        about = [size, count(file["parameters"]), count(file["macs"]), *times, f"{peak:,.1f} MiB"]
        return [f"{file['network']}, {file['precision']}", *about]

    runs = found["files"][0]["runs"] if found["files"] else []
    of = [f"{r['threads']} thread{'s' if r['threads'] > 1 else ''}, batch {r['batch']}" for r in runs]
    if found["files"]:
        headers = ["", "size", "numbers", "MACs", *of, "peak memory"]
        print_table(console, headers, [cells(file) for file in found["files"]])
        console.print("Milliseconds of a batch in ONNX Runtime on the CPU, median / 95th percentile.", highlight=False)
    for name, why in found["left_out"].items():
        console.print(f"{name}: {why}", style="yellow", highlight=False, markup=False)
