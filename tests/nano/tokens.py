"""The tokenizer, trained on the tasks' own sentences, and prompts in Phi-4-multimodal's chat format."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

from nano.texts import Conversation, conversation
from nano.words import (
    BACKGROUNDS,
    COLORS,
    COMMANDS,
    NUMBERS,
    PICTURE_QUESTIONS,
    SHAPES,
    SPEECH_QUESTIONS,
    SPOKEN_QUESTIONS,
    THEN_TRANSLATE,
    TRAIN,
    a,
)
from peers import require

N_PLAIN: Final = 1522  # byte-level BPE; with the special tokens 1536

# Where o200k, the vocabulary of Phi-4-mini, splits text (tiktoken).
_LETTERS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT: Final = "|".join(
    (
        rf"{_LETTERS}*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_CONTRACTION}",
        rf"{_LETTERS}+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
IMAGE, AUDIO, END, PADDING = "<|endoftext10|>", "<|endoftext11|>", "<|end|>", "<|endoftext|>"
# Name, takes white space after it, special: as in the real tokenizer, and in its order.
SPECIALS: Final = (
    (PADDING, False, True),
    (IMAGE, False, True),
    (AUDIO, False, True),
    ("<|endofprompt|>", False, True),
    ("<|assistant|>", True, True),
    (END, True, True),
    ("<|user|>", True, True),
    ("<|system|>", True, True),
    ("<|tool|>", True, False),
    ("<|/tool|>", True, False),
    ("<|tool_call|>", True, False),
    ("<|/tool_call|>", True, False),
    ("<|tool_response|>", True, False),
    ("<|tag|>", True, True),
)
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def corpus() -> list[str]:
    """Sentences whose words may become tokens; digits and made-up words are left out, so that they stay single."""
    random = Random(0)
    lines: list[str] = []
    for _ in range(8000):
        item = conversation(random, TRAIN)
        if item.task in {"capital", "translate", "talk", "tool", "summary", "story"} or " " in item.turns[0][1]:
            texts = [item.system, item.tools, *(text for turn in item.turns for text in turn)]
            lines += [re.sub(r"<\|[^|]*\|>|\d+", "\n", text) for text in texts]
    fixed = [question for kind in (*PICTURE_QUESTIONS.values(), *SPEECH_QUESTIONS.values()) for question in kind]
    lines += [*fixed, THEN_TRANSLATE, "And in plus? Now in capital letters. What is my name? Your name is"] * 30
    lines += [a(f"{color} {shape} on {ground}") for color in COLORS for shape in SHAPES for ground in BACKGROUNDS]
    lines += [*COMMANDS, *(question for kind in SPOKEN_QUESTIONS.values() for question in kind)] * 20
    lines += ["Repeat the following: Say: Reverse the letters: Uppercase: Write in capital letters: Lowercase:"] * 60
    lines += ["Which number is larger: or What is plus minus Calculate"] * 60
    return lines + [f" {word}" for words in NUMBERS.values() for word in words] * 10


def make_tokenizer() -> dict[str, Any]:
    """tokenizer.json."""
    tokenizers = require("tokenizers")
    splits = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "removed", invert=True)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(fuse_unk=False, byte_fallback=False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([splits, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=N_PLAIN,
        min_frequency=1,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    vocabulary = document["model"]["vocab"]
    if len(vocabulary) != N_PLAIN:
        raise ValueError(f"the sentences give {len(vocabulary)} tokens only")
    document["added_tokens"] = []
    for content, strips, special in SPECIALS:
        number = vocabulary[content] = len(vocabulary)
        document["added_tokens"].append(
            {
                "id": number,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": strips,
                "normalized": False,
                "special": special,
            }
        )
    return document


class Tokens:
    """Text to token numbers, which are remembered; and whole conversations with a mark at what is to be learned."""

    def __init__(self, path: Path) -> None:
        transformers = require("transformers")
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(path),
            bos_token=PADDING,
            eos_token=PADDING,
            pad_token=PADDING,
            unk_token=PADDING,
            padding_side="left",
            extra_special_tokens={"image_token": IMAGE, "audio_token": AUDIO},
        )
        self.tokenizer.chat_template = CHAT_TEMPLATE
        self._known: dict[str, list[int]] = {}
        self.image, self.audio, self.end, self.padding = (
            self.tokenizer.convert_tokens_to_ids(text) for text in (IMAGE, AUDIO, END, PADDING)
        )

    def encode(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 200_000:
                self._known.clear()
            self._known[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]

    def example(
        self, item: Conversation, rows: Sequence[tuple[int, int]] = (), last_only: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Token numbers, and whether each is of an answer (<|end|> included).

        rows: (placeholder, number of its rows) of images and sounds, which stand before the first question.
        last_only: only the last answer counts.
        """
        tokens: list[int] = []
        answers: list[bool] = []

        def add(more: list[int], answer: bool = False) -> None:
            tokens.extend(more)
            answers.extend([answer] * len(more))

        if item.system:
            add(self.encode(f"<|system|>{item.system}<|tool|>{item.tools}<|/tool|>{END}"))
        for index, (question, answer) in enumerate(item.turns):
            add(self.encode("<|user|>"))
            for placeholder, n_rows in rows if index == 0 else ():
                add([placeholder] * n_rows)
            add(self.encode(question))
            add(self.encode(f"{END}<|assistant|>"))
            counts = index == len(item.turns) - 1 or not last_only
            add([*self.encode(answer), self.end], counts)
        return tokens, answers


def prompt_text(item: Conversation, n_images: int = 0, n_sounds: int = 0) -> str:
    """A prompt as it is stored in files of items, up to the last answer."""
    text = f"<|system|>{item.system}<|tool|>{item.tools}<|/tool|>{END}" if item.system else ""
    media = [f"<|image_{n + 1}|>" for n in range(n_images)] + [f"<|audio_{n + 1}|>" for n in range(n_sounds)]
    for index, (question, answer) in enumerate(item.turns):
        text += f"<|user|>{''.join(media) if index == 0 else ''}{question}{END}<|assistant|>"
        text += f"{answer}{END}" if index < len(item.turns) - 1 else ""
    return text
