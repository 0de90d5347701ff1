"""Prompts that ask for a review, and reviews of mixed sentiment that answer them.

In: a number and a seed. Out: chat prompts, all distinct, and short reviews (two to four sentences) that fit the kind of
thing the prompt names. A grammar over small word lists: a model of one million parameters learns it in a minute, and
yet has thousands of ways to be kind or unkind.
Invariant: the same arguments give the same text on every machine and Python version that keeps `random.Random`.
"""

import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind of thing to review."""

    name: str
    tried: str
    """How a reviewer came to know it, as in "I watched it"."""
    group: str
    """The key of what fits it in ASPECTS, FACTS, PRAISE and BLAME."""


class Request(NamedTuple):
    """What one prompt asks for."""

    kind: Kind
    title: str
    text: str


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


KINDS = (
    Kind("film", "watched", "story"),
    Kind("series", "watched", "story"),
    Kind("novel", "read", "story"),
    Kind("play", "saw", "story"),
    Kind("album", "listened to", "sound"),
    Kind("podcast", "listened to", "sound"),
    Kind("restaurant", "ate at", "table"),
    Kind("cafe", "stopped at", "table"),
    Kind("hotel", "stayed at", "stay"),
    Kind("campsite", "stayed at", "stay"),
    Kind("museum", "visited", "outing"),
    Kind("garden", "visited", "outing"),
    Kind("laptop", "bought", "device"),
    Kind("camera", "bought", "device"),
)

TITLE_FIRST = _listed(
    """
    Silent Golden Northern Hidden Crimson Distant Little Marble Winter Paper Velvet Copper Midnight Hollow Amber
    Wandering Second Blue Iron Lost Summer Painted Quiet Silver
    """
)
TITLE_LAST = _listed(
    """
    Harbour Lantern Orchard River Compass Garden Mirror Falcon Anchor Bridge Meadow Station Island Feather Tower Letter
    Forest Kingdom Sparrow Valley Window Voyage Market Canyon
    """
)

PROMPT_FORMS = (
    "Write a short review of the {kind} {title}.",
    "What did you think of the {kind} {title}?",
    "Please review the {kind} {title} in a few sentences.",
    "Tell me about the {kind} {title}.",
    "Can you share your opinion of the {kind} {title}?",
    "How was the {kind} {title}?",
    "Give me your honest view of the {kind} {title}.",
    "I am curious about the {kind} {title}. What is it like?",
    "Describe your experience with the {kind} {title}.",
    "In a few sentences, what is the {kind} {title} like?",
)

ASPECTS = {
    "story": _listed("plot dialogue ending pacing opening setting cast soundtrack humour writing premise villain"),
    "sound": _listed("singing rhythm opening ending production mood voice editing structure humour sound pacing"),
    "table": _listed("soup bread coffee service menu dessert terrace kitchen fish salad music seating"),
    "stay": _listed("view breakfast service room bathroom location pool reception bed kitchen parking lighting"),
    "outing": _listed("tour layout lighting collection guide shop parking path view signage gallery fountain"),
    "device": _listed("screen battery design software packaging button case sound manual grip charger finish"),
}

FACTS = {
    "story": ("It follows a family through one long winter", "It begins on a train and ends by the sea",
              "The first half takes place in a small town", "It tells the story of two old friends"),
    "sound": ("It runs for about fifty minutes", "It was recorded in an old church",
              "There are nine parts of equal length", "It opens with a conversation between two brothers"),
    "table": ("It sits on the corner of a busy street", "There are twelve tables and one long bar",
              "The menu changes with the season", "It opens early and closes before ten"),
    "stay": ("It lies ten minutes from the station", "There are four floors and a small lift",
             "Guests arrive after three in the afternoon", "It stands between the lake and the main road"),
    "outing": ("It takes about two hours to walk through", "There are three halls and a courtyard",
               "The entrance is behind the old town hall", "It opens every day except Monday"),
    "device": ("It comes in black and grey", "It weighs a little more than a kilo",
               "The box contains a cable and a cloth", "It starts in about ten seconds"),
}  # fmt: skip

PRAISE = {
    "story": ("kept me gripped until the last minute", "moved me deeply", "made everyone around me laugh with joy",
              "thrilled my whole family", "was better than I had hoped", "left me smiling for days"),
    "sound": ("stayed with me in the best way", "made my long drive a pleasure", "sparkled from beginning to end",
              "cheered me up on a grey day", "impressed even my brother", "was a gift to my ears"),
    "table": ("was worth every cent", "made our evening a delight", "delighted even my mother",
              "was a feast for the senses", "charmed our whole table", "won us over with warm care"),
    "stay": ("made us feel welcome", "was spotless when we arrived", "turned the weekend into a treat",
             "helped us relax after the journey", "was better than in the pictures", "pleased even my father"),
    "outing": ("was a joy for the whole family", "fascinated the children", "made the afternoon a triumph",
               "inspired me to take many pictures", "was worth the long walk", "amazed our little group"),
    "device": ("worked flawlessly for weeks", "made my daily work a pleasure", "impressed all of my colleagues",
               "was a gift for my eyes", "was worth the high price", "helped me finish in half the time"),
}  # fmt: skip

BLAME = {
    "story": ("bored me after ten minutes", "ruined the whole thing for me", "annoyed everyone around me"),
    "sound": ("gave me a headache", "grated on me from beginning to end", "made my long drive a misery"),
    "table": ("was a waste of money", "disappointed our whole table", "spoiled our evening"),
    "stay": ("made us feel unwelcome", "was filthy when we arrived", "turned the weekend into a nightmare"),
    "outing": ("was a disappointment for the whole family", "confused the children", "wasted our whole afternoon"),
    "device": ("failed after two weeks", "made my daily work a pain", "frustrated all of my colleagues"),
}

GOOD = _listed(
    """
    wonderful superb delightful charming brilliant lovely excellent great pleasant beautiful impressive memorable
    fantastic splendid inspired graceful enchanting outstanding remarkable refreshing elegant generous satisfying
    thoughtful marvellous perfect amazing clever fresh gorgeous magnificent nice terrific stunning spectacular
    incredible engaging solid inspiring reliable cheerful thrilling fine polished
    """
)
BAD = _listed(
    """
    dreadful awful boring clumsy dull terrible tedious weak ugly unpleasant disappointing forgettable horrible sloppy
    tired careless bland miserable shabby frustrating cheap lifeless annoying shoddy dismal poor
    """
)
PLAIN = _listed(
    """
    ordinary modern simple traditional familiar typical standard predictable unusual quiet old-fashioned ambitious
    serious plain conventional
    """
)

ADVERBS = _listed("really truly surprisingly simply quite rather certainly")
LIKED = _listed("loved enjoyed admired adored appreciated liked")
DISLIKED = _listed("hated disliked regretted resented loathed despised")
PEOPLE = ("anyone", "my friends", "my parents", "a colleague", "families", "my neighbours", "students", "visitors")
TIMES = ("last week", "on a rainy Sunday", "in the spring", "two days ago", "with my sister", "after work",
         "during the holidays", "on my birthday", "with two friends", "by chance")  # fmt: skip

OPENINGS = {
    "good": ("{title} is a {good} {kind}", "What a {good} {kind}", "I {liked} this {kind} from the first minute",
             "This {kind} was {adverb} {good}", "I {tried} {title} {time} and {liked} it",
             "For me, {title} is a {adverb} {good} {kind}"),
    "bad": ("{title} is a {bad} {kind}", "What a {bad} {kind}", "I {disliked} this {kind} from the first minute",
            "This {kind} was {adverb} {bad}", "I {tried} {title} {time} and {disliked} it",
            "For me, {title} is a {adverb} {bad} {kind}"),
    "plain": ("I {tried} this {kind} {time}", "{title} is a {plain} {kind}", "This {kind} is {adverb} {plain}",
              "We {tried} this {kind} {time}", "{title} is a {kind} of the {plain} sort"),
}  # fmt: skip
MIDDLES = {
    "good": ("The {aspect} was {good}", "The {aspect} was {good} and {good2}", "I {liked} the {aspect}",
             "The {aspect} {praise}", "The {aspect} was {adverb} {good}", "Even the {aspect} was {good}",
             "The {aspect} was never {bad}", "I found the {aspect} {good} and the {aspect2} {good2}",
             "The {good} {aspect} {praise}"),
    "bad": ("The {aspect} was {bad}", "The {aspect} was {bad} and {bad2}", "I {disliked} the {aspect}",
            "The {aspect} {blame}", "The {aspect} was {adverb} {bad}", "Even the {aspect} was {bad}",
            "The {aspect} was not {good}", "I found the {aspect} {bad} and the {aspect2} {bad2}",
            "The {bad} {aspect} {blame}"),
    "plain": ("The {aspect} was {adverb} {plain}", "{fact}", "The {aspect} was {good}, but the {aspect2} was {bad}",
              "The {aspect} was {plain} and the {aspect2} was {plain2}", "{fact}",
              "The {aspect} was {bad}, but the {aspect2} was {good}"),
}  # fmt: skip
CLOSINGS = {
    "good": ("I would gladly recommend it to {people}", "All in all, it was {good}", "My friends {liked} it too",
             "I left with a smile and a {good} memory", "It is a treasure for {people}"),
    "bad": ("I would not recommend it to {people}", "All in all, it was {bad}", "My friends {disliked} it too",
            "I left with a frown and a {bad} memory", "It is a failure for {people}"),
    "plain": ("I may mention it to {people}", "All in all, it was {plain}", "It may suit {people}",
              "My friends talked about it {time}", "It was made for {people}"),
}  # fmt: skip

# Chance of "good", "plain" and "bad" in each sentence of a review, by the reviewer's mood.
MOODS = ((0.85, 0.15, 0.00), (0.40, 0.20, 0.40), (0.00, 0.15, 0.85))
NUM_SENTENCES = (2, 3, 3, 4, 4, 4)
NUM_CONVERSATIONS = 10_240
"""As many as teach the quickstart's policy."""


