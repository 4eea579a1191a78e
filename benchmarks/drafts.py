"""Decoding with drafts (prompt lookup) and without, in turn, on the same answers.

``python -m benchmarks.drafts MODEL -n 128 -t 2 -r 5 --record benchmarks/records/drafts.jsonl``

A case is a prompt with a text to copy, one with a text to copy with changes, or one with neither.  The model writes
-n greedy tokens, of which the time without the prefill counts; a round is one answer of each kind.  The two answers
have to be the same, or the benchmark fails.

A model of random weights copies nothing.  With --forced the answer is given: each token is still computed, chosen by
the model and compared, but the one of the given answer goes on.  That is the time of a model which writes this answer.
The tokens of a forced answer are words, marks and spaces, numbered as they come, whatever the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import phi4edge
from benchmarks.against_llama_cpp import BUSY, Series, as_record, commit, cpu_name
from phi4edge.drafts import Drafts

SOURCE = """\
class Box:
    def __init__(self, width, height, depth):
        self.width = width
        self.height = height
        self.depth = depth

    def volume(self):
        return self.width * self.height * self.depth

    def surface(self):
        sides = self.width * self.height + self.height * self.depth
        return 2 * (sides + self.width * self.depth)

    def scaled(self, factor):
        if factor <= 0:
            raise ValueError("a factor must be positive")
        return Box(self.width * factor, self.height * factor, self.depth * factor)

def largest(boxes):
    found = None
    for box in boxes:
        if found is None or box.volume() > found.volume():
            found = box
    return found
"""
PROSE = """\
Old ships carried barrels of fresh water below deck, yet sailors drank mostly weak beer, because anything else soon grew
green and foul. Captains learned from bitter voyages that lemons kept scurvy away long before doctors could explain why.
Maps were drawn by lamplight, corrected after every storm, and guarded more closely than gold. When fog came down, a boy
with good ears stood at the bow and listened for surf, gulls, or church bells ashore. Trade winds decided which harbours
became rich; whoever understood them arrived weeks earlier, sold pepper dearly, and bought another vessel next spring.
"""


@dataclass(frozen=True)
class Case:
    prompt: str
    answer: str  # when it is forced


CASES = {
    "copy": Case(f"Repeat this file as it is.\n\n{SOURCE}", SOURCE),
    "edit": Case(f"Call the width breadth in this file.\n\n{SOURCE}", SOURCE.replace("width", "breadth")),
    "new": Case(f"Here is a file.\n\n{SOURCE}\nNow tell me about old ships.", PROSE),
}


@dataclass
class Answer:
    tokens: Sequence[int]  # as the model chose them
    seconds: float
    n_decoded: int
    n_drafted: int
    n_accepted: int


@dataclass
class Mode:
    """An answer over the rounds, with drafts of at most so many tokens."""

    n_draft: int
    rate: Series
    answers: list[Answer] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "drafts" if self.n_draft else "no drafts"


def written(model: phi4edge.Model, session: phi4edge.Session, case: Case, n_tokens: int, n_draft: int) -> Answer:
    """What the model writes itself; it never ends early."""
    answer = model.generate(
        case.prompt,
        max_tokens=n_tokens,
        draft_tokens=n_draft,
        logit_bias=dict.fromkeys(model.tokenizer.stop_ids, -100.0),
        session=session,
    )
    usage, timings = answer.usage, answer.timings
    return Answer(answer.tokens, timings.decode_seconds, timings.n_decoded, usage.drafted_tokens, usage.accepted_tokens)


def forced(model: phi4edge.Model, session: phi4edge.Session, case: Case, n_tokens: int, n_draft: int) -> Answer:
    """What the model chooses while the answer of the case is written."""
    numbers: dict[str, int] = {}
    prompt, answer = (
        [numbers.setdefault(word, 10 + len(numbers)) for word in re.findall(r" ?\w+| ?[^\w\s]|\n| +", text)]
        for text in (case.prompt, case.answer)
    )
    if len(numbers) + 10 > model.config.vocab_size:
        raise SystemExit(f"the vocabulary of {model.config.vocab_size} tokens is too small for a forced answer")
    answer = answer[:n_tokens]
    session.reuse(prompt)
    chosen = [int(session.extend(prompt[len(session) :])[0].argmax())]
    drafts = Drafts(prompt, n_draft, ends=())
    started = time.perf_counter()
    for at, token in enumerate(answer[:-1]):
        drafts.add(token)
        draft = drafts.propose(min(session.draft_room(), len(answer) - at - 2))
        chosen.append(int(session.step(token, draft).argmax()))
    return Answer(chosen, time.perf_counter() - started, len(answer) - 1, drafts.n_proposed, drafts.n_right)


def compare(model: phi4edge.Model, case: Case, options: argparse.Namespace) -> list[Mode]:
    """All rounds of a case.  SystemExit when drafts changed the answer."""
    write = forced if options.forced else written
    session = model.session()
    modes = [Mode(n_draft, Series("decode", "tok/s")) for n_draft in (0, options.draft_tokens)]
    write(model, session, case, min(options.n_tokens, 8), options.draft_tokens)  # the prompt is computed, clocks are up
    for _ in range(options.rounds):
        for mode in modes:
            answer = write(model, session, case, options.n_tokens, mode.n_draft)
            mode.answers.append(answer)
            mode.rate.values.append(answer.n_decoded / answer.seconds)
    first = modes[0].answers[0].tokens
    if any(answer.tokens != first for mode in modes for answer in mode.answers):
        raise SystemExit("the answers with drafts differ from those without")
    return modes


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result is what --json prints."""
    load_average = os.getloadavg()[0]  # before we add to it
    with phi4edge.load(options.model, threads=options.threads, context=2048) as model:
        cases = {name: compare(model, CASES[name], options) for name in options.cases}
        facts = {"model": Path(model.path).name, "isa": model.isa, "threads": model.threads}
    return facts | {
        "n_tokens": options.n_tokens,
        "draft_tokens": options.draft_tokens,
        "forced": options.forced,
        "rounds": options.rounds,
        "load_average": load_average,
        "commit": commit(),
        "cpu": cpu_name(),
        "cases": {name: as_case(modes) for name, modes in cases.items()},
    }


