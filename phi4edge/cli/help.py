"""``--help``: options under headings, examples as they would be typed; plain text, so quick and readable anywhere."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

if TYPE_CHECKING:
    Context = Any
    HelpFormatter = Any


class HelpfulCommand(TyperCommand):
    """A command whose ``epilog`` is a list of examples and whose options say their heading in ``rich_help_panel``."""

    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                panel = getattr(parameter, "rich_help_panel", None) or ("Arguments" if is_argument else "Options")
                panels.setdefault(panel, []).append(record)
        panels["Options"] = panels.pop("Options", [])  # --json and --help come last
        for panel, records in panels.items():
            if records:
                with formatter.section(panel):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Context, formatter: HelpFormatter) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in inspect.cleandoc(self.epilog).splitlines():  # not wrapped: they are for copying
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