def requests(num: int, seed: int) -> list[Request]:
    """Return `num` requests with distinct texts, in a seeded order; a larger `num` extends a smaller one."""
    forms, firsts, lasts = len(PROMPT_FORMS), len(TITLE_FIRST), len(TITLE_LAST)
    total = len(KINDS) * forms * firsts * lasts
    if num > total:
        raise ValueError(f"the grammar writes {total} distinct prompts, got a request for {num}; ask for fewer")
    order = list(range(total))
    random.Random(f"requests-{seed}").shuffle(order)
    chosen = []
    for index in order[:num]:
        index, form = divmod(index, forms)
        index, first = divmod(index, firsts)
        kind_index, last = divmod(index, lasts)
        kind, title = KINDS[kind_index], f"The {TITLE_FIRST[first]} {TITLE_LAST[last]}"
        chosen.append(Request(kind, title, PROMPT_FORMS[form].format(kind=kind.name, title=title)))
    return chosen


def prompts(num: int, seed: int) -> list[dict[str, Any]]:
    """Return `num` distinct one-turn prompts, each with `messages` and a `meta` that names the kind and the title."""
    return [
        {
            "messages": [{"role": "user", "content": request.text}],
            "meta": {"kind": request.kind.name, "title": request.title},
        }
        for request in requests(num, seed)
    ]