def as_case(modes: list[Mode]) -> dict[str, Any]:
    answer = modes[-1].answers[-1]
    without, with_drafts = (mode.rate.median for mode in modes)
    return {
        "identical": True,
        "n_decoded": answer.n_decoded,
        "drafted": answer.n_drafted,
        "accepted": answer.n_accepted,
        "ratio": with_drafts / without,
        "modes": {mode.name: as_record(mode.rate) for mode in modes},
    }


def print_table(result: dict[str, Any]) -> None:
    kind = "forced" if result["forced"] else "its own"
    print(f"{result['model']}, {result['threads']} threads, {result['isa']}, {result['cpu']}; {kind} answers")
    if result["load_average"] > BUSY:
        print(f"  Busy machine (load average {result['load_average']:.1f}): do not trust these figures.")
    print(f"{'median (best) [tok/s]':<24}{'no drafts':>20}{'drafts':>20}{'ratio':>8}{'drafted':>9}{'accepted':>10}")
    for name, case in result["cases"].items():
        cells = [f"{mode['median']:.2f} ({mode['best']:.2f})" for mode in case["modes"].values()]
        print(
            f"{name + ', ' + str(case['n_decoded']) + ' tokens':<24}"
            + "".join(f"{cell:>20}" for cell in cells)
            + f"{case['ratio']:>8.2f}{case['drafted']:>9}{case['accepted']:>10}"
        )


def append_records(path: Path, result: dict[str, Any]) -> None:
    """One line per case and mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common = {key: value for key, value in result.items() if key != "cases"}
    lines = []
    for name, case in result["cases"].items():
        facts = {key: value for key, value in case.items() if key not in ("modes", "ratio")}
        lines += [common | {"case": name, "mode": mode} | facts | row for mode, row in case["modes"].items()]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter, prog="benchmarks.drafts"
    )
    parser.add_argument("model", nargs="?", help="a GGUF file or a bundle; the embedded model when left out")
    parser.add_argument("-n", "--n-tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--draft-tokens", type=int, default=phi4edge.GenerationConfig().draft_tokens)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--forced", action="store_true", help="for models of random weights: the answer is given")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.add_argument("--record", type=Path, help="append one JSON line per case and mode to this file")
    options = parser.parse_args()
    if options.n_tokens < 2 or options.rounds < 1 or options.draft_tokens < 1:
        parser.error("-n must be at least 2, -r and --draft-tokens at least 1")
    try:
        result = measure(options)
    except phi4edge.Phi4EdgeError as error:
        sys.exit(f"benchmarks.drafts: {error}")
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_table(result)
    if options.record:
        append_records(options.record, result)


if __name__ == "__main__":
    main()
