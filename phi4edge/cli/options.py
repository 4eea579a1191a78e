"""Options that several commands share, and how a command takes a whole group of them.

A group is a dataclass with one field per option.  A command that went through :func:`expand` and has a parameter of
such a type gets all of its options::

    def chat(sampling: Sampling, runtime: Runtime, model: ModelPath = None) -> None: ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from phi4edge.adapters import checked_scale
from phi4edge.errors import Phi4EdgeError, UsageError

if TYPE_CHECKING:
    from phi4edge.generation import GenerationConfig

_Error = TypeVar("_Error", bound=Phi4EdgeError)

_MEDIA, _ANSWER, _CHOICE, _MACHINE = "Images, sounds and videos", "The answer", "How tokens are chosen", "The machine"

_MODEL_HELP = "A GGUF file, the first of its shards, or a bundle."
ModelPath = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"{_MODEL_HELP} [default: nano, the small one embedded in phi4edge]"),
]
RequiredModelPath = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        "-c",
        metavar="TOKENS",
        help="Room for the prompt and the answer. [default: grows up to what the model was trained on]",
        rich_help_panel=_MACHINE,
    ),
]
System = Annotated[
    str | None,
    typer.Option("--system", "-s", metavar="TEXT", help="Instructions the model gets first.", rich_help_panel=_ANSWER),
]
Stats = Annotated[bool, typer.Option("--stats", help="Print counts and speeds on standard error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]

MaxCrops = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Crops to cut an image, or all frames of a video together, into, one for each frame at least; fewer take "
        "less time and show less. "
        "[default: what the model knows]",
        rich_help_panel=_MEDIA,
        show_default=False,
    ),
]


class KvType(str, Enum):
    """What keys and values of past tokens are stored as."""

    i16 = "i16"
    f32 = "f32"
    q8_0 = "q8_0"


@dataclass(frozen=True)
class Runtime:
    """Where and how the model runs."""

    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            "-t",
            metavar="N",
            help="Threads to compute with. [default: one per physical core]",
            rich_help_panel=_MACHINE,
        ),
    ] = None
    kv_type: Annotated[
        KvType,
        typer.Option(
            help="How past keys and values are stored; i16 takes half the memory of f32, q8_0 half of that.",
            rich_help_panel=_MACHINE,
        ),
    ] = KvType.i16
    isa: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Instruction set to use, as 'phi4edge version' lists them. [default: the best this processor has]",
            rich_help_panel=_MACHINE,
            show_default=False,
        ),
    ] = ""
    provider: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What runs the encoders of images and sounds: auto, or one that 'phi4edge version' lists.",
            rich_help_panel=_MACHINE,
        ),
    ] = "auto"


@dataclass(frozen=True)
class Attachments:
    """Images, sounds and videos that go with a prompt."""

    image: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="An image to look at; may be repeated.", rich_help_panel=_MEDIA),
    ] = None
    audio: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A recording to listen to; may be repeated. It may be the question.",
            rich_help_panel=_MEDIA,
        ),
    ] = None
    video: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A video to look at, without its sound; may be repeated. --audio with the same file adds the sound.",
            rich_help_panel=_MEDIA,
        ),
    ] = None
    frames: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Frames to take of a video, evenly over its duration. [default: 8]",
            rich_help_panel=_MEDIA,
            show_default=False,
        ),
    ] = None
    max_crops: MaxCrops = None

    def __post_init__(self) -> None:
        if self.max_crops is not None and not self.image and not self.video:
            raise UsageError("there is no image", field="--max-crops", hint="give one with --image, or a --video")
        if self.frames is not None:
            from phi4edge.prompt import MAX_FRAMES

            if not self.video:
                raise UsageError("there is no video", field="--frames", hint="give one with --video")
            if not 1 <= self.frames <= MAX_FRAMES:
                raise UsageError(f"is {self.frames}, expected 1 to {MAX_FRAMES}", field="--frames")

    def require(self, path: str) -> None:
        """InputError when the model there is none for these attachments; it is not loaded for that."""
        given = ("image", self.image), ("audio", self.audio), ("video", self.video)
        require_encoders(path, {kind: f"--{kind}" for kind, files in given if files})

    def content(self, text: str) -> str | list[dict[str, Any]]:
        """What a message with this text and the attachments has as its content."""
        given = ("image", self.image), ("video", self.video), ("audio", self.audio)
        parts: list[dict[str, Any]] = [{"type": kind, kind: file} for kind, files in given for file in files or ()]
        if not parts:
            return text
        for part in parts:
            if part["type"] == "video" and self.frames is not None:
                part["frames"] = self.frames
        return [*parts, {"type": "text", "text": text}] if text else parts


@dataclass(frozen=True)
class Adaptation:
    """The adapter that answers are written with."""

    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="A LoRA adapter: the name of one in the bundle, or a GGUF file, as FILE or NAME=FILE; or 'none'. "
            "[default: the one that the images and sounds of the prompt need]",
            rich_help_panel=_ANSWER,
        ),
    ] = None
    adapter_scale: Annotated[
        float, typer.Option(metavar="X", help="How strongly the adapter counts.", rich_help_panel=_ANSWER)
    ] = 1.0

    def __post_init__(self) -> None:
        try:
            checked_scale(self.adapter_scale)
        except UsageError as error:
            raise named_as_option(error, ("adapter_scale",)) from None
        if self.adapter is None and self.adapter_scale != 1.0:
            raise UsageError("there is no adapter", field="--adapter-scale", hint="give one with --adapter")


@dataclass(frozen=True)
class Sampling:
    """The fields of :class:`phi4edge.generation.GenerationConfig` that the command line offers, with its defaults."""

    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", help="Longest answer.", rich_help_panel=_ANSWER)
    ] = 512
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End the answer before this text; may be repeated.", rich_help_panel=_ANSWER),
    ] = None
    temperature: Annotated[
        float,
        typer.Option(metavar="X", help="0 always takes the likeliest token.", rich_help_panel=_CHOICE),
    ] = 0.0
    top_k: Annotated[
        int,
        typer.Option(metavar="N", help="Choose among the N likeliest; 0 among all.", rich_help_panel=_CHOICE),
    ] = 0
    top_p: Annotated[
        float,
        typer.Option(metavar="X", help="Choose among the likeliest that sum to X.", rich_help_panel=_CHOICE),
    ] = 1.0
    min_p: Annotated[
        float,
        typer.Option(metavar="X", help="Leave out those below X times the likeliest.", rich_help_panel=_CHOICE),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        typer.Option(metavar="X", help="Make recent tokens less likely; 1 is off.", rich_help_panel=_CHOICE),
    ] = 1.0
    presence_penalty: Annotated[
        float,
        typer.Option(metavar="X", help="Subtract X from recent tokens' logits.", rich_help_panel=_CHOICE),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        typer.Option(metavar="X", help="Subtract X for each recent use of a token.", rich_help_panel=_CHOICE),
    ] = 0.0
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Make a temperature above 0 repeatable.", rich_help_panel=_CHOICE),
    ] = None
    logprobs: Annotated[
        int,
        typer.Option(metavar="N", help="Show the N likeliest tokens at each step.", rich_help_panel=_CHOICE),
    ] = 0
    draft_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Guess at most N tokens ahead where the text repeats itself, which is faster and changes no answer; "
            "0 is off.",
            rich_help_panel=_MACHINE,
        ),
    ] = 7

    def config(self) -> GenerationConfig:
        """These options as the library takes them; an error names the option."""
        from phi4edge.generation import GenerationConfig

        values = asdict(self) | {"stop": tuple(self.stop or ())}
        try:
            return GenerationConfig(**values)
        except UsageError as error:
            raise named_as_option(error, values) from None


def require_encoders(path: str, fields: Mapping[str, str]) -> None:
    """InputError when the model at ``path`` does not take parts of these kinds; it is not loaded for that.

    fields: kind -> what the error names.
    """
    from phi4edge.bundle import bundle_at
    from phi4edge.media import kinds_of, no_encoder
    from phi4edge.prompt import PART_TYPES

    bundle = bundle_at(path) if fields else None
    for kind, field in fields.items():
        if PART_TYPES[kind] not in kinds_of(bundle) and (bundle is not None or Path(path).is_file()):
            raise no_encoder(kind, bundle, field=field)


def named_as_option(error: _Error, names: Iterable[str]) -> _Error:
    """``error`` with its field written as the option of that name."""
    name, bracket, rest = error.field.partition("[")
    field = f"--{name.replace('_', '-')}{bracket}{rest}" if name in names else error.field
    return type(error)(error.problem, path=error.path, field=field, hint=error.hint)


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with each parameter that is a group of options replaced by the options of the group."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if is_dataclass(kind) and isinstance(kind, type)}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _options_of(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def _options_of(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]
