"""``phi4edge chat``: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

from phi4edge.cli import errors, output
from phi4edge.cli.conversation import Conversation
from phi4edge.cli.loading import load_adapter, load_model
from phi4edge.cli.options import Adaptation, Context, MaxCrops, ModelPath, Runtime, Sampling, Stats, System
from phi4edge.cli.terminal import Reader, keys_unseen, open_reader
from phi4edge.errors import UsageError

EXAMPLES = """
    phi4edge chat
    phi4edge chat model.gguf
    phi4edge chat BUNDLE --max-crops 4
    phi4edge chat model.gguf --system "You are a patient teacher." --temperature 0.7
    printf 'Hello!\\nWhat did I just say?\\n' | phi4edge chat model.gguf
"""


def chat(
    sampling: Sampling,
    adaptation: Adaptation,
    runtime: Runtime,
    model: ModelPath = None,
    system: System = None,
    max_crops: MaxCrops = None,
    context: Context = None,
    stats: Stats = False,
) -> None:
    """Talk with a model; /help lists the commands."""
    config = sampling.config()
    with load_model(model, runtime, context=context) as loaded:
        adapter = None if adaptation.adapter is None else load_adapter(loaded, adaptation.adapter)
        if max_crops is not None and "image" not in loaded.modalities:
            raise UsageError("this model takes no images", field="--max-crops", hint="leave it out")
        reader = open_reader()
        if reader.interactive:
            output.hint(f"{loaded.config.name or loaded.path}; /help lists the commands, Ctrl-D leaves")
        options = {"adapter": adapter, "adapter_scale": adaptation.adapter_scale, "max_crops": max_crops}
        converse(reader, Conversation(loaded, config, system=system, stats=stats, options=options))


def converse(reader: Reader, conversation: Conversation) -> None:
    """Reads and answers until the user leaves.

    An error ends the conversation only when nobody is there to try again.
    """
    while not conversation.finished:
        try:
            text = reader.read()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not reader.interactive:
                raise
            output.hint("Ctrl-D leaves")
            continue
        try:
            with keys_unseen():
                conversation.handle(text)
        except KeyboardInterrupt:
            if not reader.interactive:
                raise
        except Exception as error:
            known = errors.known_error(error)
            if known is None or not reader.interactive:
                raise
            output.note(f"phi4edge: error: {known}")
