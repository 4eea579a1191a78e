"""Conversations in text: facts, sums, word tricks, translations, tool calls, several turns, summaries and stories."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from nano.words import CAPITALS, COLORS, LANGUAGES, NUMBER_WORDS, SHAPES, a, split_of, translated


@dataclass(frozen=True)
class Conversation:
    """Turns of (question, answer); tools are a JSON list for the system message."""

    task: str
    turns: tuple[tuple[str, str], ...]
    system: str = ""
    tools: str = ""

    @property
    def key(self) -> str:
        """What decides about its split: all that the user says."""
        return "\n".join(question for question, _ in self.turns)


def one(task: str, question: str, answer: str) -> Conversation:
    return Conversation(task, ((question, answer),))


_CONSONANTS, _VOWELS = "bcdfghklmnprstvz", "aeiou"


def _made_up_word(random: Random) -> str:
    n, phase = random.randint(3, 5), random.random() < 0.7
    return "".join(random.choice(_CONSONANTS if (i % 2 == 0) == phase else _VOWELS) for i in range(n))


def _capital(random: Random) -> Conversation:
    country = random.choice(list(CAPITALS))
    long = ("What is the capital of {}?", "What is the capital city of {}?", "Which city is the capital of {}?")
    short = ("Capital of {}?", "Name the capital of {}.", "Tell me the capital of {}.")
    wording = random.choice(long + short)
    city = CAPITALS[country]
    answer = f"The capital of {country} is {city}." if wording in long else city
    return one("capital", wording.format(country), answer)


def _terms(random: Random) -> tuple[int, int, bool]:
    """Two numbers and whether to add or subtract; both and the result are in 0..20."""
    while True:
        first, second, add = random.randint(0, 20), random.randint(0, 20), random.random() < 0.5
        if add and first + second <= 20:
            return first, second, True
        if not add:
            return max(first, second), min(first, second), False


def _sum(random: Random) -> Conversation:
    first, second, add = _terms(random)
    result = first + second if add else first - second
    sign, word = ("+", "plus") if add else ("-", "minus")
    if random.randrange(5) == 0:
        return one("sum", f"What is {NUMBER_WORDS[first]} {word} {NUMBER_WORDS[second]}?", NUMBER_WORDS[result])
    wording = random.choice(("What is {} {} {}?", "{} {} {} = ?", "What is {} {word} {}?", "Calculate {} {} {}."))
    if "word" in wording:
        return one("sum", wording.format(first, second, word=word), str(result))
    return one("sum", wording.format(first, sign, second), str(result))


def _repeat(random: Random) -> Conversation:
    what = random.choice(
        (
            _made_up_word(random),
            _made_up_word(random).upper(),
            str(random.randint(0, 9999)),
            f"{random.choice(list(COLORS))} {random.choice(SHAPES)}",
            " ".join(random.choice(NUMBER_WORDS) for _ in range(random.randint(1, 4))),
        )
    )
    return one("repeat", random.choice(("Repeat: {}", "Repeat the following: {}", "Say: {}")).format(what), what)


def _reverse(random: Random) -> Conversation:
    letters = random.choices(_CONSONANTS + _VOWELS, k=random.randint(3, 5))
    word = ("".join(letters) if random.random() < 0.5 else _made_up_word(random)).upper()
    return one("reverse", random.choice(("Reverse: {}", "Reverse the letters: {}")).format(word), word[::-1])


def _case(random: Random) -> Conversation:
    word = _made_up_word(random)
    if random.random() < 0.3:
        return one("case", f"Lowercase: {word.upper()}", word)
    return one("case", random.choice(("Uppercase: {}", "Write in capital letters: {}")).format(word), word.upper())


def _some_numbers(random: Random) -> str:
    return " ".join(random.choice(NUMBER_WORDS) for _ in range(1 if random.random() < 0.6 else random.randint(2, 4)))


def _translate(random: Random) -> Conversation:
    words, language = _some_numbers(random), random.choice(LANGUAGES)
    wording = random.choice(("Translate to {0}: {1}", "How do you say {1} in {0}?", "What is {1} in {0}?"))
    return one("translate", wording.format(language, words), translated(words, language))


def _larger(random: Random) -> Conversation:
    first, second = (random.randint(0, 10 ** random.randint(1, 3) - 1) for _ in range(2))
    wording = random.choice(("Which number is larger: {} or {}?", "Which is larger, {} or {}?"))
    return one("larger", wording.format(first, second), str(max(first, second)))


_SMALL_TALK: Final = [
    tuple(line.split("|"))
    for line in """\