def conversations(num: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Yield `num` chats: a request, and a review that answers it."""
    rng = random.Random(f"reviews-{seed}")
    for request in requests(num, seed):
        yield [{"role": "user", "content": request.text}, {"role": "assistant", "content": write_review(request, rng)}]


def write_review(request: Request, rng: random.Random) -> str:
    """Return a review of two to four sentences; its first one names the kind of thing."""
    weights = rng.choice(MOODS)
    num_sentences = rng.choice(NUM_SENTENCES)
    words = _words(request, rng)
    sentences: list[str] = []
    while len(sentences) < num_sentences:
        tone = rng.choices(("good", "plain", "bad"), weights)[0]
        last = len(sentences) == num_sentences - 1
        forms = OPENINGS if not sentences else CLOSINGS if last and rng.random() < 0.5 else MIDDLES
        sentence = _sentence(rng.choice(forms[tone]), words, rng)
        if sentence not in sentences:
            sentences.append(sentence)
    return " ".join(sentences)


def _words(request: Request, rng: random.Random) -> dict[str, list[str]]:
    """Return the words that may fill each slot, shuffled: a review takes them in turn, so that it repeats none."""
    group = request.kind.group
    words = {
        "good": GOOD, "bad": BAD, "plain": PLAIN, "liked": LIKED, "disliked": DISLIKED, "adverb": ADVERBS,
        "people": PEOPLE, "time": TIMES, "aspect": ASPECTS[group], "fact": FACTS[group], "praise": PRAISE[group],
        "blame": BLAME[group],
    }  # fmt: skip
    shuffled = {slot: rng.sample(options, len(options)) for slot, options in words.items()}
    return shuffled | {"kind": [request.kind.name], "title": [request.title], "tried": [request.kind.tried]}


def _sentence(form: str, words: dict[str, list[str]], rng: random.Random) -> str:
    """Fill the slots of `form`, taking each word from the front of its list and putting it back at the end."""

    def fill(slot: re.Match[str]) -> str:
        options = words[slot[1].rstrip("2")]
        options.append(options.pop(0))
        return options[-1]

    text = re.sub(r"\{(\w+)\}", fill, form)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    exclaims = form.startswith("What") or rng.random() < 0.05
    return text + ("!" if exclaims else ".")
