"""What the tiny model is taught about: the words of all its tasks, and which of them it is tested on."""

from __future__ import annotations

import hashlib
from typing import Final

# Train, watch (looked at while training) or test (looked at once, when all is over).
TRAIN, WATCH, TEST = "train", "watch", "test"


def split_of(key: str, one_in: int = 20) -> str:
    """The split of what an item asks: one in ``one_in`` is for the test, as many to watch."""
    remainder = int(hashlib.md5(key.encode(), usedforsecurity=False).hexdigest(), 16) % one_in
    return {0: TEST, 1: WATCH}.get(remainder, TRAIN)


CAPITALS: Final = dict(
    pair.split(":")
    for pair in (
        "France:Paris|Germany:Berlin|Spain:Madrid|Italy:Rome|Portugal:Lisbon|Austria:Vienna|Switzerland:Bern|"
        "Belgium:Brussels|Ireland:Dublin|Norway:Oslo|Sweden:Stockholm|Finland:Helsinki|Denmark:Copenhagen|"
        "Poland:Warsaw|Greece:Athens|Hungary:Budapest|Romania:Bucharest|Bulgaria:Sofia|Turkey:Ankara|Russia:Moscow|"
        "China:Beijing|Japan:Tokyo|India:New Delhi|Thailand:Bangkok|Vietnam:Hanoi|Egypt:Cairo|Kenya:Nairobi|"
        "Morocco:Rabat|Nigeria:Abuja|Ghana:Accra|Canada:Ottawa|Mexico:Mexico City|Cuba:Havana|Brazil:Brasilia|"
        "Argentina:Buenos Aires|Chile:Santiago|Peru:Lima|Colombia:Bogota|Australia:Canberra|Iceland:Reykjavik"
    ).split("|")
)

LANGUAGES: Final = ("French", "German", "Spanish")
NUMBERS: Final = {
    words[0]: words[1:]
    for words in (
        line.split()
        for line in """zero zéro null cero
one un eins uno
two deux zwei dos
three trois drei tres
four quatre vier cuatro
five cinq fünf cinco
six six sechs seis
seven sept sieben siete
eight huit acht ocho
nine neuf neun nueve
ten dix zehn diez
eleven onze elf once
twelve douze zwölf doce
thirteen treize dreizehn trece
fourteen quatorze vierzehn catorce
fifteen quinze fünfzehn quince
sixteen seize sechzehn dieciséis
seventeen dix-sept siebzehn diecisiete
eighteen dix-huit achtzehn dieciocho
nineteen dix-neuf neunzehn diecinueve
twenty vingt zwanzig veinte
thirty trente dreißig treinta
forty quarante vierzig cuarenta
fifty cinquante fünfzig cincuenta
sixty soixante sechzig sesenta
seventy soixante-dix siebzig setenta
eighty quatre-vingts achtzig ochenta
ninety quatre-vingt-dix neunzig noventa""".split("\n")
    )
}
NUMBER_WORDS: Final = tuple(NUMBERS)


def translated(words: str, language: str) -> str:
    """Number words, each by itself, in another language."""
    column = LANGUAGES.index(language)
    return " ".join(NUMBERS[word][column] for word in words.split())


# Colours of shapes, as red, green and blue in 0..255.
COLORS: Final = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "orange": (245, 140, 20),
    "purple": (140, 40, 170),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}
BACKGROUNDS: Final = ("white", "black", "yellow", "blue")
SHAPES: Final = ("circle", "square", "triangle", "cross", "star")


def a(words: str) -> str:
    """The indefinite article before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# Words in pictures, at most five letters.
PRINTED: Final = tuple(
    dict.fromkeys(
        """
CAT DOG SUN SKY RED BLUE TREE FISH BIRD BOOK DOOR MILK RAIN SNOW WIND FIRE GOLD IRON STAR MOON ROAD SHIP TRAIN
HOUSE TABLE CHAIR WATER BREAD APPLE GRAPE LEMON PEACH MUSIC DANCE LIGHT NIGHT GREEN WHITE BLACK BROWN STOP EXIT OPEN
PUSH PULL GATE PARK BANK SHOP CAFE HOTEL TAXI BUS BIKE CAR LEFT RIGHT NORTH SOUTH EAST WEST HAND FOOT HEAD NOSE EYE EAR
ARM LEG HEART STONE RIVER LAKE SEA HILL FIELD LION TIGER BEAR WOLF FOX HORSE COW PIG SHEEP GOAT MOUSE RAT DUCK GOOSE HEN
EGG SALT SUGAR HONEY RICE CORN BEAN SOUP MEAT CAKE TEA CUP BOWL FORK KNIFE SPOON PLATE GLASS LAMP BED SOFA WALL ROOF
FLOOR KEY LOCK BOX BAG HAT COAT SHOE SOCK RING CLOCK PHONE RADIO PAPER PEN DESK MAP FLAG DRUM BELL ZERO ONE TWO THREE
FOUR FIVE SIX SEVEN EIGHT NINE TEN JUMP WALK RUN SIT STAND SING PLAY WORK REST GAME BALL KING QUEEN JOKE QUIZ ZOO VAN
YES NO GO UP IN ON MENU SALE FREE HELP INFO CLOSE ENTER POST COLD HOT WARM FAST SLOW LONG SHORT TALL HIGH LOW DEEP DARK
SOFT HARD CLEAN DIRTY HAPPY SAD ANGRY BRAVE CALM KIND LAZY QUICK SMART YOUNG OLD NEW GREAT SMALL LARGE HUGE TINY WIDE
THIN THICK HEAVY EMPTY FULL SAFE BOAT PLANE TRUCK WHEEL MOTOR ROBOT SPACE EARTH OCEAN BEACH SAND ISLE COAST CLIFF CAVE
CLOUD STORM THUMB KNEE NECK BACK CHEST SKIN BONE TOOTH MOUTH LIP CHIN HAIR BEARD PIANO FLUTE HARP VIOLA SONG POEM STORY
NOVEL TITLE PAGE LINE WORD VOWEL MATH SUM CUBE CONE PRISM ANGLE AREA COUNT DIGIT HALF DOZEN CENT COIN PRICE TRADE CARGO
PORT DOCK PIER TOWER CROWN SWORD ARMOR ARROW BOW LANCE""".split()
    )
)

COMMANDS: Final = (
    *(f"turn {way} the {thing}" for way in ("on", "off") for thing in ("light", "radio", "fan")),
    *(f"{verb} the {thing}" for verb in ("open", "close") for thing in ("door", "window", "box")),
    *("go left", "go right", "go home", "play music", "stop the music", "good morning", "good night"),
    *("call my mother", "what time is it", "thank you"),
)

# Questions about pictures: typed, and spoken.
PICTURE_QUESTIONS: Final = {
    "number": ("What number is shown?", "Read the number."),
    "word": ("What word is shown?", "Read the word."),
    "sign": ("What does the image say?", "What is written here?"),  # a number or a word
    "describe": ("What is shown?", "Describe the image."),
    "color": ("What color is it?",),
    "shape": ("What shape is it?",),
    "larger": ("Which number is larger?",),
}
SPOKEN_QUESTIONS: Final = {
    "number": ("what number is shown", "read the number"),
    "word": ("what word is shown", "read the word"),
    "describe": ("what is shown", "describe the image"),
    "color": ("what color is it",),
    "shape": ("what shape is it",),
}
SPEECH_QUESTIONS: Final = {
    "transcribe": ("Transcribe the audio.", "Transcribe the audio to text."),
    "translate": ("Translate the audio to French.",),
}
THEN_TRANSLATE: Final = "Now translate it to French."
