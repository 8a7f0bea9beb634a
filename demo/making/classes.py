"""The demo base's class words, backgrounds, rare tokens and captions.

A class is one emoji. `CLASSES` has its code point (to look it up in Noto, Twemoji and Fluent) and, if the Firefox OS
set has a suitable drawing, its name there.
"""

from __future__ import annotations

import random

_TABLE = """
dog 1f436 dog | cat 1f431 cat | lion 1f981 - | tiger 1f42f tiger | horse 1f434 horseface | unicorn 1f984 -
pig 1f437 pig | rabbit 1f430 bunny | bear 1f43b bear | panda 1f43c pandaface | koala 1f428 koala | fox 1f98a -
frog 1f438 frog | monkey 1f435 monkeyface | chicken 1f414 chicken | penguin 1f427 penguin
chick 1f425 frontfacingchick | owl 1f989 - | turtle 1f422 turtle | whale 1f433 spurtingwhale
fish 1f420 tropicalfish | octopus 1f419 octopus | snail 1f40c snail | butterfly 1f98b - | bee 1f41d honeybee
ladybug 1f41e ladybeetle | crab 1f980 - | elephant 1f418 elephant | snake 1f40d snake | rose 1f339 rose
sunflower 1f33b sunflower | cactus 1f335 cactus | palm tree 1f334 palmtree | mushroom 1f344 mushroom
clover 1f340 fourleafclover | cherry blossom 1f338 cherryblossom | maple leaf 1f341 mapleleaf
apple 1f34e redapple | pear 1f350 pear | lemon 1f34b lemon | banana 1f34c banana | watermelon 1f349 watermelon
grapes 1f347 grapes | strawberry 1f353 strawberry | cherries 1f352 cherries | pineapple 1f34d pineapple
eggplant 1f346 aubergine | corn 1f33d earofmaize | carrot 1f955 - | avocado 1f951 - | cheese 1f9c0 -
hamburger 1f354 hamburger | pizza 1f355 sliceofpizza | hot dog 1f32d - | fries 1f35f frenchfries
donut 1f369 doughnut | cookie 1f36a cookie | cake 1f370 shortcake | ice cream 1f368 icecream
lollipop 1f36d lollipop | beer 1f37a beermug | wine 1f377 wineglass | soccer ball 26bd soccerball
basketball 1f3c0 - | trophy 1f3c6 trophy | dart 1f3af directhit | guitar 1f3b8 guitar | dice 1f3b2 gamedie
car 1f697 automobile | taxi 1f695 taxi | bus 1f68c bus | helicopter 1f681 helicopter | rocket 1f680 rocket
sailboat 26f5 sailboat | clock 23f0 alarmclock | camera 1f4f7 camera | light bulb 1f4a1 lightbulb
candle 1f56f candle | key 1f511 key | lock 1f512 lock | bell 1f514 bell | gift 1f381 present
balloon 1f388 balloon | teddy bear 1f9f8 - | crown 1f451 crown | gem 1f48e gem | umbrella 2602 umbrella
hat 1f3a9 tophat | shoe 1f45f mensshoe | robot 1f916 - | alien 1f47d alien | ghost 1f47b ghost
skull 1f480 skull | pumpkin 1f383 jackolantern | snowman 26c4 snowmanwithoutsnow | heart 2764 redheart
star 2b50 whitemediumstar | moon 1f31b firstquartermoonface | rainbow 1f308 rainbow | fire 1f525 fire
snowflake 2744 snowflake | globe 1f30d europeafricaglobe | house 1f3e0 housebuilding | bomb 1f4a3 bomb
"""


def _parse(table: str) -> dict[str, tuple[str, str | None]]:
    classes = {}
    for entry in table.replace("\n", "|").split("|"):
        if entry.strip():
            word, code, firefox = entry.strip().rsplit(" ", 2)
            classes[word] = (code, None if firefox == "-" else firefox)
    return classes


CLASSES: dict[str, tuple[str, str | None]] = _parse(_TABLE)
"""class word -> (Unicode code point in hex, name in the Firefox OS set or None)."""

CLASS_WORDS: tuple[str, ...] = tuple(CLASSES)

STYLES: tuple[str, ...] = ("noto", "twemoji", "fxemoji")
"""The drawing styles of the first training stages. Fluent 3D is held out: it supplies the subjects."""

MORE_STYLES: tuple[str, ...] = (*STYLES, "noto-v1", "emojione")
"""The styles from stage `more_sets` on, so that the base learns more than three drawings per class."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (216, 44, 44),
    "blue": (45, 105, 224),
    "green": (58, 166, 78),
    "yellow": (252, 212, 60),
    "white": (252, 252, 252),
    "black": (18, 20, 24),
    "purple": (138, 76, 186),
    "orange": (248, 140, 30),
    "pink": (255, 162, 196),
    "gray": (142, 142, 146),
}

PATTERNS: tuple[str, ...] = ("striped", "checkered", "dotted")
SCENES: dict[str, str] = {"beach": "on a beach", "grass": "on the grass", "night": "at night"}
BACKGROUNDS: tuple[str, ...] = (*COLORS, *PATTERNS, *SCENES)

RARE_TOKENS: tuple[str, ...] = (
    "ohwx", "sks", "hta", "olis", "shs", "pll", "btr", "yqr", "lgm", "nrc", "ntv", "hyd",
    "pfc", "jhb", "kkr", "rwc", "fbs", "tsb", "tvc", "rgv", "ymm", "mfc", "pnc", "pjs",
)  # fmt: skip
"""Single CLIP tokens, sometimes put before the class word, so that the text encoder passes them on."""


def article(word: str) -> str:
    """'an ' before a vowel, '' before a plural, otherwise 'a '."""
    if word in ("grapes", "cherries", "fries", "dice"):
        return ""
    return "an " if word[0] in "aeiou" else "a "


def place(background: str) -> str:
    """The words for a background, such as 'on a red background' or 'on a beach'."""
    return SCENES.get(background) or f"on {article(background)}{background} background"


def caption(word: str, background: str | None, rare: str | None = None, with_article: bool = True) -> str:
    """A caption in the form used for training, such as 'a photo of a ohwx dog on a blue background'."""
    named = f"{rare} {word}" if rare else word
    text = f"a photo of {article(word) if with_article else ''}{named}"
    return f"{text} {place(background)}" if background else text


def random_caption(word: str, background: str, rng: random.Random, rare_share: float = 0.2) -> str:
    """A random training caption for *word* on *background*; 10 % are empty, for classifier-free guidance.

    Of the others, a fraction of *rare_share* has a rare token before the class word.
    """
    if rng.random() < 0.1:
        return ""
    rare = rng.choice(RARE_TOKENS) if rng.random() < rare_share else None
    with_article = rng.random() < (0.5 if rare else 0.95)
    return caption(word, background if rng.random() < 0.85 else None, rare, with_article)


def all_words() -> tuple[str, ...]:
    """All words that captions may contain, sorted."""
    words = {"a", "an", "the", "photo", "of", "on", "at", "in", "background", "picture", *RARE_TOKENS}
    for text in (*CLASS_WORDS, *BACKGROUNDS, *SCENES.values()):
        words.update(text.split())
    return tuple(sorted(words))
