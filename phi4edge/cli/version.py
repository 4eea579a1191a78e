"""``phi4edge version``: what a report of a problem should say."""

from __future__ import annotations

import platform
from typing import Annotated, Any

import typer

import phi4edge
from phi4edge import machine
from phi4edge.cli import output
from phi4edge.cli.options import Json
from phi4edge.errors import UnsupportedError

EXAMPLES = """
    phi4edge version
    phi4edge version --json
"""


def version(
    as_json: Json = False, short: Annotated[bool, typer.Option("--short", help="The version only.")] = False
) -> None:
    """Show the version, and what this computer offers."""
    if short and not as_json:
        output.write_text(f"phi4edge {phi4edge.__version__}\n")
        return
    facts = _facts()
    if as_json:
        output.write_json(facts)
        return
    memory = facts["memory_bytes"]
    output.write_text(
        f"phi4edge {facts['version']}\n"
        f"python   {facts['python']}, {facts['platform']}\n"
        f"cpu      {facts['cpu']}, {facts['physical_cores']} cores, {facts['available_cpus']} processors\n"
        f"isa      {', '.join(facts['isas']) or 'the compiled module is missing'}\n"
        f"encoders {', '.join(facts['encoder_providers']) or 'onnxruntime is missing'}\n"
        f"memory   {'unknown' if memory is None else output.bytes_text(memory)}\n"
    )


def _facts() -> dict[str, Any]:
    return {
        "version": phi4edge.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": machine.cpu_name(),
        "physical_cores": machine.physical_cores(),
        "available_cpus": machine.available_cpus(),
        "memory_bytes": machine.total_memory(),
        "isas": _isas(),
        "encoder_providers": _encoder_providers(),
    }


def _isas() -> list[str]:
    """Instruction sets that can be chosen, the best first; none when the compiled module does not load."""
    try:
        from phi4edge.model import isas
    except ImportError:
        return []
    return isas()


def _encoder_providers() -> list[str]:
    """What can run encoders; nothing without onnxruntime."""
    from phi4edge.encoders import encoder_providers

    try:
        return encoder_providers()
    except UnsupportedError:
        return []
