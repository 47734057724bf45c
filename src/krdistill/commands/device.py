"""`krdistill bench-device`: what an exported file costs on this machine, without torch."""

from __future__ import annotations

from pathlib import Path

import click

from .shared import make_console


@click.command("bench-device")
@click.argument("model", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--save", is_flag=True, help="Keep it beside the file, MODEL.onnx.device.json: a run's report shows it.")
def bench_device(model: Path, as_json: bool, save: bool) -> None:
    """Measure an exported file here: size, multiply-accumulates, memory, latency; torch is not needed.

    One and two threads, one example and 32 at a time, through ONNX Runtime on the CPU, each in a process of its own.
    """
    import json

    from ..console import print_table
    from ..deploy.measuring import measure_file
    from ..files import write_json

    found = measure_file(model)
    if save:
        write_json(model.with_name(f"{model.name}.device.json"), found)
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
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