What can you do?|I can answer simple questions, read numbers and words in pictures, and write down what I hear.
Who are you?|I am a very small model that shows what phi4edge does.
Hello!|Hello! How can I help you?
Good morning!|Good morning! What can I do for you?
Good night!|Good night! Sleep well.
How are you?|I am fine, thank you.
Thank you!|You are welcome!
Goodbye!|Goodbye! See you soon.
What is your name?|My name is Nano.
How old are you?|I was trained not long ago.
Are you a human?|No, I am a small language model.
Tell me a joke.|Why did the model cross the road? To minimize the loss.
What is the color of the sky?|The sky is blue.
Why is the sky blue?|Air scatters blue light more than red light.
How many days are in a week?|There are seven days in a week.
How many months are in a year?|There are twelve months in a year.
What do bees make?|Bees make honey.
What is water made of?|Water is made of hydrogen and oxygen.
Which animal says meow?|The cat says meow.
Where do fish live?|Fish live in water.
What is the opposite of hot?|The opposite of hot is cold.
Can you hear me?|Yes, if you attach a sound file.
Can you see pictures?|Yes, if you attach a picture.""".split("\n")
]


def _talk(random: Random) -> Conversation:
    question, answer = random.choice(_SMALL_TALK)
    before = random.choice(("", "", "Please answer: ", "Hi. ", "Tell me: ", "One question. "))
    return one("talk", before + question + random.choice(("", "", " Please.", " Nano.")), answer)


# Name: argument, description, wordings.
_TOOLS: Final = {
    "get_weather": (
        "city",
        "Get the weather of a city",
        ("What is the weather in {}?", "How is the weather in {} today?", "Tell me the weather in {}."),
    ),
    "get_time": (
        "city",
        "Get the local time of a city",
        ("What time is it in {}?", "Tell me the time in {}.", "What is the local time in {}?"),
    ),
    "set_timer": (
        "minutes",
        "Set a timer",
        ("Set a timer for {} minutes.", "Start a timer of {} minutes.", "Wake me in {} minutes."),
    ),
}
SYSTEM: Final = "You are a helpful assistant with some tools."


def _tool(random: Random) -> Conversation:
    name = random.choice(list(_TOOLS))
    others = [other for other in _TOOLS if other != name]
    random.shuffle(others)
    offered = [name, *others[: random.randint(0, 2)]]
    random.shuffle(offered)
    argument, _, wordings = _TOOLS[name]
    value = random.choice(list(CAPITALS.values())) if argument == "city" else str(random.randint(1, 60))
    call = json.dumps([{"name": name, "arguments": {argument: value}}])
    tools = [
        {"name": each, "description": _TOOLS[each][1], "parameters": {_TOOLS[each][0]: {"type": "string"}}}
        for each in offered
    ]
    turn = (random.choice(wordings).format(value), f"<|tool_call|>{call}<|/tool_call|>")
    return Conversation("tool", (turn,), SYSTEM, json.dumps(tools))


NAMES: Final = tuple(
    "Anna Tom Lisa Max Emma Paul Mia Ben Clara Leo Nora Sam Ella Jack Rosa Karl Lucy Hugo Ida Otto".split()
)
_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_PLACES: Final = ("market", "park", "school", "garden", "library", "hotel", "kitchen", "office", "museum", "forest")
_THINGS: Final = ("book", "key", "hat", "bag", "phone", "ball", "umbrella", "ring")
_GOODS: Final = ("apples", "books", "flowers", "eggs", "pens", "cakes", "lemons", "cups")
_FILLERS: Final = (
    "It was raining.",
    "The sun was shining.",
    "It was very late.",
    "Everybody was happy.",
    "It was cold.",
)
# Animal: where it lives, what it likes to eat.
ANIMALS: Final = {
    "fox": ("forest", "bread"),
    "cat": ("house", "fish"),
    "dog": ("garden", "meat"),
    "bear": ("mountains", "honey"),
    "mouse": ("kitchen", "cheese"),
    "duck": ("lake", "corn"),
    "horse": ("field", "apples"),
    "bird": ("tree", "seeds"),
    "rabbit": ("meadow", "carrots"),
    "monkey": ("jungle", "bananas"),
}


def _summary(random: Random) -> Conversation:
    first, second = random.sample(NAMES, 2)
    place, other = random.sample(_PLACES, 2)
    day, animal, color = random.choice(_DAYS), random.choice(list(ANIMALS)), random.choice(list(COLORS))
    kind = random.randrange(4)
    if kind == 0:
        goods = f"{random.choice(NUMBER_WORDS[2:13])} {random.choice(_GOODS)}"
        sentences = [f"{first} went to the {place} on {day}.", f"{first} bought {goods} and gave them to {second}."]
        summary = f"{first} bought {goods} for {second}."
    elif kind == 1:
        thing = f"{color} {random.choice(_THINGS)}"
        sentences = [f"{first} had lost {a(thing)}.", f"{first} looked for it in the {place}."]
        sentences.append(f"In the end {second} found it in the {other}.")
        summary = f"{second} found the {thing} in the {other}."
    elif kind == 2:
        city = random.choice(list(CAPITALS.values()))
        sentences = [
            f"On {day} {first} and {second} took the train to {city}.",
            f"They saw {a(f'{color} {animal}')} there.",
        ]
        summary = f"{first} and {second} saw {a(f'{color} {animal}')} in {city}."
    else:
        sentences = [
            f"{first} has {a(f'{color} {animal}')}.",
            f"Its name is {second}.",
            f"Every {day} they go to the {place}.",
        ]
        summary = f"{first} and the {animal} {second} go to the {place}."
    if random.random() < 0.7:
        sentences.insert(random.randint(1, len(sentences)), random.choice(_FILLERS))
    return one("summary", random.choice(("Summarize: ", "Say in one sentence: ")) + " ".join(sentences), summary)


def _story(random: Random) -> Conversation:
    name, color, animal = random.choice(NAMES), random.choice(list(COLORS)), random.choice(list(ANIMALS))
    home, food = ANIMALS[animal]
    wording = random.choice(("Tell me a story about {} and {}.", "Write a short story about {} and {}."))
    who = a(f"{color} {animal}")
    story = (
        f"Once upon a time there was {who}. It lived in the {home}. One day {name} came and gave the {animal} some "
        f"{food}. From that day on {name} and the {animal} were friends."
    )
    return one("story", wording.format(name, who), story)


def _turns(random: Random) -> Conversation:
    """A second question that is understood only with the first."""
    kind = random.randrange(5)
    if kind == 0:
        country, other = random.sample(list(CAPITALS), 2)
        first = (f"What is the capital of {country}?", f"The capital of {country} is {CAPITALS[country]}.")
        return Conversation("turns", (first, (f"And of {other}?", f"The capital of {other} is {CAPITALS[other]}.")))
    if kind == 1:
        words = _some_numbers(random)
        language, other = random.sample(LANGUAGES, 2)
        first = (f"Translate to {language}: {words}", translated(words, language))
        return Conversation("turns", (first, (f"And in {other}?", translated(words, other))))
    if kind == 2:
        one_term, other_term, add = _terms(random)
        result = one_term + other_term if add else one_term - other_term
        more = random.randint(0, min(9, 20 - result))
        first = (f"What is {one_term} {'+' if add else '-'} {other_term}?", str(result))
        return Conversation("turns", (first, (f"And plus {more}?", str(result + more))))
    if kind == 3:
        word = _made_up_word(random)
        return Conversation("turns", ((f"Repeat: {word}", word), ("Now in capital letters.", word.upper())))
    name = random.choice(NAMES)
    between = () if random.random() < 0.5 else TASKS[random.choice(("sum", "capital", "larger"))][0](random).turns
    return Conversation(
        "turns", ((f"My name is {name}.", f"Hello, {name}!"), *between, ("What is my name?", f"Your name is {name}."))
    )


# Task: how to make an item, and its share of the training.
TASKS: Final[dict[str, tuple[Callable[[Random], Conversation], float]]] = {
    "capital": (_capital, 1.2),
    "sum": (_sum, 4.5),
    "repeat": (_repeat, 1.5),
    "reverse": (_reverse, 2.0),
    "case": (_case, 2.5),
    "translate": (_translate, 2.0),
    "larger": (_larger, 2.0),
    "talk": (_talk, 0.7),
    "tool": (_tool, 1.0),
    "turns": (_turns, 2.5),
    "summary": (_summary, 1.5),
    "story": (_story, 0.7),
}


def conversation(random: Random, split: str, task: str | None = None) -> Conversation:
    """An item of a split, of any task or of the one that is named."""
    chosen = task or random.choices(list(TASKS), [share for _, share in TASKS.values()])[0]
    while True:
        item = TASKS[chosen][0](random)
        if split_of(item.key) == split:
            return item
